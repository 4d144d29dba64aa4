"""What is summed in bins: the bin of each probability, and the columns that are added up in it.

All functions are elementwise, so that each platform calls them on as many voxels at a time as it can hold.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from calib_jax._checks import AnyArray
from calib_jax._compat import enable_x64
from calib_jax._labels import are_dense

Closed = Literal["right", "left"]
Binning = Literal["hard", "soft", "adaptive"]
Columns = tuple[Float[Array, "*elements"], ...]
"""Probabilities, counts and labels; or probabilities and a tally, which holds counts and labels in one number."""


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


class Elements(NamedTuple):
    """Probabilities of one image, and arrays that broadcast to their shape."""

    probs: Float[Array, "*elements"]
    labels: Num[Array, "*elements"]
    classes: Int[Array, "*elements"] | None
    """The class of each probability if labels are class ids, None if labels are dense."""
    keep: Bool[Array, "*elements"]


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


def hard_index(
    probs: Float[Array, "*elements"], edges: Float[Array, "classes inner_edges"] | None, bins: Bins
) -> Int[Array, "*elements"]:
    """Bin indices of one image's probabilities, voxel-major. Bins have equal width unless `edges` is given."""
    probs = single_or_double(probs)
    if edges is None:
        return _equal_index(probs, bins)
    # A row of a piece holds several voxels and classes.
    voxels = probs.shape[:-1] if probs.ndim > 1 else (-1,)
    values = probs.reshape(*voxels, edges.shape[0], 1)
    edges = edges.reshape((1,) * (values.ndim - 2) + edges.shape)
    index = jnp.where(jnp.isnan(values), True, values > edges).sum(-1, dtype=jnp.int32)
    return index.reshape(probs.shape)


def _equal_index(probs: Array, bins: Bins) -> Array:
    last = bins.num_bins - 1
    # The right bin or the one below it, so that comparing with one edge puts it right. NaN: the last bin.
    guess = jnp.floor(probs.astype(jnp.float32) * np.float32(bins.num_bins * (1 - 2.0**-20)))
    guess = jnp.maximum(jnp.where(guess < last, guess, last), 0)
    edge = _upper_edge(guess, bins.num_bins).astype(probs.dtype)
    beyond = probs > edge if bins.closed == "right" else probs >= edge
    return jnp.minimum(jnp.where(beyond, guess + 1, guess), last).astype(jnp.int32)


def _upper_edge(index: Float[Array, "*elements"], num_bins: int) -> Float[Array, "*elements"]:
    """Edge above each bin, with the bits of `equal_edges`. Unlike a look-up, this arithmetic vectorises.

    Splitting the step in two makes both products and the first difference exact (up to 4,096 bins). One rounding is
    left, as in `equal_edges`.
    """
    if num_bins > 4096:
        return jnp.asarray(equal_edges(num_bins))[index.astype(jnp.int32) + 1]
    end = np.float32(1) + np.finfo(np.float32).eps
    step = end / np.float32(num_bins)
    coarse = np.rint(step * np.float32(2**24)) / np.float32(2**24)
    above, below = index + 1, num_bins - 1 - index
    down = (end - coarse * below) - (step - coarse) * below
    return jnp.where(above < (num_bins + 1) // 2, step * above, down)


def soft_neighbours(
    probs: Float[Array, "*elements"], num_bins: int
) -> tuple[Int[Array, "*elements"], Float[Array, "*elements"]]:
    """The lower of the two bins that share each probability, and the share of the upper bin. NaN: the last bin."""
    position = jnp.clip(probs.astype(jnp.float32) * num_bins - 0.5, 0, num_bins - 1)
    position = jnp.where(jnp.isnan(position), num_bins - 1, position)
    lower = jnp.floor(position)
    return lower.astype(jnp.int32), position - lower


# Bins as intervals, for platforms on which a comparison per bin is cheaper than an address.


def bin_limits(edges: Array | None, bins: Bins, dtype: Any) -> tuple[AnyArray, AnyArray]:
    """Lower and upper limits of all bins for `share_of_bin`: `[bins]`, with `edges` `[batch, classes, bins]`."""
    if bins.binning == "soft":
        centres = np.arange(bins.num_bins, dtype=np.float32)
        return centres - 1, centres + 1
    if edges is None:
        inner = equal_edges(bins.num_bins)[1:-1].astype(dtype)
        return np.insert(inner, 0, np.nan), np.append(inner, np.inf)
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


# Columns.


def columns_in_bins(
    elements: Elements, edges: Array | None, bins: Bins, tally_bits: int | None
) -> list[tuple[Int[Array, "*elements"], Columns]]:
    """Bin indices and columns: once for hard and adaptive bins, twice for soft bins, one for each neighbour.

    Args:
        elements: probabilities of one image.
        edges: inner edges of the image's adaptive bins, else None.
        bins: the bins.
        tally_bits: bits of the largest count that a tally must hold; None forbids tallies. Class ids in hard or
            adaptive bins are summed as tallies: each voxel adds 1, each voxel of the class 2^tally_bits more.
    """
    keep = jnp.broadcast_to(elements.keep, elements.probs.shape)
    probs = jnp.where(keep, single_or_double(elements.probs), 0)
    is_class = None if elements.classes is None else elements.labels.astype(jnp.int32) == elements.classes
    if bins.binning == "soft":
        labels = jnp.where(keep, (elements.labels if is_class is None else is_class).astype(jnp.float32), 0)
        lower, share = soft_neighbours(probs, bins.num_bins)
        upper = jnp.minimum(lower + 1, bins.num_bins - 1)
        probs = probs.astype(jnp.float32)
        weights = [(lower, jnp.where(keep, 1 - share, 0)), (upper, jnp.where(keep, share, 0))]
        return [(index, (weight * probs, weight, weight * labels)) for index, weight in weights]
    index, probs = hard_index(probs, edges, bins), probs.astype(jnp.float32)
    if is_class is not None and tally_bits is not None:
        with enable_x64(True):
            kind = np.float32 if 2 * tally_bits <= 24 else np.float64
            tally = jnp.where(keep, jnp.where(is_class, kind(1 + (1 << tally_bits)), kind(1)), kind(0))
        return [(index, (probs, tally))]
    labels = jnp.where(keep, (elements.labels if is_class is None else is_class).astype(jnp.float32), 0)
    return [(index, (probs, keep.astype(jnp.float32), labels))]


def split_tally(tally: Array, tally_bits: int) -> tuple[Array, Array]:
    """Number of voxels, and number of voxels of the class."""
    of_class = jnp.floor(tally * 2.0**-tally_bits)
    return tally - of_class * 2.0**tally_bits, of_class
