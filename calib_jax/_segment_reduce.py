"""How a sum per bin is computed on each platform.

`jax.ops.segment_sum` is the definition; anything else here is a faster and more exact equal of it. Every path
sums short blocks and adds their sums up together with what float32 rounds away, because a float32 counter
stops at 2^24 and a running sum of equal numbers drifts long before that.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

BinIndex = Callable[[Array], Array]
Place = Callable[[Array], tuple[Array, Array]]
Method = Literal["auto", "segment_sum", "scatter", "flat_scatter", "masked"]
Sums = tuple[
    Num[Array, "batch classes bins"], Float[Array, "batch classes bins"], Float[Array, "batch classes bins"]
]
Bins = Int[Array, "batch blocks voxels classes"]
Columns = tuple[Float[Array, "batch blocks voxels classes"], ...]
BlockSums = tuple[Num[Array, "batch blocks classes bins"], ...]
Adder = Callable[[Bins, Columns, int], BlockSums]
BlockSum = Callable[[Adder, Array, Array, Array | None], BlockSums]
Pair = tuple[Array, Array]  # a sum as float32, and what did not fit into it

_BLOCK = 1792  # voxels in a block
_RUN = 56  # numbers that one accumulator of a block takes in turn: equal ones drift by up to 9e-7
_TALLY = 4096  # above _BLOCK: a voxel counts 1, one of the class 4096 more, so one exact float32 holds both
_GROUP = 16  # blocks that the loop takes at a time, enough to share among threads ...
_SCATTERS = 8  # scatters that they are shared out to: one is one thread's work, several go on side by side
_ACCUMULATORS = 1 << 17  # ... unless so many bins, classes and images leave the cache (1 MiB at 8 bytes each)


def bin_sums(
    probs: Float[Array, "batch voxels classes"],
    labels: Num[Array, "batch voxels"] | Num[Array, "batch voxels classes"],
    where: Bool[Array, "batch voxels"] | Bool[Array, "batch voxels #classes"] | None,
    index: BinIndex,
    num_bins: int,
    *,
    method: Method = "auto",
) -> Sums:
    """Voxels counted, sum of `probs` and sum of `labels` in every bin of every image and class.

    Args:
        probs: probabilities; any float type, added up in float32.
        labels: class ids, or an array of the shape of `probs`.
        where: which elements count; None counts all.
        index: elementwise function from probabilities to bin indices in `[0, num_bins)`. On CPU it is called
            on a few blocks at a time, so that indices never exist for all voxels at once.
        num_bins: number of bins.
        method: forces one way to compute, for tests; `"auto"` takes the platform's fastest.

    Returns:
        `(count int32, prob_sum float32, label_sum float32)`, each `[batch, classes, num_bins]`. Counts are
        exact, sums within 1e-6 relative of float64. A NaN makes `prob_sum` NaN in the bin that it falls in.
    """
    return _sums(functools.partial(_hard_block_sums, index, num_bins), probs, labels, where, method)


def soft_bin_sums(
    probs: Float[Array, "batch voxels classes"],
    labels: Num[Array, "batch voxels"] | Num[Array, "batch voxels classes"],
    where: Bool[Array, "batch voxels"] | Bool[Array, "batch voxels #classes"] | None,
    place: Place,
    num_bins: int,
    *,
    method: Method = "auto",
) -> Sums:
    """The same when a voxel is shared by two neighbouring bins: sums of weights, and of values times weights.

    Args:
        probs, labels, where, num_bins, method: as for `bin_sums`.
        place: elementwise function from probabilities to the lower of the two bins, and the upper one's share.

    Returns:
        `(weight, prob_sum, label_sum)`, float32 `[batch, classes, bins]` each.
    """
    return _sums(functools.partial(_soft_block_sums, place, num_bins), probs, labels, where, method)


def table_lookup(
    table: Float[Array, "batch classes bins"], probs: Float[Array, "batch voxels classes"], index: BinIndex
) -> Float[Array, "batch voxels classes"]:
    """`table[b, c, index(probs[b, v, c])]`: the transpose of the sum over bins.

    On TPU, where a gather is serial, each element picks its entry out of the whole row instead. On CPU, writing
    the table out by a scatter is what keeps XLA from computing its entry anew for every element.
    """
    classes, num_bins = table.shape[1:]

    def by_gather(table: Array, probs: Array) -> Array:
        place = index(probs) + num_bins * lax.broadcasted_iota(jnp.int32, probs.shape, 2)
        table = jnp.zeros_like(table).at[..., jnp.arange(num_bins)].set(table, mode="promise_in_bounds")
        take = functools.partial(jnp.take, mode="clip")
        return jax.vmap(take)(table.reshape(-1, classes * num_bins), place)

    def by_select(table: Array, probs: Array) -> Array:
        return jnp.where(_one_hot(index(probs), num_bins), table[:, None], 0).sum(-1)

    return lax.platform_dependent(table, probs, tpu=by_select, default=by_gather)


# How voxels are taken in blocks, and the sums of blocks added up.


def _sums(block_sum: BlockSum, probs: Array, labels: Array, where: Array | None, method: Method) -> Sums:
    where = where[..., None] if where is not None and where.ndim == 2 else where

    def path(order: Callable[..., Sums], add: Adder) -> Callable[..., Sums]:
        return functools.partial(order, functools.partial(block_sum, add))

    paths = {
        "segment_sum": path(_a_few_at_a_time, _by_segment_sum),
        "scatter": path(_a_few_at_a_time, _by_scatters),
        "flat_scatter": path(_a_few_at_a_time, functools.partial(_by_scatters, flat=True)),
        "masked": path(_all_at_once, _by_masked_sum),
    }
    if method != "auto":
        return paths[method](probs, labels, where)
    on_cpu = paths["flat_scatter" if _on_one_device() else "scatter"]
    return lax.platform_dependent(probs, labels, where, cpu=on_cpu, default=paths["masked"])


def _on_one_device() -> bool:
    """Whether no axis of what is traced can be split over devices: there is one, or `shard_map` did it already."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names)
    return manual or (jax.default_backend() == "cpu" and jax.device_count() == 1)


def _a_few_at_a_time(
    block_sums: Callable[..., BlockSums], probs: Array, labels: Array, where: Array | None
) -> Sums:
    """A loop, so that what is made of a few blocks stays in cache. Its last step overlaps the one before."""
    size = probs.shape[1]
    block, taken = _step_size(block_sums, probs, labels)

    def part(i: int | Array) -> tuple[Any, ...]:
        start = jnp.minimum(i * taken, size - taken)
        cut = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=taken, axis=1)
        keep = None if where is None else cut(where)
        if size % taken:
            fresh = (start + jnp.arange(taken, dtype=jnp.int32) >= i * taken)[None, :, None]
            keep = fresh if keep is None else fresh & keep
        return _add_up(block_sums(*(_split(x, block) for x in (cut(probs), cut(labels), keep))))

    total = jax.tree.map(jnp.zeros_like, jax.eval_shape(part, 0))
    return _rounded(lax.fori_loop(0, -(-size // taken), lambda i, total: _merge(total, part(i)), total))


def _step_size(block_sums: Callable[..., BlockSums], probs: Array, labels: Array) -> tuple[int, int]:
    """Voxels in a block, and in the blocks that one step of the loop takes."""
    block = min(probs.shape[1], _BLOCK)
    one = jax.eval_shape(block_sums, *(_split(x[:, :block], block) for x in (probs, labels)), None)[0]
    fitting = _ACCUMULATORS // (one.size * _lanes(block))
    return block, block * max(1, min(_GROUP, fitting, probs.shape[1] // block))


def _all_at_once(
    block_sums: Callable[..., BlockSums], probs: Array, labels: Array, where: Array | None
) -> Sums:
    """All blocks side by side, for machines with threads enough. The last is filled up with what is not counted."""
    size = probs.shape[1]
    block = min(size, _BLOCK)
    if missing := -size % block:
        where = jnp.ones((1, size, 1), bool) if where is None else where
        probs, labels, where = (
            jnp.pad(x, [(0, missing if axis == 1 else 0) for axis in range(x.ndim)])
            for x in (probs, labels, where)
        )
    return _rounded(_add_up(block_sums(*(_split(x, block) for x in (probs, labels, where)))))


def _split(x: Array | None, block: int) -> Array | None:
    return None if x is None else x.reshape(x.shape[0], -1, block, *x.shape[2:])


def _add_up(sums: BlockSums) -> tuple[Any, ...]:
    """Sums over all blocks: of counts as integers, of anything else as pairs."""
    return tuple(x.sum(1) if jnp.issubdtype(x.dtype, jnp.integer) else _exact_sum(x, 1) for x in sums)


def _merge(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_two_sum(x, y) if isinstance(x, tuple) else x + y for x, y in zip(a, b, strict=True))


def _rounded(total: tuple[Any, ...]) -> Any:
    return tuple(x[0] + x[1] if isinstance(x, tuple) else x for x in total)


def _exact_sum(x: Array, axis: int) -> Pair:
    """Sum over an axis, in whatever order, with what its additions rounded away."""
    zero = jnp.float32(0)
    high, low = lax.reduce((x, jnp.zeros_like(x)), (zero, zero), _two_sum, (axis,))
    return high, low


def _two_sum(a: Pair, b: Pair) -> Pair:
    """Adds two pairs; what the first addition rounds away is kept (Knuth's TwoSum)."""
    total = a[0] + b[0]
    added = total - a[0]
    return total, a[1] + b[1] + ((a[0] - (total - added)) + (b[0] - added))


# Sums within blocks.


def _hard_block_sums(
    index: BinIndex, num_bins: int, add: Adder, probs: Array, labels: Array, where: Array | None
) -> BlockSums:
    """Count, probability sum and label sum of every block; float32 is exact for counts up to _BLOCK."""
    keep, probs = _kept(probs, where)
    bins = index(probs)
    if labels.ndim == probs.ndim:
        labels = jnp.where(keep, labels.astype(jnp.float32), 0)
        prob_sum, label_sum, count = add(bins, (probs, labels, keep.astype(jnp.float32)), num_bins)
        return count.astype(jnp.int32), prob_sum, label_sum
    hit = _one_hot(labels.astype(jnp.int32), probs.shape[-1])
    tally = jnp.where(keep, jnp.where(hit, jnp.float32(1 + _TALLY), 1), 0)
    prob_sum, tally = add(bins, (probs, tally), num_bins)
    label_sum = jnp.floor(tally / _TALLY)
    return (tally - label_sum * _TALLY).astype(jnp.int32), prob_sum, label_sum


def _soft_block_sums(
    place: Place, num_bins: int, add: Adder, probs: Array, labels: Array, where: Array | None
) -> BlockSums:
    """Weight, weighted probability and weighted label sums of every block, for either neighbour of a voxel."""
    keep, probs = _kept(probs, where)
    dense = labels if labels.ndim == probs.ndim else _one_hot(labels.astype(jnp.int32), probs.shape[-1])
    labels = jnp.where(keep, dense.astype(jnp.float32), 0)
    lower, share = place(probs)

    def neighbour(bins: Array, weight: Array) -> BlockSums:
        weight = jnp.where(keep, weight, 0)
        return add(bins, (weight * probs, weight * labels, weight), num_bins)

    upper = jnp.minimum(lower + 1, num_bins - 1)
    both = zip(neighbour(lower, 1 - share), neighbour(upper, share), strict=True)
    prob_sum, label_sum, weight = (a + b for a, b in both)
    return weight, prob_sum, label_sum


def _kept(probs: Array, where: Array | None) -> tuple[Array, Array]:
    """Which elements count, and their float32 probabilities, zero elsewhere."""
    keep = jnp.ones(probs.shape, bool) if where is None else jnp.broadcast_to(where, probs.shape)
    return keep, jnp.where(keep, probs.astype(jnp.float32), 0)


def _by_segment_sum(bins: Bins, columns: Columns, num_bins: int) -> BlockSums:
    """The definition."""
    add = functools.partial(jax.ops.segment_sum, num_segments=num_bins)
    for axis in (-1, 0, 0):
        add = jax.vmap(add, axis)
    return tuple(add(column, bins) for column in columns)


def _by_scatters(bins: Bins, columns: Columns, num_bins: int, *, flat: bool = False) -> BlockSums:
    """Several scatters over a few blocks each."""
    blocks = bins.shape[1]
    parts = min(blocks, _SCATTERS)
    ends = [blocks * i // parts for i in range(parts + 1)]
    sums = [
        _by_scatter(bins[:, a:b], tuple(column[:, a:b] for column in columns), num_bins, flat=flat)
        for a, b in itertools.pairwise(ends)
    ]
    return tuple(jnp.concatenate(part, axis=1) for part in zip(*sums, strict=True))


def _by_scatter(bins: Bins, columns: Columns, num_bins: int, *, flat: bool) -> BlockSums:
    """Two columns as one complex number, because a scatter-add on CPU is a loop over updates.

    Neighbours go to different accumulators ("lanes"), so that no addition waits for the one before. A batch axis
    in the scatter keeps a batch that is split over devices where it is, at the price of wider indices; `flat`
    makes one long row of all images, for when they are on one device anyway.
    """
    batch, blocks, size, classes = bins.shape
    shape = (batch, blocks, _lanes(size), classes, num_bins)
    flat = flat and math.prod(shape) < 2**31
    image, block, voxel, label = np.ogrid[: batch if flat else 1, :blocks, :size, :classes]
    # Whose accumulators begin at `first`.
    first = (((image * blocks + block) * shape[2] + voxel % shape[2]) * classes + label) * num_bins
    rows = 1 if flat else batch
    place = (bins + jnp.asarray(first, jnp.int32)).reshape(rows, -1)

    def one_row(i: Array, x: Array) -> Array:
        zeros = jnp.zeros(math.prod(shape) // rows, x.dtype)
        return zeros.at[i].add(x, mode="promise_in_bounds", wrap_negative_indices=False)

    def add(column: Array) -> Array:
        values = column.reshape(rows, -1)
        sums = one_row(place[0], values[0]) if rows == 1 else jax.vmap(one_row)(place, values)
        return _sum_pairwise(sums.reshape(shape))

    both = add(lax.complex(columns[0], columns[1]))
    return (both.real, both.imag, *(add(column) for column in columns[2:]))


def _lanes(size: int) -> int:
    """Accumulators that a bin needs for none to take more than _RUN of `size` numbers: a power of two."""
    return 1 << (-(-size // _RUN) - 1).bit_length()


def _sum_pairwise(x: Array) -> Array:
    """Sum over axis 2, a power of two long, by halves."""
    while x.shape[2] > 1:
        half = x.shape[2] // 2
        x = x[:, :, :half] + x[:, :, half:]
    return x[:, :, 0]


def _by_masked_sum(bins: Bins, columns: Columns, num_bins: int) -> BlockSums:
    """A comparison per element and bin, fused into the sum: no memory, and no two threads at one address.

    Thread and vector units may add in any order, so that each addition keeps its own rounding error.
    """
    chosen = _one_hot(bins, num_bins)
    pairs = (_exact_sum(jnp.where(chosen, column[..., None], 0), 2) for column in columns)
    return tuple(high + low for high, low in pairs)


def _one_hot(ids: Int[Array, "*shape"], size: int) -> Bool[Array, "*shape size"]:
    return ids[..., None] == lax.broadcasted_iota(ids.dtype, (*ids.shape, size), ids.ndim)
