"""Local calibration: a known truth, labels kept, invariances, streams, slabs, errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calib_jax import _local_network as network
from calib_jax import average_calibration_error, bin_statistics
from calib_jax.local_calibration import apply_local_calibration, fit_local_calibration
from calib_jax.metrics import negative_log_likelihood

pytestmark = pytest.mark.usefixtures("strict_promotion")


def overconfident(seed, size=(24, 24), images=1, classes=3, factor=4.0):
    """Smooth logits, labels drawn from their softmax, and the logits times a factor that is 1 far from borders."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    fields = rng.standard_normal((images, *size, classes))
    truth = 12 * gaussian_filter(fields, (0, *(3,) * len(size), 0))
    truth = 3 * truth / truth.std()
    labels = (truth + rng.gumbel(size=truth.shape)).argmax(-1).astype(np.int32)
    return (factor * truth).astype(np.float32), labels


def ace(logits, labels):
    stats = bin_statistics(np.asarray(jax.nn.softmax(logits)), labels)
    return float(np.nanmean(average_calibration_error(stats)))


@pytest.fixture(scope="module")
def fitted():
    """Cases and the calibrations that are fitted to them, by whether labels are kept."""
    logits, labels = overconfident(0, images=6)
    return (
        logits,
        labels,
        {
            keeps: fit_local_calibration(logits, labels, keeps_labels=keeps, max_steps=100)
            for keeps in (True, False)
        },
    )


@pytest.mark.parametrize("keeps", [True, False])
def test_new_images_become_calibrated(fitted, keeps):
    new, labels = overconfident(1, images=6)
    calibrated = apply_local_calibration(new, fitted[2][keeps])
    assert ace(calibrated, labels) < 0.6 * ace(new, labels)
    before, after = (negative_log_likelihood(np.asarray(x), labels).mean() for x in (new, calibrated))
    assert after < 0.6 * before


def test_every_label_is_kept(fitted):
    new, _ = overconfident(2, images=2)
    calibrated = apply_local_calibration(new, fitted[2][True])
    np.testing.assert_array_equal(calibrated.argmax(-1), new.argmax(-1))
    np.testing.assert_array_equal(jax.nn.softmax(calibrated).argmax(-1), new.argmax(-1))


def test_logits_probabilities_and_half_precision_give_nearly_the_same(fitted):
    new, _ = overconfident(3)
    probs = np.asarray(jax.nn.softmax(new))
    expected = jax.nn.softmax(apply_local_calibration(new, fitted[2][True]))
    with np.errstate(divide="ignore"):  # a probability of 0 is a logit of -inf
        for x in (np.log(probs), np.log(probs.astype(np.float16).astype(np.float32))):
            calibrated = apply_local_calibration(x, fitted[2][True])
            chex.assert_trees_all_close(jax.nn.softmax(calibrated), expected, atol=0.02)
    shifted = apply_local_calibration(new + np.float32(5), fitted[2][True])
    chex.assert_trees_all_close(jax.nn.softmax(shifted), expected, atol=1e-3)


@pytest.mark.parametrize("size", [(24, 24), (9, 40, 6)])
def test_jit_slabs_and_padding_give_the_same(fitted, size, monkeypatch):
    logits, _ = overconfident(4, size=size, images=2)
    whole = jax.jit(apply_local_calibration)(logits, fitted[2][False])
    chex.assert_trees_all_close(apply_local_calibration(logits, fitted[2][False]), whole, atol=2e-4)
    monkeypatch.setattr(network, "_SLAB", 1)  # as many slabs as there can be
    chex.assert_trees_all_close(apply_local_calibration(logits, fitted[2][False]), whole, atol=2e-4)


def test_slabs_of_a_long_image_give_the_same(fitted, monkeypatch):
    logits, _ = overconfident(5, size=(100, 6))
    whole = apply_local_calibration(logits, fitted[2][False])
    monkeypatch.setattr(network, "_SLAB", 1)
    assert len(list(network.blocks(logits[0], None, False))) > 3
    chex.assert_trees_all_close(apply_local_calibration(logits, fitted[2][False]), whole, atol=2e-4)


def test_certain_voxels_stay_and_nan_reaches_no_other_voxel(fitted):
    logits = np.tile(np.float32([20, 0, 0]), (1, 30, 30, 1))
    logits[0, :4] = 0
    logits[0, 29, 29] = np.nan
    calibrated = np.asarray(apply_local_calibration(logits, fitted[2][False]))
    np.testing.assert_array_equal(calibrated[0, 20:], logits[0, 20:])
    assert np.isfinite(calibrated[0, :29]).all()
    assert not np.array_equal(calibrated[0, :4], logits[0, :4])


def test_the_same_seed_gives_the_same_fit_and_a_stream_equals_arrays(fitted):
    logits, labels, found = fitted
    batches = [(logits[i : i + 1], labels[i : i + 1]) for i in range(6)]
    again = fit_local_calibration(lambda: iter(batches), max_steps=100)
    chex.assert_trees_all_equal(again, found[True])


def test_masked_voxels_and_ids_outside_the_classes_do_not_count():
    logits, labels = overconfident(6, images=6)
    where = np.random.default_rng(6).random(labels.shape) < 0.8
    expected = fit_local_calibration(logits, labels, where=where, max_steps=50)
    outside = np.where(where, labels, 99).astype(np.int32)
    chex.assert_trees_all_equal(fit_local_calibration(logits, outside, max_steps=50), expected)


def test_regions_images_and_soft_labels():
    logits, labels = overconfident(7, images=4, classes=2)
    odds = logits[..., 1:] - logits[..., :1]
    image = np.random.default_rng(7).normal(100, 20, (4, 24, 24, 2)).astype(np.float32)
    regions = (labels[..., None] == 1).astype(np.float32)
    params = fit_local_calibration(odds, regions, image=image, regions=True, max_steps=100)
    calibrated = apply_local_calibration(odds, params, image=image)
    np.testing.assert_array_equal(calibrated > 0, odds > 0)
    losses = [np.logaddexp(0, np.where(regions > 0, -x, x)).mean() for x in (odds, np.asarray(calibrated))]
    assert losses[1] < 0.8 * losses[0]
    in_jit = jax.jit(apply_local_calibration)(odds, params, image=image)
    chex.assert_trees_all_close(in_jit, calibrated, rtol=1e-3, atol=1e-3)
    brighter = apply_local_calibration(odds, params, image=2 * image + 7)
    chex.assert_trees_all_close(brighter, calibrated, rtol=1e-3, atol=1e-3)


def test_a_coarse_axis_takes_no_part_in_fine_smoothing():
    weights = network._first_weights(jax.random.key(0), 3, 0)
    weights = weights._replace(factor=jnp.linspace(-1, 1, len(weights.factor), dtype=jnp.float32))
    logits, _ = overconfident(8, size=(12, 12, 3))
    changed = logits.copy()
    changed[:, :, :, 2] = 0

    def first_planes(spacing):
        params = network.LocalCalibration(weights, True, False, spacing)
        return [np.asarray(apply_local_calibration(x, params))[..., 0, :] for x in (logits, changed)]

    np.testing.assert_allclose(*first_planes((1.0, 1.0, 10.0)), atol=1e-5)
    assert not np.allclose(*first_planes(()), atol=1e-2)


def test_nothing_to_gain_leaves_the_probabilities_and_warns():
    rng = np.random.default_rng(9)
    logits = np.zeros((6, 24, 24, 3), np.float32)
    labels = rng.integers(0, 3, (6, 24, 24), dtype=np.int32)
    with pytest.warns(RuntimeWarning, match="does not help.*left out is"):
        params = fit_local_calibration(logits, labels, max_steps=50)
    chex.assert_trees_all_close(
        jax.nn.softmax(apply_local_calibration(logits, params)), np.full(logits.shape, 1 / 3)
    )


def test_an_image_that_says_nothing_is_not_used():
    logits, labels = overconfident(13, images=4)
    image = np.random.default_rng(0).normal(size=(*labels.shape, 1)).astype(np.float32)
    params = fit_local_calibration(logits, labels, image=image, max_steps=50)
    assert not np.any(params.weights.image)


def test_one_image_warns():
    logits, labels = overconfident(10)
    with pytest.warns(RuntimeWarning, match="one image"):
        fit_local_calibration(logits, labels, max_steps=100)


def test_images_of_new_sizes_compile_nothing(fitted):
    from compilations import compilations

    apply_local_calibration(overconfident(11, size=(20, 30))[0], fitted[2][True])
    with compilations() as found:
        apply_local_calibration(overconfident(12, size=(31, 17))[0], fitted[2][True])
    assert not found


def test_the_gradient_of_a_calibrated_loss_is_finite(fitted):
    logits, labels = overconfident(13)

    def loss(x):
        return negative_log_likelihood(apply_local_calibration(x, fitted[2][True]), labels).mean()

    assert jnp.isfinite(jax.grad(loss)(jnp.asarray(logits))).all()


X, Y = overconfident(14, size=(8, 8))
WRONG_CALLS = {
    "steps": (lambda _: fit_local_calibration(X, Y, max_steps=70), ValueError, "multiple of 50"),
    "ace": (lambda _: fit_local_calibration(X, Y, ace=-1.0), ValueError, "ace must be"),
    "keeps": (lambda _: fit_local_calibration(X, Y, keeps_labels=1), TypeError, "keeps_labels"),
    "all_masked": (lambda _: fit_local_calibration(X, Y, where=Y > 9), ValueError, "no voxel to fit to"),
    "voxels_without_neighbours": (
        lambda _: fit_local_calibration(X.reshape(1, 64, 3), Y.reshape(1, 64)),
        ValueError,
        "two or three spatial axes",
    ),
    "image_of_some": (
        lambda _: fit_local_calibration([(X, Y, None, X), (X, Y)]),
        ValueError,
        "batch 1.*fitted with images",
    ),
    "image_beside_batches": (
        lambda _: fit_local_calibration([(X, Y)], image=X),
        TypeError,
        "image of batches",
    ),
    "spacing": (lambda _: fit_local_calibration(X, Y, spacing=(1, 1, 1)), ValueError, "spacing has 3"),
    "ids_of_regions": (
        lambda _: fit_local_calibration(X, Y, regions=True),
        ValueError,
        "labels of regions",
    ),
    "classes": (lambda p: apply_local_calibration(X[..., :2], p), ValueError, r"\*spatial, 3\]"),
    "image": (lambda p: apply_local_calibration(X, p, image=X), ValueError, "leave image out"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_wrong_call_says_what_came_and_what_is_accepted(fitted, name):
    call, error, pattern = WRONG_CALLS[name]
    with pytest.raises(error, match=pattern):
        call(fitted[2][True])
