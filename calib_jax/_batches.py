"""Batches of logits and labels that a fit reads, once or again and again, from arrays or from files."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from calib_jax._checks import as_inputs
from calib_jax._labels import as_class_ids

Batch = tuple[Any, ...]  # (logits, labels), (logits, labels, where) or (logits, labels, where, image)
Source = Iterable[Batch] | Callable[[], Iterable[Batch]]

_FORMS = ("(logits, labels)", "(logits, labels, where)", "(logits, labels, where, image)")
_AGAIN = (
    "Pass a list of batches, or a function that returns a new iterator each time (`lambda: load(paths)`)."
)


@functools.lru_cache(maxsize=1024)
def _check(*arrays: jax.ShapeDtypeStruct | None) -> None:
    """Raises unless logits, labels and where fit together. Arrays instead of shapes would compile programs."""
    jax.eval_shape(functools.partial(as_inputs, probs_name="logits", per_voxel=True), *arrays)


class Batches:
    """An iterable of `(logits, labels, where)`, or `with_images` of `(logits, labels, where, image)`.

    Each pass reads and checks the batches anew.

    Args:
        logits: `[batch, *spatial, classes]`, or, without `labels`, a list of batches, another iterable that can be
            iterated more than once, or a function that returns an iterator.
        labels: labels of `logits`.
        where: mask of `logits`.
        image: image of `logits`, `[batch, *spatial, channels]`.
        with_images: whether batches may hold an image.
        least_classes: two for a softmax.

    Attributes:
        classes: number of classes, the same in all batches.
        channels: number of channels of the first image; 0 without an image.
    """

    def __init__(
        self,
        logits: Any,
        labels: Any,
        where: Any,
        image: Any = None,
        *,
        with_images: bool = False,
        least_classes: int = 2,
    ):
        self._begin = _passes(
            logits, labels, {"where": where, "image": image} if with_images else {"where": where}
        )
        self._forms = _FORMS if with_images else _FORMS[:2]
        self._least_classes = least_classes
        for batch in self._begin():
            logits, _, _, *images = self._checked(0, batch, None)
            self.classes = logits.shape[-1]
            self.channels = images[0].shape[-1] if images and images[0] is not None else 0
            return
        raise ValueError(
            "no batches to fit to: the list is empty, or the function returned an iterator without any."
        )

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for number, batch in enumerate(self._begin()):
            yield self._checked(number, batch, self.classes)

    def _checked(self, number: int, batch: Any, classes: int | None) -> tuple[Any, ...]:
        if not isinstance(batch, tuple | list) or not 2 <= len(batch) <= 1 + len(self._forms):
            raise TypeError(
                f"batches must be tuples {' or '.join(self._forms)}; got {type(batch).__name__} as batch {number}."
            )
        filled = (*batch, None, None)[: 1 + len(self._forms)]
        arrays: Any = (x if x is None or isinstance(x, jax.Array) else np.asarray(x) for x in filled)
        logits, labels, where, *image = arrays
        _check(*(x if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (logits, labels, where)))
        if logits.shape[-1] < self._least_classes:
            raise ValueError(
                f"logits must have at least two classes for a softmax; got shape {logits.shape}."
            )
        if classes not in (None, logits.shape[-1]):
            raise ValueError(f"batch {number} has {logits.shape[-1]} classes, the first one has {classes}.")
        return logits, as_class_ids(labels), where, *image


def _passes(logits: Any, labels: Any, more: Mapping[str, Any]) -> Callable[[], Any]:
    """A function that begins a pass over the batches."""
    if labels is not None:
        return lambda: [(logits, labels, *more.values())]
    for number, (name, value) in enumerate(more.items()):
        if value is not None:
            raise TypeError(
                f"{name} of batches belongs into them, as {_FORMS[number + 1]}; got a separate {name}."
            )
    if isinstance(logits, Iterator):
        raise TypeError(f"{type(logits).__name__} can be read only once, and a fit reads it often. {_AGAIN}")
    if hasattr(logits, "shape") or not (callable(logits) or isinstance(logits, Iterable)):
        raise TypeError(
            f"logits without labels must be batches; got {type(logits).__name__}. Pass labels too. {_AGAIN}"
        )
    return logits if callable(logits) else lambda: logits
