"""What a run is made of: its data, split, network and devices, opened from a configuration and checked."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from flax import nnx
from jax.sharding import Mesh

from train.check import check_cases
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
)
from train.data import (
    PROTOCOLS,
    Dataset,
    Splits,
    chosen_splits,
    open_dataset,
    region_ids,
    split_cases,
    write_splits,
)
from train.errors import InputError
from train.losses import Loss, parse_loss
from train.models import make_network
from train.processes import is_first
from train.run.cases import cases_for, check_initial, note_duplicates, read_cases
from train.sharding import (
    check_split,
    device_mesh,
    parts_in_turn,
)
from train.step import check_loss


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
    task = Task(config, dataset, splits, patch, devices, mesh)
    check_task_loss(task, parse_loss(config.loss))
    return task


def check_task_loss(task: Task, loss: Loss) -> None:
    """Raises `InputError` if a term of the loss cannot be computed for the task's images."""
    config, dataset = task.config, task.dataset
    ids = region_ids(dataset)
    regions = tuple(ids[name] for name in config.model.regions)
    check_loss(
        dataclasses.replace(loss, regions=regions),
        task.mesh,
        (config.training.batch_size, *task.patch),
        channels=len(regions or dataset.class_names),
        soft_classes=0 if config.data.annotators == "first" else len(dataset.class_names),
        has_ignore=dataset.has_ignore,
    )


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


def write_split(task: Task, folder: Path) -> None:
    """Keeps with a run who trains, validates and tests, and what the cases are."""
    write_splits(folder / "splits.json", task.splits)
    initial = Path(task.config.init) if task.config.init else None
    cases_for(task.dataset, initial and (initial, read_cases(initial))).write(folder)


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
