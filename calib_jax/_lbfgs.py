"""L-BFGS for objectives that Python evaluates, such as a loop over the files of a data set.

The directions are those of `optax.scale_by_lbfgs`. The line search is here: `optax.lbfgs` and
`jax.scipy.optimize.minimize` search inside a compiled program, which cannot read files. Parameters are NumPy
arrays, since JAX would compile a program for every sum of two of them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from calib_jax._checks import check_number, check_size

_LONGEST_STEP = 2.0  # in any parameter: a curvature near 0 asks for more than is good
_SUFFICIENT = 1e-4  # share of the decrease that the slope promises, below which a step is halved (Armijo)
_ROUNDING = 2.0**-21  # of the objective, relative: differences below it say nothing
_HALVINGS = 20


class Evaluation(NamedTuple):
    """An objective at one point.

    Attributes:
        value: the objective.
        gradient: its gradient, a pytree like the parameters, float32, on the host.
    """

    value: float
    gradient: Any


def minimise(
    objective: Callable[[Any], Evaluation], start: Any, tolerance: float, max_steps: int
) -> tuple[Any, Evaluation, str | None]:
    """Minimises `objective`, at least to its value at `start`.

    Args:
        objective: function of a pytree of float32 arrays, which are on the host.
        start: the first parameters.
        tolerance: the search ends where no component of the gradient exceeds it.
        max_steps: number of steps after which the search ends anyway.

    Returns:
        The parameters, the objective there, and a message if the gradient still exceeds `tolerance`.
    """
    check_number("tolerance", tolerance, 0.0)
    check_size("max_steps", max_steps)
    params, here, state, unfinished = start, objective(start), _fresh_state(start), None
    first, steps = here, 0
    while (largest := _largest(here.gradient)) > tolerance:
        direction, state = _next_direction(here.gradient, state, params)
        if not _dot(direction, here.gradient) > 0:  # no positive curvature: the minimum is far away
            direction, state = _downhill(here.gradient, params)
        step = _line_search(objective, params, here, direction) if steps < max_steps else None
        if step is None:
            unfinished = (
                f"the fit ended after {steps} steps with a gradient of {largest:.1e}, above the tolerance of "
                f"{tolerance:.1e}. Raise max_steps or tolerance, and check that every pass finds the same batches."
            )
            break
        (params, here), steps = step, steps + 1
    if here.value > first.value:  # by rounding
        params, here = start, first
    return params, here, unfinished


def _line_search(
    objective: Callable[[Any], Evaluation], params: Any, here: Evaluation, direction: Any
) -> tuple[Any, Evaluation] | None:
    """Halves the step until it decreases the objective enough. Returns the new point, or None.

    Near the minimum, rounding hides the decrease. There the slope must not have turned (Hager and Zhang, "A New
    Conjugate Gradient Method with Guaranteed Descent and an Efficient Line Search", 2005).
    """
    length, slope = min(1.0, _LONGEST_STEP / _largest(direction)), _dot(direction, here.gradient)
    for _ in range(_HALVINGS):
        there = _moved(params, direction, np.float32(length))
        evaluation = objective(there)
        gained, left = here.value - evaluation.value, _dot(direction, evaluation.gradient)
        if gained >= _SUFFICIENT * length * slope and gained > _ROUNDING * here.value:
            return there, evaluation
        if abs(gained) <= _ROUNDING * here.value and abs(left) < (1 - 2 * _SUFFICIENT) * slope:
            return there, evaluation
        length /= 2
    return None


@functools.cache
def _lbfgs() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The functions `init` and `update` of L-BFGS. optax is imported here, since its import takes long."""
    import optax

    lbfgs = optax.scale_by_lbfgs()
    return jax.jit(lbfgs.init), jax.jit(lbfgs.update)


def _fresh_state(params: Any) -> Any:
    state = _lbfgs()[0](params)
    return state._replace(weights_memory=np.asarray(state.weights_memory, np.float32))  # float64 under x64


def _next_direction(gradient: Any, state: Any, params: Any) -> tuple[Any, Any]:
    with jax.numpy_dtype_promotion("standard"):  # under x64, optax adds an int64 to an int32
        direction, state = _lbfgs()[1](gradient, state, params)
    return jax.device_get(direction), state


def _downhill(gradient: Any, params: Any) -> tuple[Any, Any]:
    """The gradient, of length one, and a state that remembers nothing but this point."""
    length = _dot(gradient, gradient) ** 0.5
    _, state = _next_direction(gradient, _fresh_state(params), params)
    return jax.tree.map(lambda x: x / np.float32(length), gradient), state


def _moved(params: Any, direction: Any, length: np.float32) -> Any:
    return jax.tree.map(lambda x, along: x - length * along, params, direction)


def _dot(a: Any, b: Any) -> float:
    return sum(float(np.vdot(x, y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _largest(x: Any) -> float:
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(x))
