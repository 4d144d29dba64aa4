"""Reads scans and label maps as arrays, with the grid that takes them to RAS order and back to their files."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from calib_jax.predictions.grids import GRID_TOLERANCE, Grid
from train.data.images import grey_of, is_image
from train.data.shapes import Image
from train.data.volume_files import VolumeFile, open_volume
from train.errors import InputError

__all__ = [
    "GRID_TOLERANCE",
    "LABEL_TOLERANCE",
    "Grid",
    "check_same_grid",
    "read_label",
    "read_scan",
]

LABEL_TOLERANCE = 1e-3
"""Largest distance of a label from a whole number. Float32 copies and scaled headers round labels."""


def read_scan(paths: Sequence[Path]) -> tuple[Image, Grid]:
    """Reads a scan: one file with all channels (3-D, or 4-D with the channels last), or one file per channel.

    Args:
        paths: files on one grid. Their axes may be flipped or permuted against each other.

    Returns:
        Intensities as stored, in RAS order; and the grid of the first file.

    Raises:
        InputError: a file is missing, corrupt, of another rank, or holds voxels that are not finite.
    """
    volumes = [open_volume(path) for path in paths]
    grid = Grid.of(volumes[0])
    channels = [grid.from_turned(volume.read(), Grid.of(volume)) for volume in volumes]
    return grid.to_ras(np.concatenate(channels, axis=-1) if len(channels) > 1 else channels[0]), grid


def open_label(path: Path) -> VolumeFile:
    """Opens a label map and reads its header. An image has one channel, also if it stores its greys as colours.

    Raises:
        InputError: as `open_volume`.
    """
    volume = open_volume(path)
    if volume.channels == 1 or not is_image(path):
        return volume
    return replace(volume, channels=1, decode=lambda: grey_of(path, volume.decode()))


def read_label(path: Path, values: Sequence[int]) -> Int32[np.ndarray, "*spatial"]:
    """Reads a label map, in the file's own order of axes, and rounds it to whole numbers.

    Args:
        path: of the file.
        values: allowed values, whole numbers below 2^23, which float32 represents exactly.

    Raises:
        InputError: the file is missing or corrupt, or holds a value further than `LABEL_TOLERANCE` from all of
            these.
    """
    voxels = open_label(path).read()[..., 0]
    found = np.unique(voxels)
    broken = found[np.abs(found - np.rint(found)) > LABEL_TOLERANCE]
    if broken.size:
        raise InputError(f"{path} holds the label value {broken[0]:g}: labels must be whole numbers.")
    found = np.unique(np.rint(found))
    unknown = found[~np.isin(found, values)]
    if unknown.size:
        raise InputError(
            f"{path} holds the label value {_some(unknown[:1])} (found: {_some(found)}), "
            f"but {list(values)} are declared: correct the file or its data set's list of labels."
        )
    return np.rint(voxels).astype(np.int32)


def check_same_grid(image: VolumeFile, other: VolumeFile) -> None:
    """Checks that another file of a case has one channel on the grid of the image, within `GRID_TOLERANCE`.

    Raises:
        InputError: it has more channels, or another grid.
    """
    apart, in_voxels = Grid.of(image).distance(Grid.of(other))
    if other.channels != 1 or apart == np.inf:
        raise InputError(
            f"{other.path} has shape {other.stored_shape}, but its image has {image.shape}: they must share a grid."
        )
    if in_voxels > GRID_TOLERANCE:
        raise InputError(
            f"{other.path} has an affine that differs from its image's by up to {apart:.3g} mm: they must share a "
            "grid."
        )


def _some(values: np.ndarray) -> str:
    shown = ", ".join(f"{value:.0f}" for value in values[:8])
    return shown + (", ..." if len(values) > 8 else "")
