"""SegResNet, plain and with deep supervision: MONAI's `SegResNet` and `SegResNetDS`, channel last, in Flax NNX."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from train.models.blocks import Convolution, check_image, make_dropout, make_norm
from train.models.configs import SegResNetConfig
from train.models.remat import recomputable

Logits = Float[Array, "batch *spatial classes"]


class SegResNet(nnx.Module):
    """Residual encoder and decoder, equal to `monai.networks.nets.SegResNet` or `SegResNetDS`.

    Myronenko, "3D MRI brain tumor segmentation using autoencoder regularization", arXiv 1810.11654, without the
    autoencoder. With `deep_supervision` it equals `SegResNetDS`: transposed convolutions replace linear
    interpolation, and each of that many finest levels gives logits from one convolution.

    Args:
        config: its options.
        in_channels: channels of the image.
        out_channels: classes.
        spatial_dims: 2 or 3.
        norm: normalisation, as in `UNet`.
        dropout: dropout rate, after the first convolution.
        rngs: seeds of the parameters and, where `dropout` is positive, of dropout.

    Raises:
        ValueError: if the norm is unknown, or its groups do not divide the channels.

    Example:
        >>> import jax.numpy as jnp
        >>> config = SegResNetConfig(blocks_down=(1, 1, 1))
        >>> model = SegResNet(config, in_channels=1, out_channels=3, spatial_dims=2, rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((1, 16, 24, 1))).shape
        (1, 16, 24, 3)
    """

    def __init__(
        self,
        config: SegResNetConfig,
        *,
        in_channels: int,
        out_channels: int,
        spatial_dims: int,
        norm: str = "group",
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.config, self.in_channels, self.spatial_dims = config, in_channels, spatial_dims
        # `eval()` sets this to True.
        self.deterministic = False
        ups, deep_supervision = len(config.blocks_down) - 1, config.deep_supervision
        three, one = (3,) * spatial_dims, (1,) * spatial_dims
        filters = [config.init_filters * 2**i for i in range(ups + 1)]

        def blocks(channels: int, count: int) -> nnx.Sequential:
            return nnx.Sequential(*(PreActivationBlock(channels, three, norm, rngs) for _ in range(count)))

        def upsample(inputs: int, outputs: int) -> nnx.Module:
            if deep_supervision:
                return Convolution(inputs, outputs, three, 2, transposed=True, bias=False, rngs=rngs)
            return nnx.Sequential(Convolution(inputs, outputs, one, 1, bias=False, rngs=rngs), double)

        def head(inputs: int) -> nnx.Module:
            conv = Convolution(inputs, out_channels, one, 1, bias=True, rngs=rngs)
            if deep_supervision:
                return conv
            return nnx.Sequential(make_norm(norm, inputs), jax.nn.relu, conv)

        levels = zip((in_channels, *filters[:-1]), filters, (1, *(2,) * ups), strict=True)
        self.convs = nnx.List(
            [Convolution(n, m, three, stride, bias=False, rngs=rngs) for n, m, stride in levels]
        )
        self.dropout = make_dropout(dropout, rngs)
        self.down = nnx.List([blocks(*sizes) for sizes in zip(filters, config.blocks_down, strict=True)])
        # The lists below have the coarsest level first.
        coarse_first = filters[-2::-1]
        self.upsample = nnx.List([upsample(2 * channels, channels) for channels in coarse_first])
        blocks_up = config.blocks_up or (1,) * ups
        self.up = nnx.List([blocks(*sizes) for sizes in zip(coarse_first, blocks_up, strict=True)])
        self.heads = nnx.List([head(channels) for channels in coarse_first[-max(deep_supervision, 1) :]])

    def __call__(self, x: Float[Array, "batch *spatial in"]) -> Logits | tuple[Logits, ...]:
        """Logits of each class at each voxel. In training with deep supervision: of each level, the finest first.

        Raises:
            ValueError: if rank or channels of `x` are not the model's, or a size cannot be halved on each level.
        """
        check_image(x.shape, self.spatial_dims, self.in_channels, self.config.divisors(self.spatial_dims))
        skips = []
        for i, (conv, blocks) in enumerate(zip(self.convs, self.down, strict=True)):
            x = conv(x)
            x = x if i else self.dropout(x)
            x = blocks(x)
            skips.append(x)
        x = skips.pop()
        features = []
        for upsample, blocks in zip(self.upsample, self.up, strict=True):
            x = blocks(upsample(x) + skips.pop())
            features.append(x)
        if self.deterministic or len(self.heads) == 1:
            return self.heads[-1](x)
        return tuple(head(y) for head, y in zip(reversed(self.heads), reversed(features), strict=False))


class PreActivationBlock(nnx.Module):
    """Norm, ReLU and convolution, twice, added to the input."""

    def __init__(self, channels: int, kernel_size: tuple[int, ...], norm: str, rngs: nnx.Rngs):
        self.norms = nnx.List([make_norm(norm, channels) for _ in range(2)])
        self.convs = nnx.List(
            [Convolution(channels, channels, kernel_size, 1, bias=False, rngs=rngs) for _ in range(2)]
        )

    @recomputable
    def __call__(self, x: Float[Array, "batch *spatial channels"]) -> Float[Array, "batch *spatial channels"]:
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(jax.nn.relu(norm(y)))
        return x + y


def double(x: Float[Array, "batch *spatial channels"]) -> Float[Array, "batch *doubled channels"]:
    """Twice the size by linear interpolation between voxel centres."""
    return jax.lax.platform_dependent(x, cpu=_resized, default=_between_neighbours)


def _resized(x: Array) -> Array:
    batch, *spatial, channels = x.shape
    return jax.image.resize(x, (batch, *(2 * size for size in spatial), channels), "linear")


def _between_neighbours(x: Array) -> Array:
    """`_resized` without its matrix products.

    CPUs compute the products faster. XLA fails to compile them for H100s at some sizes.
    """
    for axis in range(1, x.ndim - 1):
        rim = [(0, 0)] * x.ndim
        rim[axis] = (1, 1)
        padded = jnp.pad(x, rim, mode="edge")
        before, after = (jax.lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis) for i in (0, 2))
        halves = jnp.stack([0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after], axis + 1)
        x = halves.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])
    return x
