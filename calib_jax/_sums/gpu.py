"""Sums in bins on GPUs where `gpu_kernel` does not fit, and on platforms without a file: masked sums, in float64.

XLA fuses the comparison of an element with a bin into the sum: comparisons take no memory, and no two threads write
to one address. XLA stores them nevertheless unless each of the three sums compares by itself (a barrier hides that
they compare the same), rows of voxels are summed first, and the rows divide the image.
"""

import operator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Num

from calib_jax._compat import enable_x64
from calib_jax._labels import one_hot_by_arithmetic
from calib_jax._sums.bins import Bins, bin_limits, in_rows, share_of_bin, single_or_double
from calib_jax._sums.bins import gather as look_up  # noqa: F401

_ROWS = range(2048, 255, -1)  # voxels of a row


def bin_sums(
    probs: Float[Array, "batch voxels classes"],
    labels: Num[Array, "batch voxels *classes"],
    where: Array | None,
    edges: Float[Array, "batch classes inner_edges"] | None,
    bins: Bins,
) -> tuple[Array, Array, Array]:
    """Counts or weights, sums of probabilities and sums of labels, `[batch, classes, bins]` each."""
    voxels = probs.shape[1]
    row = next((size for size in _ROWS if voxels % size == 0), min(voxels, _ROWS[0]))
    probs, labels, where = in_rows(probs, labels, where, max(1, row))
    lower, upper = bin_limits(edges, bins, single_or_double(probs).dtype)
    # Beside [batch, rows, voxels, classes, bins].
    lower, upper = (
        x.reshape(-1, 1, 1, x.shape[1] if x.ndim > 1 else 1, bins.num_bins) for x in (lower, upper)
    )
    weighted = bins.binning == "soft"

    def total(probs: Array, values: Any) -> Array:
        """Sum of `values` in each bin; of weights if None."""
        values = None if values is None else values[..., None]
        share = share_of_bin(single_or_double(probs)[..., None], lower, upper, bins)
        if where is not None:
            share = jnp.where(where[..., None], share, jnp.zeros_like(share))
        if weighted:
            masked = share if values is None else jnp.where(share > 0, share * values, 0)
        else:
            masked = jnp.where(share, np.int32(1) if values is None else values, 0)
        return _sum_of_rows(masked)

    # A barrier makes equal arrays unequal to XLA.
    again = lax.optimization_barrier(probs)
    places = probs, again, lax.optimization_barrier(again)
    labels = one_hot_by_arithmetic(labels, probs)
    values = probs.astype(jnp.float32), None, labels.astype(jnp.float32) if weighted else labels
    rows = tuple(map(total, places, values))
    with enable_x64(True):
        zeros = tuple(np.zeros((), x.dtype) for x in rows)
        # As one reduction of three sums: XLA would merge each by itself with the sum of the rows.
        prob_sum, count, label_sum = lax.reduce(
            rows, zeros, lambda a, b: tuple(map(operator.add, a, b)), (1,)
        )
        prob_sum, label_sum = (lax.convert_element_type(x, jnp.float32) for x in (prob_sum, label_sum))
        return lax.convert_element_type(count, jnp.float32 if weighted else jnp.int32), prob_sum, label_sum


def _sum_of_rows(x: Array) -> Array:
    """Sums over axis 2: integers as int32, floats as float64."""
    with enable_x64(True):
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = lax.convert_element_type(x, jnp.float64)
        return x.sum(2, dtype=x.dtype)
