"""A loss term of your own. From the folder of a clone:

PYTHONPATH=docs/examples python -m train fit --data phantom2d --loss 'dice+0.5*my_losses:tversky(alpha=0.3)'
"""

import jax
import jax.numpy as jnp

from train.terms import whole_sum


def tversky(logits, labels, *, alpha: float = 0.5, smooth: float = 1e-5, where=None, axis_name=None):
    """The Tversky loss, 1 - TP / (TP + alpha FP + (1 - alpha) FN), averaged over images and classes.

    Args:
        logits: scores [batch, *spatial, classes].
        labels: class ids [batch, *spatial], or the share of each class, in the shape of the logits.
        alpha: weight of false positives; 1 - alpha is the weight of false negatives.
        smooth: keeps the loss defined for classes without a voxel.
        where: voxels to count [batch, *spatial]; None counts all.
        axis_name: the mesh axis over which volumes are split, if they are.
    """
    if where is not None:  # before the softmax, so that a NaN outside of the mask stays outside
        logits = jnp.where(where[..., None], logits, 0)
    probs = jax.nn.softmax(logits.astype(jnp.float32))
    targets = labels if labels.ndim == logits.ndim else jax.nn.one_hot(labels, logits.shape[-1])
    if where is not None:
        probs, targets = (jnp.where(where[..., None], x, 0) for x in (probs, targets))
    voxels = tuple(range(1, logits.ndim - 1))
    sums = (probs * targets).sum(voxels), probs.sum(voxels), targets.sum(voxels)
    # Each device holds part of a volume. `whole_sum` adds the parts, and has the gradient that a part needs.
    hits, predicted, true = whole_sum(sums, axis_name)
    wrong = alpha * (predicted - hits) + (1 - alpha) * (true - hits)
    return 1 - ((hits + smooth) / (hits + wrong + smooth)).mean()
