"""The grid of a volume file: turns arrays between the axes of files, and measures how far grids are apart."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float
from nibabel.affines import apply_affine
from nibabel.nifti1 import Nifti1Header
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform

from calib_jax.predictions.volumes import Affine, VolumeFile

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

    header: Nifti1Header
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
        return apply_orientation(voxels, self.turn(other))

    def distance(self, other: "Grid") -> tuple[float, float]:
        """Largest distance between the corners of two grids, in millimetres and in voxels of this grid.

        The axes may be flipped and permuted. Grids of different shapes have infinite distance.
        """
        affine = affine_of(self.header)
        if other.file_shape == self.file_shape and np.array_equal(affine_of(other.header), affine):
            return 0.0, 0.0
        turn = self.turn(other)
        if tuple(other.file_shape[i] for i in np.argsort(turn[:, 0])) != self.file_shape:
            return np.inf, np.inf
        turned = affine_of(other.header) @ inv_ornt_aff(turn, other.file_shape)
        corners = np.stack(np.meshgrid(*((0, size - 1) for size in self.file_shape)), -1).reshape(-1, 3)
        apart = apply_affine(turned, corners) - apply_affine(affine, corners)
        in_voxels = apart @ np.linalg.inv(affine[:3, :3]).T
        return float(np.linalg.norm(apart, axis=1).max()), float(np.abs(in_voxels).max())

    def turn(self, other: "Grid") -> Float[np.ndarray, "3 2"]:
        """For each axis of `other`, the axis of this file and the direction, 1 or -1."""
        return io_orientation(np.linalg.inv(affine_of(self.header)) @ affine_of(other.header))

    def to_file(self, voxels: np.ndarray) -> np.ndarray:
        """The inverse of `to_ras`."""
        ras = np.array([[0, 1], [1, 1], [2, 1]])
        return np.ascontiguousarray(apply_orientation(voxels, ornt_transform(ras, self.orientation)))


def affine_of(header: Nifti1Header) -> Affine:
    """The 4x4 matrix from voxel index to millimetres."""
    return np.asarray(header.get_best_affine(), dtype=np.float64)
