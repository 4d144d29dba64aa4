"""Softmax over few classes, cross-entropy, and sums over voxels, written so that XLA's code is fast.

XLA's CPU code reduces a short last axis one number at a time. Class by class it is several times as fast. On a GPU
sums over classes class by class become part of what reads them, where XLA would store what they add up. The
barriers make XLA write probabilities once for all their readers. XLA's CPU compiler drops them unless told not to
(`xla_disable_hlo_passes=cse_barrier_expander`, as the trainer does); this changes a loss alone by less than can be
measured, and a training step by 3%.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from calib_jax._labels import are_dense, are_soft, one_hot, one_hot_by_arithmetic
from calib_jax._parts import by_parts

_Function = Callable[..., Array]

_FEW = 16  # classes up to which a program has one piece of code for each
_WIDTH = 4096  # accumulators that take voxels in turn: vector units are full, and no running sum gets long


@jax.custom_vjp
def softmax(logits: Float[Array, "*voxels classes"]) -> Float[Array, "*voxels classes"]:
    """`jax.nn.softmax` in float32 over the last axis; reverse mode only."""
    default = jax.nn.softmax
    cpu = _softmax_by_class if logits.shape[-1] <= _FEW else default
    return lax.platform_dependent(logits.astype(jnp.float32), cpu=cpu, default=default)


@jax.custom_vjp
def softmax_and_cross_entropy(
    logits: Float[Array, "*voxels classes"],
    labels: Int[Array, "*voxels"] | Float[Array, "*voxels classes"],
) -> tuple[Float[Array, "*voxels classes"], Float[Array, ""]]:
    """`softmax`, and the sum over all voxels of `optax.losses.softmax_cross_entropy`, from the same exponentials.

    An id that is no class costs nothing. Reverse mode only. Forward and backward read and write each array once.
    """
    cpu = gpu = default = _softmax_and_cross_entropy
    if logits.shape[-1] <= _FEW:
        cpu, gpu = _softmax_and_cross_entropy_by_class, _softmax_beside_cross_entropy
    return lax.platform_dependent(logits.astype(jnp.float32), labels, cpu=cpu, cuda=gpu, default=default)


@jax.custom_vjp
def dice_sums(
    probs: Float[Array, "batch *spatial classes"], labels: Array, where: Bool[Array, "batch *spatial"] | None
) -> tuple[Float[Array, "batch classes"], Float[Array, "batch classes"]]:
    """Overlap of probabilities and labels of each image and class, and their sizes added up; reverse mode only.

    With soft labels t the overlap is the sum of min(p, t) = (p + t - |p - t|) / 2, for which Dice is largest at
    p = t. It equals the sum of p t if t is 0 or 1. For other t, Dice with p t is largest where p itself is 0 or 1.
    """
    on_cpu = functools.partial(_dice_sums, one_hot=one_hot, total=_total_in_lanes)
    elsewhere = functools.partial(_dice_sums, one_hot=one_hot_by_arithmetic, total=_total)

    def sums(images: Any, _: None) -> Any:
        return lax.platform_dependent(*images, cpu=on_cpu, default=elsewhere)

    return by_parts(sums, (probs, labels, where))


def _dice_sums(
    probs: Array, labels: Array, where: Array | None, one_hot: _Function, total: _Function
) -> tuple[Array, Array]:
    targets = one_hot(labels, probs).astype(jnp.float32)
    if where is not None:
        probs, targets = (jnp.where(where[..., None], x, 0) for x in (probs, targets))
    overlap = jnp.minimum(probs, targets) if are_soft(labels, probs) else probs * targets
    return total(overlap), total(probs) + total(targets)


def _total(x: Float[Array, "batch *spatial columns"]) -> Float[Array, "batch columns"]:
    """Sum over the voxels of each image. On a TPU merging axes would copy the array."""
    return x.sum(tuple(range(1, x.ndim - 1)))


def _total_in_lanes(x: Float[Array, "batch *spatial columns"]) -> Float[Array, "batch columns"]:
    return voxel_sums(x.reshape(x.shape[0], -1, x.shape[-1]))


def _dice_forward(probs: Array, labels: Array, where: Array | None) -> tuple[Any, tuple[Any, ...]]:
    return dice_sums(probs, labels, where), (probs, labels, where)


def _dice_backward(residuals: tuple[Any, ...], gradients: tuple[Array, Array]) -> tuple[Array, Any, None]:
    probs, labels, where = residuals
    beside = (probs.shape[0], *(1,) * (probs.ndim - 2), probs.shape[-1])
    overlap, sizes = (gradient.reshape(beside) for gradient in gradients)

    def of(slope: Array, dtype: Any) -> Array:
        gradient = (overlap * slope + sizes).astype(dtype)
        return gradient if where is None else jnp.where(where[..., None], gradient, 0)

    targets = _targets(labels, probs)
    if not are_soft(labels, probs):
        return of(targets, probs.dtype), None, None
    slope = _slope_of_minimum(probs, targets)
    return of(slope, probs.dtype), of(1 - slope, labels.dtype), None


def _targets(labels: Array, probs: Array) -> Array:
    """One-hot labels, or soft ones as they are."""
    return lax.platform_dependent(
        labels,
        cpu=lambda labels: one_hot(labels, probs),
        default=lambda labels: one_hot_by_arithmetic(labels, probs).astype(jnp.float32),
    )


def _slope_of_minimum(probs: Array, targets: Array) -> Array:
    """Derivative of min(p, t) in p. At p = t any value in [0, 1] is a subgradient; t is the derivative of p t."""
    return jnp.where(probs == targets, targets, (probs < targets).astype(jnp.float32))


dice_sums.defvjp(_dice_forward, _dice_backward)


@jax.custom_vjp
def damped(
    probs: Float[Array, "batch *spatial classes"], labels: Array
) -> Float[Array, "batch *spatial classes"]:
    """The probabilities as they are; their gradient is multiplied by the error |p - y|. Reverse mode only."""
    return probs


def _damped_forward(probs: Array, labels: Array) -> tuple[Array, tuple[Array, Array]]:
    return probs, (probs, labels)


def _damped_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    probs, labels = residuals
    return gradient * jnp.abs(probs - _targets(labels, probs)), None


damped.defvjp(_damped_forward, _damped_backward)


def voxel_sums(x: Float[Array, "batch voxels columns"]) -> Float[Array, "batch columns"]:
    """Sum over the voxels of each image, on a CPU."""
    batch, voxels, columns = x.shape
    if voxels < 2 * _WIDTH:
        return x.sum(1)
    whole = voxels // _WIDTH * _WIDTH
    rows = x[:, :whole].reshape(batch, -1, _WIDTH * columns).sum(1)
    total = rows.reshape(batch, _WIDTH, columns).sum(1)
    return total if whole == voxels else total + x[:, whole:].sum(1)


def _forward(logits: Array) -> tuple[Array, tuple[Array, Array]]:
    probs = softmax(logits)
    return probs, (probs, jnp.zeros((), logits.dtype))


def _backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array]:
    probs, like = residuals
    cpu = _pull_back_by_class if probs.shape[-1] <= _FEW else _pull_back
    d_logits = lax.platform_dependent(probs, gradient, cpu=cpu, default=_pull_back)
    return (d_logits.astype(like.dtype),)


softmax.defvjp(_forward, _backward)


def _both_forward(logits: Array, labels: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    both = softmax_and_cross_entropy(logits, labels)
    return both, (logits, labels, both[0])


def _both_backward(
    residuals: tuple[Array, ...], gradients: tuple[Array, Array]
) -> tuple[Array, Array | None]:
    # From p = softmax(x): p (g - sum p g), and from the cross-entropy with cotangent h: h (p sum y - y).
    logits, labels, probs = residuals
    cpu = gpu = default = _pull_back_both
    if probs.shape[-1] <= _FEW:
        cpu, gpu = _pull_back_both_by_class, functools.partial(_pull_back_both, sum_classes=_sum_by_class)
    d_logits = lax.platform_dependent(probs, labels, *gradients, cpu=cpu, cuda=gpu, default=default)
    d_labels = None
    if are_dense(labels, logits):
        d_labels = -gradients[1] * jax.nn.log_softmax(logits.astype(jnp.float32))
    return d_logits.astype(logits.dtype), d_labels


softmax_and_cross_entropy.defvjp(_both_forward, _both_backward)


def _surprise(targets: Array, shifted: Array, log_total: Array) -> Array:
    """Cost of a class. It is 0 without a label, even if the probability is 0."""
    return jnp.where(targets == 0, 0, targets * (log_total - shifted))


def _softmax_and_cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    shifted = logits - logits.max(-1, keepdims=True)
    terms = jnp.exp(shifted)
    total = terms.sum(-1, keepdims=True)
    losses = _surprise(one_hot_by_arithmetic(labels, logits).astype(jnp.float32), shifted, jnp.log(total))
    # Without a barrier, XLA on a GPU stores the losses of all classes until the backward pass.
    return lax.optimization_barrier((terms / total, losses.sum()))


def _pull_back(probs: Array, gradient: Array) -> Array:
    return probs * (gradient - (probs * gradient).sum(-1, keepdims=True))


def _sum_classes(x: Array) -> Array:
    return x.sum(-1)


def _pull_back_both(
    probs: Array, labels: Array, d_probs: Array, h: Array, sum_classes: _Function = _sum_classes
) -> Array:
    targets = one_hot_by_arithmetic(labels, probs).astype(jnp.float32)
    if are_dense(labels, probs):
        total = targets.sum(-1)
    else:  # 1 for an id of a class, 0 otherwise
        ids = labels.astype(jnp.int32)
        total = (jnp.clip(ids + 1, 0, 1) * jnp.clip(probs.shape[-1] - ids, 0, 1)).astype(jnp.float32)
    mean = sum_classes(probs * d_probs) - h * total
    return probs * (d_probs - mean[..., None]) - h * targets


# Class by class.


def _classes(x: Array) -> list[Array]:
    return [x[..., c] for c in range(x.shape[-1])]


def _sum(terms: list[Array]) -> Array:
    return sum(terms[1:], start=terms[0])


def _sum_by_class(x: Array) -> Array:
    return _sum(_classes(x))


def _shifted(logits: Array) -> list[Array]:
    """Scores minus the largest score."""
    scores = _classes(logits)
    largest = functools.reduce(jnp.maximum, scores)
    return [score - largest for score in scores]


def _softmax_by_class(logits: Array) -> Array:
    terms = [jnp.exp(score) for score in _shifted(logits)]
    total = _sum(terms)
    return lax.optimization_barrier(jnp.stack([term / total for term in terms], axis=-1))


def _softmax_and_cross_entropy_by_class(logits: Array, labels: Array) -> tuple[Array, Array]:
    shifted = _shifted(logits)
    terms = [jnp.exp(score) for score in shifted]
    total = _sum(terms)
    losses = _cross_entropy_by_class(shifted, total, one_hot(labels, logits))
    probs, losses = lax.optimization_barrier((jnp.stack([term / total for term in terms], axis=-1), losses))
    return probs, losses.sum()


def _softmax_beside_cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    """XLA on a GPU makes one kernel of each, which read the logits once and store nothing between."""
    shifted = _shifted(logits)
    total = _sum([jnp.exp(score) for score in shifted])
    targets = one_hot_by_arithmetic(labels, logits).astype(jnp.float32)
    losses = _cross_entropy_by_class(shifted, total, targets)
    return lax.optimization_barrier((jax.nn.softmax(logits), losses.sum()))


def _cross_entropy_by_class(shifted: list[Array], total: Array, targets: Array) -> Array:
    log_total = jnp.log(total)
    surprises = [_surprise(y, score, log_total) for y, score in zip(_classes(targets), shifted, strict=True)]
    return _sum(surprises)


def _pull_back_by_class(probs: Array, gradient: Array) -> Array:
    gradient = lax.optimization_barrier(gradient)
    products = [p * g for p, g in zip(_classes(probs), _classes(gradient), strict=True)]
    mean = lax.optimization_barrier(_sum(products))
    return lax.optimization_barrier(probs * (gradient - mean[..., None]))


def _pull_back_both_by_class(probs: Array, labels: Array, d_probs: Array, h: Array) -> Array:
    d_probs = lax.optimization_barrier(d_probs)
    targets = one_hot(labels, probs)
    products = [p * g for p, g in zip(_classes(probs), _classes(d_probs), strict=True)]
    mean = lax.optimization_barrier(_sum(products) - h * _sum(_classes(targets)))
    return lax.optimization_barrier(probs * (d_probs - mean[..., None]) - h * targets)
