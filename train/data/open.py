"""Data sets by their names on the command line."""

from collections.abc import Sequence
from pathlib import Path

from train.data.cache import CaseStore
from train.data.case import Dataset
from train.data.geometry import Geometry
from train.data.layouts import LAYOUTS
from train.data.phantom import PhantomDataset
from train.data.volumes import Layout, VolumeDataset, in_order, with_intensities
from train.errors import InputError


def open_dataset(
    spec: str,
    *,
    seed: int = 0,
    geometry: Geometry | None = None,
    all_annotators: bool = False,
    cache_dir: str = "",
    channel_order: Sequence[int] = (),
    intensities: tuple[float, float] | None = None,
) -> Dataset:
    """Opens a data set by its name on the command line.

    Args:
        spec: "phantom" (3-D), "phantom2d", or "LAYOUT:PATH", a folder in one of the `LAYOUTS`: msd (Medical
            Segmentation Decathlon), nnunet, brats, acdc, amos, amos-ct, kits.
        seed: which phantoms; data on disk does not depend on it.
        geometry: what is done to the grids of volumes on disk.
        all_annotators: keep what each annotator says, see `VolumeDataset`.
        cache_dir: folder in which decoded and preprocessed volumes are kept; empty for none.
        channel_order: which of the channels, in this order, of volumes on disk; empty for all.
        intensities: range that those of volumes on disk are cut off to, instead of their layout's.

    Raises:
        InputError: another name, or anything wrong with the files.
    """
    if spec.startswith("phantom") and (
        geometry or all_annotators or cache_dir or channel_order or intensities
    ):
        raise InputError(
            f"data is {spec}: spacing, crop_margin, annotators, cache_dir, channel_order and intensities are for "
            "volumes on disk."
        )
    if spec == "phantom":
        return PhantomDataset(seed=seed)
    if spec == "phantom2d":
        return PhantomDataset(spatial_shape=(64, 64), num_cases=200, seed=seed)
    layout = with_intensities(in_order(open_layout(spec), channel_order), intensities)
    store = CaseStore(Path(cache_dir).expanduser()) if cache_dir else None
    return VolumeDataset(layout, geometry=geometry, all_annotators=all_annotators, store=store)


def open_layout(spec: str) -> Layout:
    """The files of "LAYOUT:PATH", none of which is opened.

    Raises:
        InputError: no such layout, or a folder that does not lie in it.
    """
    kind, _, path = spec.partition(":")
    if kind in LAYOUTS and path:
        return LAYOUTS[kind](path)
    raise InputError(
        f'data is "{spec}": give "phantom", "phantom2d", or LAYOUT:PATH with one of {", ".join(LAYOUTS)}.'
    )
