"""Reads 2-D images, such as PNG, with pillow: arrays as nnU-Net's natural images, without a spacing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from calib_jax.predictions.case import PredictionError
from calib_jax.predictions.volumes import visible

IMAGE_ENDINGS = (".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg")


def is_image(path: Path) -> bool:
    """Whether the name is that of a 2-D image."""
    return path.suffix.lower() in IMAGE_ENDINGS


def images_in(folder: Path) -> list[Path]:
    """The visible images in a folder, sorted."""
    return [path for path in visible(folder) if is_image(path) and path.is_file()]


def open_image(path: Path) -> tuple[tuple[int, ...], np.ndarray, Callable[[], np.ndarray]]:
    """Opens an image and reads its header, not its pixels.

    A grey image has one channel, also where it is stored with a palette of greys. Other images have a channel for
    each of their bands.

    Returns:
        Shape `[x, y, 1]`, or `[x, y, 1, channels]` of more than one channel: x counts columns, y rows; the affine,
        in pixels; and the function that reads the array of this shape.

    Raises:
        PredictionError: pillow is not installed, or the file holds several images.
    """
    with _opened(path) as image:
        if (frames := getattr(image, "n_frames", 1)) > 1:
            raise PredictionError(f"{path} holds {frames} images: give a 2-D image, or a volume as NIfTI.")
        bands = _mode(image) or image.getbands()
        channels = len(bands)
        shape = (*image.size, 1, *([channels] if channels > 1 else []))

    def decode() -> np.ndarray:
        with _opened(path) as image:
            mode = _mode(image)
            pixels = np.asarray(image.convert(mode) if mode else image)  # [y, x] or [y, x, channels]
        return pixels.swapaxes(0, 1).reshape(shape)

    return shape, np.eye(4), decode


def grey_of(path: Path, pixels: Shaped[np.ndarray, "x y one channels"]) -> Shaped[np.ndarray, "x y one"]:
    """The one channel of a grey image that is stored in colours, without its transparency.

    Raises:
        PredictionError: a pixel has a colour.
    """
    colours = pixels[..., :3] if pixels.shape[-1] > 2 else pixels[..., :1]
    if (colours != colours[..., :1]).any():
        raise PredictionError(
            f"{path} has pixels of a colour: a label must be grey, with one value for each class."
        )
    return colours[..., 0]


def _opened(path: Path) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise PredictionError(
            f"{path} is read by pillow, which is not installed: pip install 'calib_jax[report]'."
        ) from error
    return Image.open(path, formats=("PNG", "TIFF", "BMP", "JPEG"))


def _mode(image: Any) -> str | None:
    """The mode, L or RGB, in which to read an image with a palette; None for an image without."""
    if image.mode not in ("P", "PA"):
        return None
    palette = np.reshape(image.getpalette("RGB"), (-1, 3))
    return "L" if (palette == palette[:, :1]).all() else "RGB"
