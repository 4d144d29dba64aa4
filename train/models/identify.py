"""Which of MONAI's networks weights are of, and which of our options make it, as far as names and shapes tell."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

State = Mapping[str, np.ndarray]

# A parameter that each network has, and no other.
_MARKS = {
    "convInit.conv.weight": "segresnet",
    "encoder.conv_init.weight": "segresnet",
    "vit.patch_embedding.position_embeddings": "unetr",
    "model.0.conv.unit0.conv.weight": "unet",
    "model.0.conv.weight": "unet",
}


def find_network(state: State) -> tuple[str, str] | None:
    """Architecture and the prefix of its names, as `module.` in `module.model.0.conv.weight`; None if none is.

    Raises:
        ValueError: if there are several networks, such as a student and a teacher.
    """
    found = [
        (architecture, name.removesuffix(mark))
        for mark, architecture in _MARKS.items()
        for name in state
        if name == mark or name.endswith(f".{mark}")
    ]
    if len(found) > 1:
        prefixes = ", ".join(prefix or "no prefix" for _, prefix in found)
        raise ValueError(f"there are several networks, under {prefixes}: keep one of them")
    return found[0] if found else None


def fitting_options(architecture: str, state: State) -> str:
    """What the weights tell of the options, as a user would type them; strides and heads do not show in them."""
    described = {"unet": _unet, "segresnet": _segresnet, "unetr": _unetr}[architecture](state)
    if any(name.endswith("running_mean") for name in state):
        described = {"norm": "batch", **described}
    words = [
        f"--{name.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in {"architecture": architecture, **described}.items()
    ]
    return " ".join(words)


def _unet(state: State) -> dict[str, Any]:
    channels, level = [], "model"
    units = _count(r"model\.0\.conv\.unit(\d+)\.", state)
    conv = "conv.unit0.conv.weight" if units else "conv.weight"
    while (weight := state.get(f"{level}.0.{conv}")) is not None:
        channels.append(weight.shape[0])
        level += ".1.submodule"
    bottom = state.get(f"{level}.{conv}")
    return {"channels": channels + ([] if bottom is None else [bottom.shape[0]]), "num_res_units": units}


def _segresnet(state: State) -> dict[str, Any]:
    supervised = "encoder.conv_init.weight" in state
    first = state["encoder.conv_init.weight" if supervised else "convInit.conv.weight"]
    down = r"encoder\.layers\.{}\.blocks\.(\d+)\." if supervised else r"down_layers\.{}\.(\d+)\.norm1"
    up = r"up_layers\.{}\.blocks\.(\d+)\." if supervised else r"up_layers\.{}\.(\d+)\."
    levels = _count(r"encoder\.layers\.(\d+)\." if supervised else r"down_layers\.(\d+)\.", state)
    described: dict[str, Any] = {
        "init_filters": first.shape[0],
        "blocks_down": [_count(down.format(i), state) for i in range(levels)],
        "blocks_up": [_count(up.format(i), state) for i in range(levels - 1)],
    }
    heads = _count(r"up_layers\.(\d+)\.head\.weight", state)
    return {**described, "deep_supervision": heads} if supervised else described


def _unetr(state: State) -> dict[str, Any]:
    sizes = {
        "feature_size": ("encoder1.layer.conv1.conv.weight", 0),
        "hidden_size": ("vit.patch_embedding.position_embeddings", 2),
        "mlp_dim": ("vit.blocks.0.mlp.linear1.weight", 0),
    }
    return {option: state[name].shape[axis] for option, (name, axis) in sizes.items() if name in state}


def _count(pattern: str, state: State) -> int:
    """How many different numbers stand where the pattern has its group."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})
