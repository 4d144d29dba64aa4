"""Confidence intervals over cases."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, PRNGKeyArray, PyTree

from calib_jax._checks import check_number, check_size
from calib_jax._eager import nan_where_undefined

Cases = TypeVar("Cases")

_AT_ONCE = 100  # resamples in memory at a time


@nan_where_undefined
def bootstrap_interval(
    key: PRNGKeyArray,
    cases: Cases,
    statistic: Callable[[Cases], PyTree],
    *,
    num_resamples: int = 1000,
    level: float = 0.95,
) -> tuple[PyTree, PyTree]:
    """Percentile bootstrap over cases: the quantiles of a statistic over samples drawn with replacement.

    Each sample has as many cases as there are. Cases are drawn and not voxels, because the voxels of a case are not
    independent of one another.

    Args:
        key: random key of the draws.
        cases: a pytree of arrays whose first axis is the case: `BinStatistics`, or errors `[cases, classes]`.
        statistic: pure function from such a pytree to a pytree of arrays.
        num_resamples: number of samples.
        level: coverage of the interval, between 0 and 1.

    Returns:
        `(low, high)`, each of the shape of `statistic(cases)`. Samples whose statistic is NaN are left out, such as
        those that leave a bin empty.

    Raises:
        TypeError: if `num_resamples` is not an integer or `level` is not a number.
        ValueError: if `level` is not between 0 and 1, if there is no sample or no case, or if the arrays of `cases`
            differ in their number of cases.

    Example:
        >>> errors = jnp.array([0.10, 0.14, 0.12, 0.11, 0.13])
        >>> low, high = bootstrap_interval(jax.random.key(0), errors, jnp.mean)
        >>> 0.10 < low < 0.12 < high < 0.14
        Array(True, dtype=bool)

    References:
        Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979.
    """
    check_size("num_resamples", num_resamples)
    check_number("level", level)
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1; got {level}.")
    cases = jax.tree.map(jnp.asarray, cases)
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(cases)}
    if len(sizes) != 1 or not (size := sum(sizes.pop())):
        raise ValueError(
            "every array of cases must have the same number of cases, one or more, on its first axis; got shapes "
            f"{[leaf.shape for leaf in jax.tree.leaves(cases)]}."
        )

    def one(drawn: Array) -> PyTree:
        return statistic(jax.tree.map(lambda leaf: leaf[drawn], cases))

    drawn = jax.random.randint(key, (num_resamples, size), 0, size, jnp.int32)
    if isinstance(drawn, Tracer):
        values = jax.lax.map(one, drawn, batch_size=min(num_resamples, _AT_ONCE))
    else:  # `lax.map` would compile a program for each new `statistic`; these operations are compiled once
        starts = range(0, num_resamples, _AT_ONCE)
        chunks = [jax.vmap(one)(drawn[start : start + _AT_ONCE]) for start in starts]
        values = jax.tree.map(lambda *parts: jnp.concatenate(parts), *chunks)
    ends = jnp.array([(1 - level) / 2, (1 + level) / 2])
    bounds = jax.tree.map(lambda x: jnp.nanquantile(x, ends, axis=0), values)
    return jax.tree.map(lambda x: x[0], bounds), jax.tree.map(lambda x: x[1], bounds)
