"""Segmentation metrics per image and class."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from calib_jax._checks import AnyArray


def dice_score(
    predictions: Int[AnyArray, "batch *spatial"], labels: Int[AnyArray, "batch *spatial"], *, num_classes: int
) -> Float[Array, "batch classes"]:
    """Dice overlap of two label maps, per image and class: 2 |A and B| / (|A| + |B|).

    Args:
        predictions: predicted class ids `[batch, *spatial]`.
        labels: true class ids, same shape.
        num_classes: number of classes, background included.

    Returns:
        Dice in [0, 1], `[batch, num_classes]`; NaN where a class is in neither map.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> dice_score(jnp.array([[0, 1, 1, 0]]), jnp.array([[0, 1, 0, 0]]), num_classes=3)
        Array([[0.8      , 0.6666667,       nan]], dtype=float32)

    References:
        Dice, "Measures of the Amount of Ecologic Association Between Species", 1945.
    """
    if predictions.shape != labels.shape:
        raise ValueError(
            f"predictions and labels must have one shape; got {predictions.shape}, {labels.shape}."
        )
    spatial = tuple(range(1, labels.ndim))
    scores = [_dice(predictions == c, labels == c, spatial) for c in range(num_classes)]
    return jnp.stack(scores, axis=-1)


def _dice(predicted: AnyArray, true: AnyArray, axes: tuple[int, ...]) -> Array:
    size = jnp.sum(predicted, axis=axes) + jnp.sum(true, axis=axes)
    overlap = jnp.sum(predicted & true, axis=axes)
    return jnp.where(size > 0, 2 * overlap / jnp.maximum(size, 1), jnp.nan)
