"""Switches of JAX that the trainer's arithmetic is written for."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

_SWITCHES = {
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
}
_config: Any = jax.config


@contextlib.contextmanager
def numerics() -> Iterator[None]:
    """While in this context, a run computes the same numbers whatever JAX's switches were set to.

    Flax and optax depend on implicit promotion, and some of their random draws on the default float. The switches
    are set for all threads, since a context of JAX would hold for one thread alone.
    """
    before = {name: getattr(_config, name) for name in _SWITCHES}
    try:
        for name, value in _SWITCHES.items():
            _config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            _config.update(name, value)
