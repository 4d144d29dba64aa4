"""Opens a file of numbers in any format: volumes, NumPy arrays, and images. Nothing is ever unpickled."""

import math
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from calib_jax.predictions import volumes
from calib_jax.predictions.case import PredictionError
from calib_jax.predictions.inflate import MOST_INFLATED, unzip
from calib_jax.predictions.volumes import VolumeFile

ARRAY_ENDINGS = (".npz", ".npy")
PAGES = "pages"  # key of an image that has a page for each class
IMAGE_ENDINGS = (".png", ".tiff", ".tif")
ENDINGS = (*volumes.ENDINGS, *ARRAY_ENDINGS, *IMAGE_ENDINGS)

NNUNET_KEYS = ("probabilities", "softmax")
"""Names of the array in the `.npz` files of nnU-Net v2 and v1."""
_KEYS = (*NNUNET_KEYS, "probs", "prob", "logits", "arr_0", "seg", "segmentation", "labels", "label")

# Numbers of Pillow's modes, and how many there are in a pixel.
_MODES = {
    "1": ("?", 1),
    "L": ("u1", 1),
    "P": ("u1", 1),
    "I;16": ("u2", 1),
    "I;16B": ("u2", 1),
    "I;16L": ("u2", 1),
    "I": ("i4", 1),
    "F": ("f4", 1),
    "LA": ("u1", 2),
    "RGB": ("u1", 3),
    "RGBA": ("u1", 4),
}


@dataclass(frozen=True)
class ArrayFile:
    """An opened file: its header has been read, its numbers have not.

    Attributes:
        path: of the file.
        kind: of its format.
        shape: as stored. An image has height, width, and channels if it has several; pages come first.
        dtype: as stored.
        key: name of the array in an `.npz` file; elsewhere empty.
        volume: the header of a volume; None for arrays and images, which do not say where they lie.
        decode: reads the array.
    """

    path: Path
    kind: Literal["volume", "npz", "npy", "image"]
    shape: tuple[int, ...]
    dtype: np.dtype
    key: str
    volume: VolumeFile | None
    decode: Callable[[], np.ndarray]

    @property
    def is_scaled(self) -> bool:
        """Whether the format itself turns stored integers to numbers."""
        return self.volume is not None and self.volume.is_scaled

    def read(self) -> np.ndarray:
        """Reads all numbers: integers as they are stored, others of a volume as float32.

        The array may be read-only.

        Raises:
            PredictionError: the file is truncated or corrupt, or a volume holds numbers that are not finite.
        """
        if self.volume is not None:
            # Labels stay integers: NumPy turns float32 to integers twenty times as slowly as it copies integers.
            whole = self.dtype.kind in "bui" and not self.is_scaled
            return (self.volume.read_stored() if whole else self.volume.read()).reshape(self.shape)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what Pillow says of strange tags
                return self.decode()
        except Exception as error:
            raise _unreadable(self.path, error) from error


def open_array(path: Path) -> ArrayFile:
    """Opens a file and reads its header, not its numbers.

    Raises:
        PredictionError: the file does not exist, has another format, or its header makes no sense.
    """
    name = path.name.lower()
    try:
        if not path.is_file():
            raise PredictionError(f"{path} does not exist: check the path.")
        if name.endswith(".npz"):
            return _open_npz(path)
        if name.endswith(".npy"):
            return _open_npy(path)
        if name.endswith(IMAGE_ENDINGS):
            return _open_image(path)
    except Exception as error:
        raise _unreadable(path, error) from error
    volume = volumes.open_volume(path)
    return ArrayFile(path, "volume", volume.stored_shape, volume.dtype, "", volume, volume.decode)


def ending_of(path: Path) -> str:
    """The ending of a format that can be read, as the name spells it; empty if the name has none.

    >>> ending_of(Path("a.b.NII.gz")), ending_of(Path("a.npz")), ending_of(Path("a.pkl"))
    ('.NII.gz', '.npz', '')
    """
    return volumes.ending_of(path, ENDINGS)


def stem(path: Path) -> str:
    """The file's name without that ending."""
    return path.name.removesuffix(ending_of(path))


# NumPy.


def _open_npz(path: Path) -> ArrayFile:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        key = next((key for key in _KEYS if key in members), None)
        if key is None and len(members) == 1:
            (key,) = members
        if key is None:
            raise PredictionError(
                f"{path} holds the arrays {', '.join(list(members)[:8]) or '(none)'}: name the one with the "
                f'probabilities "{NNUNET_KEYS[0]}".'
            )
        info = members[key]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            raise PredictionError(
                f"{path} is compressed in another way than NumPy does: write it with numpy.savez_compressed."
            )
        with archive.open(info) as stream:
            shape, dtype, offset, order = _npy_header(path, stream)
    _check_size(path, shape, dtype, info.file_size - offset)
    _check_size(path, shape, dtype, info.compress_size * MOST_INFLATED)

    def decode() -> np.ndarray:
        with zipfile.ZipFile(path) as archive:
            content = unzip(archive, info)
        return np.frombuffer(content, dtype, math.prod(shape), offset).reshape(shape, order=order)

    return ArrayFile(path, "npz", shape, dtype, key, None, decode)


def _open_npy(path: Path) -> ArrayFile:
    with path.open("rb") as stream:
        shape, dtype, offset, _ = _npy_header(path, stream)
    _check_size(path, shape, dtype, path.stat().st_size - offset)
    return ArrayFile(
        path, "npy", shape, dtype, "", None, lambda: np.load(path, mmap_mode="r", allow_pickle=False)
    )


def _npy_header(path: Path, stream: Any) -> tuple[tuple[int, ...], np.dtype, int, Literal["C", "F"]]:
    """Shape and dtype of the array, length of the header, and the order of the numbers."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, reversed_axes, dtype = readers[np.lib.format.read_magic(stream)](stream)
    if dtype.hasobject:
        raise PredictionError(
            f"{path} holds pickled objects, which are never loaded: save an array of numbers."
        )
    if dtype.kind not in "fiub" or dtype.itemsize > 8:
        raise PredictionError(f"{path} holds numbers of type {dtype}: save real numbers of at most 64 bits.")
    if 0 in shape:
        raise PredictionError(f"{path} holds an empty array of shape {shape}: export it again.")
    return shape, dtype, stream.tell(), "F" if reversed_axes else "C"


def _check_size(path: Path, shape: tuple[int, ...], dtype: np.dtype, most: int) -> None:
    """Raises before anything is allocated if a file cannot hold what its header claims."""
    needed = math.prod(shape) * dtype.itemsize
    if needed > most:
        raise PredictionError(
            f"{path} is truncated or corrupt, its header claims {needed} bytes and it holds at most "
            f"{max(most, 0)}: fetch or export it again."
        )


# Images.


def _open_image(path: Path) -> ArrayFile:
    from PIL import Image, ImageSequence

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path, formats=("PNG", "TIFF")) as image:
            mode, (width, height), pages = image.mode, image.size, getattr(image, "n_frames", 1)
            is_png = image.format == "PNG"
    if mode not in _MODES:
        raise PredictionError(
            f"{path} has pixels of type {mode}: save one number for each pixel and channel, of 8, 16 or 32 bits."
        )
    kind, channels = _MODES[mode]
    pages = 1 if is_png else pages
    shape = (
        *([pages] if pages > 1 else []),
        height,
        width,
        *([channels] if channels > 1 else []),
    )
    if len(shape) > 3:
        raise PredictionError(f"{path} has several pages of {mode} pixels: save a page for each class.")
    dtype = np.dtype(kind)
    if is_png:  # one bit stands for at most eight pixels
        _check_size(path, shape, dtype, path.stat().st_size * MOST_INFLATED * 8)

    def decode() -> np.ndarray:
        with Image.open(path, formats=("PNG", "TIFF")) as image:
            if pages == 1:
                return np.asarray(image)
            return np.stack([np.asarray(page) for page in ImageSequence.Iterator(image)])

    return ArrayFile(path, "image", shape, dtype, PAGES if pages > 1 else "", None, decode)


def _unreadable(path: Path, error: Exception) -> Exception:
    """The fault of a file whose reader raised `error`."""
    if isinstance(error, PredictionError | MemoryError):
        return error
    if isinstance(error, ModuleNotFoundError):
        return PredictionError(
            f"{path} is read by Pillow, which is not installed: pip install 'calib_jax[report]'."
        )
    if isinstance(error, OSError) and error.errno:
        return PredictionError(
            f"{path} cannot be read ({error.strerror}): check the file and its permissions."
        )
    return PredictionError(
        f"{path} is truncated or corrupt ({type(error).__name__}): fetch or export it again."
    )
