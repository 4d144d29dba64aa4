"""Calibrators of single voxels: a known truth, invariance to a shift of the logits, streams, masks, labels kept."""

import chex
import jax
import numpy as np
import pytest

from calib_jax.calibrators import CALIBRATORS
from calib_jax.isotonic import apply_isotonic, fit_isotonic
from calib_jax.metrics import negative_log_likelihood
from calib_jax.scaling import (
    apply_class_temperature,
    apply_dirichlet,
    fit_class_temperature,
    fit_dirichlet,
)

# Local calibration needs images and has tests of its own.
POINTWISE = [name for name in CALIBRATORS if not name.startswith("local")]

pytestmark = pytest.mark.usefixtures("strict_promotion")


def log_softmax(x):
    return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)


def drawn(truth, seed=0, shape=(1, 20_000), classes=3, spread=2.0):
    """Logits, and class ids drawn from the softmax of what `truth` makes of their log-probabilities."""
    rng = np.random.default_rng(seed)
    logits = (spread * rng.standard_normal((*shape, classes))).astype(np.float32)
    ids = (truth(log_softmax(logits.astype(np.float64))) + rng.gumbel(size=logits.shape)).argmax(-1)
    return logits, ids.astype(np.int32)


def halved(log_probs):
    return log_probs / 2


def nll(logits, labels):
    return float(negative_log_likelihood(np.asarray(logits, np.float32), labels).mean())


@pytest.mark.parametrize("name", POINTWISE)
def test_a_halving_of_the_logits_is_found(name):
    """The likelihood on new voxels comes near that of the truth."""
    method = CALIBRATORS[name]
    logits, labels = drawn(halved)
    new, new_labels = drawn(halved, seed=1)
    calibrated = method.apply(new, method.fit([(logits, labels)]))
    best = nll(log_softmax(new / 2), new_labels)
    assert nll(calibrated, new_labels) < best + 0.1 * (nll(new, new_labels) - best)
    if method.keeps_labels:
        np.testing.assert_array_equal(calibrated.argmax(-1), new.argmax(-1))


@pytest.mark.parametrize("name", POINTWISE)
def test_logits_and_log_probabilities_give_the_same_fit(name):
    method = CALIBRATORS[name]
    logits, labels = drawn(halved, shape=(1, 3_000))
    log_probs = np.asarray(log_softmax(logits), np.float32)
    params = method.fit([(logits, labels)])
    chex.assert_trees_all_close(method.fit([(log_probs, labels)]), params, rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_close(
        jax.nn.softmax(method.apply(logits, params)),
        jax.nn.softmax(method.apply(log_probs, params)),
        atol=1e-5,
    )


@pytest.mark.parametrize("name", POINTWISE)
def test_a_stream_with_masks_equals_the_voxels_that_count(name):
    method = CALIBRATORS[name]
    logits, labels = drawn(halved, shape=(2, 1_500))
    keep = np.random.default_rng(2).random(labels.shape) < 0.7
    masked = np.where(keep[..., None], logits, np.nan)
    batches = [(masked[i : i + 1], labels[i : i + 1], keep[i : i + 1]) for i in range(2)]
    chex.assert_trees_all_close(
        method.fit(lambda: iter(batches)),
        method.fit([(logits[keep][None], labels[keep][None])]),
        rtol=2e-3,
        atol=1e-4,
    )


@pytest.mark.parametrize("name", POINTWISE)
def test_application_is_jittable_and_keeps_shape_and_dtype(name):
    method = CALIBRATORS[name]
    logits, labels = drawn(halved, shape=(1, 500))
    params = method.fit([(logits, labels)])
    half = np.asarray(logits, np.float16).reshape(5, 10, 10, 3)
    calibrated = jax.jit(method.apply)(half, params)
    assert (calibrated.shape, calibrated.dtype) == (half.shape, half.dtype)
    assert np.isfinite(calibrated).all()


def test_class_temperatures_of_a_known_truth():
    truth = np.array([1.0, 2.0, 0.5])
    logits, labels = drawn(lambda x: x / truth[x.argmax(-1)][..., None], shape=(1, 100_000))
    np.testing.assert_allclose(fit_class_temperature(logits, labels), truth, rtol=0.05)


def test_a_class_that_is_never_predicted_keeps_its_temperature():
    logits, labels = drawn(halved, shape=(1, 2_000))
    logits[..., 2] = logits.min(-1) - 1
    np.testing.assert_allclose(fit_class_temperature(logits, labels)[2], 1.0, rtol=1e-5)


def test_certain_and_right_voxels_give_finite_temperatures():
    logits, _ = drawn(halved, shape=(1, 500))
    temperatures = fit_class_temperature(logits, logits.argmax(-1).astype(np.int32))
    assert ((temperatures > 1e-4) & (temperatures < 1)).all()


def test_dirichlet_of_a_known_truth():
    weight = np.array([[0.7, 0.2, 0.0], [0.0, 1.1, 0.0], [0.1, 0.0, 0.8]])
    bias = np.array([0.4, 0.0, -0.4])
    logits, labels = drawn(lambda x: x @ weight.T + bias, shape=(1, 100_000))
    new, new_labels = drawn(lambda x: x @ weight.T + bias, seed=1, shape=(1, 100_000))
    found = nll(apply_dirichlet(new, fit_dirichlet(logits, labels)), new_labels)
    truth = nll(log_softmax(new.astype(np.float64)) @ weight.T + bias, new_labels)
    assert truth - 1e-3 < found < truth + 2e-3


def test_isotonic_equals_scikit_learn_s_definition():
    """Two classes, coarse logits: the curve is the isotonic regression of the labels on the probabilities."""
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(3)
    level = rng.integers(-5, 6, 5_000)
    logits = np.stack([np.zeros(5_000), level], -1).astype(np.float32)[None]
    labels = (rng.random(5_000) < 1 / (1 + np.exp(-level / 3))).astype(np.int32)[None]
    share = [labels[0][level == x].mean() for x in range(-5, 6)]
    weight = [np.sum(level == x) for x in range(-5, 6)]
    expected = optimize.isotonic_regression(share, weights=weight).x
    calibrated = jax.nn.softmax(apply_isotonic(logits, fit_isotonic(logits, labels)))[0]
    found = [np.asarray(calibrated)[level == x, 1].mean() for x in range(-5, 6)]
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_isotonic_curves_rise():
    logits, labels = drawn(halved, shape=(1, 2_000))
    curves = np.asarray(fit_isotonic(logits, labels))
    assert (np.diff(curves, axis=1) >= 0).all()
    assert ((curves > 0) & (curves < 1)).all()


X, Y = drawn(halved, shape=(1, 20))
WRONG_CALLS = {
    "temperatures_of_other_classes": (
        lambda: apply_class_temperature(X, np.ones(2, np.float32)),
        r"temperatures must have shape \(3,\)",
    ),
    "a_temperature_of_zero": (lambda: apply_class_temperature(X, np.float32([1, 0, 1])), "positive"),
    "curves_of_other_classes": (lambda: apply_isotonic(X, np.ones((2, 9), np.float32)), r"\[3, cells\]"),
    "isotonic_nan": (lambda: fit_isotonic(X * np.float32(np.nan), Y), "batch 0 are NaN"),
    "isotonic_nothing_counted": (lambda: fit_isotonic(X, Y, where=Y > 5), "no voxel"),
    "dirichlet_nothing_counted": (lambda: fit_dirichlet(X, Y, where=Y > 5), "no voxel"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_wrong_call_says_what_came_and_what_is_accepted(name):
    call, pattern = WRONG_CALLS[name]
    with pytest.raises(ValueError, match=pattern):
        call()
