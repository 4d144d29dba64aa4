"""Recognises MONAI's networks, and the options that make them here, by the names and shapes of their weights."""

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import numpy as np

from train.config import ModelConfig

State = Mapping[str, np.ndarray]

# A parameter that each network has, and no other network.
_MARKS = {
    "convInit.conv.weight": "segresnet",
    "encoder.conv_init.weight": "segresnet",
    "vit.patch_embedding.position_embeddings": "unetr",
    "model.0.conv.unit0.conv.weight": "unet",
    "model.0.conv.weight": "unet",
}
# A prefix of weights that were averaged over training, such as `ema_model.module.`.
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|swa|avg|averaged?)(?:[._]|$)", re.IGNORECASE)
# The weights of norms between convolutions.
_NORM_WEIGHT = re.compile(r"^(?!vit\.).*(?:adn\.N|\.norm\d)\.weight$")
# The last convolution.
_LAST = re.compile(
    r"(?:model\.2\.1\.conv\.unit0\.conv|conv_final\.2\.conv|up_layers\.\d+\.head|out\.conv\.conv)\.weight$"
)
_NORM_ADVICE = {
    "batch": "its norms have means and variances: give --norm batch",
    "instance": "its norms have no weights: give --norm instance",
    "affine-instance": "its norms have weights: give --norm affine-instance, or --norm group for group norm of 8 "
    "groups (the weights do not tell which)",
}


def find_network(state: State) -> tuple[str, str, list[str]] | None:
    """Architecture and prefix of the network in a file, such as `module.` of `module.model.0.conv.weight`.

    A network is preferred to copies of it that were averaged over training, whose prefixes come third. None if no
    network is found.

    Raises:
        ValueError: if there are several networks, such as a student and a teacher.
    """
    found = [
        (architecture, name.removesuffix(mark))
        for mark, architecture in _MARKS.items()
        for name in state
        if name == mark or name.endswith(f".{mark}")
    ]
    copies = [network for network in found if _AVERAGED.search(network[1])] if len(found) > 1 else []
    plain = [network for network in found if network not in copies]
    if found and len(plain) != 1:
        prefixes = ", ".join(prefix or "no prefix" for _, prefix in found)
        raise ValueError(f"there are several networks, under {prefixes}: keep one of them")
    return (*plain[0], [prefix for _, prefix in copies]) if found else None


def fitting_options(architecture: str, state: State) -> str:
    """The options that the weights imply, as a user types them. Weights do not show strides and attention heads."""
    norm = {"norm": "batch"} if _norms(state) == ["batch"] else {}
    return _typed({"architecture": architecture, **norm, **_implied(architecture, state)})


def advice(model: ModelConfig, patch: tuple[int, ...], state: State) -> str:
    """What to change if weights of the architecture of `model` do not fit its other options.

    Names the options that the weights contradict, and what no option of this program can make.
    """
    architecture, network = model.architecture, model.network
    implied = _implied(architecture, state)
    given = {name: getattr(network, name) for name in implied}
    if given.get("blocks_up") == ():
        given["blocks_up"] = (1,) * (len(given["blocks_down"]) - 1)
    others = {name: value for name, value in implied.items() if given[name] != value}
    if "deep_supervision" in others and not (given["deep_supervision"] and others["deep_supervision"]):
        others = implied  # SegResNet and SegResNetDS are two networks
    norms = _norms(state)
    found = [f"its weights say {_typed(others)}"] if others else []
    if (model.norm or network.default_norm) not in norms:
        found.append(_NORM_ADVICE[norms[0]])
    found += [*_other_sizes(model, patch, state), *_unsupported(architecture, len(patch), state)]
    return "; ".join(found) or "no option of this program makes such a network"


def assumptions(model: ModelConfig) -> list[str]:
    """What fitting weights do not tell, and the import takes for granted."""
    network: Any = model.network
    regions = ", ".join(model.regions)
    outputs = (
        f"a sigmoid for each of {regions}, in this order (--regions)"
        if regions
        else "a softmax (--activation)"
    )
    norm = {
        "instance": "instance norm, not none",
        "affine-instance": "instance norm, not group norm",
        "group": "group norm of 8 groups" + (", not instance norm" if model.norm else ""),
        "batch": "batch norm",
    }[model.norm or network.default_norm]
    if model.architecture == "unet":
        strides = " ".join(map(str, network.strides))
        order = "layers in the order norm, dropout, activation (adn_ordering='NDA')"
        layers = [f"strides {strides} (--strides)", f"{order}, with {norm}"]
    elif model.architecture == "segresnet":
        layers = [f"ReLU as activation function and {norm}"]
    else:
        layers = [f"{network.num_heads} heads of attention (--num-heads)", norm]
    return [*layers, f"{outputs} for the outputs"]


def output_channels(state: State) -> int | None:
    """Output channels of a network; None if the weights that tell are missing."""
    if (transposed := state.get("model.2.conv.weight")) is not None:  # of a U-Net without residual units
        return transposed.shape[1]
    return next((array.shape[0] for name, array in state.items() if _LAST.match(name)), None)


def _typed(options: Mapping[str, Any]) -> str:
    return " ".join(
        f"--{name.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in options.items()
    )


def _norms(state: State) -> list[str]:
    """The values of --norm that have these weights."""
    if any(name.endswith("running_mean") for name in state):
        return ["batch"]
    affine = any(map(_NORM_WEIGHT.search, state))
    return ["affine-instance", "group"] if affine else ["instance"]


def _implied(architecture: str, state: State) -> dict[str, Any]:
    """The network's own options, as far as the weights show them."""
    return {"unet": _unet, "segresnet": _segresnet, "unetr": _unetr}[architecture](state)


def _unet(state: State) -> dict[str, Any]:
    channels, level = [], "model"
    units = _count(r"model\.0\.conv\.unit(\d+)\.", state)
    conv = "conv.unit0.conv.weight" if units else "conv.weight"
    while (weight := state.get(f"{level}.0.{conv}")) is not None:
        channels.append(weight.shape[0])
        level += ".1.submodule"
    if (bottom := state.get(f"{level}.{conv}")) is not None:
        channels.append(bottom.shape[0])
    return {"channels": tuple(channels), "num_res_units": units}


def _segresnet(state: State) -> dict[str, Any]:
    supervised = "encoder.conv_init.weight" in state
    first = state["encoder.conv_init.weight" if supervised else "convInit.conv.weight"]
    down = r"encoder\.layers\.{}\.blocks\.(\d+)\." if supervised else r"down_layers\.{}\.(\d+)\.norm1"
    up = r"up_layers\.{}\.blocks\.(\d+)\." if supervised else r"up_layers\.{}\.(\d+)\."
    levels = _count(r"encoder\.layers\.(\d+)\." if supervised else r"down_layers\.(\d+)\.", state)
    return {
        "init_filters": first.shape[0],
        "blocks_down": tuple(_count(down.format(i), state) for i in range(levels)),
        "blocks_up": tuple(_count(up.format(i), state) for i in range(levels - 1)),
        "deep_supervision": _count(r"up_layers\.(\d+)\.head\.weight", state),
    }


def _unetr(state: State) -> dict[str, Any]:
    sizes = {
        "feature_size": ("encoder1.layer.conv1.conv.weight", 0),
        "hidden_size": ("vit.patch_embedding.position_embeddings", 2),
        "mlp_dim": ("vit.blocks.0.mlp.linear1.weight", 0),
    }
    return {option: state[name].shape[axis] for option, (name, axis) in sizes.items() if name in state}


def _count(pattern: str, state: State) -> int:
    """How many different numbers the pattern's group matches."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def _other_sizes(model: ModelConfig, patch: tuple[int, ...], state: State) -> Iterator[str]:
    """Contradictions that the weights show in part: strides of 1 or more than 1, and the number of tokens."""
    network: Any = model.network
    if model.architecture == "unet":
        for i, strides in enumerate(network.strides_of_axes(len(patch))):
            shortcut = state.get(f"model{'.1.submodule' * i}.0.residual.weight")
            if shortcut is not None and (set(shortcut.shape[2:]) == {1}) != (prod(strides) == 1):
                wanted = "1" if prod(strides) > 1 else "more than 1"
                yield f"its weights say --strides with {wanted} at level {i + 1}"
    positions = state.get("vit.patch_embedding.position_embeddings")
    if positions is not None and (count := positions.shape[1]) != prod(size // 16 for size in patch):
        side = round(count ** (1 / len(patch)))
        such = f", such as {' '.join([str(16 * side)] * len(patch))}" if side ** len(patch) == count else ""
        yield f"it was trained on a --patch of {count} blocks of 16 voxels a side{such}"


def _unsupported(architecture: str, spatial_dims: int, state: State) -> Iterator[str]:
    """Features of the trained network that this program's networks lack."""
    sizes = {array.shape[2:] for array in state.values() if array.ndim > 3}
    large = sorted(size for size in sizes if max(size) > 3 or len(set(size)) > 1)
    if dims := {len(size) for size in sizes} - {spatial_dims}:
        yield f"it is for {dims.pop()}-D images, the data are {spatial_dims}-D"
    elif large and (architecture != "unetr" or large[-1] != (16,) * spatial_dims):
        size = "x".join(map(str, large[-1]))
        yield f"its convolutions have kernels of {size} voxels, and only 3 a side are supported"
    if architecture == "unet":
        slopes = [array.size for name, array in state.items() if name.endswith("adn.A.weight")]
        if not slopes:
            yield (
                "it has no PReLU but another activation function, which the weights do not name, and only PReLU is "
                "supported"
            )
        if max(slopes, default=1) > 1:
            yield "its PReLUs have a slope for each channel, and only one for all is supported"
        if not any(name.endswith("conv.bias") for name in state):
            yield "its convolutions have no bias (bias=False), which is not supported"
    elif architecture == "segresnet":
        if _count(r"up_samples\.(\d+)\.1\.", state):
            yield "it upsamples with weights (upsample_mode), and only interpolation is supported"
        if "convInit.conv.weight" in state and "conv_final.2.conv.weight" not in state:
            yield "it has no last convolution (use_conv_final=False), which is not supported"
    else:
        if "vit.blocks.0.attn.qkv.bias" in state:
            yield "its attention has biases (qkv_bias=True), which is not supported"
        if (blocks := _count(r"vit\.blocks\.(\d+)\.", state)) != 12:
            yield f"it has {blocks} transformer blocks, and only 12 are supported"
        if "decoder5.conv_block.conv3.conv.weight" not in state:
            yield "its blocks have no shortcut (res_block=False), which is not supported"
