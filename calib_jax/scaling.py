"""Post-hoc calibration by few parameters: temperatures, vector scaling, Dirichlet calibration.

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

from calib_jax._batches import Batches, Source
from calib_jax._checks import AnyArray, Labels
from calib_jax._labels import memberships
from calib_jax._lbfgs import Evaluation, minimise
from calib_jax._likelihood import Objective

Logits = Float[AnyArray, "batch *spatial classes"]

_FURTHEST = 1e3  # where no optimum is finite: bound of 1 / T and T, and of the size of a scale or bias
_PENALTY = 1e-5  # per squared unit of a parameter, in nats per voxel
_SLOPE = 1e-6  # of the logits' spread: slopes below it are rounding, and the best temperature is infinite
_FLAT = 1e-2  # squared spread of scaled logits, below which probabilities are nearly equal
_UNSETTLED = 0.1  # of log T: how far from the optimum the fit may end without a warning
_SEPARATED = 1e-3  # mean NLL, below which an extra pass checks whether scaled logits get every label right


class VectorScaling(NamedTuple):
    """Scaled logits are `scale * log_softmax(logits) + bias`.

    Attributes:
        scale: `[classes]`.
        bias: `[classes]`.
    """

    scale: Float[AnyArray, "classes"]
    bias: Float[AnyArray, "classes"]


class DirichletCalibration(NamedTuple):
    """Calibrated logits are `weight @ log_softmax(logits) + bias`.

    Attributes:
        weight: `[classes, classes]`.
        bias: `[classes]`.
    """

    weight: Float[AnyArray, "classes classes"]
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

    objective = Objective(Batches(logits, labels, where), _over_temperature, with_facts=True)
    log_temperature, end, unfinished = minimise(objective, np.zeros((), np.float32), tolerance, max_steps)
    temperature = jnp.exp(jnp.asarray(log_temperature))
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
    """Scale and bias of each class that minimise the mean NLL of softmax(scale * log p + bias).

    p = softmax(logits), so that logits and log-probabilities give the same fit. There are twice as many parameters
    as classes, so predicted labels may change. A number added to all biases changes nothing, so they are made to
    sum to zero.

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
    objective = Objective(batches, _scaled_by_class, with_facts=True)
    start = VectorScaling(*(np.full(batches.classes, x, np.float32) for x in (1, 0)))
    params, end, unfinished = minimise(objective, start, tolerance, max_steps)
    without = _without_best_scaling(objective, params, end, tolerance)
    if message := without or unfinished:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    params = params._replace(bias=params.bias - params.bias.mean())
    return _float32(jax.tree.map(lambda x: np.clip(x, -_FURTHEST, _FURTHEST), params) if without else params)


def fit_class_temperature(
    logits: Logits | Source,
    labels: Labels | None = None,
    *,
    where: Any = None,
    tolerance: float = 1e-6,
    max_steps: int = 100,
) -> Float[Array, "classes"]:
    """Temperature of each predicted class that minimises the mean NLL of softmax(logits / T[argmax logits]).

    All logits of a voxel share the temperature of the class that is predicted there, so that their order and the
    predicted label stay. A class that the model overrates gets a high temperature.

    Args:
        logits: `[batch, *spatial, classes]`, or batches, see `fit_temperature`.
        labels: class ids or one-hot or soft labels, see `fit_temperature`.
        where: voxels to count, boolean, `[batch, *spatial]`; None counts all. Elsewhere logits may be NaN.
        tolerance: the fit ends where no component of the gradient of the mean with respect to log T exceeds it.
        max_steps: number of steps after which the fit ends anyway, with a `RuntimeWarning`.

    Returns:
        Positive float32 temperatures `[classes]` for `apply_class_temperature`. A class that is never predicted
        keeps T = 1, and a slight pull of all log T towards 0 keeps each temperature finite.

    Raises:
        TypeError, ValueError: as `fit_temperature`.

    Example:
        >>> labels = jnp.array([[0, 0, 0, 1]])
        >>> logits = jnp.log(jnp.full((1, 4, 2), jnp.array([0.9, 0.1])))
        >>> [round(float(t), 2) for t in fit_class_temperature(logits, labels)]
        [2.0, 1.0]

    References:
        Frenkel and Goldberger, "Network Calibration by Class-based Temperature Scaling", EUSIPCO 2021.
    """
    batches = Batches(logits, labels, where)
    objective = _with_penalty(Objective(batches, _over_class_temperature), _sum_of_squares)
    start = np.zeros(batches.classes, np.float32)
    log_temperature, _, unfinished = minimise(objective, start, tolerance, max_steps)
    if unfinished:
        warnings.warn(unfinished, RuntimeWarning, stacklevel=2)
    return jnp.exp(jnp.asarray(log_temperature))


def fit_dirichlet(
    logits: Logits | Source,
    labels: Labels | None = None,
    *,
    where: Any = None,
    tolerance: float = 1e-5,
    max_steps: int = 100,
) -> DirichletCalibration:
    """Matrix W and bias b that minimise the mean NLL of softmax(W log p + b), with p = softmax(logits).

    A slight penalty on the entries off W's diagonal and on b keeps all parameters finite. There are
    classes * (classes + 1) of them, so predicted labels may change.

    Args:
        logits: `[batch, *spatial, classes]`, or batches, see `fit_temperature`.
        labels: class ids or one-hot or soft labels, see `fit_temperature`.
        where: voxels to count, boolean, `[batch, *spatial]`; None counts all. Elsewhere logits may be NaN.
        tolerance: the fit ends where no component of the gradient of the mean exceeds it.
        max_steps: number of steps after which the fit ends anyway, with a `RuntimeWarning`.

    Returns:
        `DirichletCalibration`, float32, for `apply_dirichlet`.

    Raises:
        TypeError, ValueError: as `fit_temperature`.

    Example:
        >>> labels = jnp.array([[0, 0, 0, 1]])
        >>> params = fit_dirichlet(jnp.zeros((1, 4, 2)), labels)
        >>> [round(float(p), 2) for p in jax.nn.softmax(apply_dirichlet(jnp.zeros(2), params))]
        [0.75, 0.25]

    References:
        Kull et al., "Beyond Temperature Scaling: Obtaining Well-Calibrated Multi-Class Probabilities with Dirichlet
        Calibration", NeurIPS 2019.
    """
    batches = Batches(logits, labels, where)
    objective = _with_penalty(Objective(batches, _by_matrix), _off_diagonal)
    start = DirichletCalibration(*(make(batches.classes, dtype=np.float32) for make in (np.eye, np.zeros)))
    params, _, unfinished = minimise(objective, start, tolerance, max_steps)
    if unfinished:
        warnings.warn(unfinished, RuntimeWarning, stacklevel=2)
    return _float32(params)


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
    if not isinstance(temperature, Tracer):
        _check_positive(temperature)
    return (logits.astype(jnp.float32) / jnp.asarray(temperature, jnp.float32)).astype(logits.dtype)


def apply_vector_scaling(
    logits: Float[AnyArray, "*shape classes"], params: VectorScaling
) -> Float[Array, "*shape classes"]:
    """Log-probabilities scaled and shifted by class: scale * log_softmax(logits) + bias.

    Args:
        logits: logits or log-probabilities `[..., classes]`.
        params: scale and bias of each class, such as those of `fit_vector_scaling`.

    Returns:
        Scaled logits of the shape and dtype of `logits`.

    Raises:
        ValueError: if `params` have another number of classes.

    Example:
        >>> params = VectorScaling(scale=jnp.array([1.0, 2.0]), bias=jnp.array([0.5, 0.0]))
        >>> [round(float(x), 4) for x in apply_vector_scaling(jnp.log(jnp.array([0.5, 0.5])), params)]
        [-0.1931, -1.3863]

    References:
        Guo et al., ICML 2017.
    """
    logits = jnp.asarray(logits)
    _check_per_class(logits, scale=params.scale, bias=params.bias)
    return _scaled_by_class(logits.astype(jnp.float32), _float32(params)).astype(logits.dtype)


def apply_class_temperature(
    logits: Float[AnyArray, "*shape classes"], temperatures: Float[AnyArray, "classes"]
) -> Float[Array, "*shape classes"]:
    """Logits divided by the temperature of the class that has the largest one.

    Args:
        logits: logits or log-probabilities `[..., classes]`.
        temperatures: positive, `[classes]`, such as those of `fit_class_temperature`.

    Returns:
        Scaled logits of the shape and dtype of `logits`. Their order in each voxel is that of `logits`.

    Raises:
        ValueError: if there are temperatures of another number of classes, or known ones that are not positive.

    Example:
        >>> apply_class_temperature(jnp.array([[2.0, 1.0], [1.0, 2.0]]), jnp.array([2.0, 1.0])).tolist()
        [[1.0, 0.5], [1.0, 2.0]]

    References:
        Frenkel and Goldberger, EUSIPCO 2021.
    """
    logits = jnp.asarray(logits)
    _check_per_class(logits, temperatures=temperatures)
    if not isinstance(temperatures, Tracer):
        for temperature in np.asarray(temperatures):
            _check_positive(temperature)
    log_temperature = jnp.log(jnp.asarray(temperatures, jnp.float32))
    return _over_class_temperature(logits.astype(jnp.float32), log_temperature).astype(logits.dtype)


def apply_dirichlet(
    logits: Float[AnyArray, "*shape classes"], params: DirichletCalibration
) -> Float[Array, "*shape classes"]:
    """A linear map of the log-probabilities: W log_softmax(logits) + b.

    Args:
        logits: logits or log-probabilities `[..., classes]`.
        params: such as those of `fit_dirichlet`.

    Returns:
        Logits of the shape and dtype of `logits`.

    Raises:
        ValueError: if `params` have another number of classes.

    Example:
        >>> params = DirichletCalibration(weight=jnp.eye(2), bias=jnp.array([0.5, 0.0]))
        >>> [round(float(x), 4) for x in apply_dirichlet(jnp.log(jnp.array([0.5, 0.5])), params)]
        [-0.1931, -0.6931]

    References:
        Kull et al., NeurIPS 2019.
    """
    logits = jnp.asarray(logits)
    _check_per_class(logits, weight=params.weight[0], bias=params.bias)
    return _by_matrix(logits.astype(jnp.float32), _float32(params)).astype(logits.dtype)


def _check_positive(temperature: Any) -> None:
    if not 0 < float(temperature) < math.inf:
        raise ValueError(f"temperature must be positive and finite; got {float(temperature)}.")


def _check_per_class(logits: Array, **params: AnyArray) -> None:
    if any(param.shape != logits.shape[-1:] for param in params.values()):
        raise ValueError(
            f"{' and '.join(params)} must have shape {logits.shape[-1:]}, one entry for each class of logits of "
            f"shape {logits.shape}; got {' and '.join(str(param.shape) for param in params.values())}."
        )


def _float32(params: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


# From float32 logits and parameters to scaled logits.


def _over_temperature(logits: Array, log_temperature: Array) -> Array:
    return logits * jnp.exp(-log_temperature)


def _scaled_by_class(logits: Array, params: VectorScaling) -> Array:
    scale, bias = (x.reshape((1,) * (logits.ndim - 1) + (-1,)) for x in params)
    return jax.nn.log_softmax(logits) * scale + bias


def _over_class_temperature(logits: Array, log_temperature: Array) -> Array:
    predicted = memberships(logits.argmax(-1), logits.shape[-1])
    of_classes = log_temperature.reshape((1,) * (logits.ndim - 1) + (-1,))
    return logits * jnp.exp(-jnp.where(predicted, of_classes, 0).sum(-1, keepdims=True))


def _by_matrix(logits: Array, params: DirichletCalibration) -> Array:
    bias = params.bias.reshape((1,) * (logits.ndim - 1) + (-1,))
    return jnp.einsum("...c,dc->...d", jax.nn.log_softmax(logits), params.weight) + bias


# Penalties. They are so small that they decide only where the likelihood does not.


def _with_penalty(
    objective: Callable[[Any], Evaluation], penalty: Callable[[Any], tuple[Array, Any]]
) -> Callable[[Any], Evaluation]:
    def penalised(params: Any) -> Evaluation:
        value, slope = jax.device_get(penalty(params))
        found = objective(params)
        return Evaluation(found.value + float(value), jax.tree.map(np.add, found.gradient, slope))

    return penalised


@jax.jit
@jax.value_and_grad
def _sum_of_squares(log_temperature: Array) -> Array:
    return _PENALTY * jnp.sum(log_temperature**2)


@jax.jit
@jax.value_and_grad
def _off_diagonal(params: DirichletCalibration) -> Array:
    off = params.weight * (1 - jnp.eye(len(params.bias), dtype=jnp.float32))
    return _PENALTY * (jnp.sum(off**2) + jnp.sum(params.bias**2))


_MORE_CASES = "Fit on more cases, with errors, that the model was not trained on."


def _without_best_temperature(objective: Objective, temperature: float, end: Evaluation) -> str | None:
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
    objective: Objective, params: VectorScaling, end: Evaluation, tolerance: float
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
