"""Local calibration: a small network corrects each voxel's probabilities from those around it.

One temperature treats all voxels alike. A segmentation network is overconfident near borders and right far from
them. The correction here depends on the probabilities around a voxel and, if given, on the image. It is fitted on
validation cases of any model, and can keep every label.
"""

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from calib_jax._batches import Batches, Source
from calib_jax._checks import AnyArray, Labels, check_flag, check_number, check_size
from calib_jax._labels import are_dense, have_class
from calib_jax.binning import BinStatistics, bin_statistics
from calib_jax.errors import average_calibration_error

# Smaller log-probabilities count as this one: files of float16 or of probabilities hold no more.
_LEAST_LOG = -12.0
_CERTAIN = 1e-4  # voxels are not changed if the smoothed probability of all other classes is below it
# Voxels between the three taps of each smoothing. Each smooths the result of the one before.
_DILATIONS = (1, 2, 4)
_HALO = sum(_DILATIONS)
_WIDTH = 32
_STEEPEST = 4.0  # largest |log| of the factor of a logit
_LEAST_GAP = 1e-6  # between the largest logit and the others: float32 probabilities keep their order
_VOXELS = 2**14  # of an image that are kept
_STEPS = 50  # between two looks at the images that are left out
_FOLDS = 4
_IMAGE_LEVELS = 3  # of the image that the network sees: as it is and smoothed twice
_SIDE = 32  # sides of blocks are multiples of it, or half of it
_IMAGES_PER_STEP = 4
_VOXELS_PER_STEP = 2**10  # of each image
_LEARNING_RATE = 1e-2
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


def fit_local_calibration(
    logits: Float[AnyArray, "batch *spatial classes"] | Source,
    labels: Labels | None = None,
    *,
    image: Float[AnyArray, "batch *spatial channels"] | None = None,
    where: Bool[AnyArray, "batch *spatial"] | None = None,
    keeps_labels: bool = True,
    regions: bool = False,
    spacing: Sequence[float] = (),
    ace: float = 1.0,
    max_steps: int = 200,
    seed: int = 0,
) -> LocalCalibration:
    r"""Fits a small network that corrects each voxel's logits from the probabilities around it.

    With l the logits minus the largest one of their voxel, calibrated logits are :math:`e^{a} l`, or
    :math:`e^{a} l + b` if `keeps_labels` is False. A network of about 3,000 weights gives a and b of each voxel and
    class. It sees the log-probability and the probability of the class, both also smoothed over 3, 7 and 15 voxels,
    a mean over the classes, and the image. It minimises negative log-likelihood + `ace` * mL1-ACE (with soft bins)
    by Adam.

    Voxels are left as they are where the smoothed probability of one class exceeds 0.9999. Logits below those of
    p = exp(-12) count as these, so that logits, float32 and float16 probabilities give nearly the same fit.

    The number of steps is chosen by cross-validation over the images, so that few cases are not fitted too closely.

    Args:
        logits: logits or log-probabilities `[batch, *spatial, classes]` with two or three spatial axes; or, without
            `labels`, batches `(logits, labels[, where[, image]])`, see `fit_temperature`. They are read once, and
            up to 16,384 voxels of each image are kept.
        labels: class ids or one-hot or soft labels; of regions an array of the shape of `logits`.
        image: the image, `[batch, *spatial, channels]`, in any unit: each image is normalised. With batches it
            belongs into them. Give it for all batches or for none.
        where: voxels to fit to, boolean, `[batch, *spatial]`; None takes all.
        keeps_labels: True keeps the largest logit of each voxel the largest (under `regions`, the sign of each
            logit). False leaves the probabilities free, which calibrates better: keep the label map that you have.
        regions: whether each channel is a sigmoid of its own, such as overlapping regions.
        spacing: millimetres between voxels along each axis. A coarse axis takes part in a smoothing only if its
            spacing is not larger than that smoothing. Left out, all axes have the same spacing.
        ace: weight of mL1-ACE.
        max_steps: largest number of steps; a multiple of 50.
        seed: of weights, sampled voxels and order of the steps. The same seed gives the same fit.

    Returns:
        `LocalCalibration` for `apply_local_calibration`. If the likelihood of images that were left out did not
        improve, probabilities stay as they are, and a `RuntimeWarning` says so with figures. Of a single image
        nothing can be left out, and a warning says that too.

    Raises:
        TypeError, ValueError: on dtypes, shapes or options that do not fit, and if no voxel can be fitted.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> labels = (rng.random((4, 16, 16)) < 0.7).astype(np.int32)  # 7 in 10 voxels
        >>> logits = np.tile(np.float32([0, 4]), (4, 16, 16, 1))  # that are said to be 98 in 100
        >>> params = fit_local_calibration(logits, labels, max_steps=50)
        >>> calibrated = jax.nn.softmax(apply_local_calibration(logits, params))
        >>> bool(abs(calibrated[..., 1].mean() - 0.7) < 0.03)
        True

    References:
        Ding et al., "Local Temperature Scaling for Probability Calibration", ICCV 2021, arXiv 2008.05105; Barfoot
        et al., arXiv 2506.03942 (mL1-ACE with soft bins).
    """
    for name, flag in (("keeps_labels", keeps_labels), ("regions", regions)):
        check_flag(name, flag)
    check_number("ace", ace, 0.0)
    check_size("max_steps", max_steps)
    if max_steps % _STEPS:
        raise ValueError(f"max_steps must be a multiple of {_STEPS}; got {max_steps}.")
    batches = Batches(logits, labels, where, image, with_images=True, least_classes=1 if regions else 2)
    options: dict[str, Any] = {"regions": regions, "spacing": spacing, "seed": seed}
    like = LocalCalibration.identity(batches.classes, batches.channels, keeps_labels=keeps_labels, **options)
    samples = _collect(batches, like, seed)
    everything = np.ones(len(samples.count), np.float32)
    steps, message = _cross_validated(like, samples, ace, max_steps, seed)
    training = _training(like, samples, everything, ace, max_steps, seed)
    *_, params = like, *itertools.islice(training, steps // _STEPS)
    if message:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return params


def apply_local_calibration(
    logits: Float[AnyArray, "batch *spatial classes"],
    params: LocalCalibration,
    *,
    image: Float[AnyArray, "batch *spatial channels"] | None = None,
) -> Float[Array, "batch *spatial classes"]:
    """Logits whose softmax (for regions, sigmoid) is calibrated.

    Outside of `jit`, images are padded to a few sizes and large ones are corrected in slabs, so that images of all
    sizes need few compiled programs and little memory. Inside, the whole image is corrected at once.

    Args:
        logits: logits or log-probabilities `[batch, *spatial, classes]`. Voxels whose logits are not finite stay.
        params: from `fit_local_calibration`.
        image: `[batch, *spatial, channels]`, exactly if the calibration was fitted with images.

    Returns:
        Logits of the shape and dtype of `logits`.

    Raises:
        ValueError: if classes, channels or axes are not those of the fit.

    Example:
        >>> params = LocalCalibration.identity(classes=3)  # changes nothing yet
        >>> logits = jnp.array([[[[2.0, 1.0, 0.0]]]])  # one image of one pixel
        >>> jnp.allclose(jax.nn.softmax(apply_local_calibration(logits, params)), jax.nn.softmax(logits)).item()
        True

    References:
        Ding et al., ICCV 2021, arXiv 2008.05105.
    """
    _check_applicable(logits, params, image)
    if isinstance(logits, Tracer) or isinstance(image, Tracer) or isinstance(params.weights.bias, Tracer):
        logits = jnp.asarray(logits)
        known = _known(logits, params.regions)
        pixels = None if image is None else jnp.asarray(image, jnp.float32)
        normalised = None if pixels is None else jax.vmap(_normalised)(pixels, known)
        return lax.map(lambda arrays: _corrected(params, *arrays), (logits, normalised, known)).astype(
            logits.dtype
        )
    logits = np.asarray(logits)
    calibrated = np.empty_like(logits)
    for number in range(len(logits)):
        for inner, block, *arrays in _blocks(
            logits[number], None if image is None else np.asarray(image)[number], params.regions
        ):
            calibrated[number, inner] = np.asarray(_corrected_block(params, *arrays))[block]
    return jax.device_put(calibrated)  # `jnp.asarray` compiles a copy for each new shape


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


def _features(params: LocalCalibration, logits: Array, image: Array | None, known: Array) -> _Features:
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


def _normalised(image: Array, known: Array) -> Array:
    """Intensities of mean 0 and standard deviation 1 over the known voxels of an image."""
    axes = tuple(range(image.ndim - 1))
    weight = known[..., None].astype(jnp.float32)
    total = jnp.maximum(weight.sum(), 1)
    image = jnp.where(known[..., None], image, 0)
    centred = (image - image.sum(axes, keepdims=True) / total) * weight
    return centred / jnp.sqrt((centred**2).sum(axes, keepdims=True) / total + 1e-12)


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


def _calibrated(
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


def _columns(levels: Sequence[Array], classes: int) -> tuple[Array, Array]:
    """Features of each class and of the image, from the levels of the same voxels."""
    pairs = [level[..., start : start + classes] for level in levels for start in (0, classes)]
    return jnp.stack(pairs, -1), jnp.concatenate(
        [level[..., 2 * classes :] for level in levels[:_IMAGE_LEVELS]], -1
    )


# Application.


def _corrected(
    params: LocalCalibration, logits: Array, image: Array | None, known: Array
) -> Float[Array, "*spatial classes"]:
    """Calibrated logits of an image, in chunks; a chunk without an uncertain voxel stays."""
    classes = logits.shape[-1]
    found = _features(params, logits, image, known)
    size = math.prod(known.shape)
    chunk = min(_CHUNK, size)

    def in_chunks(x: Array) -> Array:
        flat = x.reshape(size, *x.shape[known.ndim :])
        padding = [(0, -size % chunk)] + [(0, 0)] * (flat.ndim - 1)
        return jnp.pad(flat, padding).reshape(-1, chunk, *flat.shape[1:])

    def of_chunk(arrays: Any) -> Array:
        logits, found = arrays

        def change() -> Array:
            calibrated = _calibrated(params, found.log_probs, *_columns(found.levels, classes))
            return jnp.where(found.uncertain[..., None], calibrated, logits)

        return lax.cond(found.uncertain.any(), change, lambda: logits)

    chunks = jax.tree.map(in_chunks, (logits.astype(jnp.float32), found))
    return lax.map(of_chunk, chunks).reshape(-1, classes)[:size].reshape(logits.shape)


_corrected_block = jax.jit(_corrected)


def _known(logits: Any, regions: bool) -> Any:
    """Voxels whose probabilities are numbers. A logit of -inf is a probability of 0."""
    numpy = np if isinstance(logits, np.ndarray) else jnp
    return ~numpy.isnan(logits).any(-1) & (regions or numpy.isfinite(logits.max(-1)))


def _blocks(logits: np.ndarray, image: np.ndarray | None, regions: bool) -> Iterator[tuple[Any, ...]]:
    """An image in slabs along its first axis, each with the voxels around it, padded to one of a few sizes.

    Yields:
        The slab's place in the image and in the block; the block's logits, normalised image and known voxels.
    """
    spatial = logits.shape[:-1]
    known = np.asarray(_known(logits, regions))
    if image is not None:
        pixels = np.where(known[..., None], np.asarray(image, np.float32), 0)
        axes, count = tuple(range(len(spatial))), max(known.sum(), 1)
        centred = np.where(known[..., None], pixels - pixels.sum(axes, keepdims=True) / count, 0)
        spread = np.sqrt((centred.astype(np.float32) ** 2).sum(axes, keepdims=True) / count + 1e-12)
        image = (centred / spread).astype(np.float32)
    sides = [_SIDE // 2 if length <= _SIDE // 2 else -(-length // _SIDE) * _SIDE for length in spatial]
    rows = max(_SLAB // math.prod(sides[1:]), 4 * _HALO)
    rows = sides[0] if sides[0] <= rows else rows
    margin = 0 if rows == sides[0] else _HALO
    for start in range(0, spatial[0], rows - 2 * margin):
        low, high = max(start - margin, 0), min(start + rows - margin, spatial[0])
        inner = slice(start, min(start + rows - 2 * margin, spatial[0]))
        block = slice(inner.start - low, inner.stop - low)
        arrays = (
            None if x is None else _filled(x[low:high], (rows, *sides[1:])) for x in (logits, image, known)
        )
        yield inner, (block, *(slice(0, length) for length in spatial[1:])), *arrays


def _filled(x: np.ndarray, sides: Sequence[int]) -> np.ndarray:
    filled = np.zeros((*sides, *x.shape[len(sides) :]), x.dtype)
    filled[tuple(slice(0, length) for length in x.shape[: len(sides)])] = x
    return filled


def _check_applicable(logits: Any, params: LocalCalibration, image: Any) -> None:
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


# Fitting.


class _Samples(NamedTuple):
    """Uncertain voxels of all images, in random order, filled up to the same number.

    Attributes:
        log_probs: `[images, voxels, classes]`.
        features: `[images, voxels, classes, features]`.
        image: `[images, voxels, image features]`.
        labels: share of each class, `[images, voxels, classes]`.
        count: number of voxels that are kept, `[images]`.
        weight: uncertain voxels of the image for each one that is kept, `[images]`.
        rest: soft bins of the voxels that are not changed, `[images, classes, bins]`.
    """

    log_probs: Any
    features: Any
    image: Any
    labels: Any
    count: Any
    weight: Any
    rest: BinStatistics


def _collect(batches: Batches, like: LocalCalibration, seed: int) -> _Samples:
    """One pass over the batches."""
    rng = np.random.default_rng(seed)
    kept: list[Any] = []
    for number, (logits, labels, where, image) in enumerate(batches):
        try:
            _check_applicable(logits, like, image)
        except ValueError as error:
            raise ValueError(f"batch {number}: {error}") from error
        if like.regions and not are_dense(labels, logits):
            raise ValueError(
                f"labels of regions must have the shape of logits, {logits.shape}; batch {number} has "
                f"{labels.shape}."
            )
        for index in range(len(logits)):
            arrays = (None if x is None else np.asarray(x[index]) for x in (logits, labels, where, image))
            if (sample := _sample(like, rng, *arrays)) is not None:
                kept.append(sample)
    if not kept:
        raise ValueError(
            "no voxel to fit to: every one is certain, is masked by where, or has a label of no class."
        )
    most = 1 << (max(len(sample.labels) for sample in kept) - 1).bit_length()  # few sizes, few programs

    def filled(*leaves: Any) -> np.ndarray:
        if np.ndim(leaves[0]) == 0:
            return np.stack(leaves)
        return np.stack([_filled(leaf, (most,)) for leaf in leaves])

    fields: Any = [filled(*leaves) for leaves in zip(*(sample[:-1] for sample in kept), strict=True)]
    rest = jax.tree.map(lambda *leaves: np.stack(leaves), *(sample.rest for sample in kept))
    return jax.tree.map(jnp.asarray, _Samples(*fields, rest=rest))


def _sample(
    like: LocalCalibration, rng: np.random.Generator, logits: Any, labels: Any, where: Any, image: Any
) -> _Samples | None:
    """Some of the uncertain voxels of an image; None if it has none."""
    classes = logits.shape[-1]
    if are_dense(labels, logits):
        dense = labels.astype(np.float32)
    else:
        dense = (labels[..., None] == np.arange(classes)).astype(np.float32)
    counted = _known(logits, like.regions) & (like.regions or have_class(labels, logits))
    counted &= True if where is None else where
    columns: list[Any] = []
    rest: Any = None
    for inner, block, *arrays in _blocks(logits, image, like.regions):
        log_probs, levels, uncertain = jax.device_get(_block_features(like, *arrays))
        chosen = uncertain[block] & counted[inner]
        probs = levels[0][block][..., classes : 2 * classes]
        stay = counted[inner] & ~chosen
        stats = bin_statistics(probs[None], dense[inner][None], binning="soft", where=stay[None])
        rest = stats if rest is None else rest + stats
        columns.append(
            (log_probs[block][chosen], [level[block][chosen] for level in levels], dense[inner][chosen])
        )
    log_probs, levels, kept = jax.tree.map(lambda *parts: np.concatenate(parts), *columns)
    total = len(log_probs)
    if not total:
        return None
    order = rng.permutation(total)[:_VOXELS]
    features, pixels = _columns([level[order] for level in levels], classes)
    return _Samples(
        log_probs[order],
        np.asarray(features),
        np.asarray(pixels),
        kept[order],
        np.int32(len(order)),
        np.float32(total / len(order)),
        jax.tree.map(lambda x: np.asarray(x)[0].astype(np.float32), rest),
    )


_block_features = jax.jit(_features)


def _negative_log_likelihood(
    params: LocalCalibration, log_probs: Array, features: Array, image: Array, labels: Array
) -> tuple[Float[Array, "*voxels"], Float[Array, "*voxels classes"]]:
    """Of each voxel, and its calibrated probabilities."""
    import optax  # here, since its import takes longer than that of the library

    logits = _calibrated(params, log_probs, features, image)
    if params.regions:
        return optax.losses.sigmoid_binary_cross_entropy(logits, labels).sum(-1), jax.nn.sigmoid(logits)
    return optax.losses.softmax_cross_entropy(logits, labels), jax.nn.softmax(logits)


@jax.jit
def _mean_losses(params: LocalCalibration, samples: _Samples) -> Float[Array, "images"]:
    """Mean negative log-likelihood of some voxels of each image."""
    some = min(samples.labels.shape[1], 4 * _VOXELS_PER_STEP)
    losses, _ = _negative_log_likelihood(params, *(x[:, :some] for x in samples[:4]))
    count = jnp.minimum(samples.count, some)[:, None]
    inside = jnp.arange(some, dtype=jnp.int32)[None] < count
    return jnp.where(inside, losses, 0).sum(1) / count[:, 0].astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="max_steps")
def _train_for_a_while(
    params: LocalCalibration,
    state: Any,
    samples: _Samples,
    image_weights: Float[Array, "images"],
    ace: float,
    key: Array,
    *,
    max_steps: int,
) -> tuple[LocalCalibration, Any]:
    """`_STEPS` steps of Adam, each on some voxels of some images."""

    def loss(params: LocalCalibration, key: Array) -> Array:
        of_images, of_voxels = jax.random.split(key)
        chance = image_weights / image_weights.sum()
        images = jax.random.choice(of_images, len(chance), (_IMAGES_PER_STEP,), p=chance)
        count = samples.count[images]
        voxels = jax.random.randint(of_voxels, (_IMAGES_PER_STEP, _VOXELS_PER_STEP), 0, count[:, None])
        log_probs, features, image, labels = (x[images[:, None], voxels] for x in samples[:4])
        losses, probs = _negative_log_likelihood(params, log_probs, features, image, labels)
        found = bin_statistics(probs, labels, binning="soft")
        weight = (samples.weight[images] * count.astype(jnp.float32) / _VOXELS_PER_STEP)[:, None, None]
        stats = jax.tree.map(lambda x, rest: weight * x + rest[images], found, samples.rest)
        return losses.mean() + ace * jnp.nanmean(average_calibration_error(stats))

    def step(carry: Any, key: Array) -> tuple[Any, None]:
        params, state = carry
        gradient = jax.grad(loss)(params, key)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies a number by the int32 of a step
            updates, state = _optimizer(max_steps).update(gradient, state, params)
        return (jax.tree.map(jnp.add, params, updates), state), None

    (params, state), _ = lax.scan(step, (params, state), jax.random.split(key, _STEPS))
    return params, state


def _optimizer(max_steps: int) -> Any:
    import optax

    return optax.adamw(optax.cosine_decay_schedule(_LEARNING_RATE, max_steps), weight_decay=1e-4)


def _training(
    params: LocalCalibration,
    samples: _Samples,
    image_weights: np.ndarray,
    ace: float,
    max_steps: int,
    seed: int,
) -> Iterator[LocalCalibration]:
    """Yields the parameters after each `_STEPS` steps."""
    state = _optimizer(max_steps).init(params)
    for part in range(max_steps // _STEPS):
        key = jax.random.fold_in(jax.random.key(seed), part)
        params, state = _train_for_a_while(
            params, state, samples, jnp.asarray(image_weights, jnp.float32), ace, key, max_steps=max_steps
        )
        yield params


def _cross_validated(
    like: LocalCalibration, samples: _Samples, ace: float, max_steps: int, seed: int
) -> tuple[int, str]:
    """The number of steps after which images that were left out are most likely, and a warning or ''."""
    images = len(samples.count)
    folds = min(_FOLDS, images)
    if folds < 2:
        return _STEPS, (
            "there is one image, so that none can be left out to see whether local calibration helps. The fit took "
            f"{_STEPS} steps. Fit on more cases."
        )
    before = float(_mean_losses(like, samples).mean())
    after = np.zeros((max_steps // _STEPS, images))
    for fold in range(folds):
        left_out = np.arange(images) % folds == fold
        for part, params in enumerate(_training(like, samples, ~left_out, ace, max_steps, seed)):
            after[part, left_out] = np.asarray(_mean_losses(params, samples))[left_out]
    part = int(after.mean(1).argmin())
    found = after[part].mean()
    if found < before:
        return (part + 1) * _STEPS, ""
    return 0, (
        "local calibration does not help on these cases: the mean negative log-likelihood of uncertain voxels in "
        f"images that were left out is {before:.4g} before and {found:.4g} after it. Probabilities stay as they "
        "are. Fit on more cases, and check that labels and logits belong together."
    )
