"""From stored numbers to probabilities and back: integers, logits, one foreground channel, and checks of values."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32

from calib_jax.predictions.case import PredictionError

RANGE_TOLERANCE = 1e-3
"""How far rounding may put a probability outside [0, 1]: one unit of float16 at 1."""
SUM_TOLERANCE = 1e-2
"""How far the classes of a voxel may be from summing to 1: values of 8 bits are rounded to 1 / 255."""

Channels = Literal["classes", "foreground", "regions"]
"""What the channels of an array are: all classes, all but the background, or regions that may overlap."""

_SCALES = (1, 100, 127, 255, 1000, 10000, 32767, 65535)
_LABELS_BELOW = 8  # integers in one channel that stay below are the ids of a label map
_SAMPLES = 32  # about so many voxels along each axis show which scale integers have


@dataclass(frozen=True)
class Encoding:
    """How probabilities are stored as numbers.

    Attributes:
        scale: that stored integers are divided by; None for other numbers.
        is_logits: whether logits are stored.
        first: the first class that is stored: 1 if the background is what is left to 1, else 0.
    """

    scale: int | None = None
    is_logits: bool = False
    first: int = 0


def decode(
    values: np.ndarray,
    *,
    path: object,
    is_integer: bool,
    dtype: np.dtype,
    channels: Channels,
    logits: bool,
    may_be_logits: bool,
) -> tuple[Float32[np.ndarray, "*spatial classes"], Encoding, str]:
    """Probabilities from stored numbers.

    Args:
        values: `[*spatial, channels]`, any real type.
        path: of the file, for messages.
        is_integer: whether the file stores integers without a scale of its own.
        dtype: as stored.
        channels: what they are; a single one of "classes" is that of the foreground.
        logits: whether the numbers are logits.
        may_be_logits: whether numbers far outside [0, 1] are taken for logits.

    Returns:
        Probabilities, how they are stored, and a notice or an empty string.

    Raises:
        PredictionError: the numbers are no probabilities.
    """
    if channels == "classes" and values.shape[-1] == 1:
        channels = "foreground"
    notice, scale = "", None
    if is_integer and not logits:
        scale = _scale(values, path, dtype, channels)
    values = values.astype(np.float32, order="K", copy=False)
    if scale not in (None, 1):
        values = values / np.float32(scale)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        bad = values.size - np.count_nonzero(np.isfinite(values))
        raise PredictionError(
            f"{path} holds {bad} numbers that are NaN or infinite: mend or leave out this file."
        )
    found = not logits and may_be_logits and low < -0.5 and high > 1.5
    if found:
        notice = (
            f"{path} holds numbers from {low:.4g} to {high:.4g} under the name of probabilities: they are taken "
            "for logits."
        )
    if logits or found:
        if channels == "foreground" and values.shape[-1] > 1:
            raise PredictionError(f"{path} holds logits without those of the background: export these too.")
        values = _softmax(values) if channels == "classes" else _sigmoid(values)
    elif low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        remedy = (
            "for logits add --logits (logits=True)"
            if low < 0 and high > 1.5
            else "divide by their largest value"
        )
        raise PredictionError(
            f"{path} holds numbers from {low:.6g} to {high:.6g}, but probabilities lie in [0, 1]: {remedy}, or "
            "export it again."
        )
    elif low < 0 or high > 1:
        values = np.clip(values, 0, 1, out=values if values.flags.writeable else None)
    if channels == "foreground":
        total = values.sum(-1, keepdims=True)
        if values.shape[-1] > 1 and float(total.max()) > 1 + SUM_TOLERANCE:
            raise PredictionError(
                f"{path} and the files of the other classes sum to {float(total.max()):.4g}: declare overlapping "
                "regions in dataset.json, or export probabilities that sum to 1."
            )
        values = np.concatenate([np.maximum(1 - total, 0), values], axis=-1)
    elif channels == "classes":
        _check_sums(values, path, max(SUM_TOLERANCE, values.shape[-1] / (2 * scale) if scale else 0))
    return values, Encoding(scale, logits, int(channels == "foreground")), notice or _if_hard(values, path)


def encode(
    probs: Float32[np.ndarray, "*spatial classes"], encoding: Encoding, *, regions: bool
) -> Float32[np.ndarray, "*spatial channels"]:
    """The inverse of `decode`; integers are rounded to the nearest."""
    values = probs[..., encoding.first :]
    if encoding.is_logits:
        tiny = np.finfo(np.float32).tiny
        logs = np.log(np.maximum(values, tiny))
        return logs - np.log(np.maximum(1 - values, tiny)) if regions or encoding.first else logs
    return values if encoding.scale is None else np.rint(values * np.float32(encoding.scale))


def sample(values: np.ndarray) -> np.ndarray:
    """A view of every few voxels of `[*spatial, channels]`."""
    return values[tuple(slice(None, None, max(size // _SAMPLES, 1)) for size in values.shape[:-1])]


def _scale(values: np.ndarray, path: object, dtype: np.dtype, channels: Channels) -> int:
    """The number that stands for probability 1."""
    if channels == "classes":
        total = float(np.median(sample(values).astype(np.float64).sum(-1)))
        nearest = min(_SCALES, key=lambda scale: abs(total - scale) / scale)
        if abs(total - nearest) <= max(values.shape[-1] / 2, SUM_TOLERANCE * nearest):
            return nearest
        raise PredictionError(
            f"{path} holds whole numbers whose classes sum to {total:g}: scale them to sum to 255 or 65535, or "
            "export floating point."
        )
    if 0 < float(values.max()) < _LABELS_BELOW:
        raise PredictionError(
            f"{path} holds whole numbers up to {float(values.max()):g}, as a label map does: give probabilities."
        )
    if dtype in (np.uint8, np.uint16):
        return int(np.iinfo(dtype).max)
    if dtype == np.bool_:
        raise PredictionError(f"{path} holds truth values, as a mask does: give probabilities.")
    raise PredictionError(
        f"{path} holds whole numbers of type {dtype}, whose scale is not known: export floating point or uint8."
    )


def _softmax(values: np.ndarray) -> np.ndarray:
    values = values - values.max(-1, keepdims=True)
    np.exp(values, out=values)
    values /= values.sum(-1, keepdims=True)
    return values


def _sigmoid(values: np.ndarray) -> np.ndarray:
    small = np.exp(-np.abs(values))
    return np.where(values >= 0, 1, small) / (1 + small)


def _check_sums(values: np.ndarray, path: object, tolerance: float) -> None:
    sums = values.sum(-1)
    low, high = float(sums.min()), float(sums.max())
    if max(1 - low, high - 1) > tolerance:
        raise PredictionError(
            f"{path} holds classes that sum to between {low:.4g} and {high:.4g} in a voxel: export softmax "
            "probabilities of all classes, or declare overlapping regions in dataset.json."
        )


def _if_hard(values: np.ndarray, path: object) -> str:
    some = sample(values)
    if ((some == 0) | (some == 1)).all() and some.any() and values.ndim:
        return f"{path} holds only 0 and 1, as a label map does: probabilities say how sure a model is."
    return ""
