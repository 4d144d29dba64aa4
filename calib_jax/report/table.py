"""Comparison of models in numbers: means over cases, bootstrap intervals, changes and paired tests.

A case's figure is the mean of a metric over the classes of the case. Undefined values (NaN, where nothing was
counted) are left out of this mean, and a case without any defined value is left out altogether. For a model that
was trained several times, a case's figure is its mean over the repeats. Intervals and tests are over subjects, each
with all its cases, rather than over voxels or cases, since those of one subject are not independent.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from calib_jax._checks import check_size
from calib_jax.report.archive import without_nan
from calib_jax.results import Result, nan_mean, write_rows

CONFIDENCE = 0.95
Role = Literal["baseline", "model", "reference"]
_Cases = Mapping[str, Mapping[str, float]]  # by metric, then by name of the case
_Sample = tuple[Float[np.ndarray, " cases"], Sequence[str]]  # values, and the subject of each
_Bootstrap = Callable[[Sequence[_Sample]], list[tuple[float, float]]]


@dataclasses.dataclass(frozen=True)
class Change:
    """Change of a metric from the baseline to a model, over the cases that both have.

    Attributes:
        difference: mean over cases of model minus baseline.
        difference_low: lower end of the bootstrap interval of `difference`; NaN for fewer than two subjects.
        difference_high: upper end of that interval.
        relative: `difference` divided by the baseline's mean over the same cases.
        p_value: two-sided Wilcoxon signed-rank test of the mean difference of each subject, not corrected for the
            number of models or metrics; 1 if no subject differs, NaN if there is none.
        pairs: number of cases compared.
    """

    difference: float
    difference_low: float
    difference_high: float
    relative: float
    p_value: float
    pairs: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """A metric of one model over a data set.

    Attributes:
        mean: mean over cases of the mean over classes.
        low: lower end of the bootstrap interval of `mean`; NaN for fewer than two subjects.
        high: upper end of that interval.
        cases: number of cases with a defined value.
        subjects: number of subjects that these cases are of.
        per_class: mean over cases of each class.
        change: change from the baseline; None for the baseline itself and the reference.
        per_repeat: mean of each training; empty for a model trained once.
        spread: sample standard deviation of `per_repeat`; NaN for fewer than two.
    """

    mean: float
    low: float
    high: float
    cases: int
    subjects: int
    per_class: Mapping[str, float]
    change: Change | None
    per_repeat: Mapping[str, float]
    spread: float


@dataclasses.dataclass(frozen=True)
class ModelRow:
    """A row of the table: one model with a `Summary` of each metric."""

    name: str
    role: Role
    metrics: Mapping[str, Summary]


_NESTED = ("per_class", "per_repeat", "change")
_CSV_COLUMNS = (
    *("model", "role", "metric", "class", "repeat"),
    *(field.name for field in dataclasses.fields(Summary) if field.name not in _NESTED),
    *(field.name for field in dataclasses.fields(Change)),
)


def compare_models(
    results: Sequence[Result],
    *,
    baseline: int | str = 0,
    reference: Result | None = None,
    resamples: int = 9999,
    seed: int = 0,
) -> list[ModelRow]:
    """Compares models over the cases of a data set.

    Args:
        results: one result per model, all with the same classes; `RepeatedResult` for a model trained several
            times.
        baseline: index or name of the model that the others are compared with.
        reference: a further result for the last row, shown without a test, such as the best that any
            model could reach.
        resamples: number of bootstrap samples of subjects for each interval.
        seed: seed of the bootstrap; equal input gives an equal table.

    Returns:
        One row per model in the order of `results`, then the reference, with the metrics that all of them have.

    Raises:
        ValueError: if there is no result, two results share a name, classes differ, or no result is the baseline.

    Example:
        >>> from calib_jax import BinStatistics
        >>> from calib_jax.report import ModelResult
        >>> def result(name, frequency):
        ...     count, cases = np.full((3, 1, 1), 10), ("case 1", "case 2", "case 3")
        ...     stats = BinStatistics(count, 0.9 * count, frequency * count)
        ...     return ModelResult(name, cases, ("tumour",), stats, np.full((3, 1), 0.8))
        >>> baseline, model = compare_models([result("Dice", 0.5), result("Dice + mL1-ACE", 0.8)])
        >>> round(baseline.metrics["ACE"].mean, 3), round(model.metrics["ACE"].change.relative, 3)
        (0.4, -0.75)
    """
    check_size("resamples", resamples)
    base = results[check_comparable(results, baseline=baseline, reference=reference)]
    shown = [*results, *([reference] if reference is not None else [])]
    shared = [name for name in base.metrics() if all(name in result.metrics() for result in shown)]
    base_cases = _cases_by_metric(base, shared)
    bootstrap = functools.partial(_bootstrap, resamples=resamples, seed=seed)
    rows = []
    for result in results:
        role, compared = ("baseline", {}) if result is base else ("model", base_cases)
        rows.append(_row(result, role, shared, compared, bootstrap))
    return rows if reference is None else [*rows, _row(reference, "reference", shared, {}, bootstrap)]


def check_comparable(
    results: Sequence[Result], *, baseline: int | str = 0, reference: Result | None = None
) -> int:
    """Returns the index of the baseline; raises ValueError if the results do not fit in one table."""
    if not results:
        raise ValueError("there is no result to compare: give at least one ModelResult.")
    shown = [*results, *([reference] if reference is not None else [])]
    names = [result.name for result in shown]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two results are called {twice[0]!r}: give every model a name of its own.")
    for result in shown[1:]:
        if result.class_names != shown[0].class_names:
            raise ValueError(
                f"{result.name!r} has the classes {', '.join(result.class_names)} and {names[0]!r} has "
                f"{', '.join(shown[0].class_names)}: only results with the same classes can be compared."
            )
    names = names[: len(results)]
    if isinstance(baseline, str):
        if baseline not in names:
            raise ValueError(f"no result is called {baseline!r}: the baseline is one of {', '.join(names)}.")
        return names.index(baseline)
    if not 0 <= baseline < len(names):
        raise ValueError(f"baseline {baseline} is out of range: there are {len(names)} results, from 0 on.")
    return baseline


def case_means(case_names: Sequence[str], values: Float[np.ndarray, "cases classes"]) -> dict[str, float]:
    """Mean over the defined classes of each case that has any, by the name of the case."""
    means = dict(zip(case_names, nan_mean(values, axis=1).tolist(), strict=True))
    return {name: mean for name, mean in means.items() if not math.isnan(mean)}


def mean_interval(
    values: Float[np.ndarray, " cases"], subjects: Sequence[str], *, resamples: int = 9999, seed: int = 0
) -> tuple[float, float, float]:
    """Mean over the defined cases, with the ends of its bootstrap interval; NaN where there is none."""
    defined = ~np.isnan(values)
    sample = values[defined], np.array(subjects)[defined].tolist()
    ((low, high),) = _bootstrap([sample], resamples=resamples, seed=seed)
    return float(nan_mean(values)), low, high


def write_csv(rows: Sequence[ModelRow], path: str | os.PathLike[str]) -> None:
    """Writes one row per model, metric and class; the class `mean` is the mean over classes.

    For a model that was trained several times, a row with the mean of each repeat follows.
    """
    lines: list[dict[str, Any]] = []
    for row in rows:
        for metric, summary in row.metrics.items():
            start = {"model": row.name, "role": row.role, "metric": metric}
            numbers = dataclasses.asdict(summary)
            per_class, per_repeat, change = (numbers.pop(name) for name in _NESTED)
            lines.append({**start, "class": "mean", **numbers, **(change or {})})
            for repeat, mean in per_repeat.items():
                lines.append({**start, "class": "mean", "repeat": repeat, "mean": mean})
            for class_name, mean in per_class.items():
                lines.append({**start, "class": class_name, "mean": mean})
    write_rows(path, _CSV_COLUMNS, lines)


def to_json(rows: Sequence[ModelRow]) -> dict[str, Any]:
    """The rows as a dictionary for `json.dumps`: `{"models": [...]}`, with None in place of NaN."""
    return {"models": [without_nan(dataclasses.asdict(row)) for row in rows]}


def _row(
    result: Result, role: Role, shared: Sequence[str], base_cases: _Cases, bootstrap: _Bootstrap
) -> ModelRow:
    """Summarises one model in the `shared` metrics; without `base_cases` it is not compared with the baseline."""
    cases = _cases_by_metric(result, shared)
    repeats = {repeat: _cases_by_metric(one, shared) for repeat, one in result.repeats.items()}
    subject_of = dict(zip(result.case_names, result.subjects, strict=True))
    intervals = bootstrap([_sample(means, subject_of) for means in cases.values()])
    changes = _changes(cases, base_cases, subject_of, bootstrap)
    summaries = {}
    metrics = result.metrics()
    for metric, (low, high) in zip(shared, intervals, strict=True):
        per_repeat = {repeat: _mean(means[metric].values()) for repeat, means in repeats.items()}
        summaries[metric] = Summary(
            mean=_mean(cases[metric].values()),
            low=low,
            high=high,
            cases=len(cases[metric]),
            subjects=len({subject_of[name] for name in cases[metric]}),
            per_class={
                name: float(nan_mean(column))
                for name, column in zip(result.class_names, metrics[metric].T, strict=True)
            },
            change=changes.get(metric),
            per_repeat=per_repeat,
            spread=float(np.std(list(per_repeat.values()), ddof=1)) if len(per_repeat) > 1 else math.nan,
        )
    return ModelRow(result.name, role, summaries)


def _cases_by_metric(result: Result, shared: Sequence[str]) -> _Cases:
    metrics = result.metrics()
    return {metric: case_means(result.case_names, metrics[metric]) for metric in shared}


def _mean(values: Iterable[float]) -> float:
    return float(nan_mean(list(values)))


def _changes(
    cases: _Cases, base_cases: _Cases, subject_of: Mapping[str, str], bootstrap: _Bootstrap
) -> dict[str, Change]:
    """Change of each metric over the cases that both models have; none without `base_cases`."""
    samples, relative = {}, {}
    for metric, base in base_cases.items():
        changes = {name: mean - base[name] for name, mean in cases[metric].items() if name in base}
        before = np.array([base[name] for name in changes])
        samples[metric] = _sample(changes, subject_of)
        relative[metric] = (
            float(nan_mean(samples[metric][0]) / nan_mean(before)) if before.any() else math.nan
        )
    intervals = bootstrap(list(samples.values()))
    return {
        metric: Change(_mean(change), low, high, relative[metric], _wilcoxon(change, subjects), change.size)
        for (metric, (change, subjects)), (low, high) in zip(samples.items(), intervals, strict=True)
    }


def _sample(means: Mapping[str, float], subject_of: Mapping[str, str]) -> _Sample:
    return np.array(list(means.values())), [subject_of[name] for name in means]


def _by_subject(
    values: Float[np.ndarray, " cases"], subjects: Sequence[str]
) -> tuple[Float[np.ndarray, " subjects"], Int[np.ndarray, " subjects"]]:
    """Sum and number of the values of each subject, in the order in which subjects first occur."""
    place = {subject: i for i, subject in enumerate(dict.fromkeys(subjects))}
    places = np.array([place[subject] for subject in subjects], np.intp)
    return np.bincount(places, values, len(place)), np.bincount(places, minlength=len(place))


def _bootstrap(samples: Sequence[_Sample], *, resamples: int, seed: int) -> list[tuple[float, float]]:
    """Percentile bootstrap interval of the mean of each sample; NaN for samples of fewer than two subjects.

    Subjects are drawn, each with all its cases. Samples with equally many cases of each subject share the draws,
    which is faster and gives each the interval that it has alone.
    """
    from scipy.stats import bootstrap

    intervals = [(math.nan, math.nan)] * len(samples)
    grouped: dict[tuple[int, ...], dict[int, np.ndarray]] = {}
    for i, sample in enumerate(samples):
        total, number = _by_subject(*sample)
        grouped.setdefault(tuple(number.tolist()), {})[i] = total
    for number, totals in grouped.items():
        if len(number) < 2:
            continue
        found = bootstrap(
            [np.array(number), *totals.values()],
            lambda number, *drawn, axis: np.stack(drawn).sum(axis) / number.sum(axis),
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=1000,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
        for i, low, high in zip(totals, found.low.tolist(), found.high.tolist(), strict=True):
            intervals[i] = low, high
    return intervals


def _wilcoxon(changes: Float[np.ndarray, " cases"], subjects: Sequence[str]) -> float:
    from scipy.stats import wilcoxon

    total, number = _by_subject(changes, subjects)
    differences = total / number
    if not differences.any():
        return 1.0 if differences.size else math.nan
    result: Any = wilcoxon(differences)
    return float(result.pvalue)
