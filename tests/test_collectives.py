"""What devices exchange in a training step: as few and as little as the mathematics needs."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from flax import nnx

from train.abstract import Run, abstract_step
from train.config import DataConfig, DataInfo, DeviceConfig, ModelConfig, RunConfig, TrainingConfig
from train.data.augment_config import NO_AUGMENTATION, AugmentConfig
from train.hlo import Program, collectives, parse_program
from train.models.configs import UNetConfig
from train.sharding import FSDP, device_mesh, weight_spec
from train.task import make_model

CONFIG = RunConfig(
    "dice+ce+ace",
    data=DataConfig(patch=(16, 16, 16)),
    model=ModelConfig(network=UNetConfig((4, 8), (2,))),
    training=TrainingConfig(steps=10, batch_size=8, warmup_steps=1),
    augment=NO_AUGMENTATION,
)
INFO = DataInfo("toy", ("background", "organ", "core"), num_channels=1, spatial_dims=3)
# Of the network: five instance norms; convolutions with kernels of 3 and stride 1 need the rims on both sides, the
# strided and the transposed one need one rim.
NORMS, RIMS, FIRST_RIMS = 5, 2 * 4 + 1 + 1, 1


@functools.cache
def program_of(mesh: str, num_devices: int = 8, **memory: int) -> Program:
    run = Run(CONFIG, INFO, DeviceConfig(mesh, **memory))
    step, *arguments = abstract_step(run, device_mesh(mesh, jax.devices()[:num_devices]))
    return parse_program(step.lower(*arguments).compile().as_text())


def counts(program: Program) -> dict[str, int]:
    return {kind: exchanged["count"] for kind, exchanged in collectives(program).items()}


def weights() -> list[jax.ShapeDtypeStruct]:
    return jax.tree.leaves(nnx.state(nnx.eval_shape(lambda: make_model(CONFIG, INFO)), nnx.Param))


def num_bytes(arrays: list[jax.ShapeDtypeStruct]) -> int:
    return sum(4 * int(np.prod(array.shape)) for array in arrays)


def test_a_split_batch_costs_one_reduction() -> None:
    """Of gradients and terms of the loss together."""
    found = collectives(program_of("data=8"))
    assert found.keys() == {"all-reduce"}
    assert found["all-reduce"]["count"] == 1
    assert found["all-reduce"]["bytes"] < 1.05 * num_bytes(weights())


def test_accumulation_costs_no_exchange() -> None:
    """Gradients and loss are reduced once, after the last part of a batch."""
    parts, whole = collectives(program_of("data=4", 4, accumulate=2)), collectives(program_of("data=8"))
    assert parts == whole


def test_split_weights_are_gathered_once() -> None:
    """And the norm of the gradient is one more reduction."""
    found = collectives(program_of("data=1,fsdp=8"))
    split = [leaf for leaf in weights() if FSDP in weight_spec(leaf.shape, 8)]
    assert split
    assert found.keys() <= {"all-reduce", "all-gather", "reduce-scatter"}
    assert found["all-gather"]["count"] <= len(split)
    assert found["all-gather"]["bytes"] <= num_bytes(split)
    assert found["all-reduce"]["count"] + found.get("reduce-scatter", {"count": 0})["count"] <= 2
    assert found["all-reduce"]["bytes"] < 1.35 * num_bytes(weights())


def test_split_volumes_exchange_rims_and_sums() -> None:
    """Forward: the rims of each convolution and two sums of each norm, and two sums of the loss. Backward: the rims
    of gradients of all layers but the first, one sum of each norm, and two of the gradients: those of kernels and
    the others."""
    program = program_of("data=2,space=4")
    found = counts(program)
    assert found.keys() == {"all-reduce", "collective-permute"}
    assert found["all-reduce"] <= 2 * NORMS + 2 + NORMS + 2
    assert found["collective-permute"] <= 2 * RIMS - FIRST_RIMS
    reductions = [i.op_name for i, *_ in program.instructions() if i.opcode == "all-reduce"]
    of_loss = [name for name in reductions if re.fullmatch(r"jit\(step\)/shard_map/jvp\(.*\)/psum", name)]
    assert len(of_loss) == 2
    # Four images of a device, one row of voxels, 24 channels on half of the grid.
    rim = max(i.net_bytes for i, *_ in program.instructions() if i.opcode == "collective-permute")
    assert rim <= 4 * 4 * 8 * 8 * 24


def test_a_flip_of_split_volumes_sends_images_and_labels_once() -> None:
    augment = dataclasses.replace(NO_AUGMENTATION, flip_prob=0.5, flip_axes=(0,))
    config = dataclasses.replace(CONFIG, augment=augment)
    step, *arguments = abstract_step(Run(config, INFO, DeviceConfig()), device_mesh("data=2,space=4"))
    flipped = counts(parse_program(step.lower(*arguments).compile().as_text()))
    still = counts(program_of("data=2,space=4"))
    assert flipped["collective-permute"] - still["collective-permute"] <= 2
    assert flipped["all-reduce"] == still["all-reduce"]


@pytest.mark.parametrize(("batch_size", "kind", "times"), [(8, "all-to-all", 4), (2, "all-gather", 2)])
def test_zoom_rotation_and_smoothing_of_split_volumes_put_them_together_once(
    batch_size: int, kind: str, times: int
) -> None:
    """With a volume for each device they go there and back, else they are gathered. A flip costs nothing more."""
    augment = AugmentConfig(zoom_prob=0.3, rotation_prob=0.3, smooth_prob=0.2)
    training = dataclasses.replace(CONFIG.training, batch_size=batch_size)
    found = {}
    for name, of in (("still", NO_AUGMENTATION), ("moved", augment)):
        config = dataclasses.replace(CONFIG, augment=of, training=training)
        step, *arguments = abstract_step(Run(config, INFO, DeviceConfig()), device_mesh("data=2,space=4"))
        found[name] = collectives(parse_program(step.lower(*arguments).compile().as_text()))
    together = found["moved"].pop(kind)
    assert found["moved"] == found["still"]
    assert together["count"] == times
    volume = 2 * 4 * 16**3  # image and label
    assert together["bytes"] <= (2 if times == 4 else 1) * volume
