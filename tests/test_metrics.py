"""Dice of label maps; Brier score and negative log-likelihood of probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import twin
from jax.sharding import Mesh, PartitionSpec
from jax.test_util import check_grads

from calib_jax.metrics import brier_score, dice_score, negative_log_likelihood

pytestmark = pytest.mark.usefixtures("strict_promotion")

SHAPE = (3, 5, 4, 6)


def label_maps(seed=51, classes=4):
    rng = np.random.default_rng(seed)
    return rng.integers(0, classes, (2, *SHAPE)).astype(np.int32)


def dice_by_hand(predictions, labels, classes):
    """2 |A and B| / (|A| + |B|) from sets of voxels."""
    scores = np.full((predictions.shape[0], classes), np.nan)
    for b, c in np.ndindex(scores.shape):
        a = {tuple(v) for v in np.argwhere(predictions[b] == c)}
        t = {tuple(v) for v in np.argwhere(labels[b] == c)}
        if a or t:
            scores[b, c] = 2 * len(a & t) / (len(a) + len(t))
    return scores


def test_dice_equals_the_formula():
    predictions, labels = label_maps()
    scores = jax.jit(dice_score, static_argnames="num_classes")(predictions, labels, num_classes=4)
    assert scores.shape == (3, 4)
    np.testing.assert_allclose(scores, dice_by_hand(predictions, labels, 4), rtol=1e-6)


def test_a_class_in_neither_map_is_nan_and_in_one_map_is_zero():
    predictions, labels = label_maps(classes=3)
    labels = np.where(labels == 2, 0, labels)
    scores = np.asarray(dice_score(predictions, labels, num_classes=4))
    np.testing.assert_array_equal(scores[:, 2], 0)
    np.testing.assert_array_equal(np.isnan(scores), np.tile([False, False, False, True], (3, 1)))


def test_a_perfect_map_scores_one_and_a_disjoint_one_zero():
    _, labels = label_maps(classes=2)
    np.testing.assert_array_equal(dice_score(labels, labels, num_classes=2), np.ones((3, 2)))
    np.testing.assert_array_equal(dice_score(1 - labels, labels, num_classes=2), np.zeros((3, 2)))


def test_dice_is_symmetric():
    predictions, labels = label_maps()
    one_way = dice_score(predictions, labels, num_classes=4)
    np.testing.assert_array_equal(one_way, dice_score(labels, predictions, num_classes=4))


@pytest.mark.parametrize("dtype", ["uint8", "int64"])
def test_label_maps_of_any_integer(dtype):
    predictions, labels = label_maps()
    expected = dice_score(predictions, labels, num_classes=4)
    scores = dice_score(predictions.astype(dtype), labels.astype(dtype), num_classes=4)
    np.testing.assert_array_equal(scores, expected)


def test_a_mask_equals_the_subset():
    predictions, labels = label_maps()
    where = np.random.default_rng(3).random(SHAPE) < 0.5
    scores = jax.jit(dice_score, static_argnames="num_classes")(
        predictions, labels, num_classes=4, where=where
    )
    for b, keep in enumerate(where):
        expected = dice_score(predictions[b][keep][None], labels[b][keep][None], num_classes=4)
        np.testing.assert_array_equal(scores[b], expected[0])


def test_ids_outside_the_classes_are_of_no_class():
    predictions, labels = label_maps()
    expected = dice_score(predictions, labels, num_classes=4)
    np.testing.assert_array_equal(dice_score(predictions, labels, num_classes=3), expected[:, :3])
    np.testing.assert_array_equal(dice_score(predictions - 1, labels - 1, num_classes=3), expected[:, 1:])


# Brier score and negative log-likelihood, against NumPy in float64.

FORMS = ("ids", "one_hot", "soft")
PROBS_SHAPE = (2, 4, 5, 3)


def normal(seed, shape=PROBS_SHAPE):
    return np.random.default_rng(seed).standard_normal(shape)


PROBS, LOGITS = twin.sample_probs(61, PROBS_SHAPE), 4 * normal(61).astype(np.float32)


def labels_of(form):
    """Ids in and outside the classes, those as one-hot, or soft labels that sum to what they like."""
    ids = np.random.default_rng(62).integers(-1, 4, PROBS_SHAPE[:-1]).astype(np.int32)
    return {"ids": ids, "one_hot": one_hot(ids), "soft": twin.sample_labels("soft", PROBS_SHAPE)}[form]


def one_hot(ids, classes=3):
    return (ids[..., None] == np.arange(classes)).astype(np.float32)


def brier_by_hand(probs, labels, where=None):
    """A mean over each class's counted voxels."""
    y = labels if labels.shape == probs.shape else one_hot(labels, probs.shape[-1])
    keep = np.ones(probs.shape, bool) if where is None else where
    keep = np.broadcast_to(keep if keep.shape == probs.shape else keep[..., None], probs.shape)
    scores = np.full((probs.shape[0], probs.shape[-1]), np.nan)
    for b, c in np.ndindex(scores.shape):
        if keep[b, ..., c].any():
            errors = probs[b, ..., c].astype(np.float64) - y[b, ..., c]
            scores[b, c] = np.mean(errors[keep[b, ..., c]] ** 2)
    return scores


def nll_by_hand(logits, labels, where=None):
    """-sum_c y_c log softmax(z)_c over the voxels that have a label."""
    y = (labels if labels.shape == logits.shape else one_hot(labels, logits.shape[-1])).astype(np.float64)
    keep = (y.sum(-1) > 0) & (True if where is None else where)
    z = logits.astype(np.float64)
    losses = (y * (np.logaddexp.reduce(z, axis=-1, keepdims=True) - z)).sum(-1)
    return np.array(
        [np.mean(loss[kept]) if kept.any() else np.nan for loss, kept in zip(losses, keep, strict=True)]
    )


SCORES = {"brier": (brier_score, brier_by_hand, PROBS), "nll": (negative_log_likelihood, nll_by_hand, LOGITS)}
both_scores = pytest.mark.parametrize("name", SCORES)


@both_scores
@pytest.mark.parametrize("form", FORMS)
def test_scores_equal_the_formula(name, form):
    score, by_hand, inputs = SCORES[name]
    found = jax.jit(score)(inputs, labels_of(form))
    np.testing.assert_allclose(found, by_hand(inputs, labels_of(form)), rtol=1e-6)
    np.testing.assert_allclose(found, score(inputs, labels_of(form)), rtol=1e-6)


@both_scores
@pytest.mark.parametrize("form", FORMS)
def test_masked_voxels_touch_nothing_not_even_as_nan(name, form):
    score, by_hand, inputs = SCORES[name]
    labels, where = labels_of(form), normal(63)[..., 0] > 0
    poisoned = np.where(where[..., None], inputs, np.nan)
    if form == "soft":
        labels = np.where(where[..., None], labels, np.nan)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: score(x, labels, where=where).sum()))(poisoned)
    np.testing.assert_allclose(value, by_hand(inputs, labels_of(form), where).sum(), rtol=1e-6)
    np.testing.assert_array_equal(gradient[~where], 0)
    clean = jax.grad(lambda x: score(x, labels_of(form), where=where).sum())(inputs)
    np.testing.assert_allclose(gradient, clean, rtol=1e-5, atol=1e-7)


def test_brier_masks_of_each_class():
    where = normal(64) > 0
    np.testing.assert_allclose(
        brier_score(PROBS, labels_of("ids"), where=where),
        brier_by_hand(PROBS, labels_of("ids"), where),
        rtol=1e-6,
    )


@both_scores
def test_scores_of_nothing_are_nan(name):
    score, _, inputs = SCORES[name]
    where = np.arange(2)[:, None, None] * np.ones((2, 4, 5)) > 0
    found = np.asarray(score(inputs, labels_of("one_hot"), where=where))
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1]).all()


def test_a_nan_that_counts_shows_in_its_image_and_class_only():
    probs, logits = PROBS.copy(), LOGITS.copy()
    probs[1, 0, 0, 2] = logits[1, 0, 0, 2] = np.nan
    np.testing.assert_array_equal(
        np.isnan(brier_score(probs, labels_of("soft"))), [[False] * 3, [False, False, True]]
    )
    np.testing.assert_array_equal(np.isnan(negative_log_likelihood(logits, labels_of("soft"))), [False, True])


@both_scores
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_scores(name, form):
    score, _, inputs = SCORES[name]
    check_grads(lambda x: score(x, labels_of(form)).sum(), (inputs,), 1, ["rev"], rtol=1e-2, atol=1e-2)
    if form == "soft":
        check_grads(lambda y: score(inputs, y).sum(), (labels_of(form),), 1, ["rev"], rtol=1e-2, atol=1e-2)


def test_brier_sums_to_the_multi_class_score():
    ids = np.clip(labels_of("ids"), 0, 2)
    expected = ((PROBS - one_hot(ids)) ** 2).sum(-1).mean((1, 2))
    np.testing.assert_allclose(brier_score(PROBS, ids).sum(-1), expected, rtol=1e-6)


@pytest.mark.parametrize("form", ["ids", "one_hot"])
def test_probability_zero(form):
    """Logit -inf: free where another class is true, infinite where it is the one."""
    logits = np.array([[[0, -np.inf, 1]], [[-np.inf, 0, 0]]], np.float32)
    labels = np.array([[2], [0]], np.int32)
    losses = negative_log_likelihood(logits, labels if form == "ids" else one_hot(labels))
    np.testing.assert_allclose(losses, [np.log1p(np.exp(-1)), np.inf], rtol=1e-6)
    gradient = jax.grad(lambda x: negative_log_likelihood(x, labels[:1])[0])(logits[:1])
    np.testing.assert_allclose(
        gradient, [[[np.exp(-1) / (1 + np.exp(-1)), 0, -np.exp(-1) / (1 + np.exp(-1))]]], rtol=1e-5
    )


@pytest.mark.parametrize("margin", [0.0, 1e-3, 1.0, 12.0, 30.0, 60.0])
@pytest.mark.parametrize("form", ["ids", "one_hot"])
def test_likelihood_is_exact_however_certain(margin, form):
    """log(1 + e^-12) = 6e-6 is lost where log-sum-exp of logits near 20 is subtracted from one of them."""
    logits = np.stack([np.full((1, 50), 17.3), np.full((1, 50), 17.3 - margin)], -1).astype(np.float32)
    labels = np.zeros((1, 50), np.int32)
    gap = np.float64(logits[0, 0, 1]) - np.float64(logits[0, 0, 0])
    expected = np.log1p(np.exp(gap))
    found = negative_log_likelihood(logits, labels if form == "ids" else one_hot(labels, 2))
    np.testing.assert_allclose(found, [expected], rtol=2e-6)


def test_likelihood_of_what_was_computed_in_the_same_program():
    """XLA may compute the logits anew, rounded otherwise, in each place where they are used."""

    @jax.jit
    def scaled(logits, scale, bias):
        return negative_log_likelihood(logits / scale, labels), negative_log_likelihood(
            logits * scale + bias, labels
        )

    logits, labels = 20 * normal(65, (1, 3_000, 3)).astype(np.float32), np.zeros((1, 3_000), np.int32)
    found = scaled(logits, np.float32(0.83), np.float32(0.3))
    z = logits.astype(np.float64)
    expected = nll_by_hand(z / np.float32(0.83), labels), nll_by_hand(z * np.float32(0.83), labels)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_equal_logits_are_log_of_the_number_of_classes():
    labels = labels_of("ids")
    np.testing.assert_allclose(
        negative_log_likelihood(np.zeros(PROBS_SHAPE, np.float32), labels), np.log(3), rtol=1e-6
    )
    gradient = jax.grad(lambda x: negative_log_likelihood(x, labels).sum())(np.zeros(PROBS_SHAPE, np.float32))
    counted = ((labels >= 0) & (labels < 3)).reshape(2, -1).sum(1)[:, None, None, None]
    expected = np.where(one_hot(labels).any(-1, keepdims=True), (1 / 3 - one_hot(labels)) / counted, 0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8)


@both_scores
@pytest.mark.parametrize("equal", [False, True])
def test_scores_of_more_voxels_than_float32_can_count(name, equal):
    """3e7 voxels, where a running float32 sum of equal numbers is off by percents."""
    score, _, _ = SCORES[name]
    voxels = 30_000_000
    x = np.random.default_rng(66).random((1, voxels, 1), np.float32) * np.float32(1e-3)
    x = np.full_like(x, 0.1) if equal else x
    labels = np.zeros((1, voxels), np.uint8)
    if name == "brier":
        found, expected = jax.jit(score)(x, labels), np.square(x.astype(np.float64) - 1).mean()
    else:
        logits = np.concatenate([x, np.zeros_like(x)], -1)
        found, expected = jax.jit(score)(logits, labels), np.logaddexp(0, -x.astype(np.float64)).mean()
    np.testing.assert_allclose(found.ravel(), [expected], rtol=1e-6)


@both_scores
def test_scores_take_next_to_no_memory(name):
    """Neither one-hot labels nor anything else of the size of the inputs: they have 12 MB."""
    score, _, _ = SCORES[name]
    inputs, labels = (
        jax.ShapeDtypeStruct((1, 10**6, 3), np.float32),
        jax.ShapeDtypeStruct((1, 10**6), np.int32),
    )
    memory = jax.jit(score).lower(inputs, labels).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8e6


@both_scores
@pytest.mark.parametrize("size", [1, 2, 32_769, 131_072, 131_073, 300_001])
def test_sizes_about_those_of_blocks_and_chunks(name, size):
    score, by_hand, _ = SCORES[name]
    inputs = np.abs(normal(67, (2, size, 2))).astype(np.float32)
    labels = (np.arange(2 * size).reshape(2, size) % 3 - 1).astype(np.int32)
    labels[:, 0] = 0
    np.testing.assert_allclose(jax.jit(score)(inputs, labels), by_hand(inputs, labels), rtol=1e-6)


@both_scores
def test_half_precision_is_added_in_float32(name):
    score, by_hand, inputs = SCORES[name]
    half = jnp.asarray(inputs, jnp.bfloat16)
    found = score(half, labels_of("ids"))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(
        found, by_hand(np.asarray(half.astype(jnp.float32)), labels_of("ids")), rtol=1e-6
    )


@both_scores
def test_vmap_and_shard_map(name):
    score, _, inputs = SCORES[name]
    labels = labels_of("ids")
    mapped = jax.vmap(lambda x, y: score(x[None], y[None])[0])(inputs, labels)
    np.testing.assert_allclose(mapped, score(inputs, labels), rtol=1e-6)
    mesh, here = Mesh(np.array(jax.devices()[:2]), ("batch",)), PartitionSpec("batch")
    sharded = jax.jit(jax.shard_map(score, mesh=mesh, in_specs=here, out_specs=here))(inputs, labels)
    np.testing.assert_allclose(sharded, score(inputs, labels), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: brier_score(PROBS, labels_of("ids")[:1]), ValueError, "labels"),
        (lambda: negative_log_likelihood(LOGITS, labels_of("ids")[:1]), ValueError, "logits"),
        (
            lambda: negative_log_likelihood(LOGITS, labels_of("ids"), where=LOGITS > 0),
            ValueError,
            "per voxel",
        ),
        (lambda: brier_score(PROBS, labels_of("ids"), where=PROBS), TypeError, "where must be boolean"),
        (lambda: dice_score(*label_maps(), num_classes=2, where=np.ones(3, bool)), ValueError, "where"),
        (lambda: dice_score(*label_maps(), num_classes=2, where=label_maps()[0]), TypeError, "boolean"),
    ],
)
def test_wrong_calls_say_what_was_wrong(call, error, words):
    with pytest.raises(error, match=words):
        call()
