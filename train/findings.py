"""Findings of `calib-jax report` about a trained network: what its evaluation shows beyond a table."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from calib_jax import LocalCalibration, predictions
from calib_jax._sums.bins import Bins
from calib_jax.report import findings
from calib_jax.report.details import Details
from calib_jax.report.measure import CaseFigures, measure
from calib_jax.report.study import Study, results_of
from calib_jax.results import ModelResult, write_rows
from train.data import Case, Dataset
from train.data.case import members_of
from train.data.geometry import spacing_of
from train.data.ignore import IGNORE
from train.data.shapes import Shares
from train.errors import InputError
from train.evaluate import NUM_BINS, SumsOfClasses, regions_of
from train.inference import VolumePredictor
from train.local_calibration import calibrate
from train.progress import progress


class Row(NamedTuple):
    """A row of the table: a network, perhaps with a calibration that keeps its labels."""

    name: str
    predict: VolumePredictor
    local: LocalCalibration | None = None


def can_measure(dataset: Dataset, case_names: Sequence[str]) -> bool:
    """Whether `measure_rows` can be called: each case has one label, and one process sees all cases."""
    first = dataset.load(dataset.case_names.index(case_names[0]))
    return first.annotations is None and jax.process_count() == 1


def measure_rows(rows: Sequence[Row], dataset: Dataset, case_names: Sequence[str]) -> Study:
    """Predicts and measures whole volumes, on the grids of their files.

    Cases without a labelled voxel are among the faults of the study.

    Raises:
        InputError: no case has a labelled voxel.
    """
    cases: dict[str, list[CaseFigures]] = {row.name: [] for row in rows}
    faults, bins = [], Bins("hard", NUM_BINS)
    index_of = {case: index for index, case in enumerate(dataset.case_names)}
    for name in progress(case_names, desc="evaluating", leave=False):
        case = dataset.load(index_of[name])
        if dataset.has_ignore and ((case.source or case).label == IGNORE).all():
            faults.append(f"{name} has no labelled voxel: label some, or leave it out.")
            continue
        for prediction in _predictions(rows, dataset, case):
            cases[prediction.model].append(measure(prediction, bins))
    if len(faults) == len(case_names):
        raise InputError(f"Nothing can be evaluated on {dataset.name}: {' '.join(faults)}")
    return Study(cases, bins, faults)


def results_of_rows(study: Study, dataset: Dataset, regions: Sequence[str]) -> list[ModelResult]:
    """The result of each row.

    Args:
        study: return value of `measure_rows`.
        dataset: the data set of the cases.
        regions: of a network with sigmoids; empty for a softmax over classes.
    """
    names, first_class, _ = _classes(dataset, regions)
    subjects = dict(zip(dataset.case_names, dataset.subjects, strict=True))
    return results_of(study, names, first_class=first_class, subjects=subjects)


def details_of_rows(
    study: Study, results: Sequence[ModelResult], dataset: Dataset, regions: Sequence[str], folder: Path
) -> Details:
    """What the page shows beside the results. Writes `cases.csv` and pictures of cases into the folder."""
    names, first_class, overlap = _classes(dataset, regions)
    table = list(findings.case_table(study, results, first_class=first_class))
    write_rows(folder / "cases.csv", list(table[0]), table)
    return findings.details_of(
        study,
        results,
        table,
        {},
        first_class=first_class,
        label_names=findings.label_names_of(names, regions=overlap),
        notices=(),
        folder=folder,
    )


def _classes(dataset: Dataset, regions: Sequence[str]) -> tuple[Sequence[str], int, bool]:
    """Names of the classes or regions, the index of the first one that is reported, and whether they overlap."""
    of, names = regions_of(dataset, regions, predicted=bool(regions))
    overlap = isinstance(of, SumsOfClasses)
    return (names, 0, True) if overlap else (dataset.class_names, 1, False)


def _predictions(rows: Sequence[Row], dataset: Dataset, case: Case) -> Iterator[predictions.Case]:
    """The case as each row predicts it."""
    first = rows[0].predict(case.image)
    for row in rows:
        own = first if row.predict is rows[0].predict else row.predict(case.image)
        probs = own if row.local is None else calibrate(own, case.image, row.local)
        yield _as_prediction(row, dataset, case, probs, own)


def _as_prediction(row: Row, dataset: Dataset, case: Case, probs: Shares, own: Shares) -> predictions.Case:
    """A case with `probs`, and with the labels that the network's `own` probabilities give."""
    regions, image, label, affine = row.predict.regions, case.image[..., :1], case.label, case.affine
    if case.source is not None:
        placement, label = case.source.placement, case.source.label
        probs, own = (placement.back(x, background=not regions) for x in (probs, own))
        image, affine = placement.back(image, background=False), placement.box_affine
    where = label != IGNORE if dataset.has_ignore else None
    of, _ = regions_of(dataset, regions, predicted=bool(regions))
    if isinstance(of, SumsOfClasses):
        labels = members_of(label, of.groups)
        predicted = own > 0.5 if of.predicted else members_of(own.argmax(-1), of.groups)
        if not of.predicted:
            probs = np.stack([probs[..., list(ids)].sum(-1) for ids in of.groups], -1)
    else:
        labels = label.astype(np.int32) if where is None else np.where(where, label.astype(np.int32), -1)
        predicted = own.argmax(-1)
    return predictions.Case(
        name=case.name,
        model=row.name,
        probs=probs,
        labels=labels,
        where=where,
        image=image[..., 0],
        spacing=spacing_of(affine, label.ndim),
        predicted=predicted,
    )
