"""What post-hoc calibration would change, by cross-validation over the cases of a report.

Calibrators that treat every voxel alike are fitted to and judged on the samples of voxels that `measure` keeps. So
no file is read again, and memory stays within a few hundred kilobytes per case. Local calibration looks at the
voxels around each one, so it reads the cases again.
"""

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import jax
import numpy as np

from calib_jax._probabilities import as_logits, as_probs, finite_log
from calib_jax._sums.bins import Bins
from calib_jax._sums.host import inner_edges
from calib_jax.binning import BinStatistics
from calib_jax.calibrators import CALIBRATORS, Calibrator
from calib_jax.report.measure import CaseFigures, Sample, measure
from calib_jax.report.study import Study, results_of
from calib_jax.report.table import ModelRow, compare_models
from calib_jax.results import ModelResult

if TYPE_CHECKING:
    from calib_jax.predictions import Case, Predictions

FOLDS: Final = 5
SHOWN: Final = ("temperature", "class-temperature", "isotonic")
"""Names in `CALIBRATORS` of those that treat every voxel alike and have few parameters."""
_MOST_FITTED = 1 << 17  # voxels that one fit reads
_IN_BATCH = 1 << 15  # voxels of a batch; all batches have this size, so that one program is compiled
_LOCAL_FOLDS = 2
_TINY = float(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True)
class Gain:
    """What a calibrator changes, on cases that it was not fitted to.

    Attributes:
        calibrator: name of the calibrator.
        params: its parameters when fitted to all cases, in words, if they are few.
        keeps_labels: whether no predicted label changes.
        folds: number of folds.
        row: comparison with the probabilities as they are, on the same samples of voxels.
    """

    calibrator: str
    params: str
    keeps_labels: bool
    folds: int
    row: ModelRow


def cross_validate(
    cases: Sequence[CaseFigures], result: ModelResult, bins: Bins, *, first_class: int, regions: bool
) -> list[Gain]:
    """Cross-validates every calibrator over the cases of one model; [] for fewer than two subjects.

    Args:
        cases: figures of the cases, in the order of `result`.
        result: of the model, for names.
        bins: how [0, 1] is divided into bins.
        first_class: index of the first class that is reported.
        regions: whether classes are regions, which overlap.
    """
    folds = _folds(result, FOLDS)
    if len(folds) < 2:
        return []
    samples = [case.sample for case in cases]
    before = [_judge(sample, sample.probs, bins, first_class, regions) for sample in samples]
    results = [_result(result, "as it is", before)]
    for name in SHOWN:
        calibrator, after = CALIBRATORS[name], {}
        for held_out in folds:
            params = _fit(calibrator, [x for i, x in enumerate(samples) if i not in held_out], regions)
            probs = _applied(calibrator, [samples[i].probs for i in held_out], params, regions)
            for i, calibrated in zip(held_out, probs, strict=True):
                after[i] = _judge(samples[i], calibrated, bins, first_class, regions)
        results.append(_result(result, name, [after[i] for i in range(len(samples))]))
    gains = []
    for name, row in zip(SHOWN, compare_models(results, resamples=2000)[1:], strict=True):
        temperatures = name.endswith("temperature")
        words = _in_words(_fit(CALIBRATORS[name], samples, regions)) if temperatures else ""
        gains.append(Gain(name, words, CALIBRATORS[name].keeps_labels, len(folds), row))
    return gains


def cross_validate_local(
    predictions: "Predictions",
    result: ModelResult,
    bins: Bins,
    *,
    first_class: int,
    progress: Callable[[int, int], Any] | None = None,
) -> list[Gain]:
    """Cross-validates local calibration in two folds, on whole cases; [] for fewer than two subjects.

    Args:
        predictions: to read the cases of `result` from, each of them twice.
        result: of a model.
        bins: how [0, 1] is divided into bins.
        first_class: index of the first class that is reported.
        progress: called with the number of cases read and to read.
    """
    calibrator, names, regions = CALIBRATORS["local"], result.case_names, predictions.regions
    folds = _folds(result, _LOCAL_FOLDS)
    if len(folds) < 2:
        return []
    figures: dict[str, CaseFigures] = {}
    read = itertools.count(1)

    def cases(chosen: Sequence[str]) -> Iterator["Case"]:
        for name in chosen:
            yield predictions.read(name, result.name)
            if progress:
                progress(next(read), 2 * len(names))

    def batches(chosen: Sequence[str]) -> Iterator[tuple[np.ndarray, ...]]:
        for case in cases(chosen):
            assert case.labels is not None
            where = np.ones(case.probs.shape[:-1], bool) if case.where is None else case.where
            yield as_logits(case.probs, regions=regions)[None], case.labels[None], where[None]

    for held_out in folds:
        fitted = [name for i, name in enumerate(names) if i not in held_out]
        spacing = predictions.read(fitted[0], result.name).spacing
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", RuntimeWarning
            )  # a fit without gain leaves probabilities as they are
            params = calibrator.fit(functools.partial(batches, fitted), regions=regions, spacing=spacing)
        for case in cases([names[i] for i in held_out]):
            logits = np.asarray(calibrator.apply(as_logits(case.probs, regions=regions)[None], params))[0]
            probs = as_probs(logits, regions=regions)
            figures[case.name] = measure(dataclasses.replace(case, probs=probs), bins)
    study = Study({"local": [figures[name] for name in names]}, bins)
    all_names = [*[""] * first_class, *result.class_names]
    subjects = dict(zip(names, result.subjects, strict=True))
    (after,) = results_of(study, all_names, first_class=first_class, subjects=subjects)
    rows = compare_models([result, after], resamples=2000)
    return [Gain("local", "", calibrator.keeps_labels, _LOCAL_FOLDS, rows[1])]


def _folds(result: ModelResult, most: int) -> list[list[int]]:
    """Indices of the cases that each fold holds out; the cases of a subject are held out together."""
    subjects = list(dict.fromkeys(result.subjects))
    fold_of = {subject: i % most for i, subject in enumerate(subjects)}
    return [
        [i for i, subject in enumerate(result.subjects) if fold_of[subject] == fold]
        for fold in range(min(most, len(subjects)))
    ]


def _fit(calibrator: Calibrator, samples: Sequence[Sample], regions: bool) -> Any:
    """Fits to voxels that are drawn from the samples, each as often as the voxels that it stands for."""
    most = max(_MOST_FITTED // len(samples) // (samples[0].probs.shape[1] if regions else 1), 64)
    drawn = [_redrawn(sample, most) for sample in samples]
    log_probs = finite_log(np.concatenate([_exclusive(sample.probs, regions) for sample in drawn]))
    labels = np.concatenate([sample.labels.reshape(-1).astype(np.int32) for sample in drawn])
    missing = -len(labels) % _IN_BATCH  # filled up with voxels of no class, which do not count
    log_probs = np.pad(log_probs, ((0, missing), (0, 0))).reshape(-1, 1, _IN_BATCH, log_probs.shape[1])
    labels = np.pad(labels, (0, missing), constant_values=-1).reshape(-1, 1, _IN_BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a temperature at its bound is shown as it is
        return jax.device_get(calibrator.fit(list(zip(log_probs, labels, strict=True))))


def _redrawn(sample: Sample, most: int) -> Sample:
    """At most `most` voxels of equal weight: systematic sampling in proportion to the weights."""
    ends = sample.weight.cumsum()
    number = min(most, round(ends[-1]))
    index = np.searchsorted(ends, (np.arange(number) + 0.5) * ends[-1] / number)
    return Sample(sample.probs[index], sample.labels[index], np.ones(number))


def _in_words(params: Any) -> str:
    numbers = np.ravel(jax.tree.leaves(params)[0])
    return (
        ""
        if numbers.size > 6
        else f"T\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{', '.join(f'{x:.3g}' for x in numbers)}"
    )


def _exclusive(probs: np.ndarray, regions: bool) -> np.ndarray:
    """Probabilities of classes that exclude each other, one row per problem."""
    return np.stack([1 - probs, probs], -1).reshape(-1, 2) if regions else probs


def _applied(
    calibrator: Calibrator, samples: Sequence[np.ndarray], params: Any, regions: bool
) -> list[np.ndarray]:
    """Calibrated probabilities of samples."""
    log_probs = finite_log(_exclusive(np.concatenate(samples), regions))
    size, classes = log_probs.shape
    padded = np.pad(log_probs, ((0, -size % _IN_BATCH), (0, 0))).reshape(-1, _IN_BATCH, classes)
    apply = _compiled(calibrator.apply)
    logits = np.concatenate([np.asarray(apply(x, params), np.float64) for x in padded])[:size]
    exclusive = as_probs(logits, regions=False).astype(np.float32)
    probs = exclusive[:, 1].reshape(-1, samples[0].shape[1]) if regions else exclusive
    return np.split(probs, np.cumsum([len(sample) for sample in samples])[:-1])


@functools.cache
def _compiled(apply: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(apply)


class _Judged(NamedTuple):
    """Weighted bins `[3, classes, bins]`, Brier scores and likelihoods of a case's sample."""

    bins: np.ndarray
    brier: np.ndarray
    nll: np.ndarray


def _judge(sample: Sample, probs: np.ndarray, bins: Bins, first_class: int, regions: bool) -> _Judged:
    weight, total = sample.weight, max(float(sample.weight.sum()), _TINY)
    classes = probs.shape[1]
    member = sample.labels if regions else sample.labels[:, None] == np.arange(classes)
    if bins.binning == "soft":
        bins = dataclasses.replace(bins, binning="hard")
    sums = np.zeros((3, classes, bins.num_bins))
    for c in range(first_class, classes):
        values = probs[:, c]
        index = np.searchsorted(inner_edges(values, bins), values, side="left")
        for row, column in enumerate((weight, weight * values, weight * member[:, c])):
            sums[row, c] = np.bincount(index, column, bins.num_bins)
    column = weight[:, None]
    brier = (column * np.square(probs.astype(np.float64) - member)).sum(0) / total
    likelihood = np.where(member, probs, 1 - probs.astype(np.float64) if regions else 1)
    nll = -(column * np.log(np.maximum(likelihood, _TINY))).sum(0) / total
    if not regions:
        nll = np.full(classes, nll.sum())
    return _Judged(sums[:, first_class:], brier[first_class:], nll[first_class:])


def _result(of: ModelResult, name: str, judged: Sequence[_Judged]) -> ModelResult:
    stats = BinStatistics(*np.stack([one.bins for one in judged], 1))
    brier, nll = (np.stack([getattr(one, field) for one in judged]) for field in ("brier", "nll"))
    return ModelResult(name, of.case_names, of.class_names, stats, of.dice, brier, nll, subjects=of.subjects)
