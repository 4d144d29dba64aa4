"""The JAX settings that the trainer's arithmetic is written for."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

_SETTINGS = {
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
}
_config: Any = jax.config


@contextlib.contextmanager
def numerics() -> Iterator[None]:
    """Within this context, a run computes the same numbers whatever JAX's settings were before.

    Flax and optax depend on implicit promotion, and some of their random draws on the default float type. The
    settings hold for all threads; JAX's own contexts hold for one thread only.
    """
    before = {name: getattr(_config, name) for name in _SETTINGS}
    try:
        for name, value in _SETTINGS.items():
            _config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            _config.update(name, value)
