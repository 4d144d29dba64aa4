"""Host-side array transforms: normalise, fit to a patch, pad for whole-volume inference and back."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32, Shaped, UInt8


def z_score_nonzero(
    image: Float[np.ndarray, "*spatial channels"],
) -> Float32[np.ndarray, "*spatial channels"]:
    """Scales each channel to mean 0 and standard deviation 1 over its non-zero voxels.

    Voxels that are exactly zero (the background of skull-stripped scans) stay zero; a channel that is
    constant over its non-zero voxels becomes zero.

    Args:
        image: intensities, any unit.

    Returns:
        The image without unit, float32; the sums are taken in float64.

    >>> z_score_nonzero(np.array([[0.0], [1.0], [3.0]])).ravel().tolist()
    [0.0, -1.0, 1.0]
    """
    nonzero = image != 0
    axes = tuple(range(image.ndim - 1))
    count = np.maximum(nonzero.sum(axes), 1)
    mean = image.sum(axes, dtype=np.float64) / count
    centred = np.where(nonzero, image - mean, 0.0)
    std = np.sqrt(np.square(centred).sum(axes) / count)
    return (centred / np.where(std > 0, std, 1.0)).astype(np.float32)


def z_score_window(
    image: Float[np.ndarray, "*spatial channels"], window: tuple[float, float]
) -> Float32[np.ndarray, "*spatial channels"]:
    """Cuts intensities off to a window and scales each channel to mean 0 and standard deviation 1 over all voxels.

    Args:
        image: intensities in the window's unit, Hounsfield units in CT.
        window: smallest and largest intensity.

    Returns:
        The image without unit, float32; a channel that is constant within the window becomes zero.

    >>> z_score_window(np.array([[-1000.0], [0.0], [100.0], [2000.0]]), (0.0, 100.0)).ravel().tolist()
    [-1.0, -1.0, 1.0, 1.0]
    """
    cut = np.clip(image, *window)
    axes = tuple(range(image.ndim - 1))
    mean, std = cut.mean(axes, dtype=np.float64), cut.std(axes, dtype=np.float64)
    return ((cut - mean) / np.where(std > 0, std, 1.0)).astype(np.float32)


def fit_to_patch(
    image: Float32[np.ndarray, "*spatial channels"],
    label: UInt8[np.ndarray, "*spatial"],
    patch: Sequence[int],
    rng: np.random.Generator,
) -> tuple[Float32[np.ndarray, "*patch channels"], UInt8[np.ndarray, "*patch"]]:
    """Cuts a random crop where the image is larger than the patch and pads with zeros where it is smaller.

    Args:
        image: intensities; the padding is 0, the mean of a z-scored image.
        label: class ids; the padding is 0, background.
        patch: voxels along each spatial axis.
        rng: draws the corner of the crop; the padding is centred.

    Returns:
        Image and label of spatial shape `patch`, cut at the same place.
    """
    room = np.maximum(np.subtract(label.shape, patch), 0)
    corner = rng.integers(0, room + 1)
    crop = tuple(slice(start, start + size) for start, size in zip(corner, patch, strict=True))
    return _pad_centred(image[crop], patch), _pad_centred(label[crop], patch)


def pad_to_hold(
    array: Shaped[np.ndarray, "*spatial channels"], patch: Sequence[int]
) -> Shaped[np.ndarray, "*padded channels"]:
    """Pads with centred zeros until a patch fits in along every axis; `crop_back` is the inverse.

    Args:
        array: a whole volume, channel last.
        patch: voxels along each spatial axis, at least.

    >>> pad_to_hold(np.ones((35, 70, 1)), (48, 64)).shape
    (48, 70, 1)
    """
    return _pad_centred(array, np.maximum(array.shape[:-1], patch))


def crop_back(array: Shaped[np.ndarray, "..."], spatial_shape: Sequence[int]) -> Shaped[np.ndarray, "..."]:
    """Cuts the centred padding away again.

    Args:
        array: leading axes are the padded spatial ones, any axes may follow (channels, classes).
        spatial_shape: lengths before `pad_to_hold`.

    >>> padded = pad_to_hold(np.arange(3.0)[:, None], (4,))
    >>> crop_back(padded, (3,)).ravel().tolist()
    [0.0, 1.0, 2.0]
    """
    starts = [(padded - size) // 2 for padded, size in zip(array.shape, spatial_shape, strict=False)]
    return array[tuple(slice(start, start + size) for start, size in zip(starts, spatial_shape, strict=True))]


def _pad_centred(array: np.ndarray, spatial_shape: Sequence[int] | np.ndarray) -> np.ndarray:
    """Zero-pads the leading axes to `spatial_shape`, the odd voxel at the end."""
    missing = np.subtract(spatial_shape, array.shape[: len(spatial_shape)])
    widths = [(int(n) // 2, int(n) - int(n) // 2) for n in missing]
    return np.pad(array, widths + [(0, 0)] * (array.ndim - len(widths)))
