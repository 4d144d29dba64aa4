"""Soft and adaptive bins, and bins pooled over the batch, beside naive twins in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import twin
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_jax import (
    average_calibration_error,
    bin_statistics,
    expected_calibration_error,
    maximum_calibration_error,
    mL1_ace,
    mL1_ece,
    mL1_mce,
)

pytestmark = pytest.mark.usefixtures("strict_promotion")

LOSSES = {"ace": mL1_ace, "ece": mL1_ece, "mce": mL1_mce}
ERRORS = {
    "ace": average_calibration_error,
    "ece": expected_calibration_error,
    "mce": maximum_calibration_error,
}
PROBS = twin.sample_probs(seed=21, shape=(2, 6, 5, 3))
WHERE = np.random.default_rng(3).random((2, 6, 5)) < 0.7


def labels_of(form):
    return twin.sample_labels(form, shape=PROBS.shape)


# Soft bins.


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("form", twin.LABEL_FORMS)
@pytest.mark.parametrize("where", [None, WHERE], ids=["all", "masked"])
def test_soft_errors_equal_the_follow_ups_formula(kind, form, where):
    labels = labels_of(form)
    got = LOSSES[kind](PROBS, labels, binning="soft", num_bins=7, where=where, reduction="none")
    np.testing.assert_allclose(got, twin.soft_errors(PROBS, labels, kind, 7, where), rtol=2e-5)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_soft_sums_of_any_probabilities(data):
    """Near centres, edges and the ends of the interval too."""
    num_bins = data.draw(st.sampled_from([1, 2, 3, 20, 50]))
    special = [i / (2 * num_bins) for i in range(2 * num_bins + 1)]
    value = st.one_of(st.floats(0, 1, width=32), st.sampled_from(special))
    probs = np.array(data.draw(st.lists(value, min_size=16, max_size=16)), np.float32)
    labels = np.array(data.draw(st.lists(st.integers(0, 1), min_size=16, max_size=16)), np.float32)
    stats = bin_statistics(probs[None, :, None], labels[None, :, None], num_bins=num_bins, binning="soft")
    want = twin.soft_sums(probs.astype(np.float64), labels, num_bins)
    for got, sums in zip((stats.count, stats.prob_sum, stats.label_sum), want, strict=True):
        np.testing.assert_allclose(got[0, 0], sums, atol=16 * num_bins * 2e-7)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("form", ["ids", "soft"])
def test_soft_gradient_equals_central_differences(kind, form):
    """In float64, through the weights of the twin; probabilities keep clear of the triangles' kinks."""
    num_bins, step = 5, 1e-6
    rng = np.random.default_rng(4)
    kinks = (np.arange(2 * num_bins + 1)) / (2 * num_bins)
    probs = (rng.choice(kinks[:-1], PROBS.shape) + rng.uniform(0.02, 0.08, PROBS.shape)).astype(np.float32)
    labels = labels_of(form)
    got = jax.grad(lambda p: LOSSES[kind](p, labels, binning="soft", num_bins=num_bins, where=WHERE))(probs)
    for place in [tuple(rng.integers(0, n) for n in PROBS.shape) for _ in range(25)]:
        ends = []
        for sign in (1, -1):
            moved = probs.astype(np.float64)
            moved[place] += sign * step
            ends.append(twin.soft_errors(moved, labels, kind, num_bins, WHERE).mean())
        np.testing.assert_allclose(got[place], (ends[0] - ends[1]) / (2 * step), rtol=2e-3, atol=2e-6)


def test_soft_gradient_of_soft_labels_equals_central_differences():
    labels, num_bins, step = labels_of("soft"), 5, 1e-6
    got = jax.grad(lambda y: mL1_ace(PROBS, y, binning="soft", num_bins=num_bins))(labels)
    for place in [(0, 1, 2, 0), (1, 5, 4, 2), (0, 0, 0, 1)]:
        ends = []
        for sign in (1, -1):
            moved = labels.astype(np.float64)
            moved[place] += sign * step
            ends.append(twin.soft_errors(PROBS, moved, "ace", num_bins).mean())
        np.testing.assert_allclose(got[place], (ends[0] - ends[1]) / (2 * step), rtol=2e-3, atol=2e-6)


def test_traces_of_weight_count_as_an_empty_bin():
    """One voxel a hair beyond a centre gives the next bin a weight under 0.01: ACE has one bin, not two."""
    probs = np.full((1, 1, 1), 0.1255, np.float32)  # centre of the first of 4 bins: 0.125
    stats = bin_statistics(probs, np.zeros((1, 1, 1), np.float32), num_bins=4, binning="soft")
    assert 0 < stats.count[0, 0, 1] < 0.01
    np.testing.assert_allclose(average_calibration_error(stats), [[0.1255]], rtol=1e-5)


def test_soft_bins_ignore_what_is_masked_and_show_nan_that_counts():
    probs = PROBS.copy()
    probs[0, 0, 0, 1] = np.nan
    where = np.ones(PROBS.shape[:-1], bool)
    where[0, 0, 0] = False
    labels = labels_of("ids")

    def loss(p, where):
        return mL1_ace(p, labels, binning="soft", where=where)

    value, gradient = jax.value_and_grad(loss)(probs, where)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert (gradient[0, 0, 0] == 0).all()
    per_class = mL1_ace(probs, labels, binning="soft", reduction="none")
    np.testing.assert_array_equal(np.isnan(per_class), [[False, True, False], [False, False, False]])


def test_soft_statistics_of_parts_add_up():
    labels = labels_of("ids")
    whole = bin_statistics(PROBS, labels, binning="soft")
    parts = [bin_statistics(PROBS[:, i : i + 2], labels[:, i : i + 2], binning="soft") for i in (0, 2, 4)]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, parts[0] + parts[1] + parts[2]
    )


def test_soft_sums_at_size():
    """3.4 million voxels near 0: a running float32 sum would be off by far more."""
    rng = np.random.default_rng(5)
    probs = rng.random((1, 150, 150, 150, 1), np.float32) * np.float32(0.02)
    labels = (rng.random(probs.shape) < probs).astype(np.float32)
    stats = jax.jit(lambda p, y: bin_statistics(p, y, binning="soft"))(probs, labels)
    want = twin.soft_sums(probs.ravel()[:1000].astype(np.float64), labels.ravel()[:1000], 20)
    assert want[0][1:].sum() == 0  # all weight on the first bin, so that plain sums are the truth
    np.testing.assert_allclose(stats.count[0, 0, 0], probs.size, rtol=1e-6)
    np.testing.assert_allclose(stats.mean_prob[0, 0, 0], probs.astype(np.float64).mean(), rtol=1e-6)
    np.testing.assert_allclose(stats.mean_label[0, 0, 0], labels.astype(np.float64).mean(), rtol=1e-6)


# Adaptive bins.


def adaptive_twin(p, y, num_bins):
    """Count and sums of bins whose edges are quantiles: an edge is the ceil(k n / M)-th smallest value."""
    ordered, n = np.sort(p), len(p)
    edges = [ordered[max(-(-k * n // num_bins) - 1, 0)] for k in range(1, num_bins)] if n else []
    bins = np.array([sum(x > edge for edge in edges) for x in p], int)
    return [np.bincount(bins, w, num_bins) for w in (np.ones(n), p.astype(np.float64), y)]


@pytest.mark.parametrize("where", [None, WHERE], ids=["all", "masked"])
@pytest.mark.parametrize("num_bins", [1, 2, 7, 40])
def test_adaptive_bins_equal_the_twin(num_bins, where):
    labels = labels_of("one_hot")
    stats = bin_statistics(PROBS, labels, num_bins=num_bins, binning="adaptive", where=where)
    for b, c in np.ndindex(2, 3):
        keep = np.ones((6, 5), bool) if where is None else where[b]
        want = adaptive_twin(PROBS[b, ..., c][keep], labels[b, ..., c][keep], num_bins)
        np.testing.assert_array_equal(stats.count[b, c], want[0])
        np.testing.assert_allclose(stats.prob_sum[b, c], want[1], rtol=1e-6)
        np.testing.assert_array_equal(stats.label_sum[b, c], want[2])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_adaptive_bins_order_values_of_either_sign(dtype):
    """Inside jit no value is refused, such as one that rounding brought below 0."""
    values, labels = (PROBS - 0.3).astype(dtype), labels_of("one_hot")
    stats = jax.jit(functools.partial(bin_statistics, num_bins=7, binning="adaptive"))(values, labels)
    for b, c in np.ndindex(2, 3):
        want = adaptive_twin(values[b, ..., c].ravel(), labels[b, ..., c].ravel(), 7)
        np.testing.assert_array_equal(stats.count[b, c], want[0])


def test_adaptive_bins_hold_equal_shares_and_keep_ties_together():
    probs = np.random.default_rng(6).random((1, 1000, 1), np.float32)
    hit = np.ones_like(probs)
    assert (bin_statistics(probs, hit, num_bins=8, binning="adaptive").count == 125).all()
    tied = bin_statistics(np.full_like(probs, 0.3), hit, num_bins=8, binning="adaptive")
    assert sorted(tied.count[0, 0].tolist()) == [0] * 7 + [1000]


def test_adaptive_bins_do_not_depend_on_the_order_of_voxels():
    labels = labels_of("ids")
    order = np.random.default_rng(7).permutation(30)
    flat, flat_labels = PROBS.reshape(2, 30, 3), labels.reshape(2, 30)
    a = bin_statistics(flat, flat_labels, binning="adaptive", num_bins=6)
    b = bin_statistics(flat[:, order], flat_labels[:, order], binning="adaptive", num_bins=6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


def test_adaptive_loss_has_the_gradient_of_fixed_bins():
    labels = labels_of("ids")
    stats = bin_statistics(PROBS, labels, binning="adaptive", num_bins=3)
    gradient = jax.grad(lambda p: mL1_ace(p, labels, binning="adaptive", num_bins=3))(PROBS)
    per_bin = np.abs(np.sign(stats.mean_prob - stats.mean_label) / (stats.weight * 3 * 6))
    for b, c in np.ndindex(2, 3):
        assert set(np.unique(np.abs(gradient[b, ..., c]))) <= set(np.asarray(per_bin[b, c], np.float32)) | {0}


def test_a_nan_stays_in_the_last_adaptive_bin_of_its_class():
    probs = PROBS.copy()
    probs[1, 2, 2, 0] = np.nan
    stats = bin_statistics(probs, labels_of("ids"), binning="adaptive", num_bins=4)
    assert np.isnan(stats.prob_sum).sum() == 1
    assert np.isnan(stats.prob_sum[1, 0, 3])
    assert (stats.count.sum(-1) == 30).all()


# All images in one set of bins.


@pytest.mark.parametrize("binning", ["hard", "soft", "adaptive"])
@pytest.mark.parametrize("form", ["ids", "soft"])
def test_pooled_images_are_one_large_image(binning, form):
    labels = labels_of(form)
    got = mL1_ace(PROBS, labels, binning=binning, pool_images=True, where=WHERE, reduction="none")
    merged = [x.reshape(1, 12, *x.shape[2:]) for x in (PROBS, labels, WHERE)]
    want = mL1_ace(*merged[:2], binning=binning, where=merged[2], reduction="none")
    assert got.shape == (1, 3)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_pooled_differs_from_the_mean_over_images():
    labels = labels_of("ids")
    assert abs(mL1_ace(PROBS, labels, pool_images=True) - mL1_ace(PROBS, labels)) > 0.01


# Under transformations, and what is refused.


@pytest.mark.parametrize("binning", ["soft", "adaptive"])
def test_under_jit_vmap_and_one_compilation(binning):
    labels = labels_of("ids")
    loss = jax.jit(jax.value_and_grad(lambda p, y: mL1_ace(p, y, binning=binning)))
    value, gradient = loss(PROBS, labels)
    loss(PROBS[::-1].copy(), labels)
    assert loss._cache_size() == 1
    eager = jax.value_and_grad(lambda p: mL1_ace(p, labels, binning=binning))(PROBS)
    np.testing.assert_allclose(value, eager[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, eager[1], atol=1e-7)
    each = jax.vmap(lambda p, y: mL1_ace(p[None], y[None], binning=binning))(PROBS, labels)
    np.testing.assert_allclose(each.mean(), value, rtol=1e-6)


@pytest.mark.parametrize("binning", ["soft", "adaptive"])
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowers_for_every_platform(binning, platform):
    loss = jax.jit(jax.value_and_grad(lambda p, y: mL1_ace(p, y, binning=binning)))
    shapes = (jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((2, 8, 8), jnp.int32))
    assert platform in jax.export.export(loss, platforms=[platform])(*shapes).platforms


def test_low_precision_probabilities_are_binned_in_float32():
    labels = labels_of("ids")
    low = PROBS.astype(jnp.bfloat16)
    for binning in ("soft", "adaptive"):
        a = mL1_ace(low, labels, binning=binning)
        b = mL1_ace(low.astype(np.float32), labels, binning=binning)
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_closed_is_refused_where_it_means_nothing():
    for binning in ("soft", "adaptive"):
        with pytest.raises(ValueError, match="closed"):
            mL1_ace(PROBS, labels_of("ids"), binning=binning, closed="left")
    with pytest.raises(ValueError, match="binning must be one of 'hard', 'soft', 'adaptive'; got 'fuzzy'"):
        mL1_ace(PROBS, labels_of("ids"), binning="fuzzy")
