"""What bins are: their options, edges and limits, and the share of a voxel that falls between two limits."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from calib_jax._checks import AnyArray
from calib_jax._devices import is_whole

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


# The transpose of a sum in bins.


def gather(
    table: Float[Array, "batch classes bins"], index: Int[Array, "batch *spatial classes"]
) -> Float[Array, "batch *spatial classes"]:
    """`table[b, c, index[b, ..., c]]`: each element looks up the entry of its own bin."""
    classes, num_bins = table.shape[1:]
    place = index + num_bins * lax.broadcasted_iota(jnp.int32, index.shape, index.ndim - 1)
    take = functools.partial(jnp.take, mode="clip")
    if is_whole():  # with an axis for images, XLA on a GPU stores two indices for each element
        image = lax.broadcasted_iota(jnp.int32, index.shape, 0)
        return take(table.ravel(), place + classes * num_bins * image)
    return jax.vmap(take)(table.reshape(-1, classes * num_bins), place)


# Images as rows of voxels.


def merge_space(x: Any, ndim: int) -> Any:
    """`[batch, *spatial, ...]` as `[batch, voxels, ...]`, given the number of axes of probabilities."""
    return None if x is None else x.reshape(x.shape[0], -1, *x.shape[ndim - 1 :])


def in_rows(
    probs: Float[Array, "batch voxels classes"], labels: Array, where: Array | None, row: int
) -> tuple[Array, Array, Array | None]:
    """Images as `[batch, rows, row, ...]`, filled up with voxels that do not count."""
    missing = -probs.shape[1] % row
    if missing and where is None:
        where = jnp.ones((1, probs.shape[1], 1), bool)

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2))) if missing else x
        return x.reshape(x.shape[0], x.shape[1] // row, row, *x.shape[2:])

    probs, labels, where = jax.tree.map(split, (probs, labels, where))
    return probs, labels, where
