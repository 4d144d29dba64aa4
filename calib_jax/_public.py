"""What `calib_jax` offers. `calib_jax` imports this module when a name is first used."""

from calib_jax.accumulators import Accumulator, case_results, dataset_totals
from calib_jax.alternatives import (
    dsc_plus_plus_loss,
    focal_loss,
    label_smoothing_loss,
    margin_label_smoothing_loss,
    neighbor_aware_loss,
    spatially_varying_label_smoothing_loss,
)
from calib_jax.binning import BinStatistics, bin_edges, bin_index, bin_statistics
from calib_jax.bootstrap import bootstrap_interval
from calib_jax.calibrators import CALIBRATORS
from calib_jax.decisions import (
    RiskCoverage,
    dice_thresholds,
    expected_dice,
    risk_coverage,
    volume_interval,
)
from calib_jax.errors import (
    average_calibration_error,
    debiased_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
    top_label_statistics,
)
from calib_jax.isotonic import apply_isotonic, fit_isotonic
from calib_jax.local_calibration import (
    LocalCalibration,
    apply_local_calibration,
    fit_local_calibration,
)
from calib_jax.losses import mL1_ace, mL1_ece, mL1_mce
from calib_jax.metrics import brier_score, dice_score, negative_log_likelihood
from calib_jax.reliability import ReliabilityCurve, reliability_band, reliability_curve, reliability_histogram
from calib_jax.scaling import (
    DirichletCalibration,
    VectorScaling,
    apply_class_temperature,
    apply_dirichlet,
    apply_temperature,
    apply_vector_scaling,
    fit_class_temperature,
    fit_dirichlet,
    fit_temperature,
    fit_vector_scaling,
)
from calib_jax.segmentation import segmentation_loss, segmentation_loss_parts

__all__ = [
    "CALIBRATORS",
    "Accumulator",
    "BinStatistics",
    "DirichletCalibration",
    "LocalCalibration",
    "ReliabilityCurve",
    "RiskCoverage",
    "VectorScaling",
    "apply_class_temperature",
    "apply_dirichlet",
    "apply_isotonic",
    "apply_local_calibration",
    "apply_temperature",
    "apply_vector_scaling",
    "average_calibration_error",
    "bin_edges",
    "bin_index",
    "bin_statistics",
    "bootstrap_interval",
    "brier_score",
    "case_results",
    "dataset_totals",
    "debiased_calibration_error",
    "dice_score",
    "dice_thresholds",
    "dsc_plus_plus_loss",
    "expected_calibration_error",
    "expected_dice",
    "fit_class_temperature",
    "fit_dirichlet",
    "fit_isotonic",
    "fit_local_calibration",
    "fit_temperature",
    "fit_vector_scaling",
    "focal_loss",
    "label_smoothing_loss",
    "mL1_ace",
    "mL1_ece",
    "mL1_mce",
    "margin_label_smoothing_loss",
    "maximum_calibration_error",
    "negative_log_likelihood",
    "neighbor_aware_loss",
    "reliability_band",
    "reliability_curve",
    "reliability_histogram",
    "risk_coverage",
    "segmentation_loss",
    "segmentation_loss_parts",
    "spatially_varying_label_smoothing_loss",
    "top_label_statistics",
    "volume_interval",
]
