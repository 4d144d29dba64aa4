"""Isotonic calibration: for each class a rising curve from predicted to observed probability."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from calib_jax._batches import Batches, Source
from calib_jax._checks import AnyArray, Labels
from calib_jax._eager import compiled
from calib_jax._labels import have_class
from calib_jax.binning import BinStatistics, bin_statistics

_CELLS = 1000  # equally wide in log-odds, in which probabilities near 0 and 1 lie apart
_FURTHEST = 15.0  # log-odds of the outermost cells
_LEAST = 1e-7  # a calibrated probability of 0 costs an infinite likelihood where it is wrong


def fit_isotonic(
    logits: Float[AnyArray, "batch *spatial classes"] | Source,
    labels: Labels | None = None,
    *,
    where: Any = None,
) -> Float[Array, "classes cells"]:
    """Rising curve of each class that minimises the mean squared error of its calibrated probabilities.

    One pass counts voxels and labels in 1000 cells of the log-odds of each class. The pool-adjacent-violators
    algorithm then fits the curve. Fit it on cases that the model was not trained on.

    Args:
        logits: `[batch, *spatial, classes]`, or batches, see `fit_temperature`.
        labels: class ids or one-hot or soft labels, see `fit_temperature`.
        where: voxels to count, boolean, `[batch, *spatial]`; None counts all. Elsewhere logits may be NaN.

    Returns:
        Calibrated probability at the centre of each cell, float32 `[classes, 1000]`, for `apply_isotonic`.

    Raises:
        TypeError: on dtypes that do not fit, and on an iterator that can be read only once.
        ValueError: on shapes that do not fit, on counted logits that are NaN, and if no voxel is counted.

    Example:
        >>> labels = jnp.array([[0, 0, 0, 1]])
        >>> logits = jnp.log(jnp.full((1, 4, 2), jnp.array([0.9, 0.1])))
        >>> calibrated = apply_isotonic(logits, fit_isotonic(logits, labels))
        >>> [round(float(p), 4) for p in jax.nn.softmax(calibrated)[0, 0]]
        [0.75, 0.25]

    References:
        Zadrozny and Elkan, "Transforming Classifier Scores into Accurate Multiclass Probability Estimates",
        KDD 2002.
    """
    from scipy.optimize import isotonic_regression  # here, since its import takes long

    counts: np.ndarray | None = None
    for number, arrays in enumerate(Batches(logits, labels, where)):
        stats = jax.device_get(_cell_statistics(*arrays))
        if np.isnan(stats.prob_sum).any():
            raise ValueError(
                f"logits of batch {number} are NaN where they are counted. Mask such voxels with where."
            )
        found = np.stack([stats.count, stats.prob_sum, stats.label_sum]).astype(np.float64).sum(1)
        counts = found if counts is None else counts + found
    assert counts is not None
    if not counts[0].any():
        raise ValueError("no voxel to fit to: every one is masked by where, or has a label of no class.")
    centres = (np.arange(_CELLS) + 0.5) / _CELLS
    curves = []
    for count, position_sum, label_sum in counts.transpose(1, 0, 2):
        used = count > 0
        fitted = isotonic_regression(label_sum[used] / count[used], weights=count[used]).x
        curves.append(np.interp(centres, position_sum[used] / count[used], fitted))
    return jnp.asarray(np.clip(curves, _LEAST, 1 - _LEAST), jnp.float32)


def apply_isotonic(
    logits: Float[AnyArray, "*shape classes"], curves: Float[AnyArray, "classes cells"]
) -> Float[Array, "*shape classes"]:
    """Logarithms of the calibrated probabilities, which the softmax divides by their sum.

    Args:
        logits: logits or log-probabilities `[..., classes]`.
        curves: such as those of `fit_isotonic`.

    Returns:
        Logits of the shape and dtype of `logits`.

    Raises:
        ValueError: if `curves` have another number of classes.

    Example:
        >>> rising = jnp.linspace(0.1, 0.9, 1000)[None].repeat(2, 0)  # from 0.1 at log-odds -15 to 0.9 at 15
        >>> jax.nn.softmax(apply_isotonic(jnp.zeros(2), rising)).tolist()
        [0.5, 0.5]

    References:
        Zadrozny and Elkan, KDD 2002.
    """
    logits, curves = jnp.asarray(logits), jnp.asarray(curves, jnp.float32)
    if curves.ndim != 2 or len(curves) != logits.shape[-1]:
        raise ValueError(
            f"curves must have shape [{logits.shape[-1]}, cells], one curve for each class of logits of shape "
            f"{logits.shape}; got {curves.shape}."
        )
    cells = curves.shape[1]
    place = jnp.clip(_positions(logits) * cells - 0.5, 0, cells - 1)
    left = jnp.minimum(place.astype(jnp.int32), cells - 2)
    share = place - left.astype(jnp.float32)
    calibrated = []
    for c in range(len(curves)):
        low, high = curves[c][left[..., c]], curves[c][left[..., c] + 1]
        calibrated.append(low + share[..., c] * (high - low))
    return jnp.log(jnp.stack(calibrated, -1)).astype(logits.dtype)


@compiled()
def _cell_statistics(logits: Any, labels: Any, where: Any) -> BinStatistics:
    """Voxels, sum of positions and sum of labels in each cell, of each image and class."""
    counted = have_class(labels, logits)
    where = counted if where is None else counted & where
    return bin_statistics(_positions(logits), labels, num_bins=_CELLS, where=where)


def _positions(logits: Array) -> Float[Array, "*shape classes"]:
    """Log-odds of each class, as a share of the way from the first cell to the last one."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    others = jnp.maximum(-jnp.expm1(log_probs), jnp.finfo(jnp.float32).tiny)
    log_odds = log_probs - jnp.log(others)
    return (jnp.clip(log_odds, -_FURTHEST, _FURTHEST) + _FURTHEST) / (2 * _FURTHEST)
