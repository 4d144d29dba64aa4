"""The paper's network: MONAI's residual `UNet`, channel last, in Flax NNX."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from train.models.layers import convolve, convolve_transpose, normalise
from train.models.remat import recomputable

Option = str | tuple[str, Mapping[str, Any]] | None
"""A layer by name, alone or with its arguments: `"relu"`, `("group", {"num_groups": 4})`; None for no layer."""


class UNet(nnx.Module):
    """U-Net with residual units, equal to `monai.networks.nets.UNet` layer by layer.

    Args:
        in_channels: channels of the image.
        out_channels: classes.
        spatial_dims: 2 or 3.
        channels: channels of each level, the finest first.
        strides: stride from each level to the next.
        kernel_size: side (or sides) of the convolutions' window, odd.
        up_kernel_size: the same for transposed convolutions.
        num_res_units: convolutions in a residual unit; 0 for plain convolutions instead of residual units.
        act: activation; `prelu`, `relu`, `leakyrelu`, `elu`, `selu`, `celu`, `gelu`, `relu6`, `sigmoid`,
            `tanh`, `swish`, `mish` or None, with PyTorch's arguments.
        norm: `instance`, `group` or None, with PyTorch's arguments.
        dropout: dropout rate, between norm and activation.
        bias: whether convolutions add a bias.
        rngs: seeds of the parameters and, where `dropout` is positive, of dropout.

    Raises:
        ValueError: if options contradict one another or name an unknown layer.

    Example:
        >>> model = UNet(in_channels=1, out_channels=3, spatial_dims=2, channels=(4, 8), strides=(2,))
        >>> model(jnp.zeros((1, 16, 24, 1))).shape
        (1, 16, 24, 3)
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        spatial_dims: int = 3,
        channels: Sequence[int] = (8, 16, 32, 64),
        strides: Sequence[int] = (2, 2, 2),
        kernel_size: int | Sequence[int] = 3,
        up_kernel_size: int | Sequence[int] = 3,
        num_res_units: int = 2,
        act: Option = "prelu",
        norm: Option = "instance",
        dropout: float = 0.0,
        bias: bool = True,
        rngs: nnx.Rngs | None = None,
    ):
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims is {spatial_dims}; expected 2 or 3.")
        if len(channels) < 2 or len(strides) != len(channels) - 1:
            raise ValueError(
                f"channels are {tuple(channels)} and strides {tuple(strides)}; expected two or more channels, and "
                "one stride between each two of them."
            )
        self.in_channels = in_channels
        self.spatial_dims = spatial_dims
        self.divisor = prod(strides)
        rngs = nnx.Rngs(0) if rngs is None else rngs
        window = _window(kernel_size, spatial_dims, "kernel_size")
        up_window = _window(up_kernel_size, spatial_dims, "up_kernel_size")
        layers = {"act": act, "norm": norm, "dropout": dropout, "bias": bias, "rngs": rngs}

        def block(inputs: int, outputs: int, stride: int) -> nnx.Module:
            if num_res_units:
                return ResidualUnit(inputs, outputs, window, stride, subunits=num_res_units, **layers)
            return ConvolutionUnit(inputs, outputs, window, stride, **layers)

        def up_block(inputs: int, outputs: int, stride: int, top: bool) -> nnx.Module:
            plain = top and not num_res_units
            up = ConvolutionUnit(
                inputs, outputs, up_window, stride, transposed=True, conv_only=plain, **layers
            )
            if not num_res_units:
                return nnx.Sequential(up)
            unit = ResidualUnit(outputs, outputs, window, 1, subunits=1, last_conv_only=top, **layers)
            return nnx.Sequential(up, unit)

        inputs = (in_channels, *channels[:-2])
        outputs = (out_channels, *channels[:-2])
        self.down = nnx.List([block(*sizes) for sizes in zip(inputs, channels[:-1], strides, strict=True)])
        self.bottom = block(channels[-2], channels[-1], 1)
        joined = [c + (c if i < len(strides) - 1 else channels[-1]) for i, c in enumerate(channels[:-1])]
        self.up = nnx.List(
            [
                up_block(*sizes, top=i == 0)
                for i, sizes in enumerate(zip(joined, outputs, strides, strict=True))
            ]
        )

    def __call__(self, x: Float[Array, "batch *spatial in"]) -> Float[Array, "batch *spatial out"]:
        """Logits of each class at each voxel.

        Raises:
            ValueError: if rank or channels of `x` are not the model's, or strides do not divide a size.
        """
        self._check(x.shape)
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
        x = self.bottom(x)
        for skip, up in zip(reversed(skips), reversed(self.up), strict=True):
            x = up(jnp.concatenate([skip, x], -1))
        return x

    def _check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != self.spatial_dims + 2 or shape[-1] != self.in_channels:
            raise ValueError(
                f"The image has shape {shape}; expected [batch, {self.spatial_dims} spatial axes, "
                f"{self.in_channels} channels]."
            )
        for axis, size in enumerate(shape[1:-1], 1):
            if size % self.divisor:
                raise ValueError(
                    f"Size {size} of axis {axis} of the image {shape} is not divisible by {self.divisor}, the "
                    f"product of the strides: pad or crop it to a multiple of {self.divisor}."
                )


class ConvolutionUnit(nnx.Module):
    """Convolution, then norm, dropout and activation (nothing of these three if `conv_only`)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        window: tuple[int, ...],
        stride: int,
        *,
        act: Option,
        norm: Option,
        dropout: float,
        bias: bool,
        rngs: nnx.Rngs,
        transposed: bool = False,
        conv_only: bool = False,
    ):
        self.conv = Convolution(inputs, outputs, window, stride, transposed=transposed, bias=bias, rngs=rngs)
        self.norm = None if conv_only else make_norm(norm, outputs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout and not conv_only else None
        self.act = None if conv_only else make_activation(act)

    @recomputable
    def __call__(self, x: Float[Array, "batch *spatial in"]) -> Float[Array, "batch *resampled out"]:
        return self.finish(self.conv(x))

    def finish(self, x: Float[Array, "batch *spatial out"]) -> Float[Array, "batch *spatial out"]:
        """What follows the convolution."""
        for layer in (self.norm, self.dropout, self.act):
            x = x if layer is None else layer(x)
        return x


class ResidualUnit(nnx.Module):
    """A chain of convolution units beside a shortcut, which is a convolution where shapes change."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        window: tuple[int, ...],
        stride: int,
        *,
        subunits: int,
        bias: bool,
        rngs: nnx.Rngs,
        last_conv_only: bool = False,
        **layers: Any,
    ):
        self.units = nnx.List(
            [
                ConvolutionUnit(
                    outputs if i else inputs,
                    outputs,
                    window,
                    1 if i else stride,
                    bias=bias,
                    rngs=rngs,
                    conv_only=last_conv_only and i == subunits - 1,
                    **layers,
                )
                for i in range(subunits)
            ]
        )
        shortcut = window if stride > 1 else (1,) * len(window)
        changes = stride > 1 or inputs != outputs
        self.residual = (
            Convolution(inputs, outputs, shortcut, stride, bias=bias, rngs=rngs) if changes else None
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
        """The first unit's convolution and the shortcut, in one pass over x where their windows agree."""
        conv, shortcut = self.units[0].conv, self.residual
        if shortcut is None:
            return conv(x), x
        if shortcut.kernel.shape != conv.kernel.shape:
            return conv(x), shortcut(x)
        both = convolve(x, jnp.concatenate([conv.kernel[...], shortcut.kernel[...]], -1), conv.strides)
        y, z = jnp.split(both, 2, -1)
        return conv.add_bias(y), shortcut.add_bias(z)


class Convolution(nnx.Module):
    """Convolution or transposed convolution with PyTorch's padding, initial values and optional bias."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        window: tuple[int, ...],
        stride: int,
        *,
        bias: bool,
        rngs: nnx.Rngs,
        transposed: bool = False,
    ):
        self.strides = (stride,) * len(window)
        self.transposed = transposed
        # PyTorch takes a transposed kernel's fan-in from its second axis, which holds the outputs.
        bound = (prod(window) * (outputs if transposed else inputs)) ** -0.5
        self.kernel = nnx.Param(_uniform(rngs, (*window, inputs, outputs), bound))
        self.bias = nnx.Param(_uniform(rngs, (outputs,), bound)) if bias else None

    def __call__(self, x: Float[Array, "batch *spatial in"]) -> Float[Array, "batch *resampled out"]:
        apply = convolve_transpose if self.transposed else convolve
        return self.add_bias(apply(x, self.kernel[...], self.strides))

    def add_bias(self, y: Float[Array, "batch *spatial out"]) -> Float[Array, "batch *spatial out"]:
        """The convolution's result with its bias."""
        return y if self.bias is None else y + _as_channels(self.bias[...], y.ndim)


class PReLU(nnx.Module):
    """x where positive, else x times a learnt slope (one for all channels, or one for each)."""

    def __init__(self, num_parameters: int = 1, init: float = 0.25):
        self.slope = nnx.Param(jnp.full((num_parameters,), init, jnp.float32))

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return jnp.where(x > 0, x, _as_channels(self.slope[...], x.ndim) * x)


class Norm(nnx.Module):
    """Normalisation per image and group of channels, with an optional scale and offset per channel."""

    def __init__(self, channels: int, groups: int, *, affine: bool, eps: float = 1e-5):
        if channels % groups:
            raise ValueError(
                f"{channels} channels do not fall into {groups} groups: give a divisor of {channels}."
            )
        self.groups, self.eps = groups, eps
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32)) if affine else None
        self.offset = nnx.Param(jnp.zeros(channels, jnp.float32)) if affine else None

    def __call__(self, x: Float[Array, "batch *spatial channels"]) -> Float[Array, "batch *spatial channels"]:
        y = normalise(x, self.groups, self.eps)
        if self.scale is None or self.offset is None:
            return y
        return y * _as_channels(self.scale[...], y.ndim) + _as_channels(self.offset[...], y.ndim)


ACTIVATIONS: dict[str, Callable[..., Array]] = {
    "relu": jax.nn.relu,
    "leakyrelu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "celu": jax.nn.celu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "swish": jax.nn.swish,
    "mish": jax.nn.mish,
}


def make_activation(option: Option) -> Callable[[Array], Array] | None:
    """The activation called `option`."""
    name, arguments = _split_option(option)
    if not name:
        return None
    if name == "prelu":
        return PReLU(**arguments)
    if name not in ACTIVATIONS:
        raise ValueError(f"act is {option!r}; expected one of prelu, {', '.join(ACTIVATIONS)} or None.")
    function = ACTIVATIONS[name]
    return lambda x: function(x, **arguments)


def make_norm(option: Option, channels: int) -> Norm | None:
    """The norm called `option`, for that many channels."""
    name, arguments = _split_option(option)
    if not name:
        return None
    if name == "instance":
        return Norm(channels, channels, **{"affine": False, **arguments})
    if name == "group":
        arguments = {"affine": True, **arguments}
        return Norm(channels, arguments.pop("num_groups"), **arguments)
    raise ValueError(f"norm is {option!r}; expected instance, group or None.")


def load_monai_weights(model: UNet, state: Mapping[str, np.ndarray]) -> None:
    """Copies the parameters of a MONAI `UNet` of the same options into `model`.

    Args:
        model: the network that receives them.
        state: MONAI's `state_dict()`, its tensors as NumPy arrays.

    Raises:
        ValueError: if a parameter is missing, left over or of another shape.
    """
    names = dict(_monai_names(model))
    if names.keys() != state.keys():
        raise ValueError(
            f"The two networks differ: missing {sorted(names.keys() - state.keys())}, "
            f"left over {sorted(state.keys() - names.keys())}."
        )
    for name, (parameter, axes) in names.items():
        value = np.asarray(state[name])
        value = value.transpose(axes) if axes else value
        if value.shape != parameter.shape:
            raise ValueError(f"{name} has shape {value.shape}; expected {parameter.shape}.")
        parameter[...] = jnp.asarray(value, parameter.dtype)


Named = Iterator[tuple[str, tuple[nnx.Param, tuple[int, ...]]]]


def _monai_names(model: UNet) -> Named:
    """MONAI's name of each parameter, with the order of its axes here."""
    level = "model"
    for down, up in zip(model.down, model.up, strict=True):
        yield from _block_names(f"{level}.0", down)
        blocks = cast(nnx.Sequential, up).layers
        if len(blocks) == 1:
            yield from _block_names(f"{level}.2", blocks[0])
        else:
            for i, block in enumerate(blocks):
                yield from _block_names(f"{level}.2.{i}", block)
        level += ".1.submodule"
    yield from _block_names(level, model.bottom)


def _block_names(prefix: str, block: Any) -> Named:
    if isinstance(block, ResidualUnit):
        for i, unit in enumerate(block.units):
            yield from _block_names(f"{prefix}.conv.unit{i}", unit)
        if block.residual is not None:
            yield from _convolution_names(f"{prefix}.residual", block.residual)
    elif isinstance(block, ConvolutionUnit):
        yield from _convolution_names(f"{prefix}.conv", block.conv)
        if isinstance(block.act, PReLU):
            yield f"{prefix}.adn.A.weight", (block.act.slope, ())
        if block.norm is not None and block.norm.scale is not None and block.norm.offset is not None:
            yield f"{prefix}.adn.N.weight", (block.norm.scale, ())
            yield f"{prefix}.adn.N.bias", (block.norm.offset, ())


def _convolution_names(prefix: str, conv: Convolution) -> Named:
    # PyTorch's kernels are [out, in, *window], transposed ones [in, out, *window].
    window = tuple(range(2, 2 + len(conv.strides)))
    yield f"{prefix}.weight", (conv.kernel, (*window, 0, 1) if conv.transposed else (*window, 1, 0))
    if conv.bias is not None:
        yield f"{prefix}.bias", (conv.bias, ())


def _as_channels(values: Array, ndim: int) -> Array:
    return values.reshape((1,) * (ndim - 1) + values.shape)


def _uniform(rngs: nnx.Rngs, shape: tuple[int, ...], bound: float) -> Array:
    return jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)


def _split_option(option: Option) -> tuple[str, dict[str, Any]]:
    name, arguments = (option, {}) if isinstance(option, str | None) else option
    return (name or "").lower(), dict(arguments)


def _window(size: int | Sequence[int], spatial_dims: int, name: str) -> tuple[int, ...]:
    window = (size,) * spatial_dims if isinstance(size, int) else tuple(size)
    if len(window) != spatial_dims or any(k % 2 == 0 for k in window):
        raise ValueError(f"{name} is {size}; expected an odd number, or {spatial_dims} of them.")
    return window
