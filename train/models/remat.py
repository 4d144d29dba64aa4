"""Memory for time: a network's units computed again in the backward pass, instead of keeping what they computed.

A unit is a module whose `__call__` is decorated by `recomputable`. Outside `rematerialised()` that changes nothing.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from flax import nnx

_wanted = ContextVar("rematerialised", default=False)


@contextmanager
def rematerialised(wanted: bool = True) -> Iterator[None]:
    """Of units traced in this context only the inputs are kept for the backward pass."""
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def recomputable(call: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a module's `__call__` one that `rematerialised` applies to; units inside it are part of it."""

    @functools.wraps(call)
    def maybe_again(module: nnx.Module, *args: Any) -> Any:
        if not _wanted.get():
            return call(module, *args)
        with rematerialised(False):
            return nnx.remat(call)(module, *args)

    return maybe_again
