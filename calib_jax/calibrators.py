"""Every post-hoc calibration by one interface: fit to validation cases, apply to others.

params = CALIBRATORS["isotonic"].fit(batches)
calibrated = jax.nn.softmax(CALIBRATORS["isotonic"].apply(logits, params))
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from calib_jax import isotonic, scaling
from calib_jax.local_calibration import apply_local_calibration, fit_local_calibration


class Calibrator(NamedTuple):
    """One method.

    Attributes:
        fit: from batches `(logits, labels)` or `(logits, labels, where)`, see `fit_temperature`, to parameters, a
            pytree of arrays. Log-probabilities are logits.
        apply: from logits and parameters to logits of the same shape; pure and jittable.
        keeps_labels: whether the largest logit stays the largest.
        summary: one sentence.
    """

    fit: Callable[..., Any]
    apply: Callable[..., Any]
    keeps_labels: bool
    summary: str


CALIBRATORS: Final[Mapping[str, Calibrator]] = {
    "temperature": Calibrator(
        scaling.fit_temperature, scaling.apply_temperature, True, "One temperature for all voxels."
    ),
    "class-temperature": Calibrator(
        scaling.fit_class_temperature,
        scaling.apply_class_temperature,
        True,
        "A temperature for each predicted class.",
    ),
    "vector": Calibrator(
        scaling.fit_vector_scaling, scaling.apply_vector_scaling, False, "Scale and offset of each class."
    ),
    "dirichlet": Calibrator(
        scaling.fit_dirichlet, scaling.apply_dirichlet, False, "A linear map of the log-probabilities."
    ),
    "isotonic": Calibrator(
        isotonic.fit_isotonic, isotonic.apply_isotonic, False, "A rising curve for each class."
    ),
    "local": Calibrator(
        fit_local_calibration,
        apply_local_calibration,
        True,
        "A small network corrects each voxel from the probabilities around it.",
    ),
    "local-free": Calibrator(
        functools.partial(fit_local_calibration, keeps_labels=False),
        apply_local_calibration,
        False,
        "The same, and probabilities may contradict the label map, which stays.",
    ),
}
"""Methods by name, from the fewest parameters to the most."""
