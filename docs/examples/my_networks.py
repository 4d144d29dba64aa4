"""A network of your own: a small residual convolutional network in Flax NNX.

    python -m train fit --architecture 'my_networks:make(width=16)' --data msd:Task04_Hippocampus

Run the command with the folder of this file on PYTHONPATH.
"""

import jax
from flax import nnx


class ResidualFCN(nnx.Module):
    """Residual 3x3 convolutions at full and half resolution."""

    divisor = 2  # every side of a patch must be a multiple of this

    def __init__(self, in_channels: int, out_channels: int, spatial_dims: int, width: int, rngs: nnx.Rngs):
        def conv(inputs: int, outputs: int, stride: int = 1) -> nnx.Conv:
            return nnx.Conv(inputs, outputs, (3,) * spatial_dims, strides=stride, rngs=rngs)

        self.first, self.inner = conv(in_channels, width), conv(width, width)
        self.down, self.bottom = conv(width, width, stride=2), conv(width, width)
        self.head = conv(width, out_channels)

    def __call__(self, image: jax.Array) -> jax.Array:
        x = nnx.relu(self.first(image))
        x = x + nnx.relu(self.inner(x))
        coarse = nnx.relu(self.bottom(nnx.relu(self.down(x))))
        return self.head(x + jax.image.resize(coarse, x.shape, "linear"))


def make(*, in_channels, out_channels, spatial_dims, patch, rngs, width=16):
    """The network for images `[batch, *patch, in_channels]`; its logits are `[batch, *patch, out_channels]`."""
    return ResidualFCN(in_channels, out_channels, spatial_dims, width, rngs)
