"""From a volume of any size to class probabilities: one patch, or a sliding window of patches."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Float32

from train.data import crop_back, pad_to_hold

PredictPatches = Callable[[np.ndarray], jax.Array]


def patch_predictor(graphdef: nnx.GraphDef, params: Any, rest: Any) -> PredictPatches:
    """Compiled function from patches `[batch, *patch, channels]` to probabilities `[batch, *patch, classes]`."""
    forward = jax.jit(_probabilities, static_argnums=0)
    return lambda images: forward(graphdef, params, rest, images)


def _probabilities(graphdef: nnx.GraphDef, params: Any, rest: Any, images: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, params, rest)
    model.eval()
    return jax.nn.softmax(model(images).astype(jnp.float32))


def predict_volume(
    predict: PredictPatches,
    image: Float32[np.ndarray, "*spatial channels"],
    patch: Sequence[int],
    *,
    overlap: float = 0.5,
    windows_per_batch: int = 4,
) -> Float32[np.ndarray, "*spatial classes"]:
    """Class probabilities of a whole volume.

    A volume that fits into the patch is padded to it and seen at once. A larger one is seen through windows
    that overlap; their probabilities are averaged with Gaussian weights, which trust a window's centre more
    than its rim.

    Args:
        predict: patches to probabilities.
        image: a volume of any size, as the network was trained on.
        patch: window, in voxels.
        overlap: share of a window that the next one covers again, at least.
        windows_per_batch: windows the network sees at a time.

    Returns:
        Probabilities on the grid of `image`; they sum to 1 over classes.
    """
    padded = pad_to_hold(image, patch)
    corners = list(_window_corners(padded.shape[:-1], patch, overlap))
    if len(corners) == 1:
        return crop_back(np.asarray(predict(padded[None])[0]), image.shape[:-1])
    weight = _gaussian_window(patch)
    total, norm = None, np.zeros((*padded.shape[:-1], 1), np.float32)
    for group in _groups(corners, windows_per_batch):
        windows = [tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True)) for corner in group]
        # The last group is filled up with copies, so that one program serves all.
        filled = windows + windows[-1:] * (windows_per_batch - len(windows))
        probs = np.asarray(predict(np.stack([padded[window] for window in filled])))
        total = np.zeros((*padded.shape[:-1], probs.shape[-1]), np.float32) if total is None else total
        for window, window_probs in zip(windows, probs, strict=False):
            total[window] += weight * window_probs
            norm[window] += weight
    assert total is not None
    return crop_back(total / norm, image.shape[:-1])


def _window_corners(shape: Sequence[int], patch: Sequence[int], overlap: float) -> Iterator[tuple[int, ...]]:
    """Corners of evenly spread windows that cover the volume, the last ones flush with its end."""
    axes = []
    for length, size in zip(shape, patch, strict=True):
        room, most = length - size, max(int(size * (1 - overlap)), 1)
        axes.append(np.linspace(0, room, -(-room // most) + 1).round().astype(int).tolist())
    return itertools.product(*axes)


def _gaussian_window(patch: Sequence[int]) -> Float[np.ndarray, "*patch one"]:
    """exp(-r^2 / 2) with a standard deviation of an eighth of each side, and never zero."""
    weight = np.ones((1,) * len(patch))
    for axis, size in enumerate(patch):
        offset = (np.arange(size) - (size - 1) / 2) / (size / 8)
        shape = [-1 if i == axis else 1 for i in range(len(patch))]
        weight = weight * np.exp(-(offset**2) / 2).reshape(shape)
    return np.maximum(weight, 1e-3).astype(np.float32)[..., None]


def _groups(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
