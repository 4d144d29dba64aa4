"""Which programs for GPUs hold the kernel, as each version of JAX lowers them. `test_sums.py` tests its numbers."""

import contextlib
import inspect
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from calib_jax import _devices, binning
from calib_jax._sums import gpu_kernel
from calib_jax._sums.bins import Bins


def gpus(count, kind=AxisType.Auto):
    """A mesh of GPUs that are not here: JAX 0.12 asks for one to lower a kernel."""
    known = {"device_kind": "NVIDIA H100 80GB HBM3", "num_cores": 132, "platform": "gpu"}
    device = AbstractDevice(**{name: known[name] for name in inspect.signature(AbstractDevice).parameters})
    return AbstractMesh((count,), ("batch",), axis_types=(kind,), abstract_device=device)


def program(bins, platform="cuda", mesh=None):
    """Text of the sums in bins of eight images, split over a mesh by `shard_map` if one is given."""
    probs = jax.ShapeDtypeStruct((8, 3_000, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((8, 3_000), jnp.int32)
    edges = jax.ShapeDtypeStruct((8, 3, 19), jnp.float32) if bins.binning == "adaptive" else None

    def sums(probs, labels, edges):
        return binning._bin_sums(probs, labels, None, edges, bins)

    if mesh is not None:
        here = PartitionSpec("batch")
        sums = jax.shard_map(sums, mesh=mesh, in_specs=here, out_specs=here)
    lowered = jax.jit(sums).trace(probs, labels, edges).lower(lowering_platforms=(platform,))
    return lowered.as_text()


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(gpu_kernel, "platform", lambda: "gpu")


@pytest.mark.parametrize(
    ("bins", "devices", "there"),
    [
        (Bins("hard", 20), 1, True),
        (Bins("soft", 20), 1, True),
        (Bins("adaptive", 20), 1, False),
        (Bins("hard", 1000), 1, False),
        (Bins("hard", 20), 8, False),
    ],
)
def test_one_gpu_runs_the_kernel(monkeypatch, bins, devices, there):
    """The compiler cannot split a kernel over several, and would gather the images instead."""
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    with jax.sharding.use_abstract_mesh(gpus(1)) if there else contextlib.nullcontext():
        text = program(bins)
    assert ("triton" in text) is there
    assert "triton" not in program(bins, platform="cpu")


def test_each_gpu_runs_the_kernel_on_what_shard_map_gives_it():
    assert "triton" in program(Bins("hard", 20), mesh=gpus(8))


def test_one_of_several_gpus_runs_the_kernel_outside_of_jit(monkeypatch):
    """Public functions and the trainer's evaluation trace in this context."""
    monkeypatch.setattr(_devices, "_ONE", gpus(1))
    assert jax.device_count() > 1
    assert "triton" not in program(Bins("hard", 20))
    found = []
    _devices.on_one_device(lambda: found.append(program(Bins("hard", 20))))
    assert "triton" in found[0]


def test_a_jax_that_cannot_make_the_kernel_sums_by_masks(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    monkeypatch.delattr("jax.experimental.pallas.triton", raising=False)
    with jax.sharding.use_abstract_mesh(gpus(1)):
        assert "triton" not in program(Bins("hard", 20))
