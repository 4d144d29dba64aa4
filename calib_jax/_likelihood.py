"""Mean negative log-likelihood of scaled logits over batches: sums in JAX, added up over batches in float64."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from calib_jax import metrics
from calib_jax._batches import Batches
from calib_jax._eager import compiled
from calib_jax._labels import have_class, one_hot
from calib_jax._lbfgs import Evaluation
from calib_jax._sums.bins import merge_space
from calib_jax._sums.voxels import count_voxels, sum_in_chunks, sum_voxels

_BLOCK = 2**12  # voxels whose derivatives are added in plain float32


class Objective:
    """Mean negative log-likelihood and its gradient. Each call is one pass over all batches.

    Args:
        batches: the validation set.
        scaled: function from float32 logits and parameters to scaled logits. It is a key of the compiled programs,
            so define it at module level.
        with_facts: whether the first pass also looks for `facts`, another program to compile.

    Attributes:
        facts: what the first pass found, `_Facts`.
        counted: number of voxels that the first pass counted.
    """

    def __init__(self, batches: Batches, scaled: Callable[[Array, Any], Array], *, with_facts: bool = False):
        self.batches, self.scaled, self.with_facts = batches, scaled, with_facts
        self.facts: Any = None
        self.counted: Any = None

    def __call__(self, params: Any) -> Evaluation:
        totals, count = [np.float64(0)] * (1 + len(jax.tree.leaves(params))), 0
        for number, arrays in enumerate(self.batches):
            sums, finite, voxels = jax.device_get(_batch_sums(params, *arrays, scaled=self.scaled))
            if not finite:
                raise ValueError(
                    f"logits or soft labels of batch {number} are not finite where they are counted. Mask such "
                    "voxels with where. To keep logarithms of probabilities finite, use "
                    "jnp.log(jnp.maximum(probs, jnp.finfo(jnp.float32).tiny))."
                )
            totals = [total + _over_images(pair) for total, pair in zip(totals, sums, strict=True)]
            count += int(voxels.sum())
            if self.counted is None and self.with_facts:
                found = _batch_facts(params, *arrays, scaled=self.scaled)
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
        leaves, treedef = jax.tree.flatten(params)
        gradient = [np.asarray(x, np.float32).reshape(y.shape) for x, y in zip(slopes, leaves, strict=True)]
        return Evaluation(float(loss), treedef.unflatten(gradient))

    def spread(self) -> float:
        """Root mean square of the difference between a logit and the mean of its voxel, in the first pass."""
        return math.sqrt(self.facts.variance.mean() / self.counted)

    def separates(self, params: Any) -> bool:
        """Whether the scaled logits of every counted voxel are largest at its label: one more pass."""
        return not any(
            _batch_facts(params, *arrays, scaled=self.scaled).short.any() for arrays in self.batches
        )


def _flat(*images: Any) -> tuple[Array, Array, Array | None]:
    """Logits `[batch, voxels, classes]`, labels with or without classes, mask `[batch, voxels, 1]`."""
    logits, labels, where = metrics.with_columns(*images)
    flat: Any = (merge_space(x, logits.ndim) for x in (logits, labels, where))
    return tuple(flat)


def _over_images(pair: Any) -> Any:
    """Sum of a batch from the pairs of its images, in float64."""
    high, low = pair
    return (np.float64(high) + np.float64(low)).sum(0)


@compiled()
def _batch_sums(
    params: Any, logits: Any, labels: Any, where: Any, *, scaled: Callable[[Array, Any], Array]
) -> tuple[Any, Array, Array]:
    """Sums of NLL and of its derivatives by each parameter, as pairs; whether logits are finite; counted voxels."""

    def sums(logits: Array, labels: Array, where: Array | None) -> tuple[Array, ...]:
        logits = logits.astype(jnp.float32)
        if where is not None:
            logits = jnp.where(where, logits, 0)
        size = math.gcd(logits.shape[1], _BLOCK)

        def of_block(params: Any, *block: Any) -> tuple[Array, Any]:
            arrays: Any = (None if x is None else x[None] for x in block)
            logits, labels, where = arrays
            losses, counted = metrics.voxel_likelihoods(scaled(logits, params), labels, where)
            return losses.sum(), (losses, counted)

        # Plain float32 sums within a block, exact ones over blocks.
        blocks = [None if x is None else x.reshape(-1, size, *x.shape[2:]) for x in (logits, labels, where)]
        gradient = jax.vmap(jax.grad(of_block, has_aux=True), in_axes=(None, 0, 0, 0))
        slopes, (losses, counted) = gradient(params, *blocks)
        losses, counted = (x.reshape(*logits.shape[:2], 1) for x in (losses, counted))
        broken = counted & ~jnp.isfinite(logits).all(-1, keepdims=True)
        slopes = [sum_voxels(x.reshape(1, len(x), -1)) for x in jax.tree.leaves(slopes)]
        return sum_voxels(losses)[:, 0], *slopes, *count_voxels(broken, counted)

    *totals, broken, counted = sum_in_chunks(sums, *_flat(logits, labels, where))
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


def _batch_facts(params: Any, *arrays: Any, scaled: Callable[[Array, Any], Array]) -> _Facts:
    """Facts of a batch after its logits are scaled."""
    totals, *extremes = jax.device_get(_batch_facts_program(params, *arrays, scaled=scaled))
    return _Facts(*map(_over_images, totals), *extremes)


@compiled()
def _batch_facts_program(
    params: Any, logits: Any, labels: Any, where: Any, *, scaled: Callable[[Array, Any], Array]
) -> tuple[list[Any], Array, Array]:
    """Sums of each class, as pairs, and extremes of its logits."""

    def scaled_and_dense(logits: Array, labels: Array, where: Array | None) -> tuple[Array, Array]:
        dense = one_hot(labels, logits)
        dense = dense if where is None else jnp.where(where, dense, 0)
        counted = have_class(dense, logits)[..., None]
        return jnp.where(counted, scaled(logits.astype(jnp.float32), params), 0), dense

    def sums(*chunk: Any) -> tuple[Array, ...]:
        values, dense = scaled_and_dense(*chunk)
        short, _ = metrics.below_largest(values)
        excess = short - short.mean(-1, keepdims=True)
        return tuple(map(sum_voxels, (dense * short, dense * excess, excess**2, dense)))

    flat = _flat(logits, labels, where)
    totals = sum_in_chunks(sums, *flat)
    values, dense = scaled_and_dense(*flat)
    others = dense.sum(-1, keepdims=True) - dense
    least = jnp.where(dense > 0, values, jnp.inf).min((0, 1))
    return list(totals), least, jnp.where(others > 0, values, -jnp.inf).max((0, 1))
