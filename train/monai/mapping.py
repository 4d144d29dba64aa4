"""Copies MONAI's weights into networks of this package, by MONAI's names of their parameters."""

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from train.models.configs import PATCH_SIZE
from train.models.segresnet import PreActivationBlock, SegResNet
from train.models.unet import ResidualUnit, UNet
from train.models.unetr import UNETR, ResidualBlock, TransformerBlock

Named = Iterator[tuple[str, tuple[nnx.Variable, tuple[int, ...]]]]

# MONAI stores these and does not use them: a counter; in UNETR, unused transformer layers and, in old versions, a
# class token and the layers of shortcuts that are plain additions.
_UNUSED = re.compile(
    r"\.num_batches_tracked$|\.(norm_cross_attn|cross_attn)\.|\bcls_token$|^(encoder|decoder)\d\..*\.(conv3|norm3)\."
)
# PyTorch's names of our layers' vectors.
_VECTORS = {
    "slope": "weight",
    "scale": "weight",
    "bias": "bias",
    "offset": "bias",
    "mean": "running_mean",
    "variance": "running_var",
}
_PERCEPTRON = "vit.patch_embedding.patch_embeddings.1."


def load_monai_weights(model: nnx.Module, state: Mapping[str, np.ndarray]) -> None:
    """Copies the parameters of a MONAI network of the same options into `model`.

    Args:
        model: a `UNet`, `SegResNet` or `UNETR`, which is changed in place.
        state: the `state_dict()` of MONAI's `UNet`, `SegResNet`, `SegResNetDS` or `UNETR`, its tensors as
            NumPy arrays.

    Raises:
        ValueError: names the first parameter that is missing, left over or of another shape.
    """
    state = _with_convolution(state)
    names = dict(monai_names(model))
    missing = [name for name in names if name not in state]
    left = [name for name in state if name not in names and not _UNUSED.search(name)]
    found = [f"{_first(x)} is {what}" for x, what in ((missing, "missing"), (left, "left over")) if x]
    if found:
        raise ValueError(f"The two networks differ: {' and '.join(found)}.")
    for name, (parameter, axes) in names.items():
        value = np.asarray(state[name])
        expected = tuple(parameter.shape[axes.index(i)] for i in range(len(axes))) or parameter.shape
        if value.shape != expected:
            raise ValueError(f"The two networks differ: {name} has shape {value.shape}, expected {expected}.")
        parameter[...] = jnp.asarray(value.transpose(axes) if axes else value, parameter.dtype)


def unused_names(model: nnx.Module, state: Mapping[str, np.ndarray]) -> list[str]:
    """Names that `load_monai_weights` ignores, without counters."""
    names = dict(monai_names(model))
    left = [name for name in _with_convolution(state) if name not in names and _UNUSED.search(name)]
    return [name for name in left if not name.endswith("num_batches_tracked")]


def _with_convolution(state: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Turns UNETR's patch embedding into a convolution if it is a linear layer over a patch's voxels."""
    weight, head = state.get(f"{_PERCEPTRON}weight"), state.get("out.conv.conv.weight")
    if weight is None or head is None:
        return state
    patch = (PATCH_SIZE,) * (head.ndim - 2)
    if weight.ndim != 2 or weight.shape[1] % prod(patch):
        return state
    kernel = np.moveaxis(weight.reshape(len(weight), *patch, -1), -1, 1)
    renamed = {name.replace(_PERCEPTRON, _PERCEPTRON[:-2]): array for name, array in state.items()}
    return renamed | {f"{_PERCEPTRON[:-2]}weight": kernel}


def _first(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def monai_names(model: nnx.Module) -> Named:
    """MONAI's name of each parameter, with the parameter and the order of axes that turns MONAI's array into it."""
    if isinstance(model, UNet):
        yield from _unet(model)
    elif isinstance(model, SegResNet):
        yield from _segresnet_ds(model) if model.config.deep_supervision else _segresnet(model)
    elif isinstance(model, UNETR):
        yield from _unetr(model)
    else:
        raise ValueError(f"MONAI has no network like {type(model).__name__}.")


# UNet: levels within levels.


def _unet(model: Any) -> Named:
    level = "model"
    for down, up in zip(model.down, model.up, strict=True):
        yield from _unet_block(f"{level}.0", down)
        for i, block in enumerate(up.layers):
            yield from _unet_block(f"{level}.2.{i}" if len(up.layers) > 1 else f"{level}.2", block)
        level += ".1.submodule"
    yield from _unet_block(level, model.bottom)


def _unet_block(prefix: str, block: Any) -> Named:
    if isinstance(block, ResidualUnit):
        for i, unit in enumerate(block.units):
            yield from _unet_block(f"{prefix}.conv.unit{i}", unit)
        yield from _layer(f"{prefix}.residual", block.residual)
    else:
        yield from _layer(f"{prefix}.conv", block.conv)
        yield from _layer(f"{prefix}.adn.A", block.act)
        yield from _layer(f"{prefix}.adn.N", block.norm)


# SegResNet: the same blocks under two sets of names.


def _segresnet(model: Any) -> Named:
    for i, (conv, blocks) in enumerate(zip(model.convs, model.down, strict=True)):
        yield from _layer(f"down_layers.{i}.0.conv" if i else "convInit.conv", conv)
        for j, block in enumerate(blocks.layers, 1):
            yield from _pre_activation(f"down_layers.{i}.{j}", block, ".conv")
    for i, (upsample, blocks) in enumerate(zip(model.upsample, model.up, strict=True)):
        yield from _layer(f"up_samples.{i}.0.conv", upsample.layers[0])
        for j, block in enumerate(blocks.layers):
            yield from _pre_activation(f"up_layers.{i}.{j}", block, ".conv")
    norm, _, conv = model.heads[0].layers
    yield from _layer("conv_final.0", norm)
    yield from _layer("conv_final.2.conv", conv)


def _segresnet_ds(model: Any) -> Named:
    for i, (conv, blocks) in enumerate(zip(model.convs, model.down, strict=True)):
        yield from _layer(f"encoder.layers.{i - 1}.downsample" if i else "encoder.conv_init", conv)
        for j, block in enumerate(blocks.layers):
            yield from _pre_activation(f"encoder.layers.{i}.blocks.{j}", block)
    for i, (upsample, blocks) in enumerate(zip(model.upsample, model.up, strict=True)):
        yield from _layer(f"up_layers.{i}.upsample.deconv", upsample)
        for j, block in enumerate(blocks.layers):
            yield from _pre_activation(f"up_layers.{i}.blocks.{j}", block)
    for i, head in enumerate(model.heads, len(model.up) - len(model.heads)):
        yield from _layer(f"up_layers.{i}.head", head)


def _pre_activation(prefix: str, block: PreActivationBlock, wrapper: str = "") -> Named:
    for i, (norm, conv) in enumerate(zip(block.norms, block.convs, strict=True), 1):
        yield from _layer(f"{prefix}.norm{i}", norm)
        yield from _layer(f"{prefix}.conv{i}{wrapper}", conv)


# UNETR.


def _unetr(model: UNETR) -> Named:
    yield from _layer("vit.patch_embedding.patch_embeddings", model.vit.embedding)
    yield "vit.patch_embedding.position_embeddings", (model.vit.positions, ())
    for i, block in enumerate(model.vit.blocks):
        yield from _transformer_block(f"vit.blocks.{i}", block)
    yield from _layer("vit.norm", model.vit.norm)
    yield from _residual_block("encoder1.layer", model.image_encoder)
    for i, encoder in enumerate(model.encoders, 2):
        yield from _layer(f"encoder{i}.transp_conv_init.conv", encoder.first)
        for j, (up, block) in enumerate(zip(encoder.ups, encoder.blocks, strict=True)):
            yield from _layer(f"encoder{i}.blocks.{j}.0.conv", up)
            yield from _residual_block(f"encoder{i}.blocks.{j}.1", block)
    for i, decoder in enumerate(model.decoders, 2):
        yield from _layer(f"decoder{i}.transp_conv.conv", decoder.up)
        yield from _residual_block(f"decoder{i}.conv_block", decoder.block)
    yield from _layer("out.conv.conv", model.head)


def _transformer_block(prefix: str, block: TransformerBlock) -> Named:
    yield from _layer(f"{prefix}.norm1", block.norm1)
    yield from _layer(f"{prefix}.attn.qkv", block.qkv)
    yield from _layer(f"{prefix}.attn.out_proj", block.out)
    yield from _layer(f"{prefix}.norm2", block.norm2)
    yield from _layer(f"{prefix}.mlp.linear1", block.linear1)
    yield from _layer(f"{prefix}.mlp.linear2", block.linear2)


def _residual_block(prefix: str, block: ResidualBlock) -> Named:
    for i, (conv, norm) in enumerate(zip(block.convs, block.norms, strict=True), 1):
        yield from _layer(f"{prefix}.conv{i}.conv", conv)
        yield from _layer(f"{prefix}.norm{i}", norm)


# Layers.


def _layer(prefix: str, layer: Any) -> Named:
    """The layer's own parameters; none if there is no layer."""
    if (kernel := getattr(layer, "kernel", None)) is not None:
        # PyTorch's kernels are [out, in, *kernel_size], those of transposed convolutions [in, out, *kernel_size].
        ends = (0, 1) if getattr(layer, "transposed", False) else (1, 0)
        yield f"{prefix}.weight", (kernel, (*range(2, kernel.ndim), *ends))
    for attribute, name in _VECTORS.items():
        if (parameter := getattr(layer, attribute, None)) is not None:
            yield f"{prefix}.{name}", (parameter, ())
