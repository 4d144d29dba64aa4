"""One model's prediction of one case, and the exception of files that cannot be used."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float32, Int32, Integer


class PredictionError(ValueError):
    """A file that cannot be used: one sentence that names the file, what was found, and what to do."""


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One model's prediction of one case, and its label. All arrays lie on the grid of the label.

    Arrays may be views with any strides, so that no copy of a large volume is made.

    Attributes:
        name: of the case.
        model: name of the model.
        probs: class probabilities, background first, which sum to 1 within 1e-2 as they are stored; for regions
            one probability per region. Values lie within [0, 1]. There are two or three spatial axes.
        labels: class ids, -1 where `where` is False; for regions one truth value per region. None without labels.
        where: False where the label is the ignore label; None if the case has none.
        image: intensities, if an image folder was given.
        spacing: millimetres per voxel along each spatial axis; 1 where the files do not say.
        predicted: the label map that lies beside the probabilities, in the form of `labels`; None if there is none.
    """

    name: str
    model: str
    probs: Float32[np.ndarray, "*spatial classes"]
    labels: Int32[np.ndarray, "*spatial"] | Bool[np.ndarray, "*spatial regions"] | None
    where: Bool[np.ndarray, "*spatial"] | None
    image: Float32[np.ndarray, "*spatial"] | None
    spacing: tuple[float, ...]
    predicted: Integer[np.ndarray, "*spatial"] | Bool[np.ndarray, "*spatial regions"] | None = None
