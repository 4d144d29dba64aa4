"""Functions that JAX has renamed, under one name for every version that the library supports."""

from typing import Any

import jax
import jax.experimental
from jax import lax
from jaxtyping import Array

# JAX 0.8 moved it out of `jax.experimental`.
_x64: Any = jax if hasattr(jax, "enable_x64") else jax.experimental
enable_x64 = _x64.enable_x64


def as_varying(x: Array, axis_name: str | tuple[str, ...]) -> Any:
    """`x`, equal on all devices of a mesh axis, as an array that may differ between them."""
    if hasattr(lax, "pcast"):
        return lax.pcast(x, axis_name, to="varying")
    return lax.pvary(x, axis_name)  # pyright: ignore[reportAttributeAccessIssue] (before JAX 0.9)
