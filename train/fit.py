"""Train one network with one loss: read `fit` from the top down."""

import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from calib_jax.report import ModelResult
from train.cases import as_kept, cases_for, check_initial, note_duplicates, read_cases
from train.check import check_cases
from train.checkpoint import Checkpoints, Which
from train.config import (
    DataConfig,
    DataInfo,
    DeviceConfig,
    ModelConfig,
    RunConfig,
    check_same_data,
    read_config,
    resolve_patch,
    resolve_regions,
    to_json,
)
from train.data import (
    PROTOCOLS,
    Dataset,
    Splits,
    chosen_splits,
    open_dataset,
    region_ids,
    split_cases,
    train_batches,
    write_splits,
)
from train.errors import InputError, NotFinite, Stopped
from train.evaluate import evaluate
from train.inference import Network, VolumePredictor
from train.logs import RunLog
from train.losses import check_splittable, parse_loss
from train.models import make_network
from train.processes import is_first, on_first
from train.progress import progress
from train.runs import claimed, open_run, stop_on_signal
from train.sharding import (
    check_split,
    device_mesh,
    on_first_device,
    parts_in_turn,
    place_weights,
    process_share,
    put_batch,
)
from train.step import TrainState, init_state, make_optimizer, make_train_step

_VOXELS_AT_ONCE = 4 * 128**3  # of windows, in evaluation
_FLUSH_EVERY = 20  # steps between reads of the metrics, so that the loop does not wait for each step


@dataclass(frozen=True)
class Task:
    """A configuration with what it refers to: the data set, the split, the patch and the devices."""

    config: RunConfig
    dataset: Dataset
    splits: Splits
    patch: tuple[int, ...]
    devices: DeviceConfig  # as it came out: so many parts of a batch
    mesh: Mesh


def open_task(config: RunConfig, devices: DeviceConfig = DeviceConfig()) -> Task:  # noqa: B008, it is frozen
    """Opens the data of a run and checks everything that can be checked before it starts."""
    dataset, splits = open_data(config.data)
    info = DataInfo.of(dataset)
    config = _as_initial(config, info) if config.init else config
    config = dataclasses.replace(config, model=resolve_regions(config.model, dataset))
    data = config.data
    patch = resolve_patch(data.patch, dataset.largest_shape, config.model.divisor)
    mesh = device_mesh(devices.mesh)
    divisor = config.model.divisor
    batch_size = config.training.batch_size
    devices = dataclasses.replace(devices, accumulate=parts_in_turn(devices.accumulate, batch_size, mesh))
    check_split(batch_size, patch, divisor, devices.accumulate, mesh)
    check_splittable(parse_loss(config.loss), mesh)
    # The patches are kept with the run, so that predicting needs no data set to find them.
    eval_patch = _eval_patch(config, patch)
    config = dataclasses.replace(config, data=dataclasses.replace(data, patch=patch, eval_patch=eval_patch))
    if config.model.norm == "batch" and not config.init:
        raise InputError(
            "norm is batch, whose statistics come from imported weights: give --init, or another norm."
        )
    if config.augment.flip_prob and max(config.augment.flip_axes, default=0) >= info.spatial_dims:
        raise InputError(
            f"flip_axes is {config.augment.flip_axes}, but the images have the axes 0 to {info.spatial_dims - 1}."
        )
    nnx.eval_shape(lambda: make_model(config, info))
    if config.init:
        check_initial(Path(config.init), read_cases(Path(config.init)), dataset, splits)
    note_duplicates(dataset, splits)
    return Task(config, dataset, splits, patch, devices, mesh)


def check_best_is_known(task: Task) -> None:
    """Raises `InputError` where the best checkpoint is to be kept and no validation case says which that is.

    Recipes keep it where they can.
    """
    keep_best = task.config.training.keep_best
    if keep_best != "none" and not task.splits.val:
        raise InputError(
            f"keep_best is {keep_best}, but there are no validation cases: hold some back with --num-val, or leave "
            "--keep-best out."
        )


def _eval_patch(config: RunConfig, patch: tuple[int, ...]) -> tuple[int, ...]:
    """What the network sees at once in evaluation; empty for the training patch."""
    eval_patch = config.data.eval_patch
    if not eval_patch or eval_patch == patch:
        return ()
    if config.model.architecture == "unetr":
        raise InputError(
            f"eval_patch is {eval_patch}, but unetr sees patches of one size only: leave it out."
        )
    return resolve_patch(eval_patch, patch, config.model.divisor, option="eval_patch")


def open_data(data: DataConfig) -> tuple[Dataset, Splits]:
    """The data set that a configuration names, and who trains, validates and tests."""
    dataset = open_cases(data)
    return dataset, _splits(data, dataset)


def open_cases(data: DataConfig) -> Dataset:
    """The data set that a configuration names."""
    return open_dataset(
        data.data,
        geometry=data.geometry,
        all_annotators=data.annotators != "first",
        cache_dir=data.cache_dir,
        channel_order=data.channel_order,
        intensities=data.intensities,
    )


def _splits(data: DataConfig, dataset: Dataset) -> Splits:
    names, who = dataset.case_names, dataset.subjects
    if data.splits:
        file = Path(data.splits).expanduser()
        return chosen_splits(
            file, names, fold=data.fold, num_val=data.num_val, seed=data.split_seed, subjects=who
        )
    if data.fold is not None:
        raise InputError(f"fold is {data.fold}: give the file with the folds as --splits.")
    if data.protocol and (splits := _published_splits(data.protocol, dataset)):
        return splits
    # What the data set sets apart itself is nobody's to train on.
    whose = {name: subject for name, subject in zip(names, who, strict=True) if name not in dataset.held_out}
    return split_cases(
        list(whose),
        num_test=data.num_test,
        num_val=data.num_val,
        seed=data.split_seed,
        subjects=list(whose.values()),
    )


def _published_splits(protocol: str, dataset: Dataset) -> Splits | None:
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol is {protocol!r}: give one of {', '.join(PROTOCOLS)}.")
    splits = PROTOCOLS[protocol].splits(dataset.case_names, dataset.held_out)
    if splits is None and is_first():
        print(
            f"note: {dataset.name} lacks the test cases of {protocol}; they are drawn by num_test and num_val, so "
            "that the figures are no reproduction of the published ones."
        )
    return splits


def _as_initial(config: RunConfig, info: DataInfo) -> RunConfig:
    """`config` with the network, and where it leaves it open the patch, of the run that it starts from."""
    run = Path(config.init)
    initial, trained = read_config(run)
    if config.model not in (ModelConfig(), initial.model):
        raise InputError(f"The network's options come from --init {run}: leave out those of this command.")
    check_same_data(config.data.data, info, run, trained)
    data = dataclasses.replace(config.data, patch=config.data.patch or initial.data.patch)
    return dataclasses.replace(config, model=initial.model, data=data)


def check_task(task: Task) -> None:
    """Reads what a run depends on late: validation and test cases whole, and the labels of training cases.

    Training images are read in the first epoch. With a `cache_dir`, which keeps them for it, they are read here.

    Raises:
        InputError: lists the faults that were found.
    """
    splits = task.splits
    cached = splits.train if task.config.data.cache_dir else ()
    check_cases(task.dataset, (*splits.val, *splits.test, *cached), labels=splits.train)


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
        _, initial = _load_state(Path(config.init), mesh=task.mesh)
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
    return volume_predictor(graphdef, state, config.data.window, config.model.regions)


def write_split(task: Task, folder: Path) -> None:
    """Keeps with a run who trains, validates and tests, and what the cases are."""
    write_splits(folder / "splits.json", task.splits)
    initial = Path(task.config.init) if task.config.init else None
    cases_for(task.dataset, initial and (initial, read_cases(initial))).write(folder)


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
                    volume_predictor(graphdef, state, task.config.data.window, regions),
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


def make_model(config: RunConfig, data: DataInfo) -> nnx.Module:
    """The network of a run, freshly initialised from its seed.

    Raises:
        InputError: if its options contradict one another, as a softmax over one channel does.
    """
    outputs = config.model.regions if config.model.activation == "sigmoid" else data.class_names
    if config.model.activation == "softmax" and len(outputs) < 2:
        raise InputError("A network with one output channel has no softmax: give --activation sigmoid.")
    return make_network(
        config.model,
        config.data.patch,
        spatial_dims=data.spatial_dims,
        in_channels=data.num_channels,
        out_channels=len(outputs),
        rngs=nnx.Rngs(config.training.seed),
    )


def volume_predictor(
    graphdef: nnx.GraphDef, state: TrainState, window: tuple[int, ...], regions: tuple[str, ...] = ()
) -> VolumePredictor:
    """Prediction of whole volumes under the weights of `state`, through windows of so many voxels.

    With `regions` its probabilities are sigmoids, else a softmax.
    A volume is one device's work, so a copy of the weights on this process's first one is taken.
    """
    return VolumePredictor(
        Network(graphdef, regions),
        on_first_device((state.params, state.rest)),
        window,
        windows_per_batch=max(min(_VOXELS_AT_ONCE // math.prod(window), 4), 1),
    )


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
    return config, info, volume_predictor(graphdef, state, config.data.window, config.model.regions)


def _load_state(
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
