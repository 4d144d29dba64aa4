"""Sums over the voxels of each image, within 1e-6 relative of float64 at any size.

A plain float32 sum of 3e7 equal numbers is off by percents. These functions sum blocks of voxels, then the blocks,
and keep what float32 rounds away. Soft Dice does not need this and sums in plain float32, which is faster.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from calib_jax._sums.bins import merge_space
from calib_jax._sums.exact import add_pairs, as_pair, rounded

_BLOCK = 2**15  # voxels: the square root of 2^30, so that neither level of a sum has more terms than that
_CHUNK = 2**17  # voxels of which intermediate values exist at a time


@jax.custom_jvp
def sum_voxels(x: Float[Array, "batch *spatial columns"]) -> Float[Array, "batch columns"]:
    """Sum over voxels, within 1e-6 relative of float64 for numbers of one sign."""
    high, low = _reduce(as_pair(x), add_pairs)
    return rounded((high, low))


# JAX cannot transpose a reduction by a user's function. The derivative of a sum is a sum.
sum_voxels.defjvps(lambda tangent, total, x: tangent.sum(tuple(range(1, x.ndim - 1))))


def count_voxels(*columns: Bool[Array, "batch *spatial columns"]) -> tuple[Int[Array, "batch columns"], ...]:
    """How often each column is true. One pass over all columns, exact to 2^31."""

    def in_blocks(*columns: Array) -> tuple[Array, ...]:
        ones = tuple(merge_space(x, x.ndim).astype(jnp.int32) for x in columns)
        return _reduce_in_blocks(ones, lambda a, b: tuple(map(jnp.add, a, b)))

    def at_once(*columns: Array) -> tuple[Array, ...]:
        return tuple(x.sum(tuple(range(1, x.ndim - 1)), dtype=jnp.int32) for x in columns)

    # Elsewhere XLA would write out the blocks of integers.
    return lax.platform_dependent(*columns, cpu=in_blocks, default=at_once)


def sum_in_chunks(
    sums: Callable[[Array, Array, Array | None], tuple[Array, ...]],
    probs: Float[Array, "batch *spatial classes"],
    labels: Num[Array, "batch *spatial_and_classes"],
    where: Bool[Array, "batch *spatial #classes"] | None,
) -> tuple[Any, ...]:
    """Adds up `sums` of chunks of voxels, so that intermediate values stay small. Not differentiable.

    On a TPU, images with several spatial axes are one chunk: merging their axes would copy them, and XLA stores no
    intermediate values there.

    Args:
        sums: function from a chunk's probabilities, labels and mask to sums over its voxels. A chunk has one
            spatial axis or all of them.
        probs, labels, where: all voxels.

    Returns:
        The sums over all voxels: integers as they are, floats as pairs.
    """

    def with_pairs(*chunk: Any) -> tuple[Any, ...]:
        found = sums(*chunk)
        return tuple(as_pair(x) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in found)

    def in_chunks(*images: Any) -> tuple[Any, ...]:
        return _in_chunks(with_pairs, *(merge_space(x, probs.ndim) for x in images))

    if probs.ndim == 3:
        return in_chunks(probs, labels, where)
    return lax.platform_dependent(probs, labels, where, tpu=with_pairs, default=in_chunks)


def _in_chunks(sums: Callable[..., Any], probs: Array, labels: Array, where: Array | None) -> tuple[Any, ...]:
    size = probs.shape[1]
    taken = min(size, _CHUNK)

    def part(i: int | Array) -> tuple[Any, ...]:
        start = jnp.minimum(i * taken, size - taken)  # the last chunk overlaps the one before
        keep = None if where is None else cut(where, start)
        if size % taken:
            fresh = (start + jnp.arange(taken, dtype=jnp.int32) >= i * taken)[None, :, None]
            keep = jnp.broadcast_to(fresh, (probs.shape[0], taken, 1)) if keep is None else fresh & keep
        return sums(cut(probs, start), cut(labels, start), keep)

    def cut(x: Array, start: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, start, taken, axis=1)

    def add(i: Array, total: tuple[Any, ...]) -> tuple[Any, ...]:
        pairs = zip(total, part(i), strict=True)
        return tuple(add_pairs(a, b) if isinstance(a, tuple) else a + b for a, b in pairs)

    # Only types are used. `jax.eval_shape` loses what a `shard_map` along some mesh axes adds to them.
    zeros = jax.tree.map(jnp.zeros_like, part(0))
    return lax.fori_loop(0, -(-size // taken), add, zeros)


def _reduce(columns: tuple[Array, ...], add: Callable[..., Any]) -> tuple[Array, ...]:
    """Reduces the spatial axes of all columns together, in two steps."""

    def in_blocks(*columns: Array) -> tuple[Array, ...]:
        return _reduce_in_blocks(tuple(merge_space(x, x.ndim) for x in columns), add)

    def in_rows(*columns: Array) -> tuple[Array, ...]:
        zeros = tuple(np.zeros((), column.dtype) for column in columns)
        rows = lax.reduce(columns, zeros, add, tuple(range(1, columns[0].ndim - 2)))
        return tuple(lax.reduce(rows, zeros, add, (1,)))

    if columns[0].ndim == 3:
        return in_blocks(*columns)
    # On a TPU merging axes would copy the columns.
    return lax.platform_dependent(*columns, tpu=in_rows, default=in_blocks)


def _reduce_in_blocks(columns: tuple[Array, ...], add: Callable[..., Any]) -> tuple[Array, ...]:
    """Reduces axis 1 of all columns together, blocks first: threads stay busy and rounding errors small.

    Not `sum`: XLA:CPU hands a sum to a library and writes out its argument in full.
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
