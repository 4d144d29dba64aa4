"""How a sum per bin is computed on each platform.

`jax.ops.segment_sum` is the definition; anything else here is a faster and more exact equal of it. Every path
but that of CPUs, which adds in float64, sums blocks and adds their sums up together with what float32 rounds away,
because a float32 counter stops at 2^24 and a running sum of equal numbers drifts long before that.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from calib_jax._bin_terms import (
    BinIndex,
    Bins,
    Columns,
    Edges,
    Elements,
    Pair,
    Place,
    Terms,
    counts_of,
    hard_terms,
    soft_terms,
)
from calib_jax._scatter import sums_in_pieces

Method = Literal["auto", "segment_sum", "scatter", "flat_scatter", "masked", "one_hot"]
Sums = tuple[
    Num[Array, "batch classes bins"], Float[Array, "batch classes bins"], Float[Array, "batch classes bins"]
]
Adder = Callable[[Bins, Columns], tuple[Pair, ...]]  # sums `[blocks, classes, bins]` of each column

_BLOCK = 1792  # voxels in a block: float32 holds the exact tally of so many, see `hard_terms`
_BLOCK_BITS = _BLOCK.bit_length()
_PRODUCTS = 32  # blocks that a matrix unit takes at a time


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
    terms = functools.partial(hard_terms, index)
    count, prob_sum, label_sum = _sums(terms, probs, labels, where, edges, num_bins, method)
    return _integer(count), _rounded(prob_sum), _rounded(label_sum)


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
    terms = functools.partial(soft_terms, place, num_bins)
    weight, prob_sum, label_sum = _sums(terms, probs, labels, where, None, num_bins, method)
    return _rounded(weight), _rounded(prob_sum), _rounded(label_sum)


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
        table = (
            jnp.zeros_like(table)
            .at[..., jnp.arange(num_bins, dtype=jnp.int32)]
            .set(table, mode="promise_in_bounds")
        )
        take = functools.partial(jnp.take, mode="clip")
        return jax.vmap(take)(table.reshape(-1, classes * num_bins), place)

    def by_select(table: Array, probs: Array) -> Array:
        return jnp.where(_one_hot(index(probs), num_bins), table[:, None], 0).sum(-1)

    return lax.platform_dependent(table, probs, tpu=by_select, default=by_gather)


# How voxels are taken in blocks, and the sums of blocks added up.


def _sums(
    terms: Terms,
    probs: Array,
    labels: Array,
    where: Array | None,
    edges: Edges,
    num_bins: int,
    method: Method,
) -> tuple[Pair, Pair, Pair]:
    """Counts or weights, sums of probabilities and of labels."""
    where = where[..., None] if where is not None and where.ndim == 2 else where

    def image_by_image(
        of_image: Callable[..., tuple[Pair, ...]], add: Callable[..., tuple[Pair, ...]]
    ) -> Callable[..., Any]:
        add = functools.partial(add, num_bins=num_bins)
        return jax.vmap(functools.partial(of_image, functools.partial(_block_sums, terms, add)))

    in_pieces = functools.partial(sums_in_pieces, terms, num_bins)
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


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)


def _all_at_once(
    block_sums: Callable[[Elements, Edges], tuple[Pair, ...]],
    probs: Float[Array, "voxels classes"],
    labels: Array,
    where: Array | None,
    edges: Edges,
) -> tuple[Pair, ...]:
    """All blocks of an image side by side, for machines with threads enough."""
    return _add_up(block_sums(_blocks(probs, labels, where), edges))


def _one_after_the_other(
    block_sums: Callable[[Elements, Edges], tuple[Pair, ...]],
    probs: Float[Array, "voxels classes"],
    labels: Array,
    where: Array | None,
    edges: Edges,
) -> tuple[Pair, ...]:
    """A loop over some blocks of an image, for what takes memory of their size times the bins."""
    count = -(-probs.shape[0] // _BLOCK)
    steps = -(-count // _PRODUCTS)
    together = -(-count // steps)
    blocks = _blocks(probs, labels, where, multiple=together)

    def part(i: Array) -> tuple[Pair, ...]:
        cut = functools.partial(lax.dynamic_slice_in_dim, start_index=i * together, slice_size=together)
        some = jax.tree.map(cut, blocks._replace(classes=None))
        return _add_up(block_sums(some._replace(classes=blocks.classes), edges))

    total = jax.tree.map(jnp.zeros_like, jax.eval_shape(part, jnp.zeros((), jnp.int32)))
    return lax.fori_loop(0, steps, lambda i, total: _merge(total, part(jnp.asarray(i, jnp.int32))), total)


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


def _add_up(sums: tuple[Pair, ...]) -> tuple[Pair, ...]:
    """Sums over all blocks."""
    return tuple(_exact_sum(x, 0) for x in sums)


def _merge(a: tuple[Pair, ...], b: tuple[Pair, ...]) -> tuple[Pair, ...]:
    return tuple(map(_two_sum, a, b))


def _rounded(exact: Pair) -> Array:
    return exact[0] + exact[1]


def _integer(exact: Pair) -> Array:
    return exact[0].astype(jnp.int32) + exact[1].astype(jnp.int32)


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


# How it is summed.


def _block_sums(terms: Terms, add: Adder, elements: Elements, edges: Edges) -> tuple[Pair, ...]:
    """Counts or weights, sums of probabilities and of labels in every block."""
    sums = [add(bins, columns) for bins, columns in terms(elements, edges, _BLOCK_BITS)]
    prob_sum, count, *label_sum = functools.reduce(_merge, sums)
    if label_sum:
        return count, prob_sum, *label_sum
    voxels, of_class = counts_of(_rounded(count), _BLOCK_BITS)
    return (voxels, jnp.zeros_like(voxels)), prob_sum, (of_class, jnp.zeros_like(of_class))


def _by_segment_sum(
    bins: Int[Array, "blocks voxels classes"], columns: Columns, num_bins: int
) -> tuple[Pair, ...]:
    """The definition."""
    add = functools.partial(jax.ops.segment_sum, num_segments=num_bins)
    for axis in (-1, 0):
        add = jax.vmap(add, axis)
    sums = (add(column, bins) for column in columns)
    return tuple((x, jnp.zeros_like(x)) for x in sums)


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
