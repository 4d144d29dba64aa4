"""Local calibration: a small network corrects each voxel's probabilities from those around it.

One temperature treats all voxels alike. A segmentation network is overconfident near borders and right far from
them. The correction here depends on the probabilities around a voxel and, if given, on the image. It is fitted on
validation cases of any model, and can keep every label.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
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
from calib_jax._local_network import (
    LocalCalibration,
    blocks,
    calibrated_logits,
    check_applicable,
    corrected,
    corrected_block,
    features_of,
    fill_up,
    known_voxels,
    network_inputs,
    normalised,
)
from calib_jax._sums.bins import Bins
from calib_jax._sums.host import inner_edges, sums_in_bins
from calib_jax.binning import BinStatistics, bin_statistics
from calib_jax.errors import average_calibration_error

_VOXELS = 2**14  # of an image that are kept
_STEPS = 50  # of the shorter one of two fits
_FOLDS = 2
_VOXELS_PER_STEP = 2**12  # of one image: few of each of several would make mL1-ACE noisy
_LEARNING_RATE = 1e-2
_BINS = Bins("soft", 20)  # of the loss


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

    Cross-validation over the images chooses between a short and a long fit, and whether `image` is used at all, so
    that few cases are not fitted too closely.

    Args:
        logits: logits or log-probabilities `[batch, *spatial, classes]` with two or three spatial axes; or, without
            `labels`, batches `(logits, labels[, where[, image]])`, see `fit_temperature`. They are read once, and
            up to 16,384 voxels of each image are kept.
        labels: class ids or one-hot or soft labels; of regions an array of the shape of `logits`.
        image: the image, `[batch, *spatial, channels]`, in any unit: each image is normalised. With batches it
            belongs into them. Give it for all batches or for none.
        where: voxels to fit to, boolean, `[batch, *spatial]`; None takes all.
        keeps_labels: True keeps the largest logit of each voxel the largest (under `regions`, the sign of each
            logit). False leaves the probabilities free: keep the label map that you have.
        regions: whether each channel is a sigmoid of its own, such as overlapping regions.
        spacing: millimetres between voxels along each axis. A coarse axis takes part in a smoothing only if its
            spacing is not larger than that smoothing. Left out, all axes have the same spacing.
        ace: weight of mL1-ACE.
        max_steps: steps of the long fit, a multiple of 50. The short one takes 50.
        seed: of weights, sampled voxels and order of the steps. The same seed gives the same fit.

    Returns:
        `LocalCalibration` for `apply_local_calibration`. If the loss of images that were left out did not fall
        by two standard errors, probabilities stay as they are, and a `RuntimeWarning` says so with figures. Of a
        single image nothing can be left out, and a warning says that too.

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
    fit = functools.partial(_fit, like, samples, ace=ace, seed=seed)
    everything = np.arange(len(samples.count))
    if len(everything) == 1:
        message = (
            "there is one image, so that none can be left out to see whether local calibration helps. The fit took "
            f"{_STEPS} steps. Fit on more cases."
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return fit(everything, False, _STEPS)
    before = np.asarray(_losses(like, samples, np.float32(ace)))
    blind = [(False, steps) for steps in sorted({_STEPS, max_steps})]
    seeing = [(True, steps) for _, steps in blind] if batches.channels else []
    left_out = {choice: _left_out_losses(fit, samples, ace, *choice) for choice in (*blind, *seeing)}
    best = min(blind, key=lambda choice: left_out[choice].mean())
    for choice in seeing:  # images of a few patients may mislead
        if _is_lower(left_out[choice], left_out[best]):
            best = choice
    if not _is_lower(left_out[best], before):
        message = (
            "local calibration does not help on these cases: the loss (negative log-likelihood of uncertain voxels "
            f"+ {ace:g} * mL1-ACE) of images that were left out is {before.mean():.4g} before and "
            f"{left_out[best].mean():.4g} after it, no clear gain. Probabilities stay as they are. Fit on more "
            "cases, and check that labels and logits belong together."
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return like
    return fit(everything, *best)


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
    check_applicable(logits, params, image)
    if isinstance(logits, Tracer) or isinstance(image, Tracer) or isinstance(params.weights.bias, Tracer):
        logits = jnp.asarray(logits)
        known = known_voxels(logits, params.regions)
        image = None if image is None else jax.vmap(normalised)(jnp.asarray(image), known)
        calibrated = lax.map(lambda arrays: corrected(params, *arrays), (logits, image, known))
        return calibrated.astype(logits.dtype)
    logits = np.asarray(logits)
    images = [None] * len(logits) if image is None else np.asarray(image)
    calibrated = np.empty_like(logits)
    for number, (one, pixels) in enumerate(zip(logits, images, strict=True)):
        for inner, block, *arrays in blocks(one, pixels, params.regions):
            calibrated[number, inner] = np.asarray(corrected_block(params, *arrays))[block]
    return jax.device_put(calibrated)  # `jnp.asarray` compiles a copy for each new shape


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
            check_applicable(logits, like, image)
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
        return np.stack([fill_up(leaf, (most,)) for leaf in leaves])

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
    counted = known_voxels(logits, like.regions) & (like.regions or have_class(labels, logits))
    counted &= True if where is None else where
    parts: list[Any] = []
    rest = np.zeros((3, classes, _BINS.num_bins))
    for inner, block, *arrays in blocks(logits, image, like.regions):
        log_probs, levels, uncertain = jax.device_get(_block_features(like, *arrays))
        chosen = uncertain[block] & counted[inner]
        probs = levels[0][block][..., classes : 2 * classes]
        stay = counted[inner] & ~chosen
        of_classes = zip(probs[stay].T, dense[inner][stay].T, strict=True)
        rest += np.stack(
            [sums_in_bins(*of_class, inner_edges(probs, _BINS), _BINS) for of_class in of_classes], 1
        )
        parts.append(
            (log_probs[block][chosen], [level[block][chosen] for level in levels], dense[inner][chosen])
        )
    log_probs, levels, kept = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
    total = len(log_probs)
    if not total:
        return None
    order = rng.permutation(total)[:_VOXELS]
    features, pixels = network_inputs([level[order] for level in levels], classes)
    return _Samples(
        log_probs[order],
        features,
        pixels,
        kept[order],
        np.int32(len(order)),
        np.float32(total / len(order)),
        BinStatistics(*rest.astype(np.float32)),
    )


_block_features = jax.jit(features_of)


def _negative_log_likelihood(
    params: LocalCalibration, log_probs: Array, features: Array, image: Array, labels: Array
) -> tuple[Float[Array, "*voxels"], Float[Array, "*voxels classes"]]:
    """Of each voxel, and its calibrated probabilities."""
    import optax  # here, since its import takes longer than that of the library

    logits = calibrated_logits(params, log_probs, features, image)
    if params.regions:
        return optax.losses.sigmoid_binary_cross_entropy(logits, labels).sum(-1), jax.nn.sigmoid(logits)
    return optax.losses.softmax_cross_entropy(logits, labels), jax.nn.softmax(logits)


def _loss(
    params: LocalCalibration, samples: _Samples, ace: Any, index: Array, voxels: Array
) -> Float[Array, ""]:
    """Mean negative log-likelihood + `ace` * mL1-ACE of some voxels of one image."""
    log_probs, features, image, labels = (x[index, voxels][None] for x in samples[:4])
    losses, probs = _negative_log_likelihood(params, log_probs, features, image, labels)
    found = bin_statistics(probs, labels, binning="soft")
    weight = samples.weight[index] * samples.count[index].astype(jnp.float32) / len(voxels)
    stats = jax.tree.map(lambda x, rest: weight * x + rest[index][None], found, samples.rest)
    return losses.mean() + ace * jnp.nanmean(average_calibration_error(stats))


@jax.jit
def _losses(params: LocalCalibration, samples: _Samples, ace: Any) -> Float[Array, "images"]:
    """The loss of each image, from voxels that are spread evenly over those that were kept."""

    def of_image(index: Array) -> Array:
        spread = jnp.arange(_VOXELS_PER_STEP, dtype=jnp.int32) * samples.count[index] // _VOXELS_PER_STEP
        return _loss(params, samples, ace, index, spread)

    return lax.map(of_image, jnp.arange(len(samples.count), dtype=jnp.int32))


@jax.jit
def _some_steps(
    params: LocalCalibration, state: Any, samples: _Samples, chosen: Any, ace: Any, max_steps: Any
) -> tuple[LocalCalibration, Any]:
    """Steps of Adam, each on some voxels `[steps, voxels]` of one image `[steps]`."""

    def step(carry: Any, chosen: Any) -> tuple[Any, None]:
        params, state = carry
        gradient = jax.grad(_loss)(params, samples, ace, *chosen)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies a number by the int32 of a step
            updates, state = _optimizer(max_steps).update(gradient, state, params)
        return (jax.tree.map(jnp.add, params, updates), state), None

    return lax.scan(step, (params, state), chosen)[0]


def _optimizer(max_steps: Any) -> Any:
    import optax

    def cosine(step: Any) -> Array:  # optax's own takes no traced number of steps
        return _LEARNING_RATE * (1 + jnp.cos(jnp.float32(jnp.pi) * step.astype(jnp.float32) / max_steps)) / 2

    return optax.adamw(cosine, weight_decay=1e-4)


def _fit(
    params: LocalCalibration,
    samples: _Samples,
    images: np.ndarray,
    sees_image: bool,
    steps: int,
    *,
    ace: float,
    seed: int,
) -> LocalCalibration:
    """Fits to some of the images."""
    if not sees_image:
        samples = samples._replace(image=jnp.zeros_like(samples.image))
    state = _optimizer(steps).init(params)
    rng, count = np.random.default_rng(seed), np.asarray(samples.count)
    for _ in range(steps // _STEPS):  # one program for fits of all lengths
        drawn = rng.choice(images, _STEPS)
        voxels = rng.integers(0, count[drawn][:, None], (_STEPS, _VOXELS_PER_STEP))
        chosen = drawn.astype(np.int32), voxels.astype(np.int32)
        params, state = _some_steps(params, state, samples, chosen, np.float32(ace), np.float32(steps))
    if not sees_image:
        weights = params.weights._replace(image=jnp.zeros_like(params.weights.image))
        params = dataclasses.replace(params, weights=weights)
    return params


def _is_lower(after: np.ndarray, before: np.ndarray) -> bool:
    """Whether the losses of the images have fallen by more than two standard errors of the mean change."""
    gain = before - after
    return bool(gain.mean() > 2 * gain.std() / math.sqrt(gain.size))


def _left_out_losses(
    fit: Callable[..., LocalCalibration], samples: _Samples, ace: float, sees_image: bool, steps: int
) -> Float[np.ndarray, "images"]:
    """The loss of each image, calibrated by a fit to others."""
    images = len(samples.count)
    found = np.zeros(images)
    for fold in range(_FOLDS):
        left_out = np.arange(images) * _FOLDS // images == fold  # neighbours may be of one patient
        params = fit(np.flatnonzero(~left_out), sees_image, steps)
        found[left_out] = np.asarray(_losses(params, samples, np.float32(ace)))[left_out]
    return found
