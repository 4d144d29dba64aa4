"""Voxels without a label, like nnU-Net's "ignore": one id for all labels, and the mask that it gives."""

from typing import Any

from jaxtyping import Bool, Float, Int, UInt8

IGNORE = 255
"""The id of a voxel without a label, in every data set. Class ids are smaller."""


def mask_ignored(
    label: UInt8[Any, "*shape"] | Int[Any, "*shape"] | Float[Any, "*shape classes"],
) -> tuple[UInt8[Any, "*shape"] | Int[Any, "*shape"] | Float[Any, "*shape classes"], Bool[Any, "*shape"]]:
    """Finds the voxels of a label that count.

    Args:
        label: class ids with `IGNORE`; or the share of each class. The shares of a voxel sum to 1, or to 0
            without a label; interpolation in augmentation gives sums between.

    Returns:
        The label; and the mask of the voxels that count. With shares, a voxel counts if its sum is at least 1/2,
        and its shares are scaled to sum to 1.

    >>> import jax.numpy as jnp
    >>> shares = jnp.array([[0.0, 0.0], [0.1, 0.3], [0.2, 0.6]])
    >>> [x.tolist() for x in mask_ignored(jnp.array([0, 255, 2]))]
    [[0, 255, 2], [True, False, True]]
    >>> mask_ignored(shares)[1].tolist(), [round(float(x), 4) for x in mask_ignored(shares)[0][2]]
    ([False, False, True], [0.25, 0.75])
    """
    import jax.numpy as jnp  # here, so that the command line can read `IGNORE` without jax

    if not jnp.issubdtype(label.dtype, jnp.floating):
        return label, label != IGNORE
    total = label.sum(-1)
    where = total >= 0.5
    return label / jnp.where(where, total, 1)[..., None], where
