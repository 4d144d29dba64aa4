"""Models compared in numbers: means over cases, bootstrap intervals, changes and paired tests.

A figure is computed per case first, as the mean over the classes of a case, and then averaged over cases. A
case and class in which nothing was counted (NaN) is left out of these means, and a case without any counted
class is left out altogether. Of a model trained several times, a case's figure is its mean over the repeats.
Intervals and tests work on cases, not voxels, since cases are what is independent.
"""

import csv
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import scipy.stats
from jaxtyping import Float

from calib_jax._checks import check_size
from calib_jax.report.results import Result

CONFIDENCE = 0.95
Role = Literal["baseline", "model", "reference"]
_Bootstrap = Callable[[np.ndarray], tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Change:
    """A metric of one model against the baseline, on the cases that both have.

    Attributes:
        difference: mean over cases of model minus baseline.
        difference_low: lower end of the bootstrap interval of `difference`; NaN for fewer than two cases.
        difference_high: its upper end.
        relative: `difference` over the baseline's mean on these cases.
        p_value: Wilcoxon signed-rank test on the per-case differences, two-sided, not corrected for the
            number of models or metrics; 1 if no case differs, NaN if there is none.
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
        low: lower end of the bootstrap interval of `mean`; NaN for fewer than two cases.
        high: its upper end.
        cases: number of cases that count.
        per_class: mean over cases of each class by itself.
        change: comparison with the baseline; None for the baseline and the reference.
        per_repeat: the mean of each training by itself; empty for a model trained once.
        spread: standard deviation of `per_repeat` (of a sample); NaN for fewer than two.
    """

    mean: float
    low: float
    high: float
    cases: int
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
        results: one result per model, with the same classes; `RepeatedResult` for one trained several times.
        baseline: index or name of the model that the others are compared with.
        reference: a further result to show in the last row without a test, such as the best that any
            model could reach.
        resamples: number of bootstrap samples of cases behind each interval.
        seed: seed of the bootstrap; the same input gives the same table.

    Returns:
        One row per model in the order given, then the reference.

    Raises:
        ValueError: if there is no result, two share a name, classes differ, or the baseline is not there.

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
    bootstrap = functools.partial(_bootstrap, resamples=resamples, seed=seed)
    base_metrics = base.metrics()

    def row(result: Result, role: Role) -> ModelRow:
        summaries = {}
        repeats = {repeat: (one.case_names, one.metrics()) for repeat, one in result.repeats.items()}
        for name, values in result.metrics().items():
            cases = case_means(result.case_names, values)
            base_cases = case_means(base.case_names, base_metrics[name])
            change = _change(cases, base_cases, bootstrap) if role == "model" else None
            per_class = dict(zip(result.class_names, map(_nan_mean, values.T), strict=True))
            per_repeat = {
                repeat: _nan_mean(np.array(list(case_means(names, metrics[name]).values())))
                for repeat, (names, metrics) in repeats.items()
            }
            summaries[name] = _summary(cases, per_class, bootstrap, change, per_repeat)
        return ModelRow(result.name, role, summaries)

    rows = [row(result, "baseline" if result is base else "model") for result in results]
    return rows if reference is None else [*rows, row(reference, "reference")]


def check_comparable(
    results: Sequence[Result], *, baseline: int | str = 0, reference: Result | None = None
) -> int:
    """Raises ValueError where results cannot stand in one table; returns the index of the baseline."""
    if not results:
        raise ValueError("there is no result to compare: give at least one ModelResult.")
    everyone = [*results, *([reference] if reference is not None else [])]
    names = [result.name for result in everyone]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two results are called {twice[0]!r}: give every model a name of its own.")
    for result in everyone[1:]:
        if result.class_names != everyone[0].class_names:
            raise ValueError(
                f"{result.name!r} has the classes {', '.join(result.class_names)} and {names[0]!r} has "
                f"{', '.join(everyone[0].class_names)}: only results with the same classes can be compared."
            )
    return _baseline_index(names[: len(results)], baseline)


def case_means(case_names: Sequence[str], values: Float[np.ndarray, "cases classes"]) -> dict[str, float]:
    """Mean over the counted classes of each case that has any, by the name of the case."""
    means = {name: _nan_mean(row) for name, row in zip(case_names, values, strict=True)}
    return {name: mean for name, mean in means.items() if not math.isnan(mean)}


def write_csv(rows: Sequence[ModelRow], path: str | os.PathLike[str]) -> None:
    """Writes one row per model, metric and class; in the class `mean`, the mean over classes.

    Of a model trained several times, the means of each repeat follow, in rows that name it.
    """
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, _CSV_COLUMNS, restval="")
        writer.writeheader()
        for row in rows:
            for metric, summary in row.metrics.items():
                for line in _csv_lines(row, metric, summary):
                    writer.writerow(line)


def to_json(rows: Sequence[ModelRow]) -> dict[str, Any]:
    """The rows as a dictionary for `json.dumps`: `{"models": [...]}`, with None in place of NaN."""
    return {"models": [_without_nan(dataclasses.asdict(row)) for row in rows]}


def _baseline_index(names: Sequence[str], baseline: int | str) -> int:
    if isinstance(baseline, str):
        if baseline not in names:
            raise ValueError(f"no result is called {baseline!r}: the baseline is one of {', '.join(names)}.")
        return list(names).index(baseline)
    if not 0 <= baseline < len(names):
        raise ValueError(f"baseline {baseline} is out of range: there are {len(names)} results, from 0 on.")
    return baseline


def _summary(
    cases: Mapping[str, float],
    per_class: Mapping[str, float],
    bootstrap: _Bootstrap,
    change: Change | None,
    per_repeat: Mapping[str, float],
) -> Summary:
    values = np.array(list(cases.values()))
    spread = float(np.std(list(per_repeat.values()), ddof=1)) if len(per_repeat) > 1 else math.nan
    return Summary(_nan_mean(values), *bootstrap(values), values.size, per_class, change, per_repeat, spread)


def _change(cases: Mapping[str, float], base_cases: Mapping[str, float], bootstrap: _Bootstrap) -> Change:
    shared = [name for name in cases if name in base_cases]
    base = np.array([base_cases[name] for name in shared])
    differences = np.array([cases[name] for name in shared]) - base
    relative = _nan_mean(differences) / _nan_mean(base) if base.any() else math.nan
    return Change(
        _nan_mean(differences), *bootstrap(differences), relative, _wilcoxon(differences), len(shared)
    )


def _bootstrap(values: Float[np.ndarray, " cases"], *, resamples: int, seed: int) -> tuple[float, float]:
    """Percentile bootstrap of the mean over cases; NaN for fewer than two."""
    if values.size < 2:
        return math.nan, math.nan
    interval = scipy.stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=1000,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _wilcoxon(differences: Float[np.ndarray, " cases"]) -> float:
    if not differences.size:
        return math.nan
    if not differences.any():
        return 1.0
    result: Any = scipy.stats.wilcoxon(differences)
    return float(result.pvalue)


def _nan_mean(values: Float[np.ndarray, " any"]) -> float:
    found = values[~np.isnan(values)]
    return float(found.mean()) if found.size else math.nan


_NESTED = ("per_class", "per_repeat", "change")
_CSV_COLUMNS = (
    *("model", "role", "metric", "class", "repeat"),
    *(field.name for field in dataclasses.fields(Summary) if field.name not in _NESTED),
    *(field.name for field in dataclasses.fields(Change)),
)


def _csv_lines(row: ModelRow, metric: str, summary: Summary) -> Iterator[dict[str, Any]]:
    start = {"model": row.name, "role": row.role, "metric": metric}
    numbers = dataclasses.asdict(summary)
    per_class, per_repeat, change = (numbers.pop(name) for name in _NESTED)
    yield {**start, "class": "mean", **numbers, **(change or {})}
    for repeat, mean in per_repeat.items():
        yield {**start, "class": "mean", "repeat": repeat, "mean": mean}
    for class_name, mean in per_class.items():
        yield {**start, "class": class_name, "mean": mean}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
