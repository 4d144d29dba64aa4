"""Sums in bins on a TPU: masked sums of several bins in one pass, without scatter, gather or float64.

Voxels keep their axes: merging axes of tiled arrays copies them, and XLA puts a spatial axis into the lanes, not
the few classes. The last spatial axis is summed in a second step, with which XLA compiles several times as fast.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Num

from calib_jax._labels import one_hot_by_arithmetic
from calib_jax._sums.bins import Bins, bin_limits, in_rows, merge_space, share_of_bin, single_or_double
from calib_jax._sums.exact import add_pairs, as_pair, rounded

_TOGETHER = 40  # sums in one pass, each in vector registers of its own
_ROW = 512  # voxels of a row of an image that has one long spatial axis
_WRITTEN_OUT = 64  # entries of a table that a look-up compares in one pass


def bin_sums(
    probs: Float[Array, "batch *spatial classes"],
    labels: Num[Array, "batch *spatial_and_classes"],
    where: Array | None,
    edges: Float[Array, "batch classes inner_edges"] | None,
    bins: Bins,
) -> tuple[Array, Array, Array]:
    """Counts or weights, sums of probabilities and sums of labels, `[batch, classes, bins]` each."""
    if math.prod(probs.shape[1:-2]) < _ROW:
        voxels = math.prod(probs.shape[1:-1])
        flat = (merge_space(x, probs.ndim) for x in (probs, labels, where))
        probs, labels, where = in_rows(*flat, row=max(1, min(voxels, _ROW)))
    lower, upper = bin_limits(edges, bins, single_or_double(probs).dtype)
    counted = bins.binning != "soft"
    steps = -(-bins.num_bins * (4 if counted else 6) // _TOGETHER)
    together = -(-bins.num_bins // steps)

    def columns(lower: Array, upper: Array) -> Any:
        share = share_of_bin(single_or_double(probs), lower, upper, bins)
        if where is not None:
            share = jnp.where(where, share, jnp.zeros_like(share))
        values, of_class = probs.astype(jnp.float32), one_hot_by_arithmetic(labels, probs)
        if counted:
            count, label = share.astype(jnp.int32), jnp.where(share, of_class, 0)
            prob = as_pair(jnp.where(share, values, 0))
        else:
            count, label = as_pair(share), jnp.where(share > 0, share * of_class.astype(jnp.float32), 0)
            prob = as_pair(jnp.where(share > 0, share * values, 0))
        return prob, count, as_pair(label) if jnp.issubdtype(label.dtype, jnp.floating) else label

    def some_bins(limits: tuple[Array, Array]) -> Any:
        found = [columns(*(_beside_voxels(x[m], probs.ndim) for x in limits)) for m in range(together)]
        return _sum_all(found, tuple(range(1, probs.ndim - 2)))

    def cut(x: Any, filler: float) -> Array:
        """Limits as `[steps, together, ...]`. Bins that fill up the last step are empty."""
        x = jnp.moveaxis(jnp.asarray(x), -1, 0)
        x = jnp.pad(
            x, ((0, steps * together - bins.num_bins), *((0, 0),) * (x.ndim - 1)), constant_values=filler
        )
        return x.reshape(steps, together, *x.shape[1:])

    limits = cut(lower, jnp.inf), cut(upper, -jnp.inf)
    if steps == 1:
        sums = jax.tree.map(lambda x: x[None], some_bins(jax.tree.map(lambda x: x[0], limits)))
    else:
        sums = lax.map(some_bins, limits)
    # From [steps, batch, classes, together].
    sums = jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1)[..., : bins.num_bins], sums
    )
    prob_sum, count, label_sum = (rounded(x) if isinstance(x, tuple) else x for x in sums)
    return count, prob_sum, label_sum.astype(jnp.float32)


def look_up(
    table: Float[Array, "batch classes bins"], index: Int[Array, "batch *spatial classes"]
) -> Float[Array, "batch *spatial classes"]:
    """`table[b, c, index[b, ..., c]]`, the transpose of the sum in bins: each element picks its entry of a row."""
    rows = jnp.moveaxis(table, -1, 0)

    def pick(m: Any, found: Array) -> Array:
        here = index == jnp.asarray(m, index.dtype)  # int64 in a loop under x64
        return jnp.where(here, _beside_voxels(rows[m], index.ndim), found)

    found = jnp.zeros(index.shape, table.dtype)
    if len(rows) > _WRITTEN_OUT:
        return lax.fori_loop(0, len(rows), pick, found)
    for m in range(len(rows)):
        found = pick(m, found)
    return found


def _beside_voxels(x: Array, ndim: int) -> Array:
    """`[batch, classes]` as an array that broadcasts to `[batch, *spatial, classes]`. Scalars stay scalars."""
    return x.reshape(x.shape[0], *(1,) * (ndim - 2), x.shape[1]) if x.ndim else x


def _sum_all(columns: list[Any], axes: tuple[int, ...]) -> Any:
    """Sums over `axes` of all bins in one pass, then over the last spatial axis: `[batch, classes, bins]` each."""

    def add_one(a: Any, b: Any) -> Any:
        return add_pairs(a, b) if isinstance(a, tuple) else a + b

    def add(a: Any, b: Any) -> Any:
        return [tuple(map(add_one, *bins)) for bins in zip(a, b, strict=True)]

    def reduce(columns: list[Any], axes: tuple[int, ...]) -> Any:
        zeros = jax.tree.map(lambda x: np.zeros((), x.dtype), columns)
        return lax.reduce(columns, zeros, add, axes)

    rows = jax.tree.map(lambda *bins: jnp.stack(bins, axis=-1), *reduce(columns, axes))
    return reduce([rows], (1,))[0]
