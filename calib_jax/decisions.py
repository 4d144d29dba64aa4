"""What calibrated probabilities say without a label: expected Dice and volume, thresholds, which cases to check."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from calib_jax._checks import AnyArray, Probs, as_inputs, check_number
from calib_jax._eager import compiled, nan_where_undefined
from calib_jax._labels import one_hot
from calib_jax._sums.voxels import sum_voxels
from calib_jax.binning import BinStatistics, bin_edges
from calib_jax.metrics import dice_of_counts


@nan_where_undefined
@compiled()
def expected_dice(
    probs: Probs,
    predictions: Integer[AnyArray, "batch *spatial"] | Bool[AnyArray, "batch *spatial classes"],
    *,
    where: Bool[AnyArray, "batch *spatial"] | None = None,
) -> Float[Array, "batch classes"]:
    r"""Dice of a label map that the probabilities themselves expect.

    Of a prediction y this is :math:`2 \sum p y / (\sum p + \sum y)`. The true label is not needed. The more
    trustworthy the probabilities, the closer this is to the true Dice.

    Args:
        probs: class probabilities `[batch, *spatial, classes]`.
        predictions: label map, class ids `[batch, *spatial]`; of overlapping regions boolean, of the shape of
            `probs`.
        where: voxels to count, boolean, `[batch, *spatial]`; None counts all.

    Returns:
        `[batch, classes]`, in [0, 1]; NaN where neither probabilities nor predictions have the class.

    Raises:
        TypeError, ValueError: on dtypes or shapes that do not fit.

    Example:
        >>> probs = jnp.array([[[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]]])
        >>> [round(x, 3) for x in expected_dice(probs, jnp.array([[0, 1, 1]]))[0].tolist()]
        [0.72, 0.8]

    References:
        Borges et al., "Soft Dice Confidence: A Near-Optimal Confidence Estimator for Selective Prediction in
        Semantic Segmentation", arXiv 2402.10665.
    """
    probs, predictions, where = as_inputs(probs, predictions, where, per_voxel=True)
    predicted = one_hot(predictions, probs)
    if where is not None:
        probs, predicted = (jnp.where(where[..., None], x, 0) for x in (probs, predicted))
    return dice_of_counts(*map(sum_voxels, (probs * predicted, probs, predicted)))


@nan_where_undefined
def dice_thresholds(stats: BinStatistics) -> Float[Array, "*batch classes"]:
    r"""The threshold of each class above which a voxel must be predicted so that the expected Dice is largest.

    Dice is not largest where each voxel gets its most probable class. With calibrated probabilities the best
    threshold is half the Dice that it reaches, so it is at most 1/2. For each edge t of the bins this function
    computes :math:`2 \sum_{p > t} p / (\sum p + \#\{p > t\})` from the sums in bins, and takes the best one.

    Args:
        stats: from `bin_statistics` with hard bins. More bins, such as `num_bins=200`, give a finer threshold.
            Labels do not matter.

    Returns:
        An edge of the bins, `[*batch, classes]`; NaN for a class of which no probability was counted.

    Example:
        >>> from calib_jax import bin_statistics
        >>> probs = jnp.array([[0.95, 0.9, 0.45, 0.45, 0.45, 0.02]])[..., None]
        >>> stats = bin_statistics(probs, jnp.zeros((1, 6), jnp.int32), num_bins=10)
        >>> round(dice_thresholds(stats).item(), 3)
        0.4

    References:
        Nordström et al., "On Image Segmentation With Noisy Labels: Characterization and Volume Properties of the
        Optimal Solutions to Accuracy and Dice", arXiv 2206.06484; "Marginal Thresholding in Noisy Image
        Segmentation", arXiv 2304.04116.
    """

    def above(sums: AnyArray) -> Array:
        """Sums over each bin and all those above it."""
        return jnp.flip(jnp.cumsum(jnp.flip(jnp.asarray(sums, jnp.float32), -1), -1), -1)

    inside, predicted = above(stats.prob_sum), above(stats.weight)
    expected = dice_of_counts(inside, inside[..., :1], predicted)
    downwards = jnp.asarray(bin_edges(stats.num_bins)[-2::-1])  # of equal thresholds the highest
    best = downwards[jnp.argmax(jnp.flip(jnp.nan_to_num(expected), -1), -1)]
    return jnp.where(predicted[..., 0] > 0, best, jnp.nan)


def volume_interval(
    expected: Float[AnyArray, "*shape"],
    labelled_expected: Float[AnyArray, "cases"],
    labelled_true: Float[AnyArray, "cases"],
    *,
    level: float = 0.9,
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    r"""Interval that holds the true volume of a class in a new case.

    The expected volume is the sum of the probabilities. In cases with labels the true volume is a multiple of it,
    :math:`r_1 \le \dots \le r_n` in order. The interval is the expected volume times
    :math:`r_{\lfloor (n + 1)(1 - l) / 2 \rfloor}` to times :math:`r_{\lceil (n + 1)(1 + l) / 2 \rceil}` at level l.
    If new cases are like those with labels, it holds the true volume in at least this share of them, whatever the
    model. The better the probabilities, the narrower the interval.

    Args:
        expected: expected volumes of new cases, in any unit.
        labelled_expected: expected volumes, at least one voxel each, of cases that the probabilities were neither
            trained nor calibrated on.
        labelled_true: their true volumes.
        level: share of cases that the interval is to hold.

    Returns:
        `(low, high)`, of the shape of `expected`.

    Raises:
        ValueError: if shapes do not fit, or `level` needs more cases: 19 for 0.9, 39 for 0.95.

    Example:
        >>> expected, true = jnp.full(19, 10.0), jnp.arange(1.0, 20.0)  # in truth 0.1 to 1.9 times as large
        >>> low, high = volume_interval(jnp.array([20.0]), expected, true)
        >>> round(low.item(), 3), round(high.item(), 3)
        (2.0, 38.0)

    References:
        Lei et al., "Distribution-Free Predictive Inference for Regression", JASA 2018.
    """
    check_number("level", level, 0.0, 1.0)
    labelled_expected, labelled_true = (
        jnp.asarray(x, jnp.float32) for x in (labelled_expected, labelled_true)
    )
    if labelled_expected.ndim != 1 or labelled_expected.shape != labelled_true.shape:
        raise ValueError(
            "labelled_expected and labelled_true must have one volume for each case; got "
            f"{labelled_expected.shape} and {labelled_true.shape}."
        )
    cases = len(labelled_expected)
    # Rounding must not ask for one case more.
    low, high = (
        math.floor((cases + 1) * (1 - level) / 2 + 1e-9),
        math.ceil((cases + 1) * (1 + level) / 2 - 1e-9),
    )
    if low < 1:
        needed = math.ceil(2 / (1 - level) - 1e-9) - 1 if level < 1 else math.inf
        raise ValueError(f"level {level} needs {needed} cases with labels; got {cases}: lower it.")
    ratios = jnp.sort(labelled_true / labelled_expected)
    expected = jnp.asarray(expected, jnp.float32)
    return expected * ratios[low - 1], expected * ratios[high - 1]


class RiskCoverage(NamedTuple):
    """How much risk remains if only the most confident cases are accepted.

    Attributes:
        coverage: share of the cases that is accepted, `[cases]`, from 1 / cases to 1.
        risk: mean risk of the accepted cases, `[cases]`.
        area: mean of `risk` over all coverages, the area under the curve.
    """

    coverage: Float[Array, "cases"]
    risk: Float[Array, "cases"]
    area: Float[Array, ""]


def risk_coverage(confidence: Float[AnyArray, "cases"], risk: Float[AnyArray, "cases"]) -> RiskCoverage:
    """The risk-coverage curve over cases: accept the most confident ones, have an expert check the others.

    Args:
        confidence: such as `expected_dice`; larger is surer. Of equal ones the first come first.
        risk: such as 1 - Dice. Leave out cases where either is NaN.

    Returns:
        `RiskCoverage`. A confidence that orders cases by their risk has the smallest area; one that says nothing
        has on average the mean risk as its area.

    Example:
        >>> curve = risk_coverage(jnp.array([0.9, 0.5, 0.7]), jnp.array([0.1, 0.4, 0.1]))
        >>> [round(x, 3) for x in curve.risk.tolist()], round(curve.area.item(), 3)
        ([0.1, 0.1, 0.2], 0.133)

    References:
        El-Yaniv and Wiener, "On the Foundations of Noise-free Selective Classification", JMLR 2010.
    """
    confidence, risk = jnp.asarray(confidence, jnp.float32), jnp.asarray(risk, jnp.float32)
    if confidence.ndim != 1 or confidence.shape != risk.shape or not confidence.size:
        raise ValueError(
            f"confidence and risk must have one number for each case; got {confidence.shape} and {risk.shape}."
        )
    accepted = jnp.arange(1, len(risk) + 1, dtype=jnp.float32)
    remaining = jnp.cumsum(risk[jnp.argsort(-confidence)]) / accepted
    return RiskCoverage(accepted / len(risk), remaining, remaining.mean())
