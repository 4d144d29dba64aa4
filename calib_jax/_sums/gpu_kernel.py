"""Sums in bins on an NVIDIA GPU: a kernel that keeps them in registers, written in Pallas for Triton.

A program is one warp, so that it waits for no other. It walks over its part of an image. Each of its lanes belongs
to one class and has an accumulator for each bin and sum, to which it adds the voxels of that bin. Every few voxels
it moves the sums of floats to pairs, which keep what float32 rounds away. At the end it adds up the lanes of a
class and writes one number for each sum, bin and class.

On an H200 it takes a tenth of the time of the masked sums in `gpu`, which the compiler can split over devices.
JAX 0.12 announces that a later version will be without Pallas for Triton. There the masked sums take over.
"""

import functools
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
from calib_jax._sums.bins import Bins, share_of_bin
from calib_jax._sums.exact import Pair, as_pair, rounded

_LANES = 32  # of a warp
_TOGETHER = 8  # voxels of a lane between two moves of its sums
_ACCUMULATORS = 80  # of a lane; registers do not suffice for more
_PROGRAMS = 4096  # of all images: two for each warp that an H100 runs at a time with so many registers
_LEAST = 40  # voxels of a program for each bin, so that it writes little beside what it reads
_RADIX = 1 << 12  # a lane's tally is its voxels + _RADIX * its voxels of the class, exact in float32
_MOST_BINS = 160  # each group of bins reads the image again


def fits(probs: Float[Array, "batch voxels classes"], bins: Bins) -> bool:
    """Whether the program that is being traced can and should sum these with the kernel.

    The compiler cannot split a kernel over devices: there is one device, or `shard_map` has split the images.
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
    groups: int
    """Of bins."""
    tile: int
    """Voxels at once."""
    width: int
    """Classes at once, a power of two."""
    steps: int
    """Of `_TOGETHER` tiles."""
    grid: tuple[int, int, int, int]
    """Groups of bins, parts of an image, groups of classes, images."""


def _plan(shape: tuple[int, ...], bins: Bins, accumulators: int) -> _Plan:
    batch, voxels, classes = shape
    groups = _ceil(bins.num_bins * accumulators, _ACCUMULATORS)
    width = min(_LANES, 1 << (classes - 1).bit_length())
    tile = _LANES // width
    wanted = max(_ceil(batch * voxels, _PROGRAMS), _LEAST * bins.num_bins)
    # A lane's tally and the sum of a class's tallies, of 16 bits each, limit what a program counts.
    most = min(_RADIX - 1, (2**16 - 1) // tile) // _TOGETHER
    steps = min(most, _ceil(min(wanted, voxels), _TOGETHER * tile))
    parts = _ceil(voxels, steps * _TOGETHER * tile)
    return _Plan(
        _ceil(bins.num_bins, groups),
        groups,
        tile,
        width,
        steps,
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
    plan = _plan(probs.shape, bins, 3 * floats + (not weighted))
    inputs = [probs, labels] if where is None else [probs, labels, where]
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
    )(*(x.reshape(batch, -1) for x in inputs))

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
    tally = sums[floats]
    if dense:
        return whole(tally, jnp.int32), found[0], found[1]
    of_class = whole(lax.shift_right_logical(tally, jnp.int32(16)), jnp.int32)
    return whole(tally & 0xFFFF, jnp.int32), found[0], of_class.astype(jnp.float32)


def _program(*refs: Any, shape: tuple[int, ...], plan: _Plan, bins: Bins, dense: bool, floats: int) -> None:
    """Sums of a group of bins and a group of classes over a part of an image."""
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    weighted = bins.binning == "soft"
    outputs = refs[len(refs) - floats - (not weighted) :]
    probs_ref, labels_ref, *where_ref = refs[: len(refs) - len(outputs)]
    bin_group, part, class_group, image = map(pallas.program_id, range(4))
    _, voxels, classes = shape
    lane = lax.broadcasted_iota(jnp.int32, (_LANES,), 0)
    first_voxel = part * (plan.steps * _TOGETHER * plan.tile) + lane // plan.width
    label = class_group * plan.width + lane % plan.width
    first_bin = bin_group * plan.bins_at_once

    def read(voxel: Array) -> tuple[Array, Array, Array]:
        """Of each lane's voxel the probability, its label as float, and whether it counts."""
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
        of_class = found.astype(jnp.float32) if dense else jnp.where(found.astype(jnp.int32) == label, one, 0)
        return prob, of_class, one

    def add_voxel(sums: list[list[Array]], tally: list[Array], voxel: Array) -> None:
        prob, of_class, one = read(voxel)
        values = [prob, of_class, one][:floats]
        if weighted:
            for m in range(plan.bins_at_once):
                centre = (first_bin + m).astype(jnp.float32)
                share = share_of_bin(prob, centre - 1, centre + 1, bins)
                for column, value in zip(sums, values, strict=True):
                    column[m] = jnp.where(share > 0, column[m] + share * value, column[m])
            return
        index = cpu.hard_index(prob, None, bins) - first_bin
        counted = one if dense else one + _RADIX * of_class
        for m in range(plan.bins_at_once):
            tally[m] = jnp.where(index == m, tally[m] + counted, tally[m])
            for column, value in zip(sums, values, strict=True):
                column[m] = jnp.where(index == m, column[m] + value, column[m])

    def step(i: Array, carry: Any) -> Any:
        pairs, tally = carry
        sums, tally = zeros(floats), list(tally)
        start = first_voxel + i * (_TOGETHER * plan.tile)
        for k in range(_TOGETHER):
            add_voxel(sums, tally, start + k * plan.tile)
        return jax.tree.map(_moved, pairs, sums, is_leaf=lambda x: isinstance(x, tuple)), tally

    def zeros(columns: int) -> list[list[Array]]:
        return [[jnp.zeros(_LANES, jnp.float32)] * plan.bins_at_once for _ in range(columns)]

    start = jax.tree.map(as_pair, zeros(floats)), [] if weighted else zeros(1)[0]
    pairs, tally = lax.fori_loop(np.int32(0), np.int32(plan.steps), step, start)
    columns = jax.tree.map(rounded, pairs, is_leaf=lambda x: isinstance(x, tuple))
    columns += [[_packed(x) for x in tally]] if tally else []
    of_group = lax.broadcasted_iota(jnp.int32, (plan.width,), 0)
    for ref, column in zip(outputs, columns, strict=True):
        for m, x in enumerate(column):
            total = x.reshape(plan.tile, plan.width).sum(0, dtype=x.dtype)
            triton.store(ref.at[image, class_group * plan.width + of_group, first_bin + m, part], total)


def _moved(pair: Pair, x: Array) -> Pair:
    """`add_pairs` of a number that is smaller, or as large to within a few of the first sums, in half the steps."""
    total = pair[0] + x
    return total, pair[1] + (x - (total - pair[0]))


def _packed(tally: Array) -> Array:
    """Voxels in the lower 16 bits, voxels of the class in the upper."""
    of_class = jnp.floor(tally * (1 / _RADIX))
    return (tally - of_class * _RADIX).astype(jnp.int32) + (of_class.astype(jnp.int32) << 16)
