"""Dice of soft labels: best where probabilities equal shares, and on hard labels what it always was."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jax.test_util import check_grads

from calib_jax import dice_score, dsc_plus_plus_loss, segmentation_loss, segmentation_loss_parts
from calib_jax._softmax import _slope_of_minimum, dice_sums

pytestmark = pytest.mark.usefixtures("strict_promotion")

SHAPE = (2, 6, 5, 3)
RNG = np.random.default_rng(7)
LOGITS = RNG.normal(0, 2, SHAPE).astype(np.float32)
SHARES = RNG.dirichlet(np.ones(3), SHAPE[:-1]).astype(np.float32)
IDS = RNG.integers(0, 3, SHAPE[:-1]).astype(np.int32)
WHERE = RNG.random(SHAPE[:-1]) < 0.6
HOT = np.eye(3, dtype=np.float32)[IDS]


def dice(logits, labels, **options):
    return segmentation_loss_parts(logits, labels, ("dice",), **options)["dice"]


def dsc(logits, labels, **options):
    return dsc_plus_plus_loss(logits, labels, **options)


def damped_dice(logits, labels, **options):
    return segmentation_loss_parts(logits, labels, ("damped_dice",), **options)["damped_dice"]


LOSSES = {"dice": dice, "dsc_plus_plus": dsc, "damped_dice": damped_dice}
every_loss = pytest.mark.parametrize("name", LOSSES)
# The gradient of damped Dice is no derivative.
both_losses = pytest.mark.parametrize("name", ["dice", "dsc_plus_plus"])


@functools.cache
def compiled(name):
    return jax.jit(jax.value_and_grad(LOSSES[name]))


# The loss


def test_dice_of_two_voxels_by_hand():
    probs = np.array([[[0.9, 0.1], [0.4, 0.6]]], np.float32)
    shares = np.array([[[0.6, 0.4], [0.6, 0.4]]], np.float32)
    # First class: sizes 1.3 and 1.2, differences 0.3 and 0.2; second class: 0.7, 0.8 and the same.
    expected = np.mean([1 - (2.5 - 0.5) / 2.5, 1 - (1.5 - 0.5) / 1.5])
    np.testing.assert_allclose(dice(np.log(probs), shares), expected, rtol=1e-4)


@both_losses
def test_the_optimum_is_the_share(name):
    """Where half of the experts saw the class, the product of probability and label has its optimum at 1."""
    logits, shares = np.zeros((1, 9, 2), np.float32), np.linspace(0.1, 0.9, 9, dtype=np.float32)
    labels = np.stack([1 - shares, shares], -1)[None]
    option = {"dice": "dice_include_background", "dsc_plus_plus": "include_background"}[name]
    step = jax.jit(jax.value_and_grad(functools.partial(LOSSES[name], **{option: False})))
    for rate in np.geomspace(8, 1e-3, 400, dtype=np.float32):
        logits = logits - rate * step(logits, labels)[1]
    np.testing.assert_allclose(jax.nn.softmax(logits)[0, :, 1], shares, atol=0.02)
    assert step(logits, labels)[0] < 0.01


@both_losses
def test_a_perfect_prediction_costs_nothing(name):
    np.testing.assert_allclose(LOSSES[name](np.log(SHARES), SHARES), 0, atol=1e-6)


@both_losses
def test_hard_labels_cost_the_same_as_floats_and_as_ids(name):
    logits = LOGITS.copy()
    logits[0, 0], logits[0, 1] = [60, 0, -60], [-200, 0, 200]  # probabilities of exactly 0 and 1
    expected, expected_gradient = compiled(name)(logits, IDS)
    for dtype in ("float32", "bool"):
        loss, gradient = compiled(name)(logits, jnp.asarray(HOT, dtype))
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        np.testing.assert_allclose(gradient, expected_gradient, atol=1e-8)


def test_sums_of_hard_labels_are_those_of_the_product_bit_by_bit():
    probs = jax.nn.softmax(jnp.asarray(LOGITS)).at[0, 0, 0].set(jnp.float32([0.0, 0.0, 1.0]))
    floats, integers = (
        jax.vjp(lambda p, y=y: dice_sums(p, y, None), probs)
        for y in (jnp.asarray(HOT), jnp.asarray(HOT, int))
    )
    for ours, theirs in zip(floats[0], integers[0], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    weights = jnp.float32([[1, 2, 3], [4, 5, 6]]), jnp.float32([[3, 1, 2], [1, 1, 1]])
    np.testing.assert_array_equal(floats[1](weights)[0], integers[1](weights)[0])


@both_losses
def test_gradients_are_finite_differences_away_from_kinks(name):
    shares = np.where(np.abs(SHARES - jax.nn.softmax(LOGITS)) < 0.02, SHARES / 2, SHARES)
    check_grads(LOSSES[name], (LOGITS, shares), 1, ["rev"], atol=1e-3, rtol=1e-2, eps=1e-3)


def test_the_gradient_at_a_kink_lies_between_those_on_both_sides():
    shares = jnp.float32([0.0, 0.25, 1.0])
    np.testing.assert_array_equal(_slope_of_minimum(shares, shares), shares)
    np.testing.assert_array_equal(_slope_of_minimum(shares - 0.125, shares), 1)
    np.testing.assert_array_equal(_slope_of_minimum(shares + 0.125, shares), 0)


@every_loss
def test_a_mask_is_a_crop_and_hides_nan(name):
    where = np.zeros(SHAPE[:-1], bool)
    where[:, 1:4] = True
    masked = (np.where(where[..., None], x, np.nan) for x in (LOGITS, SHARES))
    loss, gradient = jax.value_and_grad(LOSSES[name])(*masked, where=where)
    expected, expected_gradient = compiled(name)(LOGITS[:, 1:4], SHARES[:, 1:4])
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[:, 1:4], expected_gradient, atol=1e-7)
    assert (np.asarray(gradient)[~where] == 0).all()


@every_loss
def test_parts_of_an_image_on_two_devices_make_the_whole(name):
    mesh = jax.make_mesh((2,), ("space",), axis_types=(jax.sharding.AxisType.Auto,))
    here, whole = PartitionSpec(None, "space"), PartitionSpec()

    def part(logits, labels):
        return jax.value_and_grad(functools.partial(LOSSES[name], axis_name="space"))(logits, labels)

    split = jax.shard_map(part, mesh=mesh, in_specs=here, out_specs=(whole, here), check_vma=False)
    loss, gradient = jax.jit(split)(LOGITS, SHARES)
    expected, expected_gradient = compiled(name)(LOGITS, SHARES)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-7)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("labels", [IDS, HOT, SHARES, np.where(IDS == 1, -1, IDS)])
def test_the_gradient_of_damped_dice_is_that_of_dice_times_the_error(labels, first):
    """By the formula, in float64."""
    options = {"dice_include_background": not first, "dice_smooth": 0.5}
    loss, gradient = jax.jit(jax.value_and_grad(functools.partial(damped_dice, **options)))(LOGITS, labels)
    np.testing.assert_allclose(loss, dice(LOGITS, labels, **options), rtol=1e-6)
    powers = np.exp(LOGITS.astype(np.float64))
    probs = powers / powers.sum(-1, keepdims=True)
    targets = (labels[..., None] == np.arange(3)).astype(np.float64) if labels.ndim == 3 else labels
    overlap = np.minimum(probs, targets).sum((1, 2), keepdims=True) + 0.5
    size = (probs + targets).sum((1, 2), keepdims=True) / 2 + 0.5
    of_probs = (overlap / 2 - (probs < targets) * size) / size**2 / (2 * (3 - first))
    of_probs[..., :first] = 0
    of_probs *= np.abs(probs - targets)
    expected = probs * (of_probs - (probs * of_probs).sum(-1, keepdims=True))
    np.testing.assert_allclose(gradient, expected, atol=1e-8)


def test_damped_dice_rests_where_the_prediction_is_right():
    logits = np.log(np.float32([[[0.9, 0.1], [0.6, 0.4]]]))
    shares = np.float32([[[0.9, 0.1], [0.3, 0.7]]])
    gradient = jax.grad(damped_dice)(logits, shares)
    np.testing.assert_allclose(gradient[0, 0], 0, atol=1e-7)
    assert np.abs(gradient[0, 1]).min() > 0.01


def test_dsc_plus_plus_of_gamma_one_is_dice():
    np.testing.assert_allclose(dsc_plus_plus_loss(LOGITS, SHARES, gamma=1.0), dice(LOGITS, SHARES), rtol=1e-5)


def test_the_weighted_sum_takes_the_same_dice():
    alone = segmentation_loss(LOGITS, SHARES, cross_entropy=0.0, ace=0.0)
    np.testing.assert_array_equal(alone, dice(LOGITS, SHARES))


# The score


def score_by_hand(p, t, where=None):
    p, t = (np.where(True if where is None else where[..., None], x, 0).astype(np.float64) for x in (p, t))
    size = (p + t).sum((1, 2))
    return (size - np.abs(p - t).sum((1, 2))) / size


PROBS = np.asarray(jax.nn.softmax(LOGITS))


def test_the_score_of_shares_is_the_formula():
    expected = score_by_hand(PROBS, SHARES)
    np.testing.assert_allclose(dice_score(PROBS, SHARES), expected, rtol=1e-6)
    np.testing.assert_allclose(dice_score(SHARES, PROBS), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(dice_score)(PROBS, SHARES), expected, rtol=1e-6)
    np.testing.assert_array_equal(dice_score(SHARES, SHARES, num_classes=3), 1)


def test_label_maps_beside_shares_are_one_hot():
    expected = score_by_hand(HOT, SHARES)
    for hard in (IDS, IDS.astype(np.int64), HOT, HOT.astype(bool)):
        np.testing.assert_allclose(dice_score(hard, SHARES), expected, rtol=1e-6)
        np.testing.assert_allclose(dice_score(SHARES, hard), expected, rtol=1e-6)


def test_hard_floats_score_as_label_maps():
    other = np.roll(IDS, 1)
    expected = dice_score(other, IDS, num_classes=3)
    np.testing.assert_allclose(dice_score(np.eye(3, dtype=np.float32)[other], HOT), expected, rtol=1e-6)


def test_a_mask_of_the_score_hides_nan_and_a_nan_that_counts_shows():
    probs = np.where(WHERE[..., None], PROBS, np.nan)
    expected = score_by_hand(PROBS, SHARES, WHERE)
    np.testing.assert_allclose(dice_score(probs, SHARES, where=WHERE), expected, rtol=1e-6)
    assert np.isnan(dice_score(probs, SHARES)).all()


def test_a_class_without_any_share_is_nan():
    shares = np.float32([[[1, 0, 0], [0.5, 0.5, 0]]])
    np.testing.assert_allclose(dice_score(shares, shares), [[1, 1, np.nan]])


def test_the_score_of_many_voxels_is_exact():
    p = np.full((1, 3_000_000, 1), 1e-3, np.float32)
    np.testing.assert_allclose(dice_score(p, 2 * p), 2 / 3, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: dice_score(IDS, IDS), TypeError, "num_classes is missing"),
        (lambda: dice_score(PROBS, SHARES, num_classes=2), ValueError, "num_classes is 2"),
        (lambda: dice_score(IDS.astype(np.float32), IDS, num_classes=3), ValueError, "Cast class ids"),
        (lambda: dice_score(PROBS, SHARES[:, :3]), ValueError, r"\(2, 3, 5, 3\)"),
        (lambda: dice_score(PROBS, IDS[:, :3]), ValueError, r"\(2, 3, 5\)"),
        (lambda: dice_score(PROBS, SHARES, where=PROBS > 0.5), ValueError, r"where .* \(2, 6, 5\)"),
        (lambda: dice_score(100 * PROBS, SHARES), ValueError, r"predictions must lie in \[0, 1\]"),
        (lambda: dice_score(PROBS, -SHARES), ValueError, r"labels must lie in \[0, 1\]"),
        (lambda: dice_score(IDS * 1j, IDS, num_classes=3), TypeError, "complex"),
    ],
)
def test_wrong_calls_of_the_score(call, error, words):
    with pytest.raises(error, match=words):
        call()
