"""Expected Dice, thresholds that maximise it, and the risk-coverage curve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import calib_jax


def _probs(shape=(2, 6, 7, 5, 3), seed=0):
    logits = 3 * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return np.asarray(jax.nn.softmax(jnp.asarray(logits)))


@pytest.mark.parametrize("masked", [False, True])
def test_expected_dice_equals_its_formula(masked):
    probs = _probs()
    predictions = probs.argmax(-1).astype(np.int32)
    where = np.random.default_rng(1).random(predictions.shape) < 0.5 if masked else None
    found = calib_jax.expected_dice(probs, predictions, where=where)
    for image in range(2):
        for k in range(3):
            keep = np.ones(predictions.shape[1:], bool) if where is None else where[image]
            p, y = probs[image, ..., k][keep].astype(np.float64), predictions[image][keep] == k
            np.testing.assert_allclose(found[image, k], 2 * p[y].sum() / (p.sum() + y.sum()), rtol=1e-6)


def test_expected_dice_is_right_on_average_for_calibrated_probabilities():
    probs = _probs((1, 4000, 3))
    predictions = probs.argmax(-1).astype(np.int32)
    rng = np.random.default_rng(2)
    drawn = (rng.random((200, 4000, 1)) > probs.cumsum(-1)[0, :, :-1]).sum(-1).astype(np.int32)
    dice = calib_jax.dice_score(np.repeat(predictions, 200, 0), drawn, num_classes=3).mean(0)
    np.testing.assert_allclose(calib_jax.expected_dice(probs, predictions)[0], dice, atol=0.003)


def test_expected_dice_of_regions_and_where_it_is_undefined():
    probs = jnp.array([[[0.8, 0.0], [0.3, 0.0]]])
    found = calib_jax.expected_dice(probs, probs > 0.5)
    np.testing.assert_allclose(found, [[1.6 / 2.1, np.nan]], rtol=1e-6)
    with pytest.raises(ValueError, match="labels"):
        calib_jax.expected_dice(probs, jnp.zeros((1, 3), jnp.int32))


def test_threshold_maximises_expected_dice():
    probs = np.random.default_rng(3).beta(0.3, 1, (2, 500, 2)).astype(np.float32)
    stats = calib_jax.bin_statistics(probs, np.zeros((2, 500), np.int32), num_bins=100)
    found = np.asarray(jax.jit(calib_jax.dice_thresholds)(stats))
    for image in range(2):
        for k in range(2):
            p = probs[image, :, k].astype(np.float64)

            def expected(threshold, p=p):
                return 2 * p[p > threshold].sum() / (p.sum() + (p > threshold).sum())

            best = max(expected(edge) for edge in calib_jax.bin_edges(100)[:-1])
            assert expected(found[image, k]) == pytest.approx(best, rel=1e-6)
            assert found[image, k] == pytest.approx(best / 2, abs=0.011)


def test_threshold_of_a_class_without_probabilities_is_nan():
    probs = jnp.full((1, 4, 2), 0.5).at[..., 1].set(0.7)
    stats = calib_jax.bin_statistics(probs, jnp.zeros((1, 4), jnp.int32), where=jnp.zeros((1, 4), bool))
    assert np.isnan(calib_jax.dice_thresholds(stats)).all()


def test_risk_coverage():
    rng = np.random.default_rng(4)
    risk = rng.random(30).astype(np.float32)
    perfect, useless = calib_jax.risk_coverage(-risk, risk), calib_jax.risk_coverage(risk, risk)
    np.testing.assert_allclose(perfect.risk, np.sort(risk).cumsum() / np.arange(1, 31), rtol=1e-5)
    assert perfect.area < calib_jax.risk_coverage(rng.random(30), risk).area < useless.area
    assert perfect.risk[-1] == pytest.approx(risk.mean(), rel=1e-5)
    np.testing.assert_allclose(perfect.coverage, np.arange(1, 31) / 30, rtol=1e-6)
    with pytest.raises(ValueError, match="one number for each case"):
        calib_jax.risk_coverage(risk, risk[:-1])


def test_volume_interval_holds_new_cases_as_often_as_its_level_says():
    rng = np.random.default_rng(0)
    expected = rng.uniform(1, 9, (2000, 40)).astype(np.float32)
    true = expected * rng.lognormal(0.2, 0.3, expected.shape).astype(np.float32)  # 20% larger than expected
    find = jax.jit(jax.vmap(lambda *volumes: calib_jax.volume_interval(*volumes, level=0.8)))
    low, high = find(expected[:, 0], expected[:, 1:], true[:, 1:])
    held = (low <= true[:, 0]) & (true[:, 0] <= high)
    np.testing.assert_allclose(held.mean(), 0.8, atol=0.03)  # three standard errors are 0.027
    np.testing.assert_allclose((low > true[:, 0]).mean(), 0.1, atol=0.025)


@pytest.mark.parametrize(("cases", "level", "needed"), [(18, 0.9, "19"), (38, 0.95, "39"), (50, 1.0, "inf")])
def test_volume_interval_says_how_many_cases_a_level_needs(cases, level, needed):
    ones = jnp.ones(cases)
    with pytest.raises(ValueError, match=f"needs {needed} cases with labels; got {cases}"):
        calib_jax.volume_interval(ones, ones, ones, level=level)
    if level < 1:
        more = jnp.ones(cases + 1)
        assert calib_jax.volume_interval(ones, more, more, level=level)[0].shape == (cases,)


def test_volume_interval_refuses_volumes_of_other_cases():
    with pytest.raises(ValueError, match="one volume for each case"):
        calib_jax.volume_interval(jnp.ones(3), jnp.ones(20), jnp.ones(19))
