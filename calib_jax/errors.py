"""Calibration errors from bin statistics: average (ACE), expected (ECE), maximum (MCE), and debiased.

All summarise the gaps |mean probability - observed frequency| of non-empty bins. ACE is their mean, ECE their mean
weighted by the bins' counts, MCE the largest gap. The ECE of adaptive bins is the literature's adaptive
calibration error. Its mean over the classes of pooled images, `expected_calibration_error(stats.sum(),
average="macro")`, is the classwise calibration error.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from calib_jax._checks import Labels, Mask, Probs, as_inputs, check_choice
from calib_jax._eager import compiled, nan_where_undefined
from calib_jax._labels import are_dense
from calib_jax._sums.bins import Binning, Bins, Closed
from calib_jax._sums.exact import mean_or_nan
from calib_jax.binning import BinStatistics, check_bins, statistics_in_bins

Average = Literal["none", "macro", "micro"]

# Bins with less weight count as empty: a soft bin may hold a trace of a voxel.
_LEAST_WEIGHT = 0.01


def average_calibration_error(
    stats: BinStatistics, *, average: Average = "none"
) -> Float[Array, "*averaged"]:
    r"""Mean gap over the M non-empty bins: :math:`\mathrm{ACE} = \frac{1}{M} \sum_m |\bar p_m - \bar y_m|`.

    Args:
        stats: bin statistics `[*batch, classes, num_bins]`.
        average: `"none"`: the error of each image and class. `"macro"`: the mean of these errors, without images
            and classes in which nothing was counted. `"micro"`: the error of all voxels of all images and classes,
            pooled in one set of bins. `stats.sum()` pools images alone.

    Returns:
        The error, in [0, 1], `[*batch, classes]` or a scalar. NaN where nothing was counted or a probability was
        NaN.

    Raises:
        ValueError: if `average` is not one of the three.

    Example:
        >>> from calib_jax import bin_statistics
        >>> stats = bin_statistics(jnp.array([[[0.1], [0.8]]]), jnp.array([[[0], [1]]]), num_bins=2)
        >>> round(float(average_calibration_error(stats)[0, 0]), 4)
        0.15

    References:
        Neumann et al., "Relaxed Softmax: Efficient Confidence Auto-Calibration for Safe Pedestrian Detection",
        2018; Barfoot et al., arXiv 2403.06759.
    """
    return _averaged(_ace, stats, average)


def expected_calibration_error(
    stats: BinStatistics, *, average: Average = "none"
) -> Float[Array, "*averaged"]:
    r"""Mean gap over voxels: :math:`\mathrm{ECE} = \sum_m \frac{n_m}{n} |\bar p_m - \bar y_m|`.

    Args:
        stats: bin statistics `[*batch, classes, num_bins]`.
        average: as for `average_calibration_error`.

    Returns:
        The error, in [0, 1], `[*batch, classes]` or a scalar. NaN where nothing was counted or a probability was
        NaN.

    Raises:
        ValueError: if `average` is not one of the three.

    Example:
        >>> from calib_jax import bin_statistics
        >>> probs = jnp.array([[[0.1], [0.8], [0.8], [0.8]]])
        >>> stats = bin_statistics(probs, jnp.array([[[0], [1], [1], [1]]]), num_bins=2)
        >>> round(float(expected_calibration_error(stats)[0, 0]), 4)
        0.175

    References:
        Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI 2015; classwise,
        Kull et al., "Beyond temperature scaling", NeurIPS 2019.
    """
    return _averaged(_ece, stats, average)


def maximum_calibration_error(
    stats: BinStatistics, *, average: Average = "none"
) -> Float[Array, "*averaged"]:
    r"""Largest gap over the non-empty bins: :math:`\mathrm{MCE} = \max_m |\bar p_m - \bar y_m|`.

    Args:
        stats: bin statistics `[*batch, classes, num_bins]`.
        average: as for `average_calibration_error`.

    Returns:
        The error, in [0, 1], `[*batch, classes]` or a scalar. NaN where nothing was counted or a probability was
        NaN.

    Raises:
        ValueError: if `average` is not one of the three.

    Example:
        >>> from calib_jax import bin_statistics
        >>> probs = jnp.array([[[0.1], [0.8], [0.8], [0.8]]])
        >>> stats = bin_statistics(probs, jnp.array([[[0], [1], [1], [1]]]), num_bins=2)
        >>> round(float(maximum_calibration_error(stats)[0, 0]), 4)
        0.2

    References:
        Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI 2015.
    """
    return _averaged(_mce, stats, average)


def debiased_calibration_error(
    stats: BinStatistics, *, average: Average = "none"
) -> Float[Array, "*averaged"]:
    r"""Root-mean-square calibration error without the part that chance adds in small samples.

    :math:`\sqrt{\max(0, \sum_m \frac{n_m}{n} [(\bar p_m - \bar y_m)^2 - \bar y_m (1 - \bar y_m) / (n_m - 1)])}`:
    the square of each gap minus the variance of the observed frequency of n_m independent voxels. Bins of one voxel
    contribute nothing. Voxels of one image are not independent, so some bias remains; take intervals from
    `bootstrap_interval` over cases.

    Args:
        stats: hard or adaptive bin statistics `[*batch, classes, num_bins]`.
        average: as for `average_calibration_error`.

    Returns:
        The error, in [0, 1], `[*batch, classes]` or a scalar. NaN where nothing was counted or a probability was
        NaN.

    Raises:
        ValueError: if `average` is not one of the three.

    Example:
        >>> from calib_jax import bin_statistics
        >>> probs = jnp.full((1, 100, 1), 0.8)
        >>> labels = (jnp.arange(100) < 60).astype(jnp.float32)[None, :, None]
        >>> round(float(debiased_calibration_error(bin_statistics(probs, labels))[0, 0]), 4)  # 0.2, less chance
        0.1938

    References:
        Kumar, Liang, Ma, "Verified Uncertainty Calibration", NeurIPS 2019, arXiv 1909.10155.
    """
    return _averaged(_debiased, stats, average)


@compiled()
def top_label_statistics(
    probs: Probs,
    labels: Labels,
    *,
    num_bins: int = 20,
    binning: Binning = "hard",
    closed: Closed = "right",
    where: Mask | None = None,
) -> BinStatistics:
    """Bin statistics of the predicted class: its probability, and whether it is the true class.

    From these, `expected_calibration_error` is the ECE of the classification literature ("top-label" or
    "confidence" calibration). The errors of `bin_statistics` are marginal, one for each class.

    Args:
        probs: class probabilities `[batch, *spatial, classes]`.
        labels: class ids `[batch, *spatial]`, or one-hot or soft labels of the shape of `probs`.
        num_bins, binning, closed: as for `calib_jax.bin_statistics`.
        where: voxels to count, boolean, `[batch, *spatial]`; None counts all.

    Returns:
        `BinStatistics` of shape `[batch, 1, num_bins]`.

    Raises:
        TypeError, ValueError: as `calib_jax.bin_statistics`.

    Example:
        >>> stats = top_label_statistics(jnp.array([[[0.75, 0.25], [0.5, 0.5]]]), jnp.array([[0, 1]]), num_bins=1)
        >>> stats.mean_prob.item(), stats.mean_label.item()
        (0.625, 0.5)

    References:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    bins = Bins(binning, num_bins, closed)
    check_bins(bins, None)
    probs, labels, where = as_inputs(probs, labels, where, per_voxel=True)
    predicted = probs.argmax(-1, keepdims=True)
    if are_dense(labels, probs):
        hit = jnp.take_along_axis(labels, predicted, axis=-1)
    else:
        hit = (predicted == labels[..., None].astype(predicted.dtype)).astype(jnp.float32)
    return statistics_in_bins(probs.max(-1, keepdims=True), hit, where, bins)


class _BinSums(NamedTuple):
    """What errors depend on, float32 `[*batch, classes, num_bins]`.

    Attributes:
        weight: number of voxels.
        difference: sum of probabilities minus sum of labels. NumPy's sums are subtracted in float64.
        label_sum: sum of labels.
    """

    weight: Array
    difference: Array
    label_sum: Array


def are_counted(stats: BinStatistics | _BinSums) -> Bool[Array, "*batch classes"]:
    """Where an error is defined: at least one bin is filled."""
    return _are_filled(stats).any(-1)


def _are_filled(stats: BinStatistics | _BinSums) -> Bool[Array, "*batch classes bins"]:
    return stats.weight >= _LEAST_WEIGHT


@nan_where_undefined
def _averaged(error: Callable[[_BinSums], Array], stats: BinStatistics, average: Average) -> Array:
    check_choice("average", average, ("none", "macro", "micro"))
    if average == "micro":
        stats = stats.sum(tuple(range(stats.count.ndim - 1)))
    difference, label_sum = stats.prob_sum - stats.label_sum, stats.label_sum
    bins = _BinSums(stats.weight, *(jnp.asarray(x, jnp.float32) for x in (difference, label_sum)))
    return _averaged_bins(error, bins, average)


@functools.partial(jax.jit, static_argnums=(0, 2), inline=True)
def _averaged_bins(error: Callable[[_BinSums], Array], bins: _BinSums, average: Average) -> Array:
    counted, errors = are_counted(bins), error(bins)
    if average == "macro":
        return mean_or_nan(jnp.where(counted, errors, 0).sum(), counted.sum())
    return jnp.where(counted, errors, jnp.nan)


# One error for each image and class. Zero, or anything finite, where no bin is filled.


def _ace(bins: _BinSums) -> Array:
    gaps = _gaps(bins)
    return gaps.sum(-1) / jnp.maximum(_are_filled(bins).sum(-1, dtype=gaps.dtype), 1)


def _ece(bins: _BinSums) -> Array:
    return (_share(bins) * _gaps(bins)).sum(-1)


def _mce(bins: _BinSums) -> Array:
    return _gaps(bins).max(-1)


def _debiased(bins: _BinSums) -> Array:
    gaps, several = _gaps(bins), bins.weight >= 2
    frequency = jnp.where(several, bins.label_sum, 0) / jnp.where(several, bins.weight, 1)
    chance = frequency * (1 - frequency) / jnp.where(several, bins.weight - 1, 1)
    # 0 * gaps, not 0: a NaN must show.
    square = (_share(bins) * jnp.where(several, gaps**2 - chance, 0 * gaps)).sum(-1)
    return jnp.sqrt(jnp.maximum(square, 0))


def _share(bins: _BinSums) -> Array:
    return bins.weight / jnp.maximum(bins.weight.sum(-1, keepdims=True), _LEAST_WEIGHT)


def _gaps(bins: _BinSums) -> Float[Array, "*batch classes bins"]:
    """Gap of each bin, zero in empty ones. The division is safe, so gradients are finite."""
    filled = _are_filled(bins)
    difference = jnp.where(filled, bins.difference, 0)
    # Not abs: its gradient at 0 is 1 in JAX, which would push at bins that are calibrated exactly.
    magnitude = jnp.sign(difference) * difference
    return magnitude / jnp.where(filled, bins.weight, 1)
