"""Functions that moved between versions of JAX."""

from typing import Any

import jax
from jax import lax
from jaxtyping import Array

try:
    from jax import enable_x64
except ImportError:  # before 0.8
    from jax.experimental import enable_x64  # pyright: ignore[reportAttributeAccessIssue]

__all__ = ["as_varying", "enable_x64", "shape_from"]


def as_varying(x: Array, axis_name: str | tuple[str, ...]) -> Any:
    """Casts an array that is equal on all devices of a mesh axis to one that may differ between them."""
    if hasattr(lax, "pcast"):
        return lax.pcast(x, axis_name, to="varying")
    return lax.pvary(x, axis_name)  # pyright: ignore[reportAttributeAccessIssue]


def shape_from(inputs: Any, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An array that differs between the devices of a `shard_map` where one of the inputs does."""
    mixed = jax.eval_shape(lambda *arrays: sum(x.ravel()[0].astype(dtype) for x in arrays), *inputs)
    kinds = {name: getattr(mixed, name, None) for name in ("manual_axis_type", "vma")}
    return jax.ShapeDtypeStruct(shape, dtype, **{name: kind for name, kind in kinds.items() if kind})
