"""Metrics of a data set that is seen batch by batch, as pure functions of a state that adds up.

An `Accumulator` is a tuple of pure functions, as optax's optimisers are. Its state is a pytree of sums: states of
batches, devices, hosts or tiles merge into that of the whole in any order, by `merge` or, inside `shard_map`,
by `jax.lax.psum`.

    totals = dataset_totals(num_classes=4)
    update = jax.jit(totals.update, donate_argnums=0)
    state = totals.init()
    for probs, labels in batches:
        state = update(state, probs, labels)
    totals.compute(state).ace
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from calib_jax import metrics
from calib_jax._checks import (
    AnyArray,
    Labels,
    Probs,
    as_class_ids,
    as_inputs,
    check_choice,
    check_flag,
    check_size,
    check_voxel_mask,
)
from calib_jax._eager import compiled, nan_where_undefined
from calib_jax._sums.exact import add_pairs
from calib_jax.binning import BinStatistics, Closed, bin_statistics
from calib_jax.errors import (
    average_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
)

VoxelMask = Bool[AnyArray, "batch *spatial"]

_DIGIT = 20  # bits of a count's low part: `psum` over 2,047 devices does not overflow int32
_HIGH_BITS = 11  # bits after the leading one of a sum's high part: as many devices add up without rounding


class Count(NamedTuple):
    """Voxels, beyond int32 and without x64: `high * 2^20 + low`, exact to 2^51.

    Attributes:
        high: multiples of 2^20, int32.
        low: the rest, int32; below 2^20 but after `psum`, which adds without carrying.
    """

    high: Int[Array, "*shape"]
    low: Int[Array, "*shape"]


class Sum(NamedTuple):
    """A sum of floats to 36 bits: `high + low`.

    Attributes:
        high: its leading 12 bits, float32, so that plain addition, as by `psum`, hardly ever rounds it.
        low: the rest, float32.
    """

    high: Float[Array, "*shape"]
    low: Float[Array, "*shape"]


class State(NamedTuple):
    """What an accumulator carries; `cases` is absent from the shapes of data set totals.

    A plain pytree of arrays, to save, restore and send as one.

    Attributes:
        voxels, prob_sum, label_sum: bin statistics `[cases, classes, num_bins]`.
        squared_error: sum of squared errors of the probabilities, `[cases, classes]`.
        nll, labelled: sum of negative log-likelihoods and number of voxels in it, `[cases]`.
        overlap, predicted, true: voxels of each class in both label maps and in either, `[cases, classes]`.
    """

    voxels: Count
    prob_sum: Sum
    label_sum: Sum
    squared_error: Sum
    nll: Sum
    labelled: Count
    overlap: Count
    predicted: Count
    true: Count


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Results:
    """What an accumulator has to tell; `cases` is absent from the shapes of data set totals.

    Attributes:
        stats: bin statistics `[cases, classes, num_bins]`, the counts rounded to float32: they may exceed int32.
        ace: average calibration error `[cases, classes]`; NaN here and below where nothing was counted.
        ece: expected calibration error `[cases, classes]`.
        mce: maximum calibration error `[cases, classes]`.
        brier: Brier score of each class `[cases, classes]`.
        nll: negative log-likelihood in nats per voxel `[cases]`.
        dice: Dice of the label maps `[cases, classes]`.
    """

    stats: BinStatistics
    ace: Float[Array, "*cases classes"]
    ece: Float[Array, "*cases classes"]
    mce: Float[Array, "*cases classes"]
    brier: Float[Array, "*cases classes"]
    nll: Float[Array, "*cases"]
    dice: Float[Array, "*cases classes"]


class Accumulator(NamedTuple):
    """Four pure functions, all of which may be called under `jit`.

    Attributes:
        init: `() -> state`, the state of an empty data set.
        update: `(state, probs, labels[, case][, where]) -> state`, with the images of a batch added.
        merge: `(state, state) -> state` of both parts of a data set.
        compute: `(state) -> Results`.
    """

    init: Callable[[], State]
    update: Callable[..., State]
    merge: Callable[[State, State], State]
    compute: Callable[[State], Results]


def dataset_totals(
    num_classes: int, *, num_bins: int = 20, closed: Closed = "right", include_background: bool = True
) -> Accumulator:
    """Metrics of all voxels of a data set pooled, in memory of the order of classes x bins.

    Sums are exact over any number of images: counts to 2^51 voxels, the others within 1e-6 relative of float64.

    `update(state, probs, labels, where=None)` adds the images of a batch:

    - probs: class probabilities `[batch, *spatial, num_classes]`, a distribution over the classes: Dice takes
      their argmax, NLL their logarithms as logits, where zero counts as the smallest normal float32, 1.2e-38, so
      that one such voxel costs 87 nats and not infinity.
    - labels: class ids `[batch, *spatial]`, or one-hot or soft labels of the shape of `probs`: for Dice, a voxel
      is of the classes whose label exceeds 1/2. As in `bin_statistics`, ids outside the classes count, as of no
      class; for NLL they do not count.
    - where: voxels to count, boolean, `[batch, *spatial]`; None counts all.

    Args:
        num_classes: number of classes, background included.
        num_bins: number of equal-width bins on [0, 1].
        closed: the side on which a bin holds its edge, see `calib_jax.bin_index`.
        include_background: False leaves class 0 out of everything that is told per class.

    Returns:
        `Accumulator`, whose `compute` gives `Results` of shape `[classes]` (and `[classes, num_bins]`).

    Raises:
        TypeError, ValueError: on options that do not fit; from `update`, on dtypes and shapes that do not, and on
            concrete probabilities or labels outside [0, 1], as from `bin_statistics`.

    Example:
        >>> totals = dataset_totals(num_classes=2, num_bins=2)
        >>> state = totals.init()
        >>> for labels in ([[0, 1]], [[0, 0]]):
        ...     state = totals.update(state, jnp.array([[[0.75, 0.25], [0.5, 0.5]]]), jnp.array(labels))
        >>> results = totals.compute(state)
        >>> results.ace.tolist(), results.brier.tolist(), round(float(results.dice[0]), 3)
        ([0.125, 0.125], [0.15625, 0.15625], 0.857)

    References:
        Barfoot et al., arXiv 2403.06759; the form is that of `optax.GradientTransformation`.
    """
    options = _checked_options(num_classes, num_bins, closed, include_background)

    def update(state: State, probs: Probs, labels: Labels, where: VoxelMask | None = None) -> State:
        return _update_totals(state, probs, labels, where, options=options)

    return Accumulator(_init((), num_classes, num_bins, include_background), update, _merge, _compute)


def case_results(
    num_cases: int,
    num_classes: int,
    *,
    num_bins: int = 20,
    closed: Closed = "right",
    include_background: bool = True,
) -> Accumulator:
    """Metrics of each case of a data set, in memory of the order of cases x classes x bins.

    `update(state, probs, labels, case, where=None)` adds the images of a batch to the cases that they are of, so
    that tiles of a case add up, in one batch or many:

    - case: the row of each image, int32 `[batch]`. Images of rows outside `[0, num_cases)` are dropped, so that
      a batch may be filled up with row -1.
    - probs, labels, where: as in `dataset_totals`.

    Args:
        num_cases: number of rows.
        num_classes: number of classes, background included.
        num_bins: number of equal-width bins on [0, 1].
        closed: the side on which a bin holds its edge, see `calib_jax.bin_index`.
        include_background: False leaves class 0 out of everything that is told per class.

    Returns:
        `Accumulator`, whose `compute` gives `Results` of shape `[num_cases, classes]` (and
        `[num_cases, classes, num_bins]`).

    Raises:
        TypeError, ValueError: on options that do not fit; from `update`, on dtypes and shapes that do not, and on
            concrete probabilities or labels outside [0, 1], as from `bin_statistics`.

    Example:
        >>> cases = case_results(num_cases=2, num_classes=2, num_bins=2)
        >>> probs = jnp.array([[[0.75, 0.25]], [[0.5, 0.5]], [[0.25, 0.75]]])  # three images of one voxel each
        >>> state = cases.update(cases.init(), probs, jnp.array([[0], [1], [0]]), jnp.array([0, 0, -1]))
        >>> cases.compute(state).brier.tolist()
        [[0.15625, 0.15625], [nan, nan]]

    References:
        Barfoot et al., arXiv 2403.06759; the form is that of `optax.GradientTransformation`.
    """
    check_size("num_cases", num_cases)
    options = _checked_options(num_classes, num_bins, closed, include_background)

    def update(
        state: State,
        probs: Probs,
        labels: Labels,
        case: Int[AnyArray, "batch"],
        where: VoxelMask | None = None,
    ) -> State:
        return _update_rows(state, probs, labels, case, where, num_cases=num_cases, options=options)

    return Accumulator(
        _init((num_cases,), num_classes, num_bins, include_background), update, _merge, _compute
    )


# Batches to sums per image.


class _Options(NamedTuple):
    """What to sum."""

    num_classes: int
    num_bins: int
    closed: Closed
    first_class: int


def _checked_options(num_classes: int, num_bins: int, closed: Closed, include_background: bool) -> _Options:
    check_size("num_bins", num_bins)
    check_choice("closed", closed, ("right", "left"))
    return _Options(num_classes, num_bins, closed, _first_class(num_classes, include_background))


@compiled()
def _update_totals(state: State, probs: Any, labels: Any, where: Any, *, options: _Options) -> State:
    return _merge(state, _over_images(_image_sums(probs, labels, where, options)))


@compiled()
def _update_rows(
    state: State, probs: Any, labels: Any, case: Any, where: Any, *, num_cases: int, options: _Options
) -> State:
    images = _image_sums(probs, labels, where, options)
    return _add_to_rows(state, images, _checked_rows(case, images, num_cases))


def _image_sums(probs: Any, labels: Any, where: Any, options: _Options) -> State:
    probs, labels, where = as_inputs(probs, labels, where)
    check_voxel_mask(where, probs)
    if probs.shape[-1] != options.num_classes:
        raise ValueError(
            f"probs must have {options.num_classes} classes on their last axis, as the accumulator was made for; "
            f"got {probs.shape}."
        )
    stats: Any = bin_statistics(probs, labels, num_bins=options.num_bins, closed=options.closed, where=where)
    flat = metrics.flatten(probs, labels, where)
    squared_error, nll, *counts = metrics.sum_over_chunks(_chunk_sums, *flat)
    floats = (
        _pair(stats.prob_sum),
        _pair(stats.label_sum),
        _normalised(*squared_error),
        _normalised(*nll),
    )
    state = State(_split(stats.count), *floats, *map(_split, counts))
    # Only now, since a slice of the probabilities would be a copy of them.
    return jax.tree.map(lambda x: x[:, options.first_class :] if x.ndim > 1 else x, state)


def _chunk_sums(probs: Array, labels: Array, where: Array | None) -> tuple[Array, ...]:
    """Sums per image of everything but the bins."""
    predicted = metrics.is_class(probs.argmax(-1), probs.shape[-1])
    true = labels > 0.5 if labels.ndim == probs.ndim else metrics.is_class(labels, probs.shape[-1])
    # Log-probabilities are logits, and the smallest normal number still has a logarithm.
    logits = jnp.log(jnp.maximum(probs.astype(jnp.float32), jnp.finfo(jnp.float32).tiny))
    nll, labelled = metrics.voxel_likelihoods(logits, labels, where)
    return (
        metrics.brier_sums(probs, labels, where),
        metrics.voxel_sum(nll)[:, 0],
        metrics.count_voxels(labelled)[0][:, 0],
        *metrics.overlap_counts(predicted, true, where),
    )


def _first_class(num_classes: int, include_background: bool) -> int:
    check_size("num_classes", num_classes)
    check_flag("include_background", include_background)
    first = 0 if include_background else 1
    if num_classes == first:
        raise ValueError(f"include_background=False leaves no class of num_classes={num_classes}.")
    return first


# States, which add up.


def _init(
    cases: tuple[int, ...], num_classes: int, num_bins: int, include_background: bool
) -> Callable[[], State]:
    per_class = (*cases, num_classes - _first_class(num_classes, include_background))
    per_bin = (*per_class, num_bins)

    def count(shape: tuple[int, ...]) -> Count:
        return Count(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32))

    def total(shape: tuple[int, ...]) -> Sum:
        return Sum(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))

    def init() -> State:
        bins = count(per_bin), total(per_bin), total(per_bin)
        return State(
            *bins, total(per_class), total(cases), count(cases), *(count(per_class) for _ in range(3))
        )

    return init


def _each(of_count: Callable[..., Any], of_sum: Callable[..., Any], *states: State) -> tuple[Any, ...]:
    """One function of the counts of some states, and another of their sums."""
    return tuple(
        (of_count if isinstance(parts[0], Count) else of_sum)(*parts) for parts in zip(*states, strict=True)
    )


def _merge(a: State, b: State) -> State:
    """Elementwise, so in any order and of any parts; those may come from `psum`."""
    return State(*_each(_add_counts, _add_sums, _as_jax(a), _as_jax(b)))


def _as_jax(state: State) -> State:
    """The same, of JAX arrays: restored states may be of NumPy's."""
    return jax.tree.map(jnp.asarray, state)


def _add_counts(a: Count, b: Count) -> Count:
    a, b = _carried(*a), _carried(*b)
    return _carried(a.high + b.high, a.low + b.low)


def _add_sums(a: Sum, b: Sum) -> Sum:
    return _normalised(*add_pairs(a, b))


def _over_images(images: State) -> State:
    """The state of a batch from those of its images."""

    def count(x: Count) -> Count:
        return _carried(x.high.sum(0, dtype=jnp.int32), x.low.sum(0, dtype=jnp.int32))

    def total(x: Sum) -> Sum:
        zeros = (np.float32(0), np.float32(0))
        return _normalised(*lax.reduce(tuple(x), zeros, add_pairs, (0,)))

    return State(*_each(count, total, images))


def _add_to_rows(state: State, images: State, rows: Int[Array, "batch"]) -> State:
    """Images of one case are added up first, so that what is written twice to a row is the same both times."""

    def of_row(row: Array) -> State:
        def only(x: Array) -> Array:
            return jnp.where((rows == row).reshape(-1, *(1,) * (x.ndim - 1)), x, 0)

        return _over_images(jax.tree.map(only, images))

    state = _as_jax(state)
    before = jax.tree.map(lambda x: x.at[rows].get(mode="clip"), state)
    after = _merge(before, jax.vmap(of_row)(rows))
    return jax.tree.map(lambda x, new: x.at[rows].set(new, mode="drop"), state, after)


def _checked_rows(case: Any, images: State, num_cases: int) -> Int[Array, "batch"]:
    """Rows, those out of range one past the last: JAX would count a negative one from the end."""
    case, expected = jnp.asarray(as_class_ids(case)), images.nll.high.shape
    if not jnp.issubdtype(case.dtype, jnp.integer):
        raise TypeError(f"case must be row numbers, integers; got {case.dtype}.")
    if case.shape != expected:
        raise ValueError(f"case must have shape {expected}, one row number per image; got {case.shape}.")
    case = case.astype(jnp.int32)
    return jnp.where((case >= 0) & (case < num_cases), case, num_cases)


def _split(count: Int[Array, "*shape"]) -> Count:
    return _carried(jnp.zeros_like(count), count)


def _carried(high: Array, low: Array) -> Count:
    return Count(high + (low >> _DIGIT), low & ((1 << _DIGIT) - 1))


def _pair(x: Float[Array, "*shape"]) -> Sum:
    return _normalised(x, jnp.zeros_like(x))


def _normalised(high: Array, low: Array) -> Sum:
    """The same sum, its leading bits in `high`. What is not finite has no rest."""
    total, rest = add_pairs((high, jnp.zeros_like(high)), (low, jnp.zeros_like(low)))
    leading = lax.reduce_precision(total, exponent_bits=8, mantissa_bits=_HIGH_BITS)
    return Sum(leading, jnp.where(jnp.isfinite(leading), (total - leading) + rest, 0))


# States to results.


@nan_where_undefined
def _compute(state: State) -> Results:
    *bins, squared_error, nll, labelled, overlap, predicted, true = _each(_voxels, _total, _as_jax(state))
    stats = BinStatistics(*bins)
    return Results(
        stats=stats,
        ace=average_calibration_error(stats),
        ece=expected_calibration_error(stats),
        mce=maximum_calibration_error(stats),
        brier=metrics.ratio(squared_error, stats.weight.sum(-1)),
        nll=metrics.ratio(nll, labelled),
        dice=metrics.dice_of_counts(overlap, predicted, true),
    )


def _voxels(count: Count) -> Float[Array, "*shape"]:
    high, low = _carried(*count)
    return high.astype(jnp.float32) * (1 << _DIGIT) + low.astype(jnp.float32)


def _total(x: Sum) -> Float[Array, "*shape"]:
    return x.high + x.low
