"""Totals of data sets: sums of any number of images, encoded so that `merge` and `jax.lax.psum` lose no digits."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from calib_jax._sums.exact import add_pairs, as_pair, sum_pairs

_DIGIT = 20  # bits of a count's low part: `psum` over 2,047 devices does not overflow int32
_HIGH_BITS = 11  # bits after the leading one of a sum's high part: as many devices add up without rounding


class Count(NamedTuple):
    """A number of voxels beyond int32, without x64: `high * 2^20 + low`, exact to 2^51.

    Attributes:
        high: multiples of 2^20, int32.
        low: the rest, int32. It is below 2^20 except after `psum`, which adds without carrying.
    """

    high: Int[Array, "*shape"]
    low: Int[Array, "*shape"]

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> "Count":
        """No voxels."""
        return cls(*(jnp.zeros(shape, jnp.int32) for _ in cls._fields))

    @classmethod
    def of(cls, count: Int[Array, "*shape"]) -> "Count":
        """Encodes an int32 count."""
        return _carry(jnp.zeros_like(count), count)

    def merge(self, other: "Count") -> "Count":
        """Adds two counts."""
        a, b = _carry(*self), _carry(*other)
        return _carry(a.high + b.high, a.low + b.low)

    def over_images(self) -> "Count":
        """Sums over the first axis."""
        return _carry(self.high.sum(0, dtype=jnp.int32), self.low.sum(0, dtype=jnp.int32))

    def value(self) -> Float[Array, "*shape"]:
        """The count, rounded to float32."""
        high, low = _carry(*self)
        return high.astype(jnp.float32) * (1 << _DIGIT) + low.astype(jnp.float32)


class Sum(NamedTuple):
    """A sum of floats to 36 bits: `high + low`.

    Attributes:
        high: the leading 12 bits, float32, which plain addition, as by `psum`, hardly ever rounds.
        low: the rest, float32.
    """

    high: Float[Array, "*shape"]
    low: Float[Array, "*shape"]

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> "Sum":
        """The sum of nothing."""
        return cls(*(jnp.zeros(shape, jnp.float32) for _ in cls._fields))

    @classmethod
    def of(cls, high: Float[Array, "*shape"], low: Float[Array, "*shape"]) -> "Sum":
        """Encodes a pair. A sum that is not finite has no low part."""
        total, rest = add_pairs(as_pair(high), as_pair(low))
        leading = lax.reduce_precision(total, exponent_bits=8, mantissa_bits=_HIGH_BITS)
        return cls(leading, jnp.where(jnp.isfinite(leading), (total - leading) + rest, 0))

    def merge(self, other: "Sum") -> "Sum":
        """Adds two sums."""
        return Sum.of(*add_pairs(self, other))

    def over_images(self) -> "Sum":
        """Sums over the first axis."""
        return Sum.of(*sum_pairs((self.high, self.low), 0))

    def value(self) -> Float[Array, "*shape"]:
        """The sum, rounded to float32."""
        return self.high + self.low


def _carry(high: Array, low: Array) -> Count:
    return Count(high + (low >> _DIGIT), low & ((1 << _DIGIT) - 1))


def is_total(x: Any) -> bool:
    """Whether `x` is a `Count` or a `Sum`, the leaves of a state."""
    return isinstance(x, Count | Sum)
