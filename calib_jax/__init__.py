"""Calibration losses and metrics for image segmentation, as pure functions of JAX arrays.

Arrays are batch first and channel last. Nothing here reads a file, holds state or looks at traced values,
so every function may be called inside `jit`, `vmap`, `grad` and `shard_map`, on CPU, GPU and TPU.

    loss = calib_jax.mL1_ace(jax.nn.softmax(logits), labels)
"""

from calib_jax.binning import BinStatistics, bin_edges, bin_index, bin_statistics
from calib_jax.errors import (
    average_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
)
from calib_jax.losses import mL1_ace, mL1_ece, mL1_mce, segmentation_loss
from calib_jax.metrics import dice_score
from calib_jax.reliability import ReliabilityCurve, reliability_curve, reliability_histogram

__all__ = [
    "BinStatistics",
    "ReliabilityCurve",
    "average_calibration_error",
    "bin_edges",
    "bin_index",
    "bin_statistics",
    "dice_score",
    "expected_calibration_error",
    "mL1_ace",
    "mL1_ece",
    "mL1_mce",
    "maximum_calibration_error",
    "reliability_curve",
    "reliability_histogram",
    "segmentation_loss",
]
__version__ = "0.1.0"
