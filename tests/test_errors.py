"""ACE, ECE and MCE: by hand, beside the twin, on calibrated draws and on distortions whose error is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import twin

from calib_jax import (
    BinStatistics,
    average_calibration_error,
    bin_statistics,
    debiased_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
    top_label_statistics,
)

pytestmark = pytest.mark.usefixtures("strict_promotion")

ERRORS = {
    "ace": average_calibration_error,
    "ece": expected_calibration_error,
    "mce": maximum_calibration_error,
}
statistics = jax.jit(bin_statistics)


@jax.jit
def all_errors(stats):
    return {kind: error(stats) for kind, error in ERRORS.items()}


def by_hand():
    """Gaps 0.1, empty, 0.3 and 0.25 of 10, 0, 5 and 5 voxels; then nothing at all; then one full bin."""
    count = np.int32([[[10, 0, 5, 5], [0, 0, 0, 0], [0, 0, 0, 8]]])
    prob_sum = np.float32([[[1.0, 0.0, 3.0, 4.5], [0, 0, 0, 0], [0, 0, 0, 7.0]]])
    label_sum = np.float32([[[2.0, 0.0, 1.5, 3.25], [0, 0, 0, 0], [0, 0, 0, 8.0]]])
    return BinStatistics(count, prob_sum, label_sum)


def test_errors_by_hand():
    errors = all_errors(by_hand())
    np.testing.assert_allclose(errors["ace"], [[(0.1 + 0.3 + 0.25) / 3, np.nan, 0.125]], rtol=1e-6)
    np.testing.assert_allclose(
        errors["ece"], [[0.1 * 0.5 + 0.3 * 0.25 + 0.25 * 0.25, np.nan, 0.125]], rtol=1e-6
    )
    np.testing.assert_allclose(errors["mce"], [[0.3, np.nan, 0.125]], rtol=1e-6)


@pytest.mark.parametrize("form", twin.LABEL_FORMS)
def test_errors_equal_the_twin(form):
    probs, labels = twin.sample_probs(31), twin.sample_labels(form)
    errors = all_errors(statistics(probs, labels))
    for kind in ERRORS:
        expected = twin.errors(twin.bin_statistics(probs, labels), kind)
        np.testing.assert_allclose(errors[kind], expected, atol=1e-6)


def test_errors_are_ordered_and_between_zero_and_one():
    errors = all_errors(statistics(twin.sample_probs(31), twin.sample_labels("ids")))
    for kind in ("ace", "ece"):
        assert (errors[kind] > 0).all()
        assert (errors[kind] <= errors["mce"] + 1e-7).all()
    assert (errors["mce"] <= 1).all()


def test_nan_probability_gives_nan_for_its_image_and_class():
    probs = twin.sample_probs(31)
    probs[0, 1, 1, 2] = np.nan
    nan = np.array([[False, False, True], [False] * 3])
    for error in all_errors(statistics(probs, twin.sample_labels("ids"))).values():
        np.testing.assert_array_equal(np.isnan(error), nan)


def test_pooled_statistics_have_no_batch_axis():
    stats = statistics(twin.sample_probs(31), twin.sample_labels("ids"))
    for kind, error in ERRORS.items():
        np.testing.assert_allclose(error(stats.sum()), all_errors(stats.sum())[kind], rtol=1e-6)
        assert error(stats.sum()).shape == (3,)


def test_error_of_the_pool_is_not_the_mean_of_errors():
    """Opposite gaps of two images cancel in the pool and not in the mean."""
    count = np.full((2, 1, 1), 10, np.int32)
    stats = BinStatistics(count, np.full((2, 1, 1), 5, np.float32), np.float32([7, 3]).reshape(2, 1, 1))
    np.testing.assert_allclose(average_calibration_error(stats), [[0.2], [0.2]], rtol=1e-6)
    np.testing.assert_allclose(average_calibration_error(stats.sum()), [0], atol=1e-6)


def test_counts_of_a_whole_data_set_do_not_overflow():
    """NumPy counts beyond int32, as they add up over a few hundred CT volumes."""
    count = np.int64([[3 * 2**31, 2**31]])
    stats = BinStatistics(count, 0.25 * count, 0.5 * count)
    for kind, error in ERRORS.items():
        np.testing.assert_allclose(error(stats), [0.25], rtol=1e-6, err_msg=kind)


@pytest.mark.parametrize("kind", ERRORS)
def test_gradient_is_finite_with_empty_bins_and_zero_gaps(kind):
    def total(prob_sum, label_sum):
        stats = BinStatistics(jnp.asarray(by_hand().count), prob_sum, label_sum)
        return jnp.nansum(ERRORS[kind](stats))

    stats = by_hand()
    for label_sum in (stats.label_sum, stats.prob_sum):
        for gradient in jax.grad(total, argnums=(0, 1))(jnp.asarray(stats.prob_sum), jnp.asarray(label_sum)):
            assert np.isfinite(gradient).all()
            np.testing.assert_array_equal(np.asarray(gradient)[stats.count == 0], 0)


def test_no_gradient_where_mean_and_frequency_agree():
    """sign(0) is 0: a bin that is calibrated exactly is left alone."""
    stats = by_hand()

    def total(prob_sum):
        return jnp.nansum(average_calibration_error(BinStatistics(stats.count, prob_sum, stats.prob_sum)))

    np.testing.assert_array_equal(jax.grad(total)(jnp.asarray(stats.prob_sum)), np.zeros_like(stats.prob_sum))


# Statistics and calculus

SAMPLES = 4**8


@functools.cache
def calibrated_draws():
    """Sixteen images of uniform probabilities, one channel of labels drawn with just these probabilities."""
    rng = np.random.default_rng(33)
    probs = rng.random((16, SAMPLES, 1), np.float32)
    return probs, (rng.random(probs.shape) < probs).astype(np.float32)


def test_error_of_calibrated_draws_falls_with_the_root_of_their_number():
    """Bins of n draws differ from their frequency by sqrt(p (1 - p) / n): E|gap| follows, and so does ACE."""
    probs, labels = calibrated_draws()
    for samples in (SAMPLES, SAMPLES // 16, SAMPLES // 256):
        where = np.arange(SAMPLES)[None] < np.full((16, 1), samples)
        ace = float(average_calibration_error(statistics(probs, labels, where=where)).mean())
        expected = np.sqrt(2 / np.pi) * np.pi / 8 * np.sqrt(20 / samples)
        assert 0.8 * expected < ace < 1.2 * expected, (samples, ace, expected)


def test_unlike_distributions_of_equal_calibration_have_no_error():
    """Every bin calibrated exactly: soft labels equal to the probabilities."""
    probs, _ = calibrated_draws()
    for error in all_errors(statistics(probs, probs)).values():
        np.testing.assert_array_equal(error, np.zeros((16, 1)))


DISTORTIONS = {
    # True frequency q(p) of uniform p -> integral of |p - q|, and the largest mean of |p - q| over a bin.
    "square": (lambda p: p**2, 1 / 6, 0.25 - 0.05**2 / 3),
    "halved": (lambda p: p / 2, 1 / 4, 0.4875),
    "shrunk_to_the_middle": (lambda p: 0.25 + p / 2, 1 / 8, 0.2375),
    "constant": (lambda p: np.full_like(p, 0.5), 1 / 4, 0.475),
}


@pytest.mark.parametrize("name", DISTORTIONS)
def test_error_of_a_known_distortion_is_its_integral(name):
    distort, integral, largest = DISTORTIONS[name]
    grid = ((np.arange(SAMPLES) + 0.5) / SAMPLES).astype(np.float32)
    probs = np.broadcast_to(grid[None, :, None], (16, SAMPLES, 1))
    errors = all_errors(statistics(probs, distort(probs)))
    for kind, expected in {"ece": integral, "ace": integral, "mce": largest}.items():
        np.testing.assert_allclose(errors[kind], np.full((16, 1), expected), atol=2e-4, err_msg=kind)


def test_error_of_drawn_labels_nears_the_integral():
    probs, _ = calibrated_draws()
    labels = (np.random.default_rng(34).random(probs.shape) < probs**2).astype(np.float32)
    errors = all_errors(statistics(probs, labels))
    assert abs(float(errors["ece"].mean()) - 1 / 6) < 2e-3
    assert abs(float(errors["ace"].mean()) - 1 / 6) < 2e-3


def test_ece_weighs_by_voxels_and_ace_by_bins():
    """Probabilities that are uniform in their square: density 2p. ECE integrates |p - q| 2p, ACE just |p - q|."""
    grid = np.sqrt((np.arange(SAMPLES) + 0.5) / SAMPLES).astype(np.float32)
    probs = np.broadcast_to(grid[None, :, None], (16, SAMPLES, 1))
    errors = all_errors(statistics(probs, probs**2))
    np.testing.assert_allclose(errors["ece"], np.full((16, 1), 2 / 3 - 2 / 4), atol=2e-4)
    centres = np.arange(20) / 20 + 1 / 40
    means = centres + (1 / 20) ** 2 / (12 * centres)
    squares = centres**2 + (1 / 20) ** 2 / 4
    np.testing.assert_allclose(errors["ace"], np.full((16, 1), (means - squares).mean()), atol=2e-4)


# Averages over images and classes, the debiased error, the predicted class alone.


def test_macro_is_the_mean_of_what_was_counted_and_micro_pools_it():
    stats = by_hand()
    for kind, error in ERRORS.items():
        per_class = error(stats)
        np.testing.assert_allclose(
            error(stats, average="macro"), np.nanmean(per_class), rtol=1e-6, err_msg=kind
        )
        pooled = BinStatistics(*(np.asarray(x).sum((0, 1), keepdims=True) for x in jax.tree.leaves(stats)))
        np.testing.assert_allclose(
            error(stats, average="micro"), error(pooled)[0, 0], rtol=1e-6, err_msg=kind
        )


def test_averages_of_nothing_are_nan_and_nan_is_not_averaged_away():
    zeros = np.zeros((2, 1, 4), np.float32)
    nothing = BinStatistics(zeros.astype(np.int32), zeros, zeros)
    broken = by_hand()
    broken.prob_sum[0, 0, 0] = np.nan
    for error in ERRORS.values():
        for average in ("macro", "micro"):
            assert np.isnan(error(nothing, average=average))
            assert np.isnan(error(broken, average=average))


def test_classwise_ece_is_the_mean_over_classes_of_pooled_images():
    rng = np.random.default_rng(40)
    probs = rng.dirichlet(np.ones(3), (4, 300)).astype(np.float32)
    labels = rng.integers(0, 3, (4, 300)).astype(np.int32)
    stats = statistics(probs, labels)
    pooled = twin.errors(twin.bin_statistics(probs.reshape(1, -1, 3), labels.reshape(1, -1)), "ece")
    classwise = expected_calibration_error(stats.sum(), average="macro")
    np.testing.assert_allclose(classwise, pooled.mean(), rtol=1e-5)


def test_an_unknown_average_is_refused():
    with pytest.raises(ValueError, match="average must be one of 'none', 'macro', 'micro'; got 'weighted'"):
        average_calibration_error(by_hand(), average="weighted")


def debiased_by_hand(count, prob_sum, label_sum):
    total, square = count.sum(), 0.0
    for n, p, y in zip(count, prob_sum, label_sum, strict=True):
        if n >= 2:
            mean = y / n
            square += n / total * ((p / n - mean) ** 2 - mean * (1 - mean) / (n - 1))
    return np.sqrt(max(square, 0.0))


def test_debiased_error_by_hand():
    stats = BinStatistics(
        np.int32([[[10, 1, 5, 5], [0, 0, 0, 0], [1, 0, 0, 0]]]),
        np.float32([[[1.0, 0.2, 3.0, 4.5], [0, 0, 0, 0], [0.1, 0, 0, 0]]]),
        np.float32([[[2.0, 0.0, 1.0, 1.0], [0, 0, 0, 0], [1.0, 0, 0, 0]]]),
    )
    errors = debiased_calibration_error(stats)
    by_hand = [debiased_by_hand(*(np.float64(x[0, 0]) for x in jax.tree.leaves(stats))), np.nan, 0.0]
    np.testing.assert_allclose(errors[0], by_hand, rtol=1e-5)


def test_debiased_error_of_small_calibrated_samples_is_near_zero_where_the_plain_one_is_not():
    """2,000 samples of 100 voxels drawn from their own probabilities: on average the squares cancel."""
    rng = np.random.default_rng(41)
    probs = rng.random((2000, 100, 1), np.float32)
    stats = statistics(probs, (rng.random(probs.shape) < probs).astype(np.float32))
    share = stats.weight / stats.weight.sum(-1, keepdims=True)
    gaps = np.nan_to_num(stats.mean_prob - stats.mean_label)
    plain = np.asarray((share * gaps**2).sum(-1))
    frequency, n = np.nan_to_num(stats.mean_label), np.asarray(stats.weight)
    chance = np.where(n >= 2, frequency * (1 - frequency) / np.maximum(n - 1, 1), gaps**2)
    unclipped = plain - np.asarray((share * chance).sum(-1))
    assert plain.mean() > 0.025
    assert abs(unclipped.mean()) < 0.003
    np.testing.assert_allclose(
        debiased_calibration_error(stats), np.sqrt(np.maximum(unclipped, 0)), atol=2e-3
    )


def test_top_label_statistics_hold_the_predicted_class_alone():
    rng = np.random.default_rng(42)
    probs = rng.dirichlet(np.ones(4), (2, 6, 5)).astype(np.float32)
    ids = rng.integers(0, 4, (2, 6, 5)).astype(np.int32)
    where = rng.random((2, 6, 5)) < 0.6
    expected = statistics(
        probs.max(-1, keepdims=True), (probs.argmax(-1) == ids).astype(np.float32)[..., None], where=where
    )
    for labels in (ids, np.eye(4, dtype=np.float32)[ids]):
        stats = jax.jit(top_label_statistics)(probs, labels, where=where)
        assert stats.count.shape == (2, 1, 20)
        jax.tree.map(np.testing.assert_array_equal, stats, expected)
    with pytest.raises(ValueError, match="where must have shape"):
        top_label_statistics(probs, ids, where=np.ones(probs.shape, bool))
