"""SegResNet, plain and with deep supervision: MONAI's `SegResNet` and `SegResNetDS`, channel last, in Flax NNX."""

from collections.abc import Sequence

import jax
from flax import nnx
from jaxtyping import Array, Float

from train.models.blocks import Convolution, check_image, make_dropout, make_norm
from train.models.remat import recomputable

Logits = Float[Array, "batch *spatial classes"]


class SegResNet(nnx.Module):
    """Residual encoder and decoder, equal to `monai.networks.nets.SegResNet` or `SegResNetDS`.

    Myronenko, "3D MRI brain tumor segmentation using autoencoder regularization", arXiv 1810.11654, without the
    autoencoder. With `deep_supervision` it equals `SegResNetDS`: transposed convolutions replace linear
    interpolation, and each of that many finest levels gives logits from one convolution.

    Args:
        in_channels: channels of the image.
        out_channels: classes.
        spatial_dims: 2 or 3.
        init_filters: channels of the finest level; each further level has twice as many and half the size.
        blocks_down: residual blocks of each level on the way down, the finest first.
        blocks_up: residual blocks of each level on the way up, the coarsest first; left out, one at each level.
        norm: normalisation, as in `UNet`.
        dropout: dropout rate, after the first convolution.
        deep_supervision: levels that give logits in training; 0 for `SegResNet`, 1 or more for `SegResNetDS`.
        rngs: seeds of the parameters and, where `dropout` is positive, of dropout.

    Raises:
        ValueError: if options contradict one another or name an unknown norm.

    Example:
        >>> import jax.numpy as jnp
        >>> model = SegResNet(in_channels=1, out_channels=3, spatial_dims=2, blocks_down=(1, 1, 1))
        >>> model(jnp.zeros((1, 16, 24, 1))).shape
        (1, 16, 24, 3)
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        spatial_dims: int = 3,
        init_filters: int = 8,
        blocks_down: Sequence[int] = (1, 2, 2, 4),
        blocks_up: Sequence[int] = (),
        norm: str = "group",
        dropout: float = 0.0,
        deep_supervision: int = 0,
        rngs: nnx.Rngs | None = None,
    ):
        ups = len(blocks_down) - 1
        blocks_up = blocks_up or (1,) * ups
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims is {spatial_dims}; expected 2 or 3.")
        if ups < 1 or len(blocks_up) != ups:
            raise ValueError(
                f"blocks_down are {tuple(blocks_down)} and blocks_up {tuple(blocks_up)}; expected two or more, and "
                "one fewer on the way up."
            )
        if not 0 <= deep_supervision <= ups:
            raise ValueError(
                f"deep_supervision is {deep_supervision}; expected 0 to {ups}, one less than levels."
            )
        self.in_channels = in_channels
        self.spatial_dims = spatial_dims
        self.deep_supervision = deep_supervision
        self.divisor = 2**ups
        # `eval()` sets this to True.
        self.deterministic = False
        rngs = nnx.Rngs(0) if rngs is None else rngs
        three, one = (3,) * spatial_dims, (1,) * spatial_dims
        filters = [init_filters * 2**i for i in range(ups + 1)]

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
        self.down = nnx.List([blocks(*sizes) for sizes in zip(filters, blocks_down, strict=True)])
        # The lists below have the coarsest level first.
        coarse_first = filters[-2::-1]
        self.upsample = nnx.List([upsample(2 * channels, channels) for channels in coarse_first])
        self.up = nnx.List([blocks(*sizes) for sizes in zip(coarse_first, blocks_up, strict=True)])
        self.heads = nnx.List([head(channels) for channels in coarse_first[-max(deep_supervision, 1) :]])

    def __call__(self, x: Float[Array, "batch *spatial in"]) -> Logits | tuple[Logits, ...]:
        """Logits of each class at each voxel. In training with deep supervision: of each level, the finest first.

        Raises:
            ValueError: if rank or channels of `x` are not the model's, or `divisor` does not divide a size.
        """
        check_image(x.shape, self.spatial_dims, self.in_channels, self.divisor)
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
    batch, *spatial, channels = x.shape
    return jax.image.resize(x, (batch, *(2 * size for size in spatial), channels), "linear")
