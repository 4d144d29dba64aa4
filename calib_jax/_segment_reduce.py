"""How a sum per bin is computed on each platform.

`jax.ops.segment_sum` is the definition; anything else here is a faster and more exact equal of it. Every path
sums blocks and adds their sums up together with what float32 rounds away, because a float32 counter stops at 2^24
and a running sum of equal numbers drifts long before that.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

Edges = Any  # what of `index` differs from image to image: a tree of arrays, batch first, or None
BinIndex = Callable[[Array, Edges], Array]
Place = Callable[[Array], tuple[Array, Array]]
Method = Literal["auto", "segment_sum", "scatter", "flat_scatter", "masked", "one_hot"]
Sums = tuple[
    Num[Array, "batch classes bins"], Float[Array, "batch classes bins"], Float[Array, "batch classes bins"]
]
Bins = Int[Array, "*elements"]
Columns = tuple[Float[Array, "*elements"], ...]
Pair = tuple[Array, Array]  # a sum as float32, and what did not fit into it
Adder = Callable[[Bins, Columns], tuple[Pair, ...]]  # sums `[blocks, classes, bins]` of each column
BlockSums = tuple[Any, ...]  # the same, or integers where they count

_BLOCK = 1792  # voxels in a block: float32 holds the exact tally of so many, see `_hard_block_sums`
_PRODUCTS = 32  # blocks that a matrix unit takes at a time
# On CPU a block is a piece of an image, of so many probabilities at most, which stay in cache. A scatter takes one,
# and a step several scatters: one is one thread's work, several go on side by side.
_PIECE = 1 << 14
_SCATTERS = 8
_APART = 16  # updates between two of one accumulator, so that no addition waits for the one before


class Elements(NamedTuple):
    """Some probabilities of an image, and what goes with them, of shapes that broadcast to theirs."""

    probs: Float[Array, "*elements"]
    labels: Num[Array, "*elements"]
    classes: Int[Array, "*elements"] | None
    """The class that a probability is of, where labels are class ids."""
    keep: Bool[Array, "*elements"]


BlockSum = Callable[[Adder, Elements, Edges], BlockSums]


def bin_sums(
    probs: Float[Array, "batch voxels classes"],
    labels: Num[Array, "batch voxels"] | Num[Array, "batch voxels classes"],
    where: Bool[Array, "batch voxels"] | Bool[Array, "batch voxels #classes"] | None,
    index: BinIndex,
    num_bins: int,
    *,
    edges: Edges = None,
    method: Method = "auto",
) -> Sums:
    """Voxels counted, sum of `probs` and sum of `labels` in every bin of every image and class.

    Args:
        probs: probabilities; any float type, added up in float32.
        labels: class ids, or an array of the shape of `probs`.
        where: which elements count; None counts all.
        index: function from some probabilities of an image, in any shape but voxel by voxel, and the image's
            `edges`, to bin indices in `[0, num_bins)` of the same shape. On CPU it is called on a few blocks at a
            time, so that indices never exist for all voxels at once.
        num_bins: number of bins.
        edges: what of `index` differs from image to image, batch first.
        method: forces one way to compute, for tests; `"auto"` takes the platform's fastest.

    Returns:
        `(count int32, prob_sum float32, label_sum float32)`, each `[batch, classes, num_bins]`. Counts are
        exact, sums within 1e-6 relative of float64. A NaN makes `prob_sum` NaN in the bin that it falls in.
    """
    block_sum = functools.partial(_hard_block_sums, index)
    count, prob_sum, label_sum = _sums(block_sum, probs, labels, where, edges, num_bins, method)
    return count, prob_sum, label_sum.astype(jnp.float32)


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
    block_sum = functools.partial(_soft_block_sums, place, num_bins)
    return _sums(block_sum, probs, labels, where, None, num_bins, method)


def table_lookup(
    table: Float[Array, "batch classes bins"],
    probs: Float[Array, "batch voxels classes"],
    index: Callable[[Array], Array],
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


def _sums(
    block_sum: BlockSum,
    probs: Array,
    labels: Array,
    where: Array | None,
    edges: Edges,
    num_bins: int,
    method: Method,
) -> Sums:
    where = where[..., None] if where is not None and where.ndim == 2 else where

    def image_by_image(
        of_image: Callable[..., Sums], add: Callable[..., tuple[Pair, ...]]
    ) -> Callable[..., Sums]:
        add = functools.partial(add, num_bins=num_bins)
        return jax.vmap(functools.partial(of_image, functools.partial(block_sum, add)))

    in_pieces = functools.partial(_in_pieces, block_sum, num_bins)
    paths = {
        "segment_sum": image_by_image(_all_at_once, _by_segment_sum),
        "scatter": jax.vmap(lambda *image: _first(in_pieces(*jax.tree.map(lambda x: x[None], image)))),
        "flat_scatter": in_pieces,
        "masked": image_by_image(_all_at_once, _by_masked_sum),
        "one_hot": image_by_image(_one_after_the_other, _by_product),
    }
    arguments = probs, labels, where, edges
    if method != "auto":
        return paths[method](*arguments)
    # GPUs stay on XLA: a Pallas kernel would have to be shown to be faster than the masked sum on one.
    on_cpu = paths["flat_scatter" if _on_one_device() else "scatter"]
    return lax.platform_dependent(*arguments, cpu=on_cpu, tpu=paths["one_hot"], default=paths["masked"])


def _on_one_device() -> bool:
    """Whether no axis of what is traced can be split over devices: there is one, or `shard_map` did it already."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names)
    return manual or (jax.default_backend() == "cpu" and jax.device_count() == 1)


def _in_pieces(
    block_sum: BlockSum,
    num_bins: int,
    probs: Float[Array, "batch voxels classes"],
    labels: Array,
    where: Array | None,
    edges: Edges,
) -> Sums:
    """A loop over pieces of images, small enough for what is made of them to stay in cache, several in a step.

    A piece is one long row of probabilities: arithmetic on a row is what XLA turns into vector instructions in
    front of a scatter. The last piece of an image overlaps the one before.
    """
    batch, voxels, classes = probs.shape
    size, together, steps = _cut(voxels, classes)
    add = functools.partial(_by_scatter, num_bins=num_bins, classes=classes)

    def row(x: Array, image: Array, start: Array) -> Array:
        cut = lax.dynamic_slice(x, (image, start, 0), (1, size, x.shape[2]))
        return jnp.broadcast_to(cut, (1, size, classes)).reshape(-1)

    def piece(image: Array, i: Array) -> BlockSums:
        start = jnp.minimum(i * size, voxels - size)
        keep = jnp.arange(size * classes, dtype=jnp.int32) >= (i * size - start) * classes
        keep = keep if where is None else keep & row(where, image, start)
        ids = labels.ndim == 2
        elements = Elements(
            row(probs, image, start),
            row(labels[..., None] if ids else labels, image, start),
            jnp.asarray(np.arange(size * classes) % classes, jnp.int32) if ids else None,
            keep,
        )
        return block_sum(add, elements, _of(image, edges))

    def part(image: Array, step: Array) -> BlockSums:
        sums = [piece(image, step * together + k) for k in range(together)]
        return _add_up(jax.tree.map(lambda *pieces: jnp.concatenate(pieces), *sums))

    def body(i: Array, total: Any) -> Any:
        image, step = i // steps, i % steps
        merged = _merge(_of(image, total), part(image, step))
        put = functools.partial(lax.dynamic_update_index_in_dim, index=image, axis=0)
        return jax.tree.map(lambda x, update: put(x, update), total, merged)

    zero = jnp.zeros((), jnp.int32)
    of_image = jax.eval_shape(part, zero, zero)
    total = jax.tree.map(lambda x: jnp.zeros_like(x, shape=(batch, *x.shape)), of_image)
    return _rounded(lax.fori_loop(0, batch * steps, body, total))


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


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)


def _all_at_once(
    block_sum: Callable[[Elements, Edges], BlockSums],
    probs: Float[Array, "voxels classes"],
    labels: Array,
    where: Array | None,
    edges: Edges,
) -> Sums:
    """All blocks of an image side by side, for machines with threads enough."""
    return _rounded(_add_up(block_sum(_blocks(probs, labels, where), edges)))


def _one_after_the_other(
    block_sum: Callable[[Elements, Edges], BlockSums],
    probs: Float[Array, "voxels classes"],
    labels: Array,
    where: Array | None,
    edges: Edges,
) -> Sums:
    """A loop over some blocks of an image, for what takes memory of their size times the bins."""
    count = -(-probs.shape[0] // _BLOCK)
    steps = -(-count // _PRODUCTS)
    together = -(-count // steps)
    blocks = _blocks(probs, labels, where, multiple=together)

    def part(i: Array) -> BlockSums:
        cut = functools.partial(lax.dynamic_slice_in_dim, start_index=i * together, slice_size=together)
        some = jax.tree.map(cut, blocks._replace(classes=None))
        return _add_up(block_sum(some._replace(classes=blocks.classes), edges))

    total = jax.tree.map(jnp.zeros_like, jax.eval_shape(part, jnp.zeros((), jnp.int32)))
    return _rounded(lax.fori_loop(0, steps, lambda i, total: _merge(total, part(i)), total))


def _blocks(
    probs: Float[Array, "voxels classes"], labels: Array, where: Array | None, multiple: int = 1
) -> Elements:
    """An image as `[blocks, voxels, classes]`, a `multiple` of blocks, filled up with what is not counted."""
    voxels, classes = probs.shape
    block = min(voxels, _BLOCK)
    where = jnp.ones((voxels, 1), bool) if where is None else where
    ids = labels.ndim == 1

    def split(x: Array) -> Array:
        filled = jnp.pad(x, ((0, -voxels % (block * multiple)), (0, 0)))
        return filled.reshape(-1, block, x.shape[1])

    probs, labels, where = (split(x) for x in (probs, labels[:, None] if ids else labels, where))
    return Elements(
        probs, labels, lax.broadcasted_iota(jnp.int32, (1, 1, classes), 2) if ids else None, where
    )


def _add_up(sums: BlockSums) -> BlockSums:
    """Sums over all blocks."""
    return tuple(_exact_sum(x, 0) if isinstance(x, tuple) else x.sum(0) for x in sums)


def _merge(a: BlockSums, b: BlockSums) -> BlockSums:
    return tuple(_two_sum(x, y) if isinstance(x, tuple) else x + y for x, y in zip(a, b, strict=True))


def _rounded(total: BlockSums) -> Any:
    return tuple(x[0] + x[1] if isinstance(x, tuple) else x for x in total)


def _exact_sum(x: Pair, axis: int) -> Pair:
    """Sum over an axis, in whatever order, with what its additions rounded away."""
    zero = jnp.float32(0)
    high, low = lax.reduce(x, (zero, zero), _two_sum, (axis,))
    return high, low


def _two_sum(a: Pair, b: Pair) -> Pair:
    """Adds two pairs; what the first addition rounds away is kept (Knuth's TwoSum)."""
    total = a[0] + b[0]
    added = total - a[0]
    return total, a[1] + b[1] + ((a[0] - (total - added)) + (b[0] - added))


# Sums within blocks.


def _hard_block_sums(index: BinIndex, add: Adder, elements: Elements, edges: Edges) -> BlockSums:
    """Count, probability sum and label sum of every block.

    Where labels are class ids, one sum holds two counts, its tally: a voxel adds 1 to it, and one of the class
    a power of two above the block's voxels as well.
    """
    keep, probs = _kept(elements)
    bins = index(probs, edges)
    if elements.classes is None:
        labels = jnp.where(keep, elements.labels.astype(jnp.float32), 0)
        prob_sum, label_sum, count = add(bins, (probs, labels, keep.astype(jnp.float32)))
        return _integer(count), prob_sum, label_sum
    bits = _voxels(elements).bit_length()
    tally = jnp.where(keep, jnp.where(_is_of_class(elements), jnp.float32(1 + (1 << bits)), 1), 0)
    prob_sum, tally = add(bins, (probs, tally))
    tally = _integer(tally)
    return tally & ((1 << bits) - 1), prob_sum, tally >> bits


def _voxels(elements: Elements) -> int:
    """Those in a block, at most."""
    return elements.probs.shape[1 if elements.probs.ndim == 3 else 0]


def _integer(exact: Pair) -> Array:
    return exact[0].astype(jnp.int32) + exact[1].astype(jnp.int32)


def _soft_block_sums(place: Place, num_bins: int, add: Adder, elements: Elements, edges: Edges) -> BlockSums:
    """Weight, weighted probability and weighted label sums of every block, for either neighbour of a voxel."""
    del edges  # centres are the same everywhere
    keep, probs = _kept(elements)
    labels = elements.labels if elements.classes is None else _is_of_class(elements)
    labels = jnp.where(keep, labels.astype(jnp.float32), 0)
    lower, share = place(probs)

    def neighbour(bins: Array, weight: Array) -> tuple[Pair, ...]:
        weight = jnp.where(keep, weight, 0)
        return add(bins, (weight * probs, weight * labels, weight))

    upper = jnp.minimum(lower + 1, num_bins - 1)
    prob_sum, label_sum, weight = _merge(neighbour(lower, 1 - share), neighbour(upper, share))
    return weight, prob_sum, label_sum


def _is_of_class(elements: Elements) -> Array:
    return elements.labels.astype(jnp.int32) == elements.classes


def _kept(elements: Elements) -> tuple[Array, Array]:
    """Which elements count, and their float32 probabilities, zero elsewhere."""
    keep = jnp.broadcast_to(elements.keep, elements.probs.shape)
    return keep, jnp.where(keep, elements.probs.astype(jnp.float32), 0)


def _by_segment_sum(
    bins: Int[Array, "blocks voxels classes"], columns: Columns, num_bins: int
) -> tuple[Pair, ...]:
    """The definition."""
    add = functools.partial(jax.ops.segment_sum, num_segments=num_bins)
    for axis in (-1, 0):
        add = jax.vmap(add, axis)
    sums = (add(column, bins) for column in columns)
    return tuple((x, jnp.zeros_like(x)) for x in sums)


def _by_scatter(
    bins: Int[Array, "elements"], columns: Columns, num_bins: int, classes: int
) -> tuple[Pair, ...]:
    """Two columns as one complex number, because a scatter-add on CPU is a loop over updates.

    It adds in float64, in which no sum of a block drifts, in as few accumulators as let neighbouring voxels go to
    different ones ("lanes").
    """
    lanes = min(-(-_APART // classes), max(1, _PIECE // (4 * num_bins * classes)))
    voxel, label = np.divmod(np.arange(bins.size), classes)
    place = bins * classes + jnp.asarray(voxel % lanes * num_bins * classes + label, jnp.int32)

    def add(column: Array) -> Array:
        wide = jnp.complex128 if jnp.iscomplexobj(column) else jnp.float64
        # Made wide, not made as wide zeros: a constant would be cut to 32 bits again by whoever transforms this.
        zeros = jnp.zeros(lanes * num_bins * classes, column.dtype)
        with jax.enable_x64(True):
            sums = lax.convert_element_type(zeros, wide)
            column = lax.convert_element_type(column, wide)
            sums = sums.at[place].add(column, mode="promise_in_bounds", wrap_negative_indices=False)
            return sums.reshape(1, lanes, num_bins, classes).sum(1).swapaxes(1, 2)

    both = add(lax.complex(columns[0], columns[1]))
    return tuple(map(_pair, (lax.real(both), lax.imag(both), *map(add, columns[2:]))))


def _pair(wide: Array) -> Pair:
    """A float64 as two float32, rounded so that no compiler takes the rounding back."""
    with jax.enable_x64(True):
        high = lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=23)
        rest = wide - high
        return lax.convert_element_type(high, jnp.float32), lax.convert_element_type(rest, jnp.float32)


def _by_masked_sum(
    bins: Int[Array, "blocks voxels classes"], columns: Columns, num_bins: int
) -> tuple[Pair, ...]:
    """A comparison per element and bin, fused into the sum: no memory, and no two threads at one address.

    Thread and vector units may add in any order, so that each addition keeps its own rounding error.
    """
    chosen = _one_hot(bins, num_bins)
    terms = (jnp.where(chosen, column[..., None], 0) for column in columns)
    return tuple(_exact_sum((x, jnp.zeros_like(x)), 1) for x in terms)


def _by_product(
    bins: Int[Array, "blocks voxels classes"], columns: Columns, num_bins: int
) -> tuple[Pair, ...]:
    """A product of one-hot bins with the columns, for a matrix unit.

    It multiplies bfloat16 and adds up in float32. Cut into three numbers of 8 bits each, a float32 loses nothing
    to the one, nor, in a sum as short as a block, to the other.
    """
    parts = jnp.stack([part for column in columns for part in _cut_in_three(column)], axis=-1)
    sums = jnp.einsum(
        "bvcm,bvck->bckm",
        _one_hot(bins, num_bins).astype(jnp.bfloat16),
        parts,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    high, middle, low = (sums[:, :, i::3] for i in range(3))
    return tuple((high[:, :, k], (middle + low)[:, :, k]) for k in range(len(columns)))


def _cut_in_three(x: Array) -> list[Array]:
    """Three bfloat16 numbers that add up to a float32, rounded so that no compiler takes the rounding back."""
    parts = []
    for _ in range(3):
        part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


def _one_hot(ids: Int[Array, "*shape"], size: int) -> Bool[Array, "*shape size"]:
    return ids[..., None] == lax.broadcasted_iota(ids.dtype, (*ids.shape, size), ids.ndim)
