"""What a run is made of: data, split, network and devices, opened from a configuration and checked."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from train.data import Dataset
from train.data.case import ids_of
from train.data.open import open_dataset, open_layout
from train.data.protocols import PROTOCOLS
from train.data.splits import Splits, chosen_splits, split_cases, write_splits
from train.data.volumes import replace_subjects
from train.errors import InputError
from train.losses import Loss, parse_loss
from train.models.registry import check_logits, make_network
from train.plugins import is_external
from train.processes import is_first
from train.run.cases import (
    Choice,
    cases_for,
    check_initial,
    choose_cases,
    note_duplicates,
    own_data,
    read_cases,
    resolved,
)
from train.sharding import check_split, device_mesh, parts_in_turn
from train.step import check_loss


@dataclass(frozen=True)
class Task:
    """What to train, on which data and devices.

    Attributes:
        config: with every open option resolved, the patch among them.
        dataset: that the configuration names.
        splits: the training, validation and test cases.
        devices: with the number of parts of a batch resolved.
        mesh: of the devices.
    """

    config: RunConfig
    dataset: Dataset
    splits: Splits
    devices: DeviceConfig
    mesh: Mesh


def open_task(config: RunConfig, devices: DeviceConfig = DeviceConfig()) -> Task:  # noqa: B008, it is frozen
    """Opens the data of a run, resolves its options and checks everything that can be checked before it starts."""
    dataset, splits = open_data(config.data)
    config = resolve_config(config, dataset)
    patch, divisors = config.data.patch, find_divisors(config, DataInfo.of(dataset))
    batch_size, mesh = config.training.batch_size, device_mesh(devices.mesh)
    devices = dataclasses.replace(devices, accumulate=parts_in_turn(devices.accumulate, batch_size, mesh))
    check_split(batch_size, patch, divisors[0], devices.accumulate, mesh)
    if config.init:
        check_initial(Path(config.init), read_cases(Path(config.init)), dataset, splits)
    note_duplicates(dataset, splits)
    task = Task(config, dataset, splits, devices, mesh)
    check_task_loss(task, parse_loss(config.loss))
    return task


def resolve_config(config: RunConfig, dataset: Dataset) -> RunConfig:
    """Resolves the options that a configuration leaves to the data set, and checks them beside it."""
    info = DataInfo.of(dataset)
    config = _with_initial_network(config, info) if config.init else config
    config = dataclasses.replace(config, model=resolve_regions(config.model, dataset))
    divisors = find_divisors(config, info)
    patch = resolve_patch(config.data.patch, dataset.largest_shape, divisors)
    # The run keeps its patches, so that prediction needs no data set to find them.
    data = dataclasses.replace(config.data, patch=patch, eval_patch=_eval_patch(config, patch, divisors))
    config = dataclasses.replace(config, data=data)
    _check_options(config, info)
    return config


def check_task_loss(task: Task, loss: Loss) -> None:
    """Raises `InputError` if a term of the loss cannot be computed for the task's images."""
    config, dataset = task.config, task.dataset
    regions = ids_of(dataset, config.model.regions)
    check_loss(
        dataclasses.replace(loss, regions=regions),
        task.mesh,
        (config.training.batch_size, *config.data.patch),
        channels=len(regions or dataset.class_names),
        soft_classes=len(dataset.class_names) if config.data.has_soft_labels else 0,
        has_ignore=dataset.has_ignore,
    )


def _check_options(config: RunConfig, info: DataInfo) -> None:
    """Raises `InputError` if options contradict the data or make no network that fits them."""
    if config.model.norm == "batch" and not config.init:
        raise InputError(
            "norm is batch, whose statistics come from imported weights: give --init, or another norm."
        )
    if config.augment.flip_prob and max(config.augment.flip_axes, default=0) >= info.spatial_dims:
        raise InputError(
            f"flip_axes is {config.augment.flip_axes}, but the images have the axes 0 to {info.spatial_dims - 1}."
        )
    if config.model.slices and info.spatial_dims != 3:
        raise InputError(f"slices needs 3-D images, those of {info.name} are 2-D: leave --slices out.")
    network = nnx.eval_shape(lambda: make_model(config, info))
    if is_external(config.model.architecture):
        patches = dict.fromkeys((config.data.patch, config.data.sliding_window))
        classes = len(config.model.regions or info.class_names)
        check_logits(config.model.architecture, network, list(patches), info.num_channels, classes)


def check_best_is_known(task: Task) -> None:
    """Raises `InputError` if the best checkpoint is to be kept, but there are no validation cases to find it.

    Recipes are not checked: they keep the best checkpoint where they can.
    """
    keep_best = task.config.training.keep_best
    if keep_best != "none" and not task.splits.val:
        raise InputError(
            f"keep_best is {keep_best}, but there are no validation cases: hold some back with --num-val, or leave "
            "--keep-best out."
        )


def _eval_patch(config: RunConfig, patch: tuple[int, ...], divisors: tuple[int, ...]) -> tuple[int, ...]:
    """The patch of evaluation; empty if it is the training patch."""
    eval_patch = config.data.eval_patch
    if not eval_patch or eval_patch == patch:
        return ()
    if config.model.network.fixed_patch:
        raise InputError(
            f"eval_patch is {eval_patch}, but {config.model.architecture} sees patches of one size only: leave it "
            "out."
        )
    return resolve_patch(eval_patch, patch, divisors, option="eval_patch")


def open_data(data: DataConfig) -> tuple[Dataset, Splits]:
    """Opens the data set that a configuration names, and splits its cases."""
    dataset = open_cases(data)
    return dataset, _splits(data, dataset)


def open_cases(data: DataConfig) -> Dataset:
    """Opens the data set that a configuration names."""
    return open_dataset(
        data.data,
        geometry=data.geometry,
        all_annotators=data.annotators != "first",
        cache_dir=data.cache_dir,
        channel_order=data.channel_order,
        intensities=data.intensities,
        label_values=data.label_values,
        subjects=data.subjects,
    )


def open_cases_of(
    run: Path, config: RunConfig, info: DataInfo, split: str, data: str | None = None
) -> tuple[Dataset, Choice]:
    """Opens the data set of a trained run, or another one, and chooses the cases of a split, see `choose_cases`.

    Args:
        run: folder of the run.
        config: of the run.
        info: of the data that the run was trained on.
        split: `train`, `val` or `test`.
        data: a data set; None for the run's own.

    Raises:
        InputError: the data set does not fit the run, or no case is left.
    """
    own = own_data(run, config.data.data)
    spec = data or own
    given = None if resolved(spec) == own else spec
    settings = dataclasses.replace(config.data, data=spec, spacing=info.geometry.spacing)
    if given and settings.subjects and not _finds_subjects(settings.subjects, given):
        settings = dataclasses.replace(settings, subjects="")
    dataset = open_cases(settings)
    check_same_data(spec, DataInfo.of(dataset), run, info)
    return dataset, choose_cases(run, read_cases(run), dataset, split, given=given)


def _finds_subjects(pattern: str, spec: str) -> bool:
    """Whether a run's expression tells the subjects of other data apart, whose names may differ."""
    try:
        replace_subjects(open_layout(spec), pattern)
    except InputError:
        return False
    return True


def _splits(data: DataConfig, dataset: Dataset) -> Splits:
    subject_of = dict(zip(dataset.case_names, dataset.subjects, strict=True))
    if data.splits:
        path = Path(data.splits).expanduser()
        return chosen_splits(path, subject_of, fold=data.fold, num_val=data.num_val, seed=data.split_seed)
    if data.fold is not None:
        raise InputError(f"fold is {data.fold}: give the file with the folds as --splits.")
    if data.protocol and (splits := _published_splits(data.protocol, dataset)):
        return splits
    # Cases that the data set holds out are never trained on.
    for name in dataset.held_out:
        subject_of.pop(name, None)
    return split_cases(subject_of, num_test=data.num_test, num_val=data.num_val, seed=data.split_seed)


def _published_splits(protocol: str, dataset: Dataset) -> Splits | None:
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol is {protocol!r}: give one of {', '.join(PROTOCOLS)}.")
    splits = PROTOCOLS[protocol].splits(dataset.case_names, dataset.held_out)
    if splits is None and is_first():
        print(
            f"note: {dataset.name} lacks the test cases of {protocol}, so they are drawn by num_test and num_val: "
            "the figures do not reproduce the published ones."
        )
    return splits


def _with_initial_network(config: RunConfig, info: DataInfo) -> RunConfig:
    """`config` with the network of the run that it starts from and, unless given, that run's patch."""
    run = Path(config.init)
    initial, trained = read_config(run)
    if config.model not in (ModelConfig(), initial.model):
        raise InputError(f"The network's options come from --init {run}: leave out those of this command.")
    check_same_data(config.data.data, info, run, trained)
    data = dataclasses.replace(config.data, patch=config.data.patch or initial.data.patch)
    return dataclasses.replace(config, model=initial.model, data=data)


def check_task(task: Task) -> None:
    """Reads what training reads late: validation and test cases whole, and the labels of training cases.

    Training images are read in the first epoch, or here if a `cache_dir` keeps them.

    Raises:
        InputError: lists the faults.
    """
    splits = task.splits
    cached = splits.train if task.config.data.cache_dir else ()
    check_cases(task.dataset, (*splits.val, *splits.test, *cached), labels=splits.train)


def write_split(task: Task, folder: Path) -> None:
    """Writes the split and the identity of the cases into a run's folder."""
    write_splits(folder / "splits.json", task.splits)
    cases_for(task.dataset, task.config.init).write(folder)


def make_model(config: RunConfig, data: DataInfo) -> nnx.Module:
    """The network of a run, initialised from its seed.

    Raises:
        InputError: its options contradict one another, as a softmax over one channel does.
    """
    outputs = config.model.regions if config.model.activation == "sigmoid" else data.class_names
    if config.model.activation == "softmax" and len(outputs) < 2:
        raise InputError("A network with one output channel has no softmax: give --activation sigmoid.")
    return make_network(
        config.model,
        patch=config.data.patch,
        spatial_dims=data.spatial_dims,
        in_channels=data.num_channels,
        out_channels=len(outputs),
        rngs=nnx.Rngs(config.training.seed),
    )


def find_divisors(config: RunConfig, data: DataInfo) -> tuple[int, ...]:
    """What each side of a patch must be a multiple of. A network from outside the project says so itself."""
    axes = data.spatial_dims - config.model.slices  # those that the network itself sees
    divisors = config.model.network.divisors(axes)
    if is_external(config.model.architecture):
        any_patch = config.data.patch or (128,) * data.spatial_dims
        tried = dataclasses.replace(config, data=dataclasses.replace(config.data, patch=any_patch))
        network: Any = nnx.eval_shape(lambda: make_model(tried, data))
        divisor = int(getattr(network.network if config.model.slices else network, "divisor", 1))
        divisors = (divisor,) * axes
    return (*divisors, 1) if config.model.slices else divisors
