"""One label from several annotators of a case."""

import numpy as np
from jaxtyping import Float

from train.data.ignore import IGNORE
from train.data.shapes import Annotations, Ids, Shares


def soft_label(
    annotations: Annotations, num_classes: int, weights: Float[np.ndarray, " annotators"] | None = None
) -> Shares:
    """The share of each class among the annotators who labelled a voxel; zeros if nobody did.

    Args:
        annotations: class ids of each annotator, `IGNORE` for voxels that the annotator did not label.
        num_classes: number of classes, background included.
        weights: of the annotators, with sum 1; None for equal weights.

    >>> soft_label(np.array([[0, 1], [1, 1]], np.uint8), 2).tolist()
    [[0.5, 0.5], [0.0, 1.0]]
    >>> soft_label(np.array([[IGNORE, 1], [IGNORE, IGNORE]], np.uint8), 2).tolist()
    [[0.0, 1.0], [0.0, 0.0]]
    """
    number = annotations.shape[-1]
    weights = np.full(number, 1 / number) if weights is None else weights
    shares = np.stack([(annotations == value) @ weights for value in range(num_classes)], axis=-1)
    labelled = annotations != IGNORE
    if not labelled.all():
        share = labelled @ weights
        shares /= np.where(share > 0, share, 1)[..., None]
    return shares.astype(np.float32)


def majority(annotations: Annotations, num_classes: int) -> Ids:
    """The most frequent class of each voxel, or the lower id of a tie; `IGNORE` where nobody labelled it.

    >>> majority(np.array([[0, 1], [2, 1], [2, 2]], np.uint8), 3).tolist()
    [0, 1, 2]
    """
    if annotations.shape[-1] == 1:
        return annotations[..., 0]
    ids = soft_label(annotations, num_classes).argmax(-1).astype(np.uint8)
    return np.where((annotations == IGNORE).all(-1), np.uint8(IGNORE), ids)
