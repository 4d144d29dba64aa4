"""Calibration errors from bin statistics: average (ACE), expected (ECE) and maximum (MCE).

All three summarise the same gaps, |mean probability - observed frequency| of each non-empty bin; they differ
in what they do with them: ACE averages them, ECE weighs them by the bins' counts, MCE takes the largest.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from calib_jax.binning import BinStatistics

# Bins with less weight count as empty. Soft bins share voxels, so that a bin may hold a trace of one.
_LEAST_WEIGHT = 0.01


def average_calibration_error(stats: BinStatistics) -> Float[Array, "*batch classes"]:
    """Mean gap over non-empty bins, all bins alike: ACE = 1/M * sum_m |prob_m - label_m|.

    Args:
        stats: bin statistics `[*batch, classes, num_bins]`.

    Returns:
        The error of each image and class, in [0, 1]; NaN where nothing was counted or a probability was NaN.

    Example:
        >>> from calib_jax import bin_statistics
        >>> stats = bin_statistics(jnp.array([[[0.1], [0.8]]]), jnp.array([[[0], [1]]]), num_bins=2)
        >>> round(float(average_calibration_error(stats)[0, 0]), 4)
        0.15

    References:
        Neumann et al., "Relaxed Softmax: Efficient Confidence Auto-Calibration for Safe Pedestrian Detection",
        2018; Barfoot et al., arXiv 2403.06759.
    """
    gaps, filled = _gaps(stats)
    return _nan_unless(filled, gaps.sum(-1) / jnp.maximum(filled.sum(-1, dtype=gaps.dtype), 1))


def expected_calibration_error(stats: BinStatistics) -> Float[Array, "*batch classes"]:
    """Mean gap over voxels: ECE = sum_m count_m / count * |prob_m - label_m|.

    Args:
        stats: bin statistics `[*batch, classes, num_bins]`.

    Returns:
        The error of each image and class, in [0, 1]; NaN where nothing was counted or a probability was NaN.

    Example:
        >>> from calib_jax import bin_statistics
        >>> probs = jnp.array([[[0.1], [0.8], [0.8], [0.8]]])
        >>> stats = bin_statistics(probs, jnp.array([[[0], [1], [1], [1]]]), num_bins=2)
        >>> round(float(expected_calibration_error(stats)[0, 0]), 4)
        0.175

    References:
        Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI 2015.
    """
    gaps, filled = _gaps(stats)
    share = stats.weight / jnp.maximum(stats.weight.sum(-1, keepdims=True), 1)
    return _nan_unless(filled, (share * gaps).sum(-1))


def maximum_calibration_error(stats: BinStatistics) -> Float[Array, "*batch classes"]:
    """Largest gap over non-empty bins: MCE = max_m |prob_m - label_m|.

    Args:
        stats: bin statistics `[*batch, classes, num_bins]`.

    Returns:
        The error of each image and class, in [0, 1]; NaN where nothing was counted or a probability was NaN.

    Example:
        >>> from calib_jax import bin_statistics
        >>> stats = bin_statistics(jnp.array([[[0.1], [0.8]]]), jnp.array([[[0], [1]]]), num_bins=2)
        >>> round(float(maximum_calibration_error(stats)[0, 0]), 4)
        0.2

    References:
        Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI 2015.
    """
    gaps, filled = _gaps(stats)
    return _nan_unless(filled, gaps.max(-1))


def _gaps(
    stats: BinStatistics,
) -> tuple[Float[Array, "*batch classes bins"], Bool[Array, "*batch classes bins"]]:
    """Gap of each bin, zero in empty ones, and which bins are filled. Divides safely, so gradients are finite."""
    filled = stats.weight >= _LEAST_WEIGHT
    difference = jnp.where(filled, jnp.asarray(stats.prob_sum - stats.label_sum, jnp.float32), 0)
    # Not abs: its gradient at 0 is 1 in JAX, which would push at bins that are calibrated exactly.
    magnitude = jnp.sign(difference) * difference
    return magnitude / jnp.where(filled, stats.weight, 1), filled


def _nan_unless(filled: Array, error: Array) -> Array:
    return jnp.where(filled.any(-1), error, jnp.nan)
