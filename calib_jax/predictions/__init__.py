"""Reads predictions that other programs wrote: nnU-Net, MONAI, or any folder of probabilities.

`open_predictions` matches the files of one or several models with label maps by their names. `Predictions` then
reads one case at a time. This package needs the extra `report`.
"""

from calib_jax.predictions.case import Case, PredictionError
from calib_jax.predictions.folders import Predictions
from calib_jax.predictions.opening import open_predictions
from calib_jax.predictions.writing import PredictionFile, write_probabilities

__all__ = [
    "Case",
    "PredictionError",
    "PredictionFile",
    "Predictions",
    "open_predictions",
    "write_probabilities",
]
