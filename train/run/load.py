"""A trained run, loaded from its folder for prediction."""

from pathlib import Path

from flax import nnx
from jax.sharding import Mesh

from train.config import (
    DataInfo,
    RunConfig,
    read_config,
)
from train.errors import InputError
from train.inference import VolumePredictor, volume_predictor
from train.run.checkpoint import Checkpoints, Which
from train.sharding import (
    place_weights,
)
from train.step import TrainState, init_state, make_optimizer
from train.task import make_model


def load_run(folder: Path, which: Which = "last") -> tuple[RunConfig, DataInfo, VolumePredictor]:
    """A run's configuration, what it knows of its data, and prediction of volumes under its last or best weights.

    Raises:
        InputError: if the folder holds no run or no such checkpoint.
    """
    config, info = read_config(folder)
    graphdef, state = load_state(folder, which)
    return config, info, volume_predictor(graphdef, state, config.data.sliding_window, config.model.regions)


def load_state(
    folder: Path, which: Which = "last", mesh: Mesh | None = None
) -> tuple[nnx.GraphDef, TrainState]:
    """The network of the run in `folder` and its last or best checkpoint, placed on `mesh` if there is one."""
    config, info = read_config(folder)
    graphdef, state = init_state(make_model(config, info), make_optimizer(config.training))
    state = state if mesh is None else place_weights(state, mesh)
    if not (folder / "checkpoints").is_dir():
        raise InputError(f"{folder} holds no checkpoint: train it first, or --resume its training.")
    with Checkpoints(folder / "checkpoints", config.training, read_only=True) as checkpoints:
        state, _ = checkpoints.restore(state, which)
    return graphdef, state
