"""Makes a run folder from the weights of a network that was trained with MONAI."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax import nnx

from train.config import (
    IMPORTED,
    DataConfig,
    DataInfo,
    ModelConfig,
    RunConfig,
    resolve_patch,
    resolve_regions,
    to_json,
)
from train.data.splits import write_splits
from train.errors import InputError
from train.monai.identify import (
    advice,
    assumptions,
    find_network,
    fitting_options,
    output_channels,
)
from train.monai.mapping import load_monai_weights, monai_names, unused_names
from train.monai.weights import read_weights
from train.plugins import is_external
from train.run.cases import RunCases, identify
from train.run.checkpoint import Checkpoints
from train.run.folder import open_run
from train.step import init_state, make_optimizer
from train.task import make_model, open_data


def import_monai(
    file: Path, model: ModelConfig, data: DataConfig, folder: Path, info: DataInfo | None = None
) -> list[str]:
    """Writes a run with the weights in `file`, for `evaluate`, `predict` and `fit --init`.

    Args:
        file: `.safetensors`, or `.pt`, `.pth`, `.ckpt` if PyTorch is installed; a state_dict() of MONAI's UNet,
            SegResNet, SegResNetDS or UNETR, alone or in a checkpoint, under any prefix.
        model: the options that the network was made with.
        data: its data set, split as `fit` splits it, and the patch that the network sees.
        folder: of the run, new or empty.
        info: what the network must know of its data if there is no data set, `data.data` being empty.

    Returns:
        Notes for the user, which are kept with the run: what the file holds besides the network, and what the
        weights do not tell.

    Raises:
        InputError: if file, options, data or folder do not fit. Nothing is written then.
    """
    if is_external(model.architecture):
        raise InputError(f"MONAI has no {model.architecture}: give --architecture unet, segresnet or unetr.")
    if model.slices:
        raise InputError("slices is for networks that are trained here: leave --slices out.")
    dataset = splits = None
    if info is None:
        dataset, splits = open_data(data)
        info = DataInfo.of(dataset)
        model = resolve_regions(model, dataset)
    elif not data.patch:
        raise InputError("Without --data nothing says how much the network sees at once: give its --patch.")
    largest = (1,) * info.spatial_dims if dataset is None else dataset.largest_shape
    patch = resolve_patch(data.patch, largest, model.network.divisors(info.spatial_dims))
    config = RunConfig(IMPORTED, dataclasses.replace(data, patch=patch), model)
    network = make_model(config, info)
    notes = load_weights(network, file, config, info)
    open_run(folder, config, resume=False, data=to_json(info), weights=str(file), notes=notes)
    if splits is not None:
        write_splits(folder / "splits.json", splits)
    RunCases(identify(dataset) if dataset else (), complete=False, trained=False).write(folder)
    _, state = init_state(network, make_optimizer(config.training))
    with Checkpoints(folder / "checkpoints", config.training) as checkpoints:
        checkpoints.save(state, {}, {})
    return notes


def load_weights(network: nnx.Module, file: Path, config: RunConfig, info: DataInfo) -> list[str]:
    """Copies the weights into `network`; returns the notes of `import_monai`."""
    model = config.model
    state = read_weights(file)
    try:
        found = find_network(state)
    except ValueError as error:
        raise InputError(f"{file} leaves open which weights to take: {error}.") from error
    if found is None:
        raise InputError(
            f"{file} holds no UNet, SegResNet, SegResNetDS or UNETR of MONAI: its first name is "
            f"{next(iter(state), 'nothing')}."
        )
    architecture, prefix, copies = found
    under = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
    if architecture != model.architecture:
        raise InputError(
            f"{file} holds a {architecture}, but the architecture is {model.architecture}: it looks like "
            f"{fitting_options(architecture, under)}."
        )
    _check_outputs(file, model, info, output_channels(under))
    modules = {name.partition(".")[0] for name, _ in monai_names(network)}
    weights = {name: array for name, array in under.items() if name.partition(".")[0] in modules}
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise InputError(
                f"{file} has {prefix}{name} with values that are not finite: the network is broken."
            )
    try:
        load_monai_weights(network, weights)
    except ValueError as error:
        outputs = f"{len(model.regions)} regions" if model.regions else f"{len(info.class_names)} classes"
        raise InputError(
            f"{file} does not fit these options, {info.num_channels} channels and {outputs}. "
            f"{str(error).rstrip('.')}; {advice(model, config.data.patch, under)}."
        ) from error
    held = [
        f"a copy of the network under {copy}, averaged over training, which is not taken" for copy in copies
    ]
    taken = {prefix + name for name in weights}
    if beside := [name for name in state if name not in taken and not name.startswith(tuple(copies))]:
        held.append(f"{_first(beside)} beside the network, not taken")
    if unused := unused_names(network, weights):
        held.append(f"{_first(unused)}, which MONAI's {architecture} does not use, not taken")
    return [
        *[f"{file} also holds {what}." for what in held],
        f"the weights do not tell everything; taken are: {'; '.join(assumptions(model))}. A network that was made "
        "otherwise gives other probabilities than here: compare those of one image with MONAI's.",
    ]


def _check_outputs(file: Path, model: ModelConfig, info: DataInfo, outputs: int | None) -> None:
    """Raises `InputError` if the outputs of the network in `file` cannot be the classes or regions."""
    regions, classes = model.regions, info.class_names
    if outputs == 1 and not regions:
        raise InputError(
            f"{file}: a network with one output channel has no softmax: give --activation sigmoid."
        )
    if regions and outputs not in (None, len(regions)):
        background = " (the background is not a region)" if outputs == len(regions) + 1 else ""
        raise InputError(
            f"{file} has {outputs} output channels, but there are {len(regions)} regions{background}: "
            f"{', '.join(regions)}. Name the region of each channel, or leave out --activation sigmoid."
        )
    if not regions and outputs == len(classes) - 1:
        raise InputError(
            f"{file} has {outputs} output channels, but there are {len(classes)} classes: {', '.join(classes)}. "
            "Without a background they are no softmax: give --activation sigmoid."
        )


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
