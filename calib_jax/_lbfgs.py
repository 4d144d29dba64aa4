"""L-BFGS for objectives that Python evaluates, such as a loop over the files of a data set.

The directions are SciPy's. The line search is here: that of SciPy ends with an error where rounding hides the
decrease, and those of optax and JAX run inside a compiled program, which cannot read files.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from calib_jax._checks import check_number, check_size

_REMEMBERED = 10  # steps from which the curvature is known
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


class _Point(NamedTuple):
    """Parameters as a vector, the objective there, and its gradient as a vector."""

    x: np.ndarray
    evaluation: Evaluation
    gradient: np.ndarray


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
    leaves, treedef = jax.tree.flatten(start)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def as_tree(x: np.ndarray) -> Any:
        parts = zip(np.split(x, ends), leaves, strict=True)
        return treedef.unflatten([part.reshape(leaf.shape) for part, leaf in parts])

    def evaluated(x: np.ndarray) -> _Point:
        found = objective(as_tree(x))
        return _Point(x, found, _as_vector(found.gradient))

    here = first = evaluated(_as_vector(start))
    unfinished, steps, pairs = None, 0, deque[tuple[np.ndarray, np.ndarray]](maxlen=_REMEMBERED)
    while (largest := np.abs(here.gradient).max()) > tolerance:
        there = _line_search(evaluated, here, _direction(pairs, here.gradient)) if steps < max_steps else None
        if there is None:
            unfinished = (
                f"the fit ended after {steps} steps with a gradient of {largest:.1e}, above the tolerance of "
                f"{tolerance:.1e}. Raise max_steps or tolerance, and check that every pass finds the same batches."
            )
            break
        pairs.append((there.x - here.x, there.gradient - here.gradient))
        if not np.vdot(*pairs[-1]) > 0:  # no positive curvature: the minimum is far away
            pairs.clear()
        here, steps = there, steps + 1
    if here.evaluation.value > first.evaluation.value:  # by rounding
        here = first
    return as_tree(here.x), here.evaluation, unfinished


def _direction(pairs: deque[tuple[np.ndarray, np.ndarray]], gradient: np.ndarray) -> np.ndarray:
    """The inverse Hessian times the gradient; without any step before, the gradient, of length one.

    The inverse Hessian is that of the last step times the identity, corrected by all steps (Nocedal and Wright,
    "Numerical Optimization", 2006, equation 7.20). SciPy corrects the identity itself.
    """
    from scipy.optimize import LbfgsInvHessProduct  # here, since its import takes long

    if not pairs:
        return gradient / np.float32(np.linalg.norm(gradient))
    steps, changes = (np.stack(columns).astype(np.float64) for columns in zip(*pairs, strict=True))
    scale = np.sqrt(np.vdot(steps[-1], changes[-1]) / np.vdot(changes[-1], changes[-1]))
    product = LbfgsInvHessProduct(steps / scale, changes * scale)
    return (scale * product.matvec(scale * gradient)).astype(np.float32)


def _line_search(
    evaluated: Callable[[np.ndarray], _Point], here: _Point, direction: np.ndarray
) -> _Point | None:
    """Halves the step until it decreases the objective enough. Returns the new point, or None.

    Near the minimum, rounding hides the decrease. There the slope must not have turned (Hager and Zhang, "A New
    Conjugate Gradient Method with Guaranteed Descent and an Efficient Line Search", 2005).
    """
    length = min(1.0, _LONGEST_STEP / float(np.abs(direction).max()))
    before, slope = here.evaluation.value, float(np.vdot(direction, here.gradient))
    for _ in range(_HALVINGS):
        there = evaluated(here.x - np.float32(length) * direction)
        gained, left = before - there.evaluation.value, float(np.vdot(direction, there.gradient))
        if gained >= _SUFFICIENT * length * slope and gained > _ROUNDING * before:
            return there
        if abs(gained) <= _ROUNDING * before and abs(left) < (1 - 2 * _SUFFICIENT) * slope:
            return there
        length /= 2
    return None


def _as_vector(x: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(x)])
