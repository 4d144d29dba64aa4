"""What bins are: their options, edges and limits, and the share of a voxel that falls between two limits."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from calib_jax._checks import AnyArray
from calib_jax._labels import are_dense

Closed = Literal["right", "left"]
Binning = Literal["hard", "soft", "adaptive"]


@dataclasses.dataclass(frozen=True)
class Bins:
    """How [0, 1] is divided into bins; static under `jit`.

    Attributes:
        binning: `"hard"`, `"soft"` or `"adaptive"`, see `calib_jax.bin_statistics`.
        num_bins: number of bins.
        closed: the side on which a hard bin includes its edge, see `calib_jax.bin_index`.
    """

    binning: Binning
    num_bins: int
    closed: Closed = "right"


def single_or_double(x: Array) -> Array:
    """`x` as float32, unless it is float64: rounding could move it to another bin."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


# Bins.


def equal_edges(num_bins: int) -> Float[np.ndarray, "edges"]:
    """`calib_jax.bin_edges`."""
    end = np.float32(1) + np.finfo(np.float32).eps
    step = np.float64(end / np.float32(num_bins))
    i = np.arange(num_bins + 1)
    edges = np.where(i < (num_bins + 1) // 2, step * i, np.float64(end) - step * (num_bins - i))
    return edges.astype(np.float32)


# Bins as intervals, for platforms on which a comparison per bin is cheaper than an address.


def bin_limits(edges: Array | None, bins: Bins, dtype: Any) -> tuple[AnyArray, AnyArray]:
    """Lower and upper limits of all bins for `share_of_bin`: `[bins]`, with `edges` `[batch, classes, bins]`."""
    if bins.binning == "soft":
        centres = np.arange(bins.num_bins, dtype=np.float32)
        return centres - 1, centres + 1
    if edges is None:
        inner = equal_edges(bins.num_bins)[1:-1].astype(dtype)
        return np.insert(inner, 0, np.nan), np.insert(inner, len(inner), np.inf)
    # Edges are infinite where too few voxels count. Only the last limit may be infinite.
    inner = jnp.minimum(edges, jnp.finfo(edges.dtype).max)
    first, last = (jnp.full((*edges.shape[:-1], 1), x, edges.dtype) for x in (jnp.nan, jnp.inf))
    return jnp.concatenate([first, inner], axis=-1), jnp.concatenate([inner, last], axis=-1)


def share_of_bin(values: Array, lower: AnyArray, upper: AnyArray, bins: Bins) -> Array:
    """Whether each probability lies in a bin, boolean; the share of the voxel that a soft bin gets, float32.

    A comparison with NaN is false. The first bin has no lower limit, NaN, and only the last takes in probabilities
    that are NaN.
    """
    if bins.binning == "soft":
        last = bins.num_bins - 1
        nearest = jnp.clip(values.astype(jnp.float32) * bins.num_bins - 0.5, 0, last)
        position = jnp.where(nearest <= last, nearest, last)
        return jnp.maximum(jnp.minimum(position - lower, upper - position), 0)
    if bins.closed == "left":
        return ~(values < lower) & ((values < upper) | (upper == np.inf))
    return ~(values <= lower) & ((values <= upper) | (upper == np.inf))


def labels_of_classes(labels: Num[Array, "batch *spatial_and_classes"], like: Array) -> Num[Array, "*shape"]:
    """Labels of the shape of `like`. Ids become int32 0 or 1 by arithmetic: XLA would store a comparison."""
    if are_dense(labels, like):
        return labels.astype(jnp.float32)
    ids = labels.astype(jnp.int32)[..., None]
    classes = np.arange(like.shape[-1], dtype=np.int32).reshape((1,) * (like.ndim - 1) + (-1,))
    return jnp.maximum(1 - jnp.abs(ids - classes), 0)  # 0 even where this overflows
