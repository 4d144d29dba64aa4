"""Checks of arguments: of shapes, dtypes and options always, of array values only if they are concrete."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Num

from calib_jax._labels import are_dense, as_class_ids, check_labels
from calib_jax._parts import split_alike

AnyArray = Array | np.ndarray
Probs = Float[AnyArray, "batch *spatial classes"]
Labels = Num[AnyArray, "batch *spatial"] | Num[AnyArray, "batch *spatial classes"]
Mask = Bool[AnyArray, "batch *spatial"] | Bool[AnyArray, "batch *spatial classes"]

# Rounding may put a probability outside [0, 1] by one unit of float16 at 1 (files often hold float32 values that
# were computed in half precision), or by four units of its own dtype.
_ROUNDING = 1e-3
_UNITS = 4


def check_choice(name: str, value: Any, accepted: Collection[Any]) -> None:
    """Raises unless `value` is one of `accepted`."""
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}; got {value!r}.")


def check_size(name: str, value: Any) -> None:
    """Raises unless `value` is a static positive integer."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(
            f"{name} must be a Python int, since it sets a shape; got {type(value).__name__}. "
            "Under jit, mark it with static_argnames."
        )
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}.")


def check_flag(name: str, value: Any) -> None:
    """Raises unless `value` is True or False: the string "False" would count as True."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False; got {value!r}.")


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """Raises unless `value` is a finite number in [low, high]. A traced number passes."""
    if isinstance(value, Tracer):
        return
    kind = jnp.result_type(value) if isinstance(value, int | float | np.generic | AnyArray) else None
    if kind is None or jnp.ndim(value) or kind == jnp.bool_ or not jnp.issubdtype(kind, jnp.number):
        raise TypeError(f"{name} must be a number; got {value!r}.")
    number = float(value)
    if not (math.isfinite(number) and low <= number <= high):
        accepted = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {'finite' if low == -math.inf else accepted}; got {number}.")


def check_weights(name: str, weights: Any) -> None:
    """Raises unless `weights` are finite, not negative and not all zero. Traced weights pass."""
    if isinstance(weights, Tracer):
        return
    values = np.asarray(weights, np.float64)
    if not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
        raise ValueError(
            f"{name} must be finite numbers of at least 0, one of them above 0; got {values.tolist()}."
        )


def check_values(arguments: Mapping[str, Any]) -> None:
    """Raises if probabilities or dense labels lie outside [0, 1] by more than rounding.

    Masked values may be anything. NaN passes and shows in the result.

    Args:
        arguments: concrete arrays whose shapes agree: `probs` or `logits`, `labels`, `where`; or `predictions`,
            class ids or probabilities, in place of the first.
    """
    where = arguments.get("where")
    if "predictions" in arguments:
        for name in ("predictions", "labels"):
            if jnp.issubdtype(arguments[name].dtype, jnp.floating):
                _check_unit_interval(name, arguments[name], where, "Cast class ids to integers.")
        return
    values = arguments.get("logits")
    if values is None:
        values = arguments["probs"]
        _check_unit_interval(
            "probs", values, where, "Apply jax.nn.softmax to logits, and divide percent by 100."
        )
    labels = arguments["labels"]
    if are_dense(labels, values):
        _check_unit_interval(
            "labels", labels, where, "Divide masks of 0 and 255 by 255, and mask voxels to ignore with where."
        )


def as_inputs(
    probs: Any, labels: Any, where: Any, *, probs_name: str = "probs", per_voxel: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """`probs`, `labels` and `where` (or None) as arrays whose shapes and dtypes agree, or an error.

    Args:
        probs: the caller's argument `probs_name`.
        labels: as they are given.
        where: as it is given.
        probs_name: name for error messages.
        per_voxel: whether `where` must have no axis of classes.
    """
    probs, labels = jnp.asarray(probs), jnp.asarray(as_class_ids(labels))
    if not jnp.issubdtype(probs.dtype, jnp.floating):
        raise TypeError(
            f"{probs_name} must be floating point, [batch, *spatial, classes]; got {probs.dtype}."
        )
    if probs.ndim < 2 or 0 in probs.shape:
        raise ValueError(
            f"{probs_name} must have shape [batch, *spatial, classes] without empty axes; got {probs.shape}."
        )
    check_labels(labels, probs, probs_name)
    if where is None:
        probs, labels = split_alike(probs, labels)
        return probs, labels, None
    where = jnp.asarray(where)
    if where.dtype != jnp.bool_:
        raise TypeError(f"where must be boolean (True = count this voxel); got {where.dtype}.")
    if where.shape not in (probs.shape, probs.shape[:-1]):
        raise ValueError(
            f"where must have shape {probs.shape[:-1]} or {probs.shape}, to go with {probs_name} of shape "
            f"{probs.shape}; got {where.shape}."
        )
    if where.ndim == probs.ndim and per_voxel:
        raise ValueError(
            f"where must have shape {probs.shape[:-1]}, one entry per voxel: a voxel counts with all its classes "
            f"or with none; got {where.shape}."
        )
    probs, labels, where = split_alike(probs, labels, where)
    return probs, labels, where


def _check_unit_interval(name: str, values: Any, where: Any, remedy: str) -> None:
    if values.dtype == jnp.bool_ or not getattr(values, "is_fully_addressable", True):
        return
    values = np.asarray(values)  # no copy on CPU, and no program per shape, as a reduction in JAX would be
    floating = jnp.issubdtype(values.dtype, jnp.floating)
    slack = max(_ROUNDING, _UNITS * float(jnp.finfo(values.dtype).eps)) if floating else 0
    low, high = _extremes(values)
    if low >= -slack and high <= 1 + slack:
        return
    values = values.astype(np.float32)
    outside = (values < -slack) | (values > 1 + slack)
    if where is not None:
        outside &= np.asarray(where) if where.ndim == values.ndim else np.asarray(where)[..., None]
    if not outside.any():
        return
    first = np.unravel_index(outside.argmax(), outside.shape)
    found = values[outside]
    raise ValueError(
        f"{name} must lie in [0, 1], but {found.size} of {values.size} values do not: they reach from "
        f"{found.min():.6g} to {found.max():.6g}, the first is {values[first]:.6g} at "
        f"[{', '.join(map(str, first))}]. {remedy}"
    )


def _extremes(values: np.ndarray) -> tuple[Any, Any]:
    """Smallest and largest value. They are arbitrary if no value is negative or a value is NaN."""
    if values.dtype.itemsize != 2 or not jnp.issubdtype(values.dtype, jnp.floating):
        return values.min(), values.max()
    # NumPy compares half precision slowly. The bits of the most negative number are the largest unsigned integer,
    # the bits of the most positive number the largest signed one.
    bits = np.array([values.view(np.uint16).max(), values.view(np.int16).max().astype(np.uint16)])
    low, high = bits.view(values.dtype).astype(np.float32)
    return low, high
