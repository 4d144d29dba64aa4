"""Bootstrap intervals over cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats as scipy_stats

from calib_jax import (
    BinStatistics,
    average_calibration_error,
    bin_statistics,
    bootstrap_interval,
    reliability_band,
    reliability_curve,
)

pytestmark = pytest.mark.usefixtures("strict_promotion")
KEY = jax.random.key(0)


def test_interval_of_a_mean_is_scipys():
    values = np.random.default_rng(0).gamma(2.0, 0.05, 60).astype(np.float32)
    low, high = bootstrap_interval(KEY, values, jnp.mean, num_resamples=20000)
    theirs = scipy_stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20000, rng=0)
    np.testing.assert_allclose([low, high], theirs.confidence_interval, atol=6e-4)


def test_level_is_the_coverage():
    """Of 300 samples of 40 normal numbers, the interval of about 80% holds the true mean 0."""
    samples = np.random.default_rng(1).standard_normal((300, 40)).astype(np.float32)
    intervals = jax.jit(
        jax.vmap(lambda key, x: bootstrap_interval(key, x, jnp.mean, num_resamples=400, level=0.8))
    )
    low, high = intervals(jax.random.split(KEY, 300), samples)
    covered = np.mean((np.asarray(low) < 0) & (np.asarray(high) > 0))
    assert 0.71 < covered < 0.86  # percentile intervals of small samples are a little too short


def test_pytrees_of_cases_and_of_results():
    probs = np.random.default_rng(2).random((8, 50, 2), np.float32)
    stats = bin_statistics(probs, (probs > 0.4).astype(np.float32), num_bins=5)

    def summary(stats):
        return {
            "pooled": average_calibration_error(stats.sum()),
            "macro": average_calibration_error(stats).mean(),
        }

    low, high = jax.jit(lambda s: bootstrap_interval(KEY, s, summary, num_resamples=200))(stats)
    value = summary(stats)
    assert low["pooled"].shape == (2,)
    for name in value:
        assert (low[name] <= value[name]).all()
        assert (value[name] <= high[name]).all()


def test_cases_are_drawn_and_not_voxels():
    """One case of a million voxels and nine of one voxel: what the interval spans is the choice of cases."""
    count = np.array([1_000_000] + [1] * 9)[:, None, None]
    label_sum = np.where(count > 1, 0, 1).astype(np.float32)
    stats = BinStatistics(count, 0.5 * count.astype(np.float32), label_sum)
    low, high = reliability_band(KEY, stats)
    assert low[0, 0] < 1e-4
    assert high[0, 0] == 1


def test_band_holds_the_curve_and_leaves_empty_bins_out():
    probs = np.random.default_rng(3).random((12, 200, 1), np.float32) * np.float32(0.5)
    labels = (np.random.default_rng(4).random(probs.shape) < probs).astype(np.float32)
    stats = bin_statistics(probs, labels, num_bins=10)
    low, high = reliability_band(KEY, stats)
    curve = reliability_curve(stats)
    assert low.shape == (1, 10)
    assert (low[:, :5] < curve.mean_label[:, :5]).all()
    assert (curve.mean_label[:, :5] < high[:, :5]).all()
    assert np.isnan(low[:, 5:]).all()
    assert np.isnan(high[:, 5:]).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"level": 1.0}, "level"), ({"level": 0}, "level"), ({"num_resamples": 0}, "num_resamples")],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        bootstrap_interval(KEY, np.ones(4, np.float32), jnp.mean, **options)


def test_no_case_is_refused():
    with pytest.raises(ValueError, match="cases"):
        bootstrap_interval(KEY, np.ones((0, 2), np.float32), jnp.mean)
