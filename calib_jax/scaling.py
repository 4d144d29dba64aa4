"""Post-hoc calibration: logits divided by a temperature, or scaled and shifted per class.

Fits run on the host, by L-BFGS on the mean negative log-likelihood of a validation set, which may be larger than
memory: each step is one or a few passes over its batches, each batch a compiled sum. Applying the parameters is a
pure function.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from calib_jax import metrics
from calib_jax._batches import Batches, Source
from calib_jax._checks import AnyArray, Labels
from calib_jax._eager import compiled
from calib_jax._labels import have_class, one_hot
from calib_jax._lbfgs import Evaluation, minimise
from calib_jax._sums.voxels import count_voxels, sum_in_chunks, sum_voxels

Logits = Float[AnyArray, "batch *spatial classes"]

_FURTHEST = 1e3  # where no optimum is finite: bound of 1 / T and T, and of the size of a scale or bias
_SLOPE = 1e-6  # of the logits' spread: slopes below it are rounding, and the best temperature is infinite
_FLAT = 1e-2  # squared spread of scaled logits, below which probabilities are nearly equal
_UNSETTLED = 0.1  # of log T: how far from the optimum the fit may end without a warning
_SEPARATED = 1e-3  # mean NLL, below which an extra pass checks whether scaled logits get every label right


class VectorScaling(NamedTuple):
    """Scaled logits are `scale * logits + bias`.

    Attributes:
        scale: `[classes]`.
        bias: `[classes]`.
    """

    scale: Float[AnyArray, "classes"]
    bias: Float[AnyArray, "classes"]


def fit_temperature(
    logits: Logits | Source,
    labels: Labels | None = None,
    *,
    where: Any = None,
    tolerance: float = 1e-6,
    max_steps: int = 100,
) -> Float[Array, ""]:
    """Temperature T that minimises the mean negative log-likelihood of softmax(logits / T).

    All classes share T, so that no predicted label changes. T > 1 makes probabilities less extreme. Fit T on cases
    that the model was not trained on.

    Args:
        logits: `[batch, *spatial, classes]`; or, without `labels`, the batches of a data set: a list (or another
            iterable that can be iterated more than once), or a function without arguments that returns an
            iterator, of tuples `(logits, labels)` or `(logits, labels, where)`. Each step reads the batches once
            or a few times and never holds them together. Batches may differ in shape; each shape is compiled once.
        labels: class ids `[batch, *spatial]`, or one-hot or soft labels of the shape of `logits`. Voxels of no
            class, whose id is outside `[0, classes)` or whose labels are all zero, are not counted.
        where: voxels to count, boolean, `[batch, *spatial]`; None counts all. Elsewhere logits may be NaN.
        tolerance: the fit ends where the gradient of the mean with respect to log T does not exceed it.
        max_steps: number of steps after which the fit ends anyway, with a warning.

    Returns:
        The temperature, a positive float32 scalar for `apply_temperature`. Its likelihood is at least that of
        T = 1. There may be no best temperature: if every label has the largest logit, the likelihood grows as T
        falls to 0; if labels have no larger logits than other classes, it grows with T; if logits do not differ
        within voxels, T changes nothing. Logits may also differ so little that the fit stops before it reaches
        the optimum. A `RuntimeWarning` then says which it is, and T is where the fit ended, within [1e-3, 1e3].

    Raises:
        TypeError: on dtypes that do not fit, and on an iterator that can be read only once.
        ValueError: on shapes that do not fit, on counted logits that are not finite, if no voxel is counted, and
            if a later pass over the batches does not count as many voxels as the first one.

    Example:
        >>> labels = jnp.array([[0, 0, 0, 1]])  # three in four are of the class said to have probability 0.9
        >>> logits = jnp.log(jnp.full((1, 4, 2), jnp.array([0.9, 0.1])))
        >>> temperature = fit_temperature(logits, labels)
        >>> scaled = jax.nn.softmax(apply_temperature(logits, temperature))[0, 0]
        >>> round(float(temperature), 3), [round(float(p), 4) for p in scaled]
        (2.0, [0.75, 0.25])

    References:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017. A temperature per voxel, by a network:
        Ding et al., "Local Temperature Scaling for Probability Calibration", ICCV 2021.
    """

    batches = Batches(logits, labels, where)

    def scaling(log_temperature: Array) -> VectorScaling:
        scale = jnp.broadcast_to(jnp.exp(-log_temperature), (batches.classes,))
        return VectorScaling(scale, jnp.zeros(batches.classes, jnp.float32))

    objective = _Objective(batches, scaling)
    log_temperature, end, unfinished = minimise(objective, jnp.zeros((), jnp.float32), tolerance, max_steps)
    temperature = jnp.exp(log_temperature)
    without = _without_best_temperature(objective, float(temperature), end)
    if message := without or unfinished:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return jnp.clip(temperature, 1 / _FURTHEST, _FURTHEST) if without else temperature


def fit_vector_scaling(
    logits: Logits | Source,
    labels: Labels | None = None,
    *,
    where: Any = None,
    tolerance: float = 1e-6,
    max_steps: int = 100,
) -> VectorScaling:
    """Scale and bias of each class that minimise the mean NLL of softmax(scale * logits + bias).

    There are twice as many parameters as classes, so predicted labels may change. A number added to all biases
    changes nothing, so they are made to sum to zero.

    Args:
        logits: `[batch, *spatial, classes]`, or batches, see `fit_temperature`.
        labels: class ids or one-hot or soft labels, see `fit_temperature`.
        where: voxels to count, boolean, `[batch, *spatial]`; None counts all. Elsewhere logits may be NaN.
        tolerance: the fit ends where no component of the gradient of the mean exceeds it.
        max_steps: number of steps after which the fit ends anyway, with a warning.

    Returns:
        `VectorScaling`, float32, for `apply_vector_scaling`. Its likelihood is at least that of the logits as they
        are. There may be no best scaling: the bias of a class without labels falls without end, and scales grow
        without end if they separate one class, or all classes, from the others. Logits may also differ too little
        for the fit to find their scale. A `RuntimeWarning` then says which it is, and the parameters are where the
        fit ended, within [-1e3, 1e3].

    Raises:
        TypeError, ValueError: as `fit_temperature`.

    Example:
        >>> labels = jnp.array([[0, 0, 0, 1]])
        >>> params = fit_vector_scaling(jnp.zeros((1, 4, 2)), labels)
        >>> [round(float(p), 4) for p in jax.nn.softmax(apply_vector_scaling(jnp.zeros(2), params))]
        [0.75, 0.25]

    References:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    batches = Batches(logits, labels, where)
    objective = _Objective(batches, lambda params: params)
    start = VectorScaling(*(jnp.full(batches.classes, x, jnp.float32) for x in (1, 0)))
    params, end, unfinished = minimise(objective, start, tolerance, max_steps)
    without = _without_best_scaling(objective, params, end, tolerance)
    if message := without or unfinished:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    params = params._replace(bias=params.bias - params.bias.mean())
    return jax.tree.map(lambda x: jnp.clip(x, -_FURTHEST, _FURTHEST), params) if without else params


def apply_temperature(
    logits: Float[AnyArray, "*shape"], temperature: Float[AnyArray, ""] | float
) -> Float[Array, "*shape"]:
    """Logits divided by the temperature: logits / T.

    Args:
        logits: logits of any shape.
        temperature: positive scalar, such as that of `fit_temperature`.

    Returns:
        Scaled logits of the shape and dtype of `logits`.

    Raises:
        ValueError: if `temperature` is no scalar, or is known (not traced) and not positive.

    Example:
        >>> apply_temperature(jnp.array([2.0, -1.0]), 2.0).tolist()
        [1.0, -0.5]

    References:
        Guo et al., ICML 2017.
    """
    logits = jnp.asarray(logits)
    if jnp.ndim(temperature):
        raise ValueError(f"temperature must be a scalar; got shape {jnp.shape(temperature)}.")
    if not isinstance(temperature, Tracer) and not 0 < float(temperature) < math.inf:
        raise ValueError(f"temperature must be positive and finite; got {float(temperature)}.")
    return (logits.astype(jnp.float32) / jnp.asarray(temperature, jnp.float32)).astype(logits.dtype)


def apply_vector_scaling(
    logits: Float[AnyArray, "*shape classes"], params: VectorScaling
) -> Float[Array, "*shape classes"]:
    """Logits scaled and shifted by class: scale * logits + bias.

    Args:
        logits: logits `[..., classes]`.
        params: scale and bias of each class, such as those of `fit_vector_scaling`.

    Returns:
        Scaled logits of the shape and dtype of `logits`.

    Raises:
        ValueError: if `params` have another number of classes.

    Example:
        >>> params = VectorScaling(scale=jnp.array([1.0, 2.0]), bias=jnp.array([0.5, 0.0]))
        >>> apply_vector_scaling(jnp.array([2.0, -1.0]), params).tolist()
        [2.5, -2.0]

    References:
        Guo et al., ICML 2017.
    """
    logits = jnp.asarray(logits)
    if params.scale.shape != logits.shape[-1:] or params.bias.shape != logits.shape[-1:]:
        raise ValueError(
            f"scale and bias must have shape {logits.shape[-1:]}, one entry for each class of logits of shape "
            f"{logits.shape}; got {params.scale.shape} and {params.bias.shape}."
        )
    scale, bias = (jnp.asarray(x, jnp.float32).reshape((1,) * (logits.ndim - 1) + (-1,)) for x in params)
    return (logits.astype(jnp.float32) * scale + bias).astype(logits.dtype)


# The objective: sums over each batch in JAX, added up over batches in float64.


class _Objective:
    """Mean negative log-likelihood and its gradient. Each call is one pass over all batches.

    Args:
        batches: the validation set.
        scaling: differentiable function from parameters to scale and bias.

    Attributes:
        facts: what the first pass found, `_Facts`.
        counted: number of voxels that the first pass counted.
    """

    def __init__(self, batches: Batches, scaling: Callable[[Any], VectorScaling]):
        self.batches, self.scaling = batches, scaling
        self.facts: Any = None
        self.counted: Any = None

    def __call__(self, params: Any) -> Evaluation:
        scaling, pull_back = jax.vjp(self.scaling, params)
        totals, count = [np.float64(0)] * 3, 0
        for number, arrays in enumerate(self.batches):
            sums, finite, voxels = jax.device_get(_batch_sums(scaling, *arrays))
            if not finite:
                raise ValueError(
                    f"logits or soft labels of batch {number} are not finite where they are counted. Mask such "
                    "voxels with where. To keep logarithms of probabilities finite, use "
                    "jnp.log(jnp.maximum(probs, jnp.finfo(jnp.float32).tiny))."
                )
            totals = [total + _over_images(pair) for total, pair in zip(totals, sums, strict=True)]
            count += int(voxels.sum())
            if self.counted is None:
                found = _batch_facts(scaling, *arrays)
                self.facts = found if self.facts is None else self.facts.merge(found)
        if self.counted not in (None, count):
            raise ValueError(
                f"the first pass over the batches counted {self.counted} voxels, a later one {count}: every pass "
                "must find the same. Pass a list, or a function that returns a new iterator each time."
            )
        if count == 0:
            raise ValueError("no voxel to fit to: every one is masked by where, or has a label of no class.")
        self.counted = count
        loss, *slopes = (total / count for total in totals)
        (gradient,) = pull_back(VectorScaling(*(jnp.asarray(slope, jnp.float32) for slope in slopes)))
        return Evaluation(float(loss), gradient)

    def spread(self) -> float:
        """Root mean square of the difference between a logit and the mean of its voxel, in the first pass."""
        return math.sqrt(self.facts.variance.mean() / self.counted)

    def separates(self, params: Any) -> bool:
        """Whether the scaled logits of every counted voxel are largest at its label: one more pass."""
        return not any(_batch_facts(self.scaling(params), *arrays).short.any() for arrays in self.batches)


def _over_images(pair: Any) -> Any:
    """Sum of a batch from the pairs of its images, in float64."""
    high, low = pair
    return (np.float64(high) + np.float64(low)).sum(0)


@compiled()
def _batch_sums(scaling: VectorScaling, logits: Any, labels: Any, where: Any) -> tuple[Any, Array, Array]:
    """Sums of NLL and of its derivatives by scale and bias, as pairs; whether logits are finite; counted voxels."""
    scale, bias = (x[None, None] for x in scaling)

    def sums(logits: Array, labels: Array, where: Array | None) -> tuple[Array, ...]:
        logits = logits.astype(jnp.float32)
        if where is not None:
            logits = jnp.where(where, logits, 0)

        def of_scaled(scaled: Array) -> tuple[Array, Array]:
            return metrics.voxel_likelihoods(scaled, labels, where)

        losses, pull_back, counted = jax.vjp(of_scaled, scale * logits + bias, has_aux=True)
        (slope,) = pull_back(jnp.ones_like(losses))
        broken = counted & ~jnp.isfinite(logits).all(-1, keepdims=True)
        totals = sum_voxels(losses)[:, 0], sum_voxels(slope * logits), sum_voxels(slope)
        return *totals, *count_voxels(broken, counted)

    *totals, broken, counted = sum_in_chunks(sums, *metrics.flatten(logits, labels, where))
    return totals, (broken.sum() == 0) & jnp.isfinite(totals[0][0]).all(), counted


# Whether there is an optimum, from sums over the logits as they are.


class _Facts(NamedTuple):
    """Sums and extremes over counted voxels, for each class c with logit l_c and label y_c.

    Attributes:
        short: sum of y_c (max_k l_k - l_c), exactly zero if every label has the largest logit.
        below_mean: sum of y_c (mean_k l_k - l_c), positive if labels have small logits.
        variance: sum of (mean_k l_k - l_c)^2.
        labels: sum of y_c.
        least, most: the least logit where the label is c, and the largest one where another class has a label.
    """

    short: np.ndarray
    below_mean: np.ndarray
    variance: np.ndarray
    labels: np.ndarray
    least: np.ndarray
    most: np.ndarray

    def merge(self, other: "_Facts") -> "_Facts":
        """The facts of two batches."""
        adders = (*(np.add,) * 4, np.minimum, np.maximum)
        return _Facts(*(add(a, b) for add, a, b in zip(adders, self, other, strict=True)))


def _batch_facts(scaling: VectorScaling, logits: Any, labels: Any, where: Any) -> _Facts:
    """Facts of a batch after its logits are scaled."""
    totals, *extremes = jax.device_get(_batch_facts_program(scaling, logits, labels, where))
    return _Facts(*map(_over_images, totals), *extremes)


@compiled()
def _batch_facts_program(
    scaling: VectorScaling, logits: Any, labels: Any, where: Any
) -> tuple[list[Any], Array, Array]:
    """Sums of each class, as pairs, and extremes of its logits."""
    scale, bias = (x[None, None] for x in scaling)

    def scaled_and_dense(logits: Array, labels: Array, where: Array | None) -> tuple[Array, Array]:
        dense = one_hot(labels, logits)
        dense = dense if where is None else jnp.where(where, dense, 0)
        counted = have_class(dense, logits)[..., None]
        return jnp.where(counted, scale * logits.astype(jnp.float32) + bias, 0), dense

    def sums(*chunk: Any) -> tuple[Array, ...]:
        scaled, dense = scaled_and_dense(*chunk)
        short, _ = metrics.below_largest(scaled)
        excess = short - short.mean(-1, keepdims=True)
        return tuple(map(sum_voxels, (dense * short, dense * excess, excess**2, dense)))

    flat = metrics.flatten(logits, labels, where)
    totals = sum_in_chunks(sums, *flat)
    scaled, dense = scaled_and_dense(*flat)
    others = dense.sum(-1, keepdims=True) - dense
    least = jnp.where(dense > 0, scaled, jnp.inf).min((0, 1))
    return list(totals), least, jnp.where(others > 0, scaled, -jnp.inf).max((0, 1))


_MORE_CASES = "Fit on more cases, with errors, that the model was not trained on."


def _without_best_temperature(objective: _Objective, temperature: float, end: Evaluation) -> str | None:
    """Why no temperature is best, or the fit found none; None if it found one.

    The mean NLL is convex in 1 / T. It falls as T grows if its slope at 1 / T = 0, the mean of `below_mean`, is not
    negative, and as T falls if every label has the largest logit.
    """
    facts, spread = objective.facts, objective.spread()
    left = f"{min(max(temperature, 1 / _FURTHEST), _FURTHEST):.3g}"
    if spread == 0:
        return (
            "the logits of each counted voxel are all equal, so that no temperature changes a probability. Check "
            "that they are the logits of the network."
        )
    if not facts.short.any():
        return (
            "every label is the class of the largest logit, so that the likelihood grows without end as the "
            f"temperature falls to 0; the fit ended at {left}. {_MORE_CASES}"
        )
    if facts.below_mean.sum() / objective.counted >= -_SLOPE * spread:
        return (
            "the logits of the labels are on average no larger than those of other classes, so that the likelihood "
            f"grows without end with the temperature; the fit ended at {left}. Check that the labels and the order "
            "of the classes match the logits."
        )
    # Where scaled logits are small, all probabilities are nearly equal, and this is the curvature in log T.
    curvature = (spread / temperature) ** 2
    if curvature > _FLAT or abs(float(end.gradient)) <= _UNSETTLED * curvature:
        return None
    return (
        "the likelihood changes too little with the temperature for the fit to find the best one; the fit ended at "
        f"{left}. The logits of a voxel differ by {spread:.1e} (root mean square): if that is small, multiply them "
        "by a number that makes it about 1; otherwise lower the tolerance."
    )


def _without_best_scaling(
    objective: _Objective, params: VectorScaling, end: Evaluation, tolerance: float
) -> str | None:
    """Why no scale and bias are best, or the fit found none; None if it found some."""
    facts, spread = objective.facts, objective.spread()
    absent, alone = np.flatnonzero(facts.labels == 0), np.flatnonzero(facts.least > facts.most)
    if absent.size:
        return (
            f"no counted label is of class {', '.join(map(str, absent))}, so that the likelihood grows without end "
            "as the bias of the class falls. Fit on cases that have every class, or leave the class out."
        )
    if (spread > 0 and not facts.short.any()) or (end.value < _SEPARATED and objective.separates(params)):
        return (
            "the scaled logits get every label right, so that the likelihood grows without end with the scale. "
            f"{_MORE_CASES}"
        )
    if alone.size:
        return (
            f"the logit of class {', '.join(map(str, alone))} is larger in all voxels of the class than in any "
            f"other, so that the likelihood grows without end with its scale. {_MORE_CASES}"
        )
    if 0 < _UNSETTLED * spread**2 < tolerance:
        return (
            f"the logits of a voxel differ by {spread:.1e} only (root mean square), too little for the fit to find "
            "their scale. Multiply them by a number that makes it about 1, or lower the tolerance."
        )
    return None
