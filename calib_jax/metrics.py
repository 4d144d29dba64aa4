"""Segmentation metrics per image: Dice overlap, Brier score and negative log-likelihood.

Sums over voxels are exact at any size. Class ids are compared with the classes inside the sums, so that one-hot
labels never exist in memory.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, Num

from calib_jax._checks import AnyArray, Labels, Mask, Probs, as_inputs, check_size
from calib_jax._eager import compiled, nan_where_undefined
from calib_jax._labels import are_dense, as_class_ids, blank, have_class, memberships, one_hot
from calib_jax._sums.exact import mean_or_nan, rounded
from calib_jax._sums.voxels import count_voxels, sum_in_chunks, sum_voxels

Classes = Float[Array, "batch *spatial classes"]
AnyLabels = Num[Array, "batch *spatial_and_classes"]  # ids or dense
LabelMap = Integer[AnyArray, "batch *spatial"]


@nan_where_undefined
@compiled()
def dice_score(
    predictions: LabelMap | Probs,
    labels: LabelMap | Probs,
    *,
    num_classes: int | None = None,
    where: Bool[AnyArray, "batch *spatial"] | None = None,
) -> Float[Array, "batch classes"]:
    r"""Dice overlap of label maps, probabilities or soft labels, per image and class.

    Of two label maps: :math:`2 |A \cap B| / (|A| + |B|)`. Of probabilities p or soft labels t:
    :math:`(\sum p + \sum t - \sum |p - t|) / (\sum p + \sum t)`. Both are one formula on labels 0 and 1. With
    shares, the score is 1 only where p = t, while :math:`2 \sum p t / (\sum p + \sum t)` is below 1 even there.

    Args:
        predictions: class ids, integers `[batch, *spatial]`; or probabilities, floats `[batch, *spatial, classes]`.
        labels: class ids; or soft labels, such as the share of experts who saw a class. Where one of the two arrays
            has floats, the other one may have class ids, or 0 and 1 for each class.
        num_classes: number of classes, background included; required for two label maps. Ids outside
            `[0, num_classes)` belong to no class.
        where: voxels to count, boolean, `[batch, *spatial]`; None counts all. Values elsewhere change nothing, not
            even NaN.

    Returns:
        Dice in [0, 1], `[batch, num_classes]`, of shares within 1e-6 relative of float64; NaN where neither has the
        class, or where a counted value is NaN.

    Raises:
        TypeError: if `where` is not boolean, or `num_classes` is missing and no array has floats.
        ValueError: if the shapes differ, if `num_classes` is not the length of the last axis of floats, or if a
            float is counted, concrete (not traced) and outside [0, 1] by more than rounding.

    Example:
        >>> dice_score(jnp.array([[0, 1, 1, 0]]), jnp.array([[0, 1, 0, 0]]), num_classes=3)
        Array([[0.8      , 0.6666667,       nan]], dtype=float32)

        One image of three voxels; experts agree on the first and the last:

        >>> shares = jnp.array([[[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]])
        >>> dice_score(shares, shares).tolist()
        [[1.0, 1.0]]
        >>> [round(x, 3) for x in dice_score(jnp.array([[0, 1, 1]]), shares)[0].tolist()]
        [0.8, 0.857]

    References:
        Dice, "Measures of the Amount of Ecologic Association Between Species", 1945. Wang et al., "Dice Semimetric
        Losses: Optimizing the Dice Score with Soft Labels", MICCAI 2023, arXiv 2303.16296.
    """
    predictions, labels = (jnp.asarray(as_class_ids(x)) for x in (predictions, labels))
    floats = [x for x in (predictions, labels) if jnp.issubdtype(x.dtype, jnp.floating)]
    _check_maps(predictions, labels, where, floats, num_classes)
    keep = None if where is None else jnp.asarray(where)[..., None]
    if not floats and num_classes is not None:
        predicted, true = (memberships(ids, num_classes) for ids in (predictions, labels))
        return dice_of_counts(*overlap_counts(predicted, true, keep))
    shares = (one_hot(x, floats[0]) for x in (predictions, labels))
    predicted, true = (x if keep is None else jnp.where(keep, x, 0) for x in shares)
    return dice_of_counts(*map(sum_voxels, (jnp.minimum(predicted, true), predicted, true)))


@nan_where_undefined
@compiled()
def brier_score(probs: Probs, labels: Labels, *, where: Mask | None = None) -> Float[Array, "batch classes"]:
    r"""Mean squared error of the probabilities of each class: :math:`\frac{1}{n} \sum_v (p_{vc} - y_{vc})^2`.

    Each class has a score of its own (the marginal score), in [0, 1]. Their sum over the classes,
    `brier_score(probs, labels).sum(-1)`, is the multi-class Brier score of an image, in [0, 2].

    Args:
        probs: class probabilities `[batch, *spatial, classes]`.
        labels: class ids `[batch, *spatial]` (ids outside `[0, classes)` belong to no class: y is 0 in all), or
            one-hot, overlapping or soft labels of the shape of `probs`.
        where: voxels to count, boolean, `[batch, *spatial]` or of the shape of `probs`; None counts all.
            Elsewhere neither values nor gradients are touched, not even by NaN.

    Returns:
        The score of each image and class, within 1e-6 relative of float64 up to 2^30 voxels an image; NaN where
        nothing was counted or a counted probability was NaN. Differentiable in `probs`.

    Raises:
        TypeError, ValueError: on dtypes or shapes that do not fit, and on probabilities or one-hot or soft labels
            that are counted, concrete (not traced) and outside [0, 1] by more than rounding.

    Example:
        >>> probs = jnp.array([[[0.75, 0.25], [0.5, 0.5]]])  # one image of two voxels, two classes
        >>> brier_score(probs, jnp.array([[0, 1]])).tolist()
        [[0.15625, 0.15625]]

    References:
        Brier, "Verification of Forecasts Expressed in Terms of Probability", 1950.
    """
    probs, labels, where = with_columns(*as_inputs(probs, labels, where))
    total = brier_sums(probs, labels, where)
    # Not a sum of ones, on which XLA spends seconds when it compiles.
    voxels = math.prod(probs.shape[1:-1])
    count = jnp.full(total.shape, voxels) if where is None else count_voxels(where)[0]
    return mean_or_nan(total, jnp.broadcast_to(count, total.shape))


@nan_where_undefined
@compiled()
def negative_log_likelihood(
    logits: Float[AnyArray, "batch *spatial classes"],
    labels: Labels,
    *,
    where: Bool[AnyArray, "batch *spatial"] | None = None,
) -> Float[Array, "batch"]:
    r"""Mean negative log-likelihood of the labels: :math:`-\frac{1}{n} \sum_v \sum_c y_{vc} \log p_{vc}`.

    It takes logits because the softmax may underflow where its logarithm does not. Log-probabilities are logits too
    (their softmax returns the probabilities): for a model that returns probabilities, pass `jnp.log(probs)`.

    Args:
        logits: `[batch, *spatial, classes]`.
        labels: class ids `[batch, *spatial]`, or one-hot or soft labels of the shape of `logits`. Voxels of no
            class, whose id is outside `[0, classes)` or whose labels are all zero, are not counted.
        where: voxels to count, boolean, `[batch, *spatial]`; None counts all. Elsewhere neither values nor
            gradients are touched, not even by NaN.

    Returns:
        Nats per counted voxel, `[batch]`, within 1e-6 relative of float64 up to 2^30 voxels an image; infinite
        where a voxel's class has logit -inf, NaN where nothing was counted or a counted logit was NaN.
        Differentiable in `logits`.

    Raises:
        TypeError, ValueError: on dtypes or shapes that do not fit, and on one-hot or soft labels that are counted,
            concrete (not traced) and outside [0, 1] by more than rounding.

    Example:
        >>> logits = jnp.log(jnp.array([[[0.75, 0.25], [0.5, 0.5]]]))
        >>> nll = negative_log_likelihood(logits, jnp.array([[0, 1]]))
        >>> nll.shape, round(float(nll[0]), 6)  # (log 4/3 + log 2) / 2
        ((1,), 0.490415)

    References:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    inputs = as_inputs(logits, labels, where, probs_name="logits", per_voxel=True)
    return mean_or_nan(*likelihood_sums(*with_columns(*inputs)))


# Sums over the voxels of each image. Metrics divide them, accumulators add them up. Arguments have been checked.


def with_columns(
    probs: Float[Array, "batch *spatial classes"], labels: Array, where: Array | None
) -> tuple[Array, Array, Array | None]:
    """The arguments, with a last axis of `where` for all classes."""
    return probs, labels, where if where is None or where.ndim == probs.ndim else where[..., None]


def brier_sums(probs: Classes, labels: AnyLabels, where: Array | None) -> Float[Array, "batch classes"]:
    """Sum of squared errors of each class."""
    errors = probs.astype(jnp.float32) - one_hot(labels, probs)
    # The mask comes before the square, whose gradient at NaN is NaN even if its cotangent is 0.
    return sum_voxels(jnp.square(errors if where is None else jnp.where(where, errors, 0)))


@jax.custom_vjp
def likelihood_sums(
    logits: Classes, labels: AnyLabels, where: Bool[Array, "batch *spatial 1"] | None
) -> tuple[Float[Array, "batch"], Int[Array, "batch"]]:
    """Sum of negative log-likelihoods, and number of voxels counted."""

    def sums(*chunk: Any) -> tuple[Array, ...]:
        losses, counted = voxel_likelihoods(*chunk)
        return sum_voxels(losses)[:, 0], count_voxels(counted)[0][:, 0]

    total, count = sum_in_chunks(sums, logits, labels, where)
    return rounded(total), count


def _likelihood_sums_forward(logits: Array, labels: Array, where: Array | None) -> tuple[Any, Any]:
    return likelihood_sums(logits, labels, where), (logits, labels, where)


def _likelihood_sums_backward(residuals: Any, cotangents: Any) -> Any:
    logits, labels, where = residuals
    soft = (labels,) if jnp.issubdtype(labels.dtype, jnp.floating) else ()

    def losses(logits: Array, labels: Array = labels) -> Array:
        return voxel_likelihoods(logits, labels, where)[0]

    values, pull_back = jax.vjp(losses, logits, *soft)
    of_image = cotangents[0].reshape(-1, *(1,) * (values.ndim - 1))
    gradients = pull_back(jnp.broadcast_to(of_image, values.shape))
    return (*gradients, None) if soft else (*gradients, None, None)


likelihood_sums.defvjp(_likelihood_sums_forward, _likelihood_sums_backward)


def voxel_likelihoods(
    logits: Classes, labels: AnyLabels, where: Array | None
) -> tuple[Float[Array, "batch *spatial 1"], Bool[Array, "batch *spatial 1"]]:
    """Negative log-likelihood of each voxel, zero where it is not counted, and whether it is counted.

    Nearly all voxels of a segmentation cost 1e-6 or less, and equal ones round in the same direction. The sum over
    the other classes and `log1p` keep these digits; the losses for training, which do not need them, use optax.
    """
    logits = logits.astype(jnp.float32)
    if where is not None:
        logits, labels = jnp.where(where, logits, 0), blank(labels, where, logits)
    below, is_largest = below_largest(logits)
    counted = have_class(labels, logits)
    if are_dense(labels, logits):
        labels = labels.astype(jnp.float32)
        weight = labels.sum(-1)
        # A class without label may have probability zero, logit -inf: 0 * inf must not come up.
        chosen = (labels * jnp.where(labels == 0, 0, below)).sum(-1)
    else:
        weight, chosen = jnp.float32(1), _entry(below, jnp.where(counted, labels.astype(jnp.int32), 0))
    others = jnp.where(is_largest, 0, jnp.exp(-below)).sum(-1)
    return jnp.where(counted, chosen + weight * jnp.log1p(others), 0)[..., None], counted[..., None]


def below_largest(logits: Classes) -> tuple[Classes, Bool[Array, "batch *spatial classes"]]:
    """How far each logit lies below the largest of its voxel, and which one is the largest.

    The largest logit's own 0 is set, not computed: XLA may round the two sides of a subtraction differently.
    """
    largest = logits.argmax(-1)
    is_largest = memberships(largest, logits.shape[-1])
    return jnp.where(is_largest, 0, _entry(logits, largest)[..., None] - logits), is_largest


def _entry(x: Classes, index: Int[Array, "batch *spatial"]) -> Float[Array, "batch *spatial"]:
    """The entry of each voxel. Not a look-up, whose gradient is a scatter, which is serial on a TPU."""
    return jnp.where(memberships(index, x.shape[-1]), x, 0).sum(-1)


def overlap_counts(
    predicted: Bool[Array, "batch *spatial classes"],
    true: Bool[Array, "batch *spatial classes"],
    where: Bool[Array, "batch *spatial 1"] | None,
) -> tuple[Int[Array, "batch classes"], ...]:
    """Voxels of each class in both maps, in the predicted one and in the true one."""
    if where is not None:
        predicted, true = predicted & where, true & where
    return count_voxels(predicted & true, predicted, true)


def dice_of_counts(
    overlap: Num[Array, "*shape"], predicted: Num[Array, "*shape"], true: Num[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Dice of overlaps and sizes; NaN where both maps are empty."""
    # Float32 before adding: the sum of two int32 sizes of 2^30 voxels overflows.
    overlap, predicted, true = (x.astype(jnp.float32) for x in (overlap, predicted, true))
    return mean_or_nan(2 * overlap, predicted + true)


def _check_maps(
    predictions: Array, labels: Array, where: Any, floats: Sequence[Array], num_classes: Any
) -> None:
    """Raises unless label maps or arrays of shares share a shape, which `where` and `num_classes` fit."""
    accepted = {x.shape for x in floats} | {x.shape[:-1] for x in floats} or {labels.shape}
    shapes = {predictions.shape, labels.shape}
    if not shapes <= accepted or len({x.shape for x in floats}) > 1 or any(x.ndim < 2 for x in floats):
        raise ValueError(
            "predictions and labels must have one shape [batch, *spatial] of class ids, with a last axis of "
            f"classes behind it where they have floats; got {predictions.dtype} {predictions.shape} and "
            f"{labels.dtype} {labels.shape}."
        )
    for name, x in (("predictions", predictions), ("labels", labels)):
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            raise TypeError(f"{name} must be class ids, integers, or shares, floats; got {x.dtype}.")
    if not floats and num_classes is None:
        raise TypeError("num_classes is missing: two label maps do not tell how many classes there are.")
    if num_classes is not None:
        check_size("num_classes", num_classes)
    if floats and num_classes not in (None, floats[0].shape[-1]):
        raise ValueError(
            f"num_classes is {num_classes}, but floats have their classes on the last axis and got shape "
            f"{floats[0].shape}: cast class ids to integers, or leave num_classes out."
        )
    voxels = floats[0].shape[:-1] if floats else labels.shape
    if where is not None and where.shape != voxels:
        raise ValueError(f"where must have one entry per voxel, shape {voxels}; got {where.shape}.")
    if where is not None and where.dtype != jnp.bool_:
        raise TypeError(f"where must be boolean (True = count this voxel); got {where.dtype}.")
