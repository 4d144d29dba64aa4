"""Data sets by their names on the command line."""

import inspect
import re
from collections.abc import Sequence
from pathlib import Path

from train.data.arrays import check_dataset
from train.data.cache import CaseStore
from train.data.case import Dataset
from train.data.geometry import Geometry
from train.data.layouts import LAYOUTS
from train.data.phantom import PhantomDataset
from train.data.volumes import (
    Layout,
    VolumeDataset,
    reorder_channels,
    replace_label_values,
    replace_range,
    replace_subjects,
)
from train.errors import InputError
from train.plugins import import_object, parse_call

_EXTERNAL = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*\s*(\(.*\))?\s*", re.DOTALL)


def open_dataset(
    spec: str,
    *,
    geometry: Geometry | None = None,
    all_annotators: bool = False,
    cache_dir: str = "",
    channel_order: Sequence[int] = (),
    intensities: tuple[float, float] | None = None,
    label_values: Sequence[int] = (),
    subjects: str = "",
) -> Dataset:
    """Opens a data set by its name on the command line.

    Args:
        spec: "phantom" (3-D), "phantom2d", "LAYOUT:PATH" for a folder in one of the `LAYOUTS`, or
            "package.module:function" or "package.module:function(KEY=VALUE, ...)" for a function that returns a
            `Dataset`. A prefix that names a layout means the layout.
        geometry: how volumes on disk are cropped and resampled.
        all_annotators: keep the labels of all annotators, see `VolumeDataset`.
        cache_dir: folder that keeps decoded and preprocessed volumes; empty for none.
        channel_order: the channels to use of volumes on disk, in order; empty for all.
        intensities: range that intensities of volumes on disk are clipped to, in place of their layout's range.
        label_values: value of each class in label files on disk, in place of the layout's values.
        subjects: regular expression that finds the subject in the name of a case, in place of the layout's.

    Raises:
        InputError: the name is unknown, an option does not apply, or a file is faulty.
    """
    kind, _, path = spec.partition(":")
    if kind in LAYOUTS and path:
        layout = replace_range(reorder_channels(open_layout(spec), channel_order), intensities)
        layout = replace_subjects(replace_label_values(layout, label_values), subjects)
        store = CaseStore(Path(cache_dir).expanduser()) if cache_dir else None
        return VolumeDataset(layout, geometry=geometry, all_annotators=all_annotators, store=store)
    if spec not in ("phantom", "phantom2d") and not _EXTERNAL.fullmatch(spec):
        raise InputError(
            f'data is "{spec}": give "phantom", "phantom2d", or LAYOUT:PATH with one of {", ".join(LAYOUTS)}, or '
            "package.module:function."
        )
    if geometry or all_annotators or cache_dir or channel_order or intensities or label_values or subjects:
        raise InputError(
            f"data is {spec}: spacing, crop_margin, annotators, cache_dir, channel_order, intensities, "
            "label_values and subjects are for volumes on disk (LAYOUT:PATH)."
        )
    if spec == "phantom":
        return PhantomDataset()
    if spec == "phantom2d":
        return PhantomDataset(spatial_shape=(64, 64), num_cases=200)
    return _open_external(spec)


def open_layout(spec: str) -> Layout:
    """Lists the files of "LAYOUT:PATH". Opens none of them, except one image to count its channels.

    Raises:
        InputError: there is no such layout, or the folder does not have it.
    """
    kind, _, path = spec.partition(":")
    if kind in LAYOUTS and path:
        return LAYOUTS[kind](path)
    raise InputError(
        f'data is "{spec}", which names no folder of volumes: give LAYOUT:PATH with one of {", ".join(LAYOUTS)}.'
    )


def _open_external(spec: str) -> Dataset:
    call = parse_call(spec)
    try:
        function = import_object(call.name)
    except InputError as error:
        raise InputError(f"{error} Or give LAYOUT:PATH with one of {', '.join(LAYOUTS)}.") from error
    try:
        inspect.signature(function).bind(**call.arguments)
    except TypeError as error:
        raise InputError(f"data is {spec}, which cannot be called: {error}.") from error
    return check_dataset(function(**call.arguments), call.name)
