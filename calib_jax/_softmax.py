"""Softmax over few classes, and sums over voxels, as fast on CPU as elsewhere.

XLA's CPU code for a reduction over a short last axis takes one number at a time, and it computes a softmax anew
for each of its readers. Class by class, and written out once, both are several times as fast.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_FEW = 16  # classes up to which a program has one piece of code for each
_WIDTH = (
    4096  # accumulators that take voxels in turn: wide enough for vector units, and no running sum gets long
)


@jax.custom_vjp
def softmax(logits: Float[Array, "*voxels classes"]) -> Float[Array, "*voxels classes"]:
    """`jax.nn.softmax` in float32 over the last axis; reverse mode only."""
    default = jax.nn.softmax
    cpu = _softmax_by_class if logits.shape[-1] <= _FEW else default
    return lax.platform_dependent(logits.astype(jnp.float32), cpu=cpu, default=default)


def voxel_sums(x: Float[Array, "batch voxels columns"]) -> Float[Array, "batch columns"]:
    """Sum over the voxels of each image."""
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


def _classes(x: Array) -> list[Array]:
    return [x[..., c] for c in range(x.shape[-1])]


def _softmax_by_class(logits: Array) -> Array:
    scores = _classes(logits)
    largest = lax.stop_gradient(functools.reduce(jnp.maximum, scores))
    terms = [jnp.exp(score - largest) for score in scores]
    total = sum(terms[1:], start=terms[0])
    return lax.optimization_barrier(jnp.stack([term / total for term in terms], axis=-1))


def _pull_back(probs: Array, gradient: Array) -> Array:
    return probs * (gradient - (probs * gradient).sum(-1, keepdims=True))


def _pull_back_by_class(probs: Array, gradient: Array) -> Array:
    gradient = lax.optimization_barrier(gradient)
    products = [p * g for p, g in zip(_classes(probs), _classes(gradient), strict=True)]
    mean = lax.optimization_barrier(sum(products[1:], start=products[0]))
    return lax.optimization_barrier(probs * (gradient - mean[..., None]))
