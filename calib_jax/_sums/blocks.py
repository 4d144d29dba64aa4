"""Images cut into blocks, whose float32 sums are added up exactly. GPUs and TPUs sum in this way."""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from calib_jax._labels import are_dense
from calib_jax._sums.bins import Elements, split_tally
from calib_jax._sums.exact import Pair, add_pairs, as_pair, sum_pairs

BLOCK = 1792  # voxels: float32 holds the tally of so many exactly
TALLY_BITS = BLOCK.bit_length()


def cut_into_blocks(
    probs: Float[Array, "voxels classes"], labels: Array, where: Array | None, multiple: int = 1
) -> Elements:
    """An image as `[blocks, voxels, classes]`. Voxels that do not count fill up a `multiple` of blocks."""
    voxels, classes = probs.shape
    block = min(voxels, BLOCK)
    where = jnp.ones((voxels, 1), bool) if where is None else where
    dense = are_dense(labels, probs)

    def split(x: Array) -> Array:
        filled = jnp.pad(x, ((0, -voxels % (block * multiple)), (0, 0)))
        return filled.reshape(-1, block, x.shape[1])

    probs, labels, where = (split(x) for x in (probs, labels if dense else labels[:, None], where))
    class_ids = None if dense else lax.broadcasted_iota(jnp.int32, (1, 1, classes), 2)
    return Elements(probs, labels, class_ids, where)


def add_blocks(sums: list[tuple[Pair, ...]]) -> tuple[Pair, ...]:
    """Counts or weights, sums of probabilities and sums of labels of all blocks, from each block's columns."""
    prob_sum, count, *label_sum = functools.reduce(add_columns, sums)
    if not label_sum:
        count, of_class = map(as_pair, split_tally(count[0] + count[1], TALLY_BITS))
        label_sum = [of_class]
    return tuple(sum_pairs(x, 0) for x in (count, prob_sum, *label_sum))


def add_columns(a: tuple[Pair, ...], b: tuple[Pair, ...]) -> tuple[Pair, ...]:
    """Adds two sets of sums."""
    return tuple(map(add_pairs, a, b))


def one_hot_bins(index: Int[Array, "*elements"], num_bins: int) -> Bool[Array, "*elements bins"]:
    """Which bin each element belongs to."""
    return index[..., None] == lax.broadcasted_iota(index.dtype, (*index.shape, num_bins), index.ndim)
