"""Between NumPy's probabilities and logits, of classes that exclude each other or of overlapping regions."""

import numpy as np
from jaxtyping import Float

_LEAST = np.finfo(np.float32).tiny  # keeps logarithms finite


def finite_log(probs: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Finite logarithms, float32."""
    return np.log(np.maximum(probs, _LEAST), dtype=np.float32)


def entropy(probs: Float[np.ndarray, "*shape classes"], *, regions: bool) -> Float[np.ndarray, "*shape"]:
    """Entropy in nats, float32: of the classes, or the sum over regions."""
    from scipy.special import entr  # here, since its import takes long

    inside = entr(np.clip(probs, 0, 1))
    nats = inside + entr(np.clip(1 - probs, 0, 1)) if regions else inside
    return nats.sum(-1, dtype=np.float32)


def as_logits(
    probs: Float[np.ndarray, "*shape classes"], *, regions: bool
) -> Float[np.ndarray, "*shape classes"]:
    """Log-probabilities; of regions log-odds. Finite, float32."""
    return finite_log(probs) - finite_log(1 - probs) if regions else finite_log(probs)


def as_probs(
    logits: Float[np.ndarray, "*shape classes"], *, regions: bool
) -> Float[np.ndarray, "*shape classes"]:
    """Softmax over the last axis; of regions the sigmoid."""
    from scipy.special import expit, softmax  # here, since its import takes long

    return expit(logits) if regions else softmax(logits, axis=-1)
