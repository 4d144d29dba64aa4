"""Sums in bins, as each platform computes them, against NumPy in float64."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from calib_jax import binning
from calib_jax._devices import is_whole
from calib_jax._sums import cpu, gpu, gpu_kernel, tpu
from calib_jax._sums.bins import Bins, merge_space
from calib_jax.binning import bin_edges, bin_index


def _by_image(images, bins):
    """Each image by itself, as a batch that may be split over devices."""
    return jax.vmap(functools.partial(cpu._sum_image, bins=bins))(*images)


METHODS = {
    "auto": lambda images, bins: binning._bin_sums(*images, bins),
    "scatter": _by_image,
    "flat_scatter": lambda images, bins: cpu.sum_images(*images, bins),
    "masked": lambda images, bins: gpu.bin_sums(*images, bins),
    "kernel": lambda images, bins: gpu_kernel.bin_sums(*images, bins, interpret=True),
    "masked_in_groups": lambda images, bins: tpu.bin_sums(*images, bins),
}
PLATFORMS = list(METHODS)[1:]


@functools.cache
def _program(method, num_bins=20):
    """Jitted once, so that calls of one shape share one compilation."""
    bins = Bins("hard", num_bins)

    return jax.jit(lambda probs, labels, where: METHODS[method]((probs, labels, where, None), bins))


def _sums(probs, labels, where=None, *, num_bins=20, method="auto"):
    return _program(method, num_bins)(probs, labels, where)


def _expected(probs, labels, where, num_bins):
    """Count, probability sum and label sum: `np.bincount` in float64, all images and classes in one."""
    batch, _, classes = probs.shape
    hits = labels if labels.ndim == 3 else labels[..., None] == np.arange(classes)
    keep = np.ones((1, 1, 1), bool) if where is None else where if where.ndim == 3 else where[..., None]
    keep = np.broadcast_to(keep, probs.shape)
    row = np.arange(batch)[:, None, None] * classes + np.arange(classes)
    place = (row * num_bins + np.asarray(bin_index(probs, num_bins=num_bins)))[keep]

    def add(x):
        sums = np.bincount(place, x[keep].astype(np.float64), batch * classes * num_bins)
        return sums.reshape(batch, classes, num_bins)

    return add(np.ones(probs.shape)), add(probs), add(hits)


def _assert_equal(got, want, rtol=1e-6):
    count, prob_sum, label_sum = got
    assert (count.dtype, prob_sum.dtype, label_sum.dtype) == (jnp.int32, jnp.float32, jnp.float32)
    np.testing.assert_array_equal(count, want[0])
    np.testing.assert_allclose(prob_sum, want[1], rtol=rtol)
    np.testing.assert_allclose(label_sum, want[2], rtol=rtol)


def _draw(shape, seed=0, soft=False):
    rng = np.random.default_rng(seed)
    probs = rng.random(shape, np.float32)
    labels = rng.random(shape, np.float32) if soft else rng.integers(-1, shape[-1] + 1, shape[:-1])
    return probs, labels.astype(np.float32 if soft else np.int32), rng


@pytest.mark.parametrize("classes", [1, 3, 4, 7, 2000])
@pytest.mark.parametrize("voxels", [1, 15, 16, 17, 36864, 147456, 110592, 10**6, 30_080_231])
def test_pieces_cover_an_image_with_little_left_over(voxels, classes):
    size, together, steps = cpu._cut(voxels, classes)
    assert size == voxels or (size < voxels and size % 16 == 0)
    assert size * classes <= max(16 * classes, cpu._PIECE)
    assert together <= cpu._SCATTERS
    assert 0 <= size * together * steps - voxels < 16 * together * steps


@pytest.mark.parametrize("method", PLATFORMS)
@pytest.mark.parametrize(
    ("shape", "num_bins", "soft"),
    [
        ((1, 1, 1), 1, False),
        ((2, 7, 3), 20, True),
        ((3, 1793, 1), 20, False),
        ((2, 40_001, 3), 20, True),
        ((1, 5_000, 2), 1000, False),
    ],
)
def test_equals_numpy(method, shape, num_bins, soft):
    probs, labels, _ = _draw(shape, soft=soft)
    got = _sums(probs, labels, num_bins=num_bins, method=method)
    _assert_equal(got, _expected(probs, labels, None, num_bins))


def test_images_of_more_voxels_than_a_tally_holds_are_counted_apart(monkeypatch):
    probs, labels, _ = _draw((2, 5_000, 3))
    columns = []
    monkeypatch.setattr(cpu, "_TALLY_BITS", 9)
    scatter_add = cpu._scatter_add
    monkeypatch.setattr(
        cpu, "_scatter_add", lambda *args: columns.append(len(args[-1])) or scatter_add(*args)
    )
    run = _program.__wrapped__("flat_scatter")
    _assert_equal(run(probs, labels, None), _expected(probs, labels, None, 20))
    assert set(columns) == {3}


@pytest.mark.parametrize(
    "shape", [(1, 320**3, 33), (64, 320**3, 1), (1, 1, 1), (2, 10**6, 17), (1, 10**8, 4)]
)
def test_counts_of_a_program_of_the_kernel_fit_into_their_bits(shape):
    plan = gpu_kernel._plan(shape, Bins("hard", 20), floats=1)
    of_lane = plan.rounds * gpu_kernel._ROUND
    assert of_lane < 4**gpu_kernel._FIELD
    assert gpu_kernel._ROUND < 2**gpu_kernel._FIELD
    assert of_lane * plan.tile < 2**16
    assert shape[1] <= plan.grid[1] * of_lane * plan.tile


@pytest.mark.parametrize("method", PLATFORMS)
@pytest.mark.parametrize("soft", [False, True])
def test_what_is_masked_does_not_count_even_if_nan(method, soft):
    """Ids under a mask of voxels, soft labels under a mask of voxels and classes."""
    probs, labels, rng = _draw((2, 5_000, 3), soft=soft)
    where = rng.random((2, 5_000, 3 if soft else 1)) < 0.4
    want = _expected(probs, labels, where, 20)
    _assert_equal(_sums(np.where(where, probs, np.nan), labels, where, method=method), want)


@pytest.mark.parametrize("method", PLATFORMS)
def test_nan_shows_in_its_image_and_class_only(method):
    probs, labels, _ = _draw((2, 3_000, 2))
    probs[1, 17, 0] = np.nan
    _, prob_sum, label_sum = _sums(probs, labels, method=method)
    assert np.isnan(prob_sum).any(-1).tolist() == [[False, False], [True, False]]
    assert np.isfinite(label_sum).all()


@pytest.mark.parametrize("method", PLATFORMS)
@pytest.mark.parametrize("value", [0.1, 0.7, 0.999999, 1e-7, 3e-5, 0.09523833])
def test_equal_numbers_and_two_scales_in_one_bin_do_not_drift(method, value):
    """The last value is the worst of four million to add up 40 times in float32: 6e-7."""
    probs = np.full((1, 300_001, 2), value, np.float32)
    probs[..., 1] = 1.2345e-4
    probs[:, ::9, 1] = 0.04
    labels = np.ones((1, 300_001), np.int32)
    _assert_equal(_sums(probs, labels, method=method), _expected(probs, labels, None, 20))


def test_more_voxels_than_float32_can_count():
    probs = np.random.default_rng(0).random((1, 17_000_000, 1), np.float32) * np.float32(1e-3)
    labels = np.zeros((1, 17_000_000), np.int32)
    count, prob_sum, label_sum = _sums(probs, labels)
    assert count[0, 0, 0] == label_sum[0, 0, 0] == probs.size
    np.testing.assert_allclose(prob_sum[0, 0, 0], probs.sum(dtype=np.float64), rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "dtype"), [("auto", jnp.float16), *((method, jnp.bfloat16) for method in PLATFORMS)]
)
def test_half_precision_is_added_in_float32(method, dtype):
    probs, labels, _ = _draw((1, 9_000, 2))
    probs = jnp.asarray(probs, dtype)
    want = _expected(np.asarray(probs.astype(jnp.float32)), labels, None, 20)
    _assert_equal(_sums(probs, labels, method=method), want)


@pytest.mark.parametrize("method", ["auto", "masked", "kernel"])
def test_vmap_equals_a_longer_batch(method):
    probs, labels, rng = _draw((6, 3_000, 2))
    where = rng.random((*labels.shape, 1)) < 0.5

    def fold(x):
        return x.reshape(3, 2, *x.shape[1:])

    together = _sums(probs, labels, where, method=method)
    apart = jax.vmap(functools.partial(_sums, method=method))(fold(probs), fold(labels), fold(where))
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_array_equal(fold(one), other)


def _sharded(shape, dtype, mesh):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec("batch")))


@pytest.mark.parametrize("method", ["auto", "masked"])
def test_a_sharded_batch_is_not_gathered(method):
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    probs, labels = _sharded((16, 9_000, 2), jnp.float32, mesh), _sharded((16, 9_000), jnp.int32, mesh)
    program = _program(method).lower(probs, labels, None).compile().as_text()
    assert not re.findall(r"(all-gather|all-reduce|all-to-all|collective-permute)\S*\(", program)


def test_the_kernel_sums_what_shard_map_gives_each_device():
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    probs, labels, _ = _draw((mesh.size, 3_000, 2))
    here = PartitionSpec("batch")
    map_ = functools.partial(jax.shard_map, mesh=mesh, in_specs=here, out_specs=here)
    # JAX interprets no kernel while it checks which values differ between devices.
    run = jax.jit(map_(lambda p, y: _sums(p, y, method="kernel"), check_vma=False))
    _assert_equal(run(probs, labels), _expected(probs, labels, None, 20))


def test_shard_map_and_sharded_jit_equal_one_device():
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    probs, labels, _ = _draw((2 * mesh.size, 3_000, 2))
    here = PartitionSpec("batch")
    mapped = jax.jit(jax.shard_map(lambda p, y: _sums(p, y), mesh=mesh, in_specs=here, out_specs=here))
    placed = [jax.device_put(x, NamedSharding(mesh, here)) for x in (probs, labels)]
    for got in (mapped(probs, labels), _sums(*placed)):
        _assert_equal(got, _expected(probs, labels, None, 20))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_lowers_for_every_platform_and_scatters_on_cpu_only(platform):
    probs = jax.ShapeDtypeStruct((2, 5_000, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((2, 5_000), jnp.int32)
    run = jax.jit(lambda *images: binning._bin_sums(*images, None, None, Bins("hard", 20)))
    program = export.export(run, platforms=[platform])(probs, labels).mlir_module()
    assert ("stablehlo.scatter" in program) == (platform == "cpu")
    assert "stablehlo.dot_general" not in program


def test_masked_sums_store_no_comparison():
    """XLA fuses them, on CPU as elsewhere: 20 bins in place, beside at most a padded copy of the inputs."""
    probs = jax.ShapeDtypeStruct((1, 50_000, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((1, 50_000), jnp.int32)
    planned = _program("masked_in_groups").lower(probs, labels, None).compile().memory_analysis()
    assert planned.temp_size_in_bytes < 3 * 50_000 * 3 * 4


@pytest.mark.parametrize("binning_", ["hard", "soft", "adaptive"])
@pytest.mark.parametrize(("shape", "soft"), [((2, 6, 5, 7, 3), False), ((1, 30, 40, 2), True)])
def test_every_platform_fills_the_same_bins(binning_, shape, soft):
    """With axes of space, a mask, values at edges, and more bins than fit into one pass."""
    probs, labels, rng = _draw(shape, soft=soft)
    probs.ravel()[:40] = np.linspace(0, 1, 40, dtype=np.float32)
    where = rng.random((*shape[:-1], 1)) < 0.7
    bins = Bins(binning_, 33)
    flat = [merge_space(x, probs.ndim) for x in (probs, labels, where)]
    edges = binning._adaptive_edges(jnp.asarray(flat[0]), flat[2], 33) if binning_ == "adaptive" else None
    want = cpu.sum_images(*flat, edges, bins)
    for method in ("masked", "masked_in_groups", *(["kernel"] if edges is None else [])):
        images = (probs, labels, where) if method == "masked_in_groups" else flat
        got = jax.jit(METHODS[method], static_argnums=1)((*images, edges), bins)
        assert [x.dtype for x in got] == [x.dtype for x in want]
        for one, other in zip(got, want, strict=True):
            # A fused multiplication and addition moves a soft voxel by float32's last digit of 33.
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=5e-6 if binning_ == "soft" else 0)


@pytest.mark.parametrize("closed", ["right", "left"])
@pytest.mark.parametrize("num_bins", [1, 2, 20, 33])
def test_every_platform_fills_the_same_bins_at_edges(num_bins, closed):
    """Each edge, the float32 below and above it, and numbers outside of [0, 1]."""
    edges = bin_edges(num_bins)
    below, above = (np.nextafter(edges, np.float32(end)) for end in (-1, 2))
    outside = np.array([-0.0, -1e-15, -0.3, -40, 1.0000002, 1.7, 3e9, -3e9], np.float32)
    probs = np.concatenate([edges, below, above, outside])[None, :, None]
    labels = np.arange(probs.size, dtype=np.int32)[None] % 2
    bins = Bins("hard", num_bins, closed)
    index = np.asarray(bin_index(probs, num_bins=num_bins, closed=closed)).ravel()
    want = [np.bincount(index, weights, num_bins) for weights in (None, 1 - labels[0])]
    for method in PLATFORMS:
        run = jax.jit(METHODS[method], static_argnums=1)
        count, _, label_sum = run((probs, labels, None, None), bins)
        np.testing.assert_array_equal(count[0, 0], want[0], err_msg=method)
        np.testing.assert_array_equal(label_sum[0, 0], want[1], err_msg=method)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lookup_lowers_for_every_platform(platform):
    table = jax.ShapeDtypeStruct((2, 3, 20), jnp.float32)
    index = jax.ShapeDtypeStruct((2, 50, 3), jnp.int32)
    run = jax.jit({"cpu": cpu, "cuda": gpu, "tpu": tpu}[platform].look_up)
    assert export.export(run, platforms=[platform])(table, index).out_avals[0].shape == (2, 50, 3)


@pytest.mark.parametrize("num_bins", [20, 70])
def test_lookup_is_the_transpose_of_the_sum(num_bins):
    probs, labels, rng = _draw((2, 500, 3))
    table = jnp.asarray(rng.random((2, 3, num_bins), np.float32))
    index = bin_index(probs, num_bins=num_bins)
    want = table[np.arange(2)[:, None, None], np.arange(3), np.asarray(index)]
    for platform in (cpu, gpu, tpu):
        np.testing.assert_array_equal(platform.look_up(table, index), want)
    sums = np.asarray(_sums(probs, labels, num_bins=num_bins)[1], np.float64)
    np.testing.assert_allclose((np.asarray(want, np.float64) * probs).sum(), (table * sums).sum(), rtol=1e-5)


def test_one_device_takes_one_long_row_and_asks_for_no_other_platform():
    """With `JAX_PLATFORMS=cuda` there is no CPU backend, and asking for it would be an error."""
    program = (
        "import jax; from calib_jax._devices import is_whole as one; "
        "seen = []; jax.devices = jax.local_devices = lambda *a: seen.append(a); print(one(), seen)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "True []", done.stderr
    assert not is_whole()  # here are eight
