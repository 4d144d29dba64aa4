"""Post-hoc calibration: logits divided by a temperature, or scaled and shifted per class.

Parameters are fitted on the host, by L-BFGS on the mean negative log-likelihood of a validation set, which may be
larger than memory: each step is one or a few passes over its batches, each batch a compiled sum. Applying them
is a pure function.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from calib_jax import metrics
from calib_jax._checks import (
    AnyArray,
    Labels,
    as_class_ids,
    as_inputs,
    check_number,
    check_size,
    check_voxel_mask,
)
from calib_jax._compat import enable_x64
from calib_jax._eager import compiled

Logits = Float[AnyArray, "batch *spatial classes"]
Batch = tuple[Any, ...]  # (logits, labels) or (logits, labels, where)
Batches = Iterable[Batch] | Callable[[], Iterable[Batch]]

_LONGEST_STEP = 2.0  # in any parameter: in log T, 7.4 times; a curvature near 0 asks for more than is good
_SUFFICIENT = 1e-4  # share of the decrease that the slope promises, below which a step is halved (Armijo)
_ROUNDING = 2.0**-21  # of the objective, relative: differences below it say nothing
_HALVINGS = 20

_FURTHEST = 1e3  # where no optimum is finite: bound of 1 / T and T, and of the size of a scale or bias
_SLOPE = 1e-6  # of the logits' spread: slopes below it are rounding, and the best temperature is infinite
_FLAT = 1e-2  # squared spread of scaled logits, below which probabilities are nearly equal
_UNSETTLED = 0.1  # of log T: how far from the optimum the fit may end without a warning
_SEPARATED = (
    1e-3  # mean NLL, below which it is worth a pass to see whether scaled logits get every label right
)


class VectorScaling(NamedTuple):
    """Scaled logits are `scale * logits + bias`.

    Attributes:
        scale: `[classes]`.
        bias: `[classes]`.
    """

    scale: Float[AnyArray, "classes"]
    bias: Float[AnyArray, "classes"]


def fit_temperature(
    logits: Logits | Batches,
    labels: Labels | None = None,
    *,
    where: Any = None,
    tolerance: float = 1e-6,
    max_steps: int = 100,
) -> Float[Array, ""]:
    """Temperature T that minimises the mean negative log-likelihood of softmax(logits / T).

    One number for all classes, so that no label changes; T > 1 makes probabilities less extreme. Fit it on cases
    that the model was not trained on.

    Args:
        logits: `[batch, *spatial, classes]`; or, without `labels`, the batches of a data set, which are gone
            through once or more for each step and never held together: a list (or any iterable that can be gone
            through again), or a function without arguments that returns an iterator, of tuples
            `(logits, labels)` or `(logits, labels, where)`. Batches may differ in shape; each shape is compiled
            once.
        labels: class ids `[batch, *spatial]`, or one-hot or soft labels of the shape of `logits`. Voxels of no
            class, whose id is outside `[0, classes)` or whose labels are all zero, are not counted.
        where: voxels to count, boolean, `[batch, *spatial]`; None counts all. NaN elsewhere does no harm.
        tolerance: the fit ends where no component of the mean's gradient (here with respect to log T) exceeds it.
        max_steps: steps after which the fit ends anyway, with a warning.

    Returns:
        The temperature, a positive float32 scalar, to be used by `apply_temperature`. Its likelihood is at
        least that of T = 1. There may be no best temperature: if the largest logit is every voxel's label, the
        likelihood grows as T falls to 0; if labels have no larger logits than other classes, it grows with T; if
        logits do not differ within voxels, T changes nothing. A `RuntimeWarning` then says which it is. So it does
        where logits differ so little that the fit stops before it gets to the optimum. T is then where the fit
        ended, within [1e-3, 1e3].

    Raises:
        TypeError: on dtypes that do not fit, and on an iterator that can only be gone through once.
        ValueError: on shapes that do not fit, on logits to be counted that are not finite, where there is nothing
            to count, and where a second pass over the batches does not find what the first one did.

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

    def affine(log_temperature: Array, classes: int) -> VectorScaling:
        return VectorScaling(
            jnp.broadcast_to(jnp.exp(-log_temperature), (classes,)), jnp.zeros(classes, jnp.float32)
        )

    _check_stopping(tolerance, max_steps)
    objective = _Objective(_as_batches(logits, labels, where), affine)
    log_temperature, end, unfinished = _minimise(objective, jnp.zeros((), jnp.float32), tolerance, max_steps)
    temperature = jnp.exp(log_temperature)
    without = _without_best_temperature(objective.facts, float(temperature), end)
    _warn(without or unfinished)
    return jnp.clip(temperature, 1 / _FURTHEST, _FURTHEST) if without else temperature


def fit_vector_scaling(
    logits: Logits | Batches,
    labels: Labels | None = None,
    *,
    where: Any = None,
    tolerance: float = 1e-6,
    max_steps: int = 100,
) -> VectorScaling:
    """Scale and bias of each class that minimise the mean NLL of softmax(scale * logits + bias).

    Twice as many parameters as classes, so that labels may change. A number added to all biases changes nothing:
    they sum up to zero.

    Args:
        logits: `[batch, *spatial, classes]`, or batches, see `fit_temperature`.
        labels: class ids or one-hot or soft labels, see `fit_temperature`.
        where: voxels to count, boolean, `[batch, *spatial]`; None counts all. NaN elsewhere does no harm.
        tolerance: the fit ends where no component of the mean's gradient exceeds it.
        max_steps: steps after which the fit ends anyway, with a warning.

    Returns:
        `VectorScaling`, float32, to be used by `apply_vector_scaling`. Its likelihood is at least that of the
        logits as they are. There may be no best scaling: the bias of a class that no label has falls without end,
        and scales grow without end where they separate one class, or all, from the others. A `RuntimeWarning` then
        says which it is, and also where logits differ too little for the fit to find their scale. Parameters are
        then where the fit ended, within [-1e3, 1e3].

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
    _check_stopping(tolerance, max_steps)
    objective = _Objective(_as_batches(logits, labels, where), lambda params, classes: params)
    start = VectorScaling(*(jnp.full(objective.classes, x, jnp.float32) for x in (1, 0)))
    params, end, unfinished = _minimise(objective, start, tolerance, max_steps)
    without = _without_best_scaling(objective, params, end, tolerance)
    _warn(without or unfinished)
    params = params._replace(bias=params.bias - params.bias.mean())
    return jax.tree.map(lambda x: jnp.clip(x, -_FURTHEST, _FURTHEST), params) if without else params


def apply_temperature(
    logits: Float[AnyArray, "*shape"], temperature: Float[AnyArray, ""] | float
) -> Float[Array, "*shape"]:
    """Logits over the temperature: logits / T. Their softmax is calibrated as far as one number can do it.

    Args:
        logits: logits of any shape.
        temperature: positive scalar, as from `fit_temperature`.

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
        params: as from `fit_vector_scaling`.

    Returns:
        Scaled logits of the shape and dtype of `logits`.

    Raises:
        ValueError: if `params` are of another number of classes.

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


# The mean over batches.


class _Evaluation(NamedTuple):
    value: float
    gradient: Any  # of the tree of the parameters, float32


class _Facts(NamedTuple):
    """What logits and labels say about an optimum before it is looked for. Means are over counted voxels.

    Attributes:
        short: mean of sum_c y_c (max_k l_k - l_c), exactly zero if every label has the largest logit.
        below_average: mean of sum_c y_c (mean_k l_k - l_c), positive if labels have small logits.
        variance: mean over voxels of the variance of their logits.
        labels: sum of the labels of each class.
        least, most: of each class's logit, the least where the label is the class and the most where it is another.
    """

    short: float
    below_average: float
    variance: float
    labels: np.ndarray
    least: np.ndarray
    most: np.ndarray


class _Objective:
    """Mean negative log-likelihood and its gradient: a pass over all batches, added up in float64.

    The first pass collects `facts` as well.
    """

    def __init__(self, batches: Callable[[], Iterable[Batch]], affine: Callable[[Any, int], VectorScaling]):
        self.batches, self.affine = batches, affine
        self.classes = _classes(batches())
        self.counted: int | None = None
        self.facts: Any = None

    def __call__(self, params: Any) -> _Evaluation:
        scaling, pull_back = jax.vjp(lambda params: self.affine(params, self.classes), params)
        loss, scale, bias, count = np.float64(0), np.zeros(self.classes), np.zeros(self.classes), 0
        facts = []
        for number, batch in enumerate(self.batches()):
            arrays = _checked(number, batch, self.classes)
            sums, finite, voxels = jax.device_get(_batch_sums(scaling, *arrays))
            if not finite:
                raise ValueError(_NOT_FINITE.format(number))
            if self.counted is None:
                facts.append(_summed(_batch_facts(scaling, *arrays)))
            high_and_low = [np.float64(high) + np.float64(low) for high, low in sums]
            loss, scale, bias = (a + b.sum(0) for a, b in zip((loss, scale, bias), high_and_low, strict=True))
            count += int(voxels.sum())
        self._check_count(count)
        self.facts = self.facts or _merged(facts, count)
        means = VectorScaling(*(jnp.asarray(x / count, jnp.float32) for x in (scale, bias)))
        return _Evaluation(float(loss) / count, pull_back(means)[0])

    def separates(self, params: Any) -> bool:
        """Whether the scaled logits of every counted voxel are largest at its label: one more pass."""
        scaling = self.affine(params, self.classes)
        batches = (_checked(number, batch, self.classes) for number, batch in enumerate(self.batches()))
        return not any(_summed(_batch_facts(scaling, *arrays)).short for arrays in batches)

    def _check_count(self, count: int) -> None:
        """The same in every pass, and not zero."""
        if self.counted not in (None, count):
            raise ValueError(
                f"the first pass over the batches counted {self.counted} voxels, a later one {count}: every pass "
                "must find the same. Pass a list, or a function that returns a new iterator each time."
            )
        if count == 0:
            raise ValueError("no voxel to fit to: every one is masked by where, or has a label of no class.")
        self.counted = count


_NOT_FINITE = (
    "logits or soft labels of batch {} are not finite where they are counted. Mask such voxels with "
    "where; logarithms of probabilities may be kept finite by "
    "jnp.log(jnp.maximum(probs, jnp.finfo(jnp.float32).tiny))."
)
_ONE_PASS = (
    "pass a list of batches, or a function that returns a new iterator each time (`lambda: load(paths)`)."
)


@compiled()
def _batch_sums(scaling: VectorScaling, logits: Any, labels: Any, where: Any) -> tuple[Any, Array, Array]:
    """Sums of NLL and of its derivatives by scale and bias, as pairs; whether logits are finite; voxels counted."""
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
        totals = metrics.voxel_sum(losses)[:, 0], metrics.voxel_sum(slope * logits), metrics.voxel_sum(slope)
        return *totals, *metrics.count_voxels(broken, counted)

    *totals, broken, counted = metrics.sum_over_chunks(sums, *metrics.flatten(logits, labels, where))
    return totals, (broken.sum() == 0) & jnp.isfinite(totals[0][0]).all(), counted


@compiled()
def _batch_facts(
    scaling: VectorScaling, logits: Any, labels: Any, where: Any
) -> tuple[list[Any], Array, Array]:
    """Sums, as pairs, of a batch's `_Facts` once its logits are scaled; the least and most logits of each class."""
    scale, bias = (x[None, None] for x in scaling)
    logits, labels, where = metrics.flatten(logits, labels, where)
    classes = logits.shape[-1]

    def scaled_and_dense(logits: Array, labels: Array, where: Array | None) -> tuple[Array, Array]:
        dense = labels if labels.ndim == 3 else metrics.is_class(labels, classes)
        dense = dense.astype(jnp.float32)
        dense = dense if where is None else jnp.where(where, dense, 0)
        counted = (dense != 0).any(-1, keepdims=True)
        return jnp.where(counted, scale * logits.astype(jnp.float32) + bias, 0), dense

    def sums(*chunk: Any) -> tuple[Array, ...]:
        scaled, dense = scaled_and_dense(*chunk)
        # The largest logit's own 0 is not left to a subtraction: what XLA fuses, it may round twice.
        is_top = metrics.is_class(scaled.argmax(-1), classes)
        short = jnp.where(is_top, 0, scaled.max(-1, keepdims=True) - scaled)
        excess = short - short.mean(-1, keepdims=True)
        return tuple(map(metrics.voxel_sum, (dense * short, dense * excess, excess**2, dense)))

    totals = metrics.sum_over_chunks(sums, logits, labels, where)
    scaled, dense = scaled_and_dense(logits, labels, where)
    others = dense.sum(-1, keepdims=True) - dense
    least = jnp.where(dense > 0, scaled, jnp.inf).min((0, 1))
    return list(totals), least, jnp.where(others > 0, scaled, -jnp.inf).max((0, 1))


def _summed(parts: Any) -> _Facts:
    """Sums over a batch, in float64."""
    totals, least, most = jax.device_get(parts)
    short, below_average, variance, labels = (
        (np.float64(high) + np.float64(low)).sum(0) for high, low in totals
    )
    means = float(short.sum()), float(below_average.sum()), float(variance.sum()) / variance.size
    return _Facts(*means, labels, least, most)


def _merged(facts: list[_Facts], count: int) -> _Facts:
    return _Facts(
        short=sum(fact.short for fact in facts) / count,
        below_average=sum(fact.below_average for fact in facts) / count,
        variance=sum(fact.variance for fact in facts) / count,
        labels=np.sum([fact.labels for fact in facts], axis=0),
        least=np.min([fact.least for fact in facts], axis=0),
        most=np.max([fact.most for fact in facts], axis=0),
    )


def _without_best_temperature(facts: _Facts, temperature: float, end: _Evaluation) -> str | None:
    """Why no temperature is best, or none was found; None where one was.

    The mean NLL is convex in 1 / T. It falls as T grows if its slope at 1 / T = 0, `below_average`, is not
    negative, and as T falls if every label has the largest logit.
    """
    spread, left = math.sqrt(facts.variance), f"{min(max(temperature, 1 / _FURTHEST), _FURTHEST):.3g}"
    if spread == 0:
        return (
            "the logits of each counted voxel are all equal, so that no temperature changes a probability. Check "
            "that they are the logits of the network."
        )
    if facts.short == 0:
        return (
            "every label is the class of the largest logit, so that the likelihood grows without end as the "
            f"temperature falls to 0; it is left at {left}. Fit on more cases, ones with errors that the model was "
            "not trained on."
        )
    if facts.below_average >= -_SLOPE * spread:
        return (
            "the logits of the labels are on average no larger than those of other classes, so that the likelihood "
            f"grows without end with the temperature; it is left at {left}. Check that labels and the "
            "order of classes are those of the logits."
        )
    # Where scaled logits are small, all probabilities are nearly equal, and this is the curvature in log T.
    curvature = (spread / temperature) ** 2
    if curvature > _FLAT or abs(float(end.gradient)) <= _UNSETTLED * curvature:
        return None
    return (
        "the likelihood changes too little with the temperature for the fit to find the best one; it stopped at "
        f"{left}. The logits of a voxel differ by {spread:.1e} (root mean square): if that is small, "
        "multiply them by a number that makes it about 1; otherwise lower the tolerance."
    )


def _without_best_scaling(
    objective: _Objective, params: VectorScaling, end: _Evaluation, tolerance: float
) -> str | None:
    """Why no scale and bias are best, or none were found; None where some were."""
    facts, spread = objective.facts, math.sqrt(objective.facts.variance)
    absent = np.flatnonzero(facts.labels == 0)
    if absent.size:
        return (
            f"no counted label is of class {', '.join(map(str, absent))}, so that the likelihood grows without end "
            "as the bias of the class falls. Fit on cases that have every class, or leave the class out."
        )
    right = facts.short == 0 and spread > 0
    if right or (end.value < _SEPARATED and objective.separates(params)):
        return (
            "the scaled logits get every label right, so that the likelihood grows without end with the scale. Fit "
            "on more cases, ones with errors that the model was not trained on."
        )
    alone = np.flatnonzero(facts.least > facts.most)
    if alone.size:
        return (
            f"the logit of class {', '.join(map(str, alone))} is larger in all voxels of the class than in any "
            "other, so that the likelihood grows without end with its scale. Fit on more cases, ones with errors "
            "that the model was not trained on."
        )
    if 0 < _UNSETTLED * facts.variance < tolerance:
        return (
            f"the logits of a voxel differ by {spread:.1e} only (root mean square), too little for the fit to find "
            "their scale. Multiply them by a number that makes it about 1, or lower the tolerance."
        )
    return None


def _as_batches(logits: Any, labels: Any, where: Any) -> Callable[[], Any]:
    """A function that begins a pass over the batches."""
    if labels is not None:
        return lambda: [(logits, labels, where)]
    if where is not None:
        raise TypeError("where of batches comes with them, as (logits, labels, where); got where apart.")
    if isinstance(logits, Iterator):
        raise TypeError(
            f"{type(logits).__name__} can be gone through only once, a fit does so often: {_ONE_PASS}"
        )
    if hasattr(logits, "shape") or not (callable(logits) or isinstance(logits, Iterable)):
        raise TypeError(
            f"logits without labels must be batches; got {type(logits).__name__}. Pass labels, or {_ONE_PASS}"
        )
    return logits if callable(logits) else lambda: logits


def _classes(batches: Iterable[Batch]) -> int:
    for batch in batches:
        logits = _checked(0, batch, None)[0]
        if logits.shape[-1] < 2:
            raise ValueError(
                f"logits must have at least two classes for a softmax; got shape {logits.shape}."
            )
        return logits.shape[-1]
    raise ValueError(
        "no batches to fit to: the list is empty, or the function returned an iterator without any."
    )


def _checked(number: int, batch: Any, classes: int | None) -> tuple[AnyArray, AnyArray, AnyArray | None]:
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        raise TypeError(
            f"batches must be tuples (logits, labels) or (logits, labels, where); got {type(batch).__name__} "
            f"as batch {number}."
        )
    arrays: list[Any] = [
        x if x is None or isinstance(x, jax.Array) else np.asarray(x)
        for x in (*batch, *(None,) * (3 - len(batch)))
    ]
    logits, labels, where = arrays
    # Of shapes alone: as arrays of JAX, those of each shape would be a program.
    jax.eval_shape(functools.partial(as_inputs, probs_name="logits"), logits, labels, where)
    check_voxel_mask(where, logits)
    if classes not in (None, logits.shape[-1]):
        raise ValueError(f"batch {number} has {logits.shape[-1]} classes, the first one has {classes}.")
    return logits, as_class_ids(labels), where


# L-BFGS with the line search on the host, since the objective is a loop over what may be files.


@functools.cache
def _lbfgs() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The functions `init` and `update` of L-BFGS, `update` compiled."""
    import optax

    lbfgs = optax.scale_by_lbfgs()
    return lbfgs.init, jax.jit(lbfgs.update)


def _next_direction(gradient: Any, state: Any, params: Any) -> tuple[Any, Any]:
    _, update = _lbfgs()
    with enable_x64(False):  # optax keeps part of its state in the default float
        return update(gradient, state, params)


def _fresh_state(params: Any) -> Any:
    init, _ = _lbfgs()
    with enable_x64(False):
        return init(params)


def _minimise(
    objective: _Objective, start: Any, tolerance: float, max_steps: int
) -> tuple[Any, _Evaluation, str | None]:
    """Parameters, the objective there, and why the fit ended with a larger gradient than `tolerance` if it did."""
    state, params, first = _fresh_state(start), start, objective(start)
    here, steps, unfinished = first, 0, None
    while _largest(here.gradient) > tolerance:
        direction, state = _next_direction(here.gradient, state, params)
        if not _dot(direction, here.gradient) > 0:  # no positive curvature: log T is far from the minimum
            direction, state = _downhill(here.gradient, params)
        step = _line_search(objective, params, here, direction) if steps < max_steps else None
        if step is None:
            unfinished = _UNFINISHED.format(steps, _largest(here.gradient), tolerance)
            break
        (params, here), steps = step, steps + 1
    if here.value > first.value:  # where rounding alone tells them apart
        params, here = start, first
    return params, here, unfinished


def _downhill(gradient: Any, params: Any) -> tuple[Any, Any]:
    """The gradient, of length one, and a state that remembers nothing but this point."""
    _, state = _next_direction(gradient, _fresh_state(params), params)
    return jax.tree.map(lambda x: x / _dot(gradient, gradient) ** 0.5, gradient), state


def _line_search(
    objective: _Objective, params: Any, here: _Evaluation, direction: Any
) -> tuple[Any, _Evaluation] | None:
    """The first point, by halvings of the step, that decreases the objective enough, or None.

    Near the minimum rounding hides what is gained: there the slope must not have turned (Hager and Zhang, "A New
    Conjugate Gradient Method with Guaranteed Descent and an Efficient Line Search", 2005).
    """
    import optax

    length, slope = min(1.0, _LONGEST_STEP / _largest(direction)), _dot(direction, here.gradient)
    for _ in range(_HALVINGS):
        there = optax.tree.add_scale(params, -length, direction)
        evaluation = objective(there)
        gained, left = here.value - evaluation.value, _dot(direction, evaluation.gradient)
        if gained >= _SUFFICIENT * length * slope and gained > _ROUNDING * here.value:
            return there, evaluation
        if abs(gained) <= _ROUNDING * here.value and abs(left) < (1 - 2 * _SUFFICIENT) * slope:
            return there, evaluation
        length /= 2
    return None


_UNFINISHED = (
    "the fit ended after {} steps with a gradient of {:.1e}, above the tolerance of {:.1e}. Raise max_steps or "
    "tolerance, and see that every pass finds the same batches."
)


def _warn(message: str | None) -> None:
    """Warns the caller of a fit."""
    if message:
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _check_stopping(tolerance: Any, max_steps: Any) -> None:
    check_number("tolerance", tolerance, 0.0)
    check_size("max_steps", max_steps)


def _dot(a: Any, b: Any) -> float:
    return sum(float(jnp.vdot(x, y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _largest(x: Any) -> float:
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(x))
