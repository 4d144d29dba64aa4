"""Layers of networks: convolutions, norms and PReLU, with PyTorch's initial values."""

from math import prod

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from train.models.layers import EPSILON, convolve, convolve_transpose, normalise
from train.models.patches import from_patches, to_patches

NUM_GROUPS = 8
"""Groups of channels of a group norm, as in MONAI's SegResNet."""


class Convolution(nnx.Module):
    """Convolution or transposed convolution with PyTorch's padding, initial values and optional bias."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: tuple[int, ...],
        stride: int | tuple[int, ...],
        *,
        bias: bool,
        rngs: nnx.Rngs,
        transposed: bool = False,
    ):
        self.strides = (stride,) * len(kernel_size) if isinstance(stride, int) else stride
        self.transposed = transposed
        # PyTorch computes the fan-in of a transposed kernel from its second axis, which holds the outputs.
        bound = (prod(kernel_size) * (outputs if transposed else inputs)) ** -0.5
        self.kernel = nnx.Param(uniform(rngs, (*kernel_size, inputs, outputs), bound))
        self.bias = nnx.Param(uniform(rngs, (outputs,), bound)) if bias else None

    def __call__(self, x: Float[Array, "batch *spatial in"]) -> Float[Array, "batch *resampled out"]:
        return self.add_bias(self.without_bias(x))

    def without_bias(self, x: Float[Array, "batch *spatial in"]) -> Float[Array, "batch *resampled out"]:
        """The convolution alone."""
        apply = convolve_transpose if self.transposed else convolve
        return apply(x, self.kernel[...], self.strides)

    def add_bias(self, y: Float[Array, "batch *spatial out"]) -> Float[Array, "batch *spatial out"]:
        """The result of `without_bias`, with the bias added."""
        return y if self.bias is None else y + as_channels(self.bias[...], y.ndim)


class PatchConvolution(Convolution):
    """A convolution, or its transpose, whose stride is its kernel's side: one matrix product over patches."""

    def without_bias(self, x: Float[Array, "batch *spatial in"]) -> Float[Array, "batch *resampled out"]:
        """The convolution alone."""
        kernel = self.kernel[...]
        inputs, outputs = kernel.shape[-2:]
        if self.transposed:
            return from_patches(x @ jnp.moveaxis(kernel, -2, 0).reshape(inputs, -1), self.strides)
        return to_patches(x, self.strides) @ kernel.reshape(-1, outputs)


class PReLU(nnx.Module):
    """x if positive, else x times a learnt slope, one for all channels."""

    def __init__(self):
        self.slope = nnx.Param(jnp.full((1,), 0.25, jnp.float32))

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return jnp.where(x > 0, x, as_channels(self.slope[...], x.ndim) * x)


class Norm(nnx.Module):
    """Normalisation per image and group of channels, with an optional scale and offset per channel."""

    def __init__(self, channels: int, groups: int, *, affine: bool):
        if channels % groups:
            raise ValueError(
                f"{channels} channels do not fall into {groups} groups: give a divisor of {channels}."
            )
        self.groups = groups
        self.removes_bias = groups == channels  # subtracting a channel's mean removes its bias
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32)) if affine else None
        self.offset = nnx.Param(jnp.zeros(channels, jnp.float32)) if affine else None

    def __call__(self, x: Float[Array, "batch *spatial channels"]) -> Float[Array, "batch *spatial channels"]:
        y = self.normalise(x)
        if self.scale is None or self.offset is None:
            return y
        return y * as_channels(self.scale[...], y.ndim) + as_channels(self.offset[...], y.ndim)

    def normalise(
        self, x: Float[Array, "batch *spatial channels"]
    ) -> Float[Array, "batch *spatial channels"]:
        """The values without scale and offset."""
        return normalise(x, self.groups)


class BatchNorm(Norm):
    """Normalisation by stored means and variances per channel, in training as well.

    Imported networks with batch norm have it. A batch of a few volumes gives no useful statistics, so the stored
    ones stay, and training sees the network that evaluation sees.
    """

    def __init__(self, channels: int):
        super().__init__(channels, 1, affine=True)
        self.removes_bias = False
        self.mean = nnx.BatchStat(jnp.zeros(channels, jnp.float32))
        self.variance = nnx.BatchStat(jnp.ones(channels, jnp.float32))

    def normalise(
        self, x: Float[Array, "batch *spatial channels"]
    ) -> Float[Array, "batch *spatial channels"]:
        """The values without scale and offset."""
        centred = x - as_channels(self.mean[...], x.ndim)
        return centred * as_channels(jax.lax.rsqrt(self.variance[...] + EPSILON), x.ndim)


def make_norm(name: str, channels: int) -> Norm:
    """The norm that `--norm` calls `name`, for that many channels."""
    if name == "batch":
        return BatchNorm(channels)
    if name == "group":
        return Norm(channels, NUM_GROUPS, affine=True)
    if name in ("instance", "affine-instance"):
        return Norm(channels, channels, affine=name != "instance")
    raise ValueError(f"norm is {name!r}; expected instance, affine-instance, group or batch.")


def make_dropout(rate: float, rngs: nnx.Rngs) -> nnx.Dropout:
    """Dropout, which has no random state if the rate is 0."""
    return nnx.Dropout(rate, rngs=rngs if rate else None)


def check_image(shape: tuple[int, ...], spatial_dims: int, channels: int, divisors: tuple[int, ...]) -> None:
    """Checks that a network takes images of this shape, `[batch, *spatial, channels]`.

    Raises:
        ValueError: if rank or channels are not the network's, or `divisors` do not divide the sizes.
    """
    if len(shape) != spatial_dims + 2 or shape[-1] != channels:
        raise ValueError(
            f"The image has shape {shape}; expected [batch, {spatial_dims} spatial axes, {channels} channels]."
        )
    for axis, (size, divisor) in enumerate(zip(shape[1:-1], divisors, strict=True), 1):
        if size % divisor:
            raise ValueError(
                f"Size {size} of axis {axis} of the image {shape} is not divisible by {divisor}, the "
                f"product of the network's strides: pad or crop it to a multiple of {divisor}."
            )


def as_channels(values: Float[Array, " channels"], ndim: int) -> Float[Array, "*ones channels"]:
    """One value per channel, shaped to broadcast against an array of `ndim` axes."""
    return values.reshape((1,) * (ndim - 1) + values.shape)


def uniform(rngs: nnx.Rngs, shape: tuple[int, ...], bound: float) -> Float[Array, "..."]:
    """Initial values between `-bound` and `bound`."""
    return jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
