"""Losses by name: `dice`, `dice+ace`, `dice+ce+0.5*softace`."""

import re
from dataclasses import dataclass

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

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
_TERM = re.compile(r"(?:(?P<weight>[0-9.eE-]+)\*)?(?P<name>[a-z]+)")


@dataclass(frozen=True)
class Loss:
    """A weighted sum of terms, named as the user wrote it."""

    name: str
    weights: tuple[tuple[str, float], ...]

    def parts(
        self,
        logits: Float[Array, "batch *spatial classes"],
        labels: Int[Array, "batch *spatial"] | Float[Array, "batch *spatial classes"],
        axis_name: str | None = None,
    ) -> dict[str, Array]:
        """Each term by name, unweighted; inside `shard_map`, images may be split over the mesh axis `axis_name`."""
        names = [name for name, _ in self.weights]
        binning = "soft" if "softace" in names else "hard"
        parts = calib_jax.segmentation_loss_parts(
            logits, labels, [TERMS[name] for name in names], binning=binning, axis_name=axis_name
        )
        return {name: parts[TERMS[name]] for name in names}

    def total(self, parts: dict[str, Array], ace_scale: float | Array = 1.0) -> Array:
        """The sum that is minimised; `ace_scale` lets the calibration term set in gradually."""
        scale = {"ace": ace_scale}
        weighted = [weight * scale.get(TERMS[name], 1.0) * parts[name] for name, weight in self.weights]
        return jnp.stack(weighted).sum()


def check_splittable(loss: Loss, mesh: Mesh) -> None:
    """Raises `InputError` for terms that look at neighbours where the mesh splits volumes between them."""
    looking = [name for name, _ in loss.weights if name in ("svls", "nacl")]
    if looking and mesh.shape[SPACE] > 1:
        raise InputError(
            f"Loss term {looking[0]} looks at neighbouring voxels, which lie on other devices with "
            f"space={mesh.shape[SPACE]}: split the batch (data, fsdp) instead, or choose another term."
        )


def parse_loss(name: str) -> Loss:
    """The loss called `name`: terms joined by `+`, each with an optional weight, as in `dice+0.5*ace`.

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
    return Loss(name.replace(" ", ""), tuple(weights))


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
