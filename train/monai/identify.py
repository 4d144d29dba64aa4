"""Which of MONAI's networks weights are of, and which of our options make it, as far as names and shapes tell."""

import re
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from train.config import ModelConfig

State = Mapping[str, np.ndarray]

# A parameter that each network has, and no other.
_MARKS = {
    "convInit.conv.weight": "segresnet",
    "encoder.conv_init.weight": "segresnet",
    "vit.patch_embedding.position_embeddings": "unetr",
    "model.0.conv.unit0.conv.weight": "unet",
    "model.0.conv.weight": "unet",
}


# A prefix of weights that were averaged over training, as `ema_model.module.`.
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|swa|avg|averaged?)(?:[._]|$)", re.IGNORECASE)
# The weights of the norms of each network that have any.
_NORM = {
    "unet": re.compile(r"adn\.N\.weight$"),
    "segresnet": re.compile(r"\.norm\d\.weight$"),
    "unetr": re.compile(r"^(?:en|de)coder.*\.norm\d\.weight$"),
}

_NORM_ADVICE = {
    "batch": "its norms have means and variances: give --norm batch",
    "instance": "its norms have no weights: give --norm instance",
    "affine-instance": "its norms have weights: give --norm affine-instance, or --norm group for group norm of 8 "
    "groups (the weights do not tell which)",
}


def find_network(state: State) -> tuple[str, str] | None:
    """Architecture and the prefix of its names, as `module.` in `module.model.0.conv.weight`; None if none is.

    Of a network and copies of it that were averaged over training it is the network.

    Raises:
        ValueError: if there are several networks, such as a student and a teacher.
    """
    found = _networks(state)
    plain = [network for network in found if not _AVERAGED.search(network[1])]
    if len(found) > 1 and len(plain) != 1:
        prefixes = ", ".join(prefix or "no prefix" for _, prefix in found)
        raise ValueError(f"there are several networks, under {prefixes}: keep one of them")
    return (plain or found)[0] if found else None


def averaged_copies(state: State) -> list[str]:
    """Prefixes of the averaged copies beside the network that `find_network` finds."""
    found = _networks(state)
    return [prefix for _, prefix in found if _AVERAGED.search(prefix)] if len(found) > 1 else []


def _networks(state: State) -> list[tuple[str, str]]:
    return [
        (architecture, name.removesuffix(mark))
        for mark, architecture in _MARKS.items()
        for name in state
        if name == mark or name.endswith(f".{mark}")
    ]


def fitting_options(architecture: str, state: State) -> str:
    """What the weights tell of the options, as a user would type them; strides and heads do not show in them."""
    described = _described(architecture, state)
    if (norms := _norms(architecture, state)) == ["batch"]:
        described = {"norm": norms[0], **described}
    return _typed({"architecture": architecture, **described})


def advice(model: ModelConfig, patch: tuple[int, ...], state: State) -> str:
    """What to do about weights of the architecture of `model` that do not fit its other options.

    Options which the weights show to be others than given, and what they show that no option makes.
    """
    architecture = model.architecture
    described = _described(architecture, state)
    default: dict[str, Any] = {
        "norm": "group" if architecture == "segresnet" else "instance",
        "blocks_up": (1,) * (len(model.blocks_down) - 1),
    }
    given = {name: getattr(model, name) or default.get(name) for name in (*described, "norm")}
    others = {name: value for name, value in described.items() if given[name] != value}
    if "deep_supervision" in others and not (model.deep_supervision and others["deep_supervision"]):
        others = described  # SegResNet and SegResNetDS are two networks
    norms = _norms(architecture, state)
    found = [f"its weights say {_typed(others)}"] if others else []
    if given["norm"] not in norms:
        found.append(_NORM_ADVICE[norms[0]])
    found += _other_sizes(model, patch, state) + _unsupported(architecture, len(patch), state)
    if not found:
        return "no option of this program makes such a network"
    return "; ".join(found)


def assumptions(model: ModelConfig) -> list[str]:
    """What weights that fit do not tell, and how it is taken."""
    regions = ", ".join(model.regions)
    outputs = (
        f"a sigmoid for each of {regions}, in this order (--regions)"
        if regions
        else "a softmax (--activation)"
    )
    norm = {
        "": "group norm of 8 groups" if model.architecture == "segresnet" else "instance norm, not none",
        "instance": "instance norm, not none",
        "affine-instance": "instance norm, not group norm",
        "group": "group norm of 8 groups, not instance norm",
        "batch": "batch norm",
    }[model.norm]
    layers = {
        "unet": [
            f"strides {' '.join(map(str, model.strides))} (--strides)",
            f"layers in the order norm, dropout, activation (adn_ordering='NDA'), with {norm}",
        ],
        "segresnet": [f"ReLU as activation function and {norm}"],
        "unetr": [f"{model.num_heads} heads of attention (--num-heads)", norm],
    }[model.architecture]
    return [*layers, f"{outputs} for the outputs"]


def channels_of(architecture: str, state: State) -> tuple[int | None, int | None]:
    """Channels that a network takes and gives; None where the weights that tell are missing."""
    # Names of first and last convolutions, with the axis of their channels.
    ends = {
        "unet": (
            [("model.0.conv.unit0.conv.weight", 1), ("model.0.conv.weight", 1)],
            [("model.2.1.conv.unit0.conv.weight", 0), ("model.2.conv.weight", 1)],
        ),
        "segresnet": (
            [("convInit.conv.weight", 1), ("encoder.conv_init.weight", 1)],
            [("conv_final.2.conv.weight", 0), *((f"up_layers.{i}.head.weight", 0) for i in range(9))],
        ),
        "unetr": ([("encoder1.layer.conv1.conv.weight", 1)], [("out.conv.conv.weight", 0)]),
    }[architecture]
    first, last = (
        next((state[name].shape[axis] for name, axis in names if name in state), None) for names in ends
    )
    return first, last


def _typed(options: Mapping[str, Any]) -> str:
    return " ".join(
        f"--{name.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in options.items()
    )


def _described(architecture: str, state: State) -> dict[str, Any]:
    return {"unet": _unet, "segresnet": _segresnet, "unetr": _unetr}[architecture](state)


def _norms(architecture: str, state: State) -> list[str]:
    """The values of --norm that have just these weights."""
    if any(name.endswith("running_mean") for name in state):
        return ["batch"]
    affine = any(_NORM[architecture].search(name) for name in state)
    return ["affine-instance", "group"] if affine else ["instance"]


def _other_sizes(model: ModelConfig, patch: tuple[int, ...], state: State) -> list[str]:
    """What the weights tell in part of strides (1 or more than 1), or of the patch (how many tokens)."""
    places = state.get("vit.patch_embedding.position_embeddings")
    if model.architecture == "unetr" and places is not None:
        count = places.shape[1]
        side = round(count ** (1 / len(patch)))
        such = f", such as {' '.join([str(16 * side)] * len(patch))}" if side ** len(patch) == count else ""
        same = count == prod(size // 16 for size in patch)
        return [] if same else [f"it was trained on a --patch of {count} blocks of 16 voxels a side{such}"]
    shortcuts = [
        state.get(f"model{'.1.submodule' * level}.0.residual.weight") for level in range(len(model.strides))
    ]
    return [
        f"its weights say --strides with {'1' if stride > 1 else 'more than 1'} at place {level}"
        for level, (shortcut, stride) in enumerate(zip(shortcuts, model.strides, strict=True), 1)
        if shortcut is not None and (set(shortcut.shape[2:]) == {1}) != (stride == 1)
    ]


def _unsupported(architecture: str, spatial_dims: int, state: State) -> list[str]:
    """What the weights show that this program's networks do not have."""
    kernels = {name: array.shape[2:] for name, array in state.items() if array.ndim > 3}
    dims = {len(window) for window in kernels.values()} - {spatial_dims}
    found = [f"it is for {dims.pop()}-D images, the data are {spatial_dims}-D"] if dims else []
    if not dims and (windows := sorted({k for k in kernels.values() if max(k) > 3 or len(set(k)) > 1})):
        window = "x".join(map(str, windows[-1]))
        if architecture != "unetr" or windows[-1] != (16,) * spatial_dims:
            found.append(f"its convolutions have windows of {window} voxels, and only 3 a side are supported")
    return found + {
        "unet": _unsupported_unet,
        "segresnet": _unsupported_segresnet,
        "unetr": _unsupported_unetr,
    }[architecture](state)


def _unsupported_unet(state: State) -> list[str]:
    slopes = [array.size for name, array in state.items() if name.endswith("adn.A.weight")]
    found = []
    if not slopes:
        found.append(
            "it has no PReLU but another activation function, which the weights do not name, and only PReLU is "
            "supported"
        )
    elif max(slopes) > 1:
        found.append("its PReLUs have a slope for each channel, and only one for all is supported")
    if not any(name.endswith("conv.bias") for name in state):
        found.append("its convolutions have no bias (bias=False), which is not supported")
    return found


def _unsupported_segresnet(state: State) -> list[str]:
    found = []
    if any(re.match(r"up_samples\.\d+\.1\.", name) for name in state):
        found.append("it upsamples with weights (upsample_mode), and only interpolation is supported")
    if "convInit.conv.weight" in state and "conv_final.2.conv.weight" not in state:
        found.append("it has no last convolution (use_conv_final=False), which is not supported")
    return found


def _unsupported_unetr(state: State) -> list[str]:
    found = []
    if "vit.blocks.0.attn.qkv.bias" in state:
        found.append("its attention has biases (qkv_bias=True), which is not supported")
    if (blocks := _count(r"vit\.blocks\.(\d+)\.", state)) != 12:
        found.append(f"it has {blocks} transformer blocks, and only 12 are supported")
    if "decoder5.conv_block.conv3.conv.weight" not in state:
        found.append("its blocks have no shortcut (res_block=False), which is not supported")
    return found


def _unet(state: State) -> dict[str, Any]:
    channels, level = [], "model"
    units = _count(r"model\.0\.conv\.unit(\d+)\.", state)
    conv = "conv.unit0.conv.weight" if units else "conv.weight"
    while (weight := state.get(f"{level}.0.{conv}")) is not None:
        channels.append(weight.shape[0])
        level += ".1.submodule"
    bottom = state.get(f"{level}.{conv}")
    sizes = [*channels, *([] if bottom is None else [bottom.shape[0]])]
    return {"channels": tuple(sizes), "num_res_units": units}


def _segresnet(state: State) -> dict[str, Any]:
    supervised = "encoder.conv_init.weight" in state
    first = state["encoder.conv_init.weight" if supervised else "convInit.conv.weight"]
    down = r"encoder\.layers\.{}\.blocks\.(\d+)\." if supervised else r"down_layers\.{}\.(\d+)\.norm1"
    up = r"up_layers\.{}\.blocks\.(\d+)\." if supervised else r"up_layers\.{}\.(\d+)\."
    levels = _count(r"encoder\.layers\.(\d+)\." if supervised else r"down_layers\.(\d+)\.", state)
    described: dict[str, Any] = {
        "init_filters": first.shape[0],
        "blocks_down": tuple(_count(down.format(i), state) for i in range(levels)),
        "blocks_up": tuple(_count(up.format(i), state) for i in range(levels - 1)),
    }
    return {**described, "deep_supervision": _count(r"up_layers\.(\d+)\.head\.weight", state)}


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
