"""What JAX does to functions: jit, grad, vmap, scan, remat, shard_map, sharded jit, export."""

import functools
import math
import re

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import twin
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from calib_jax import (
    bin_statistics,
    mL1_ace,
    mL1_ece,
    mL1_mce,
    negative_log_likelihood,
    segmentation_loss,
    segmentation_loss_parts,
)

pytestmark = pytest.mark.usefixtures("strict_promotion")

SHAPE = (8, 6, 5, 3)
PROBS = twin.sample_probs(21, SHAPE)
IDS = twin.sample_labels("ids", SHAPE)
LOGITS = np.log(PROBS + np.float32(0.01))
FUNCTIONS = {"mL1_ace": mL1_ace, "segmentation_loss": segmentation_loss}
INPUTS = {"mL1_ace": PROBS, "segmentation_loss": LOGITS}


@functools.cache
def value_and_grad(name):
    return jax.jit(jax.value_and_grad(FUNCTIONS[name]))


@pytest.fixture(scope="module")
def mesh():
    devices = jax.devices()
    if len(devices) < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    return Mesh(np.array(devices[:8]), ("batch",))


def assert_close(actual, expected, atol=1e-7):
    chex.assert_trees_all_close(actual, expected, rtol=1e-6, atol=atol)


# One program


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_compilation_per_shape(name):
    def step(inputs, ids):
        return jax.value_and_grad(FUNCTIONS[name])(inputs, ids)

    chex.clear_trace_counter()
    compiled = jax.jit(chex.assert_max_traces(step, n=2))
    for seed in range(3):
        compiled(INPUTS[name] * (1 - 0.1 * seed), twin.sample_labels("ids", SHAPE, seed))
    assert compiled._cache_size() == 1
    compiled(INPUTS[name][:4], IDS[:4])
    assert compiled._cache_size() == 2
    with pytest.raises(AssertionError, match="traced"):
        compiled(INPUTS[name][:2], IDS[:2])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_program_never_calls_the_host(name):
    def reports(inputs):
        jax.debug.print("{}", inputs.sum())
        return inputs

    def text(function):
        return str(jax.make_jaxpr(function)(INPUTS[name]))

    host = re.compile(r"callback|debug_print|infeed|outfeed")
    assert host.search(text(reports))
    assert not host.search(text(jax.value_and_grad(lambda x: FUNCTIONS[name](x, IDS))))


# vmap, scan, remat


@pytest.mark.parametrize("loss", [mL1_ace, mL1_ece, mL1_mce])
def test_vmap_equals_a_loop(loss):
    probs, ids = PROBS.reshape(4, 2, 6, 5, 3), IDS.reshape(4, 2, 6, 5)
    one = jax.value_and_grad(loss)
    mapped = jax.jit(jax.vmap(one))(probs, ids)
    each = jax.jit(one)
    looped = [each(p, y) for p, y in zip(probs, ids, strict=True)]
    assert_close(mapped, jax.tree.map(lambda *x: jnp.stack(x), *looped))


def test_vmap_of_statistics_equals_a_loop_with_masks_and_shared_labels():
    probs, labels = PROBS.reshape(4, 2, 6, 5, 3), twin.sample_labels("soft", (2, 6, 5, 3))
    where = np.random.default_rng(22).random((4, 2, 6, 5)) < 0.7

    def one(probs, where):
        return bin_statistics(probs, labels, where=where)

    mapped = jax.jit(jax.vmap(one))(probs, where)
    each = jax.jit(one)
    looped = [each(p, w) for p, w in zip(probs, where, strict=True)]
    assert_close(mapped, jax.tree.map(lambda *x: jnp.stack(x), *looped), atol=1e-6)


def test_scan_adds_up_the_statistics_of_tiles():
    def add(total, tile):
        return total + bin_statistics(*tile), None

    def scanned(probs, ids):
        tiles = probs.reshape(4, 2, 6, 5, 3), ids.reshape(4, 2, 6, 5)
        first = jax.tree.map(lambda x: x[0], tiles)
        start = jax.tree.map(jnp.zeros_like, bin_statistics(*first))
        return jax.lax.scan(add, start, tiles)[0]

    whole = jax.jit(bin_statistics)(PROBS, IDS)
    expected = jax.tree.map(lambda x: x.reshape(4, 2, 3, 20).sum(0), whole)
    assert_close(jax.jit(scanned)(PROBS, IDS), expected, atol=1e-6)


def test_scan_trains():
    """A step of gradient descent inside `scan`: the loss of free logits falls."""

    def step(logits, _):
        loss, gradient = jax.value_and_grad(segmentation_loss)(logits, IDS)
        return logits - 50 * gradient, loss

    losses = jax.jit(lambda x: jax.lax.scan(step, x, length=4)[1])(LOGITS)
    assert (np.diff(losses) < 0).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_remat_changes_nothing(name):
    rematerialised = jax.jit(jax.value_and_grad(jax.checkpoint(FUNCTIONS[name])))
    assert_close(rematerialised(INPUTS[name], IDS), value_and_grad(name)(INPUTS[name], IDS))


def test_grad_of_a_mean_over_vmap_is_the_mean_of_grads():
    def per_image(probs):
        images = jax.vmap(mL1_ace)(probs[:, None], jnp.asarray(IDS)[:, None])
        return images.mean()

    assert_close(jax.jit(jax.value_and_grad(per_image))(PROBS), value_and_grad("mL1_ace")(PROBS, IDS))


# Several devices


@pytest.mark.parametrize("name", FUNCTIONS)
def test_shard_map_over_the_batch_with_pmean_equals_the_whole(name, mesh):
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("batch"), out_specs=P())
    def loss(inputs, ids):
        return jax.lax.pmean(FUNCTIONS[name](inputs, ids), "batch")

    sharded = jax.jit(jax.value_and_grad(loss))(INPUTS[name], IDS)
    assert_close(sharded, value_and_grad(name)(INPUTS[name], IDS), atol=1e-6)


def test_shard_map_over_space_with_psum_equals_the_whole(mesh):
    """Sums add up, so that one image may lie on eight devices."""
    probs, ids = np.moveaxis(PROBS, 0, 1), np.moveaxis(IDS, 0, 1)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(None, "batch"), out_specs=P())
    def statistics(probs, ids):
        return jax.tree.map(lambda x: jax.lax.psum(x, "batch"), bin_statistics(probs, ids))

    assert_close(jax.jit(statistics)(probs, ids), jax.jit(bin_statistics)(probs, ids), atol=1e-6)


WHERE = np.random.default_rng(24).random(SHAPE[:-1]) < 0.7
EVERY_PART = (
    *("dice", "cross_entropy", "ace", "focal", "label_smoothing", "mbls", "dsc_plus_plus", "damped_dice"),
)


def many_losses(logits, ids, where, axis_name=None):
    """Every loss that takes `axis_name`, weighted apart, of images with their voxels along axis 1."""
    split = {"where": where, "axis_name": axis_name}
    probs = jax.nn.softmax(logits)
    parts = segmentation_loss_parts(logits, ids, EVERY_PART, **split)
    siblings = [
        mL1_ace(probs, ids, binning="soft", **split),
        mL1_ece(probs, ids, pool_images=True, **split),
        mL1_mce(probs, ids, num_bins=7, ignore_empty_classes=True, **split),
    ]
    losses = jnp.stack([*parts.values(), *siblings])
    return (losses * jnp.arange(1, len(losses) + 1, dtype=jnp.float32)).sum()


@pytest.fixture(scope="module")
def split_image():
    """Inputs with 8 voxels along axis 1, and the value and gradient of their losses on one device."""
    inputs = tuple(np.moveaxis(x, 0, 1) for x in (LOGITS, IDS, WHERE))
    return inputs, jax.device_get(jax.jit(jax.value_and_grad(many_losses))(*inputs))


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])
def test_losses_of_split_images_are_those_of_the_whole(check_vma, inside, mesh, split_image):
    inputs, (value, gradient) = split_image
    axes = ("row", "column")
    mesh, voxels = Mesh(mesh.devices.reshape(2, 4), axes), P(None, axes)
    loss = functools.partial(many_losses, axis_name=axes)
    split = functools.partial(jax.shard_map, mesh=mesh, in_specs=voxels, check_vma=check_vma)
    if inside:
        run = split(jax.value_and_grad(loss), out_specs=(P(), voxels))
    else:
        run = jax.value_and_grad(split(loss, out_specs=P()))
    got, got_gradient = jax.jit(run)(*inputs)
    # From outside a shard_map that does not track what varies, each device gets its share of the cotangent.
    share = 1 if check_vma or inside else 1 / 8
    np.testing.assert_allclose(got, value, rtol=1e-5)
    np.testing.assert_allclose(got_gradient, share * gradient, atol=1e-5 * np.abs(gradient).max())


def test_shard_map_along_some_axes_of_a_mesh_leaves_the_others_to_the_compiler(mesh):
    mesh = Mesh(mesh.devices.reshape(2, 4), ("data", "model"))
    half = P("data")

    def run(logits, ids, where):
        likelihood = negative_log_likelihood(jax.nn.softmax(logits), ids, where=where)
        return (likelihood, *jax.value_and_grad(many_losses)(logits, ids, where))

    def of_half(*inputs):
        likelihood, loss, gradient = run(*inputs)
        return likelihood, loss[None], gradient

    split = jax.shard_map(of_half, mesh=mesh, in_specs=half, out_specs=half, axis_names={"data"})
    halves = [jax.jit(run)(*(x[i : i + 4] for x in (LOGITS, IDS, WHERE))) for i in (0, 4)]
    want = [np.concatenate([np.atleast_1d(x) for x in both]) for both in zip(*halves, strict=True)]
    for got, expected in zip(jax.jit(split)(LOGITS, IDS, WHERE), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_a_trainer_splits_batch_and_voxels(mesh):
    """The mean over devices of the batch, the sum over those of an image: the gradient in shared parameters."""
    mesh = Mesh(mesh.devices.reshape(4, 2), ("batch", "space"))

    def loss(scale, logits, ids, axis_name=None):
        return segmentation_loss(scale * logits, ids, axis_name=axis_name)

    def step(scale, logits, ids):
        value, gradient = jax.value_and_grad(loss)(scale, logits, ids, "space")
        return jax.lax.pmean((value, jax.lax.psum(gradient, "space")), "batch")

    data = P("batch", "space")
    split = jax.shard_map(step, mesh=mesh, in_specs=(P(), data, data), out_specs=P(), check_vma=False)
    arguments = jnp.float32(1.1), LOGITS, IDS
    assert_close(jax.jit(split)(*arguments), jax.jit(jax.value_and_grad(loss))(*arguments), atol=1e-6)


def test_statistics_of_split_images_are_counted_exactly(mesh):
    inputs = tuple(np.moveaxis(x, 0, 1) for x in (PROBS, IDS))
    run = jax.shard_map(
        functools.partial(bin_statistics, axis_name="batch"),
        mesh=mesh,
        in_specs=P(None, "batch"),
        out_specs=P(),
    )
    got, expected = jax.jit(run)(*inputs), jax.jit(bin_statistics)(*inputs)
    assert got.count.dtype == jnp.int32
    np.testing.assert_array_equal(got.count, expected.count)
    assert_close(got, expected, atol=1e-6)


def sizes_of_collectives(text):
    """Elements moved by each collective of a compiled program: `op` -> sizes of its results."""
    pattern = re.compile(
        r"= (?P<shapes>\(?[a-z0-9]+\[.*?) (?P<op>all-gather|all-to-all|all-reduce|collective-permute)(-start)?\("
    )
    found = {}
    for match in pattern.finditer(text):
        shapes = re.findall(r"[a-z0-9]+\[([\d,]*)\]", match["shapes"])
        sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
        found.setdefault(match["op"], []).extend(sizes)
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_batch_sharded_inputs_stay_where_they_are(name, mesh):
    sharding = NamedSharding(mesh, P("batch"))
    inputs, ids = jax.device_put((INPUTS[name], IDS), sharding)
    compiled = jax.jit(jax.value_and_grad(FUNCTIONS[name])).lower(inputs, ids).compile()
    moved = sizes_of_collectives(compiled.as_text())
    assert moved.pop("all-reduce")  # of sums
    assert not moved
    result = compiled(inputs, ids)
    assert_close(jax.device_get(result), jax.device_get(value_and_grad(name)(INPUTS[name], IDS)), atol=1e-6)
    assert result[1].sharding.is_equivalent_to(sharding, len(SHAPE))


def test_the_search_for_collectives_finds_them(mesh):
    sharding = NamedSharding(mesh, P("batch"))
    gathered = jax.jit(lambda x: x * 2, in_shardings=sharding, out_shardings=NamedSharding(mesh, P()))
    assert sizes_of_collectives(gathered.lower(PROBS).compile().as_text()) == {"all-gather": [PROBS.size]}


# Other platforms


@pytest.mark.parametrize("labels", ["ids", "one_hot"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_lowers_for_cpu_cuda_and_tpu(name, labels):
    function = jax.jit(jax.value_and_grad(FUNCTIONS[name]))
    arguments = INPUTS[name], twin.sample_labels(labels, SHAPE)
    exported = jax.export.export(function, platforms=("cpu", "cuda", "tpu"))(*arguments)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert [x.shape for x in exported.out_avals] == [(), SHAPE]
    if labels == "ids":
        assert_close(exported.call(*arguments), value_and_grad(name)(*arguments))
