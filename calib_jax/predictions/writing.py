"""Writes probabilities in the format that they came in."""

import dataclasses
import os

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class PredictionFile:
    """How the probabilities of one case are stored."""


def write_probabilities(
    path: str | os.PathLike[str], probs: Float[np.ndarray, "*spatial classes"], like: PredictionFile
) -> None:
    """Writes probabilities in the format, dtype, order of axes and affine of another prediction."""
    raise NotImplementedError
