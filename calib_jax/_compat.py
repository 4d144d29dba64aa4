"""Functions that moved between versions of JAX."""

from typing import Any

from jax import lax
from jaxtyping import Array

try:
    from jax import enable_x64
except ImportError:  # before 0.8
    from jax.experimental import enable_x64  # pyright: ignore[reportAttributeAccessIssue]

__all__ = ["as_varying", "enable_x64"]


def as_varying(x: Array, axis_name: str | tuple[str, ...]) -> Any:
    """Casts an array that is equal on all devices of a mesh axis to one that may differ between them."""
    if hasattr(lax, "pcast"):
        return lax.pcast(x, axis_name, to="varying")
    return lax.pvary(x, axis_name)  # pyright: ignore[reportAttributeAccessIssue]
