"""Which bin a voxel falls in, to the last bit, and what the sums of the bins are."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import twin

import calib_jax
from calib_jax import bin_edges, bin_index, bin_statistics

pytestmark = pytest.mark.usefixtures("strict_promotion")

CLOSED = ("right", "left")
EPS = np.float32(2.0**-23)
GOLDEN_EDGES = np.load(Path(__file__).parent / "golden" / "edges.npz")
PROBS = twin.sample_probs()
SHAPE = PROBS.shape


@functools.partial(jax.jit, static_argnames=("num_bins", "closed"))
def statistics(probs, labels, where=None, **options):
    return bin_statistics(probs, labels, where=where, **options)


def assert_equals_twin(stats, expected, rtol=1e-6):
    np.testing.assert_array_equal(stats.count, expected.count)
    np.testing.assert_allclose(stats.prob_sum, expected.prob_sum, rtol=rtol, atol=1e-7)
    np.testing.assert_allclose(stats.label_sum, expected.label_sum, rtol=rtol, atol=1e-7)


def assert_same_statistics(stats, expected):
    """Counts to the digit, sums to float32 rounding: the order of a sum is free."""
    np.testing.assert_array_equal(stats.count, expected.count)
    np.testing.assert_allclose(stats.prob_sum, expected.prob_sum, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(stats.label_sum, expected.label_sum, rtol=1e-6, atol=1e-6)


# Edges


@pytest.mark.parametrize("num_bins", sorted(map(int, GOLDEN_EDGES)))
def test_edges_have_the_bits_of_stored_torch_linspace(num_bins):
    edges = bin_edges(num_bins)
    assert edges.dtype == np.float32
    np.testing.assert_array_equal(edges.view(np.uint32), GOLDEN_EDGES[str(num_bins)].view(np.uint32))


def test_edges_have_the_bits_of_torch_linspace():
    torch = pytest.importorskip("torch")
    for num_bins in (*range(1, 65), 100, 200, 255, 1000):
        expected = torch.linspace(0.0, 1.0 + torch.finfo(torch.float32).eps, num_bins + 1).numpy()
        np.testing.assert_array_equal(bin_edges(num_bins).view(np.uint32), expected.view(np.uint32))


def test_edges_rise_from_zero_to_just_above_one():
    for num_bins in (1, 2, 3, 20, 1000):
        edges = bin_edges(num_bins)
        assert edges.shape == (num_bins + 1,)
        assert edges[0] == 0
        assert edges[-1] == np.float32(1) + EPS
        assert (np.diff(edges) > 0).all()


def test_twin_has_the_same_edges():
    for num_bins in (*range(1, 65), 100, 1000):
        np.testing.assert_array_equal(
            twin.edges(num_bins).view(np.uint32), bin_edges(num_bins).view(np.uint32)
        )


# Indices


def near_edges(num_bins, steps=4):
    """Every float32 within `steps` of an edge, of i/n, and of i*(1/n) rounded to float32."""
    i = np.arange(num_bins + 1, dtype=np.float32)
    centres = [twin.edges(num_bins), i / np.float32(num_bins), i * (np.float32(1) / np.float32(num_bins))]
    down = up = np.concatenate(centres)
    values = [down]
    for _ in range(steps):
        down, up = np.nextafter(down, np.float32(-1)), np.nextafter(up, np.float32(2))
        values += [down, up]
    return np.concatenate(values)


def searched(values, num_bins, closed):
    """Bin indices by binary search among the float32 edges."""
    side = "left" if closed == "right" else "right"
    return np.searchsorted(twin.edges(num_bins)[1:], values, side=side).clip(max=num_bins - 1)


def assert_indices_beside_edges(bins, closed):
    values = {num_bins: near_edges(num_bins) for num_bins in bins}
    indices = jax.jit(lambda values: {n: bin_index(x, num_bins=n, closed=closed) for n, x in values.items()})(
        values
    )
    for num_bins, x in values.items():
        index = np.asarray(indices[num_bins])
        wrong = index != searched(x, num_bins, closed)
        assert not wrong.any(), (num_bins, x[wrong][:5], index[wrong][:5])


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.parametrize("bins", [range(1, 65), (100, 1000, 4096, 4097, 5000)], ids=["to_64", "more"])
def test_index_of_every_float32_beside_an_edge(bins, closed):
    assert_indices_beside_edges(bins, closed)


def test_index_of_every_float32_beside_an_edge_op_by_op():
    for num_bins in (7, 20):
        values = near_edges(num_bins)
        np.testing.assert_array_equal(
            bin_index(values, num_bins=num_bins), searched(values, num_bins, "right")
        )


def test_index_of_every_float32_beside_an_edge_in_optimised_code():
    """These tests ask XLA for no effort; where it makes one, fused multiplications may round otherwise."""
    program = (
        "import test_binning as t; [t.assert_indices_beside_edges((3, 7, 20, 33, 1000), c) for c in t.CLOSED]"
    )
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("closed", CLOSED)
def test_index_of_floats_of_every_size(closed):
    rng = np.random.default_rng(3)
    bits = rng.integers(0, np.float32(1).view(np.int32) + 1, 100_000, dtype=np.int32)
    values = np.concatenate([bits.view(np.float32), rng.random(100_000, np.float32)])
    for num_bins in (3, 20):
        index = bin_index(values, num_bins=num_bins, closed=closed)
        np.testing.assert_array_equal(index, searched(values, num_bins, closed))


@pytest.mark.parametrize("closed", CLOSED)
def test_index_of_half_precision_values_is_that_of_their_float32(closed):
    for dtype in (jnp.bfloat16, jnp.float16):
        values = jnp.asarray(near_edges(20, steps=0), dtype)
        index = bin_index(values, closed=closed)
        np.testing.assert_array_equal(index, searched(np.asarray(values, np.float32), 20, closed))


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, 0),
        (-0.0, 0),
        (1.0, 9),
        (1.0 + 1e-7, 9),
        (1.0 + 1e-5, 9),
        (7.0, 9),
        (np.inf, 9),
        (-1e-7, 0),
        (-1e-45, 0),
        (-3.0, 0),
        (-np.inf, 0),
        (1e-45, 0),
        (1e-39, 0),
        (float(np.finfo(np.float32).tiny), 0),
        (float(np.finfo(np.float32).max), 9),
        (np.nan, 9),
    ],
)
def test_index_of_a_special_value(value, expected, closed):
    padded = np.full(8, value, np.float32)
    assert bin_index(padded, num_bins=10, closed=closed).tolist() == [expected] * 8


def test_closed_names_the_side_that_holds_the_edge():
    inner = twin.edges(8)[1:-1]
    np.testing.assert_array_equal(bin_index(inner, num_bins=8, closed="right"), np.arange(7))
    np.testing.assert_array_equal(bin_index(inner, num_bins=8, closed="left"), np.arange(1, 8))


def test_default_is_twenty_bins_closed_right():
    values = twin.edges(20)
    np.testing.assert_array_equal(bin_index(values), searched(values, 20, "right"))


def test_index_keeps_the_shape():
    for shape in ((), (3,), (2, 3, 4)):
        index = jax.eval_shape(bin_index, jax.ShapeDtypeStruct(shape, jnp.float32))
        assert (index.shape, index.dtype) == (shape, jnp.int32)


# Statistics


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.parametrize("form", twin.LABEL_FORMS)
@pytest.mark.parametrize("num_bins", [1, 20])
def test_statistics_equal_the_twin(form, closed, num_bins):
    labels = twin.sample_labels(form)
    stats = statistics(PROBS, labels, num_bins=num_bins, closed=closed)
    assert stats.count.shape == (2, 3, num_bins)
    assert jnp.issubdtype(stats.count.dtype, jnp.integer)
    assert_equals_twin(stats, twin.bin_statistics(PROBS, labels, num_bins, closed))


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.parametrize("num_bins", [7, 20])
def test_statistics_of_values_beside_edges_equal_the_twin(num_bins, closed):
    probs = np.resize(near_edges(num_bins, steps=1), (1, 189, 1))
    labels = np.arange(probs.size).reshape(probs.shape) % 2
    stats = statistics(probs, labels, num_bins=num_bins, closed=closed)
    assert_equals_twin(stats, twin.bin_statistics(probs, labels, num_bins, closed))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_probabilities_are_summed_in_float32(dtype):
    probs = jnp.asarray(PROBS, dtype)
    labels = twin.sample_labels("ids")
    stats = statistics(probs, labels)
    assert stats.prob_sum.dtype == jnp.float32
    assert_equals_twin(stats, twin.bin_statistics(np.asarray(probs, np.float32), labels))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
def test_any_integer_holds_class_ids(dtype):
    labels = twin.sample_labels("ids")
    assert_equals_twin(statistics(PROBS, labels.astype(dtype)), twin.bin_statistics(PROBS, labels))


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "bfloat16"])
def test_any_number_holds_one_hot_labels(dtype):
    labels = twin.sample_labels("regions")
    expected = twin.bin_statistics(PROBS, labels)
    assert_equals_twin(statistics(PROBS, jnp.asarray(labels, dtype)), expected)


def test_class_ids_and_their_one_hot_form_agree():
    ids, one_hot = twin.sample_labels("ids"), twin.sample_labels("one_hot")
    assert_same_statistics(statistics(PROBS, ids), statistics(PROBS, one_hot))


def test_ids_outside_the_classes_belong_to_no_class():
    ids = twin.sample_labels("ids")
    ids[:, 0], ids[:, 1], ids[:, 2] = -1, 3, 255
    stats = statistics(PROBS, ids)
    assert_equals_twin(stats, twin.bin_statistics(PROBS, ids))
    np.testing.assert_array_equal(stats.count.sum(-1), np.full((2, 3), 20))
    np.testing.assert_array_equal(stats.label_sum.sum((-2, -1)), [5, 5])


def test_rounding_outside_zero_to_one_is_counted_in_the_end_bins():
    probs = np.array([[[-1e-7], [-0.0], [1.0], [1.0000001]]], np.float32)
    stats = statistics(probs, np.ones((1, 4, 1), np.float32), num_bins=4)
    assert stats.count.tolist() == [[[2, 0, 0, 2]]]


def test_jit_equals_eager():
    labels = twin.sample_labels("ids")
    eager = bin_statistics(PROBS, labels, where=labels > 0)
    chex.assert_trees_all_equal(statistics(PROBS, labels, labels > 0), eager)


def test_every_voxel_is_counted_once_per_class():
    stats = statistics(PROBS, twin.sample_labels("ids"))
    np.testing.assert_array_equal(stats.count.sum(-1), np.full((2, 3), 20))
    np.testing.assert_allclose(stats.prob_sum.sum(-1), PROBS.sum((1, 2)), rtol=1e-6)


@pytest.mark.parametrize("closed", CLOSED)
def test_nan_makes_its_image_and_class_nan_and_no_other(closed):
    probs = PROBS.copy()
    probs[1, 2, 3, 0] = np.nan
    stats = statistics(probs, twin.sample_labels("ids"), closed=closed)
    nan = np.zeros((2, 3, 20), bool)
    nan[1, 0, -1] = True
    np.testing.assert_array_equal(np.isnan(stats.prob_sum), nan)
    np.testing.assert_array_equal(stats.count.sum(-1), np.full((2, 3), 20))


# Masks


@pytest.mark.parametrize("form", twin.LABEL_FORMS)
@pytest.mark.parametrize("mask_shape", [SHAPE[:-1], SHAPE], ids=["per_voxel", "per_class"])
def test_masked_statistics_equal_the_twin(form, mask_shape):
    where = np.random.default_rng(5).random(mask_shape) < 0.6
    labels = twin.sample_labels(form)
    assert_equals_twin(statistics(PROBS, labels, where), twin.bin_statistics(PROBS, labels, where=where))


@pytest.mark.parametrize("mask_shape", [SHAPE[:-1], SHAPE], ids=["per_voxel", "per_class"])
def test_a_mask_of_true_counts_all(mask_shape):
    labels = twin.sample_labels("ids")
    expected = statistics(PROBS, labels)
    assert_same_statistics(statistics(PROBS, labels, np.ones(mask_shape, bool)), expected)


def test_a_mask_of_false_counts_nothing():
    stats = statistics(PROBS, twin.sample_labels("ids"), np.zeros(SHAPE[:-1], bool))
    chex.assert_trees_all_equal(stats, jax.tree.map(jnp.zeros_like, stats))


@pytest.mark.parametrize("form", ["ids", "soft"])
def test_a_mask_is_the_same_as_a_subset(form):
    where = np.zeros(SHAPE[:-1], bool)
    where[:, 1:3, :4] = True
    labels = twin.sample_labels(form)
    subset = statistics(PROBS[:, 1:3, :4], labels[:, 1:3, :4])
    assert_same_statistics(statistics(PROBS, labels, where), subset)


@pytest.mark.parametrize("mask_shape", [SHAPE[:-1], SHAPE], ids=["per_voxel", "per_class"])
def test_values_outside_the_mask_touch_nothing(mask_shape):
    where = np.random.default_rng(5).random(mask_shape) < 0.6
    hidden = ~where if where.shape == SHAPE else np.repeat(~where[..., None], SHAPE[-1], -1)
    probs, labels = PROBS.copy(), twin.sample_labels("soft")
    expected = statistics(probs, labels, where)
    probs[hidden], labels[hidden] = np.nan, np.inf
    chex.assert_trees_all_equal(statistics(probs, labels, where), expected)


# Order, merging, axes


@hypothesis.given(seed=st.integers(0, 2**32 - 1))
@hypothesis.settings(max_examples=30, deadline=None)
def test_the_order_of_voxels_is_free(seed):
    order = np.random.default_rng(seed).permutation(20)
    labels = twin.sample_labels("ids")
    shuffled = PROBS.reshape(2, 20, 3)[:, order].reshape(SHAPE)
    stats = statistics(shuffled, labels.reshape(2, 20)[:, order].reshape(2, 4, 5))
    assert_same_statistics(stats, statistics(PROBS, labels))


@hypothesis.given(
    part=st.lists(st.integers(0, 3), min_size=40, max_size=40), form=st.sampled_from(["ids", "soft"])
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_the_parts_of_any_partition_add_up_to_the_whole(part, form):
    labels, part = twin.sample_labels(form), np.reshape(part, SHAPE[:-1])
    parts = [statistics(PROBS, labels, part == k) for k in range(4)]
    merged = parts[0] + parts[1] + parts[2] + parts[3]
    assert_same_statistics(merged, statistics(PROBS, labels, np.ones(SHAPE[:-1], bool)))


def test_images_of_a_batch_do_not_mix():
    labels = twin.sample_labels("ids")
    both = statistics(PROBS, labels)
    for b in range(2):
        alone = statistics(PROBS[b : b + 1], labels[b : b + 1])
        assert_same_statistics(alone, jax.tree.map(lambda x, b=b: x[b : b + 1], both))


@pytest.mark.parametrize("spatial", [(20,), (20, 1), (2, 5, 2)])
def test_spatial_axes_are_all_alike(spatial):
    labels = twin.sample_labels("ids")
    stats = statistics(PROBS.reshape(2, *spatial, 3), labels.reshape(2, *spatial))
    assert_same_statistics(stats, statistics(PROBS, labels))


def test_spatial_axes_may_be_swapped():
    labels = twin.sample_labels("soft")
    swapped = statistics(np.swapaxes(PROBS, 1, 2), np.swapaxes(labels, 1, 2))
    assert_same_statistics(swapped, statistics(PROBS, labels))


def test_channel_first_arrays_move_their_axis():
    labels = twin.sample_labels("one_hot")
    first = np.ascontiguousarray(np.moveaxis(PROBS, -1, 1)), np.ascontiguousarray(np.moveaxis(labels, -1, 1))
    moved = statistics(*(jnp.moveaxis(x, 1, -1) for x in first))
    assert_same_statistics(moved, statistics(PROBS, labels))


def test_no_spatial_axis_means_one_voxel_an_image():
    probs = np.array([[0.9, 0.1], [0.3, 0.7]], np.float32)
    stats = statistics(probs, np.array([0, 0]), num_bins=2)
    assert stats.count.tolist() == [[[0, 1], [1, 0]], [[1, 0], [0, 1]]]
    assert stats.label_sum.tolist() == [[[0, 1], [0, 0]], [[1, 0], [0, 0]]]


# The pytree


def test_means_are_sums_over_counts_and_nan_in_empty_bins():
    labels = twin.sample_labels("ids")
    stats = statistics(PROBS, labels)
    mean_prob, mean_label = twin.bin_statistics(PROBS, labels).means()
    np.testing.assert_allclose(stats.mean_prob, mean_prob, rtol=1e-6)
    np.testing.assert_allclose(stats.mean_label, mean_label, rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(stats.mean_prob), np.asarray(stats.count) == 0)
    assert np.isnan(stats.mean_prob).any()


def test_mean_probabilities_lie_within_their_bins():
    stats = statistics(PROBS, twin.sample_labels("ids"))
    filled = np.asarray(stats.count) > 0
    edges = twin.edges(20)
    lower, upper = np.broadcast_to(edges[:-1], filled.shape), np.broadcast_to(edges[1:], filled.shape)
    means = np.asarray(stats.mean_prob)[filled]
    assert (means >= lower[filled] - 1e-6).all()
    assert (means <= upper[filled] + 1e-6).all()


def test_sum_pools_images_or_tiles():
    stats = statistics(PROBS, twin.sample_labels("ids"))
    pooled = stats.sum()
    np.testing.assert_array_equal(pooled.count, np.asarray(stats.count).sum(0))
    np.testing.assert_allclose(pooled.prob_sum, np.asarray(stats.prob_sum).sum(0), rtol=1e-6)
    np.testing.assert_array_equal(stats.sum(axis=(0, 1)).count, np.asarray(stats.count).sum((0, 1)))


def test_statistics_are_a_pytree_of_three_arrays():
    stats = statistics(PROBS, twin.sample_labels("ids"))
    leaves, structure = jax.tree.flatten(stats)
    assert len(leaves) == 3
    rebuilt = jax.tree.unflatten(structure, leaves)
    assert isinstance(rebuilt, calib_jax.BinStatistics)
    assert rebuilt.num_bins == 20
    chex.assert_trees_all_equal(rebuilt, stats)


def test_statistics_in_numpy_add_up_beyond_int32():
    count = np.full((1, 1, 2), 2**31 + 5, np.int64)
    stats = calib_jax.BinStatistics(count, 0.25 * count, 0.5 * count)
    np.testing.assert_array_equal((stats + stats).count, 2 * count)
    np.testing.assert_allclose((stats + stats).mean_prob, 0.25, rtol=1e-6)
    np.testing.assert_allclose((stats + stats).mean_label, 0.5, rtol=1e-6)
