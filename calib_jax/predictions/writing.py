"""Writes probabilities in the format that they came in."""

import contextlib
import gzip
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from jaxtyping import Float
from nibabel.imageglobals import LoggingOutputSuppressor

from calib_jax._kept import replacing
from calib_jax.predictions.arrays import IMAGE_ENDINGS, PAGES, ending_of
from calib_jax.predictions.case import PredictionError
from calib_jax.predictions.grids import affine_of
from calib_jax.predictions.layout import Layout, Reference
from calib_jax.predictions.values import Encoding, encode
from calib_jax.predictions.volumes import DETACHED, ITK_ENDINGS


@dataclass(frozen=True)
class PredictionFile:
    """How the probabilities of one case are stored: all that `write_probabilities` needs.

    Attributes:
        files: one, or one for each class.
        folder: that was opened; `files` lie in it or in its subfolders.
        kind: of the format.
        key: name of the array in an `.npz` file.
        dtype: as stored.
        layout: of one file.
        encoding: of its numbers.
        regions: whether channels are regions.
        reference: grid of the label, or of what stands for it.
        segmentation: the label map beside the file, or None.
    """

    files: tuple[Path, ...]
    folder: Path
    kind: Literal["volume", "npz", "npy", "image"]
    key: str
    dtype: np.dtype
    layout: Layout
    encoding: Encoding
    regions: bool
    reference: Reference
    segmentation: Path | None

    def path_in(self, out: Path) -> Path:
        """Where the case goes in another folder: the first file, others lie beside it."""
        return out / self.files[0].relative_to(self.folder)


def write_probabilities(
    path: str | os.PathLike[str], probs: Float[np.ndarray, "*spatial classes"], like: PredictionFile
) -> tuple[Path, ...]:
    """Writes probabilities in the format, dtype, order of axes, and affine of another prediction.

    Args:
        path: of the file. If each class has a file of its own, that of the first; the others lie beside it, with
            the names that they have in `like`.
        probs: as in `Case.probs`.
        like: of the same case, from `Predictions.template`.

    Returns:
        The files.

    Raises:
        PredictionError: the shape of `probs` is another than that of the case, or the file cannot be written.
    """
    path = Path(path)
    if like.encoding.scale == 1:
        raise PredictionError(
            f"{like.files[0]} holds whole numbers 0 and 1, which cannot hold other probabilities."
        )
    stored = encode(np.asarray(probs, np.float32), like.encoding, regions=like.regions)
    one_each = len(like.files) > 1
    channels = 1 if like.layout.class_axis is None else like.layout.stored[like.layout.class_axis]
    wanted = (*like.reference.shape, len(like.files) if one_each else channels)
    if stored.shape != wanted:
        raise PredictionError(
            f"{path} is to hold probabilities of shape {stored.shape}, but {like.files[0]} has {wanted}: give all "
            "classes on the same grid."
        )
    if not one_each:
        _write(path, like.layout.to_stored(stored), like, like.files[0])
        return (path,)
    targets = (path, *(path.with_name(source.name) for source in like.files[1:]))
    for index, (target, source) in enumerate(zip(targets, like.files, strict=True)):
        _write(target, like.layout.to_stored(stored[..., index : index + 1]), like, source)
    return targets


def write_volume(path: Path, voxels: np.ndarray, reference: Reference) -> None:
    """Writes an array on a grid, in the format that the name says: a volume, an image, or `.npy`."""
    _check_whole(path)
    name = path.name.lower()
    with written_whole(path) as partial:
        if name.endswith(IMAGE_ENDINGS):
            _save_image(partial, voxels)
        elif name.endswith(".npy") or reference.grid is None:
            with open(partial, "wb") as file:
                np.save(file, voxels)
        elif name.endswith(ITK_ENDINGS):
            _save_itk(partial, voxels, affine_of(reference.grid.header))
        else:
            _save_nifti(partial, voxels, reference.grid.header.copy())


def copy_file(source: Path, target: Path) -> Path:
    """Copies a file byte for byte, whole or not at all; returns its copy."""
    with written_whole(target) as partial:
        shutil.copyfile(source, partial)
    return target


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name with the ending of a file, which gets its own name when the context ends well.

    Raises:
        PredictionError: for any exception in the context.
    """
    try:
        with replacing(path) as partial:
            yield partial
    except (PredictionError, MemoryError):
        raise
    except OSError as error:
        raise PredictionError(
            f"{path} cannot be written ({error.strerror or error}): make room, or choose another folder."
        ) from error
    except Exception as error:  # of the library that writes the format
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise PredictionError(
            f"{path} cannot be written ({reason}): convert it to .nii.gz or .npz."
        ) from error


def _write(path: Path, stored: np.ndarray, like: PredictionFile, source: Path) -> None:
    if ending_of(path).lower() != ending_of(source).lower():
        raise PredictionError(
            f"{path} has another ending than {source.name}: keep the ending {ending_of(source)}."
        )
    _check_whole(path)
    with written_whole(path) as partial:
        if like.kind == "npz":
            _save_npz(partial, stored.astype(like.dtype), like.key)
        elif like.kind == "npy":
            with open(partial, "wb") as file:
                np.save(file, stored.astype(like.dtype))
        elif like.kind == "image":
            _save_image(partial, stored.astype(like.dtype), like.key)
        elif source.name.lower().endswith(ITK_ENDINGS):
            _save_like_itk(partial, stored.astype(like.dtype), source)
        else:
            _save_like_nibabel(partial, stored, like.dtype, source)


def _check_whole(path: Path) -> None:
    if path.name.lower().endswith(DETACHED):
        raise PredictionError(
            f"{path} is one of two files, which are not written: convert it to .nii.gz or .npz."
        )


def _save_npz(path: Path, array: np.ndarray, key: str) -> None:
    arrays: Any = {key: array}
    with open(path, "wb") as file:
        np.savez_compressed(file, **arrays)


def _save_nifti(path: Path, voxels: np.ndarray, header: nib.Nifti1Header) -> None:
    header.set_data_dtype(voxels.dtype)
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["cal_max"], header["cal_min"] = 0, 0
    header.set_intent("none")
    _stream(path, nib.Nifti1Image(voxels, header.get_best_affine(), header))


def _save_like_nibabel(path: Path, stored: np.ndarray, dtype: np.dtype, source: Path) -> None:
    """A volume with the class and header of another. Integers with a scale get one that fits the new numbers."""
    with LoggingOutputSuppressor():  # repairs of the header are intended
        old: Any = nib.load(source)
    scaled = old.dataobj.slope != 1 or old.dataobj.inter != 0
    array = stored.astype(np.float32) if dtype.kind in "iu" and scaled else stored.astype(dtype)
    _stream(path, type(old)(array, old.affine, old.header))


def _stream(path: Path, volume: Any) -> None:
    if path.name.lower().endswith(".nii.gz"):
        with gzip.open(path, "wb", compresslevel=1) as stream:
            volume.to_stream(stream)
    else:
        nib.save(volume, path)


def _save_itk(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    """Writes three axes, perhaps with channels behind them, on the grid of an affine."""
    import SimpleITK as sitk

    volume = sitk.GetImageFromArray(
        np.ascontiguousarray(voxels.transpose(2, 1, 0, *range(3, voxels.ndim))), isVector=voxels.ndim > 3
    )
    in_lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(in_lps[:3, :3], axis=0)
    volume.SetSpacing(spacing.tolist())
    volume.SetOrigin(in_lps[:3, 3].tolist())
    volume.SetDirection((in_lps[:3, :3] / spacing).ravel().tolist())
    sitk.WriteImage(volume, str(path), useCompression=True)


def _save_like_itk(path: Path, stored: np.ndarray, source: Path) -> None:
    """A volume with the grid of another, whatever the number of its axes."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(source))
    reader.ReadImageInformation()
    dims, is_vector = reader.GetDimension(), reader.GetNumberOfComponents() > 1
    array = stored.reshape(*reader.GetSize(), *([reader.GetNumberOfComponents()] if is_vector else []))
    volume = sitk.GetImageFromArray(
        np.ascontiguousarray(array.transpose(*reversed(range(dims)), *range(dims, array.ndim))),
        isVector=is_vector,
    )
    volume.SetSpacing(reader.GetSpacing())
    volume.SetOrigin(reader.GetOrigin())
    volume.SetDirection(reader.GetDirection())
    sitk.WriteImage(volume, str(path), useCompression=True)


def _save_image(path: Path, array: np.ndarray, key: str = "") -> None:
    from PIL import Image

    if key != PAGES:
        Image.fromarray(array).save(path)
        return
    first, *others = (Image.fromarray(page) for page in array)
    first.save(path, save_all=True, append_images=others)
