"""Softmax over few classes, cross-entropy, and sums over voxels, written so that XLA's CPU code is fast.

XLA's CPU code reduces a short last axis one number at a time. Class by class it is several times as fast. The
barriers make XLA write probabilities once for all their readers. XLA's CPU compiler drops them unless told not to
(`xla_disable_hlo_passes=cse_barrier_expander`, as the trainer does); this changes a loss alone by less than can be
measured, and a training step by 3%.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from calib_jax._labels import are_dense, one_hot

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
) -> tuple[Float[Array, "*voxels classes"], Float[Array, "*voxels"]]:
    """`softmax`, and `optax.losses.softmax_cross_entropy` of each voxel from the same exponentials.

    An id that is no class costs nothing. Reverse mode only. Forward and backward read and write each array once.
    """
    default = _softmax_and_cross_entropy
    cpu = _softmax_and_cross_entropy_by_class if logits.shape[-1] <= _FEW else default
    return lax.platform_dependent(logits.astype(jnp.float32), labels, cpu=cpu, default=default)


@jax.custom_vjp
def spatial_sums(x: Float[Array, "batch *spatial columns"]) -> Float[Array, "batch columns"]:
    """Sum over the voxels of each image; reverse mode only."""
    # Merging axes is free on a CPU. On a TPU it copies the array.
    return lax.platform_dependent(x, cpu=_spatial_sums_in_lanes, default=_plain_spatial_sums)


def _plain_spatial_sums(x: Array) -> Array:
    return x.sum(tuple(range(1, x.ndim - 1)))


def _spatial_sums_in_lanes(x: Array) -> Array:
    batch, columns = x.shape[0], x.shape[-1]
    x = x.reshape(batch, -1, columns)
    voxels = x.shape[1]
    if voxels < 2 * _WIDTH:
        return x.sum(1)
    whole = voxels // _WIDTH * _WIDTH
    rows = x[:, :whole].reshape(batch, -1, _WIDTH * columns).sum(1)
    total = rows.reshape(batch, _WIDTH, columns).sum(1)
    return total if whole == voxels else total + x[:, whole:].sum(1)


def _spread(empty: Array, gradient: Array) -> tuple[Array]:
    batch, columns = gradient.shape
    spatial = empty.shape[1:]
    return (
        jnp.broadcast_to(gradient.reshape(batch, *(1,) * len(spatial), columns), (batch, *spatial, columns)),
    )


# An empty array carries the spatial shape.
spatial_sums.defvjp(lambda x: (spatial_sums(x), jnp.zeros((0, *x.shape[1:-1]), x.dtype)), _spread)


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
    cpu = _pull_back_both_by_class if probs.shape[-1] <= _FEW else _pull_back_both
    d_logits = lax.platform_dependent(probs, labels, *gradients, cpu=cpu, default=_pull_back_both)
    d_labels = None
    if are_dense(labels, logits):
        d_labels = -gradients[1][..., None] * jax.nn.log_softmax(logits.astype(jnp.float32))
    return d_logits.astype(logits.dtype), d_labels


softmax_and_cross_entropy.defvjp(_both_forward, _both_backward)


def _surprise(targets: Array, shifted: Array, log_total: Array) -> Array:
    """Cost of a class. It is 0 without a label, even if the probability is 0."""
    return jnp.where(targets == 0, 0, targets * (log_total - shifted))


def _softmax_and_cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    shifted = logits - logits.max(-1, keepdims=True)
    terms = jnp.exp(shifted)
    total = terms.sum(-1, keepdims=True)
    return terms / total, _surprise(one_hot(labels, logits), shifted, jnp.log(total)).sum(-1)


def _pull_back_both(probs: Array, labels: Array, d_probs: Array, d_losses: Array) -> Array:
    targets, h = one_hot(labels, probs), d_losses[..., None]
    return _pull_back(probs, d_probs) + h * (probs * targets.sum(-1, keepdims=True) - targets)


# Class by class.


def _classes(x: Array) -> list[Array]:
    return [x[..., c] for c in range(x.shape[-1])]


def _sum(terms: list[Array]) -> Array:
    return sum(terms[1:], start=terms[0])


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
    log_total = jnp.log(total)
    targets = _classes(one_hot(labels, logits))
    losses = _sum([_surprise(y, score, log_total) for y, score in zip(targets, shifted, strict=True)])
    return lax.optimization_barrier((jnp.stack([term / total for term in terms], axis=-1), losses))


def _pull_back(probs: Array, gradient: Array) -> Array:
    return probs * (gradient - (probs * gradient).sum(-1, keepdims=True))


def _pull_back_by_class(probs: Array, gradient: Array) -> Array:
    gradient = lax.optimization_barrier(gradient)
    products = [p * g for p, g in zip(_classes(probs), _classes(gradient), strict=True)]
    mean = lax.optimization_barrier(_sum(products))
    return lax.optimization_barrier(probs * (gradient - mean[..., None]))


def _pull_back_both_by_class(probs: Array, labels: Array, d_probs: Array, d_losses: Array) -> Array:
    d_probs = lax.optimization_barrier(d_probs)
    targets = one_hot(labels, probs)
    products = [p * g for p, g in zip(_classes(probs), _classes(d_probs), strict=True)]
    mean = lax.optimization_barrier(_sum(products) - d_losses * _sum(_classes(targets)))
    return lax.optimization_barrier(probs * (d_probs - mean[..., None]) - d_losses[..., None] * targets)
