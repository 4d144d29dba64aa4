"""Pictures of slices of cases: image or label, prediction, probability, and where the prediction is wrong."""

import io
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, UInt8

from calib_jax.report.measure import Slice

# Colours of Okabe and Ito and a few more, light enough to stand on a dark background.
_COLORS = (
    *("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#9AA5FF", "#8CD17D"),
    *("#B07AA1", "#FFBE7D", "#86BCB6", "#FF9DA7", "#D7B5A6", "#79706E", "#A0CBE8", "#F1CE63"),
)
_NOTHING = "#20262D"
_NOT_COUNTED = "#8A8F98"
_CONFIDENCE = ((0.3, "#FFF3B0"), (0.6, "#F4A259"), (0.8, "#BC4B51"), (0.95, "#3D3A6B"), (1.0, "#14213D"))
_RIGHT, _INSIDE = "#F2F4F7", "#C3CBD5"
_WRONG = ((0.3, "#FFE1DC"), (0.7, "#FF8A75"), (0.95, "#D81E05"), (1.0, "#B00000"))
_OVER_IMAGE = 0.5


def class_color(number: int) -> str:
    """Colour of a class in the pictures; 0 is the background."""
    return _NOTHING if number == 0 else _COLORS[(number - 1) % len(_COLORS)]


def panels(one: Slice, num_classes: int) -> Iterator[tuple[str, bytes]]:
    """The pictures of a slice, as titles and PNG files.

    Args:
        one: the slice.
        num_classes: number of label values, background included.
    """
    colors = np.array([_rgb(class_color(i)) for i in range(num_classes)])
    grey = np.repeat(one.image[..., None], 3, -1).astype(np.float64) if one.image.size else None
    if grey is not None:
        yield "Image", _png(grey)
    yield "Label", _png(_map(one.label, colors, grey, one.counted))
    yield "Prediction", _png(_map(one.prediction, colors, grey, np.ones_like(one.counted)))
    confidence = one.confidence / 255
    yield "Probability of the prediction (dark: near 1)", _png(_gradient(confidence, _CONFIDENCE))
    right = np.where((one.label > 0)[..., None], _rgb(_INSIDE), _rgb(_RIGHT))
    wrong = (one.label != one.prediction) & one.counted
    shown = np.where(wrong[..., None], _gradient(confidence, _WRONG), right)
    yield "Wrong voxels", _png(np.where(one.counted[..., None], shown, _rgb(_NOT_COUNTED)))


def _map(
    ids: np.ndarray, colors: np.ndarray, grey: np.ndarray | None, counted: np.ndarray
) -> Float[np.ndarray, "rows columns 3"]:
    painted = colors[np.minimum(ids, len(colors) - 1)]
    if grey is not None:
        over = (1 - _OVER_IMAGE) * grey + _OVER_IMAGE * painted
        painted = np.where((ids > 0)[..., None], over, grey)
    return np.where(counted[..., None], painted, _rgb(_NOT_COUNTED))


def _gradient(values: np.ndarray, stops: Sequence[tuple[float, str]]) -> Float[np.ndarray, "rows columns 3"]:
    at = [position for position, _ in stops]
    channels = np.array([_rgb(color) for _, color in stops]).T
    return np.stack([np.interp(values, at, channel) for channel in channels], -1)


def _rgb(color: str) -> np.ndarray:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)], np.float64)


def _png(pixels: Float[np.ndarray, "rows columns 3"]) -> bytes:
    from PIL import Image

    rounded: UInt8[np.ndarray, "rows columns 3"] = np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(rounded, "RGB").save(file, "PNG", optimize=True)
    return file.getvalue()
