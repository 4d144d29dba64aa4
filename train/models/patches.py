"""An image as patches that do not overlap, with the voxels of a patch as channels, and back."""

from math import prod

from jaxtyping import Array, Float


def to_patches(
    x: Float[Array, "batch *spatial channels"], sides: tuple[int, ...]
) -> Float[Array, "batch *coarse wide"]:
    """`[batch, *spatial, c]` to `[batch, *(spatial / sides), prod(sides) * c]`.

    Args:
        x: the image.
        sides: of a patch, along each axis; divisors of the image's sides.

    Example:
        >>> import jax.numpy as jnp
        >>> to_patches(jnp.ones((1, 4, 6, 5)), (2, 3)).shape
        (1, 2, 2, 30)
    """
    batch, *spatial, channels = x.shape
    coarse = [size // side for size, side in zip(spatial, sides, strict=True)]
    pairs = [size for pair in zip(coarse, sides, strict=True) for size in pair]
    split = x.reshape(batch, *pairs, channels)
    last = split.ndim - 1
    patches = split.transpose(0, *range(1, last, 2), *range(2, last, 2), last)
    return patches.reshape(batch, *coarse, prod(sides) * channels)


def from_patches(
    x: Float[Array, "batch *coarse wide"], sides: tuple[int, ...]
) -> Float[Array, "batch *spatial channels"]:
    """The inverse of `to_patches`.

    Example:
        >>> import jax.numpy as jnp
        >>> from_patches(jnp.ones((1, 2, 2, 30)), (2, 3)).shape
        (1, 4, 6, 5)
    """
    batch, *coarse, wide = x.shape
    ndim = len(sides)
    split = x.reshape(batch, *coarse, *sides, wide // prod(sides))
    pairs = [axis for i in range(ndim) for axis in (1 + i, 1 + ndim + i)]
    fine = [size * side for size, side in zip(coarse, sides, strict=True)]
    return split.transpose(0, *pairs, split.ndim - 1).reshape(batch, *fine, wide // prod(sides))
