"""Train one network with one loss: read `fit` from the top down."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from calib_jax.report import ModelResult
from train.checkpoint import Checkpoints, Which
from train.config import (
    DataConfig,
    DataInfo,
    ModelConfig,
    RunConfig,
    check_same_data,
    read_config,
    resolve_patch,
    to_json,
)
from train.data import (
    Dataset,
    Splits,
    chosen_splits,
    open_dataset,
    split_cases,
    train_batches,
    write_splits,
)
from train.errors import InputError, NotFinite, Stopped
from train.evaluate import evaluate
from train.inference import Network, VolumePredictor
from train.logs import RunLog
from train.models import make_network
from train.runs import claimed, open_run, stop_on_signal
from train.sharding import check_batch_size, device_mesh, put_batch, replicated
from train.step import TrainState, init_state, make_optimizer, make_train_step

_FLUSH_EVERY = 20  # steps between reads of the metrics, so that the loop does not wait for each step


@dataclass(frozen=True)
class Task:
    """A configuration with what it refers to: the data set, the split and the patch."""

    config: RunConfig
    dataset: Dataset
    splits: Splits
    patch: tuple[int, ...]


def open_task(config: RunConfig) -> Task:
    """Opens the data of a run and checks everything that can be checked before it starts."""
    dataset, splits = open_data(config.data)
    info = DataInfo.of(dataset)
    config = _as_initial(config, info) if config.init else config
    data = config.data
    patch = resolve_patch(data.patch, dataset.largest_shape, config.model.divisor)
    check_batch_size(config.training.batch_size, device_mesh())
    # The patch is kept with the run, so that predicting needs no data set to find it.
    config = dataclasses.replace(config, data=dataclasses.replace(data, patch=patch))
    if config.model.norm == "batch" and not config.init:
        raise InputError(
            "norm is batch, whose statistics come from imported weights: give --init, or another norm."
        )
    nnx.eval_shape(lambda: make_model(config, info))
    return Task(config, dataset, splits, patch)


def _as_initial(config: RunConfig, info: DataInfo) -> RunConfig:
    """`config` with the network, and where it leaves it open the patch, of the run that it starts from."""
    run = Path(config.init)
    initial, trained = read_config(run)
    if config.model not in (ModelConfig(), initial.model):
        raise InputError(f"The network's options come from --init {run}: leave out those of this command.")
    check_same_data(config.data.data, info, run, trained)
    data = dataclasses.replace(config.data, patch=config.data.patch or initial.data.patch)
    return dataclasses.replace(config, model=initial.model, data=data)


def open_data(data: DataConfig) -> tuple[Dataset, Splits]:
    """The data set and who trains, validates and tests."""
    dataset = open_dataset(
        data.data, geometry=data.geometry, all_annotators=data.annotators != "first", cache_dir=data.cache_dir
    )
    return dataset, _splits(data, dataset)


def _splits(data: DataConfig, dataset: Dataset) -> Splits:
    names, who = dataset.case_names, dataset.subjects
    if data.splits:
        file = Path(data.splits).expanduser()
        return chosen_splits(
            file, names, fold=data.fold, num_val=data.num_val, seed=data.split_seed, subjects=who
        )
    if data.fold is not None:
        raise InputError(f"fold is {data.fold}: give the file with the folds as --splits.")
    return split_cases(
        names, num_test=data.num_test, num_val=data.num_val, seed=data.split_seed, subjects=who
    )


def fit(task: Task, folder: Path, *, resume: bool = False) -> VolumePredictor:
    """Trains, validates and checkpoints into `folder`; returns the trained network, ready for whole volumes.

    Raises:
        InputError: on bad options, data or folders, before anything is written; if the loss stops being a
            number, with what is already on disk kept.
    """
    config = task.config
    mesh = device_mesh()
    info = DataInfo.of(task.dataset)
    open_run(folder, config, resume=resume, data=to_json(info))
    optimizer = make_optimizer(config.training)
    graphdef, state = init_state(make_model(config, info), optimizer)
    if config.init:
        _, initial = _load_state(Path(config.init))
        state = state._replace(params=initial.params, rest=initial.rest)
    state = jax.device_put(state, replicated(mesh))
    batches = train_batches(
        task.dataset,
        task.splits.train,
        patch=task.patch,
        batch_size=config.training.batch_size // jax.process_count(),
        seed=config.training.seed,
        shard=(jax.process_index(), jax.process_count()),
        foreground_crops=config.data.foreground_crops,
        random_annotators=config.data.annotators == "random",
        num_threads=config.data.loader_threads,
        prefetch=config.data.prefetch,
    )
    with claimed(folder), Checkpoints(folder / "checkpoints", config.training) as checkpoints:
        write_splits(folder / "splits.json", task.splits)
        if resume and checkpoints.latest_step is not None:
            state, data_state = checkpoints.restore(state)
            batches.set_state(data_state)
        try:
            state = _loop(task, folder, graphdef, state, batches, checkpoints)
        except NotFinite as found:
            checkpoints.wait()
            raise InputError(
                f"{found}: mend these cases and --resume, which goes on {checkpoints.resume_point()}; or start "
                "again with a lower --learning-rate or with --clip-norm."
            ) from found
    return volume_predictor(graphdef, state, task.patch)


def _loop(
    task: Task,
    folder: Path,
    graphdef: nnx.GraphDef,
    state: TrainState,
    batches: Any,
    checkpoints: Checkpoints,
) -> TrainState:
    training = task.config.training
    mesh = device_mesh()
    train_step = make_train_step(graphdef, make_optimizer(training), task.config, mesh)
    start = int(state.step)
    validate_every = training.validate_every or -(-training.steps // 4)
    checkpoint_every = training.checkpoint_every or validate_every
    bar = tqdm(range(start, training.steps), task.config.loss, training.steps, initial=start, unit="step")
    with RunLog(folder, start, training.batch_size) as log, stop_on_signal() as stop:
        for step in bar:
            asked = time.perf_counter()
            batch = next(batches)
            # The device may still be at steps before, so this is the most that this step can have waited.
            data_wait = time.perf_counter() - asked
            state, metrics = train_step(state, put_batch(batch, mesh))
            cases = [task.dataset.case_names[i] for i in batch["index"]]
            log.pend({"step": step, "data_wait": data_wait, **metrics}, cases)
            done, last = step + 1, step + 1 == training.steps
            # Looked at once: a signal that comes later in the step, as during a validation, is the next one's.
            stopping = stop.requested
            validation_due = bool(task.splits.val) and (done % validate_every == 0 or last)
            worth_keeping = validation_due and training.keep_best != "none"
            checkpoint_due = done % checkpoint_every == 0 or last or bool(stopping) or worth_keeping
            validated: dict[str, float] = {}
            if done % _FLUSH_EVERY == 0 or checkpoint_due:
                bar.set_postfix(loss=f"{log.flush():.4f}")
                checkpoints.check()
            # Before the checkpoint, so that a run resumed from it lacks no validation.
            if validation_due:
                result = evaluate(
                    "validation", volume_predictor(graphdef, state, task.patch), task.dataset, task.splits.val
                )
                validated = mean_metrics(result)
                log.validation(done, validated, result)
            if checkpoint_due:
                if not _all_finite(state.params):
                    raise NotFinite(f"The weights are not finite after step {step}", cases)
                checkpoints.save(state, batches.get_state(), validated)
            if stopping and not last:
                checkpoints.wait()
                raise Stopped(
                    f"Stopped after step {done} of {training.steps}; --resume goes on from there.",
                    128 + stopping,
                )
    return state


@jax.jit
def _all_finite(weights: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(weights)]).all()


def make_model(config: RunConfig, data: DataInfo) -> nnx.Module:
    """The network of a run, freshly initialised from its seed."""
    return make_network(
        config.model,
        config.data.patch,
        spatial_dims=data.spatial_dims,
        in_channels=data.num_channels,
        out_channels=len(data.class_names),
        rngs=nnx.Rngs(config.training.seed),
    )


def volume_predictor(graphdef: nnx.GraphDef, state: TrainState, patch: tuple[int, ...]) -> VolumePredictor:
    """Prediction of whole volumes under the weights of `state`.

    A volume is one device's work, so the copy of the weights on this process's first one is taken.
    """
    weights = jax.tree.map(lambda leaf: leaf.addressable_data(0), (state.params, state.rest))
    return VolumePredictor(Network(graphdef), weights, patch)


def mean_metrics(result: ModelResult) -> dict[str, float]:
    """Mean of each metric over cases and classes, undefined ones left out."""
    defined = {name: values[~np.isnan(values)] for name, values in result.metrics().items()}
    return {name: float(values.mean()) if values.size else float("nan") for name, values in defined.items()}


def load_run(folder: Path, which: Which = "last") -> tuple[RunConfig, DataInfo, VolumePredictor]:
    """A run's configuration, what it knows of its data, and prediction of volumes under its last or best weights.

    Raises:
        InputError: if the folder holds no run or no such checkpoint.
    """
    config, info = read_config(folder)
    graphdef, state = _load_state(folder, which)
    return config, info, volume_predictor(graphdef, state, config.data.patch)


def _load_state(folder: Path, which: Which = "last") -> tuple[nnx.GraphDef, TrainState]:
    """The network of the run in `folder` and its last or best checkpoint."""
    config, info = read_config(folder)
    graphdef, state = init_state(make_model(config, info), make_optimizer(config.training))
    if not (folder / "checkpoints").is_dir():
        raise InputError(f"{folder} holds no checkpoint: train it first, or --resume its training.")
    with Checkpoints(folder / "checkpoints", config.training, read_only=True) as checkpoints:
        state, _ = checkpoints.restore(state, which)
    return graphdef, state
