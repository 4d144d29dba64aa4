"""UNETR, a U-Net whose encoder is a vision transformer: MONAI's `UNETR`, channel last, in Flax NNX."""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from train.models.blocks import Convolution, PatchConvolution, check_image, make_dropout, make_norm
from train.models.configs import PATCH_SIZE, UNETRConfig
from train.models.remat import recomputable

NUM_LAYERS = 12
SKIPS = (3, 6, 9)
"""Transformer blocks whose tokens go to the decoder, counted from 0 as in MONAI; the paper counts from 1."""


class UNETR(nnx.Module):
    """Transformer encoder with a convolutional decoder, equal to `monai.networks.nets.UNETR`.

    Hatamizadeh et al., "UNETR: Transformers for 3D Medical Image Segmentation", arXiv 2103.10504.
    Every patch of 16 voxels a side has a learnt position, so the network takes images of `image_size` only.

    Args:
        config: its options.
        in_channels: channels of the image.
        out_channels: classes.
        image_size: voxels along each axis, 2 or 3 multiples of 16.
        norm: normalisation between convolutions, as in `UNet`.
        dropout: dropout rate, after the tokens' embedding, attention and perceptrons.
        rngs: seeds of the parameters and, where `dropout` is positive, of dropout.

    Raises:
        ValueError: if the norm is unknown, or its groups do not divide the channels.

    Example:
        >>> config = UNETRConfig(feature_size=2, hidden_size=8, mlp_dim=8, num_heads=2)
        >>> model = UNETR(config, in_channels=1, out_channels=3, image_size=(16, 32), rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((1, 16, 32, 1))).shape
        (1, 16, 32, 3)
    """

    def __init__(
        self,
        config: UNETRConfig,
        *,
        in_channels: int,
        out_channels: int,
        image_size: tuple[int, ...],
        norm: str = "instance",
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.in_channels, self.image_size = in_channels, image_size
        spatial_dims, hidden_size, feature_size = len(image_size), config.hidden_size, config.feature_size
        options = (spatial_dims, norm, rngs)
        self.vit = VisionTransformer(config, in_channels, image_size, dropout, rngs)
        finer = [feature_size * 2**i for i in range(4)]
        self.image_encoder = ResidualBlock(in_channels, feature_size, *options)
        self.encoders = nnx.List([TokenEncoder(hidden_size, finer[i], 3 - i, *options) for i in (1, 2, 3)])
        coarser = (*finer[1:], hidden_size)
        self.decoders = nnx.List([Decoder(*sizes, *options) for sizes in zip(coarser, finer, strict=True)])
        self.head = Convolution(feature_size, out_channels, (1,) * spatial_dims, 1, bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "batch *spatial in"]) -> Float[Array, "batch *spatial out"]:
        """Logits of each class at each voxel.

        Raises:
            ValueError: if `x` has another rank, size or number of channels than the model.
        """
        check_image(x.shape, len(self.image_size), self.in_channels, (PATCH_SIZE,) * len(self.image_size))
        if x.shape[1:-1] != self.image_size:
            raise ValueError(
                f"The image has shape {x.shape}; this network was made for {self.image_size} voxels and takes no "
                "others: crop or pad the image, or use a sliding window of this size."
            )
        *hidden, y = self.vit(x)
        skips = [self.image_encoder(x), *(encode(h) for encode, h in zip(self.encoders, hidden, strict=True))]
        for decode, skip in zip(reversed(self.decoders), reversed(skips), strict=True):
            y = decode(y, skip)
        return self.head(y)


class VisionTransformer(nnx.Module):
    """The encoder: tokens after each of the blocks `SKIPS` and after the last block, as images of tokens."""

    def __init__(
        self,
        config: UNETRConfig,
        in_channels: int,
        image_size: tuple[int, ...],
        dropout: float,
        rngs: nnx.Rngs,
    ):
        hidden_size = config.hidden_size
        patch = (PATCH_SIZE,) * len(image_size)
        self.embedding = PatchConvolution(in_channels, hidden_size, patch, PATCH_SIZE, bias=True, rngs=rngs)
        places = prod(size // PATCH_SIZE for size in image_size)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, places, hidden_size)))
        self.dropout = make_dropout(dropout, rngs)
        self.blocks = nnx.List([TransformerBlock(config, dropout, rngs) for _ in range(NUM_LAYERS)])
        self.norm = _layer_norm(hidden_size, rngs)

    def __call__(self, x: Float[Array, "batch *spatial in"]) -> list[Float[Array, "batch *grid hidden"]]:
        x = self.embedding(x)
        images = x.shape
        x = self.dropout(x.reshape(images[0], -1, images[-1]) + self.positions[...])
        skips = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in SKIPS:
                skips.append(x.reshape(images))
        return [*skips, self.norm(x).reshape(images)]


class TransformerBlock(nnx.Module):
    """Attention and a perceptron. Each takes normalised tokens and adds to the tokens."""

    def __init__(self, config: UNETRConfig, dropout: float, rngs: nnx.Rngs):
        hidden_size, mlp_dim, self.num_heads = config.hidden_size, config.mlp_dim, config.num_heads
        self.norm1 = _layer_norm(hidden_size, rngs)
        self.qkv = _linear(hidden_size, 3 * hidden_size, rngs, bias=False)
        self.out = _linear(hidden_size, hidden_size, rngs)
        self.norm2 = _layer_norm(hidden_size, rngs)
        self.linear1 = _linear(hidden_size, mlp_dim, rngs)
        self.linear2 = _linear(mlp_dim, hidden_size, rngs)
        self.dropout = make_dropout(dropout, rngs)

    @recomputable
    def __call__(self, x: Float[Array, "batch tokens hidden"]) -> Float[Array, "batch tokens hidden"]:
        x = x + self.dropout(self.out(self._attention(self.norm1(x))))
        inner = jax.nn.gelu(self.linear1(self.norm2(x)), approximate=False)
        return x + self.dropout(self.linear2(self.dropout(inner)))

    def _attention(self, x: Array) -> Array:
        batch, tokens, hidden = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, hidden // self.num_heads)
        return jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]).reshape(x.shape)


class TokenEncoder(nnx.Module):
    """Tokens as features of a finer level: upsampled by 2, then `more` times upsampled by 2 and convolved."""

    def __init__(self, inputs: int, outputs: int, more: int, spatial_dims: int, norm: str, rngs: nnx.Rngs):
        self.first = _doubling(inputs, outputs, spatial_dims, rngs)
        self.ups = nnx.List([_doubling(outputs, outputs, spatial_dims, rngs) for _ in range(more)])
        self.blocks = nnx.List(
            [ResidualBlock(outputs, outputs, spatial_dims, norm, rngs) for _ in range(more)]
        )

    def __call__(self, x: Float[Array, "batch *grid hidden"]) -> Float[Array, "batch *finer channels"]:
        x = self.first(x)
        for up, block in zip(self.ups, self.blocks, strict=True):
            x = block(up(x))
        return x


class Decoder(nnx.Module):
    """Features of a coarser level upsampled by 2, joined with the skip and convolved."""

    def __init__(self, inputs: int, outputs: int, spatial_dims: int, norm: str, rngs: nnx.Rngs):
        self.up = _doubling(inputs, outputs, spatial_dims, rngs)
        self.block = ResidualBlock(2 * outputs, outputs, spatial_dims, norm, rngs)

    def __call__(
        self, x: Float[Array, "batch *coarse in"], skip: Float[Array, "batch *fine out"]
    ) -> Float[Array, "batch *fine out"]:
        return self.block(jnp.concatenate([self.up(x), skip], -1))


class ResidualBlock(nnx.Module):
    """Two normalised convolutions plus a shortcut, which is one too if the number of channels changes."""

    def __init__(self, inputs: int, outputs: int, spatial_dims: int, norm: str, rngs: nnx.Rngs):
        sizes = [(inputs, 3), (outputs, 3), *([(inputs, 1)] if inputs != outputs else [])]
        self.convs = nnx.List(
            [Convolution(n, outputs, (side,) * spatial_dims, 1, bias=False, rngs=rngs) for n, side in sizes]
        )
        self.norms = nnx.List([make_norm(norm, outputs) for _ in sizes])

    def __call__(self, x: Float[Array, "batch *spatial in"]) -> Float[Array, "batch *spatial out"]:
        first, second, *shortcut = (
            lambda x, conv=conv, norm=norm: norm(conv(x))
            for conv, norm in zip(self.convs, self.norms, strict=True)
        )
        y = second(jax.nn.leaky_relu(first(x)))
        return jax.nn.leaky_relu(y + (shortcut[0](x) if shortcut else x))


def _doubling(inputs: int, outputs: int, spatial_dims: int, rngs: nnx.Rngs) -> PatchConvolution:
    return PatchConvolution(inputs, outputs, (2,) * spatial_dims, 2, transposed=True, bias=False, rngs=rngs)


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs, *, bias: bool = True) -> nnx.Linear:
    """A dense layer with PyTorch's initial values."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32, **_: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -(inputs**-0.5), inputs**-0.5)

    return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=init, bias_init=init, rngs=rngs)


def _layer_norm(channels: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(channels, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
