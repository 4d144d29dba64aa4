"""Calls outside of `jit`: few compilations whatever the sizes, the same numbers, under every switch of JAX."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import twin
from compilations import compilations

import calib_jax
from calib_jax import (
    BinStatistics,
    average_calibration_error,
    bin_statistics,
    bootstrap_interval,
    brier_score,
    case_results,
    dataset_totals,
    dice_score,
    fit_temperature,
    focal_loss,
    mL1_ace,
    mL1_ece,
    mL1_mce,
    negative_log_likelihood,
    reliability_band,
    reliability_histogram,
    segmentation_loss,
    top_label_statistics,
)
from calib_jax._compat import enable_x64
from calib_jax._devices import is_whole
from calib_jax._eager import filled_size
from calib_jax._sums import cpu

CLASSES = 3
TOTALS = dataset_totals(CLASSES)
CASES = case_results(2, CLASSES)
MESH = jax.make_mesh((8,), ("images",), (jax.sharding.AxisType.Auto,))
FUNCTIONS = {
    "bin_statistics": bin_statistics,
    "adaptive": lambda p, y: bin_statistics(p, y, binning="adaptive"),
    "mL1_ace": mL1_ace,
    "mL1_ece": lambda p, y: mL1_ece(p, y, binning="soft", class_weights=[1, 2, 3]),
    "mL1_mce": lambda p, y: mL1_mce(p, y, include_background=False),
    "top_label_statistics": top_label_statistics,
    "brier_score": brier_score,
    "negative_log_likelihood": lambda p, y: negative_log_likelihood(np.log(p), y),
    "dice_score": lambda p, y: dice_score(y, np.roll(y, 1), num_classes=CLASSES),
    "segmentation_loss": lambda p, y: segmentation_loss(np.log(p), y, label_smoothing=1.0, mbls=1.0),
    "focal_loss": lambda p, y: focal_loss(np.log(p), y, gamma=jnp.float32(3.0)),
    "dataset_totals": lambda p, y: TOTALS.update(TOTALS.init(), p, y),
    "case_results": lambda p, y: CASES.update(CASES.init(), p, y, np.array([1])),
}


def sample(*size, seed=0):
    shape = (1, *size, CLASSES)
    return twin.sample_probs(seed, shape), twin.sample_labels("ids", shape, seed)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_new_sizes_compile_nothing_and_give_the_numbers_of_jit(name):
    function = FUNCTIONS[name]
    jax.block_until_ready(function(*sample(5, 6, 7)))
    cases = [sample(*size) for size in ((5, 6, 8), (4, 9, 2), (3, 11), (17,))]
    with compilations() as found:
        results = [function(*case) for case in cases]
    assert not found
    expected = jax.jit(lambda: function(*cases[0]))()
    for got, want in zip(jax.tree.leaves(results[0]), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7, equal_nan=True)
        assert np.asarray(got).dtype == np.asarray(want).dtype


def test_arrays_on_one_device_of_many_are_summed_as_if_it_were_the_only_one(monkeypatch):
    """Then a GPU can use the kernel, which a compiler cannot split. Under `jit` the arrays may be split."""
    seen = set()

    def record():
        seen.add(is_whole())
        return is_whole()

    monkeypatch.setattr(cpu, "is_whole", record)
    assert jax.device_count() > 1
    probs, labels = sample(5, 6)
    of_one = bin_statistics(jax.device_put(probs, jax.devices()[3]), labels, num_bins=23)
    assert seen == {True}
    assert of_one.count.devices() == {jax.devices()[3]}
    seen.clear()
    of_many = jax.jit(lambda p: bin_statistics(p, labels, num_bins=23))(probs)
    assert seen == {False}
    split = jax.device_put(np.tile(probs, (8, 1, 1, 1)), jax.NamedSharding(MESH, jax.P("images")))
    of_each = bin_statistics(split, np.tile(labels, (8, 1, 1)), num_bins=23)
    assert seen == {False}
    for one, many, each in zip(*map(jax.tree.leaves, (of_one, of_many, of_each)), strict=True):
        np.testing.assert_array_equal(one, many)
        np.testing.assert_array_equal(one, each[:1])
    with jax.set_mesh(MESH):
        np.testing.assert_array_equal(bin_statistics(probs, labels, num_bins=23).count, of_one.count)


@pytest.mark.parametrize("transform", [jax.grad, jax.value_and_grad, jax.vmap])
@pytest.mark.parametrize("binning", ["hard", "soft"])
def test_transformed_functions_compile_once(transform, binning):
    def loss(probs, labels):
        grouped = probs[None] if probs.ndim == 3 else probs
        return mL1_ace(grouped, labels.reshape(grouped.shape[:-1]), binning=binning)

    probs, labels = sample(5, 6)
    call = transform(loss)
    jax.block_until_ready(call(probs, labels))
    with compilations() as found:
        jax.block_until_ready(call(probs * np.float32(0.5), labels))
    assert not found


def test_an_error_of_sums_on_the_host_compiles_no_program_for_each_operation():
    count = np.full((3, 2, 7), 5, np.int64)  # a shape of no other test
    stats = BinStatistics(count, count * 0.25, count * 0.5)
    with compilations() as found:
        error = average_calibration_error(stats)
    assert len(found) <= 2  # and a conversion of the counts
    np.testing.assert_allclose(error, np.full((3, 2), 0.25))


def test_intervals_of_a_new_statistic_compile_nothing():
    def interval(scale):
        return bootstrap_interval(
            jax.random.key(0), np.arange(8.0, dtype=np.float32), lambda x: x.mean() * scale
        )

    low, high = interval(1.0)
    with compilations() as found:
        doubled = interval(2.0)
    assert not found
    np.testing.assert_allclose(doubled, (2 * low, 2 * high), rtol=1e-6)


def test_the_intervals_of_jit_are_those_of_a_call():
    cases = np.random.default_rng(0).random((9, 2), np.float32)

    def interval(cases):
        return bootstrap_interval(jax.random.key(1), cases, lambda x: x.mean(0), num_resamples=250)

    np.testing.assert_allclose(interval(cases), jax.jit(interval)(cases), rtol=1e-6)


def test_a_loop_over_cases_keeps_no_memory():
    """Arrays that are alive, since the memory of the process also depends on the allocator."""
    state = TOTALS.init()
    alive = []
    for i in range(12):
        probs, labels = sample(4, 5 + i)
        state = TOTALS.update(state, probs, labels)
        jax.block_until_ready(bin_statistics(probs, labels))
        gc.collect()
        alive.append(len(jax.live_arrays()))
    assert max(alive[2:]) == min(alive[2:])


@pytest.mark.parametrize("voxels", [1, 4096, 4097, 2**20, 2**20 + 1, 3_000_001, 2**30])
def test_sizes_that_images_are_filled_up_to(voxels):
    size = filled_size(voxels)
    assert size >= voxels
    assert size <= max(4096, 2 * voxels - 1 if voxels <= 2**20 else 1.25 * voxels)
    assert filled_size(size) == size


def test_a_refused_call_names_the_shapes_of_the_caller():
    probs, labels = sample(5, 6)
    with pytest.raises(ValueError, match=r"\(1, 5, 6, 1\)"):
        mL1_ace(probs[..., :1], labels, include_background=False)


def test_options_of_another_type_are_refused_after_equal_ones():
    probs, labels = sample(5, 6)
    mL1_ace(probs, labels, num_bins=1)
    for wrong in (1.0, True):
        with pytest.raises(TypeError, match="num_bins"):
            mL1_ace(probs, labels, num_bins=wrong)


def test_arrays_on_a_device_stay_there():
    device = jax.devices()[-1]
    probs, labels = (jax.device_put(x, device) for x in sample(5, 6))
    assert mL1_ace(probs, labels).devices() == {device}


def test_split_arrays_are_taken_as_they_are():
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    probs, labels = twin.sample_probs(0, (8, 5, 6, 3)), twin.sample_labels("ids", (8, 5, 6, 3))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    np.testing.assert_allclose(
        mL1_ace(jax.device_put(probs, split), jax.device_put(labels, split)),
        mL1_ace(probs, labels),
        rtol=1e-6,
    )


# Switches of JAX

SWITCHES = {
    "jax_enable_x64": True,
    "jax_debug_nans": True,
    "jax_debug_infs": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_default_matmul_precision": "bfloat16",
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_disable_jit": True,
}
LOGITS = np.random.default_rng(0).normal(size=(2, 4, 5, CLASSES)).astype(np.float32)
PROBS = np.asarray(jax.nn.softmax(LOGITS))
LABELS = (np.random.default_rng(1).random((2, 4, 5)) > PROBS[..., 0]).astype(np.int32)  # class 2 is absent


def errors_of_statistics():
    stats = bin_statistics(PROBS, LABELS)
    return [average_calibration_error(stats), stats.mean_prob, reliability_histogram(stats)]


SWITCHED = {
    "mL1_ace": lambda: mL1_ace(PROBS, LABELS),
    "gradient": lambda: jax.grad(mL1_ace)(PROBS, LABELS),
    "soft": lambda: jax.value_and_grad(lambda p: mL1_ece(p, LABELS, binning="soft"))(PROBS),
    "jit": lambda: jax.jit(jax.value_and_grad(mL1_ace))(PROBS, LABELS),
    "masked": lambda: mL1_ace(PROBS, LABELS, where=np.zeros(LABELS.shape, bool)),
    "segmentation_loss": lambda: segmentation_loss(LOGITS, LABELS, focal=1.0, svls=1.0, nacl=1.0),
    "statistics": errors_of_statistics,
    "dice": lambda: dice_score(LABELS, LABELS, num_classes=CLASSES),
    "brier": lambda: brier_score(PROBS, LABELS),
    "nll": lambda: negative_log_likelihood(LOGITS, LABELS),
    "totals": lambda: TOTALS.compute(TOTALS.update(TOTALS.init(), PROBS, LABELS)),
    "temperature": lambda: fit_temperature(LOGITS * 3, LABELS),
    "band": lambda: (
        reliability_band(jax.random.key(0), bin_statistics(PROBS, LABELS), num_resamples=20)[0].shape
    ),
}
QUICK = ("gradient", "masked", "statistics", "dice", "totals")


@pytest.fixture(scope="module")
def plain():
    return {name: jax.device_get(call()) for name, call in SWITCHED.items()}


@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_of_jax_change_nothing(switch, plain):
    before = getattr(jax.config, switch)
    jax.config.update(switch, SWITCHES[switch])
    try:
        found = {
            name: jax.device_get(call())
            for name, call in SWITCHED.items()
            if name in QUICK or switch in ("jax_enable_x64", "jax_debug_nans")
        }
    finally:
        jax.config.update(switch, before)
    for name, values in found.items():
        for got, want in zip(jax.tree.leaves(values), jax.tree.leaves(plain[name]), strict=True):
            np.testing.assert_allclose(got, want, rtol=3e-6, atol=1e-7, equal_nan=True, err_msg=name)


def test_float64_probabilities_are_binned_as_they_are():
    """Above an edge by less than float32 can tell, a probability belongs to the bin above."""
    edge = np.float64(calib_jax.bin_edges(2)[1])
    probs, labels = np.array([[[edge], [edge + 1e-12]]]), np.zeros((1, 2), np.int32)
    with enable_x64(True):
        stats = bin_statistics(probs, labels, num_bins=2)
        gradient = jax.grad(lambda p: mL1_ace(p, labels, num_bins=2))(jnp.asarray(probs))
    assert np.asarray(stats.count).tolist() == [[[1, 1]]]
    assert gradient.dtype == np.float64


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_programs_for_accelerators_are_lowered_under_x64(platform):
    with enable_x64(True):
        traced = jax.jit(jax.value_and_grad(mL1_ace)).trace(jnp.asarray(PROBS), jnp.asarray(LABELS))
        assert traced.lower(lowering_platforms=(platform,)).as_text()
