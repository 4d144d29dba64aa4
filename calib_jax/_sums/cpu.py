"""Sums in bins on a CPU: scatter-adds in float64.

The index of a probability's bin is computed by arithmetic that vectorises. `bin_index` and the gradients on all
platforms use it too.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from calib_jax._compat import enable_x64
from calib_jax._devices import is_whole
from calib_jax._labels import are_dense
from calib_jax._sums.bins import Bins, equal_edges, gather, single_or_double

# An image is cut into pieces of at most so many probabilities, which stay in cache. A piece is scattered by one
# thread. A step of the loop scatters several pieces side by side.
_PIECE = 1 << 14
_SCATTERS = 8
_TALLY_BITS = 26  # a float64 tally holds counts of so many bits
_APART = 16  # updates between two of one accumulator, so that no addition waits for the one before

Columns = tuple[Float[Array, "*elements"], ...]
"""Probabilities, counts and labels; or probabilities and a tally, which holds counts and labels in one number."""


class Elements(NamedTuple):
    """Probabilities of one image, and arrays that broadcast to their shape."""

    probs: Float[Array, "*elements"]
    labels: Num[Array, "*elements"]
    classes: Int[Array, "*elements"] | None
    """The class of each probability if labels are class ids, None if labels are dense."""
    keep: Bool[Array, "*elements"]


def bin_sums(
    probs: Float[Array, "batch voxels classes"],
    labels: Num[Array, "batch voxels *classes"],
    where: Array | None,
    edges: Float[Array, "batch classes inner_edges"] | None,
    bins: Bins,
) -> tuple[Array, Array, Array]:
    """Counts or weights, sums of probabilities and sums of labels, `[batch, classes, bins]` each.

    If the batch may be split over devices, each image is summed by itself, so that images stay on their devices.
    """
    if is_whole():
        return sum_images(probs, labels, where, edges, bins)
    return jax.vmap(functools.partial(_sum_image, bins=bins))(probs, labels, where, edges)


def look_up(
    table: Float[Array, "batch classes bins"], index: Int[Array, "batch *spatial classes"]
) -> Float[Array, "batch *spatial classes"]:
    """`gather` from a table that a scatter has written out, or XLA on CPU computes an entry for every element."""
    written = jnp.zeros_like(table).at[..., jnp.arange(table.shape[-1], dtype=jnp.int32)]
    return gather(written.set(table, mode="promise_in_bounds"), index)


def _sum_image(
    probs: Float[Array, "voxels classes"], labels: Array, where: Array | None, edges: Array | None, bins: Bins
) -> Any:
    image = jax.tree.map(lambda x: x[None], (probs, labels, where, edges))
    return jax.tree.map(lambda x: x[0], sum_images(*image, bins=bins))


def sum_images(
    probs: Float[Array, "batch voxels classes"],
    labels: Num[Array, "batch voxels *classes"],
    where: Array | None,
    edges: Array | None,
    bins: Bins,
) -> Any:
    """`bin_sums` in one loop over pieces of images.

    A piece is one long row of probabilities: XLA turns arithmetic on a row into vector instructions in front of a
    scatter. The last piece of an image overlaps the one before. Each concurrent piece owns its accumulators. They
    are float64, so that no sum drifts. Neighbouring voxels go to different accumulators, called lanes.
    """
    batch, voxels, classes = probs.shape
    size, together, steps = _cut(voxels, classes)
    tally_bits = _TALLY_BITS if steps * size < 1 << _TALLY_BITS else None
    lanes = min(-(-_APART // classes), max(1, _PIECE // (4 * bins.num_bins * classes)))
    voxel, label = np.divmod(np.arange(size * classes), classes)
    lane = jnp.asarray(voxel % lanes * bins.num_bins * classes + label, jnp.int32)
    dense = are_dense(labels, probs)

    def row(x: Array, image: Array, start: Array) -> Array:
        cut = lax.dynamic_slice(x, (image, start, np.int32(0)), (1, size, x.shape[2]))
        return jnp.broadcast_to(cut, (1, size, classes)).reshape(-1)

    def piece(image: Array, i: Array) -> list[tuple[Array, Columns]]:
        start = jnp.minimum(i * size, voxels - size)
        keep = jnp.arange(size * classes, dtype=jnp.int32) >= (i * size - start) * classes
        elements = Elements(
            row(probs, image, start),
            row(labels if dense else labels[..., None], image, start),
            None if dense else jnp.asarray(label, jnp.int32),
            keep if where is None else keep & row(where, image, start),
        )
        image_edges = None if edges is None else lax.dynamic_index_in_dim(edges, image, 0, keepdims=False)
        return columns_in_bins(elements, image_edges, bins, tally_bits)

    def add(total: Columns, image: Array, i: Array) -> Columns:
        for index, columns in piece(image, i):
            place = (image * lanes * bins.num_bins + index) * classes + lane
            total = _scatter_add(total, place, columns)
        return total

    def body(i: Array, totals: tuple[Columns, ...]) -> tuple[Columns, ...]:
        i = jnp.asarray(i, jnp.int32)  # int64 under x64
        image, step = i // steps, i % steps
        return tuple(add(total, image, step * together + k) for k, total in enumerate(totals))

    zero = jnp.zeros((), jnp.int32)
    # Only types are used. `jax.eval_shape` loses what a `shard_map` along some mesh axes adds to them.
    _, columns = piece(zero, zero)[0]
    total = _accumulators(columns, batch * lanes * bins.num_bins * classes)
    totals = lax.fori_loop(0, batch * steps, body, (total,) * together)
    return _as_sums(totals, tally_bits, (batch, lanes, bins.num_bins, classes), bins.binning != "soft")


def _cut(voxels: int, classes: int) -> tuple[int, int, int]:
    """Voxels of a piece, pieces in a step, and steps for an image of so many voxels: equal pieces, full steps.

    A piece has a multiple of 16 voxels, unless the image is smaller: XLA vectorises no odd number.
    """
    most = max(1, _PIECE // (16 * classes))
    blocks = -(-voxels // 16)
    together = min(_SCATTERS, -(-blocks // most))
    steps = -(-blocks // (most * together))
    return min(voxels, 16 * -(-blocks // (together * steps))), together, steps


def _accumulators(columns: Any, size: int) -> Columns:
    """Zeros. The sums of two columns are one complex number, because XLA's CPU scatter is a loop over updates."""

    def zeros(narrow: Any, wide: Any) -> Array:
        # Widened zeros, not wide zeros: JAX would cut a wide constant to 32 bits again when it transforms this.
        made = jnp.zeros_like(columns[0], narrow, shape=size)
        with enable_x64(True):
            return lax.convert_element_type(made, wide)

    third = (zeros(jnp.float32, jnp.float64) for _ in columns[2:])
    return zeros(jnp.complex64, jnp.complex128), *third


def _scatter_add(total: Columns, place: Int[Array, "elements"], columns: Columns) -> Columns:
    with enable_x64(True):
        first, second, *third = (lax.convert_element_type(column, jnp.float64) for column in columns)
        return tuple(
            sums.at[place].add(column, mode="promise_in_bounds", wrap_negative_indices=False)
            for sums, column in zip(total, (lax.complex(first, second), *third), strict=True)
        )


def _as_sums(
    totals: tuple[Columns, ...], tally_bits: int | None, shape: tuple[int, int, int, int], counts: bool
) -> tuple[Array, Array, Array]:
    """`bin_sums` from accumulators, whose shape is (images, lanes, bins, classes)."""

    def columns(total: Columns) -> Columns:
        both, *third = total
        prob_sum, count = lax.real(both), lax.imag(both)
        if tally_bits is not None and not third:
            count, *third = split_tally(count, tally_bits)
        return count, prob_sum, *third

    with enable_x64(True):
        sums = (functools.reduce(jnp.add, parts) for parts in zip(*map(columns, totals), strict=True))
        count, *others = (x.reshape(shape).sum(1).swapaxes(1, 2) for x in sums)
        prob_sum, label_sum = (lax.convert_element_type(x, jnp.float32) for x in others)
        return lax.convert_element_type(count, jnp.int32 if counts else jnp.float32), prob_sum, label_sum


# The bin of each probability.


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


# What is summed in it.


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
