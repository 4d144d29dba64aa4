"""Sums in bins on a TPU: products of one-hot bins and columns. Scatter and gather are serial on a TPU."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from calib_jax._sums.bins import Bins, Columns, columns_in_bins
from calib_jax._sums.blocks import (
    BLOCK,
    TALLY_BITS,
    add_blocks,
    add_columns,
    cut_into_blocks,
    one_hot_bins,
)
from calib_jax._sums.exact import Pair

_PRODUCTS = 32  # blocks that the matrix unit takes at a time


def look_up(
    table: Float[Array, "batch classes bins"], index: Int[Array, "batch voxels classes"]
) -> Float[Array, "batch voxels classes"]:
    """`table[b, c, index[b, v, c]]`, the transpose of the sum in bins: each element picks its entry of a row."""
    return jnp.where(one_hot_bins(index, table.shape[-1]), table[:, None], 0).sum(-1)


def sum_image(
    probs: Float[Array, "voxels classes"],
    labels: Num[Array, "voxels *classes"],
    where: Array | None,
    edges: Float[Array, "classes inner_edges"] | None,
    bins: Bins,
) -> tuple[Pair, ...]:
    """Counts or weights, sums of probabilities and sums of labels, `[classes, bins]` each.

    One-hot bins take memory, so groups of blocks are summed one after the other.
    """
    count = -(-probs.shape[0] // BLOCK)
    steps = -(-count // _PRODUCTS)
    together = -(-count // steps)
    blocks = cut_into_blocks(probs, labels, where, multiple=together)

    def part(i: Array) -> tuple[Pair, ...]:
        cut = functools.partial(lax.dynamic_slice_in_dim, start_index=i * together, slice_size=together)
        some = jax.tree.map(cut, blocks._replace(classes=None))._replace(classes=blocks.classes)
        in_bins = columns_in_bins(some, edges, bins, TALLY_BITS)
        return add_blocks([_product(index, columns, bins.num_bins) for index, columns in in_bins])

    total = jax.tree.map(jnp.zeros_like, jax.eval_shape(part, jnp.zeros((), jnp.int32)))
    return lax.fori_loop(
        0, steps, lambda i, total: add_columns(total, part(jnp.asarray(i, jnp.int32))), total
    )


def _product(index: Int[Array, "blocks voxels classes"], columns: Columns, num_bins: int) -> tuple[Pair, ...]:
    """One-hot bins times columns. The matrix unit multiplies bfloat16 and adds in float32.

    A float32 cut into three numbers of 8 bits loses nothing to the product, nor to a sum as short as a block.
    """
    parts = jnp.stack([part for column in columns for part in _cut_in_three(column)], axis=-1)
    sums = jnp.einsum(
        "bvcm,bvck->bckm",
        one_hot_bins(index, num_bins).astype(jnp.bfloat16),
        parts,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    high, middle, low = (sums[:, :, i::3] for i in range(3))
    return tuple((high[:, :, k], (middle + low)[:, :, k]) for k in range(len(columns)))


def _cut_in_three(x: Array) -> list[Array]:
    """Three bfloat16 numbers that add up to a float32. A compiler may remove a cast, but no `reduce_precision`."""
    parts = []
    for _ in range(3):
        part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts
