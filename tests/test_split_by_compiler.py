"""GPUs on a mesh with automatic axes: the compiler splits images and asks for the program of a part.

There are no GPUs here. Eight CPU devices are asked in their place.
"""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import calib_jax
from calib_jax import _parts
from calib_jax._sums import gpu_kernel
from tests.test_explicit_sharding import LOSSES, SPLITS, images, on_one_device, placed
from tests.test_gpu_kernel import gpus
from train.hlo import collectives, parse_program

BINNED = ("soft", "adaptive", "soft labels")
PERMUTED = [3, 1, 2, 0, 7, 6, 5, 4]


@pytest.fixture(scope="module", autouse=True)
def forget_programs_for_gpus():
    yield
    jax.clear_caches()


@pytest.fixture
def asked(monkeypatch):
    """How images are split for which the compiler has asked, which it does from `asked.start()` on."""

    class Asked(list):
        def start(self):
            jax.clear_caches()  # programs that were traced for CPUs
            monkeypatch.setattr(_parts, "platform", lambda: "gpu")
            by_name = _parts._by_name

            def record(*arguments):
                self.append(by_name(*arguments))
                return self[-1]

            monkeypatch.setattr(_parts, "_by_name", record)

    return Asked()


def automatic(split, order=(0, 1, 2, 3, 4, 5, 6, 7)):
    shape, names, spec = SPLITS[split]
    devices = np.array(jax.devices())[list(order)]
    return Mesh(devices[: int(np.prod(shape))].reshape(shape), names), spec


def assert_alike(found, want):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(y).max()), found, want
    )


def loss_and_gradient(loss=calib_jax.mL1_ace):
    return lambda x, y: jax.value_and_grad(loss)(x, y)


@pytest.mark.parametrize(
    ("name", "split"),
    [("without background", split) for split in SPLITS if split != "both"]
    + [(name, "both") for name in BINNED],
)
def test_loss_and_gradient_are_those_of_one_device(asked, name, split):
    want = on_one_device(name)
    asked.start()
    assert_alike(jax.jit(loss_and_gradient(LOSSES[name]))(*placed(*automatic(split), *images())), want)
    assert asked


def test_one_device_of_several_gets_the_loss_too(asked):
    want = on_one_device("ace")
    asked.start()
    assert_alike(jax.jit(loss_and_gradient(LOSSES["ace"]))(*images()), want)


def in_two(run):
    """As for the accumulation of gradients: each half of the images then lies on pairs of devices."""
    return lambda *arrays: jax.lax.map(
        lambda part: run(*part), tuple(x.reshape(2, 4, *x.shape[1:]) for x in arrays)
    )


SOFT = functools.partial(calib_jax.mL1_ace, binning="soft")  # hard bins have no second derivative
WAYS = {
    "parts of a mesh axis": ("images", in_two(loss_and_gradient()), P(("axis1", "axis2"), None, None, None)),
    "unequal parts": (
        "both",
        lambda x, y: loss_and_gradient()(x[:, :-1], y[:, :-1]),
        P("axis0", None, None, None),
    ),
    "one loss per image": (
        "both",
        lambda x, y: jax.vmap(lambda x, y: loss_and_gradient()(x[None], y[None]))(x, y),
        P("axis0", None, ("axis1", "axis2"), None, None),
    ),
    "many networks, one truth": (
        "images",
        lambda x, y: jax.vmap(jax.vmap(calib_jax.mL1_ace, (0, None)), (0, None))(
            jnp.stack([x, x**2])[:, None], y
        ),
        P(None, None, ("axis0", "axis1", "axis2"), None, None, None),
    ),
    "rematerialised": (
        "both",
        loss_and_gradient(jax.checkpoint(calib_jax.mL1_ace)),
        P("axis0", ("axis1", "axis2"), None, None),
    ),
    "loop": (
        "both",
        lambda x, y: jax.lax.scan(lambda c, _: (c + calib_jax.mL1_ace(x, y), None), 0.0, length=2)[0],
        P("axis0", ("axis1", "axis2"), None, None),
    ),
    "second derivative": (
        "images",
        lambda x, y: jax.grad(lambda x: (1e6 * jax.grad(SOFT)(x, y) ** 2).sum())(x),
        P(("axis0", "axis1", "axis2"), None, None, None),
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_any_program_around_a_loss_is_split(asked, way):
    split, run, spec = WAYS[way]
    logits, labels = images((16, 12))
    probs = np.asarray(jax.nn.softmax(logits))
    want = jax.jit(run)(probs, labels)
    asked.start()
    assert_alike(jax.jit(run)(*placed(*automatic(split), probs, labels)), want)
    assert {found.spec for found in asked} == {spec}


def test_devices_of_a_mesh_may_stand_in_any_order(asked):
    logits, labels = images((16, 12))
    want = loss_and_gradient()(logits, labels)
    asked.start()
    arguments = placed(*automatic("voxels along two axes", PERMUTED), logits, labels)
    assert_alike(jax.jit(loss_and_gradient())(*arguments), want)
    assert asked


def test_in_a_shard_map_along_some_axes_the_compiler_splits_the_sums_itself(asked):
    logits, labels = images((16, 12))
    probs = np.asarray(jax.nn.softmax(logits))
    of_image = jax.vmap(lambda x, y: calib_jax.mL1_ace(x[None], y[None]))
    want = of_image(probs, labels)
    mesh, spec = automatic("both")
    of_half = jax.shard_map(of_image, mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"})
    asked.start()
    assert_alike(jax.jit(of_half)(*placed(mesh, spec, probs, labels)), want)
    assert not asked


@pytest.mark.parametrize("split", ["images", "voxels", "both"])
def test_no_voxel_leaves_its_device(asked, split):
    asked.start()
    run = jax.jit(loss_and_gradient())
    program = run.lower(*placed(*automatic(split), *images())).compile().as_text()
    moved = collectives(parse_program(program))
    assert set(moved) == {"all-reduce"}
    assert moved["all-reduce"]["bytes"] <= 4 * 8 * 4 * 3 * 20 + 8


def test_jaxs_cache_of_compiled_programs_tells_bins_apart(asked):
    """Of two calls of `custom_partitioning` its key may hold arguments and attributes alone."""
    asked.start()
    arguments = placed(*automatic("images"), *images((16, 12)))

    def name(**options):
        run = jax.jit(functools.partial(calib_jax.bin_statistics, **options))
        (found,) = re.findall('program = "([0-9a-f]{64})"', run.lower(*arguments).as_text())
        return found

    names = [name(**options) for options in ({}, {"closed": "left"}, {"binning": "soft"}, {})]
    assert len(set(names)) == 3
    assert names[0] == names[-1]


@pytest.mark.parametrize("mesh", [gpus(8), None], ids=["on a mesh", "one of several"])
def test_gpus_run_the_kernel(monkeypatch, mesh):
    for module in (_parts, gpu_kernel):
        monkeypatch.setattr(module, "platform", lambda: "gpu")
    probs = jax.ShapeDtypeStruct((8, 64, 48, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((8, 64, 48), jnp.int32)
    with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(loss_and_gradient()).trace(probs, labels)
    assert "pallas_call" in str(traced.jaxpr)
