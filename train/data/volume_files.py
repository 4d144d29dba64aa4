"""Volume files and 2-D images. The library reads the volumes; faults of both are `InputError` here."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from jaxtyping import Float32
from numpy import ndarray

from calib_jax.predictions import volumes
from calib_jax.predictions.case import PredictionError
from calib_jax.predictions.volumes import ENDINGS, parts_of, volumes_in
from train.data.images import IMAGE_ENDINGS, is_image, open_image
from train.errors import InputError

__all__ = [
    "ENDINGS",
    "VolumeFile",
    "as_input_error",
    "ending_of",
    "open_volume",
    "parts_of",
    "stem",
    "volumes_in",
]


@contextlib.contextmanager
def as_input_error() -> Iterator[None]:
    """A context that turns `PredictionError` into `InputError` with the same sentence."""
    try:
        yield
    except PredictionError as error:
        raise InputError(str(error)) from error


class VolumeFile(volumes.VolumeFile):
    """An opened volume; `read` raises `InputError`."""

    def read(self) -> Float32[ndarray, "x y z channels"]:
        with as_input_error():
            return super().read()


def open_volume(path: Path) -> VolumeFile:
    """Opens a file and reads its header, not its voxels.

    Raises:
        InputError: the file does not exist, is no volume, has no usable affine, or has another rank or type.
    """
    with as_input_error():
        opened = volumes.open_with(path, open_image) if is_image(path) else volumes.open_volume(path)
    return VolumeFile(**vars(opened))


def stem(path: Path) -> str:
    """The file's name without the ending of a volume or image, in upper or lower case.

    >>> stem(Path("scan.v2.NII.GZ"))
    'scan.v2'
    """
    return path.name.removesuffix(ending_of(path))


def ending_of(path: Path) -> str:
    """The ending of a volume or image as the name spells it; empty if the name has none."""
    return volumes.ending_of(path, (*ENDINGS, *IMAGE_ENDINGS))
