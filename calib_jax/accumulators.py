"""Metrics of a data set that is read batch by batch, as pure functions of a state that adds up.

An `Accumulator` is a tuple of pure functions, like an optimiser of optax. Its state is a pytree of sums. States of
batches, devices, hosts or tiles merge into the state of the whole in any order, by `merge` or, inside `shard_map`,
by `jax.lax.psum`.

    totals = dataset_totals(num_classes=4)
    update = jax.jit(totals.update, donate_argnums=0)
    state = totals.init()
    for probs, labels in batches:
        state = update(state, probs, labels)
    totals.compute(state).ace
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from calib_jax import metrics
from calib_jax._checks import AnyArray, Labels, Probs, as_inputs, check_choice, check_flag, check_size
from calib_jax._eager import compiled, nan_where_undefined
from calib_jax._labels import as_class_ids, memberships, one_hot
from calib_jax._sums.exact import as_pair, mean_or_nan
from calib_jax._sums.totals import Count, Sum, is_total
from calib_jax._sums.voxels import count_voxels, sum_in_chunks, sum_voxels
from calib_jax.binning import BinStatistics, Closed, bin_statistics
from calib_jax.errors import average_calibration_error, expected_calibration_error, maximum_calibration_error

VoxelMask = Bool[AnyArray, "batch *spatial"]


class State(NamedTuple):
    """The state of an accumulator, a plain pytree of arrays. Totals of a data set have no axis `cases`.

    Attributes:
        voxels, prob_sum, label_sum: bin statistics `[cases, classes, num_bins]`.
        squared_error: sum of squared errors of the probabilities, `[cases, classes]`.
        nll, labelled: sum of negative log-likelihoods and number of its voxels, `[cases]`.
        overlap, predicted, true: voxels of each class in both label maps, in the predicted and in the true one,
            `[cases, classes]`.
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
    """The results of an accumulator. Totals of a data set have no axis `cases`.

    Attributes:
        stats: bin statistics `[cases, classes, num_bins]`. Counts are rounded to float32: they may exceed int32.
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
    """Four pure functions, for use with or without `jit`.

    Attributes:
        init: `() -> state`, the state of an empty data set.
        update: `(state, probs, labels[, case][, where]) -> state`, adds the images of a batch.
        merge: `(state, state) -> state`, adds up two parts of a data set.
        compute: `(state) -> Results`.
    """

    init: Callable[[], State]
    update: Callable[..., State]
    merge: Callable[[State, State], State]
    compute: Callable[[State], Results]


def dataset_totals(
    num_classes: int, *, num_bins: int = 20, closed: Closed = "right", include_background: bool = True
) -> Accumulator:
    """Metrics of all voxels of a data set together, in memory of the order of classes x bins.

    Counts are exact to 2^51 voxels, other sums within 1e-6 relative of float64, over any number of images.

    `update(state, probs, labels, where=None)` adds the images of a batch:

    - probs: class probabilities `[batch, *spatial, num_classes]`, a distribution over the classes. Dice uses their
      argmax, NLL their logarithms. NLL raises probability zero to the smallest normal float32, 1.2e-38, so that
      one such voxel costs 87 nats and not infinity.
    - labels: class ids `[batch, *spatial]`, or one-hot or soft labels of the shape of `probs`. For Dice, a voxel
      belongs to the classes whose label exceeds 1/2. Voxels whose id is outside the classes count for the bins, as
      members of no class, and do not count for NLL.
    - where: voxels to count, boolean, `[batch, *spatial]`; None counts all.

    Args:
        num_classes: number of classes, background included.
        num_bins: number of equal-width bins on [0, 1].
        closed: the side on which a bin holds its edge, see `calib_jax.bin_index`.
        include_background: False leaves class 0 out of all results per class.

    Returns:
        `Accumulator` whose `compute` returns `Results` of shape `[classes]` (and `[classes, num_bins]`).

    Raises:
        TypeError, ValueError: on options that do not fit; in `update`, on dtypes and shapes that do not fit, and on
            concrete probabilities or labels outside [0, 1].

    Example:
        >>> totals = dataset_totals(num_classes=2, num_bins=2)
        >>> state = totals.init()
        >>> for labels in ([[0, 1]], [[0, 0]]):
        ...     state = totals.update(state, jnp.array([[[0.75, 0.25], [0.5, 0.5]]]), jnp.array(labels))
        >>> results = totals.compute(state)
        >>> results.ace.tolist(), results.brier.tolist(), round(float(results.dice[0]), 3)
        ([0.125, 0.125], [0.15625, 0.15625], 0.857)

    References:
        Barfoot et al., arXiv 2403.06759. The interface follows `optax.GradientTransformation`.
    """
    options = _checked_options(num_classes, num_bins, closed, include_background)
    update = functools.partial(_update_totals, options=options)
    return Accumulator(functools.partial(_init, (), options), update, _merge, _compute)


def case_results(
    num_cases: int,
    num_classes: int,
    *,
    num_bins: int = 20,
    closed: Closed = "right",
    include_background: bool = True,
) -> Accumulator:
    """Metrics of each case of a data set, in memory of the order of cases x classes x bins.

    `update(state, probs, labels, case, where=None)` adds each image of a batch to its case. Tiles of a case add up,
    in one batch or many:

    - case: the row of each image, int32 `[batch]`. Images of rows outside `[0, num_cases)` are dropped: use row -1
      for images that only fill a batch.
    - probs, labels, where: as in `dataset_totals`.

    Args:
        num_cases: number of rows.
        num_classes: number of classes, background included.
        num_bins: number of equal-width bins on [0, 1].
        closed: the side on which a bin holds its edge, see `calib_jax.bin_index`.
        include_background: False leaves class 0 out of all results per class.

    Returns:
        `Accumulator` whose `compute` returns `Results` of shape `[num_cases, classes]` (and
        `[num_cases, classes, num_bins]`).

    Raises:
        TypeError, ValueError: on options that do not fit; in `update`, on dtypes and shapes that do not fit, and on
            concrete probabilities or labels outside [0, 1].

    Example:
        >>> cases = case_results(num_cases=2, num_classes=2, num_bins=2)
        >>> probs = jnp.array([[[0.75, 0.25]], [[0.5, 0.5]], [[0.25, 0.75]]])  # three images of one voxel each
        >>> state = cases.update(cases.init(), probs, jnp.array([[0], [1], [0]]), jnp.array([0, 0, -1]))
        >>> cases.compute(state).brier.tolist()
        [[0.15625, 0.15625], [nan, nan]]

    References:
        Barfoot et al., arXiv 2403.06759. The interface follows `optax.GradientTransformation`.
    """
    check_size("num_cases", num_cases)
    options = _checked_options(num_classes, num_bins, closed, include_background)
    update = functools.partial(_update_rows, options=options, num_cases=num_cases)
    return Accumulator(functools.partial(_init, (num_cases,), options), update, _merge, _compute)


class _Options(NamedTuple):
    """What to sum."""

    num_classes: int
    num_bins: int
    closed: Closed
    first_class: int


def _checked_options(num_classes: int, num_bins: int, closed: Closed, include_background: bool) -> _Options:
    check_size("num_classes", num_classes)
    check_size("num_bins", num_bins)
    check_choice("closed", closed, ("right", "left"))
    check_flag("include_background", include_background)
    first_class = 0 if include_background else 1
    if num_classes == first_class:
        raise ValueError(f"include_background=False leaves no class of num_classes={num_classes}.")
    return _Options(num_classes, num_bins, closed, first_class)


def _init(cases: tuple[int, ...], options: _Options) -> State:
    per_class = (*cases, options.num_classes - options.first_class)
    per_bin = (*per_class, options.num_bins)
    bins = Count.zeros(per_bin), Sum.zeros(per_bin), Sum.zeros(per_bin)
    maps = (Count.zeros(per_class) for _ in range(3))
    return State(*bins, Sum.zeros(per_class), Sum.zeros(cases), Count.zeros(cases), *maps)


# Update: the sums of each image of a batch, added to the totals or to the rows of their cases.


@compiled()
def _update_totals(
    state: State, probs: Probs, labels: Labels, where: VoxelMask | None = None, *, options: _Options
) -> State:
    return _merge(state, _over_images(_image_sums(probs, labels, where, options)))


@compiled()
def _update_rows(
    state: State,
    probs: Probs,
    labels: Labels,
    case: Int[AnyArray, "batch"],
    where: VoxelMask | None = None,
    *,
    options: _Options,
    num_cases: int,
) -> State:
    images = _image_sums(probs, labels, where, options)
    rows = _checked_rows(case, images, num_cases)

    def of_row(row: Array) -> State:
        def only(x: Array) -> Array:
            return jnp.where((rows == row).reshape(-1, *(1,) * (x.ndim - 1)), x, 0)

        return _over_images(jax.tree.map(only, images))

    # Each image's row gets the sum of all images of its case: two writes to one row write the same.
    state = _as_jax(state)
    before = jax.tree.map(lambda x: x.at[rows].get(mode="clip"), state)
    after = _merge(before, jax.vmap(of_row)(rows))
    return jax.tree.map(lambda x, new: x.at[rows].set(new, mode="drop"), state, after)


def _image_sums(probs: Any, labels: Any, where: Any, options: _Options) -> State:
    probs, labels, where = as_inputs(probs, labels, where, per_voxel=True)
    if probs.shape[-1] != options.num_classes:
        raise ValueError(
            f"probs must have {options.num_classes} classes on their last axis, as the accumulator was made for; "
            f"got {probs.shape}."
        )
    stats: Any = bin_statistics(probs, labels, num_bins=options.num_bins, closed=options.closed, where=where)
    sums = sum_in_chunks(_chunk_sums, *metrics.with_columns(probs, labels, where))
    bins = stats.count, as_pair(stats.prob_sum), as_pair(stats.label_sum)
    totals: Any = [Sum.of(*x) if isinstance(x, tuple) else Count.of(x) for x in (*bins, *sums)]
    # Only now, since a slice of the probabilities would be a copy of them.
    return State(*jax.tree.map(lambda x: x[:, options.first_class :] if x.ndim > 1 else x, totals))


def _chunk_sums(probs: Array, labels: Array, where: Array | None) -> tuple[Array, ...]:
    """Sums per image of everything except the bins, in the order of `State`."""
    predicted, true = memberships(probs.argmax(-1), probs.shape[-1]), one_hot(labels, probs) > 0.5
    # Log-probabilities are logits, and the smallest normal number still has a logarithm.
    logits = jnp.log(jnp.maximum(probs.astype(jnp.float32), jnp.finfo(jnp.float32).tiny))
    nll, labelled = metrics.voxel_likelihoods(logits, labels, where)
    return (
        metrics.brier_sums(probs, labels, where),
        sum_voxels(nll)[:, 0],
        count_voxels(labelled)[0][:, 0],
        *metrics.overlap_counts(predicted, true, where),
    )


def _checked_rows(case: Any, images: State, num_cases: int) -> Int[Array, "batch"]:
    """Rows, with `num_cases` for those out of range: JAX would count a negative one from the end."""
    case, expected = jnp.asarray(as_class_ids(case)), images.nll.high.shape
    if not jnp.issubdtype(case.dtype, jnp.integer):
        raise TypeError(f"case must be row numbers, integers; got {case.dtype}.")
    if case.shape != expected:
        raise ValueError(f"case must have shape {expected}, one row number per image; got {case.shape}.")
    case = case.astype(jnp.int32)
    return jnp.where((case >= 0) & (case < num_cases), case, num_cases)


def _over_images(images: State) -> State:
    return jax.tree.map(lambda x: x.over_images(), images, is_leaf=is_total)


def _merge(a: State, b: State) -> State:
    """Elementwise, so in any order and for any parts, which may come from `psum`."""
    return jax.tree.map(lambda x, y: x.merge(y), _as_jax(a), _as_jax(b), is_leaf=is_total)


@nan_where_undefined
def _compute(state: State) -> Results:
    values = jax.tree.map(lambda x: x.value(), _as_jax(state), is_leaf=is_total)
    stats = BinStatistics(values.voxels, values.prob_sum, values.label_sum)
    return Results(
        stats=stats,
        ace=average_calibration_error(stats),
        ece=expected_calibration_error(stats),
        mce=maximum_calibration_error(stats),
        brier=mean_or_nan(values.squared_error, stats.weight.sum(-1)),
        nll=mean_or_nan(values.nll, values.labelled),
        dice=metrics.dice_of_counts(values.overlap, values.predicted, values.true),
    )


def _as_jax(state: State) -> State:
    """The state as JAX arrays: the arrays of a restored state may be NumPy's."""
    return jax.tree.map(jnp.asarray, state)
