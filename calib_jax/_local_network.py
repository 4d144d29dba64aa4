"""The network of local calibration: the parameters, what it sees of an image, and the logits that it gives."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from calib_jax._checks import AnyArray

# Smaller log-probabilities count as this one: files of float16 or of probabilities hold no more.
_LEAST_LOG = -12.0
_CERTAIN = 1e-4  # voxels are not changed if the smoothed probability of all other classes is below it
# Voxels between the three taps of each smoothing. Each smooths the result of the one before.
_DILATIONS = (1, 2, 4)
_HALO = sum(_DILATIONS)
_WIDTH = 32
_STEEPEST = 4.0  # largest |log| of the factor of a logit
_LEAST_GAP = 1e-6  # between the largest logit and the others: float32 probabilities keep their order
_IMAGE_LEVELS = 3  # of the image that the network sees: as it is and smoothed twice
_SIDE = 32  # sides of blocks are multiples of it, or half of it
_SLAB = 2**20  # voxels for which features exist at a time
_CHUNK = 2**11  # voxels that the network sees at a time; it skips those without an uncertain voxel


class LocalWeights(NamedTuple):
    """Weights of the network. All classes share them, except `classes`."""

    features: Float[AnyArray, "features width"]
    image: Float[AnyArray, "image_features width"]
    classes: Float[AnyArray, "classes width"]
    hidden: Float[AnyArray, "width width"]
    pooled: Float[AnyArray, "width width"]
    bias: Float[AnyArray, "width"]
    factor: Float[AnyArray, "width"]
    offset: Float[AnyArray, "width"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LocalCalibration:
    """A fitted local calibration, a pytree for `apply_local_calibration`.

    Attributes:
        weights: of the network, float32.
        keeps_labels: whether the class of the largest logit stays the largest (static).
        regions: whether channels are sigmoids of overlapping regions (static).
        spacing: millimetres between voxels along each axis; () if all axes have the same (static).
    """

    weights: LocalWeights
    keeps_labels: bool = dataclasses.field(metadata={"static": True})
    regions: bool = dataclasses.field(metadata={"static": True})
    spacing: tuple[float, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def identity(
        cls,
        classes: int,
        channels: int = 0,
        *,
        keeps_labels: bool = True,
        regions: bool = False,
        spacing: Sequence[float] = (),
        seed: int = 0,
    ) -> "LocalCalibration":
        """A calibration that changes no probability, from which the fit starts.

        Args:
            classes: channels of the logits.
            channels: of the image; 0 without an image.
            keeps_labels, regions, spacing, seed: as for `fit_local_calibration`.
        """
        weights = _first_weights(jax.random.key(seed), classes, channels * _IMAGE_LEVELS)
        return cls(weights, bool(keeps_labels), bool(regions), tuple(map(float, spacing)))


# From logits to features.


class _Features(NamedTuple):
    """What the network sees of an image.

    Attributes:
        log_probs: log-probabilities or, of regions, logits; none is below `_LEAST_LOG`.
        levels: log-probabilities, probabilities and image, as they are and smoothed ever more.
        uncertain: voxels that are corrected.
    """

    log_probs: Float[Array, "*spatial classes"]
    levels: tuple[Float[Array, "*spatial columns"], ...]
    uncertain: Bool[Array, "*spatial"]


def features_of(params: LocalCalibration, logits: Array, image: Array | None, known: Array) -> _Features:
    """Features of one image, whose voxels outside `known` count for nothing."""
    logits = jnp.where(known[..., None], logits.astype(jnp.float32), 0)
    if params.regions:
        log_probs = jnp.clip(logits, _LEAST_LOG, -_LEAST_LOG)
        probs = jax.nn.sigmoid(log_probs)
    else:
        log_probs = jnp.maximum(jax.nn.log_softmax(logits), _LEAST_LOG)
        probs = jnp.exp(log_probs)
    scaled = log_probs / _LEAST_LOG  # of the size of probabilities
    level = jnp.concatenate([scaled, probs, *([] if image is None else [image])], -1)
    levels = [level]
    for dilation in _DILATIONS:
        level = _smoothed(level, known, dilation, params.spacing)
        levels.append(level)
    around = levels[2][..., probs.shape[-1] : 2 * probs.shape[-1]]
    if params.regions:
        uncertain = (jnp.minimum(around, 1 - around) > _CERTAIN).any(-1)
    else:
        uncertain = around.max(-1) < 1 - _CERTAIN
    return _Features(log_probs, tuple(levels), uncertain & known)


def _smoothed(x: Array, known: Array, dilation: int, spacing: tuple[float, ...]) -> Array:
    """Mean over three voxels along each axis, `dilation` apart, without voxels that are not known."""
    weight = known[..., None].astype(jnp.float32)
    total = jnp.concatenate([x * weight, weight], -1)
    for axis in range(x.ndim - 1):
        if spacing and spacing[axis] > 2 * dilation * min(spacing):
            continue
        window, apart, padding = [1] * x.ndim, [1] * x.ndim, [(0, 0)] * x.ndim
        window[axis], apart[axis], padding[axis] = 3, dilation, (dilation, dilation)
        ones = [1] * x.ndim
        total = lax.reduce_window(total, np.float32(0), lax.add, window, ones, padding, window_dilation=apart)
    return total[..., :-1] / jnp.maximum(total[..., -1:], 1)


def normalised(image: Any, known: Any) -> Any:
    """Intensities of mean 0 and standard deviation 1 over the known voxels of an image, of NumPy or JAX."""
    numpy = np if isinstance(image, np.ndarray) else jnp
    axes, known = tuple(range(image.ndim - 1)), known[..., None]
    count = numpy.maximum(known.sum(), 1).astype(np.float32)
    image = numpy.where(known, image.astype(np.float32), 0)
    centred = numpy.where(known, image - image.sum(axes, keepdims=True) / count, 0)
    return centred / numpy.sqrt((centred**2).sum(axes, keepdims=True) / count + np.float32(1e-12))


# The network.


def _first_weights(key: Array, classes: int, image_features: int) -> LocalWeights:
    """Weights of a network that changes nothing yet."""
    features = 2 * (1 + len(_DILATIONS))
    keys = jax.random.split(key, 5)

    def normal(key: Array, *shape: int) -> Array:
        return jax.random.normal(key, shape, jnp.float32) * np.float32(math.sqrt(2 / max(shape[0], 1)))

    zeros = jnp.zeros(_WIDTH, jnp.float32)
    return LocalWeights(
        features=normal(keys[0], features, _WIDTH),
        image=normal(keys[1], image_features, _WIDTH) / 2,
        classes=jax.random.normal(keys[2], (classes, _WIDTH), jnp.float32) / 3,
        hidden=normal(keys[3], _WIDTH, _WIDTH),
        pooled=normal(keys[4], _WIDTH, _WIDTH) / 2,
        bias=zeros,
        factor=zeros,
        offset=zeros,
    )


def calibrated_logits(
    params: LocalCalibration,
    log_probs: Float[Array, "*voxels classes"],
    features: Float[Array, "*voxels classes features"],
    image: Float[Array, "*voxels image_features"],
) -> Float[Array, "*voxels classes"]:
    """Calibrated logits of voxels."""
    weights = params.weights
    leading = (1,) * (log_probs.ndim - 1)
    seen = features @ weights.features + weights.classes.reshape(*leading, *weights.classes.shape)
    seen = jax.nn.relu(seen + (image @ weights.image)[..., None, :])
    pooled = seen.mean(-2, keepdims=True) @ weights.pooled + weights.bias.reshape(*leading, 1, -1)
    hidden = jax.nn.relu(seen @ weights.hidden + pooled)
    factor = jnp.exp(jnp.clip(hidden @ weights.factor, -_STEEPEST, _STEEPEST))
    if params.regions:
        logits = factor * log_probs
    else:
        below = log_probs - log_probs.max(-1, keepdims=True)
        logits = jnp.where(below < 0, jnp.minimum(factor * below, -_LEAST_GAP), 0)
    return logits if params.keeps_labels else logits + hidden @ weights.offset


def network_inputs(levels: Sequence[Any], classes: int) -> tuple[Any, Any]:
    """Features of each class and of the image, from the levels of the same voxels, of NumPy or JAX."""
    numpy = np if isinstance(levels[0], np.ndarray) else jnp
    pairs = [level[..., start : start + classes] for level in levels for start in (0, classes)]
    pixels = [level[..., 2 * classes :] for level in levels[:_IMAGE_LEVELS]]
    return numpy.stack(pairs, -1), numpy.concatenate(pixels, -1)


# Application.


def corrected(
    params: LocalCalibration, logits: Array, image: Array | None, known: Array
) -> Float[Array, "*spatial classes"]:
    """Calibrated logits of an image, in chunks; a chunk without an uncertain voxel stays."""
    classes = logits.shape[-1]
    found = features_of(params, logits, image, known)
    size = math.prod(known.shape)
    chunk = min(_CHUNK, size)

    def in_chunks(x: Array) -> Array:
        flat = x.reshape(size, *x.shape[known.ndim :])
        padding = [(0, -size % chunk)] + [(0, 0)] * (flat.ndim - 1)
        return jnp.pad(flat, padding).reshape(-1, chunk, *flat.shape[1:])

    def of_chunk(arrays: Any) -> Array:
        logits, found = arrays

        def change() -> Array:
            calibrated = calibrated_logits(params, found.log_probs, *network_inputs(found.levels, classes))
            return jnp.where(found.uncertain[..., None], calibrated, logits)

        return lax.cond(found.uncertain.any(), change, lambda: logits)

    chunks = jax.tree.map(in_chunks, (logits.astype(jnp.float32), found))
    return lax.map(of_chunk, chunks).reshape(-1, classes)[:size].reshape(logits.shape)


corrected_block = jax.jit(corrected)


def known_voxels(logits: Any, regions: bool) -> Any:
    """Voxels whose probabilities are numbers. A logit of -inf is a probability of 0."""
    numpy = np if isinstance(logits, np.ndarray) else jnp
    return ~numpy.isnan(logits).any(-1) & (regions or numpy.isfinite(logits.max(-1)))


def blocks(logits: np.ndarray, image: np.ndarray | None, regions: bool) -> Iterator[tuple[Any, ...]]:
    """An image in slabs along its first axis, each with the voxels around it, padded to one of a few sizes.

    Yields:
        The slab's place in the image and in the block; the block's logits, normalised image and known voxels.
    """
    spatial = logits.shape[:-1]
    known = np.asarray(known_voxels(logits, regions))
    if image is not None:
        image = normalised(np.asarray(image), known)
    sides = [_SIDE // 2 if length <= _SIDE // 2 else -(-length // _SIDE) * _SIDE for length in spatial]
    rows = max(_SLAB // math.prod(sides[1:]), 4 * _HALO)
    rows = sides[0] if sides[0] <= rows else rows
    margin = 0 if rows == sides[0] else _HALO
    for start in range(0, spatial[0], rows - 2 * margin):
        low, high = max(start - margin, 0), min(start + rows - margin, spatial[0])
        inner = slice(start, min(start + rows - 2 * margin, spatial[0]))
        block = slice(inner.start - low, inner.stop - low)
        arrays = (
            None if x is None else fill_up(x[low:high], (rows, *sides[1:])) for x in (logits, image, known)
        )
        yield inner, (block, *(slice(0, length) for length in spatial[1:])), *arrays


def fill_up(x: np.ndarray, sides: Sequence[int]) -> np.ndarray:
    """`x` with zeros behind its first axes, up to these lengths."""
    filled = np.zeros((*sides, *x.shape[len(sides) :]), x.dtype)
    filled[tuple(slice(0, length) for length in x.shape[: len(sides)])] = x
    return filled


def check_applicable(logits: Any, params: LocalCalibration, image: Any) -> None:
    classes, image_features = len(params.weights.classes), len(params.weights.image)
    if np.ndim(logits) not in (4, 5) or logits.shape[-1] != classes:
        raise ValueError(
            f"logits must have shape [batch, *spatial, {classes}] with two or three spatial axes; got "
            f"{np.shape(logits)}."
        )
    channels = image_features // _IMAGE_LEVELS
    if (image is None) != (channels == 0):
        raise ValueError(
            f"the calibration was fitted {'with' if channels else 'without'} images: "
            f"{'give image' if channels else 'leave image out'}."
        )
    if image is not None and image.shape != (*logits.shape[:-1], channels):
        raise ValueError(
            f"image must have shape {(*logits.shape[:-1], channels)}, to go with logits of shape {logits.shape}; "
            f"got {image.shape}."
        )
    if params.spacing and len(params.spacing) != logits.ndim - 2:
        raise ValueError(
            f"spacing has {len(params.spacing)} numbers, but the images have {logits.ndim - 2} axes: give one each."
        )
