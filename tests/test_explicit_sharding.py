"""Meshes with explicit axes, as `jax.make_mesh` makes since JAX 0.9: the type of an array says how it is split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import calib_jax
from calib_jax._sums import gpu_kernel
from tests.test_gpu_kernel import gpus
from train.hlo import collectives, parse_program

SPLITS = {
    "images": ((8,), ("data",), P("data")),
    "voxels": ((8,), ("space",), P(None, "space")),
    "both": ((2, 4), ("data", "space"), P("data", "space")),
    "voxels along two axes": ((2, 4), ("x", "y"), P(None, "x", "y")),
    "images over two axes": ((2, 4), ("data", "fsdp"), P(("data", "fsdp"))),
    "classes": ((2,), ("model",), P(None, None, None, "model")),
    "nothing": ((8,), ("data",), P()),
}
LOSSES = {
    "ace": lambda x, y: calib_jax.mL1_ace(jax.nn.softmax(x), y),
    "soft": lambda x, y: calib_jax.mL1_ace(jax.nn.softmax(x), y, binning="soft", where=y > 0),
    "adaptive": lambda x, y: calib_jax.mL1_ace(jax.nn.softmax(x), y, binning="adaptive", where=y > 0),
    "without background": lambda x, y: calib_jax.mL1_ace(jax.nn.softmax(x), y, include_background=False),
    "pooled": lambda x, y: calib_jax.mL1_ece(jax.nn.softmax(x), y, pool_images=True),
    "combined": calib_jax.segmentation_loss,
    "damped": lambda x, y: calib_jax.segmentation_loss(x, y, dice=0.0, damped_dice=1.0, where=y > 0),
    "others": lambda x, y: calib_jax.segmentation_loss(
        x, y, focal=1.0, mbls=1.0, label_smoothing=1.0, dsc_plus_plus=1.0
    ),
    "neighbours": lambda x, y: calib_jax.segmentation_loss(x, y, svls=1.0, nacl=1.0),
    "soft labels": lambda x, y: calib_jax.segmentation_loss(x, jax.nn.softmax(x[..., ::-1] + y[..., None])),
}
EVERYWHERE = ("combined", "adaptive")  # losses that are tested with every split, the others with two
METRICS = {
    "bins": lambda x, y: calib_jax.average_calibration_error(calib_jax.bin_statistics(jax.nn.softmax(x), y)),
    "brier": lambda x, y: calib_jax.brier_score(jax.nn.softmax(x), y),
    "nll": lambda x, y: calib_jax.negative_log_likelihood(jax.nn.softmax(x), y),
    "dice": lambda x, y: calib_jax.dice_score(jax.nn.softmax(x).argmax(-1), y, num_classes=4),
}


def images(voxels=(128, 96)):
    """Logits and labels of eight images, more voxels each than are added up in one step."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (8, *voxels, 4)).astype(np.float32)
    return logits, rng.integers(-1, 4, (8, *voxels)).astype(np.int32)


@functools.cache
def on_one_device(name):
    return jax.device_get(jax.jit(jax.value_and_grad(LOSSES[name]))(*images()))


def explicit(split):
    shape, names, spec = SPLITS[split]
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Explicit,) * len(names), devices=devices), spec


def placed(mesh, spec, logits, labels):
    of_labels = P(*spec[:3])
    return jax.device_put(logits, NamedSharding(mesh, spec)), jax.device_put(
        labels, NamedSharding(mesh, of_labels)
    )


@pytest.mark.parametrize(
    ("name", "split"),
    [
        (name, split)
        for name in LOSSES
        for split in SPLITS
        if split in ("images", "both") or name in EVERYWHERE
    ],
)
def test_loss_and_gradient_are_those_of_one_device(name, split):
    want, d_want = on_one_device(name)
    mesh, spec = explicit(split)
    with jax.set_mesh(mesh):
        got, gradient = jax.jit(jax.value_and_grad(LOSSES[name]))(*placed(mesh, spec, *images()))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(gradient, d_want, rtol=1e-4, atol=1e-5 * np.abs(d_want).max())
    assert gradient.sharding.is_equivalent_to(NamedSharding(mesh, spec), gradient.ndim)


@pytest.mark.parametrize("split", ["images", "both", "classes"])
@pytest.mark.parametrize("name", METRICS)
def test_metrics_are_those_of_one_device_with_and_without_jit(name, split):
    logits, labels = images()
    want = METRICS[name](logits, labels)
    mesh, spec = explicit(split)
    with jax.set_mesh(mesh):
        arguments = placed(mesh, spec, logits, labels)
        for run in (METRICS[name], jax.jit(METRICS[name])):
            np.testing.assert_allclose(run(*arguments), want, rtol=1e-5)


@pytest.mark.parametrize("split", ["images", "voxels"])
@pytest.mark.parametrize("name", ["combined", "neighbours", "adaptive"])
def test_the_mesh_need_not_be_set_and_labels_may_lie_elsewhere(name, split):
    logits, labels = images((16, 16))
    run = jax.jit(jax.grad(LOSSES[name]))
    want = run(logits, labels)
    on_mesh = placed(*explicit(split), logits, labels)
    for arguments in (on_mesh, (on_mesh[0], labels)):
        np.testing.assert_allclose(run(*arguments), want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("split", ["images", "voxels"])
def test_totals_begun_on_one_device_go_on_on_a_mesh(split):
    logits, labels = images((16, 8))
    probs = jax.nn.softmax(logits)
    totals, cases = calib_jax.dataset_totals(4), calib_jax.case_results(16, 4)
    stats = calib_jax.bin_statistics(probs, labels)
    of_set, of_cases = totals.init(), cases.init()
    want = totals.update(totals.update(of_set, probs, labels), probs, labels)
    ranks = np.arange(16).reshape(2, 8)
    of_cases = cases.update(of_cases, probs, labels, ranks[0])
    mesh, spec = explicit(split)
    with jax.set_mesh(mesh):
        probs, labels = placed(mesh, spec, probs, labels)
        of_set = jax.jit(totals.update)(totals.update(of_set, probs, labels), probs, labels)
        of_cases = cases.update(of_cases, probs, labels, ranks[1])
        both = stats + calib_jax.bin_statistics(probs, labels)
        found = totals.compute(of_set), cases.compute(of_cases)
        ace = calib_jax.average_calibration_error(both)
    for name in ("ace", "mce", "brier", "nll", "dice"):
        np.testing.assert_allclose(getattr(found[0], name), getattr(totals.compute(want), name), rtol=1e-6)
    np.testing.assert_allclose(found[1].ace[:8], found[1].ace[8:], rtol=1e-6)
    np.testing.assert_allclose(ace, calib_jax.average_calibration_error(stats), rtol=1e-5)


@pytest.mark.parametrize("split", ["images", "voxels", "both"])
def test_no_voxel_leaves_its_device(split):
    mesh, spec = explicit(split)
    with jax.set_mesh(mesh):
        run = jax.jit(jax.value_and_grad(calib_jax.segmentation_loss))
        program = run.lower(*placed(mesh, spec, *images())).compile().as_text()
    moved = collectives(parse_program(program))
    assert set(moved) == {"all-reduce"}
    # Three sums of each image, class and bin, and what Dice and cross-entropy sum.
    assert moved["all-reduce"]["bytes"] < 4 * 8 * 4 * (3 * 20 + 4)


@pytest.mark.parametrize("split", ["images", "voxels"])
def test_each_gpu_runs_the_kernel_on_its_part(monkeypatch, split):
    monkeypatch.setattr(gpu_kernel, "platform", lambda: "gpu")
    mesh = gpus(8, AxisType.Explicit)
    spec = P("batch") if split == "images" else P(None, "batch")
    probs, labels = (
        jax.ShapeDtypeStruct((8, 64, 48, *rest), dtype, sharding=NamedSharding(mesh, spec))
        for rest, dtype in (((3,), jnp.float32), ((), jnp.int32))
    )
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.value_and_grad(calib_jax.mL1_ace)).trace(probs, labels)
    assert "pallas_call" in str(traced.jaxpr)
