"""Cases in NIfTI files, whatever the layout of their folder: existence, shapes, grids, labels are checked here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from train.data.case import Case
from train.data.nifti import Grid, affine_of, open_nifti, read_channels, read_label, spatial_and_channels
from train.errors import InputError

AFFINE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Entry:
    """Files of one case: one image that holds all channels, or one for each channel in turn."""

    name: str
    images: tuple[Path, ...]
    label: Path
    subject: str = ""
    """Whose scan it is, where a subject has several; else the case's own name."""


@dataclass(frozen=True)
class Layout:
    """What a folder holds, as its layout says; no voxel has been read.

    Attributes:
        name: of the data set.
        source: file or folder that says so, for error messages.
        class_names: by class id, background first.
        num_channels: of each image.
        entries: the cases.
        label_values: the number that stands for each class in the files; BraTS 2021 has no 3, but a 4.
        regions: names of evaluation regions, each with the class ids that make it up; empty for the classes.
        window: intensities are cut off to this range before they are normalised, as is usual in CT; None
            normalises over the non-zero voxels.
    """

    name: str
    source: Path
    class_names: tuple[str, ...]
    num_channels: int
    entries: tuple[Entry, ...]
    label_values: tuple[int, ...] = ()
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    window: tuple[float, float] | None = None


class VolumeDataset:
    """The cases of a `Layout`, turned to RAS order.

    Opening reads every header (existence, shapes, channels, affines); voxels are checked as cases load.

    Raises:
        InputError: whatever is wrong, with the file it is wrong in.
    """

    spatial_dims = 3

    def __init__(self, layout: Layout):
        self.layout = layout
        self.name = layout.name
        self.class_names = layout.class_names
        self.num_channels = layout.num_channels
        self.regions = layout.regions
        self.window = layout.window
        self.case_names = tuple(entry.name for entry in layout.entries)
        self.subjects = tuple(entry.subject or entry.name for entry in layout.entries)
        if not layout.entries:
            raise InputError(f"{layout.source} holds no case.")
        _check_unique(layout)
        _check_existence(layout)
        grids = [_checked_grid(entry, layout) for entry in layout.entries]
        self.largest_shape = tuple(max(sides) for sides in zip(*(grid.shape for grid in grids), strict=True))

    def __len__(self) -> int:
        return len(self.layout.entries)

    def load(self, index: int) -> Case:
        """Reads case `index`."""
        entry, layout = self.layout.entries[index], self.layout
        image, grid = read_channels(entry.images, layout.window)
        label = self._read_label(entry).reshape(grid.file_shape)
        return Case(entry.name, image, grid.to_ras(label), grid.affine)

    def _read_label(self, entry: Entry) -> UInt8[np.ndarray, "*spatial"]:
        values = self.layout.label_values or tuple(range(len(self.class_names)))
        found = read_label(entry.label, values)
        ids = np.zeros(max(values) + 1, np.uint8)
        ids[list(values)] = np.arange(len(values))
        return ids[found]


def _check_unique(layout: Layout) -> None:
    names = [entry.name for entry in layout.entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{layout.source} lists {twice[0]} more than once: list each case once.")


def _check_existence(layout: Layout) -> None:
    missing = [
        file for entry in layout.entries for file in (*entry.images, entry.label) if not file.is_file()
    ]
    if missing:
        raise InputError(
            f"{missing[0]} does not exist, the first of {len(missing)} files that {layout.source} "
            "asks for and that are not there: complete the folder or correct the list."
        )


def _checked_grid(entry: Entry, layout: Layout) -> Grid:
    """Grid of an image whose channels and label all lie on it."""
    volumes = [open_nifti(file) for file in entry.images]
    spatial, channels = spatial_and_channels(entry.images[0], volumes[0])
    if len(volumes) == 1 and channels != layout.num_channels:
        raise InputError(
            f"{entry.images[0]} has {channels} channels, but {layout.source.name} declares "
            f'{layout.num_channels} under "modality": correct one of the two.'
        )
    for file in (*entry.images[1:], entry.label):
        _check_same_grid(entry.images[0], file, spatial)
    return Grid.of(volumes[0].header, spatial)


def _check_same_grid(image_path: Path, path: Path, spatial: tuple[int, ...]) -> None:
    image, other = open_nifti(image_path), open_nifti(path)
    if spatial_and_channels(path, other) != (spatial, 1):
        raise InputError(
            f"{path} has shape {other.shape}, but its image has {spatial}: they must lie on the same grid."
        )
    difference = np.abs(affine_of(image.header) - affine_of(other.header)).max()
    if not difference <= AFFINE_TOLERANCE:
        raise InputError(
            f"{path} has an affine that differs from its image's by up to {difference:.3g} mm: "
            "they must lie on the same grid."
        )
