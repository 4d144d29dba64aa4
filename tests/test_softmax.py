"""Softmax and cross-entropy class by class, and sums over voxels, beside JAX's own, optax's and NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

from calib_jax import _softmax
from calib_jax._softmax import softmax, softmax_and_cross_entropy, voxel_sums

pytestmark = pytest.mark.usefixtures("strict_promotion")


def scores(classes, dtype=np.float32):
    rng = np.random.default_rng(classes)
    return jnp.asarray(rng.normal(0, 5, (2, 5, 7, classes)), dtype)


@pytest.mark.parametrize("classes", [1, 2, 3, 16, 17, 40])
def test_values_and_gradients_are_those_of_jax(classes):
    logits = scores(classes)
    weights = jnp.asarray(np.random.default_rng(0).normal(size=logits.shape), jnp.float32)

    def value_and_grad(function):
        return jax.jit(jax.value_and_grad(lambda x: (weights * function(x) ** 2).sum()))(logits)

    np.testing.assert_allclose(jax.jit(softmax)(logits), jax.nn.softmax(logits), rtol=1e-6, atol=1e-12)
    for ours, theirs in zip(value_and_grad(softmax), value_and_grad(jax.nn.softmax), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_extreme_and_equal_scores():
    logits = jnp.array([[1e4, -1e4, 0.0], [-1e30, -1e30, -1e30], [3.0, 3.0, 3.0], [-jnp.inf, 0.0, 0.0]])
    probs, pull_back = jax.vjp(softmax, logits)
    np.testing.assert_allclose(probs, [[1, 0, 0], [1 / 3] * 3, [1 / 3] * 3, [0, 0.5, 0.5]], rtol=1e-6)
    assert np.isfinite(pull_back(jnp.ones_like(probs))[0]).all()


def test_nan_stays_in_its_voxel():
    logits = scores(3).at[0, 1, 2, 0].set(jnp.nan)
    broken = np.isnan(softmax(logits))
    assert broken[0, 1, 2].all()
    assert broken.sum() == 3


def test_half_precision_is_computed_in_float32_and_its_gradient_comes_back_in_kind():
    logits = scores(3, jnp.bfloat16)
    probs, pull_back = jax.vjp(softmax, logits)
    assert probs.dtype == jnp.float32
    np.testing.assert_allclose(probs, jax.nn.softmax(logits.astype(jnp.float32)), rtol=1e-6)
    assert pull_back(probs)[0].dtype == jnp.bfloat16


def test_vmap_equals_the_whole():
    np.testing.assert_allclose(jax.vmap(softmax)(scores(4)), softmax(scores(4)), rtol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowers_for_every_platform(platform):
    grad = jax.jit(jax.grad(lambda x: (softmax(x) ** 2).sum()))
    assert export.export(grad, platforms=[platform])(scores(3)).platforms == (platform,)


def labels_like(logits, form):
    rng = np.random.default_rng(3)
    ids = jnp.asarray(rng.integers(0, logits.shape[-1], logits.shape[:-1]), jnp.int32)
    if form == "ids":
        return ids
    soft = jnp.asarray(rng.random(logits.shape), jnp.float32)
    return jnp.where(
        (ids == 0)[..., None], 0, soft / soft.sum(-1, keepdims=True)
    )  # some voxels without a class


def both_by_optax(logits, labels):
    """The definition."""
    entropy = optax.losses.softmax_cross_entropy
    if labels.ndim < logits.ndim:
        entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    return jax.nn.softmax(logits), entropy(logits, labels)


def both_by_voxel(logits, labels):
    """`softmax_and_cross_entropy` of each voxel by itself."""
    voxels = logits.shape[:-1]
    alone = labels.reshape(-1, 1, *labels.shape[len(voxels) :])
    probs, losses = jax.vmap(softmax_and_cross_entropy)(logits.reshape(-1, 1, logits.shape[-1]), alone)
    return probs.reshape(logits.shape), losses.reshape(voxels)


def value_and_grad_of_both(function, logits, labels):
    """Of a weighted sum of both results, with the gradient in soft labels too."""
    weights = jnp.asarray(np.random.default_rng(0).normal(size=logits.shape), jnp.float32)

    def total(logits, labels):
        probs, losses = function(logits, labels)
        return (weights * probs**2).sum() + (weights[..., 0] * losses).sum()

    arguments = (0, 1) if labels.ndim == logits.ndim else 0
    return jax.jit(jax.value_and_grad(total, argnums=arguments))(logits, labels)


@pytest.mark.parametrize("form", ["ids", "soft"])
@pytest.mark.parametrize("classes", [2, 3, 17])
def test_cross_entropy_is_that_of_optax(classes, form):
    logits = scores(classes)
    labels = labels_like(logits, form)
    for ours, theirs in zip(
        jax.jit(both_by_voxel)(logits, labels), both_by_optax(logits, labels), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-6)
    ours, theirs = (
        value_and_grad_of_both(function, logits, labels) for function in (both_by_voxel, both_by_optax)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), ours, theirs)


@pytest.mark.parametrize("form", ["ids", "soft"])
def test_cross_entropy_of_extreme_scores(form):
    logits = np.float32([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4], [1e4, 1e4 - 1, 1e4 - 2], [-3e4, 3e4, 0.0]])
    labels = jnp.array([1, 2, 1, 0])
    labels = (
        labels
        if form == "ids"
        else 0.75 * np.eye(3, dtype=np.float32)[labels] + 0.25 * np.eye(3, dtype=np.float32)[labels - 1]
    )
    ours, theirs = (
        value_and_grad_of_both(function, logits, labels) for function in (both_by_voxel, both_by_optax)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), ours, theirs)
    assert np.isfinite(ours[0])


@pytest.mark.parametrize("form", ["ids", "soft"])
@pytest.mark.parametrize("platform", ["cpu", "others"])
def test_gradients_of_many_voxels_on_every_platform(platform, form, monkeypatch):
    """The programs of other platforms run on this one, too."""
    if platform == "others":
        monkeypatch.setattr(_softmax, "_FEW", 0)
    logits = scores(3)
    labels = labels_like(logits, form)
    weights = jnp.asarray(np.random.default_rng(0).normal(size=logits.shape), jnp.float32)

    def total(function):
        def weighted(x):
            probs, losses = function(x, labels)
            return (weights * probs).sum() + 0.3 * losses.sum()

        return jax.jit(jax.value_and_grad(weighted))(logits)

    ours, theirs = total(softmax_and_cross_entropy), total(both_by_optax)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6), ours, theirs)


@pytest.mark.parametrize("form", ["ids", "soft"])
@pytest.mark.parametrize("masked", [False, True])
def test_sums_of_dice_are_the_same_on_every_platform(form, masked):
    logits = scores(3)[None]
    labels = labels_like(logits, form)
    where = jnp.asarray(np.random.default_rng(1).random(logits.shape[:-1]) < 0.5) if masked else None
    probs = jax.nn.softmax(logits)
    for ours, theirs in zip(
        _softmax._dice_sums(probs, labels, where, _softmax.one_hot_by_arithmetic, _softmax._total),
        _softmax._dice_sums(probs, labels, where, _softmax.one_hot, _softmax._total_in_lanes),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_an_id_that_is_no_class_costs_nothing():
    logits = scores(3)
    ids = labels_like(logits, "ids").at[:, 0].set(np.iinfo(np.int32).min).at[:, 1].set(3)
    (_, losses), pull_back = jax.vjp(lambda x: both_by_voxel(x, ids), logits)
    gradient = pull_back((jnp.zeros_like(logits), jnp.ones_like(losses)))[0]
    np.testing.assert_array_equal(losses[:, :2], 0)
    np.testing.assert_array_equal(gradient[:, :2], 0)
    assert (losses[:, 2:] > 0).all()


def test_a_class_of_probability_zero_costs_only_those_who_have_it():
    logits = np.float32([[-np.inf, 0.0, 0.0], [-np.inf, 0.0, 0.0]])
    losses = both_by_voxel(logits, jnp.array([1, 0]))[1]
    np.testing.assert_allclose(losses, [np.log(2), np.inf], rtol=1e-6)
    soft = both_by_voxel(logits, np.float32([[0, 0.5, 0.5], [0, 1.0, 0]]))[1]
    np.testing.assert_allclose(soft, [np.log(2), np.log(2)], rtol=1e-6)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("classes", [3, 17])
def test_cross_entropy_lowers_for_every_platform(platform, classes):
    logits = scores(classes)
    labels = labels_like(logits, "ids")
    grad = jax.jit(jax.grad(lambda x: sum(part.sum() for part in softmax_and_cross_entropy(x, labels))))
    assert export.export(grad, platforms=[platform])(logits).platforms == (platform,)


@pytest.mark.parametrize("voxels", [1, 4096, 8191, 8192, 12288, 30001])
def test_sums_over_voxels(voxels):
    x = np.random.default_rng(voxels).random((2, voxels, 3), np.float32)
    expected = x.astype(np.float64).sum(1)
    np.testing.assert_allclose(jax.jit(voxel_sums)(x), expected, rtol=2e-6)
    np.testing.assert_array_equal(jax.grad(lambda x: voxel_sums(x)[0, 1])(jnp.asarray(x))[0, :, 1], 1)


def test_sums_of_many_equal_numbers_do_not_drift():
    """A single running float32 sum of 8 million thousandths would be 2% off."""
    x = jnp.full((1, 8_000_000, 1), 1e-3)
    np.testing.assert_allclose(jax.jit(voxel_sums)(x), [[8000.0]], rtol=1e-4)
