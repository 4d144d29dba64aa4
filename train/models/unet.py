"""The paper's network: MONAI's residual `UNet`, channel last, in Flax NNX."""

from functools import partial
from math import prod
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from train.models.blocks import Convolution, PReLU, check_image, make_dropout, make_norm
from train.models.configs import UNetConfig
from train.models.layers import convolve
from train.models.remat import recomputable


class UNet(nnx.Module):
    """U-Net with residual units, equal to `monai.networks.nets.UNet` layer by layer.

    Args:
        config: its options.
        in_channels: channels of the image.
        out_channels: classes.
        spatial_dims: 2 or 3.
        norm: `instance`, `affine-instance`, `group` (8 groups) or `batch` (stored statistics only).
        dropout: dropout rate, between norm and activation.
        rngs: seeds of the parameters and, where `dropout` is positive, of dropout.

    Raises:
        ValueError: if the norm is unknown, or its groups do not divide the channels.

    Example:
        >>> config = UNetConfig(channels=(4, 8), strides=(2,))
        >>> model = UNet(config, in_channels=1, out_channels=3, spatial_dims=2, rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((1, 16, 24, 1))).shape
        (1, 16, 24, 3)
    """

    def __init__(
        self,
        config: UNetConfig,
        *,
        in_channels: int,
        out_channels: int,
        spatial_dims: int,
        norm: str = "instance",
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.config, self.in_channels, self.spatial_dims = config, in_channels, spatial_dims
        channels, num_res_units = config.channels, config.num_res_units
        strides = config.strides_of_axes(spatial_dims)
        options = {"spatial_dims": spatial_dims, "norm": norm, "dropout": dropout, "rngs": rngs}

        def block(inputs: int, outputs: int, stride: tuple[int, ...]) -> nnx.Module:
            if num_res_units:
                return ResidualUnit(inputs, outputs, stride, subunits=num_res_units, **options)
            return ConvolutionUnit(inputs, outputs, stride, **options)

        def up_block(inputs: int, outputs: int, stride: tuple[int, ...], top: bool) -> nnx.Module:
            plain = top and not num_res_units
            up = ConvolutionUnit(inputs, outputs, stride, transposed=True, conv_only=plain, **options)
            if not num_res_units:
                return nnx.Sequential(up)
            unit = ResidualUnit(outputs, outputs, dense, subunits=1, last_conv_only=top, **options)
            return nnx.Sequential(up, unit)

        dense = (1,) * spatial_dims
        inputs = (in_channels, *channels[:-2])
        outputs = (out_channels, *channels[:-2])
        self.down = nnx.List([block(*sizes) for sizes in zip(inputs, channels[:-1], strides, strict=True)])
        self.bottom = block(channels[-2], channels[-1], dense)
        joined = [c + (c if i < len(strides) - 1 else channels[-1]) for i, c in enumerate(channels[:-1])]
        levels = enumerate(zip(joined, outputs, strides, strict=True))
        self.up = nnx.List([up_block(*sizes, top=i == 0) for i, sizes in levels])

    def __call__(self, x: Float[Array, "batch *spatial in"]) -> Float[Array, "batch *spatial out"]:
        """Logits of each class at each voxel.

        Raises:
            ValueError: if rank or channels of `x` are not the model's, or strides do not divide a size.
        """
        check_image(x.shape, self.spatial_dims, self.in_channels, self.config.divisors(self.spatial_dims))
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
        x = self.bottom(x)
        for skip, up in zip(reversed(skips), reversed(self.up), strict=True):
            x = up(jnp.concatenate([skip, x], -1))
        return x


class ConvolutionUnit(nnx.Module):
    """Convolution of 3 voxels a side, then norm, dropout and PReLU. With `conv_only` the convolution alone."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        strides: tuple[int, ...],
        *,
        spatial_dims: int,
        norm: str,
        dropout: float,
        rngs: nnx.Rngs,
        transposed: bool = False,
        conv_only: bool = False,
    ):
        three = (3,) * spatial_dims
        self.conv = Convolution(inputs, outputs, three, strides, transposed=transposed, bias=True, rngs=rngs)
        self.norm = None if conv_only else make_norm(norm, outputs)
        self.dropout = None if conv_only else make_dropout(dropout, rngs)
        self.act = None if conv_only else PReLU()

    @recomputable
    def __call__(self, x: Float[Array, "batch *spatial in"]) -> Float[Array, "batch *resampled out"]:
        return self.finish(self.conv.without_bias(x))

    def finish(self, x: Float[Array, "batch *spatial out"]) -> Float[Array, "batch *spatial out"]:
        """The convolution's bias, unless the norm would remove it, then norm, dropout and PReLU."""
        if self.norm is None or not self.norm.removes_bias:
            x = self.conv.add_bias(x)
        for layer in (self.norm, self.dropout, self.act):
            x = x if layer is None else layer(x)
        return x


class ResidualUnit(nnx.Module):
    """A chain of convolution units, plus a shortcut, which is a convolution if the shape changes."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        strides: tuple[int, ...],
        *,
        subunits: int,
        spatial_dims: int,
        rngs: nnx.Rngs,
        last_conv_only: bool = False,
        **options: Any,
    ):
        unit = partial(ConvolutionUnit, spatial_dims=spatial_dims, rngs=rngs, **options)
        last = subunits - 1 if last_conv_only else None
        self.units = nnx.List(
            [
                unit(
                    outputs if i else inputs,
                    outputs,
                    (1,) * spatial_dims if i else strides,
                    conv_only=i == last,
                )
                for i in range(subunits)
            ]
        )
        reduces = prod(strides) > 1
        shortcut = (3 if reduces else 1,) * spatial_dims
        changes = reduces or inputs != outputs
        self.residual = (
            Convolution(inputs, outputs, shortcut, strides, bias=True, rngs=rngs) if changes else None
        )

    @recomputable
    def __call__(self, x: Float[Array, "batch *spatial in"]) -> Float[Array, "batch *strided out"]:
        first, *others = self.units
        y, shortcut = self._first_convolutions(x)
        y = first.finish(y)
        for unit in others:
            y = unit(y)
        return y + shortcut

    def _first_convolutions(self, x: Array) -> tuple[Array, Array]:
        """The first unit's convolution without its bias, and the shortcut.

        Kernels of the same size are applied in one pass over x.
        """
        conv, shortcut = self.units[0].conv, self.residual
        if shortcut is None:
            return conv.without_bias(x), x
        if shortcut.kernel.shape != conv.kernel.shape:
            return conv.without_bias(x), shortcut(x)
        both = convolve(x, jnp.concatenate([conv.kernel[...], shortcut.kernel[...]], -1), conv.strides)
        y, z = jnp.split(both, 2, -1)
        return y, shortcut.add_bias(z)
