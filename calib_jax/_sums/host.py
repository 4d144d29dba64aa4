"""Sums in bins of one large image in NumPy. Nothing is compiled, so every image may have a shape of its own.

Most voxels of a segmentation lie in the first or the last bin. Two comparisons find them, and only the others are
looked up.
"""

import numpy as np
from jaxtyping import Bool, Float

from calib_jax._sums.bins import Bins, equal_edges

CHUNK = 1 << 16  # voxels that are summed at a time, so that they stay in cache


def inner_edges(probs: Float[np.ndarray, "voxels"], bins: Bins) -> Float[np.ndarray, "inner_edges"]:
    """The edges between the bins: float32 edges of equal bins, or quantiles of `probs` for adaptive bins.

    Soft bins have no edges; the centres of the first and the last bin take their place.
    """
    if bins.binning == "soft":
        ends = np.array([0.5, bins.num_bins - 0.5]) / bins.num_bins
        return ends.astype(np.float32)
    if bins.binning == "hard":
        return equal_edges(bins.num_bins)[1:-1]
    counted = np.sort(probs[~np.isnan(probs)])
    return counted[quantile_ranks(counted.size, bins.num_bins)]


def quantile_ranks(size: int, num_bins: int) -> np.ndarray:
    """Ranks of the inner edges of adaptive bins among `size` sorted probabilities: ceil(k size / num_bins) - 1."""
    if not size:
        return np.zeros(0, np.int64)
    return np.maximum(-(-np.arange(1, num_bins) * size // num_bins) - 1, 0)


def sums_in_bins(
    probs: Float[np.ndarray, "voxels"],
    member: Bool[np.ndarray, "voxels"] | Float[np.ndarray, "voxels"],
    inner: Float[np.ndarray, "inner_edges"],
    bins: Bins,
) -> Float[np.ndarray, "3 bins"]:
    """Count, probability sum and label sum of each bin, in float64. Counts of hard and adaptive bins are exact.

    Args:
        probs: float32 probabilities of one class, a few at a time (`CHUNK`).
        member: whether each voxel belongs to the class, or its share.
        inner: return value of `inner_edges` for the whole image.
        bins: the bins. Hard bins are closed on the right, as by default in `calib_jax.bin_statistics`.
    """
    first, last = (inner[0], inner[-1]) if inner.size else (np.float32(np.inf),) * 2
    low, high = probs <= first, probs > last
    between = np.flatnonzero(~(low | high))  # NaN among them
    sums = np.zeros((3, bins.num_bins))
    for chosen, index in ((low, 0), (high, -1)):
        if number := np.count_nonzero(chosen):
            values = probs if number == chosen.size else probs[chosen]
            soft = member.dtype != bool
            members = member[chosen].sum(dtype=np.float64) if soft else np.count_nonzero(member & chosen)
            sums[:, index] += number, values.sum(dtype=np.float64), members
    if between.size:
        values, members = probs[between], member[between]
        for index, weight in _in_bins(values, inner, bins):
            columns = (weight, _times(weight, values), _times(weight, members))
            sums += [np.bincount(index, column, bins.num_bins) for column in columns]
    return sums


def _in_bins(
    values: np.ndarray, inner: np.ndarray, bins: Bins
) -> list[tuple[np.ndarray, Float[np.ndarray, "voxels"] | None]]:
    """Bin indices and weights of voxels: once for hard and adaptive bins, twice for soft bins. None weighs 1."""
    if bins.binning != "soft":
        return [(np.searchsorted(inner, values, side="left"), None)]
    end = bins.num_bins - 1
    position = np.clip(values * np.float32(bins.num_bins) - np.float32(0.5), 0, end)
    position = np.where(np.isnan(position), np.float32(end), position)
    lower = np.floor(position)
    share = (position - lower).astype(np.float64)
    index = lower.astype(np.intp)
    return [(index, 1 - share), (np.minimum(index + 1, end), share)]


def _times(weight: np.ndarray | None, values: np.ndarray) -> np.ndarray:
    return values if weight is None else weight * values
