"""Float32 sums that keep what they round away, and means."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Num

Pair = tuple[Float[Array, "*shape"], Float[Array, "*shape"]]
"""A sum, and what float32 rounded away from it."""


def as_pair(x: Float[Array, "*shape"]) -> Pair:
    """`x` as a sum that has rounded nothing away."""
    return x, jnp.zeros_like(x)


def add_pairs(a: Pair, b: Pair) -> Pair:
    """Adds two sums and keeps the rounding error of the addition.

    References:
        Knuth, "The Art of Computer Programming", volume 2, section 4.2.2 (TwoSum).
    """
    total = a[0] + b[0]
    added = total - a[0]
    return total, a[1] + b[1] + ((a[0] - (total - added)) + (b[0] - added))


def sum_pairs(x: Pair, axis: int) -> Pair:
    """Sum over `axis`, in any order."""
    zero = np.float32(0)
    high, low = lax.reduce(x, (zero, zero), add_pairs, (axis,))
    return high, low


def rounded(pair: Pair) -> Float[Array, "*shape"]:
    """The sum as one float32. Its rounding error is NaN where the sum is infinite, and is then left out."""
    high, low = pair
    return jnp.where(jnp.abs(high) < jnp.inf, high + low, high)  # Triton in JAX 0.7 does not know isfinite


@functools.partial(jax.jit, inline=True)
def mean_or_nan(total: Float[Array, "*shape"], count: Num[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`total / count`, NaN where nothing was counted. Gradients are finite."""
    count = count.astype(total.dtype)
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1), jnp.nan)
