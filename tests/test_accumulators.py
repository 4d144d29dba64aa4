"""Streaming accumulators: parts add up to the whole, however they are cut, sent and merged."""

import functools
import io
import itertools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import twin
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from calib_jax import average_calibration_error, bin_statistics, dice_score
from calib_jax import expected_calibration_error as ece_of
from calib_jax import maximum_calibration_error as mce_of
from calib_jax.accumulators import Count, State, Sum, case_results, dataset_totals
from calib_jax.metrics import brier_score, negative_log_likelihood

pytestmark = pytest.mark.usefixtures("strict_promotion")

SHAPE = (8, 6, 5, 3)
PROBS = twin.sample_probs(71, SHAPE)
IDS = twin.sample_labels("ids", SHAPE)
WHERE = np.random.default_rng(72).random(SHAPE[:-1]) < 0.7
TOTALS, CASES = dataset_totals(3), case_results(8, 3)
add_totals, add_cases = jax.jit(TOTALS.update), jax.jit(CASES.update)
merge, compute = jax.jit(TOTALS.merge), jax.jit(TOTALS.compute)
ROWS = np.arange(8, dtype=np.int32)


@functools.cache
def images():
    """The state of each image alone."""
    return [add_totals(TOTALS.init(), PROBS[[i]], IDS[[i]], WHERE[[i]]) for i in range(len(PROBS))]


@functools.cache
def whole():
    return compute(add_totals(TOTALS.init(), PROBS, IDS, WHERE))


def assert_same(actual, expected, rtol=1e-6):
    np.testing.assert_array_equal(actual.stats.count, expected.stats.count)
    np.testing.assert_array_equal(actual.dice, expected.dice)
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=1e-7)


def exact(count):
    return np.asarray(count.high, np.int64) * 2**20 + np.asarray(count.low, np.int64)


def exact_sum(total):
    return np.asarray(total.high, np.float64) + np.asarray(total.low, np.float64)


# Results


@pytest.mark.parametrize("form", ["ids", "one_hot", "soft"])
@pytest.mark.parametrize("where", [None, WHERE])
def test_cases_have_the_metrics_of_images(form, where):
    labels = twin.sample_labels(form, SHAPE)
    results = jax.jit(CASES.compute)(add_cases(CASES.init(), PROBS, labels, ROWS, where))
    stats = bin_statistics(PROBS, labels, where=where)
    hits = labels if form == "ids" else labels.argmax(-1).astype(np.int32)
    expected = {
        "ace": average_calibration_error(stats),
        "ece": ece_of(stats),
        "mce": mce_of(stats),
        "brier": brier_score(PROBS, labels, where=where),
        "nll": negative_log_likelihood(np.log(PROBS), labels, where=where),
        "dice": dice_score(PROBS.argmax(-1), hits, num_classes=3, where=where),
    }
    if form == "soft":
        expected.pop("dice")
        true = (labels > 0.5) & (True if where is None else where[..., None])
        np.testing.assert_array_equal(
            exact(add_cases(CASES.init(), PROBS, labels, ROWS, where).true), true.sum((1, 2))
        )
    np.testing.assert_array_equal(results.stats.count, stats.weight)
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(results, name), values, rtol=1e-5, atol=1e-7, err_msg=name)


def test_totals_have_the_metrics_of_one_image_of_all_voxels():
    def pooled(x):
        return x.reshape(1, -1, *x.shape[3:])

    cases = case_results(1, 3)
    one = cases.compute(cases.update(cases.init(), *map(pooled, (PROBS, IDS)), ROWS[:1], pooled(WHERE)))
    assert_same(whole(), jax.tree.map(lambda x: x[0], one))


@pytest.mark.parametrize("form", ["ids", "one_hot"])
def test_without_background(form):
    labels = twin.sample_labels(form, SHAPE)
    labels = labels.astype(np.uint8) if form == "ids" else labels
    bare = dataset_totals(3, include_background=False)
    found = bare.compute(jax.jit(bare.update)(bare.init(), PROBS, labels))
    everything = compute(add_totals(TOTALS.init(), PROBS, labels))
    np.testing.assert_allclose(found.nll, everything.nll)
    stripped = jax.tree.map(lambda x: x[1:] if x.ndim else x, everything)
    chex.assert_trees_all_close(found, stripped, rtol=1e-6)


def test_ids_outside_the_classes_count_for_bins_but_not_for_nll():
    ids = np.where(WHERE, IDS, 255).astype(np.uint8)
    state = add_totals(TOTALS.init(), PROBS, ids)
    assert exact(state.voxels).sum() == 3 * IDS.size
    assert exact(state.labelled) == WHERE.sum()
    np.testing.assert_allclose(compute(state).nll, whole().nll, rtol=1e-6)


def test_nothing_gives_nan():
    empty = compute(TOTALS.init())
    assert all(
        np.isnan(x).all() for x in (empty.ace, empty.ece, empty.mce, empty.brier, empty.nll, empty.dice)
    )
    masked = add_cases(CASES.init(), PROBS, IDS, ROWS, WHERE & (ROWS[:, None, None] != 3))
    assert np.isnan(CASES.compute(masked).ace[3]).all()
    assert np.isfinite(CASES.compute(masked).nll[:3]).all()


def test_masked_voxels_touch_nothing_and_counted_nan_shows():
    poisoned = np.where(WHERE[..., None], PROBS, np.nan)
    assert_same(compute(add_totals(TOTALS.init(), poisoned, IDS, WHERE)), whole(), rtol=0)
    poisoned = PROBS.copy()
    poisoned[2, 0, 0, 1] = np.nan
    state = add_totals(add_totals(TOTALS.init(), poisoned, IDS), PROBS, IDS)
    results = compute(merge(state, images()[0]))
    np.testing.assert_array_equal(np.isnan(results.ace), [False, True, False])
    np.testing.assert_array_equal(np.isnan(results.brier), [False, True, False])
    assert np.isnan(results.nll)


def test_probability_zero_of_a_true_class_costs_87_nats():
    state = add_totals(TOTALS.init(), np.float32([[[0, 1, 0]]]), np.array([[0]]))
    np.testing.assert_allclose(compute(state).nll, -np.log(np.finfo(np.float32).tiny), rtol=1e-6)


# Merging


@hypothesis.given(
    order=st.permutations(range(8)), parts=st.lists(st.integers(0, 7), max_size=4), tree=st.booleans()
)
@hypothesis.settings(max_examples=25, deadline=None)
def test_any_partition_in_any_order_is_the_whole(order, parts, tree):
    cuts = [0, *sorted(parts), 8]
    groups = [order[a:b] for a, b in itertools.pairwise(cuts)]
    states = [functools.reduce(merge, [images()[i] for i in group], TOTALS.init()) for group in groups]
    while tree and len(states) > 1:
        states = [functools.reduce(merge, states[i : i + 2]) for i in range(0, len(states), 2)]
    assert_same(compute(functools.reduce(merge, states)), whole())


def test_merge_of_cases_and_of_disjoint_rows():
    half = [add_cases(CASES.init(), PROBS[i : i + 4], IDS[i : i + 4], ROWS[i : i + 4]) for i in (0, 4)]
    expected = CASES.compute(add_cases(CASES.init(), PROBS, IDS, ROWS))
    assert_same(CASES.compute(CASES.merge(*half)), expected)
    assert_same(CASES.compute(jax.tree.map(lambda a, b: a + b, *half)), expected)


def test_batches_are_their_images():
    state = functools.reduce(
        lambda s, i: add_totals(s, PROBS[[i]], IDS[[i]], WHERE[[i]]), range(8), TOTALS.init()
    )
    assert_same(compute(state), whole())


@pytest.mark.parametrize("axis", [0, 1])
def test_psum_over_devices_is_a_merge(axis):
    """Eight devices with an image each, or with a slice of every image."""
    mesh = Mesh(np.array(jax.devices()[:8]), ("i",))
    inputs = [np.repeat(x, 4, 1) for x in (PROBS, IDS, WHERE)]  # 24 rows, three a device
    here = P(*((None,) * axis), "i")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=here, out_specs=P())
    def sharded(probs, labels, where):
        return jax.lax.psum(TOTALS.update(TOTALS.init(), probs, labels, where), "i")

    state = jax.jit(sharded)(*inputs)
    expected = add_totals(TOTALS.init(), *inputs)
    assert_same(compute(state), compute(expected))
    again = merge(state, state)
    np.testing.assert_array_equal(exact(again.voxels), 2 * exact(expected.voxels))
    assert (np.asarray(again.voxels.low) < 2**20).all()


def test_psum_of_cases_spread_over_devices():
    mesh = Mesh(np.array(jax.devices()[:8]), ("i",))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("i"), out_specs=P())
    def sharded(probs, labels, case):
        return jax.lax.psum(CASES.update(CASES.init(), probs, labels, case), "i")

    results = jax.jit(CASES.compute)(jax.jit(sharded)(PROBS, IDS, ROWS[::-1]))
    assert_same(results, CASES.compute(add_cases(CASES.init(), PROBS, IDS, ROWS[::-1])))


def test_tiles_of_a_case_are_the_case():
    """In one batch or in many, with padding that is dropped."""
    expected = CASES.compute(add_cases(CASES.init(), PROBS, IDS, ROWS))
    tiles = [x.reshape(8, 2, 3, 5, *x.shape[3:]).reshape(16, 3, 5, *x.shape[3:]) for x in (PROBS, IDS)]
    rows = np.repeat(ROWS, 2)
    together = add_cases(CASES.init(), *tiles, rows)
    assert_same(CASES.compute(together), expected)
    state = CASES.init()
    for i in range(0, 16, 3):
        batch = [np.concatenate([x[i : i + 3], x[: max(0, i + 3 - 16)]]) for x in tiles]
        case = np.concatenate([rows[i : i + 3], [-1, 8, 2**31 - 1][: max(0, i + 3 - 16)]]).astype(np.int32)
        state = add_cases(state, *batch, case)
    assert_same(CASES.compute(state), expected)


@pytest.mark.parametrize("row", [-1, -8, 8, 1000])
def test_rows_out_of_range_are_dropped(row):
    before = add_cases(CASES.init(), PROBS, IDS, ROWS)
    after = add_cases(before, PROBS, IDS, np.full(8, row, np.int32))
    chex.assert_trees_all_equal(after, before)


# Size


def test_counts_are_exact_beyond_int32():
    """2^30 voxels in each bin, ten times, and one more."""
    big = jnp.full((3, 20), 2**30, jnp.int32)
    zero = TOTALS.init()
    one = zero._replace(voxels=Count(jnp.ones_like(big), jnp.ones_like(big)))  # 2^20 + 1
    state = zero._replace(voxels=Count(jnp.zeros_like(big), big))
    total = functools.reduce(merge, [state] * 10, one)
    np.testing.assert_array_equal(exact(total.voxels), 10 * 2**30 + 2**20 + 1)
    assert (np.asarray(total.voxels.low) < 2**20).all()
    np.testing.assert_allclose(compute(total).stats.count, 10 * 2**30 + 2**20 + 1, rtol=1e-7)


def test_sums_are_exact_over_many_updates():
    """0.1, two hundred thousand times: a float32 sum is off by 1e-3."""

    def step(state, _):
        return TOTALS.merge(state, part), None

    def total(value):
        return Sum(jnp.full((), value, jnp.float32), jnp.zeros((), jnp.float32))

    part = TOTALS.init()._replace(nll=total(0.1))
    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, length=200_000))(TOTALS.init())
    np.testing.assert_allclose(exact_sum(state.nll), np.float64(np.float32(0.1)) * 200_000, rtol=1e-7)


def test_sums_are_hardly_rounded_by_plain_addition():
    """What psum does to states of a thousand devices."""
    rng = np.random.default_rng(73)
    values = rng.uniform(1e3, 3e3, 1000).astype(np.float32)
    zero = TOTALS.init()
    parts = [
        jax.device_get(merge(zero._replace(nll=Sum(jnp.float32(v), jnp.float32(v * 1e-8))), zero))
        for v in values
    ]
    total = functools.reduce(lambda a, b: jax.tree.map(lambda x, y: x + y, a, b), parts)
    expected = (values.astype(np.float64) + (values * np.float32(1e-8))).sum()
    np.testing.assert_allclose(exact_sum(total.nll), expected, rtol=1e-9)


def test_memory_depends_on_classes_and_bins_only():
    def size(state):
        return sum(x.size for x in jax.tree.leaves(state))

    state = add_totals(TOTALS.init(), PROBS, IDS)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, TOTALS.init())
    assert size(state) == 2 * (3 * 3 * 20 + 4 * 3 + 2)
    assert size(dataset_totals(3, num_bins=40).init()) == 2 * (3 * 3 * 40 + 4 * 3 + 2)
    assert size(case_results(100, 3).init()) == 100 * size(state)
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("int32"), jnp.dtype("float32")}


def test_an_update_takes_next_to_no_memory():
    """Of 10^6 voxels and 4 classes, 20 MB, no copy is made."""
    totals = dataset_totals(4)
    probs, ids = jax.ShapeDtypeStruct((1, 10**6, 4), np.float32), jax.ShapeDtypeStruct((1, 10**6), np.int32)
    program = jax.jit(totals.update).lower(totals.init(), probs, ids).compile()
    assert program.memory_analysis().temp_size_in_bytes < 16e6


# Programs


@pytest.mark.parametrize("accumulator", ["totals", "cases"])
def test_update_compiles_once_for_each_shape(accumulator):
    made, rows = (TOTALS, ()) if accumulator == "totals" else (CASES, (ROWS,))
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(lambda *args: made.update(*args), n=2), donate_argnums=0)
    state = made.init()
    for i in range(3):
        state = update(state, PROBS, (IDS + i) % 3, *rows)
    update(state, PROBS[:4], IDS[:4], *(x[:4] for x in rows))
    assert update._cache_size() == 2


def test_compute_under_jit_is_a_pytree():
    results = compute(images()[0])
    assert_same(TOTALS.compute(images()[0]), results)
    assert (results.ace.shape, results.nll.shape, results.stats.count.shape) == ((3,), (), (3, 20))
    assert results.stats.count.dtype == jnp.float32
    with pytest.raises(AttributeError):
        results.ace = 0


def test_scan_over_batches():
    batches = [x.reshape(4, 2, *x.shape[1:]) for x in (PROBS, IDS, WHERE)]
    scanned = jax.jit(lambda *b: jax.lax.scan(lambda s, x: (TOTALS.update(s, *x), None), TOTALS.init(), b)[0])
    assert_same(compute(scanned(*batches)), whole())


@pytest.mark.parametrize("accumulator", ["totals", "cases"])
def test_resume_from_numpy_arrays(accumulator):
    """Leaves saved by `np.savez`, which knows of no Python object, and put back in the tree of `init`."""
    made, rows = (TOTALS, []) if accumulator == "totals" else (CASES, [ROWS])
    inputs = [PROBS, IDS, *rows, WHERE]
    state = made.update(made.init(), *(x[:4] for x in inputs))
    file = io.BytesIO()
    np.savez(file, *jax.tree.leaves(state))
    file.seek(0)
    with np.load(file, allow_pickle=False) as saved:
        leaves = [saved[name] for name in saved.files]
    restored = jax.tree.unflatten(jax.tree.structure(made.init()), leaves)
    assert isinstance(restored, State)
    chex.assert_trees_all_equal(restored, state)
    rest, expected = [x[4:] for x in inputs], made.compute(made.update(made.init(), *inputs))
    assert_same(made.compute(made.update(restored, *rest)), expected)
    assert_same(made.compute(made.merge(made.update(made.init(), *rest), restored)), expected)
    chex.assert_trees_all_equal(made.compute(restored), made.compute(state))


# Errors


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: dataset_totals(0), ValueError, "num_classes must be at least 1"),
        (lambda: dataset_totals(2.0), TypeError, "num_classes must be a Python int"),
        (lambda: dataset_totals(1, include_background=False), ValueError, "leaves no class"),
        (lambda: dataset_totals(2, num_bins=0), ValueError, "num_bins"),
        (lambda: dataset_totals(2, closed="both"), ValueError, "closed"),
        (lambda: case_results(0, 2), ValueError, "num_cases"),
        (lambda: TOTALS.update(TOTALS.init(), PROBS[..., :2], IDS), ValueError, "3 classes"),
        (lambda: TOTALS.update(TOTALS.init(), PROBS, IDS[:2]), ValueError, "labels"),
        (lambda: TOTALS.update(TOTALS.init(), PROBS, IDS, PROBS > 0), ValueError, "one entry per voxel"),
        (
            lambda: CASES.update(CASES.init(), PROBS, IDS, ROWS[:2]),
            ValueError,
            r"case must have shape \(8,\)",
        ),
        (lambda: CASES.update(CASES.init(), PROBS, IDS, ROWS.astype(np.float32)), TypeError, "integers"),
    ],
)
def test_wrong_calls_say_what_was_wrong(call, error, words):
    with pytest.raises(error, match=words):
        call()
