"""Batches of logits and labels that a fit reads again and again, from arrays or from files."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from calib_jax._checks import AnyArray, as_inputs
from calib_jax._labels import as_class_ids

Batch = tuple[Any, ...]  # (logits, labels) or (logits, labels, where)
Source = Iterable[Batch] | Callable[[], Iterable[Batch]]

_AGAIN = (
    "Pass a list of batches, or a function that returns a new iterator each time (`lambda: load(paths)`)."
)


class Batches:
    """An iterable of `(logits, labels, where)`. Each pass reads and checks the batches anew.

    Args:
        logits: `[batch, *spatial, classes]`, or, without `labels`, a list of batches, another iterable that can be
            iterated more than once, or a function that returns an iterator.
        labels: labels of `logits`.
        where: mask of `logits`.

    Attributes:
        classes: number of classes, the same in all batches.
    """

    def __init__(self, logits: Any, labels: Any, where: Any):
        self._begin = _passes(logits, labels, where)
        for batch in self._begin():
            self.classes = _checked(0, batch, None)[0].shape[-1]
            return
        raise ValueError(
            "no batches to fit to: the list is empty, or the function returned an iterator without any."
        )

    def __iter__(self) -> Iterator[tuple[AnyArray, AnyArray, AnyArray | None]]:
        for number, batch in enumerate(self._begin()):
            yield _checked(number, batch, self.classes)


def _passes(logits: Any, labels: Any, where: Any) -> Callable[[], Any]:
    """A function that begins a pass over the batches."""
    if labels is not None:
        return lambda: [(logits, labels, where)]
    if where is not None:
        raise TypeError(
            "where of batches belongs into them, as (logits, labels, where); got a separate where."
        )
    if isinstance(logits, Iterator):
        raise TypeError(f"{type(logits).__name__} can be read only once, and a fit reads it often. {_AGAIN}")
    if hasattr(logits, "shape") or not (callable(logits) or isinstance(logits, Iterable)):
        raise TypeError(
            f"logits without labels must be batches; got {type(logits).__name__}. Pass labels too. {_AGAIN}"
        )
    return logits if callable(logits) else lambda: logits


def _checked(number: int, batch: Any, classes: int | None) -> tuple[AnyArray, AnyArray, AnyArray | None]:
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        raise TypeError(
            f"batches must be tuples (logits, labels) or (logits, labels, where); got {type(batch).__name__} "
            f"as batch {number}."
        )
    arrays: Any = (x if x is None or isinstance(x, jax.Array) else np.asarray(x) for x in (*batch, None)[:3])
    logits, labels, where = arrays
    # Shapes alone: conversion to JAX arrays would compile a program for each of them.
    check = functools.partial(as_inputs, probs_name="logits", per_voxel=True)
    jax.eval_shape(check, logits, labels, where)
    if logits.shape[-1] < 2:
        raise ValueError(f"logits must have at least two classes for a softmax; got shape {logits.shape}.")
    if classes not in (None, logits.shape[-1]):
        raise ValueError(f"batch {number} has {logits.shape[-1]} classes, the first one has {classes}.")
    return logits, as_class_ids(labels), where
