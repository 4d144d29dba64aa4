"""Reading NIfTI volumes: what is wrong with a file is said in one sentence."""

import gzip
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from jaxtyping import Float, Float32, UInt8
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from train.data.transforms import z_score_nonzero
from train.errors import InputError

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


def read_image(path: Path) -> tuple[Float32[np.ndarray, "*spatial channels"], nib.Nifti1Header]:
    """Reads a scan as the model sees it, in training and in prediction.

    Args:
        path: a 3-D volume, or a 4-D one with the channels last.

    Returns:
        Intensities, z-scored per channel over the non-zero voxels, and the file's header, which holds the
        affine (see `affine_of`).

    Raises:
        InputError: missing, corrupt, of another rank, or with voxels that are not finite.
    """
    volume = open_nifti(path)
    spatial_and_channels(path, volume)
    voxels = _read_voxels(path, volume)
    return z_score_nonzero(voxels.reshape(*voxels.shape[:3], -1)), volume.header


def read_label(path: Path, num_classes: int) -> UInt8[np.ndarray, "*spatial"]:
    """Reads class ids.

    Raises:
        InputError: missing, corrupt, or with values other than 0 to `num_classes` - 1.
    """
    voxels = _read_voxels(path, open_nifti(path))
    found = np.unique(voxels)
    broken = found[found != np.rint(found)]
    if broken.size:
        raise InputError(f"{path} holds the label value {broken[0]:g}: labels must be whole numbers.")
    unknown = found[(found < 0) | (found >= num_classes)]
    if unknown.size:
        raise InputError(
            f"{path} holds the label value {unknown[0]:g} (found: {_some(found)}), "
            f"but {list(range(num_classes))} are declared: correct the file or its data set's list of labels."
        )
    return voxels.astype(np.uint8)


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
    shown = ", ".join(f"{value:g}" for value in values[:8])
    return shown + (", ..." if len(values) > 8 else "")


def _corrupt(path: Path, error: Exception) -> InputError:
    kind = type(error).__name__
    return InputError(f"{path} is truncated or corrupt, or no NIfTI file ({kind}): fetch or export it again.")
