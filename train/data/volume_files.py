"""Volume files of every format. Reading them is the library's; here their faults are `InputError`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from jaxtyping import Float32
from numpy import ndarray

from calib_jax.predictions import volumes
from calib_jax.predictions.case import PredictionError
from calib_jax.predictions.volumes import ENDINGS, ending_of, parts_of, stem, volumes_in
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
        return VolumeFile(**vars(volumes.open_volume(path)))
