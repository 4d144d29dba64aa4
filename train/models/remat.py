"""Rematerialisation: the backward pass computes a network's units again instead of storing their results.

A unit is a module whose `__call__` has the decorator `recomputable`. Outside `rematerialised()` the decorator
changes nothing.
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
    """A context in which traced units store only their inputs for the backward pass."""
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def recomputable(call: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the `__call__` of a module that `rematerialised` applies to. Units inside it belong to it."""

    @functools.wraps(call)
    def maybe_again(module: nnx.Module, *args: Any) -> Any:
        if not _wanted.get():
            return call(module, *args)
        with rematerialised(False):
            return nnx.remat(call)(module, *args)

    return maybe_again
