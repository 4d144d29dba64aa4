"""The sums in bins on a CPU: scatters over pieces of an image, in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from calib_jax._bin_terms import Bins, Columns, Edges, Elements, Pair, Terms, counts_of
from calib_jax._compat import enable_x64

# An image is taken in pieces of so many probabilities at most, which stay in cache. A scatter takes one, and
# a step several scatters: one is one thread's work, several go on side by side.
_PIECE = 1 << 14
_SCATTERS = 8
_SCATTER_BITS = 26  # float64 holds the exact tally of so many bits of voxels
_APART = 16  # updates between two of one accumulator, so that no addition waits for the one before


def sums_in_pieces(
    terms: Terms,
    num_bins: int,
    probs: Float[Array, "batch voxels classes"],
    labels: Array,
    where: Array | None,
    edges: Edges,
) -> tuple[Pair, ...]:
    """A loop over pieces of images, small enough for what is made of them to stay in cache, several in a step.

    A piece is one long row of probabilities: arithmetic on a row is what XLA turns into vector instructions in
    front of a scatter. The last piece of an image overlaps the one before.

    Each of the several has accumulators of its own for every image, in float64, in which no sum drifts, as few as
    let neighbouring voxels go to different ones ("lanes").
    """
    batch, voxels, classes = probs.shape
    size, together, steps = _cut(voxels, classes)
    bits = _SCATTER_BITS if steps * size < 1 << _SCATTER_BITS else None
    lanes = min(-(-_APART // classes), max(1, _PIECE // (4 * num_bins * classes)))
    voxel, label = np.divmod(np.arange(size * classes), classes)
    lane = jnp.asarray(voxel % lanes * num_bins * classes + label, jnp.int32)
    ids = labels.ndim == 2

    def row(x: Array, image: Array, start: Array) -> Array:
        cut = lax.dynamic_slice(x, (image, start, np.int32(0)), (1, size, x.shape[2]))
        return jnp.broadcast_to(cut, (1, size, classes)).reshape(-1)

    def piece(image: Array, i: Array) -> list[tuple[Bins, Columns]]:
        start = jnp.minimum(i * size, voxels - size)
        keep = jnp.arange(size * classes, dtype=jnp.int32) >= (i * size - start) * classes
        elements = Elements(
            row(probs, image, start),
            row(labels[..., None] if ids else labels, image, start),
            jnp.asarray(label, jnp.int32) if ids else None,
            keep if where is None else keep & row(where, image, start),
        )
        return terms(elements, _of(image, edges), bits)

    def add(total: Columns, image: Array, i: Array) -> Columns:
        for bins, columns in piece(image, i):
            place = (image * lanes * num_bins + bins) * classes + lane
            total = _scatter_add(total, place, columns)
        return total

    def body(i: Array, totals: tuple[Columns, ...]) -> tuple[Columns, ...]:
        i = jnp.asarray(i, jnp.int32)  # int64 under x64
        image, step = i // steps, i % steps
        return tuple(add(total, image, step * together + k) for k, total in enumerate(totals))

    zero = jnp.zeros((), jnp.int32)
    _, columns = jax.eval_shape(piece, zero, zero)[0]
    total = _accumulators(columns, batch * lanes * num_bins * classes)
    totals = lax.fori_loop(0, batch * steps, body, (total,) * together)
    return _scattered(totals, bits, (batch, lanes, num_bins, classes))


def _cut(voxels: int, classes: int) -> tuple[int, int, int]:
    """Voxels of a piece, pieces in a step, and steps for an image of so many voxels: equal pieces, full steps.

    Pieces are of 16 voxels or a multiple, if the image is: XLA turns no odd number into vector instructions.
    """
    most = max(1, _PIECE // (16 * classes))
    blocks = -(-voxels // 16)
    together = min(_SCATTERS, -(-blocks // most))
    steps = -(-blocks // (most * together))
    return min(voxels, 16 * -(-blocks // (together * steps))), together, steps


def _of(image: Array, tree: Any) -> Any:
    """What belongs to an image."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, image, 0, keepdims=False), tree)


def _accumulators(columns: Any, size: int) -> Columns:
    """Zeros for the sums of two columns as one complex number, because a scatter-add on CPU is a loop over updates,
    and for those of a third.
    """

    def zeros(narrow: Any, wide: Any) -> Array:
        # Made wide, not made as wide zeros: a constant would be cut to 32 bits again by whoever transforms this.
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


def _scattered(
    totals: tuple[Columns, ...], bits: int | None, shape: tuple[int, int, int, int]
) -> tuple[Pair, ...]:
    """Counts or weights, sums of probabilities and of labels.

    Args:
        totals: accumulators, for each of several pieces at a time.
        bits: those of a tally.
        shape: how many of images, lanes, bins and classes.
    """

    def columns(total: Columns) -> Columns:
        both, *third = total
        prob_sum, count = lax.real(both), lax.imag(both)
        if bits is not None and not third:
            count, *third = counts_of(count, bits)
        return count, prob_sum, *third

    with enable_x64(True):
        sums = (functools.reduce(jnp.add, parts) for parts in zip(*map(columns, totals), strict=True))
        return tuple(_pair(x.reshape(shape).sum(1).swapaxes(1, 2)) for x in sums)


def _pair(wide: Array) -> Pair:
    """A float64 as two float32, rounded so that no compiler takes the rounding back."""
    with enable_x64(True):
        high = lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=23)
        rest = wide - high
        return lax.convert_element_type(high, jnp.float32), lax.convert_element_type(rest, jnp.float32)
