"""The programs of a run, compiled from the shapes of its arrays alone: the step, and the network of validation."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from train.config import DataInfo, DeviceConfig, RunConfig, from_json
from train.hlo import compile_and_describe
from train.inference import Network, VolumePredictor, jitted, plan_windows, windows_at_once
from train.losses import Regions, parse_loss
from train.numerics import numerics
from train.sharding import (
    batch_spec,
    check_split,
    device_mesh,
    parts_in_turn,
    process_share,
    replicated,
    weight_shardings,
)
from train.step import TrainState, check_loss, make_optimizer, make_train_step
from train.targets import Target
from train.task import find_divisors, make_model


@dataclass(frozen=True)
class Run:
    """What the step of a run depends on, without its data set.

    Attributes:
        config: with every open option resolved.
        info: properties of the data.
        devices: options of devices, as the user gave them.
        regions: class ids of each output channel of a network with sigmoids.
        has_ignore: whether voxels may have no label.
        largest_shape: voxels of the largest volume along each axis; empty without a data set.
    """

    config: RunConfig
    info: DataInfo
    devices: DeviceConfig
    regions: Regions = ()
    has_ignore: bool = False
    largest_shape: tuple[int, ...] = ()

    @property
    def soft_classes(self) -> int:
        """Classes of soft labels; 0 for class ids."""
        return len(self.info.class_names) if self.config.data.has_soft_labels else 0


def compile_step(target: Target, request: Any) -> dict[str, Any]:
    """Compiles the step of a run for a target, in a process that `train.targets.run_for` started.

    Args:
        target: the devices.
        request: a `Run` as JSON.

    Returns:
        Bytes of each part on one device, and `train.hlo.compile_and_describe`. `waiting_bytes` are those of the
        next batch, which waits on the device while a step runs.
    """
    with numerics():
        run, mesh = _requested(target, request)
        step, state, batch = abstract_step(run, mesh)
        figures = compile_and_describe(step, (state, batch), target.compiler_options())
    sizes = {
        "weight_bytes": bytes_on_each((state.params, state.rest, state.average)),
        "optimizer_bytes": bytes_on_each((state.step, state.opt_state)),
        "batch_bytes": bytes_on_each(batch),
    }
    return {"mesh": dict(mesh.shape), **sizes, "waiting_bytes": sizes["batch_bytes"], **figures}


def compile_validation(target: Target, request: Any) -> dict[str, Any]:
    """As `compile_step`, of the network on the windows that a device sees at a time in validation.

    `waiting_bytes` are those of the training state, of the next batch, and of what the first device of a process
    holds: the windows of its other devices, and the largest volume (`volume_bytes`) if the data set is known.
    """
    with numerics():
        run, mesh = _requested(target, request)
        _, state, batch = abstract_step(run, mesh)
        all_data = device_mesh(devices=target.devices())
        of_process = sum(device.process_index == 0 for device in all_data.devices.flat)
        patch = run.config.data.sliding_window
        count, volume = windows_at_once(patch, of_process), 0
        if run.largest_shape:
            windows = plan_windows(run.largest_shape, patch, VolumePredictor.overlap, count, of_process)
            count = max(windows.counted.shape[1] // of_process, 1)
            # The image, its labels and mask, and the probabilities before and after they are normalised.
            channels = run.info.num_channels + 2 * len(run.regions or run.info.class_names)
            volume = math.prod(windows.canvas) * (4 * channels + 2)
        program, arguments = abstract_windows(run, all_data, count)
        figures = compile_and_describe(program, arguments, target.compiler_options())
    collected = (of_process - 1) * (bytes_on_each(arguments[1]) + figures["output_bytes"])
    waiting = bytes_on_each((state, batch)) + collected + volume
    return {"waiting_bytes": waiting, "volume_bytes": volume, **figures}


def _requested(target: Target, request: Any) -> tuple[Run, Mesh]:
    run = from_json(Run, request)
    run = dataclasses.replace(run, regions=tuple(map(tuple, run.regions)))
    return run, device_mesh(run.devices.mesh, target.devices())


def abstract_step(run: Run, mesh: Mesh) -> tuple[Any, TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """The compiled-to-be step of a run, and shapes with shardings of its state and batch. Nothing is allocated.

    Raises:
        InputError: the mesh cannot split the run.
    """
    config, info, patch = run.config, run.info, run.config.data.patch
    batch_size = config.training.batch_size
    accumulate = parts_in_turn(run.devices.accumulate, batch_size, mesh)
    check_split(batch_size, patch, find_divisors(config, info)[0], accumulate, mesh)
    process_share(mesh, 0)
    loss = dataclasses.replace(parse_loss(config.loss), regions=run.regions)
    check_loss(
        loss,
        mesh,
        (batch_size, *patch),
        channels=len(run.regions or info.class_names),
        soft_classes=run.soft_classes,
        has_ignore=run.has_ignore,
    )
    optimizer = make_optimizer(config.training)
    graphdef, params, rest = nnx.split(nnx.eval_shape(lambda: make_model(config, info)), nnx.Param, ...)
    step_number: Any = jax.ShapeDtypeStruct((), jnp.int32)
    average = params if config.training.ema else None
    state = TrainState(step_number, params, rest, jax.eval_shape(optimizer.init, params), average)
    step = make_train_step(
        graphdef,
        optimizer,
        config,
        mesh,
        regions=run.regions,
        accumulate=accumulate,
        remat=run.devices.remat,
        has_ignore=run.has_ignore,
    )
    return step, _placed(state, weight_shardings(state, mesh)), _abstract_batch(run, mesh)


def abstract_windows(run: Run, mesh: Mesh, count: int) -> tuple[Any, tuple[Any, jax.ShapeDtypeStruct]]:
    """The compiled-to-be network of a run on `count` windows for each device, and shapes of weights and windows."""
    graphdef, *weights = nnx.split(nnx.eval_shape(lambda: make_model(run.config, run.info)), nnx.Param, ...)
    shape = (count * mesh.size, *run.config.data.sliding_window, run.info.num_channels)
    windows = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, batch_spec(1)))
    placed = _placed(tuple(weights), jax.tree.map(lambda _: replicated(mesh), tuple(weights)))
    platform = mesh.devices.flat[0].platform
    return jitted(Network(graphdef, run.config.model.regions), platform, mesh), (placed, windows)


def _abstract_batch(run: Run, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch of `train.data.train_batches`."""
    voxels = (run.config.training.batch_size, *run.config.data.patch)
    soft = run.soft_classes
    arrays = {
        "image": jax.ShapeDtypeStruct((*voxels, run.info.num_channels), jnp.float32),
        "label": jax.ShapeDtypeStruct((*voxels, soft), jnp.float32)
        if soft
        else jax.ShapeDtypeStruct(voxels, jnp.int32),
        "index": jax.ShapeDtypeStruct(voxels[:1], jnp.int32),
    }
    return _placed(arrays, {n: NamedSharding(mesh, batch_spec(a.ndim)) for n, a in arrays.items()})


def _placed(shapes: Any, shardings: Any) -> Any:
    def place(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, shapes, shardings)


def bytes_on_each(tree: Any) -> int:
    """Bytes of arrays, or of shapes with shardings, on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
