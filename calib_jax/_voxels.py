"""Logits and labels as the losses that go voxel by voxel read them."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from calib_jax._checks import as_inputs
from calib_jax._devices import AxisName, whole_size, whole_sum
from calib_jax._labels import are_dense, blank, have_class, memberships


class Inputs(NamedTuple):
    """Checked arguments.

    Attributes:
        logits: float32, zero in voxels without a class.
        labels: int32 ids, -1 in voxels without a class; or float32 labels of the shape of `logits`.
        has_class: whether a voxel is counted and belongs to a class.
        voxels: number of counted voxels, at least 1.
        axis_name: the mesh axis over which each image's voxels are split.
    """

    logits: Float[Array, "batch *spatial classes"]
    labels: Array
    has_class: Bool[Array, "batch *spatial"]
    voxels: Array | float
    axis_name: AxisName | None


def voxel_inputs(logits: Any, labels: Any, where: Any, axis_name: AxisName | None = None) -> Inputs:
    """Checks the arguments of a loss and blanks the voxels that do not count."""
    logits, labels, where = as_inputs(logits, labels, where, probs_name="logits", per_voxel=True)
    if logits.shape[-1] < 2:
        raise ValueError(f"logits must have at least two classes for a softmax; got shape {logits.shape}.")
    # Blanked before anything is computed from it, a masked NaN reaches neither value nor gradient.
    if where is None:
        voxels = float(whole_size(math.prod(logits.shape[:-1]), axis_name))
    else:
        voxels = jnp.maximum(whole_sum(where.sum(), axis_name), 1).astype(jnp.float32)
        labels = blank(labels, where[..., None], logits)
    has_class = have_class(labels, logits)
    if are_dense(labels, logits):
        labels = labels.astype(jnp.float32)
    else:
        labels = jnp.where(has_class, labels.astype(jnp.int32), -1)
    logits = jnp.where(has_class[..., None], logits.astype(jnp.float32), 0)
    return Inputs(logits, labels, has_class, voxels, axis_name)


def voxel_mean(losses: Float[Array, "batch *spatial"], inputs: Inputs) -> Float[Array, ""]:
    """Mean over the counted voxels, where voxels without a class cost nothing."""
    total = jnp.where(inputs.has_class, losses, 0).sum()
    return whole_sum(total, inputs.axis_name) / inputs.voxels


def voxel_cross_entropy(inputs: Inputs) -> Float[Array, "batch *spatial"]:
    """Cross-entropy of each voxel."""
    import optax  # here, since its import takes longer than that of the library

    if are_dense(inputs.labels, inputs.logits):
        return optax.losses.softmax_cross_entropy(inputs.logits, inputs.labels)
    # Not optax's loss for integer labels: the gradient of its look-up is a scatter, which is serial on a TPU.
    members = memberships(inputs.labels, inputs.logits.shape[-1])
    return jax.nn.logsumexp(inputs.logits, axis=-1) - jnp.where(members, inputs.logits, 0).sum(-1)
