"""The network that a configuration names."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from train.config import ModelConfig
from train.errors import InputError
from train.models.blocks import Option
from train.models.segresnet import SegResNet
from train.models.unet import UNet
from train.models.unetr import UNETR

_NORMS: Mapping[str, Option] = {
    "instance": "instance",
    "affine-instance": ("instance", {"affine": True}),
    "group": ("group", {"num_groups": 8}),
    "batch": "batch",
}


def make_network(config: ModelConfig, patch: tuple[int, ...], **sizes: Any) -> nnx.Module:
    """The network of `config`, freshly initialised.

    Args:
        config: its options.
        patch: voxels along each axis that it will see.
        sizes: `in_channels`, `out_channels`, `spatial_dims` and `rngs`.

    Raises:
        InputError: if the options contradict one another.
    """
    if config.norm:
        sizes["norm"] = _NORMS[config.norm]
    try:
        return _MAKERS[config.architecture](config, patch, dropout=config.dropout, **sizes)
    except ValueError as error:
        raise InputError(f"These options make no {config.architecture}: {error}") from error


def _unet(config: ModelConfig, patch: tuple[int, ...], **sizes: Any) -> UNet:
    options = {"channels": config.channels, "strides": config.strides, "num_res_units": config.num_res_units}
    return UNet(**options, **sizes)


def _segresnet(config: ModelConfig, patch: tuple[int, ...], **sizes: Any) -> SegResNet:
    return SegResNet(
        init_filters=config.init_filters,
        blocks_down=config.blocks_down,
        blocks_up=config.blocks_up or None,
        deep_supervision=config.deep_supervision,
        **sizes,
    )


def _unetr(config: ModelConfig, patch: tuple[int, ...], *, spatial_dims: int, **sizes: Any) -> UNETR:
    return UNETR(
        image_size=patch,
        feature_size=config.feature_size,
        hidden_size=config.hidden_size,
        mlp_dim=config.mlp_dim,
        num_heads=config.num_heads,
        **sizes,
    )


_MAKERS = {"unet": _unet, "segresnet": _segresnet, "unetr": _unetr}
