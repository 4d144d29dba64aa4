"""Train one network with one loss: read `fit` from the top down."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from calib_jax.results import ModelResult, nan_mean
from train.config import DataInfo, TrainingConfig, to_json
from train.data.case import ids_of
from train.data.pipeline import train_batches
from train.errors import InputError, NotFinite, Stopped
from train.evaluate import evaluate
from train.inference import VolumePredictor, volume_predictor
from train.processes import is_first, on_first
from train.progress import progress
from train.run.cases import as_kept
from train.run.checkpoint import Checkpoints
from train.run.folder import claimed, open_run, stop_on_signal
from train.run.load import load_network
from train.run.logs import RunLog
from train.sharding import place_weights, process_share, put_batch
from train.step import TrainState, TrainStep, init_state, make_optimizer, make_train_step
from train.task import Task, check_task, make_model, write_split

_LOG_EVERY = 20  # steps between reads of the metrics; the loop need not wait for the device in between


def fit(task: Task, folder: Path, *, resume: bool = False, check: bool = True) -> VolumePredictor:
    """Trains a network into `folder` and returns it, ready to predict whole volumes.

    Args:
        task: what to train.
        folder: a new or empty folder for the run.
        resume: continue the run in `folder`.
        check: call `check_task` before a new run.

    Raises:
        InputError: options, data or folder are wrong, in which case nothing is written; or the loss is no longer
            finite, in which case the files on disk are kept.
        Stopped: a signal asked the run to stop. The run has saved a checkpoint.
    """
    config, info = task.config, DataInfo.of(task.dataset)
    kept = as_kept(config, folder, task.dataset, task.splits) if resume else config
    before = partial(check_task, task) if check else lambda: None
    open_run(folder, kept, resume=resume, check=before, data=to_json(info))
    graphdef, state = initial_state(task, info)
    batches = _batches(task)
    with claimed(folder), Checkpoints(folder / "checkpoints", config.training) as checkpoints:
        on_first(lambda: write_split(task, folder))
        if resume and checkpoints.latest_step is not None:
            state, position = checkpoints.restore(state)
            batches.set_state(position)
        try:
            state = _train(task, folder, graphdef, state, batches, checkpoints)
        except NotFinite as found:
            checkpoints.wait()
            raise InputError(
                f"{found}: correct these cases and --resume, which goes on {checkpoints.resume_point()}; or start "
                "again with a lower --learning-rate or with --clip-norm."
            ) from found
    return _predictor(task, graphdef, state)


def initial_state(task: Task, info: DataInfo) -> tuple[nnx.GraphDef, TrainState]:
    """The network's static part and the state before the first step, on the task's mesh."""
    config = task.config
    graphdef, state = init_state(
        make_model(config, info), make_optimizer(config.training), ema=config.training.ema
    )
    state = place_weights(state, task.mesh)
    if config.init:
        _, initial = load_network(Path(config.init), mesh=task.mesh)
        average = None if state.average is None else jax.tree.map(jnp.copy, initial.evaluated)
        state = state._replace(params=initial.evaluated, rest=initial.rest, average=average)
    return graphdef, state


def _batches(task: Task) -> Any:
    """The endless iterator over this process's share of the training batches."""
    data, training = task.config.data, task.config.training
    share = process_share(task.mesh, jax.process_index())
    return train_batches(
        task.dataset,
        task.splits.train,
        patch=data.patch,
        batch_size=training.batch_size // share[1],
        seed=training.seed,
        shard=share,
        foreground_crops=data.foreground_crops,
        random_annotators=data.annotators == "random",
        majority=data.annotators == "majority",
        num_threads=data.loader_threads,
        prefetch=data.prefetch,
    )


def _train(
    task: Task,
    folder: Path,
    graphdef: nnx.GraphDef,
    state: TrainState,
    batches: Any,
    checkpoints: Checkpoints,
) -> TrainState:
    """Takes the steps that are left, with logs, validations and checkpoints in between."""
    training, start = task.config.training, int(state.step)
    train_step = _train_step(task, graphdef)
    steps = range(start, training.steps)
    bar = progress(steps, desc=task.config.loss, initial=start, unit="step", disable=not is_first())
    with RunLog(folder, start, training.batch_size) as log, stop_on_signal() as stop:
        for step in bar:
            asked = time.perf_counter()
            batch = next(batches)
            # An upper bound: the device may still compute earlier steps meanwhile.
            data_wait = time.perf_counter() - asked
            state, metrics = train_step(state, put_batch(batch, task.mesh))
            cases = [task.dataset.case_names[i] for i in batch["index"]]
            log.add_step({"step": step, "data_wait": data_wait, **metrics}, cases)
            done = step + 1
            # Read the stop signal once per step; a later one is handled in the next step.
            signal = stop.after(done)
            due = what_is_due(training, done, can_validate=bool(task.splits.val), stopping=signal is not None)
            if due.log:
                bar.set_postfix(loss=f"{log.flush():.4f}")
                checkpoints.check()
                log.note_divergence()
            # The validation precedes the checkpoint, so that a run resumed from there lacks no validation.
            validated = (
                _validate(_predictor(task, graphdef, state), task, done, log) if due.validation else {}
            )
            if due.checkpoint:
                if not _all_finite(state.params):
                    raise NotFinite(f"The weights are not finite after step {step}", cases)
                checkpoints.save(state, batches.get_state(), validated)
            if signal is not None and done < training.steps:
                checkpoints.wait()
                raise Stopped(
                    f"Stopped after step {done} of {training.steps}; --resume goes on from there.",
                    128 + signal,
                )
    return state


def _train_step(task: Task, graphdef: nnx.GraphDef) -> TrainStep:
    return make_train_step(
        graphdef,
        make_optimizer(task.config.training),
        task.config,
        task.mesh,
        regions=ids_of(task.dataset, task.config.model.regions),
        accumulate=task.devices.accumulate,
        remat=task.devices.remat,
        has_ignore=task.dataset.has_ignore,
    )


@dataclass(frozen=True)
class Due:
    """What follows a training step."""

    log: bool
    validation: bool
    checkpoint: bool


def what_is_due(training: TrainingConfig, done: int, *, can_validate: bool, stopping: bool = False) -> Due:
    """Decides what follows after `done` steps.

    Args:
        training: intervals, and whether the best checkpoint is kept.
        done: steps done.
        can_validate: whether there are validation cases.
        stopping: whether the run stops after this step.

    Example:
        >>> what_is_due(TrainingConfig(steps=8), 2, can_validate=True)
        Due(log=True, validation=True, checkpoint=True)
    """
    validate_every = training.validate_every or -(-training.steps // 4)
    checkpoint_every = training.checkpoint_every or validate_every
    last = done == training.steps
    validation = can_validate and (last or done % validate_every == 0)
    checkpoint = (
        last or stopping or done % checkpoint_every == 0 or (validation and training.keep_best != "none")
    )
    return Due(checkpoint or done % _LOG_EVERY == 0, validation, checkpoint)


def _validate(predict: VolumePredictor, task: Task, done: int, log: RunLog) -> dict[str, float]:
    """Evaluates and logs the validation cases; returns the mean of each metric."""
    result = evaluate("validation", predict, task.dataset, task.splits.val)
    means = mean_metrics(result)
    log.validation(done, means, result)
    return means


def _predictor(task: Task, graphdef: nnx.GraphDef, state: TrainState) -> VolumePredictor:
    return volume_predictor(graphdef, state, task.config.data.sliding_window, task.config.model.regions)


@jax.jit
def _all_finite(weights: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(weights)]).all()


def mean_metrics(result: ModelResult) -> dict[str, float]:
    """Mean of each metric over cases and classes, without undefined values."""
    # Not the mean of zeros in place of NaN, which rounds otherwise.
    return {name: float(nan_mean(values[~np.isnan(values)])) for name, values in result.metrics().items()}
