"""Logits and labels as the losses that go voxel by voxel read them: checked, in float32, emptied where masked."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from calib_jax._checks import as_inputs, check_voxel_mask
from calib_jax._devices import AxisName, whole_size, whole_sum


class Inputs(NamedTuple):
    """Checked arguments: float32 logits, int32 ids or float32 labels, and zeros in voxels without a class."""

    logits: Array
    labels: Array
    has_class: Array
    voxels: Array | float
    axis_name: AxisName | None


def voxel_inputs(logits: Any, labels: Any, where: Any, axis_name: AxisName | None = None) -> Inputs:
    """The arguments of a loss, or an error that names the one that does not fit."""
    logits, labels, where = as_inputs(logits, labels, where, probs_name="logits")
    if logits.shape[-1] < 2:
        raise ValueError(f"logits must have at least two classes for a softmax; got shape {logits.shape}.")
    check_voxel_mask(where, logits)
    voxels = whole_size(math.prod(logits.shape[:-1]), axis_name)
    kept = jnp.ones(logits.shape[:-1], bool) if where is None else where
    # Emptied before anything is computed from it, a masked NaN reaches neither value nor gradient.
    if labels.ndim == logits.ndim:
        labels = jnp.where(kept[..., None], labels.astype(jnp.float32), 0)
        has_class = (labels != 0).any(-1)
    else:
        labels = labels.astype(jnp.int32)
        has_class = kept & (labels >= 0) & (labels < logits.shape[-1])
        labels = jnp.where(has_class, labels, 0)
    logits = jnp.where(has_class[..., None], logits.astype(jnp.float32), 0)
    counted = float(voxels) if where is None else _count(where, axis_name)
    return Inputs(logits, labels, has_class, counted, axis_name)


def _count(where: Array, axis_name: AxisName | None) -> Array:
    return jnp.maximum(whole_sum(where.sum(), axis_name), 1).astype(jnp.float32)


def voxel_mean(losses: Array, inputs: Inputs) -> Array:
    """Mean over the voxels that count, zero in those without a class."""
    total = jnp.where(inputs.has_class, losses, 0).sum()
    return whole_sum(total, inputs.axis_name) / inputs.voxels


def one_hot_labels(inputs: Inputs) -> Array:
    """Labels of the shape of the logits."""
    if inputs.labels.ndim == inputs.logits.ndim:
        return inputs.labels
    one_hot = jax.nn.one_hot(inputs.labels, inputs.logits.shape[-1], dtype=jnp.float32)
    return jnp.where(inputs.has_class[..., None], one_hot, 0)


def voxel_cross_entropy(inputs: Inputs) -> Array:
    """Cross-entropy of each voxel."""
    import optax

    if inputs.labels.ndim == inputs.logits.ndim:
        return optax.losses.softmax_cross_entropy(inputs.logits, inputs.labels)
    return optax.losses.softmax_cross_entropy_with_integer_labels(inputs.logits, inputs.labels)
