"""What a call may look like, checked on shapes, dtypes and options alone, never on traced values."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

AnyArray = Array | np.ndarray
Probs = Float[AnyArray, "batch *spatial classes"]
Labels = Num[AnyArray, "batch *spatial"] | Num[AnyArray, "batch *spatial classes"]
Mask = Bool[AnyArray, "batch *spatial"] | Bool[AnyArray, "batch *spatial classes"]


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


def as_inputs(
    probs: Any, labels: Any, where: Any, *, probs_name: str = "probs"
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Arrays of agreeing shape and sensible dtype: `probs`, `labels` and `where` (or None), or an error."""
    probs, labels = jnp.asarray(probs), jnp.asarray(labels)
    if not jnp.issubdtype(probs.dtype, jnp.floating):
        raise TypeError(
            f"{probs_name} must be floating point, [batch, *spatial, classes]; got {probs.dtype}."
        )
    if probs.ndim < 2 or 0 in probs.shape:
        raise ValueError(
            f"{probs_name} must have shape [batch, *spatial, classes] without empty axes; got {probs.shape}."
        )
    _check_labels(labels, probs, probs_name)
    return probs, labels, None if where is None else _checked_mask(where, probs, probs_name)


def check_voxel_mask(where: jax.Array | None, probs: jax.Array) -> None:
    """Raises if a mask has classes, where a voxel counts with all its classes or with none."""
    if where is not None and where.ndim == probs.ndim:
        raise ValueError(
            f"where must have shape {probs.shape[:-1]}, one entry per voxel: a voxel counts with all its classes "
            f"or with none; got {where.shape}."
        )


def _check_labels(labels: jax.Array, probs: jax.Array, probs_name: str) -> None:
    if jnp.issubdtype(labels.dtype, jnp.complexfloating):
        raise TypeError(f"labels must be class ids or a one-hot or soft array; got {labels.dtype}.")
    if labels.shape == probs.shape:
        return
    if labels.shape != probs.shape[:-1]:
        raise ValueError(
            f"labels must be class ids of shape {probs.shape[:-1]} or one-hot / soft of shape {probs.shape}, "
            f"to go with {probs_name} of shape {probs.shape}; got {labels.shape}. Axes are "
            "[batch, *spatial, classes]: move a channel-first array with jnp.moveaxis(x, 1, -1)."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"labels of shape {labels.shape} are read as class ids and must be integers; got {labels.dtype}. "
            "Cast them with labels.astype(jnp.int32)."
        )


def _checked_mask(where: Any, probs: jax.Array, probs_name: str) -> jax.Array:
    where = jnp.asarray(where)
    if where.dtype != jnp.bool_:
        raise TypeError(f"where must be boolean (True = count this voxel); got {where.dtype}.")
    if where.shape not in (probs.shape, probs.shape[:-1]):
        raise ValueError(
            f"where must have shape {probs.shape[:-1]} or {probs.shape}, to go with {probs_name} of shape "
            f"{probs.shape}; got {where.shape}."
        )
    return where
