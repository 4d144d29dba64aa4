"""The losses: values and gradients beside a naive twin, closed forms, masks, weights, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import twin
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import calib_jax
from calib_jax import (
    bin_edges,
    bin_index,
    bin_statistics,
    dice_score,
    mL1_ace,
    mL1_ece,
    mL1_mce,
    segmentation_loss,
)
from calib_jax._checks import as_class_ids, check_values

pytestmark = pytest.mark.usefixtures("strict_promotion")

LOSSES = {"ace": mL1_ace, "ece": mL1_ece, "mce": mL1_mce}
PROBS = twin.sample_probs(seed=11)
SHAPE = PROBS.shape
IDS = twin.sample_labels("ids")
LOGITS = np.random.default_rng(12).normal(0, 2, SHAPE).astype(np.float32)
PER_VOXEL = np.random.default_rng(13).random(SHAPE[:-1]) < 0.7
PER_CLASS = np.random.default_rng(14).random(SHAPE) < 0.7


@functools.cache
def compiled(kind, options):
    """Value and gradient, compiled once for each set of options and shape."""

    def loss(probs, labels, arrays):
        values = LOSSES[kind](probs, labels, **arrays, **dict(options))
        return values.sum(), values

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def value_and_grad(kind, probs, labels, **options):
    """A loss and its gradient (of the sum of its entries for reduction "none")."""
    arrays = {name: options.pop(name) for name in ("where", "class_weights") if name in options}
    (_, values), gradient = compiled(kind, tuple(options.items()))(probs, labels, arrays)
    return values, gradient


def value(kind, probs, labels, **options):
    return value_and_grad(kind, probs, labels, **options)[0]


def assert_equals_twin(kind, probs, labels, **options):
    values, gradient = value_and_grad(kind, probs, labels, **options)
    expected, expected_gradient = twin.loss(probs, labels, kind, **options)
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=1e-6)
    assert np.abs(expected_gradient).max() > 1e-4  # or the comparison would say little


# Beside the twin


@pytest.mark.parametrize("form", twin.LABEL_FORMS)
@pytest.mark.parametrize("kind", LOSSES)
def test_value_and_gradient_equal_the_twin(kind, form):
    assert_equals_twin(kind, PROBS, twin.sample_labels(form))


@pytest.mark.parametrize(
    "options",
    [
        {"closed": "left", "num_bins": 7},
        {"where": PER_VOXEL},
        {"where": PER_CLASS},
        {"include_background": False},
        {"include_background": False, "where": PER_CLASS, "class_weights": np.float32([3, 1])},
        {"class_weights": np.float32([0.5, 2, 0])},
        {"reduction": "sum"},
        {"reduction": "none", "class_weights": np.float32([0.5, 2, 1])},
        {"ignore_empty_classes": True, "where": IDS != 2},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_equal_the_twin(options):
    assert_equals_twin("ace", PROBS, IDS, **options)


@pytest.mark.parametrize("kind", ["ece", "mce"])
def test_options_of_the_siblings_equal_the_twin(kind):
    options = {"include_background": False, "class_weights": np.float32([3, 1]), "ignore_empty_classes": True}
    assert_equals_twin(kind, PROBS, IDS, num_bins=7, closed="left", where=PER_VOXEL & (IDS != 2), **options)


@pytest.mark.parametrize("closed", ["right", "left"])
def test_values_on_edges_equal_the_twin(closed):
    edges = twin.edges(10)
    probs = np.concatenate([edges, np.nextafter(edges, np.float32(-1)), np.nextafter(edges, np.float32(2))])
    labels = np.arange(probs.size) % 3 == 0
    assert_equals_twin("ace", probs[None, :, None], labels[None, :, None], num_bins=10, closed=closed)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_probabilities_get_a_float32_loss_and_a_gradient_of_their_dtype(dtype):
    probs = jnp.asarray(PROBS, dtype)
    value, gradient = value_and_grad("ace", probs, IDS)
    expected, expected_gradient = twin.loss(np.asarray(probs, np.float32), IDS)
    assert value.dtype == jnp.float32
    assert gradient.dtype == probs.dtype
    np.testing.assert_allclose(value, expected, atol=1e-6)
    np.testing.assert_allclose(np.asarray(gradient, np.float32), expected_gradient, rtol=1e-2)


# Closed forms


def test_two_bins_by_hand():
    probs = np.float32([0.1, 0.3, 0.6, 0.8]).reshape(1, 4, 1)
    labels = np.array([0, 1, 1, 1]).reshape(1, 4, 1)
    # Lower bin: mean 0.2, frequency 0.5; upper bin: mean 0.7, frequency 1.
    for kind, expected in {"ace": 0.3, "ece": 0.3, "mce": 0.3}.items():
        np.testing.assert_allclose(value(kind, probs, labels, num_bins=2), expected, atol=1e-6)


def test_bins_of_unlike_size_by_hand():
    probs = np.float32([0.1, 0.8, 0.8, 0.8]).reshape(1, 4, 1)
    labels = np.array([0, 1, 1, 1]).reshape(1, 4, 1)
    for kind, expected in {"ace": (0.1 + 0.2) / 2, "ece": 0.1 / 4 + 0.2 * 3 / 4, "mce": 0.2}.items():
        np.testing.assert_allclose(value(kind, probs, labels, num_bins=2), expected, atol=1e-6)


def test_gradient_by_hand():
    probs = np.float32([0.1, 0.8, 0.8, 0.8]).reshape(1, 4, 1)
    labels = np.array([0, 1, 1, 1]).reshape(1, 4, 1)
    # Too sure of nothing below, not sure enough above: shares 1/2 per bin, then per voxel of the bin.
    expected = {"ace": [1 / 2, -1 / 6, -1 / 6, -1 / 6], "ece": [1 / 4, -1 / 4, -1 / 4, -1 / 4]}
    expected["mce"] = [0, -1 / 3, -1 / 3, -1 / 3]
    for kind in LOSSES:
        gradient = value_and_grad(kind, probs, labels, num_bins=2)[1]
        np.testing.assert_allclose(gradient.reshape(-1), expected[kind], atol=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_perfect_probabilities_cost_nothing(kind):
    one_hot = twin.sample_labels("one_hot")
    loss, gradient = value_and_grad(kind, one_hot, IDS)
    assert loss == 0
    np.testing.assert_array_equal(gradient, np.zeros(SHAPE))


@pytest.mark.parametrize("kind", LOSSES)
def test_probabilities_that_are_all_wrong_cost_one(kind):
    assert value(kind, 1 - twin.sample_labels("one_hot"), IDS) == 1


def test_one_bin_is_the_difference_of_the_means():
    one_hot = twin.sample_labels("one_hot")
    expected = np.abs(PROBS.mean((1, 2), dtype=np.float64) - one_hot.mean((1, 2), dtype=np.float64)).mean()
    np.testing.assert_allclose(value("ace", PROBS, IDS, num_bins=1), expected, atol=1e-6)


def test_gradient_of_the_whole_batch_follows_the_formula():
    _, gradient = value_and_grad("ace", PROBS, IDS)
    stats = jax.device_get(jax.jit(bin_statistics)(PROBS, IDS))
    gap = stats.prob_sum - stats.label_sum
    index = np.asarray(bin_index(PROBS)).reshape(2, 20, 3)
    filled = np.count_nonzero(stats.count, axis=-1)
    expected = np.zeros((2, 20, 3))
    for b, v, c in np.ndindex(expected.shape):
        m = index[b, v, c]
        expected[b, v, c] = np.sign(gap[b, c, m]) / (stats.count[b, c, m] * filled[b, c] * 2 * 3)
    np.testing.assert_allclose(gradient.reshape(2, 20, 3), expected, atol=1e-7)


# Gradients by finite differences


def away_from_kinks():
    """Probabilities near the centres of 5 bins, and soft labels that differ by an amount of each bin's own."""
    rng = np.random.default_rng(15)
    bins = rng.integers(0, 5, (2, 10, 2))
    probs = 0.1 + 0.2 * bins + rng.uniform(-0.02, 0.02, bins.shape)
    gap = np.array([0.1, 0.16, 0.22, -0.28, -0.34])
    return np.float32(probs), np.float32(probs + gap[bins])


@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_in_probabilities_and_soft_labels_are_finite_differences(kind):
    loss = jax.jit(lambda probs, labels: LOSSES[kind](probs, labels, num_bins=5))
    check_grads(loss, away_from_kinks(), order=1, modes=["rev"], eps=1e-2, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("form", ["ids", "soft"])
def test_gradient_is_that_of_central_differences_in_float64(kind, form):
    """Of the twin's loss, with the bins that the float32 probabilities fall in: away from edges it is linear."""
    labels = twin.sample_labels(form)
    dense = twin.sample_labels("one_hot") if form == "ids" else labels
    bins = twin.bin_statistics(PROBS, labels).bins.reshape(SHAPE)

    def loss(probs):
        sums = np.zeros((3, SHAPE[0], SHAPE[-1], 20))
        for b, *voxel, c in np.ndindex(SHAPE):
            place = (b, *voxel, c)
            sums[:, b, c, bins[place]] += 1, probs[place], dense[place]
        return twin.errors(twin.Stats(*sums, bins), kind).mean()

    _, gradient = value_and_grad(kind, PROBS, labels)
    rng = np.random.default_rng(50)
    for place in [tuple(int(rng.integers(0, n)) for n in SHAPE) for _ in range(12)]:
        ends = []
        for sign in (1, -1):
            moved = PROBS.astype(np.float64)
            moved[place] += sign * 1e-7
            ends.append(loss(moved))
        np.testing.assert_allclose(gradient[place], (ends[0] - ends[1]) / 2e-7, rtol=1e-5, atol=1e-7)


def test_gradient_in_logits_is_finite_differences():
    probs, labels = away_from_kinks()
    logits = np.log(probs / (1 - probs))
    loss = jax.jit(lambda logits: mL1_ace(jax.nn.sigmoid(logits), labels, num_bins=5))
    check_grads(loss, (logits,), order=1, modes=["rev"], eps=1e-2, atol=1e-3, rtol=1e-3)


# jit


@pytest.mark.parametrize("kind", LOSSES)
def test_jit_equals_eager(kind):
    loss = LOSSES[kind]
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(PROBS), IDS)
    compiled, compiled_gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(PROBS), IDS)
    np.testing.assert_allclose(compiled, value, rtol=1e-6)
    np.testing.assert_allclose(compiled_gradient, gradient, rtol=1e-6)


# Masks


@pytest.mark.parametrize(
    ("kind", "where"),
    [("ace", PER_VOXEL), ("ace", PER_CLASS), ("ece", PER_VOXEL), ("mce", PER_VOXEL)],
    ids=["ace-per_voxel", "ace-per_class", "ece", "mce"],
)
def test_nan_outside_the_mask_touches_neither_value_nor_gradient(kind, where):
    hidden = ~where if where.shape == SHAPE else np.repeat(~where[..., None], 3, -1)
    probs, labels = PROBS.copy(), twin.sample_labels("soft")
    loss, gradient = value_and_grad(kind, probs, labels, where=where)
    probs[hidden], labels[hidden] = np.nan, np.nan
    with_nan, with_nan_gradient = value_and_grad(kind, probs, labels, where=where)
    assert np.isfinite(loss)
    assert with_nan == loss
    np.testing.assert_array_equal(with_nan_gradient, gradient)
    np.testing.assert_array_equal(np.asarray(gradient)[hidden], 0)


@pytest.mark.parametrize("kind", LOSSES)
def test_nan_inside_the_mask_makes_the_loss_nan(kind):
    probs = PROBS.copy()
    probs[1, 2, 3, 1] = np.nan
    assert np.isnan(value(kind, probs, IDS))
    each = value(kind, probs, IDS, reduction="none")
    np.testing.assert_array_equal(np.isnan(each), [[False] * 3, [False, True, False]])


def test_a_fully_masked_image_is_left_out_of_the_mean():
    where = np.zeros(SHAPE[:-1], bool)
    where[0] = True
    loss, gradient = value_and_grad("ace", PROBS, IDS, where=where)
    np.testing.assert_allclose(loss, twin.loss(PROBS[:1], IDS[:1])[0], atol=1e-6)
    np.testing.assert_array_equal(gradient[1], 0)
    each = value("ace", PROBS, IDS, where=where, reduction="none")
    np.testing.assert_array_equal(each[1], 0)


@pytest.mark.parametrize("kind", LOSSES)
def test_nothing_counted_is_zero_with_a_zero_gradient(kind):
    loss, gradient = value_and_grad(kind, PROBS, IDS, where=np.zeros(SHAPE[:-1], bool))
    assert loss == 0
    np.testing.assert_array_equal(gradient, np.zeros(SHAPE))


def test_a_class_masked_everywhere_is_left_out_of_the_mean():
    where = np.ones(SHAPE, bool)
    where[..., 2] = False
    expected = twin.loss(PROBS, IDS, reduction="none")[0][:, :2].mean()
    np.testing.assert_allclose(value("ace", PROBS, IDS, where=where), expected, atol=1e-6)


# Classes


@pytest.mark.parametrize("form", [*twin.LABEL_FORMS, "uint8"])
def test_without_background_is_the_loss_of_the_other_classes(form):
    if form == "uint8":
        labels, others = IDS.astype(np.uint8), twin.sample_labels("one_hot")[..., 1:]
    else:
        labels = twin.sample_labels(form)
        others = labels[..., 1:] if labels.shape == SHAPE else twin.sample_labels("one_hot")[..., 1:]
    loss, gradient = value_and_grad("ace", PROBS, labels, include_background=False)
    expected, expected_gradient = value_and_grad("ace", PROBS[..., 1:], others)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[..., 1:], expected_gradient, rtol=1e-6)
    np.testing.assert_array_equal(gradient[..., 0], 0)


def test_class_weights_are_those_of_a_mean():
    each = twin.loss(PROBS, IDS, reduction="none")[0]
    for weights in ([1, 1, 1], [5, 5, 5], [0, 0, 7], [1, 2, 3]):
        weighted = np.average(each, axis=1, weights=weights).mean()
        np.testing.assert_allclose(
            value("ace", PROBS, IDS, class_weights=np.float32(weights)), weighted, atol=1e-6
        )


def test_class_weights_that_are_all_zero_give_zero():
    assert value("ace", PROBS, IDS, class_weights=np.zeros(3, np.float32)) == 0


def test_an_empty_class_contributes_zero_and_still_counts_in_the_mean():
    ids = np.where(IDS == 2, 0, IDS)
    ids[0] = np.where(ids[0] == 1, 0, ids[0])
    each = twin.loss(PROBS, ids, reduction="none")[0]
    loss, gradient = value_and_grad("ace", PROBS, ids, ignore_empty_classes=True)
    np.testing.assert_allclose(loss, (each[0, 0] + each[1, 0] + each[1, 1]) / 6, atol=1e-6)
    np.testing.assert_array_equal(gradient[..., 2], 0)
    np.testing.assert_array_equal(gradient[0, ..., 1], 0)
    assert np.abs(gradient[1, ..., 1]).max() > 0
    np.testing.assert_allclose(value("ace", PROBS, ids), each.mean(), atol=1e-6)


def test_a_class_is_empty_if_its_voxels_are_masked():
    where = IDS != 1
    each = value("ace", PROBS, IDS, where=where, ignore_empty_classes=True, reduction="none")
    np.testing.assert_array_equal(each[:, 1], 0)
    assert (np.asarray(each)[:, [0, 2]] > 0).all()


def test_reductions_agree():
    each = value("ace", PROBS, IDS, reduction="none")
    assert each.shape == (2, 3)
    np.testing.assert_allclose(value("ace", PROBS, IDS, reduction="sum"), each.sum(), rtol=1e-6)
    np.testing.assert_allclose(value("ace", PROBS, IDS, reduction="mean"), each.mean(), rtol=1e-6)


# The weighted sum


def soft_dice_by_hand(logits, one_hot, smooth, first_class=0):
    """1 - (2 I + 2 s) / (P + T + 2 s), averaged over images and classes; `smooth` s is half of MONAI's."""
    probs = softmax_by_hand(logits)[..., first_class:]
    one_hot = one_hot[..., first_class:]
    overlap, sizes = np.minimum(probs, one_hot).sum((1, 2)), (probs + one_hot).sum((1, 2))
    return (1 - (2 * overlap + 2 * smooth) / (sizes + 2 * smooth)).mean()


def softmax_by_hand(logits):
    powers = np.exp(logits.astype(np.float64))
    return powers / powers.sum(-1, keepdims=True)


def cross_entropy_by_hand(logits, one_hot):
    return -(one_hot * np.log(softmax_by_hand(logits))).sum(-1).mean()


def ace_by_hand(logits, labels, **options):
    return twin.loss(softmax_by_hand(logits).astype(np.float32), labels, **options)[0]


@functools.cache
def compiled_sum(options):
    return jax.jit(
        jax.value_and_grad(lambda logits, labels: segmentation_loss(logits, labels, **dict(options)))
    )


def weighted_sum(logits, labels, **options):
    return compiled_sum(tuple(options.items()))(logits, labels)


@pytest.mark.parametrize("form", ["ids", "one_hot", "soft"])
def test_segmentation_loss_is_the_weighted_sum_of_its_parts(form):
    labels = twin.sample_labels(form)
    dense = twin.sample_labels("one_hot") if form == "ids" else labels
    parts = {
        "dice": soft_dice_by_hand(LOGITS, dense, 5e-6),
        "cross_entropy": cross_entropy_by_hand(LOGITS, dense),
        "ace": ace_by_hand(LOGITS, labels),
    }
    default = parts["dice"] + parts["cross_entropy"] + 0.3 * parts["ace"]
    np.testing.assert_allclose(weighted_sum(LOGITS, labels)[0], default, rtol=1e-5)
    for weights in (
        {"dice": 0.7, "cross_entropy": 0.2, "ace": 1.5},
        {"dice": 0, "cross_entropy": 0, "ace": 2},
    ):
        expected = sum(weight * parts[name] for name, weight in weights.items())
        np.testing.assert_allclose(weighted_sum(LOGITS, labels, **weights)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "bfloat16"])
def test_segmentation_loss_takes_one_hot_labels_of_any_dtype(dtype):
    labels = twin.sample_labels("one_hot")
    expected = weighted_sum(LOGITS, labels, ace=0)[0]
    np.testing.assert_allclose(
        weighted_sum(LOGITS, jnp.asarray(labels, dtype), ace=0)[0], expected, rtol=1e-6
    )


def test_ids_outside_the_classes_cost_what_a_row_of_zeros_costs():
    ids = IDS.copy()
    ids[:, 0], ids[:, 1, 0], ids[:, 2, 0] = -1, 3, 255
    rows = np.stack([ids == c for c in range(3)], axis=-1).astype(np.float32)
    for weights in ({"cross_entropy": 0, "ace": 0}, {"dice": 0, "ace": 0}, {}):
        loss, gradient = weighted_sum(LOGITS, ids, **weights)
        expected, expected_gradient = weighted_sum(LOGITS, rows, **weights)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)


def test_segmentation_loss_uses_the_parts_of_optax():
    one_hot = twin.sample_labels("one_hot")
    dice = jax.jit(functools.partial(optax.losses.dice_loss, smooth=0.5))(LOGITS, one_hot).mean()
    entropy = jax.jit(optax.losses.softmax_cross_entropy)(LOGITS, one_hot).mean()
    loss, _ = weighted_sum(LOGITS, IDS, dice=2, cross_entropy=3, ace=0, dice_smooth=0.5)
    np.testing.assert_allclose(loss, 2 * dice + 3 * entropy, rtol=1e-6)


def test_segmentation_loss_leaves_background_out_of_dice_alone():
    loss, _ = weighted_sum(LOGITS, IDS, cross_entropy=0, ace=0, dice_include_background=False)
    expected = soft_dice_by_hand(LOGITS, twin.sample_labels("one_hot"), 5e-6, first_class=1)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_segmentation_loss_hands_options_to_mL1_ace():
    options = {"num_bins": 7, "include_background": False, "closed": "left", "ignore_empty_classes": True}
    loss = jax.jit(
        lambda x: segmentation_loss(x, IDS, dice=0, cross_entropy=0, ace=1, where=PER_VOXEL, **options)
    )(LOGITS)
    np.testing.assert_allclose(loss, ace_by_hand(LOGITS, IDS, where=PER_VOXEL, **options), atol=1e-6)


def test_a_mask_of_segmentation_loss_is_a_crop_in_every_part():
    """All images lose the same rows, so that masked and cropped are one."""
    where = np.zeros(SHAPE[:-1], bool)
    where[:, 1:3] = True
    broken = np.where(where[..., None], LOGITS, np.nan)
    without_background = {"dice": 1, "dice_include_background": False}
    for weights in (
        *PARTS,
        {"dice": 1},
        without_background,
        {"cross_entropy": 1},
        {"ace": 1, "binning": "soft"},
    ):
        options = {"dice": 0, "cross_entropy": 0, "ace": 0} | weights
        if "svls" in options or "nacl" in options:
            continue  # these look at neighbours beyond the crop
        masked = jax.jit(
            jax.value_and_grad(functools.partial(segmentation_loss, labels=IDS, where=where, **options))
        )
        loss, gradient = masked(broken)
        expected, expected_gradient = weighted_sum(LOGITS[:, 1:3], IDS[:, 1:3], **options)
        np.testing.assert_allclose(loss, expected, rtol=1e-5, err_msg=str(weights))
        np.testing.assert_allclose(gradient[:, 1:3], expected_gradient, atol=1e-6, err_msg=str(weights))
        assert (gradient[:, :1] == 0).all()
        assert (gradient[:, 3:] == 0).all()


def test_parts_of_segmentation_loss_are_the_losses_of_their_names():
    for (name, weight), loss in zip((item for part in PARTS for item in part.items()), ALONE, strict=True):
        options = {"dice": 0, "cross_entropy": 0, "ace": 0} | {name: weight}
        np.testing.assert_allclose(
            weighted_sum(LOGITS, IDS, **options)[0],
            weight * jax.jit(loss)(LOGITS, IDS),
            rtol=1e-5,
            err_msg=name,
        )


PARTS = (
    {"ace": 0.7},
    {"focal": 2.0},
    {"label_smoothing": 0.5},
    {"svls": 1.5},
    {"mbls": 1.0},
    {"nacl": 0.3},
    {"dsc_plus_plus": 3.0},
)
ALONE = (
    lambda x, y: mL1_ace(jax.nn.softmax(x), y),
    calib_jax.focal_loss,
    calib_jax.label_smoothing_loss,
    calib_jax.spatially_varying_label_smoothing_loss,
    calib_jax.margin_label_smoothing_loss,
    calib_jax.neighbor_aware_loss,
    calib_jax.dsc_plus_plus_loss,
)


def test_segmentation_loss_of_bfloat16_logits_is_computed_in_float32():
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    expected = weighted_sum(logits.astype(jnp.float32), IDS)[0]
    loss, gradient = weighted_sum(logits, IDS)
    assert loss.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_gradient_of_segmentation_loss_is_the_sum_of_those_of_its_parts():
    dice, entropy, both, all_parts = (
        weighted_sum(LOGITS, IDS, **weights)[1]
        for weights in ({"cross_entropy": 0, "ace": 0}, {"dice": 0, "ace": 0}, {"ace": 0}, {})
    )
    np.testing.assert_allclose(both, dice + entropy, atol=1e-7)
    ace = jax.jit(jax.grad(lambda logits: mL1_ace(jax.nn.softmax(logits), IDS)))(LOGITS)
    np.testing.assert_allclose(all_parts, both + 0.3 * ace, atol=1e-7)


def test_dice_smooth_is_half_of_that_of_monai():
    torch = pytest.importorskip("torch")
    monai_losses = pytest.importorskip("monai.losses")
    first = (torch.tensor(np.moveaxis(x, -1, 1).copy()) for x in (LOGITS, twin.sample_labels("one_hot")))
    dice = monai_losses.DiceLoss(softmax=True, smooth_nr=0.6, smooth_dr=0.6)(*first).item()
    loss, _ = weighted_sum(LOGITS, IDS, cross_entropy=0, ace=0, dice_smooth=0.3)
    np.testing.assert_allclose(loss, dice, rtol=1e-5)


# Wrong calls

P = np.full((2, 4, 5, 3), 0.3, np.float32)
Y = np.zeros((2, 4, 5), np.int32)
ONE = np.full((2, 4, 5, 1), 0.3, np.float32)

WRONG_CALLS = {
    "probs_of_integers": (lambda: mL1_ace(Y, Y), TypeError, ["probs", "int32", "floating point"]),
    "probs_of_booleans": (lambda: mL1_ace(P > 0.5, Y), TypeError, ["probs", "bool", "floating point"]),
    "probs_of_one_axis": (
        lambda: mL1_ace(P[0, 0, 0], Y[0, 0, 0]),
        ValueError,
        ["probs", "(3,)", "[batch, *spatial, classes]"],
    ),
    "probs_without_images": (lambda: mL1_ace(P[:0], Y[:0]), ValueError, ["probs", "(0, 4, 5, 3)", "empty"]),
    "probs_without_voxels": (
        lambda: mL1_ace(P[:, :0], Y[:, :0]),
        ValueError,
        ["probs", "(2, 0, 5, 3)", "empty"],
    ),
    "probs_channel_first": (
        lambda: mL1_ace(np.moveaxis(P, -1, 1), Y),
        ValueError,
        ["labels", "(2, 3, 4)", "(2, 3, 4, 5)", "(2, 4, 5)", "moveaxis"],
    ),
    "labels_channel_first": (
        lambda: mL1_ace(P, np.moveaxis(P, -1, 1)),
        ValueError,
        ["labels", "(2, 4, 5)", "(2, 4, 5, 3)", "(2, 3, 4, 5)", "moveaxis"],
    ),
    "labels_of_another_size": (
        lambda: mL1_ece(P, Y[:, :3]),
        ValueError,
        ["labels", "(2, 3, 5)", "(2, 4, 5)"],
    ),
    "labels_of_another_batch": (lambda: mL1_mce(P, Y[:1]), ValueError, ["labels", "(1, 4, 5)", "(2, 4, 5)"]),
    "labels_with_an_axis_of_one": (lambda: mL1_ace(P, Y[..., None]), ValueError, ["labels", "(2, 4, 5, 1)"]),
    "class_ids_in_floats": (
        lambda: mL1_ace(P, Y.astype(np.float32)),
        TypeError,
        ["labels", "float32", "integers", "astype"],
    ),
    "class_ids_in_booleans": (
        lambda: mL1_ace(P, Y == 0),
        TypeError,
        ["labels", "bool", "integers", "astype"],
    ),
    "labels_of_complex_numbers": (
        lambda: mL1_ace(P, P.astype(np.complex64)),
        TypeError,
        ["labels", "complex64"],
    ),
    "where_of_floats": (
        lambda: mL1_ace(P, Y, where=np.ones(Y.shape, np.float32)),
        TypeError,
        ["where", "float32", "boolean"],
    ),
    "where_of_integers": (lambda: mL1_ece(P, Y, where=Y), TypeError, ["where", "int32", "boolean"]),
    "where_of_another_shape": (
        lambda: mL1_ace(P, Y, where=np.ones((2, 1, 1), bool)),
        ValueError,
        ["where", "(2, 1, 1)", "(2, 4, 5)", "(2, 4, 5, 3)"],
    ),
    "where_with_an_axis_of_one": (
        lambda: mL1_mce(P, Y, where=np.ones((2, 4, 5, 1), bool)),
        ValueError,
        ["where", "(2, 4, 5, 1)", "(2, 4, 5)"],
    ),
    "no_bins": (lambda: mL1_ace(P, Y, num_bins=0), ValueError, ["num_bins", "0", "at least 1"]),
    "negative_bins": (
        lambda: bin_statistics(P, Y, num_bins=-3),
        ValueError,
        ["num_bins", "-3", "at least 1"],
    ),
    "bins_in_a_float": (lambda: mL1_ece(P, Y, num_bins=20.0), TypeError, ["num_bins", "float", "int"]),
    "bins_in_a_string": (lambda: mL1_mce(P, Y, num_bins="20"), TypeError, ["num_bins", "str", "int"]),
    "bins_in_a_boolean": (lambda: mL1_ace(P, Y, num_bins=True), TypeError, ["num_bins", "bool", "int"]),
    "bins_given_as_edges": (
        lambda: bin_edges(np.linspace(0, 1, 5)),
        TypeError,
        ["num_bins", "ndarray", "int"],
    ),
    "traced_bins": (
        lambda: jax.jit(lambda n: mL1_ace(P, Y, num_bins=n))(20),
        TypeError,
        ["num_bins", "Tracer", "static_argnames"],
    ),
    "closed_on_both_sides": (
        lambda: mL1_ace(P, Y, closed="both"),
        ValueError,
        ["closed", "'both'", "'right'", "'left'"],
    ),
    "closed_as_a_boolean": (
        lambda: bin_index(P, closed=True),
        ValueError,
        ["closed", "True", "'right'", "'left'"],
    ),
    "unknown_reduction": (
        lambda: mL1_ace(P, Y, reduction="average"),
        ValueError,
        ["reduction", "'average'", "'mean'", "'sum'", "'none'"],
    ),
    "too_few_class_weights": (
        lambda: mL1_ace(P, Y, class_weights=[1.0, 2.0]),
        ValueError,
        ["class_weights", "(2,)", "(3,)"],
    ),
    "a_single_class_weight": (
        lambda: mL1_ece(P, Y, class_weights=2.0),
        ValueError,
        ["class_weights", "()", "(3,)"],
    ),
    "a_weight_for_the_background_left_out": (
        lambda: mL1_ace(P, Y, class_weights=[1.0, 2.0, 3.0], include_background=False),
        ValueError,
        ["class_weights", "(3,)", "(2,)"],
    ),
    "nothing_but_background": (
        lambda: mL1_ace(ONE, Y, include_background=False),
        ValueError,
        ["include_background=False", "(2, 4, 5, 1)"],
    ),
    "logits_of_integers": (lambda: segmentation_loss(Y, Y), TypeError, ["logits", "int32", "floating point"]),
    "logits_of_one_class": (
        lambda: segmentation_loss(ONE, Y),
        ValueError,
        ["logits", "(2, 4, 5, 1)", "two classes"],
    ),
    "logits_channel_first": (
        lambda: segmentation_loss(np.moveaxis(P, -1, 1), Y),
        ValueError,
        ["labels", "logits", "(2, 3, 4, 5)", "moveaxis"],
    ),
    "every_part_of_weight_zero": (
        lambda: segmentation_loss(P, Y, dice=0, cross_entropy=0, ace=0),
        ValueError,
        ["dice", "cross_entropy", "ace", "other than 0"],
    ),
    "adaptive_bins_of_split_images": (
        lambda: mL1_ace(P, Y, binning="adaptive", axis_name="space"),
        ValueError,
        ["adaptive", "axis_name", "'space'"],
    ),
    "neighbours_in_split_images": (
        lambda: segmentation_loss(P, Y, svls=1.0, axis_name="space"),
        ValueError,
        ["svls", "axis_name", "'space'"],
    ),
    "the_other_neighbours_in_split_images": (
        lambda: segmentation_loss(P, Y, nacl=1.0, axis_name=("row", "column")),
        ValueError,
        ["nacl", "axis_name", "'row'"],
    ),
    "misspelt_option": (
        lambda: segmentation_loss(P, Y, dice=0, cross_entropy=0, num_bin=5),
        TypeError,
        ["num_bin"],
    ),
    "label_maps_of_two_shapes": (
        lambda: dice_score(Y, Y[:, :3], num_classes=3),
        ValueError,
        ["predictions", "labels", "(2, 4, 5)", "(2, 3, 5)"],
    ),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_wrong_call_says_what_came_and_what_is_accepted(name):
    call, error, words = WRONG_CALLS[name]
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    missing = [word for word in words if word not in message]
    assert not missing, message


@pytest.mark.parametrize("name", ["probs_of_integers", "labels_of_another_size", "where_of_another_shape"])
def test_a_wrong_call_is_refused_while_it_is_traced(name):
    call, error, _ = WRONG_CALLS[name]
    with pytest.raises(error):
        jax.eval_shape(call)


def test_traced_values_are_never_refused():
    odd = np.full(SHAPE, 7.0, np.float32)
    assert np.isfinite(jax.jit(mL1_ace)(odd, np.full(SHAPE[:-1], 99)))
    for call in (
        jax.grad(lambda probs: mL1_ace(probs, odd)),
        jax.vmap(lambda probs: mL1_ace(probs[None], odd[:1])),
    ):
        jax.eval_shape(call, odd)
    assert calib_jax.mL1_ace is mL1_ace


# Values, where they are concrete

FROM_PROBS = {
    "mL1_ace": mL1_ace,
    "mL1_ece": mL1_ece,
    "mL1_mce": functools.partial(mL1_mce, include_background=False, pool_images=True),
    "bin_statistics": functools.partial(bin_statistics, binning="adaptive"),
    "top_label_statistics": calib_jax.top_label_statistics,
    "brier_score": calib_jax.brier_score,
    "dataset_totals": lambda probs, labels, where=None: TOTALS.update(TOTALS.init(), probs, labels, where),
    "case_results": lambda probs, labels, where=None: CASES.update(
        CASES.init(), probs, labels, np.arange(len(probs)), where
    ),
}
FROM_LOGITS = {
    "segmentation_loss": segmentation_loss,
    "focal": calib_jax.focal_loss,
    "nll": calib_jax.negative_log_likelihood,
    "fit_temperature": lambda x, y: calib_jax.fit_temperature(x + 5 * (y > 0).astype(np.float32), y),
}
TOTALS, CASES = calib_jax.dataset_totals(3), calib_jax.case_results(2, 3)


@pytest.mark.parametrize("name", FROM_PROBS)
def test_logits_and_percent_are_refused_where_they_count(name):
    call, few = FROM_PROBS[name], PROBS.copy()
    few[1, 2, 3, 1], few[0, 0, 0, 2] = 1.0021, np.nan
    for probs, words in (
        (LOGITS, ["probs must lie in [0, 1]", "softmax"]),
        (jnp.asarray(100 * PROBS, jnp.bfloat16), ["probs must lie in [0, 1]", "divide percent by 100"]),
        (few, ["1 of 120", "1.0021", "[1, 2, 3, 1]"]),
    ):
        with pytest.raises(ValueError, match=r"\[0, 1\]") as raised:
            call(probs, IDS)
        assert not [word for word in words if word not in str(raised.value)], str(raised.value)
    masked = np.ones(SHAPE[:-1], bool)
    masked[1, 2, 3] = False
    jax.block_until_ready(call(few, IDS, where=masked))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rounding_is_not_refused(dtype):
    rounded = PROBS.copy()
    rounded[0, 0, 0], rounded[0, 0, 1], rounded[0, 0, 2] = -2e-15, 1 + 2.0**-23, 1 + 9e-4
    rounded[1, 0, 0] = np.nan
    assert np.isnan(mL1_ace(jnp.asarray(rounded, dtype), IDS))
    for odd in (-0.1, 1.1, -np.inf, np.inf):
        rounded[0, 0, 0, 0] = odd
        with pytest.raises(ValueError, match="1 of 120"):
            mL1_ace(jnp.asarray(rounded, dtype), IDS)


@pytest.mark.parametrize("name", [*FROM_PROBS, *FROM_LOGITS])
def test_masks_of_255_are_refused_and_overlapping_regions_are_not(name):
    call, inputs = (FROM_PROBS[name], PROBS) if name in FROM_PROBS else (FROM_LOGITS[name], LOGITS)
    regions = twin.sample_labels("regions")
    jax.block_until_ready(call(inputs, regions))
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 1\].*255"):
        call(inputs, (255 * regions).astype(np.uint8))


def test_a_check_of_values_compiles_nothing(caplog):
    for size in range(3, 9):
        probs, ids = jnp.full((1, size, 2), 0.5), jnp.zeros((1, size), jnp.int32)
        caplog.clear()
        with jax.log_compiles():
            check_values({"probs": probs, "labels": ids})
        assert not caplog.records


# Class ids of any integers

BIG = 300  # more classes than 8 bits have numbers
DTYPES = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
BIG_PROBS = np.random.default_rng(16).dirichlet(np.ones(BIG), (1, 4, 2)).astype(np.float32)
ID_FUNCTIONS = {
    "ace": jax.jit(lambda ids: mL1_ace(BIG_PROBS, ids, reduction="none", num_bins=2)),
    "no_background": jax.jit(
        lambda ids: mL1_ace(BIG_PROBS, ids, reduction="none", num_bins=2, include_background=False)
    ),
    "soft_gradient": jax.jit(lambda ids: jax.grad(mL1_ace)(BIG_PROBS, ids, binning="soft", num_bins=2)),
    "segmentation": jax.jit(
        lambda ids: segmentation_loss(BIG_PROBS, ids, include_background=False, svls=1.0)
    ),
    "brier": jax.jit(lambda ids: calib_jax.brier_score(BIG_PROBS, ids)),
    "dice": lambda ids: dice_score(np.zeros((1, 4, 2), int), ids, num_classes=BIG),
}


@st.composite
def ids_of_a_dtype(draw):
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    edges = [0, 1, -1, 127, 128, 255, 256, 299, 300, 2**31, 2**32, 2**32 + 1, 2**63, low, low + 1, high]
    edge = st.sampled_from([edge for edge in edges if low <= edge <= high])
    return np.array(draw(st.lists(edge, min_size=8, max_size=8)), dtype).reshape(1, 4, 2)


@settings(max_examples=20, deadline=None)
@given(ids_of_a_dtype(), st.sampled_from(sorted(ID_FUNCTIONS)))
def test_ids_of_any_integers_are_exact(ids, name):
    """They give what int32 gives of them, no class where they are none; NumPy compares them exactly."""
    exact = np.array([i if 0 <= i < BIG else -1 for i in ids.reshape(-1).tolist()], np.int32)
    call = ID_FUNCTIONS[name]
    np.testing.assert_array_equal(call(as_class_ids(ids)), call(exact.reshape(ids.shape)))
    if name == "ace":
        np.testing.assert_allclose(
            mL1_ace(BIG_PROBS, ids, num_bins=2),
            twin.loss(BIG_PROBS, exact.reshape(ids.shape), num_bins=2)[0],
            rtol=1e-6,
        )


# Options

WRONG_OPTIONS = [
    *({name: float("nan")} for name in ("dice", "ace", "nacl", "dice_smooth")),
    *({name: -1.0} for name in ("cross_entropy", "svls", "dice_smooth")),
    *(
        {"class_weights": weights}
        for weights in ([-1.0, 1, 1], [np.inf, 1, 1], [np.nan, 1, 1], [0.0, 0, 0], [1.0])
    ),
    *({name: "False"} for name in ("include_background", "dice_include_background", "pool_images")),
    {"ignore_empty_classes": 1},
    {"num_bins": 0},
    {"num_bins": 2.5},
    {"binning": "sof"},
    {"closed": "up"},
    {"binning": "soft", "closed": "left"},
    {"focal": "1"},
    {"focal": True},
    {"include_backgroud": False},
]


@pytest.mark.parametrize("options", WRONG_OPTIONS, ids=str)
@pytest.mark.parametrize("ace", [0.0, 0.3])
def test_options_of_segmentation_loss_are_checked_whatever_the_weights(options, ace):
    name = list(options)[-1]
    with pytest.raises((TypeError, ValueError), match=name):
        segmentation_loss(PROBS, IDS, **({"ace": ace, "label_smoothing": 0.1} | options))


def test_options_of_ace_may_stand_beside_a_weight_of_zero():
    weights = np.float32([0, 1, 2])
    assert segmentation_loss(PROBS, IDS, ace=0, num_bins=7, class_weights=weights) == segmentation_loss(
        PROBS, IDS, ace=0
    )


def test_a_traced_weight_of_segmentation_loss_is_refused():
    with pytest.raises(TypeError, match="segmentation_loss_parts"):
        jax.jit(lambda ace: segmentation_loss(PROBS, IDS, ace=ace))(0.3)
