"""Sums in bins on a CPU: scatter-adds in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Num

from calib_jax._compat import enable_x64
from calib_jax._labels import are_dense
from calib_jax._sums.bins import Bins, Columns, Elements, columns_in_bins, split_tally

# An image is cut into pieces of at most so many probabilities, which stay in cache. A piece is scattered by one
# thread. A step of the loop scatters several pieces side by side.
_PIECE = 1 << 14
_SCATTERS = 8
_TALLY_BITS = 26  # a float64 tally holds counts of so many bits
_APART = 16  # updates between two of one accumulator, so that no addition waits for the one before


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
    if _on_one_device():
        return sum_images(probs, labels, where, edges, bins)
    return jax.vmap(functools.partial(_sum_image, bins=bins))(probs, labels, where, edges)


def look_up(
    table: Float[Array, "batch classes bins"], index: Int[Array, "batch *spatial classes"]
) -> Float[Array, "batch *spatial classes"]:
    """`table[b, c, index[b, v, c]]`, the transpose of the sum in bins, by a gather.

    Writing the table out by a scatter keeps XLA on CPU from computing an entry anew for every element.
    """
    classes, num_bins = table.shape[1:]
    place = index + num_bins * lax.broadcasted_iota(jnp.int32, index.shape, index.ndim - 1)
    written = jnp.zeros_like(table).at[..., jnp.arange(num_bins, dtype=jnp.int32)]
    table = written.set(table, mode="promise_in_bounds")
    take = functools.partial(jnp.take, mode="clip")
    return jax.vmap(take)(table.reshape(-1, classes * num_bins), place)


def _on_one_device() -> bool:
    """Whether no traced axis can be split over devices: there is one device, or `shard_map` split it already."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names)
    return manual or (jax.default_backend() == "cpu" and jax.device_count() == 1)


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
    _, columns = jax.eval_shape(piece, zero, zero)[0]
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
