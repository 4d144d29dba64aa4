"""Voxels without a label, as nnU-Net's "ignore" marks them: one id in every label, one mask from it."""

from typing import Any

from jaxtyping import Bool, Float, Int, UInt8

IGNORE = 255
"""The id of a voxel that nobody labelled, in every data set; class ids end below it."""


def mask_ignored(
    label: UInt8[Any, "*shape"] | Int[Any, "*shape"] | Float[Any, "*shape classes"],
) -> tuple[UInt8[Any, "*shape"] | Int[Any, "*shape"] | Float[Any, "*shape classes"], Bool[Any, "*shape"]]:
    """Splits a label into the label itself and the mask of the voxels that count.

    Args:
        label: class ids with `IGNORE`, or the share of each class, whose sum is the share of a voxel that is
            labelled: 0 or 1, and between them where augmentation interpolated.

    Returns:
        The label, and where it counts. A voxel with shares counts where at least half of it is labelled; its shares
        are then scaled to sum to 1.

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
