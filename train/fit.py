"""Train one network with one loss: read `fit` from the top down."""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from calib_jax.report import ModelResult
from train.config import (
    DataInfo,
    to_json,
)
from train.data import (
    region_ids,
    train_batches,
)
from train.errors import InputError, NotFinite, Stopped
from train.evaluate import evaluate
from train.inference import VolumePredictor, volume_predictor
from train.processes import is_first, on_first
from train.progress import progress
from train.run.cases import as_kept
from train.run.checkpoint import Checkpoints
from train.run.folder import claimed, open_run, stop_on_signal
from train.run.load import load_state
from train.run.logs import RunLog
from train.sharding import (
    place_weights,
    process_share,
    put_batch,
)
from train.step import TrainState, init_state, make_optimizer, make_train_step
from train.task import Task, check_task, make_model, write_split

_FLUSH_EVERY = 20  # steps between reads of the metrics, so that the loop does not wait for each step


def fit(task: Task, folder: Path, *, resume: bool = False, check: bool = True) -> VolumePredictor:
    """Trains, validates and checkpoints into `folder`; returns the trained network, ready for whole volumes.

    Args:
        task: what is trained.
        folder: of the run, new or empty.
        resume: go on with the run in `folder`.
        check: call `check_task` before a new run.

    Raises:
        InputError: on bad options, data or folders, before anything is written; if the loss stops being a
            number, with what is already on disk kept.
    """
    config = task.config
    info = DataInfo.of(task.dataset)
    if resume:
        config = as_kept(config, folder, task.dataset, task.splits)
    before = partial(check_task, task) if check else lambda: None
    open_run(folder, config, resume=resume, check=before, data=to_json(info))
    config = task.config
    optimizer = make_optimizer(config.training)
    graphdef, state = init_state(make_model(config, info), optimizer)
    state = place_weights(state, task.mesh)
    if config.init:
        _, initial = load_state(Path(config.init), mesh=task.mesh)
        state = state._replace(params=initial.params, rest=initial.rest)
    share = process_share(task.mesh, jax.process_index())
    batches = train_batches(
        task.dataset,
        task.splits.train,
        patch=task.patch,
        batch_size=config.training.batch_size // share[1],
        seed=config.training.seed,
        shard=share,
        foreground_crops=config.data.foreground_crops,
        random_annotators=config.data.annotators == "random",
        num_threads=config.data.loader_threads,
        prefetch=config.data.prefetch,
    )
    with claimed(folder), Checkpoints(folder / "checkpoints", config.training) as checkpoints:
        on_first(lambda: write_split(task, folder))
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
    return volume_predictor(graphdef, state, config.data.sliding_window, config.model.regions)


def _loop(
    task: Task,
    folder: Path,
    graphdef: nnx.GraphDef,
    state: TrainState,
    batches: Any,
    checkpoints: Checkpoints,
) -> TrainState:
    training = task.config.training
    regions = task.config.model.regions
    ids = region_ids(task.dataset)
    train_step = make_train_step(
        graphdef,
        make_optimizer(training),
        task.config,
        task.mesh,
        regions=tuple(ids[name] for name in regions),
        accumulate=task.devices.accumulate,
        remat=task.devices.remat,
        has_ignore=task.dataset.has_ignore,
    )
    start = int(state.step)
    validate_every = training.validate_every or -(-training.steps // 4)
    checkpoint_every = training.checkpoint_every or validate_every
    bar = progress(
        range(start, training.steps),
        desc=task.config.loss,
        initial=start,
        unit="step",
        disable=not is_first(),
    )
    diverged = False
    with RunLog(folder, start, training.batch_size) as log, stop_on_signal() as stop:
        for step in bar:
            asked = time.perf_counter()
            batch = next(batches)
            # The device may still be at steps before, so this is the most that this step can have waited.
            data_wait = time.perf_counter() - asked
            state, metrics = train_step(state, put_batch(batch, task.mesh))
            cases = [task.dataset.case_names[i] for i in batch["index"]]
            log.pend({"step": step, "data_wait": data_wait, **metrics}, cases)
            done, last = step + 1, step + 1 == training.steps
            # Looked at once: a signal that comes later in the step, as during a validation, is the next one's.
            stopping = stop.after(done)
            validation_due = bool(task.splits.val) and (done % validate_every == 0 or last)
            worth_keeping = validation_due and training.keep_best != "none"
            checkpoint_due = done % checkpoint_every == 0 or last or bool(stopping) or worth_keeping
            validated: dict[str, float] = {}
            if done % _FLUSH_EVERY == 0 or checkpoint_due:
                bar.set_postfix(loss=f"{log.flush():.4f}")
                checkpoints.check()
                if not diverged and (sentence := log.divergence()):
                    diverged = True
                    print(f"\nnote: {sentence}", file=sys.stderr)
            # Before the checkpoint, so that a run resumed from it lacks no validation.
            if validation_due:
                result = evaluate(
                    "validation",
                    volume_predictor(graphdef, state, task.config.data.sliding_window, regions),
                    task.dataset,
                    task.splits.val,
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


def mean_metrics(result: ModelResult) -> dict[str, float]:
    """Mean of each metric over cases and classes, undefined ones left out."""
    defined = {name: values[~np.isnan(values)] for name, values in result.metrics().items()}
    return {name: float(values.mean()) if values.size else float("nan") for name, values in defined.items()}
