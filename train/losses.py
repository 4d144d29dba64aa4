"""Losses by name: `dice`, `dice+ace`, `dice+ce+0.5*softace`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Shaped

import calib_jax
from train.errors import InputError
from train.sharding import SPACE

# Each term as the part of `calib_jax.segmentation_loss_parts`.
TERMS = {
    "dice": "dice",
    "ce": "cross_entropy",
    "ace": "ace",
    "softace": "ace",  # with soft bins
    "focal": "focal",
    "ls": "label_smoothing",
    "svls": "svls",
    "mbls": "mbls",
    "nacl": "nacl",
    "dscpp": "dsc_plus_plus",
}
# Class ids of each region.
Regions = tuple[tuple[int, ...], ...]
_TERM = re.compile(r"(?:(?P<weight>[0-9.eE-]+)\*)?(?P<name>[a-z]+)")


@dataclass(frozen=True)
class Loss:
    """A weighted sum of terms, named as the user wrote it.

    Attributes:
        name: as the user wrote it.
        weights: of the terms, by name.
        ignore_empty_classes: as in `parse_loss`.
        regions: what the channels of the logits stand for, each for a sigmoid; empty for a softmax over classes.
    """

    name: str
    weights: tuple[tuple[str, float], ...]
    ignore_empty_classes: bool = False
    regions: Regions = ()

    def parts(
        self,
        logits: Float[Array, "batch *spatial classes"] | tuple[Float[Array, "batch *_ classes"], ...],
        labels: Int[Array, "batch *spatial"] | Float[Array, "batch *spatial classes"],
        axis_name: str | None = None,
        where: Bool[Array, "batch *spatial"] | None = None,
    ) -> dict[str, Array]:
        """Each term by name, unweighted; of several logits (deep supervision) the mean weighted by `level_weights`.

        Args:
            logits: of one level, or of several, the finest first.
            labels: class ids or soft labels on the finest level's grid; coarser ones take the nearest voxels.
            axis_name: inside `shard_map`, the mesh axis over which images are split.
            where: voxels to count, on the grid of the labels; None counts all. Given, each term is the mean over
                images of that of one image: images count alike however many of their voxels do, and the loss does
                not depend on which device holds which image. An image of which no voxel counts costs nothing.
        """
        if isinstance(logits, tuple):
            levels = [
                self.parts(
                    level,
                    nearest(labels, level.shape[1:-1]),
                    axis_name,
                    None if where is None else nearest(where, level.shape[1:-1]),
                )
                for level in logits
            ]
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
        names = [name for name, _ in self.weights]
        binning = "soft" if "softace" in names else "hard"
        options: dict[str, Any] = {}
        if self.regions:
            logits, labels = as_pairs(logits, labels, self.regions)
            where = None if where is None else jnp.repeat(where, len(self.regions), axis=0)
            options = {"dice_include_background": False, "include_background": False}
        parts = calib_jax.segmentation_loss_parts(
            logits,
            labels,
            [TERMS[name] for name in names],
            where=where,
            binning=binning,
            ignore_empty_classes=self.ignore_empty_classes,
            axis_name=axis_name,
            **options,
        )
        return {name: parts[TERMS[name]] for name in names}

    def total(self, parts: dict[str, Array], ace_scale: float | Array = 1.0) -> Array:
        """The sum that is minimised; `ace_scale` lets the calibration term set in gradually."""
        scale = {"ace": ace_scale}
        weighted = [weight * scale.get(TERMS[name], 1.0) * parts[name] for name, weight in self.weights]
        return jnp.stack(weighted).sum()


def as_pairs(
    logits: Float[Array, "batch *spatial regions"],
    labels: Int[Array, "batch *spatial"] | Float[Array, "batch *spatial classes"],
    regions: Regions,
) -> tuple[Float[Array, "images *spatial two"], Shaped[Array, "images *_"]]:
    """Sigmoids as softmaxes: each region of each image becomes an image of two classes, outside and inside.

    sigmoid(x) is the softmax over the scores (0, x). The regions of an image follow one another, so that images are
    batch * regions.

    Args:
        logits: of each region.
        labels: class ids, which become memberships, or soft labels, whose shares add up to a region's.
        regions: class ids of each.

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
    """Of the loss at each level, the finest first: 1, 1/2, 1/4, ..., scaled to sum to 1.

    Example:
        >>> level_weights(2)
        [0.6666666666666666, 0.3333333333333333]
    """
    weights = [0.5**level for level in range(levels)]
    return [weight / sum(weights) for weight in weights]


def nearest(labels: Shaped[Array, "batch *fine"], sizes: Sequence[int]) -> Shaped[Array, "batch *coarse"]:
    """Labels on a coarser grid: in each block the voxel nearest to its centre, as PyTorch's `nearest-exact`.

    Args:
        labels: class ids, or soft labels, whose classes follow the grid's axes.
        sizes: of the coarser grid; they divide the finer one's.

    Example:
        >>> nearest(jnp.arange(8)[None], (4,)).tolist()
        [[1, 3, 5, 7]]
    """
    steps = [fine // coarse for fine, coarse in zip(labels.shape[1:], sizes, strict=False)]
    return labels[:, *(slice(step // 2, None, step) for step in steps)]


def check_splittable(loss: Loss, mesh: Mesh) -> None:
    """Raises `InputError` for terms that look at neighbours where the mesh splits volumes between them."""
    looking = [name for name, _ in loss.weights if name in ("svls", "nacl")]
    if looking and mesh.shape[SPACE] > 1:
        raise InputError(
            f"Loss term {looking[0]} looks at neighbouring voxels, which lie on other devices with "
            f"space={mesh.shape[SPACE]}: split the batch (data, fsdp) instead, or choose another term."
        )


def parse_loss(name: str, ignore_empty_classes: bool = False) -> Loss:
    """The loss called `name`: terms joined by `+`, each with an optional weight, as in `dice+0.5*ace`.

    With `ignore_empty_classes` mL1-ACE takes a class that an image has no voxel of for calibrated there.

    Raises:
        InputError: if a term is unknown, stands twice (`softace` is `ace` with soft bins) or has no positive
            weight.

    Example:
        >>> parse_loss("dice+0.5*ace").weights
        (('dice', 1.0), ('ace', 0.5))
    """
    weights = [_parse_term(name, term.strip()) for term in name.split("+")]
    parts = [TERMS[term] for term, _ in weights]
    if len(set(parts)) < len(parts):
        raise InputError(
            f"Loss {name!r} names a term twice (softace is ace with soft bins); give each of them once."
        )
    return Loss(name.replace(" ", ""), tuple(weights), ignore_empty_classes)


def _parse_term(loss: str, text: str) -> tuple[str, float]:
    match = _TERM.fullmatch(text)
    if match is None or match["name"] not in TERMS:
        raise InputError(
            f"Unknown loss term {text!r} in {loss!r}; terms are {', '.join(TERMS)}, joined by '+' and weighted "
            "as in 'dice+0.5*ace'."
        )
    try:
        weight = float(match["weight"] or 1.0)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise InputError(f"Weight of {text!r} in loss {loss!r} must be a positive number.")
    return match["name"], weight
