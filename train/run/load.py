"""Load a trained run from its folder."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from train.config import DataInfo, RunConfig, read_config
from train.errors import InputError
from train.inference import VolumePredictor, volume_predictor
from train.run.checkpoint import Checkpoints, Which
from train.sharding import weight_shardings
from train.step import TrainState
from train.task import make_model


def load_run(folder: Path, which: Which = "last") -> tuple[RunConfig, DataInfo, VolumePredictor]:
    """Reads a run's configuration and data description, and makes a predictor of its last or best weights.

    Raises:
        InputError: the folder holds no run or no such checkpoint.
    """
    config, info = read_config(folder)
    graphdef, state = load_network(folder, which)
    return config, info, volume_predictor(graphdef, state, config.data.sliding_window, config.model.regions)


def load_network(
    folder: Path, which: Which = "last", mesh: Mesh | None = None
) -> tuple[nnx.GraphDef, TrainState]:
    """Reads the network of the run in `folder`, without the optimiser's moments.

    Args:
        folder: of the run.
        which: the last checkpoint or the best one.
        mesh: where to place the arrays; None for this process's first device.

    Returns:
        The network's static part, and a state whose `opt_state` is None.

    Raises:
        InputError: the folder holds no run or no such checkpoint.
    """
    config, info = read_config(folder)
    if not (folder / "checkpoints").is_dir():
        raise InputError(f"{folder} holds no checkpoint: train it first, or --resume its training.")
    graphdef, *parts = nnx.split(nnx.eval_shape(lambda: make_model(config, info)), nnx.Param, ...)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    average = parts[0] if config.training.ema else None
    shapes = TrainState(step, *parts, opt_state=None, average=average)
    first = SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: first, shapes) if mesh is None else weight_shardings(shapes, mesh)
    like = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
    with Checkpoints(folder / "checkpoints", config.training, read_only=True) as checkpoints:
        state, _ = checkpoints.restore(like, which)
    return graphdef, state
