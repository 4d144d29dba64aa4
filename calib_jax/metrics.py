"""Segmentation metrics per image: Dice overlap, Brier score and negative log-likelihood.

Voxels are summed in blocks, and the sums of blocks with what float32 rounds away: a plain float32 sum of 3e7
equal numbers is off by percents. Class ids are compared with the classes inside the sum, so that one-hot labels
never exist in memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer, Num

from calib_jax._checks import (
    AnyArray,
    Labels,
    Mask,
    Probs,
    as_class_ids,
    as_inputs,
    check_size,
    check_voxel_mask,
)
from calib_jax._eager import compiled, nan_where_undefined
from calib_jax._sums.exact import add_pairs

_CHUNK = 2**17  # voxels of which intermediate values exist at a time
_BLOCK = 2**15  # voxels: the square root of 2^30, so that neither level of a sum has more terms than that


@nan_where_undefined
@compiled()
def dice_score(
    predictions: Integer[AnyArray, "batch *spatial"],
    labels: Integer[AnyArray, "batch *spatial"],
    *,
    num_classes: int,
    where: Bool[AnyArray, "batch *spatial"] | None = None,
) -> Float[Array, "batch classes"]:
    """Dice overlap of two label maps, per image and class: 2 |A and B| / (|A| + |B|).

    Args:
        predictions: predicted class ids `[batch, *spatial]`.
        labels: true class ids, same shape.
        num_classes: number of classes, background included. Ids outside `[0, num_classes)` are of no class.
        where: voxels to count, boolean, same shape; None counts all.

    Returns:
        Dice in [0, 1], `[batch, num_classes]`; NaN where a class is in neither map.

    Raises:
        TypeError: if the label maps are not integers or `where` is not boolean.
        ValueError: if the shapes differ.

    Example:
        >>> dice_score(jnp.array([[0, 1, 1, 0]]), jnp.array([[0, 1, 0, 0]]), num_classes=3)
        Array([[0.8      , 0.6666667,       nan]], dtype=float32)

    References:
        Dice, "Measures of the Amount of Ecologic Association Between Species", 1945.
    """
    check_size("num_classes", num_classes)
    predictions, labels = (jnp.asarray(as_class_ids(ids)) for ids in (predictions, labels))
    for name, ids in (("predictions", predictions), ("labels", labels)):
        if not (jnp.issubdtype(ids.dtype, jnp.integer) or ids.dtype == jnp.bool_):
            raise TypeError(f"{name} must be class ids, integers; got {ids.dtype}.")
    if predictions.shape != labels.shape:
        raise ValueError(
            f"predictions and labels must have one shape; got {predictions.shape}, {labels.shape}."
        )
    if where is not None and where.shape != labels.shape:
        raise ValueError(f"where must have the shape of labels, {labels.shape}; got {where.shape}.")
    if where is not None and where.dtype != jnp.bool_:
        raise TypeError(f"where must be boolean (True = count this voxel); got {where.dtype}.")
    predicted, true = (is_class(_per_voxel(ids), num_classes) for ids in (predictions, labels))
    keep = None if where is None else _per_voxel(where)[..., None]
    return dice_of_counts(*overlap_counts(predicted, true, keep))


@nan_where_undefined
@compiled()
def brier_score(probs: Probs, labels: Labels, *, where: Mask | None = None) -> Float[Array, "batch classes"]:
    """Mean squared error of the probabilities of each class: BS_c = mean over voxels of (p_c - y_c)^2.

    This is the marginal score, one per class, each in [0, 1]. The multi-class Brier score of an image, in
    [0, 2], is their sum over the classes: `brier_score(probs, labels).sum(-1)`.

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
    probs, labels, where = as_inputs(probs, labels, where)
    probs, labels, where = flatten(probs, labels, where)
    total = brier_sums(probs, labels, where)
    # A number, not a sum of ones, which XLA would spend seconds on when it compiles.
    count = jnp.full(total.shape, probs.shape[1]) if where is None else count_voxels(where)[0]
    return ratio(total, jnp.broadcast_to(count, total.shape))


@nan_where_undefined
@compiled()
def negative_log_likelihood(
    logits: Float[AnyArray, "batch *spatial classes"],
    labels: Labels,
    *,
    where: Bool[AnyArray, "batch *spatial"] | None = None,
) -> Float[Array, "batch"]:
    """Mean negative log-likelihood of the labels: NLL = mean over voxels of -sum_c y_c log softmax(logits)_c.

    From logits, whose softmax may underflow where its logarithm does not. Log-probabilities are logits too
    (their softmax is the probabilities), so for a model that gives those, pass `jnp.log(probs)`.

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
    logits, labels, where = as_inputs(logits, labels, where, probs_name="logits")
    check_voxel_mask(where, logits)
    return ratio(*likelihood_sums(*flatten(logits, labels, where)))


# Sums over the voxels of an image: what metrics divide and accumulators add up. Inputs have been checked.


def flatten(
    probs: Float[Array, "batch *spatial classes"], labels: Array, where: Array | None
) -> tuple[Array, Array, Array | None]:
    """Probabilities `[batch, voxels, classes]`, labels with or without classes, mask with classes or 1."""
    flat = _per_voxel(probs, probs.shape[-1:])
    labels = _per_voxel(labels, labels.shape[probs.ndim - 1 :])
    return flat, labels, None if where is None else _per_voxel(where, where.shape[probs.ndim - 1 :] or (1,))


def brier_sums(
    probs: Float[Array, "batch voxels classes"],
    labels: Num[Array, "batch voxels *classes"],
    where: Array | None,
) -> Float[Array, "batch classes"]:
    """Sum of squared errors of each class."""
    errors = probs.astype(jnp.float32) - _memberships(labels, probs.shape[-1])
    # The mask comes before the square, whose gradient at NaN is NaN however little of it is wanted.
    return voxel_sum(jnp.square(errors if where is None else jnp.where(where, errors, 0)))


@jax.custom_vjp
def likelihood_sums(
    logits: Float[Array, "batch voxels classes"],
    labels: Num[Array, "batch voxels *classes"],
    where: Bool[Array, "batch voxels 1"] | None,
) -> tuple[Float[Array, "batch"], Int[Array, "batch"]]:
    """Sum of negative log-likelihoods, and voxels counted."""

    def sums(*chunk: Any) -> tuple[Array, ...]:
        losses, counted = voxel_likelihoods(*chunk)
        return voxel_sum(losses)[:, 0], count_voxels(counted)[0][:, 0]

    total, count = sum_over_chunks(sums, logits, labels, where)
    return rounded(total), count


def _likelihood_sums_forward(logits: Array, labels: Array, where: Array | None) -> tuple[Any, Any]:
    return likelihood_sums(logits, labels, where), (logits, labels, where)


def _likelihood_sums_backward(residuals: Any, cotangents: Any) -> Any:
    logits, labels, where = residuals
    soft = (labels,) if jnp.issubdtype(labels.dtype, jnp.floating) else ()

    def losses(logits: Array, labels: Array = labels) -> Array:
        return voxel_likelihoods(logits, labels, where)[0]

    values, pull_back = jax.vjp(losses, logits, *soft)
    gradients = pull_back(jnp.broadcast_to(cotangents[0][:, None, None], values.shape))
    return (*gradients, None) if soft else (*gradients, None, None)


likelihood_sums.defvjp(_likelihood_sums_forward, _likelihood_sums_backward)


def voxel_likelihoods(
    logits: Float[Array, "batch voxels classes"],
    labels: Num[Array, "batch voxels *classes"],
    where: Array | None,
) -> tuple[Float[Array, "batch voxels 1"], Bool[Array, "batch voxels 1"]]:
    """Negative log-likelihood of each voxel, zero where it is not counted, and whether it is."""
    logits = logits.astype(jnp.float32)
    if where is not None:
        logits, labels = jnp.where(where, logits, 0), _blank(labels, where)
    top = logits.argmax(-1)
    is_top = is_class(top, logits.shape[-1])
    # Below the largest logit, whose own 0 is not left to a subtraction: what XLA fuses, it may round twice.
    below = jnp.where(is_top, 0, _entry(logits, top)[..., None] - logits)
    others = jnp.where(is_top, 0, jnp.exp(-below)).sum(-1)
    if labels.ndim == logits.ndim:
        labels = labels.astype(jnp.float32)
        weight = labels.sum(-1)
        counted = weight != 0
        # A class without label may have probability zero, logit -inf: 0 * inf must not come up.
        chosen = (labels * jnp.where(labels == 0, 0, below)).sum(-1)
    else:
        labels = labels.astype(jnp.int32)
        weight, counted = jnp.float32(1), (labels >= 0) & (labels < logits.shape[-1])
        chosen = _entry(below, jnp.where(counted, labels, 0))
    # Exact to the last digits also at 1e-6: nearly all voxels of a segmentation are that certain, and equal ones
    # are off in the same direction.
    losses = chosen + weight * jnp.log1p(others)
    return jnp.where(counted, losses, 0)[..., None], counted[..., None]


def _entry(x: Float[Array, "batch voxels classes"], index: Int[Array, "batch voxels"]) -> Array:
    return jnp.take_along_axis(x, index[..., None], -1, mode="promise_in_bounds")[..., 0]


def overlap_counts(
    predicted: Bool[Array, "batch voxels classes"],
    true: Bool[Array, "batch voxels classes"],
    where: Bool[Array, "batch voxels 1"] | None,
) -> tuple[Int[Array, "batch classes"], ...]:
    """Voxels of each class in both maps, in the predicted one and in the true one."""
    if where is not None:
        predicted, true = predicted & where, true & where
    return count_voxels(predicted & true, predicted, true)


def dice_of_counts(
    overlap: Num[Array, "*shape"], predicted: Num[Array, "*shape"], true: Num[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Dice of overlaps and sizes; NaN where both maps are empty."""
    # Float32 before adding: as int32, the sizes of two maps of 2^30 voxels do not fit together.
    overlap, predicted, true = (x.astype(jnp.float32) for x in (overlap, predicted, true))
    return ratio(2 * overlap, predicted + true)


def is_class(ids: Integer[Array, "batch voxels"], num_classes: int) -> Bool[Array, "batch voxels classes"]:
    """Which class each voxel is of, to be used inside a sum, where the comparison takes no memory."""
    return ids.astype(jnp.int32)[..., None] == jnp.arange(num_classes, dtype=jnp.int32)[None, None]


@jax.custom_jvp
def voxel_sum(x: Float[Array, "batch voxels columns"]) -> Float[Array, "batch columns"]:
    """Sum over voxels, within 1e-6 relative of float64 for numbers of one sign."""
    high, low = _sum_in_blocks((x, jnp.zeros_like(x)), add_pairs)
    return rounded((high, low))


# A reduction by a function of its own has no transpose in JAX; a sum's derivative is a sum.
voxel_sum.defjvps(lambda tangent, total, x: tangent.sum(1))


def count_voxels(*columns: Bool[Array, "batch voxels columns"]) -> tuple[Int[Array, "batch columns"], ...]:
    """How often each is true: all in one pass, exact to 2^31."""
    ones = tuple(column.astype(jnp.int32) for column in columns)
    return _sum_in_blocks(ones, lambda a, b: tuple(map(jnp.add, a, b)))


def _sum_in_blocks(columns: tuple[Array, ...], add: Callable[..., Any]) -> tuple[Array, ...]:
    """Reduces axis 1 of all columns together: blocks first, which keeps threads busy and rounding errors small.

    Not `sum`: XLA:CPU hands one to a library, and writes out in full what is to be summed.
    """
    size = columns[0].shape[1]
    blocks = -(-size // _BLOCK)
    block = -(-size // blocks)

    def split(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, blocks * block - size), (0, 0)))
        return padded.reshape(x.shape[0], blocks, block, x.shape[2])

    zeros = tuple(np.zeros((), column.dtype) for column in columns)
    partial = lax.reduce(tuple(map(split, columns)), zeros, add, (2,))
    return tuple(lax.reduce(partial, zeros, add, (1,)))


def sum_over_chunks(
    sums: Callable[[Array, Array, Array | None], tuple[Array, ...]],
    probs: Float[Array, "batch voxels classes"],
    labels: Num[Array, "batch voxels *classes"],
    where: Bool[Array, "batch voxels #classes"] | None,
) -> tuple[Any, ...]:
    """The sums of all voxels from those of a few at a time, whose intermediate values stay small. No gradient.

    Returns:
        What `sums` does, added up; in place of floats pairs, the sum and what it rounded away.
    """
    size = probs.shape[1]
    taken = min(size, _CHUNK)

    def part(i: int | Array) -> tuple[Any, ...]:
        start = jnp.minimum(i * taken, size - taken)  # the last chunk overlaps the one before
        cut = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=taken, axis=1)
        keep = None if where is None else cut(where)
        if size % taken:
            fresh = (start + jnp.arange(taken, dtype=jnp.int32) >= i * taken)[None, :, None]
            keep = jnp.broadcast_to(fresh, (probs.shape[0], taken, 1)) if keep is None else fresh & keep
        return tuple(
            (x, jnp.zeros_like(x)) if jnp.issubdtype(x.dtype, jnp.floating) else x
            for x in sums(cut(probs), cut(labels), keep)
        )

    def add(i: Array, total: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            add_pairs(a, b) if isinstance(a, tuple) else a + b for a, b in zip(total, part(i), strict=True)
        )

    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(part, 0))
    return lax.fori_loop(0, -(-size // taken), add, zeros)


def rounded(total: tuple[Array, Array]) -> Array:
    """A sum with what it rounded away added, which for infinity is NaN."""
    high, low = total
    return jnp.where(jnp.isfinite(high), high + low, high)


def _blank(labels: Array, where: Array) -> Array:
    """Labels of no class where not counted."""
    if labels.ndim == where.ndim:
        return jnp.where(where, labels, jnp.zeros((), labels.dtype))
    return jnp.where(where[..., 0], labels.astype(jnp.int32), -1)


def _per_voxel(x: AnyArray, columns: tuple[int, ...] = ()) -> Array:
    return jnp.asarray(x).reshape(x.shape[0], -1, *columns)


def _memberships(labels: Array, num_classes: int) -> Float[Array, "batch voxels classes"]:
    return (labels if labels.ndim == 3 else is_class(labels, num_classes)).astype(jnp.float32)


def ratio(total: Array, count: Array) -> Float[Array, "*shape"]:
    """`total / count`, NaN where nothing was counted."""
    count = count.astype(jnp.float32)
    return jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan)
