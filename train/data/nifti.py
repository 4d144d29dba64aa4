"""Reading NIfTI volumes: what is wrong with a file is said in one sentence."""

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from jaxtyping import Float, Float32, Int32
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError

from train.data.transforms import z_score_nonzero, z_score_window
from train.errors import InputError

LABEL_TOLERANCE = 1e-3
"""By how much a label may differ from a whole number, as after a float32 copy or a scaled header."""

_UNREADABLE = (ImageFileError, HeaderDataError, EOFError, OSError, ValueError, TypeError, zlib.error)


def open_nifti(path: Path) -> nib.Nifti1Image:
    """Opens a file and reads its header, not its voxels.

    Raises:
        InputError: no such file, or not a readable NIfTI header.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: check the path.")
    try:
        volume: Any = nib.load(path)
    except _UNREADABLE as error:
        raise _corrupt(path, error) from error
    if not isinstance(volume, nib.Nifti1Image):
        raise InputError(
            f"{path} is a {type(volume).__name__}, not NIfTI in one file: convert it to .nii.gz."
        )
    return volume


@dataclass(frozen=True)
class Grid:
    """Where a file's voxels lie, and how its axes are turned to RAS order (right, anterior, superior) and back.

    Attributes:
        header: the file's.
        file_shape: spatial lengths in the file's order of axes.
    """

    header: nib.Nifti1Header
    file_shape: tuple[int, ...]

    @classmethod
    def of(cls, header: nib.Nifti1Header, file_shape: Sequence[int]) -> "Grid":
        """The grid of a file of this header."""
        return cls(header, tuple(file_shape))

    @property
    def orientation(self) -> Float[np.ndarray, "3 2"]:
        """For each of the file's axes its axis in RAS order, and 1 or -1 for its direction."""
        return io_orientation(affine_of(self.header))

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial lengths in RAS order."""
        return tuple(self.file_shape[i] for i in np.argsort(self.orientation[:, 0]))

    @property
    def affine(self) -> Float[np.ndarray, "4 4"]:
        """From voxel index in RAS order to millimetres."""
        return affine_of(self.header) @ inv_ornt_aff(self.orientation, self.file_shape)

    def to_ras(self, voxels: np.ndarray) -> np.ndarray:
        """Turns an array whose first axes are the file's to RAS order."""
        return np.ascontiguousarray(apply_orientation(voxels, self.orientation))

    def to_file(self, voxels: np.ndarray) -> np.ndarray:
        """The inverse of `to_ras`."""
        ras = np.array([[0, 1], [1, 1], [2, 1]])
        return np.ascontiguousarray(apply_orientation(voxels, ornt_transform(ras, self.orientation)))


def read_channels(
    paths: Sequence[Path], window: tuple[float, float] | None = None
) -> tuple[Float32[np.ndarray, "*spatial channels"], Grid]:
    """Reads a scan of one file for all channels (3-D, or 4-D with the channels last), or one for each.

    Args:
        paths: files on one grid.
        window: smallest and largest intensity, which others are set to.

    Returns:
        Intensities in RAS order, z-scored per channel, over the non-zero voxels or, with a window, over all; and
        the grid of the first file.

    Raises:
        InputError: missing, corrupt, of another rank, or with voxels that are not finite.
    """
    volumes = [open_nifti(path) for path in paths]
    shapes = [spatial_and_channels(path, volume)[0] for path, volume in zip(paths, volumes, strict=True)]
    channels = [
        _read_voxels(path, volume).reshape(*shape, -1)
        for path, volume, shape in zip(paths, volumes, shapes, strict=True)
    ]
    grid = Grid.of(volumes[0].header, shapes[0])
    voxels = grid.to_ras(np.concatenate(channels, axis=-1) if len(channels) > 1 else channels[0])
    return z_score_nonzero(voxels) if window is None else z_score_window(voxels, window), grid


def read_label(path: Path, values: Sequence[int]) -> Int32[np.ndarray, "*spatial"]:
    """Reads a label map, in the file's own order of axes, and rounds what is nearly a whole number.

    Args:
        path: of the file.
        values: what it may hold, whole numbers below 2^23, which float32 tells apart.

    Raises:
        InputError: missing, corrupt, with others than these values, or further than `LABEL_TOLERANCE` from them.
    """
    with np.errstate(over="ignore"):  # beyond float32 is infinite, which is told
        voxels = _read_voxels(path, open_nifti(path))
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


def spatial_and_channels(path: Path, volume: nib.Nifti1Image) -> tuple[tuple[int, ...], int]:
    """Splits a volume's shape into three spatial lengths and the number of channels.

    Raises:
        InputError: neither 3-D nor 4-D, or without voxels.
    """
    shape = tuple(int(n) for n in volume.shape)
    if len(shape) not in (3, 4) or 0 in shape:
        raise InputError(f"{path} has shape {shape}: give a 3-D volume, or a 4-D one with the channels last.")
    return shape[:3], shape[3] if len(shape) == 4 else 1


def affine_of(header: nib.Nifti1Header) -> Float[np.ndarray, "4 4"]:
    """The 4x4 matrix from voxel index to millimetres."""
    return np.asarray(header.get_best_affine(), dtype=np.float64)


def _read_voxels(path: Path, volume: nib.Nifti1Image) -> Float32[np.ndarray, "..."]:
    """All voxels as float32, finite."""
    dtype = np.dtype(volume.get_data_dtype())
    if dtype.kind not in "uif":
        raise InputError(f"{path} has voxels of type {dtype}: give real numbers, one per voxel and channel.")
    try:
        if path.suffix == ".gz":  # All of it: nibabel alone stops before the checksum at the end.
            volume = type(volume).from_bytes(gzip.decompress(path.read_bytes()))
        voxels = volume.get_fdata(caching="unchanged", dtype=np.float32)
    except _UNREADABLE as error:
        raise _corrupt(path, error) from error
    bad = voxels.size - np.count_nonzero(np.isfinite(voxels))
    if bad:
        raise InputError(f"{path} holds {bad} voxels that are NaN or infinite: mend or leave out this file.")
    return voxels


def _some(values: np.ndarray) -> str:
    shown = ", ".join(f"{value:.0f}" for value in values[:8])
    return shown + (", ..." if len(values) > 8 else "")


def _corrupt(path: Path, error: Exception) -> InputError:
    kind = type(error).__name__
    return InputError(f"{path} is truncated or corrupt, or no NIfTI file ({kind}): fetch or export it again.")
