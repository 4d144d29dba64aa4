"""2-D networks on 3-D images."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class Slicewise(nnx.Module):
    """Applies a 2-D network to each slice of 3-D images along their last axis.

    Slices join the batch, so that norms see one slice at a time.

    Args:
        network: maps `[batch, height, width, in]` to logits `[batch, height, width, out]`, or to several of them.

    Example:
        >>> from train.models.configs import UNetConfig
        >>> options = {"in_channels": 1, "out_channels": 3, "spatial_dims": 2, "rngs": nnx.Rngs(0)}
        >>> network = UNetConfig(channels=(4, 8), strides=(2,)).make(patch=(16, 24), **options)
        >>> Slicewise(network)(jnp.zeros((1, 16, 24, 5, 1))).shape
        (1, 16, 24, 5, 3)
    """

    def __init__(self, network: nnx.Module):
        self.network = network

    def __call__(self, x: Float[Array, "batch height width depth in"]) -> Any:
        """Logits `[batch, height, width, depth, out]` of each class at each voxel."""
        slices = jnp.moveaxis(x, -2, 1)
        batch = slices.shape[:2]

        def volume(logits: Array) -> Array:
            return jnp.moveaxis(logits.reshape(*batch, *logits.shape[1:]), 1, -2)

        return jax.tree.map(volume, self.network(slices.reshape(-1, *slices.shape[2:])))
