"""Measures every case of a folder of predictions, one case in memory per job, and keeps what is done.

Each case leaves a small file in the folder of the report. A second start uses this file, unless files of the case
or options have changed.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calib_jax._case_loop import for_each_case
from calib_jax._kept import CASES, Kept
from calib_jax._sums.bins import Bins
from calib_jax.binning import BinStatistics
from calib_jax.report.measure import CaseFigures, Slice, measure
from calib_jax.results import ModelResult

if TYPE_CHECKING:
    from calib_jax.predictions import Predictions


@dataclasses.dataclass(frozen=True)
class Study:
    """Figures of all cases.

    Attributes:
        cases: figures of the readable cases of each model, in the order of their names. Slices, which are large,
            are in the files of the cases, if figures are kept in files.
        bins: how [0, 1] is divided into bins.
        faults: what went wrong, one sentence for each case.
        kept: where the figures are kept; None if they are not.
        reused: number of cases that were found measured.
    """

    cases: Mapping[str, Sequence[CaseFigures]]
    bins: Bins
    faults: Sequence[str] = ()
    kept: Kept | None = None
    reused: int = 0

    def slice_of(self, model: str, name: str) -> Slice:
        """The slice of a case, from its file if figures are kept."""
        if self.kept is not None:
            return CaseFigures.load_slice(self.kept.path(model, name))
        (found,) = (case.slice for case in self.cases[model] if case.name == name)
        assert found is not None
        return found


def measure_cases(
    predictions: "Predictions",
    bins: Bins,
    folder: Path,
    *,
    options: Mapping[str, Any],
    jobs: int = 1,
    kept_in: str = CASES,
    figures_of: Callable[[str, str], CaseFigures] | None = None,
) -> Study:
    """Measures every case of every model.

    Args:
        predictions: return value of `calib_jax.predictions.open_predictions`.
        bins: how [0, 1] is divided into bins.
        folder: folder of the results; figures of cases go to `MODEL/CASE.npz` in its folder `kept_in`.
        options: what the figures depend on beside the files; JSON.
        jobs: number of threads, each of which holds a case.
        kept_in: name of a folder.
        figures_of: reads and measures a case of a model; None compares its predictions with its labels.

    Raises:
        ValueError: no case could be read.
        Stopped: on Ctrl-C, after the cases that were being measured are kept.
    """
    settings = [options, dataclasses.asdict(bins), list(predictions.class_names)]
    kept = Kept(folder / kept_in, settings, lambda model, name: predictions.files(name, model))

    def find(model: str, name: str) -> CaseFigures | None:
        figures = CaseFigures.load(kept.path(model, name), kept.key(model, name))
        return figures and dataclasses.replace(figures, slice=None)

    def one(model: str, name: str) -> CaseFigures:
        key = kept.key(model, name)  # before the files are read
        figures = figures_of(model, name) if figures_of else measure(predictions.read(name, model), bins)
        figures.save(kept.path(model, name), key)
        return dataclasses.replace(figures, slice=None)

    cases = cases_of(predictions)
    found, faults, reused = for_each_case(
        cases, one, find=find, done="measured", place=kept.folder, jobs=jobs
    )
    by_model = {model: [found[case] for case in found if case[0] == model] for model in predictions.models}
    return Study(by_model, bins, faults, kept, reused)


def cases_of(predictions: "Predictions") -> list[tuple[str, ...]]:
    """`(model, case)` of every case of every model; a case's label is read once for all models."""
    return [(model, name) for name in predictions.case_names for model in predictions.models]


def results_of(
    study: Study, class_names: Sequence[str], *, first_class: int, subjects: Mapping[str, str] | None = None
) -> list[ModelResult]:
    """The result of each model that has any case, of the classes from `first_class` on.

    Args:
        study: the figures.
        class_names: of all classes.
        first_class: index of the first class to report.
        subjects: subject of each case by the case's name; a case that is not there is a subject of its own.
    """
    results = []
    for model, cases in study.cases.items():
        if cases:
            names = tuple(class_names[first_class:])
            stats, boundary = (
                _stacked(
                    [getattr(case, field)[:, first_class:] for case in cases], study.bins.binning != "soft"
                )
                for field in ("bins", "boundary_bins")
            )
            dice, brier, nll = (
                np.stack([getattr(case, method)()[first_class:] for case in cases])
                for method in ("dice", "brier", "mean_nll")
            )
            case_names = tuple(case.name for case in cases)
            of_cases = tuple((subjects or {}).get(name, name) for name in case_names)
            results.append(ModelResult(model, case_names, names, stats, dice, brier, nll, boundary, of_cases))
    return results


def _stacked(bins: Sequence[np.ndarray], integer_counts: bool) -> BinStatistics:
    count, prob_sum, label_sum = np.stack(bins, 1)
    return BinStatistics(count.astype(np.int64) if integer_counts else count, prob_sum, label_sum)
