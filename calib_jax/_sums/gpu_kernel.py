"""Sums in bins on an NVIDIA GPU: a kernel that keeps them in registers, written in Pallas for Triton.

A program is one warp, so that it waits for no other. It walks over its part of an image. Each of its lanes belongs
to one class and has an accumulator for each bin and sum. It compares the number of a voxel's bin with each pair of
bins, an even one and the next, and adds to both: the value to one, zero to the other. Every few voxels it moves the
sums of floats to pairs of floats, which keep what float32 rounds away. At the end it adds up the lanes of a class
and writes one number for each sum, bin and class.

On an H200 it takes a tenth of the time of the masked sums in `gpu`. JAX 0.12 announces that a later version will be
without Pallas for Triton. There the masked sums take over.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Num

from calib_jax._compat import enable_x64, shape_from
from calib_jax._devices import is_whole, platform
from calib_jax._labels import are_dense
from calib_jax._sums import cpu
from calib_jax._sums.bins import Bins, equal_edges
from calib_jax._sums.exact import Pair, as_pair, rounded

_LANES = 32  # of a warp
_TOGETHER = 8  # voxels of a lane in the body of the innermost loop
_ROUND = 40  # voxels of a lane between two moves of its sums; their rounding stays below 1e-6
_FIELD = 6  # bits of a count in a tally, a float: voxels of an even and an odd bin, then those of the class
_ACCUMULATORS = 90  # of a lane; registers do not suffice for more
_PROGRAMS = 4096  # of all images: two for each warp that an H100 runs at a time with so many registers
_LEAST = 40  # voxels of a program for each bin, so that it writes little beside what it reads
_MOST_BINS = 160  # each group of bins reads the image again


def fits(probs: Float[Array, "batch voxels classes"], bins: Bins) -> bool:
    """Whether the program that is being traced can and should sum these with the kernel.

    The compiler cannot split a kernel over devices: the program must be for one, or for the part of one.
    """
    return (
        platform() == "gpu"
        and _has_triton()
        and is_whole()
        and bins.binning != "adaptive"
        and bins.num_bins <= _MOST_BINS
        and probs.dtype != jnp.float64
        and 0 < probs.size < 2**31
    )


def _has_triton() -> bool:
    try:
        from jax.experimental.pallas import triton
    except ImportError:
        return False
    return hasattr(triton, "CompilerParams")


class _Plan(NamedTuple):
    """How programs divide the work."""

    bins_at_once: int
    """An even number."""
    groups: int
    """Of bins."""
    tile: int
    """Voxels at once."""
    width: int
    """Classes at once, a power of two."""
    rounds: int
    """Of `_ROUND` tiles."""
    grid: tuple[int, int, int, int]
    """Groups of bins, parts of an image, groups of classes, images."""


def _plan(shape: tuple[int, ...], bins: Bins, floats: int) -> _Plan:
    batch, voxels, classes = shape
    accumulators = 3 * floats + (0 if bins.binning == "soft" else 1.5)  # of a bin
    groups = math.ceil(bins.num_bins * accumulators / _ACCUMULATORS)
    width = min(_LANES, 1 << (classes - 1).bit_length())
    tile = _LANES // width
    wanted = max(_ceil(batch * voxels, _PROGRAMS), _LEAST * bins.num_bins)
    most = min(4**_FIELD - 1, (2**16 - 1) // tile) // _ROUND  # so that counts of a lane and of a class fit
    rounds = min(most, _ceil(min(wanted, voxels), _ROUND * tile))
    parts = _ceil(voxels, rounds * _ROUND * tile)
    return _Plan(
        2 * _ceil(bins.num_bins, 2 * groups),
        groups,
        tile,
        width,
        rounds,
        (groups, parts, _ceil(classes, width), batch),
    )


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def bin_sums(
    probs: Float[Array, "batch voxels classes"],
    labels: Num[Array, "batch voxels *classes"],
    where: Bool[Array, "batch voxels #classes"] | None,
    edges: None,
    bins: Bins,
    *,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """Counts or weights, sums of probabilities and sums of labels, `[batch, classes, bins]` each.

    Args:
        probs, labels, where, edges, bins: as for `cpu.bin_sums`; bins are hard or soft and have no edges.
        interpret: whether to run without a GPU, for tests.
    """
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    batch, _, classes = probs.shape
    weighted, dense = bins.binning == "soft", are_dense(labels, probs)
    floats = 1 + (dense or weighted) + weighted
    plan = _plan(probs.shape, bins, floats)
    inputs = [probs, labels] if where is None else [probs, labels, where]
    limits = equal_edges(bins.num_bins)
    limits[[0, -1]] = -np.inf, np.inf
    written = (batch, plan.grid[2] * plan.width, plan.groups * plan.bins_at_once, plan.grid[1])
    dtypes = [jnp.float32] * floats + [jnp.int32] * (not weighted)
    options: Any = {"interpret": True}
    if not interpret:
        options = {"compiler_params": triton.CompilerParams(num_warps=1, num_stages=1)}
    sums = pallas.pallas_call(
        functools.partial(_program, shape=probs.shape, plan=plan, bins=bins, dense=dense, floats=floats),
        out_shape=[shape_from(inputs, written, dtype) for dtype in dtypes],
        grid=plan.grid,
        **options,
    )(jnp.asarray(limits), *(x.reshape(batch, -1) for x in inputs))

    def whole(x: Array, dtype: Any) -> Array:
        """The sum of all programs, `[batch, classes, bins]`."""
        with enable_x64(True):
            total = lax.convert_element_type(x, dtype).sum(-1, dtype=dtype)
            total = lax.convert_element_type(total, jnp.float32 if dtype == jnp.float64 else dtype)
        return total[:, :classes, : bins.num_bins]

    found = [whole(x, jnp.float64) for x in sums[:floats]]
    if weighted:
        prob_sum, label_sum, weight = found
        return weight, prob_sum, label_sum
    counts = sums[floats]
    if dense:
        return whole(counts, jnp.int32), found[0], found[1]
    of_class = whole(lax.shift_right_logical(counts, jnp.int32(16)), jnp.int32)
    return whole(counts & 0xFFFF, jnp.int32), found[0], of_class.astype(jnp.float32)


def _program(
    limits_ref: Any,
    probs_ref: Any,
    labels_ref: Any,
    *refs: Any,
    shape: tuple[int, ...],
    plan: _Plan,
    bins: Bins,
    dense: bool,
    floats: int,
) -> None:
    """Sums of a group of bins and a group of classes over a part of an image."""
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    weighted = bins.binning == "soft"
    num_outputs = floats + (not weighted)
    where_ref, outputs = refs[:-num_outputs], refs[-num_outputs:]
    bin_group, part, class_group, image = map(pallas.program_id, range(4))
    _, voxels, classes = shape
    lane = lax.broadcasted_iota(jnp.int32, (_LANES,), 0)
    first_voxel = part * (plan.rounds * _ROUND * plan.tile) + lane // plan.width
    label = class_group * plan.width + lane % plan.width
    first_bin = bin_group * plan.bins_at_once
    pairs_of_bins = range(plan.bins_at_once // 2)

    def read(voxel: Array) -> tuple[list[Array], Array]:
        """Of each lane's voxel the numbers to sum, the probability first, and what it adds to a tally."""
        keep = voxel < voxels
        if classes % plan.width:
            keep &= label < classes
        place = voxel * classes + label
        if where_ref:
            per_class = where_ref[0].shape[1] == voxels * classes
            keep &= triton.load(where_ref[0].at[image, place if per_class else voxel], mask=keep, other=False)
        prob = triton.load(probs_ref.at[image, place], mask=keep, other=0).astype(jnp.float32)
        found = triton.load(labels_ref.at[image, place if dense else voxel], mask=keep, other=0)
        one = keep.astype(jnp.float32)
        if dense:
            return [prob, found.astype(jnp.float32), one][:floats], one
        is_class = found.astype(jnp.int32) == label
        tally = jnp.where(keep, jnp.where(is_class, 1.0 + 4**_FIELD, 1.0), 0.0)
        return [prob, jnp.where(is_class, one, 0), one][:floats], tally

    def add_voxel(sums: list[list[Array]], tallies: list[Array], voxel: Array) -> None:
        values, tally = read(voxel)
        if weighted:
            shares = _shares_of_two_bins(values, first_bin, bins)
        else:
            index = _bin_index(values[0], limits_ref, bins) - first_bin
            is_odd = index & 1 == 1
            shares = [(index >> 1, [jnp.where(is_odd == odd, x, 0) for x in values]) for odd in (False, True)]
            tally = jnp.where(is_odd, 2**_FIELD * tally, tally)
        for odd, (pair, added) in enumerate(shares):
            for m in pairs_of_bins:
                for column, x in zip(sums, added, strict=True):
                    column[2 * m + odd] = jnp.where(pair == m, column[2 * m + odd] + x, column[2 * m + odd])
        for m in pairs_of_bins[: len(tallies)]:
            tallies[m] = jnp.where(shares[0][0] == m, tallies[m] + tally, tallies[m])

    def add_round(i: Array, carry: Any) -> Any:
        """Adds `_ROUND` voxels to pairs of floats, and to counts: voxels + 4^_FIELD * voxels of the class."""

        def add_voxels(j: Array, carry: Any) -> Any:
            sums, tallies = jax.tree.map(lambda x: x, carry)  # new lists
            start = first_voxel + (i * _ROUND + j * _TOGETHER) * plan.tile
            for k in range(_TOGETHER):
                add_voxel(sums, tallies, start + k * plan.tile)
            return sums, tallies

        pairs, counts = carry
        sums, tallies = lax.fori_loop(
            np.int32(0), np.int32(_ROUND // _TOGETHER), add_voxels, (zeros, no_tallies)
        )
        both = 2**_FIELD - 1 << 2 * _FIELD | 2**_FIELD - 1
        fields = [x.astype(jnp.int32) >> shift & both for x in tallies for shift in (0, _FIELD)]
        return jax.tree.map(_moved, pairs, sums, is_leaf=is_pair), jax.tree.map(jnp.add, counts, fields)

    def is_pair(x: Any) -> bool:
        return isinstance(x, tuple)

    zeros = [[jnp.zeros(_LANES, jnp.float32)] * plan.bins_at_once] * floats
    no_tallies = [] if weighted else [jnp.zeros(_LANES, jnp.float32) for _ in pairs_of_bins]
    no_counts = [] if weighted else [jnp.zeros(_LANES, jnp.int32)] * plan.bins_at_once
    start = jax.tree.map(as_pair, zeros), no_counts
    pairs, counts = lax.fori_loop(np.int32(0), np.int32(plan.rounds), add_round, start)
    columns = jax.tree.map(rounded, pairs, is_leaf=is_pair)
    columns += [[x & 4**_FIELD - 1 | x >> 2 * _FIELD << 16 for x in counts]] if counts else []
    of_group = lax.broadcasted_iota(jnp.int32, (plan.width,), 0)
    for ref, column in zip(outputs, columns, strict=True):
        for m, x in enumerate(column):
            total = x.reshape(plan.tile, plan.width).sum(0, dtype=x.dtype)
            triton.store(ref.at[image, class_group * plan.width + of_group, first_bin + m, part], total)


def _bin_index(prob: Array, limits_ref: Any, bins: Bins) -> Array:
    """The bin beside the nearest edge, on the side of the probability. NaN: the last bin.

    Every probability is beyond the first limit, none beyond the last. A load takes fewer instructions than the
    arithmetic of `cpu.hard_index`.
    """
    from jax.experimental.pallas import triton

    # Beyond 1, since ptxas replaces a clip to [0, 1] by an instruction that turns NaN to 0.
    end = np.nextafter(np.float32(1), np.float32(2))
    prob = jnp.maximum(jnp.where(prob < end, prob, end), 0)
    rounding = np.float32(
        3 << 22
    )  # a sum with it has no bits for a fraction, and ends with those of the integer
    nearest = lax.bitcast_convert_type(prob * bins.num_bins + rounding, jnp.int32) - rounding.view(np.int32)
    limit = triton.load(limits_ref.at[nearest])
    beyond = prob > limit if bins.closed == "right" else prob >= limit
    return nearest - 1 + beyond.astype(jnp.int32)


def _shares_of_two_bins(values: list[Array], first_bin: Array, bins: Bins) -> list[tuple[Array, list[Array]]]:
    """The two soft bins of a voxel, an even and an odd one: the pair in which each lies, and what it gets."""
    lower, share = cpu.soft_neighbours(values[0], bins.num_bins)
    lower -= first_bin
    is_odd = lower & 1 == 1
    even, odd = jnp.where(is_odd, share, 1 - share), jnp.where(is_odd, 1 - share, share)
    return [(lower + 1 >> 1, [even * x for x in values]), (lower >> 1, [odd * x for x in values])]


def _moved(pair: Pair, x: Array) -> Pair:
    """`add_pairs` of a number that is smaller, or as large to within a few of the first sums, in half the steps."""
    total = pair[0] + x
    return total, pair[1] + (x - (total - pair[0]))
