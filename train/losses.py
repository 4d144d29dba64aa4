"""Losses by name: weighted sums of terms, as in `dice+0.5*ace(num_bins=15)`."""

import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

import calib_jax
from train.errors import InputError, describe
from train.plugins import Call, parse_call, split_outside_parentheses
from train.terms import Term, find_term

# Class ids of each region.
Regions = tuple[tuple[int, ...], ...]
_QUOTED = re.compile("""('[^']*'|"[^"]*")""")


@dataclass(frozen=True, eq=False)
class WeightedTerm:
    """A term of a loss, with its weight and its arguments.

    Attributes:
        weight: a positive number.
        call: the name and arguments, as the user wrote them.
        term: what the name stands for.
    """

    weight: float
    call: Call
    term: Term

    @property
    def name(self) -> str:
        """The term's name, which is its column in `log.csv`."""
        return self.call.name

    def arguments(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the call; `defaults` apply to the parameters that the call leaves out."""
        known = {name: value for name, value in defaults.items() if name in self.term.parameters}
        return {**known, **self.term.fixed, **self.call.arguments}

    def value(self, logits: Array, labels: Array, arguments: Mapping[str, Any]) -> Array:
        """Calls the term's function.

        Raises:
            InputError: if the function fails, or does not return a scalar.
        """
        try:
            value = jnp.asarray(self.term.function(logits, labels, **arguments))
        except Exception as error:
            file = getattr(sys.modules.get(self.name.partition(":")[0]), "__file__", None)
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == file]
            place = f" ({file}, line {lines[-1]})" if lines else ""
            raise InputError(f"Loss term {self.name} failed: {describe(error)}{place}") from error
        if value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
            raise InputError(
                f"Loss term {self.name} returned {value.dtype} of shape {value.shape}: return a float scalar, "
                "such as the mean over images and classes."
            )
        return value


@dataclass(frozen=True, eq=False)
class Loss:
    """A weighted sum of terms.

    Attributes:
        name: the loss as the user wrote it, without spaces.
        terms: terms with their weights.
        ignore_empty_classes: whether calibration terms count classes without a voxel in an image as calibrated,
            unless a term says otherwise itself.
        regions: class ids of each output channel of a network with sigmoids; empty for a softmax over classes.
    """

    name: str
    terms: tuple[WeightedTerm, ...]
    ignore_empty_classes: bool = False
    regions: Regions = ()

    def parts(
        self,
        logits: Float[Array, "batch *spatial classes"] | tuple[Float[Array, "batch *_ classes"], ...],
        labels: Int[Array, "batch *spatial"] | Float[Array, "batch *spatial classes"],
        axis_name: str | None = None,
        where: Bool[Array, "batch *spatial"] | None = None,
    ) -> dict[str, Array]:
        """Each term by name, unweighted. Deep supervision averages the levels by `level_weights`.

        Args:
            logits: scores of one level, or of several levels, the finest first.
            labels: class ids or soft labels on the finest level's grid; coarser levels take the nearest voxels.
            axis_name: inside `shard_map`, the mesh axis over which images are split.
            where: voxels to count, on the grid of the labels; None counts all. With a mask, each term is computed
                per image and then averaged. So images weigh alike however many of their voxels count, and the loss
                does not depend on which device holds which image. An image without a counted voxel costs nothing.

        Raises:
            InputError: if a term cannot be computed, or is not a scalar.
        """
        if isinstance(logits, tuple):
            levels = []
            for level in logits:
                coarse = partial(nearest, sizes=level.shape[1:-1])
                there = None if where is None else coarse(where)
                levels.append(self.parts(level, coarse(labels), axis_name, there))
            weights = jnp.array(level_weights(len(levels)), jnp.float32)
            return jax.tree.map(lambda *terms: jnp.dot(weights, jnp.stack(terms)), *levels)
        if where is None:
            return self._parts_of_level(logits, labels, axis_name)

        def of_image(logits: Array, labels: Array, where: Array) -> dict[str, Array]:
            return self._parts_of_level(logits[None], labels[None], axis_name, where[None])

        return jax.tree.map(jnp.mean, jax.vmap(of_image)(logits, labels, where))

    def _parts_of_level(
        self, logits: Array, labels: Array, axis_name: str | None, where: Array | None = None
    ) -> dict[str, Array]:
        defaults = {"ignore_empty_classes": self.ignore_empty_classes}
        if self.regions:
            logits, labels = as_pairs(logits, labels, self.regions)
            where = None if where is None else jnp.repeat(where, len(self.regions), axis=0)
            defaults["include_background"] = False
        supplied = {k: v for k, v in {"where": where, "axis_name": axis_name}.items() if v is not None}
        shared = [term for term in self.terms if term.term.part]
        parts = _shared_parts(shared, logits, labels, defaults, supplied) if shared else {}
        for term in self.terms:
            if term not in shared:
                parts[term.name] = term.value(logits, labels, {**term.arguments(defaults), **supplied})
        return parts

    def total(self, parts: dict[str, Array], ace_scale: float | Array = 1.0) -> Array:
        """The sum that is minimised; `ace_scale` scales the calibration terms, which set in gradually."""
        weighted = [
            term.weight * (ace_scale if term.term.is_calibration else 1.0) * parts[term.name]
            for term in self.terms
        ]
        return jnp.stack(weighted).sum()


def _shared_parts(
    terms: Sequence[WeightedTerm],
    logits: Array,
    labels: Array,
    defaults: Mapping[str, Any],
    supplied: Mapping[str, Any],
) -> dict[str, Array]:
    """The terms that share one softmax, by name."""
    options = {
        term.term.options[name]: value for term in terms for name, value in term.arguments(defaults).items()
    }
    try:
        parts = calib_jax.segmentation_loss_parts(
            logits, labels, [term.term.part for term in terms], **options, **supplied
        )
    except (TypeError, ValueError) as error:
        names = ", ".join(term.name for term in terms)
        raise InputError(f"Loss terms {names} failed: {describe(error)}") from error
    return {term.name: parts[term.term.part] for term in terms}


def as_pairs(
    logits: Float[Array, "batch *spatial regions"],
    labels: Int[Array, "batch *spatial"] | Float[Array, "batch *spatial classes"],
    regions: Regions,
) -> tuple[Float[Array, "images *spatial two"], Shaped[Array, "images *_"]]:
    """Sigmoids as softmaxes: each region of each image becomes an image of two classes, outside and inside.

    sigmoid(x) is the softmax over the scores (0, x). The result has batch * regions images; the regions of an image
    follow one another.

    Args:
        logits: one score per region.
        labels: class ids, or soft labels. The share of a region is the sum of the shares of its classes.
        regions: class ids of each region.

    Returns:
        Logits of two classes, and labels: class ids 0 and 1, or the shares of outside and inside.

    Example:
        >>> logits, labels = as_pairs(jnp.array([[[0.5, -1.0]]]), jnp.array([[2]]), ((1, 2), (1,)))
        >>> logits.tolist(), labels.tolist()
        ([[[0.0, 0.5]], [[0.0, -1.0]]], [[1], [0]])
    """
    if labels.ndim == logits.ndim:
        share = jnp.stack([labels[..., list(ids)].sum(-1) for ids in regions], 1)
        members = jnp.stack([1 - share, share], -1)
    else:
        members = jnp.stack([jnp.isin(labels, jnp.array(ids, labels.dtype)) for ids in regions], 1)
        members = members.astype(jnp.int32)
    scores = jnp.moveaxis(logits, -1, 1)
    pairs = jnp.stack([jnp.zeros_like(scores), scores], -1)
    return pairs.reshape(-1, *pairs.shape[2:]), members.reshape(-1, *members.shape[2:])


def level_weights(levels: int) -> list[float]:
    """Weights of the loss at each level, the finest first: 1, 1/2, 1/4, ..., scaled to sum to 1.

    Example:
        >>> level_weights(2)
        [0.6666666666666666, 0.3333333333333333]
    """
    weights = [0.5**level for level in range(levels)]
    return [weight / sum(weights) for weight in weights]


def nearest(labels: Shaped[Array, "batch *fine"], sizes: Sequence[int]) -> Shaped[Array, "batch *coarse"]:
    """Labels on a coarser grid: the voxel nearest to each block's centre, as PyTorch's `nearest-exact` takes it.

    Args:
        labels: class ids, or soft labels with the classes behind the grid's axes.
        sizes: sizes of the coarser grid, which divide those of the finer one.

    Example:
        >>> nearest(jnp.arange(8)[None], (4,)).tolist()
        [[1, 3, 5, 7]]
    """
    steps = [fine // coarse for fine, coarse in zip(labels.shape[1:], sizes, strict=False)]
    return labels[:, *(slice(step // 2, None, step) for step in steps)]


def parse_loss(name: str, ignore_empty_classes: bool = False) -> Loss:
    """Parses a loss: terms joined by `+`, each with an optional weight and optional parameters.

    Args:
        name: the loss, such as `dice+0.5*ace(num_bins=15)`. `train.terms` lists the terms.
        ignore_empty_classes: as in `Loss`.

    Raises:
        InputError: if a term is unknown, stands twice (`softace` is `ace` with soft bins), has a parameter that
            does not fit, or has no positive weight.

    Example:
        >>> [(term.weight, term.name) for term in parse_loss("dice+0.5*ace").terms]
        [(1.0, 'dice'), (0.5, 'ace')]
    """
    terms = tuple(_parse_term(text) for text in split_outside_parentheses(name, "+"))
    parts = [term.term.part or term.name for term in terms]
    if len(set(parts)) < len(parts):
        raise InputError(
            f"Loss {name!r} names a term twice (softace is ace with soft bins); give each term once."
        )
    without_spaces = "".join(
        text if index % 2 else text.replace(" ", "") for index, text in enumerate(_QUOTED.split(name))
    )
    return Loss(without_spaces, terms, ignore_empty_classes)


def _parse_term(text: str) -> WeightedTerm:
    *weights, called = split_outside_parentheses(text, "*")
    call = parse_call(called)
    term = find_term(call)
    try:
        (weight,) = map(float, weights or ("1",))
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise InputError(
            f"Weight of loss term {text.strip()!r} must be one positive number, as in 0.5*{call.name}."
        )
    return WeightedTerm(weight, call, term)
