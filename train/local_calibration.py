"""Local calibration of a trained network, fitted on cases that the network was not trained on."""

from collections.abc import Iterator, Sequence

import numpy as np

import calib_jax
from calib_jax import LocalCalibration
from calib_jax._notes import warnings_as_notes
from calib_jax._probabilities import as_logits, as_probs
from train.data import Dataset
from train.data.annotators import soft_label
from train.data.case import ids_of, members_of
from train.data.geometry import spacing_of
from train.data.ignore import IGNORE
from train.data.pipeline import CachedCases
from train.data.shapes import Image, Shares
from train.errors import InputError
from train.inference import VolumePredictor


def fit_local_calibration(
    predict: VolumePredictor, dataset: Dataset, case_names: Sequence[str]
) -> LocalCalibration:
    """Fits a local calibration to the probabilities and images of whole cases, on the network's grid.

    Probabilities are free: evaluation keeps the network's labels. Several annotators count by their shares of each
    class. Voxels without a label are left out.

    Args:
        predict: a trained network.
        dataset: the data set of the cases.
        case_names: cases that the network was not trained on. They are kept in memory.

    Raises:
        InputError: if no voxel can be fitted.
    """
    cases = CachedCases(dataset, case_names)
    regions = ids_of(dataset, predict.regions)
    _, first = cases[0]

    def batches() -> Iterator[tuple[np.ndarray, ...]]:
        for index in range(len(cases)):
            _, case = cases[index]
            labels, where = case.label.astype(np.int32), case.label != IGNORE
            if case.annotations is not None:  # as evaluation counts them
                labels = soft_label(case.annotations, len(dataset.class_names))
                where = labels.sum(-1) > 0
            if regions and labels.ndim == where.ndim:
                labels = members_of(labels, regions)
            elif regions:
                labels = np.stack([labels[..., list(ids)].sum(-1) for ids in regions], -1)
            logits = as_logits(predict(case.image), regions=bool(regions))
            yield logits[None], labels[None], where[None], case.image[None]

    with warnings_as_notes("fitting a local calibration"):
        try:
            return calib_jax.fit_local_calibration(
                batches,
                keeps_labels=False,
                regions=bool(regions),
                spacing=spacing_of(first.affine, first.label.ndim),
            )
        except ValueError as error:
            raise InputError(f"Nothing can be calibrated on {', '.join(case_names)}: {error}") from error


def calibrate(probs: Shares, image: Image, params: LocalCalibration) -> Shares:
    """The probabilities of a case, locally calibrated."""
    logits = as_logits(probs, regions=params.regions)
    calibrated = np.asarray(
        calib_jax.apply_local_calibration(logits[None], params, image=image[None])[0], np.float32
    )
    return as_probs(calibrated, regions=params.regions)
