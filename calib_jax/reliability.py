"""Reliability curves and dataset reliability histograms, as arrays."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray

from calib_jax._checks import AnyArray
from calib_jax._eager import nan_where_undefined
from calib_jax.binning import BinStatistics, bin_index
from calib_jax.bootstrap import bootstrap_interval


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReliabilityCurve:
    """Points of a reliability diagram: bins of all images pooled, `[classes, num_bins]` each.

    Attributes:
        mean_prob: mean predicted probability; NaN in empty bins.
        mean_label: observed frequency; NaN in empty bins.
        count: voxels; float32 if summed on the device, see `BinStatistics.sum`.
    """

    mean_prob: Float[Array, "classes bins"]
    mean_label: Float[Array, "classes bins"]
    count: Num[AnyArray, "classes bins"]


def reliability_curve(stats: BinStatistics) -> ReliabilityCurve:
    """Observed frequency against predicted probability, over the pooled voxels of all images.

    Args:
        stats: bin statistics `[batch, classes, num_bins]`.

    Returns:
        `ReliabilityCurve` of shape `[classes, num_bins]`.

    Example:
        >>> from calib_jax import bin_statistics
        >>> stats = bin_statistics(jnp.array([[[0.1], [0.8]]]), jnp.array([[[0], [1]]]), num_bins=2)
        >>> reliability_curve(stats).mean_label.tolist()
        [[0.0, 1.0]]

    References:
        Niculescu-Mizil and Caruana, "Predicting Good Probabilities with Supervised Learning", ICML 2005.
    """
    pooled = stats.sum(axis=0)
    return ReliabilityCurve(pooled.mean_prob, pooled.mean_label, pooled.count)


def reliability_band(
    key: PRNGKeyArray, stats: BinStatistics, *, num_resamples: int = 1000, level: float = 0.95
) -> tuple[Float[Array, "classes bins"], Float[Array, "classes bins"]]:
    """Bootstrap interval of the observed frequencies of `reliability_curve`; images are resampled.

    Args:
        key: random key.
        stats: bin statistics `[batch, classes, num_bins]`, one row per image.
        num_resamples: number of resamples.
        level: coverage in each bin.

    Returns:
        `(low, high)` of the observed frequency, `[classes, num_bins]` each; NaN in empty bins.

    Raises:
        ValueError: on options that do not fit, see `calib_jax.bootstrap_interval`.

    Example:
        >>> from calib_jax import bin_statistics
        >>> stats = bin_statistics(jnp.full((4, 1, 1), 0.7), jnp.array([[[0]], [[1]], [[1]], [[1]]]), num_bins=1)
        >>> low, high = reliability_band(jax.random.key(0), stats)
        >>> low.item(), high.item()
        (0.25, 1.0)

    References:
        Broecker and Smith, "Increasing the Reliability of Reliability Diagrams", 2007.
    """

    def frequency(stats: BinStatistics) -> Array:
        return reliability_curve(stats).mean_label

    return bootstrap_interval(key, stats, frequency, num_resamples=num_resamples, level=level)


@nan_where_undefined
def reliability_histogram(stats: BinStatistics) -> Int[Array, "classes frequency_bins prob_bins"]:
    """Dataset reliability histogram: the number of images with each observed frequency in each probability bin.

    The reliability diagram of one image is a curve. This histogram counts the curves of a data set on a grid of
    `num_bins` frequencies by `num_bins` probabilities. A well calibrated model has its mass on the diagonal. The
    spread across images, which pooling hides, is visible.

    Args:
        stats: bin statistics `[batch, classes, num_bins]`, one row per image.

    Returns:
        Numbers of images, int32 `[classes, frequency bin, probability bin]`. Empty bins of an image are not
        counted.

    Example:
        >>> from calib_jax import bin_statistics
        >>> stats = bin_statistics(jnp.array([[[0.1], [0.8]]]), jnp.array([[[0], [1]]]), num_bins=2)
        >>> reliability_histogram(stats).tolist()
        [[[1, 0], [0, 1]]]

    References:
        Barfoot et al., arXiv 2403.06759, "dataset reliability histograms".
    """
    frequency = jnp.asarray(stats.mean_label)
    frequency_bin = bin_index(frequency, num_bins=stats.num_bins)
    grid = jnp.arange(stats.num_bins, dtype=jnp.int32)
    hit = (frequency_bin[..., None, :] == grid[None, None, :, None]) & ~jnp.isnan(frequency)[..., None, :]
    return hit.sum(axis=0, dtype=jnp.int32)
