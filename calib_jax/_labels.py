"""What labels are: class ids, or an array of the shape of the probabilities (one-hot, overlapping or soft).

Nothing else in the package decides this. Ids outside `[0, classes)` belong to no class.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num


def are_dense(labels: Any, like: Any) -> bool:
    """Whether labels have the shape of `like`, instead of one class id per voxel."""
    return labels.ndim == like.ndim


def are_soft(labels: Any, like: Any) -> bool:
    """Whether labels may hold shares between 0 and 1: they have the shape of `like` and a floating dtype."""
    return are_dense(labels, like) and jnp.issubdtype(labels.dtype, jnp.floating)


def as_class_ids(ids: Any) -> Array | np.ndarray:
    """`ids` as an array of NumPy or JAX, 64-bit ids as int32.

    An id that does not fit becomes -1, which is no class. A cast would wrap it: 2^32 + 1 would become class 1.
    """
    ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    if ids.dtype in (np.int64, np.uint64):
        numpy = np if isinstance(ids, np.ndarray) else jnp
        fits = (ids >= 0) & (ids <= np.iinfo(np.int32).max)
        ids = numpy.where(fits, ids.astype(np.int32), np.int32(-1))
    return ids


def check_labels(labels: Array, like: Array, name: str) -> None:
    """Raises unless labels are class ids or dense for the array `like`, the caller's argument `name`."""
    if jnp.issubdtype(labels.dtype, jnp.complexfloating):
        raise TypeError(f"labels must be class ids or a one-hot or soft array; got {labels.dtype}.")
    if labels.shape == like.shape:
        return
    if labels.shape != like.shape[:-1]:
        raise ValueError(
            f"labels must be class ids of shape {like.shape[:-1]} or one-hot / soft of shape {like.shape}, "
            f"to go with {name} of shape {like.shape}; got {labels.shape}. Axes are "
            "[batch, *spatial, classes]: move a channel-first array with jnp.moveaxis(x, 1, -1)."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"labels of shape {labels.shape} are class ids and must be integers; got {labels.dtype}. "
            "Cast them with labels.astype(jnp.int32)."
        )


def one_hot(labels: Array, like: Float[Array, "*voxels classes"]) -> Float[Array, "*voxels classes"]:
    """Labels as float32 of the shape of `like`. Ids are compared as int32, since uint8 cannot count 300 classes."""
    if are_dense(labels, like):
        return labels.astype(jnp.float32)
    return jax.nn.one_hot(labels.astype(jnp.int32), like.shape[-1], dtype=jnp.float32)


def one_hot_by_arithmetic(
    labels: Array, like: Float[Array, "*voxels classes"]
) -> Num[Array, "*voxels classes"]:
    """`one_hot` for GPUs and TPUs, where XLA stores comparisons: ids become int32, dense labels float32."""
    if are_dense(labels, like):
        return labels.astype(jnp.float32)
    classes = jnp.arange(like.shape[-1], dtype=jnp.int32).reshape((1,) * (like.ndim - 1) + (-1,))
    return jnp.maximum(
        1 - jnp.abs(labels.astype(jnp.int32)[..., None] - classes), 0
    )  # 0 even if this overflows


def memberships(ids: Int[Array, "*voxels"], num_classes: int) -> Bool[Array, "*voxels classes"]:
    """Which class each voxel belongs to. Inside a sum, XLA fuses the comparison and it takes no memory."""
    ids = ids.astype(jnp.int32)[..., None]
    return ids == jnp.arange(num_classes, dtype=jnp.int32).reshape((1,) * (ids.ndim - 1) + (-1,))


def blank(labels: Array, where: Bool[Array, "*voxels one"], like: Array) -> Array:
    """Labels that belong to no class where `where` is False."""
    if are_dense(labels, like):
        return jnp.where(where, labels, jnp.zeros((), labels.dtype))
    return jnp.where(where[..., 0], labels.astype(jnp.int32), -1)


def classes_from(first: int, labels: Array, like: Float[Array, "*voxels classes"]) -> Array:
    """Labels of the classes from `first` on, which become the classes from 0 on."""
    if are_dense(labels, like):
        return labels[..., first:]
    # The lowest numbers of a dtype wrap to its highest ones, which must be no class.
    wide = labels if jnp.iinfo(labels.dtype).max >= like.shape[-1] else labels.astype(jnp.int32)
    return wide - first


def have_class(labels: Array, like: Float[Array, "*voxels classes"]) -> Bool[Array, "*voxels"]:
    """Whether each voxel belongs to a class: its id is in range, or a label of it is not zero."""
    if are_dense(labels, like):
        return labels.astype(bool).any(-1)
    ids = labels.astype(jnp.int32)
    return (ids >= 0) & (ids < like.shape[-1])
