"""A run folder from the weights of a network that was trained with MONAI."""

import dataclasses
from pathlib import Path

from flax import nnx

from train.cases import RunCases, identify
from train.checkpoint import Checkpoints
from train.config import IMPORTED, DataConfig, DataInfo, ModelConfig, RunConfig, resolve_patch, to_json
from train.data import write_splits
from train.errors import InputError
from train.fit import make_model, open_data
from train.models import load_monai_weights
from train.models.identify import find_network, fitting_options
from train.runs import open_run
from train.step import init_state, make_optimizer
from train.weights import read_weights


def import_monai(
    file: Path, model: ModelConfig, data: DataConfig, folder: Path, info: DataInfo | None = None
) -> None:
    """Writes the run that `evaluate`, `predict` and `fit --init` take, with the weights in `file`.

    Args:
        file: `.safetensors`, or `.pt`, `.pth`, `.ckpt` where PyTorch is installed; a state_dict() of MONAI's
            UNet, SegResNet, SegResNetDS or UNETR, alone or in a checkpoint, under any prefix.
        model: the options that the network was made with.
        data: its data set, split as `fit` splits it, and the patch that it sees.
        folder: of the run, new or empty.
        info: what the network has to know of its data where there is no data set, `data.data` being empty.

    Raises:
        InputError: if file, options, data or folder do not fit; nothing has been written then.
    """
    if info is None:
        dataset, splits = open_data(data)
        info = DataInfo.of(dataset)
        patch = resolve_patch(data.patch, dataset.largest_shape, model.divisor)
    else:
        dataset = splits = None
        patch = resolve_patch(_given(data.patch), (1,) * info.spatial_dims, model.divisor)
    config = RunConfig(IMPORTED, dataclasses.replace(data, patch=patch), model)
    network = make_model(config, info)
    _load(network, file, model.architecture, info)
    open_run(folder, config, resume=False, data=to_json(info), weights=str(file))
    if dataset is not None and splits is not None:
        write_splits(folder / "splits.json", splits)
    RunCases(identify(dataset) if dataset else (), complete=False, trained=False).write(folder)
    _, state = init_state(network, make_optimizer(config.training))
    with Checkpoints(folder / "checkpoints", config.training) as checkpoints:
        checkpoints.save(state, {}, {})


def _given(patch: tuple[int, ...]) -> tuple[int, ...]:
    if not patch:
        raise InputError("Without --data nothing says how much the network sees at once: give its --patch.")
    return patch


def _load(network: nnx.Module, file: Path, architecture: str, info: DataInfo) -> None:
    state = read_weights(file)
    try:
        found = find_network(state)
    except ValueError as error:
        raise InputError(f"{file} leaves open which weights to take: {error}.") from error
    if found is None:
        first = next(iter(state), "nothing")
        raise InputError(
            f"{file} holds no UNet, SegResNet, SegResNetDS or UNETR of MONAI: its first name is {first}."
        )
    named, prefix = found
    bare = {name.removeprefix(prefix): array for name, array in state.items()}
    looks = f"it looks like {fitting_options(named, bare)}"
    if named != architecture:
        raise InputError(f"{file} holds a {named}, but the architecture is {architecture}: {looks}.")
    try:
        load_monai_weights(network, bare)
    except ValueError as error:
        raise InputError(
            f"{file} does not fit these options, {info.num_channels} channels and {len(info.class_names)} classes. "
            f"{str(error).rstrip('.')}; {looks}."
        ) from error
