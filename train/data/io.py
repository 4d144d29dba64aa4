"""Reads scans and label maps as arrays, with the grid that takes them to RAS order and back to their files."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import nibabel as nib
import numpy as np
from jaxtyping import Float, Int32
from nibabel.affines import apply_affine
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform

from train.data.images import grey_of, is_image
from train.data.shapes import Affine, Image
from train.data.volume_files import VolumeFile, open_volume
from train.errors import InputError

LABEL_TOLERANCE = 1e-3
"""Largest distance of a label from a whole number. Float32 copies and scaled headers round labels."""

# Largest distance in voxels between the corners of two grids that count as the same. A spacing rounded to 0.0001 mm
# adds up to 0.04 voxels over 512 voxels of 0.7 mm; a shift of this size moves no voxel to its neighbour.
GRID_TOLERANCE = 0.05


@dataclass(frozen=True)
class Grid:
    """The grid of a file; it turns arrays to RAS order (right, anterior, superior) and back.

    Attributes:
        header: of the file.
        file_shape: spatial lengths in the file's order of axes.
    """

    header: nib.Nifti1Header
    file_shape: tuple[int, ...]

    @classmethod
    def of(cls, volume: VolumeFile) -> "Grid":
        """The grid of a file."""
        return cls(volume.header, volume.shape)

    @cached_property
    def orientation(self) -> Float[np.ndarray, "3 2"]:
        """For each axis of the file, the axis in RAS order and the direction, 1 or -1."""
        return io_orientation(affine_of(self.header))

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial lengths in RAS order."""
        return tuple(self.file_shape[i] for i in np.argsort(self.orientation[:, 0]))

    @property
    def affine(self) -> Affine:
        """From voxel index in RAS order to millimetres."""
        return affine_of(self.header) @ inv_ornt_aff(self.orientation, self.file_shape)

    def to_ras(self, voxels: np.ndarray) -> np.ndarray:
        """Turns an array whose first axes are the file's to RAS order."""
        return np.ascontiguousarray(apply_orientation(voxels, self.orientation))

    def from_turned(self, voxels: np.ndarray, other: "Grid") -> np.ndarray:
        """Turns an array whose first axes are those of `other`, a file on the same grid, to this file's axes."""
        return apply_orientation(voxels, self._turn(other))

    def distance(self, other: "Grid") -> tuple[float, float]:
        """Largest distance between the corners of two grids, in millimetres and in voxels of this grid.

        The axes may be flipped and permuted. Grids of different shapes have infinite distance.
        """
        affine = affine_of(self.header)
        if other.file_shape == self.file_shape and np.array_equal(affine_of(other.header), affine):
            return 0.0, 0.0
        turn = self._turn(other)
        if tuple(other.file_shape[i] for i in np.argsort(turn[:, 0])) != self.file_shape:
            return np.inf, np.inf
        turned = affine_of(other.header) @ inv_ornt_aff(turn, other.file_shape)
        corners = np.stack(np.meshgrid(*((0, size - 1) for size in self.file_shape)), -1).reshape(-1, 3)
        apart = apply_affine(turned, corners) - apply_affine(affine, corners)
        in_voxels = apart @ np.linalg.inv(affine[:3, :3]).T
        return float(np.linalg.norm(apart, axis=1).max()), float(np.abs(in_voxels).max())

    def _turn(self, other: "Grid") -> Float[np.ndarray, "3 2"]:
        """For each axis of `other`, the axis of this file and the direction, 1 or -1."""
        return io_orientation(np.linalg.inv(affine_of(self.header)) @ affine_of(other.header))

    def to_file(self, voxels: np.ndarray) -> np.ndarray:
        """The inverse of `to_ras`."""
        ras = np.array([[0, 1], [1, 1], [2, 1]])
        return np.ascontiguousarray(apply_orientation(voxels, ornt_transform(ras, self.orientation)))


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


def affine_of(header: nib.Nifti1Header) -> Affine:
    """The 4x4 matrix from voxel index to millimetres."""
    return np.asarray(header.get_best_affine(), dtype=np.float64)


def _some(values: np.ndarray) -> str:
    shown = ", ".join(f"{value:.0f}" for value in values[:8])
    return shown + (", ..." if len(values) > 8 else "")
