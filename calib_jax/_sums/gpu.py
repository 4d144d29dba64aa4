"""Sums in bins on a GPU, and on platforms without a file of their own: masked sums.

XLA fuses a comparison per element and bin into the sum: the comparisons take no memory, and no two threads write to
one address. A Pallas kernel would have to be shown to be faster on a GPU.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from calib_jax._sums.bins import Bins, columns_in_bins
from calib_jax._sums.blocks import TALLY_BITS, add_blocks, cut_into_blocks, one_hot_bins
from calib_jax._sums.exact import Pair, as_pair, sum_pairs


def sum_image(
    probs: Float[Array, "voxels classes"],
    labels: Num[Array, "voxels *classes"],
    where: Array | None,
    edges: Float[Array, "classes inner_edges"] | None,
    bins: Bins,
) -> tuple[Pair, ...]:
    """Counts or weights, sums of probabilities and sums of labels, `[classes, bins]` each."""
    sums = []
    for index, columns in columns_in_bins(cut_into_blocks(probs, labels, where), edges, bins, TALLY_BITS):
        chosen = one_hot_bins(index, bins.num_bins)
        # Threads may add in any order, so each addition keeps its own rounding error.
        masked = (jnp.where(chosen, column[..., None], 0) for column in columns)
        sums.append(tuple(sum_pairs(as_pair(x), 1) for x in masked))
    return add_blocks(sums)
