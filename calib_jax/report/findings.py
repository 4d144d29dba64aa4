"""What a folder of predictions shows: sentences, tables and pictures from the figures of its cases."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from calib_jax._kept import safe_name
from calib_jax.binning import BinStatistics
from calib_jax.decisions import dice_thresholds, risk_coverage, volume_interval
from calib_jax.report import wording
from calib_jax.report.details import PICTURES, CasePicture, Details, Point, Section
from calib_jax.report.gains import Gain
from calib_jax.report.slices import class_color, panels
from calib_jax.report.study import Study
from calib_jax.report.table import mean_interval
from calib_jax.results import CALIBRATION_ERRORS, ModelResult, nan_mean

_WORST = 3
_MOST_POINTS = 3000  # dots of a scatter plot
_FEWEST_RANKED = 5  # cases with a rank correlation
_FIRST = 15  # rows of the cases to look at first
_QUOTED = (0.05, 0.2), (0.8, 0.95)  # ranges of probability, of which the summary quotes the worse one
_WORTH_IT = 0.1  # a smaller change of ACE and NLL is called little
_LEVEL = 0.9  # of the interval of a volume
_FEWEST_IN_INTERVAL = 19  # cases of other subjects
_ALIKE = 0.1  # classes whose ACE differs by less than this share are called alike
_FEWEST_QUOTED = 100  # voxels in such a range


def over_confidence(stats: BinStatistics) -> Float[np.ndarray, "cases classes"]:
    """Mean over filled bins of how much further from 1/2 the mean probability is than the observed frequency.

    Example:
        >>> count = np.array([[[10, 10]]])
        >>> stats = BinStatistics(count, count * np.array([0.1, 0.9]), count * np.array([0.2, 0.7]))
        >>> over_confidence(stats).round(3).tolist()
        [[0.15]]
    """
    count = np.asarray(stats.count, np.float64)
    filled = count > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        prob, frequency = np.asarray(stats.prob_sum) / count, np.asarray(stats.label_sum) / count
    return nan_mean(np.where(filled, (prob - frequency) * np.sign(prob - 0.5), np.nan), axis=-1)


def case_table(study: Study, results: Sequence[ModelResult], *, first_class: int) -> Iterator[dict[str, Any]]:
    """A row for each model, case and class, with every figure at full precision; NaN where it is undefined."""
    for result in results:
        metrics = {name.lower(): values for name, values in result.metrics().items()}
        parts = {"boundary": result.boundary, "interior": result.interior}
        for part, stats in parts.items():
            metrics |= {f"{part}_{name.lower()}": _error(name, stats) for name in ("ACE", "ECE")}
        metrics["over_confidence"] = over_confidence(result.stats)
        for i, case in enumerate(study.cases[result.name]):
            expected = case.expected_dice()
            for j, class_name in enumerate(result.class_names):
                k = first_class + j
                volumes = {
                    "predicted": int(case.predicted[k]),
                    "true": int(case.true[k]),
                    "expected": float(case.prob_total[k]),
                }
                yield {
                    "model": result.name,
                    "case": case.name,
                    "class": class_name,
                    **{name: float(values[i, j]) for name, values in metrics.items()},
                    "expected_dice": float(expected[k]),
                    **{f"{name}_voxels": volume for name, volume in volumes.items()},
                    **{f"{name}_ml": volume * case.voxel_ml for name, volume in volumes.items()},
                }


def details_of(
    study: Study,
    results: Sequence[ModelResult],
    table: Sequence[Mapping[str, Any]],
    gains: Mapping[str, Sequence[Gain]],
    *,
    first_class: int,
    label_names: Sequence[str],
    notices: Sequence[str],
    folder: Path,
) -> Details:
    """Findings of a study, and the files of its pictures.

    Args:
        study: figures of the cases.
        results: result of each model.
        table: rows of `case_table`.
        gains: what calibrators change, by model.
        first_class: index of the first class that is reported.
        label_names: names of the values of label maps, background first.
        notices: what a reader should know about the files.
        folder: of the report.
    """
    sections = [
        *([_changes_by_gain(gains)] if any(gains.values()) else []),
        _near_and_away(results),
        _volumes(results, table),
        *([_thresholds(results)] if study.bins.binning == "hard" else []),
        _look_first(study, results, first_class),
        _confidence(study, results, first_class),
    ]
    return dataclasses.replace(
        points_of(table),
        headline=_headline(results[0]) if len(results) == 1 else "",
        summary={
            result.name: list(
                _sentences(result, gains.get(result.name, ()), "The model" if len(results) == 1 else "It")
            )
            for result in results
        },
        faults=list(study.faults),
        notices=list(notices),
        sections=[
            section if len(results) > 1 else _without_model(section)
            for section in sections
            if len(section.lines) > 1
        ],
        pictures=_pictures(study, results, label_names, folder / PICTURES),
        legend={name: class_color(i) for i, name in enumerate(label_names)},
    )


def points_of(table: Sequence[Mapping[str, Any]]) -> Details:
    """Those details that are drawn, from rows of `case_table`."""
    return Details(
        volumes=_points(table, "true_ml", "predicted_ml"), expected=_points(table, "expected_dice", "dice")
    )


def _without_model(section: Section) -> Section:
    """The table of a single model without the column that names it."""
    column = list(section.lines[0]).index("Model")
    lines = [[cell for i, cell in enumerate(line) if i != column] for line in section.lines]
    return dataclasses.replace(section, lines=lines)


# The summary.


def _headline(result: ModelResult) -> str:
    """The main finding about a single model."""
    words = {1: "Over-confident", -1: "Under-confident", 0: "Neither over- nor under-confident"}
    ace, dice = (float(nan_mean(nan_mean(result.metrics()[name], axis=1))) for name in ("ACE", "Dice"))
    return (
        f"{words[_direction(result)]}: over {wording.count(len(result.case_names), 'case')}, ACE is "
        f"{wording.number(ace)} and Dice {wording.number(dice)}."
    )


def _direction(result: ModelResult) -> int:
    """1 if the model is over-confident beyond chance, -1 if it is under-confident, else 0."""
    mean, low, high = mean_interval(nan_mean(over_confidence(result.stats), axis=1), result.subjects)
    if math.isnan(low) or math.isnan(high):
        low = high = 0.0 if math.isnan(mean) else mean
    return 1 if low > 0 else -1 if high < 0 else 0


def _sentences(result: ModelResult, gains: Sequence[Gain], who: str) -> Iterator[str]:
    cases = wording.count(len(result.case_names), "case")
    by_case = nan_mean(over_confidence(result.stats), axis=1)
    mean, low, high = mean_interval(by_case, result.subjects)
    if math.isnan(mean):
        yield "Nothing could be counted."
        return
    size, interval = wording.number(abs(mean)), _interval(low, high)
    direction = _direction(result)
    if direction > 0:
        yield (
            f"{who} is over-confident: its probabilities are too close to 0 and 1, by {size} on average{interval} "
            f"over {cases}."
        )
    elif direction < 0:
        yield (
            f"{who} is under-confident: its probabilities are too close to 1/2, by {size} on average{interval} "
            f"over {cases}."
        )
    else:
        yield (
            f"{who} is neither over- nor under-confident on the whole over {cases}: the difference cannot be told "
            f"from chance{_interval(low, high)}."
        )
    if quoted := _quoted(result):
        yield quoted
    yield from _where(result)
    if gains:
        yield _gain_sentence(gains)


def _interval(low: float, high: float, *, brackets: str = "()") -> str:
    if math.isnan(low) or math.isnan(high):
        return ""
    ends = " to ".join(wording.number(x) for x in sorted((abs(low), abs(high))))
    return f" (95% interval {ends})" if brackets else f", 95% interval {ends}"


def _quoted(result: ModelResult) -> str:
    """The range of probabilities, low or high, that is furthest from the truth over all voxels together.

    Bins are chosen case by case: adaptive ones lie elsewhere in each case.
    """
    count, prob_sum, label_sum = (np.asarray(x, np.float64) for x in _fields(result.stats))
    with np.errstate(invalid="ignore", divide="ignore"):
        prob = prob_sum / count
    found = []
    for low, high in _QUOTED:
        chosen = (prob >= low) & (prob <= high)
        if (total := count[chosen].sum()) >= _FEWEST_QUOTED:
            found.append((prob_sum[chosen].sum() / total, label_sum[chosen].sum() / total))
    if not found:
        return ""
    stated, there = max(found, key=lambda pair: abs(pair[0] - pair[1]))
    return (
        f"Where it says that a class has a probability of about {stated:.0%}, the class is there in {there:.0%} of "
        "the voxels."
    )


def _where(result: ModelResult) -> Iterator[str]:
    ace = result.metrics()["ACE"]
    classes = [
        (mean, low, high, name)
        for name, column in zip(result.class_names, ace.T, strict=True)
        for mean, low, high in [mean_interval(column, result.subjects)]
        if not math.isnan(mean)
    ]
    if len(classes) > 1:
        worst, best = max(classes), min(classes)
        if worst[0] - best[0] <= _ALIKE * worst[0]:
            values = " to ".join(dict.fromkeys(wording.number(x[0]) for x in (best, worst)))
            yield f"All classes are about equally calibrated (ACE {values})."
        else:
            yield f"Calibration is worst for {_class(*worst)} and best for {_class(*best)}."
    near, away = (
        mean_interval(nan_mean(_error("ECE", x), axis=1), result.subjects)
        for x in (result.boundary, result.interior)
    )
    if not (math.isnan(near[0]) or math.isnan(away[0])):
        where = "at borders" if near[0] > away[0] else "away from borders"
        yield (
            f"The errors lie {where}: within two voxels of a border a probability is off by {_percent(near[0])} on "
            f"average (ECE), elsewhere by {_percent(away[0])}."
        )


def _class(mean: float, low: float, high: float, name: str) -> str:
    return f"{name} (ACE {wording.number(mean)}{_interval(low, high, brackets='')})"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else f"{share:.2%}" if share >= 0.0001 else "less than 0.01%"


def _gain_sentence(gains: Sequence[Gain]) -> str:
    """The gain of the calibrator that cuts ACE most among those that keep labels."""
    gain = min((x for x in gains if x.keeps_labels), key=lambda x: _relative(x, "ACE"))
    moved = _moved(gain)
    if min(_relative(gain, "ACE"), _relative(gain, "NLL")) > -_WORTH_IT:
        return f"Calibration would change little: at best, it would {moved}."
    method = {
        "temperature": "one temperature",
        "class-temperature": "a temperature for each predicted class",
        "local": "a correction of each voxel from the probabilities around it (local calibration)",
    }
    params = f" ({gain.params})" if gain.params else ""
    return (
        f"Calibration by {method.get(gain.calibrator, gain.calibrator)}{params} would {moved}, and leave "
        f"every label as it is ({gain.folds}-fold cross-validation over the cases)."
    )


def _relative(gain: Gain, metric: str) -> float:
    change = gain.row.metrics[metric].change
    return 0.0 if change is None or math.isnan(change.relative) else change.relative


def _moved(gain: Gain) -> str:
    """What happens to ACE and NLL, such as "cut ACE by 45% and NLL by 57%"."""
    verbs, ends = [], []
    for metric in ("ACE", "NLL"):
        relative = _relative(gain, metric)
        little = abs(relative) < 0.005
        verbs.append("leave" if little else "cut" if relative < 0 else "raise")
        ends.append("" if little else f" by {wording.percent(relative)}")
    if verbs == ["leave", "leave"]:
        return "leave ACE and NLL as they are"
    ends = [" as it is" if verb == "leave" else end for verb, end in zip(verbs, ends, strict=True)]
    second = "" if verbs[0] == verbs[1] else f"{verbs[1]} "
    return f"{verbs[0]} ACE{ends[0]} and {second}NLL{ends[1]}"


# Tables.


def _changes_by_gain(gains: Mapping[str, Sequence[Gain]]) -> Section:
    names = ("ACE", "ECE", "MCE", "NLL", "Brier")
    lines: list[Sequence[str]] = [("Model", "Calibrator", *names, "Labels")]
    for model, found in gains.items():
        for gain in found:
            changes = [gain.row.metrics[name].change for name in names]
            cells = [wording.change(change) if change else "" for change in changes]
            name = f"{gain.calibrator}, {gain.params}".removesuffix(", ")
            lines.append((model, name, *cells, "stay" if gain.keeps_labels else "may change"))
    folds = max(gain.folds for found in gains.values() for gain in found)
    how = (
        f"Each case is judged with a calibrator that was fitted to other cases, in {folds} folds (local "
        "calibration in 2). The numbers are changes from the probabilities as they are. A temperature divides the "
        "logarithms of the probabilities by one number T, or by one for each predicted class. T above 1 makes "
        "probabilities less extreme. Isotonic calibration draws a rising curve for each class. Local calibration, "
        "which --local adds, corrects each voxel from the probabilities around it."
    )
    return Section("What calibration would change", how, lines, "results")


def _near_and_away(results: Sequence[ModelResult]) -> Section:
    header = (
        "Model",
        "Class",
        "Voxels near borders",
        "ACE near",
        "ACE elsewhere",
        "ECE near",
        "ECE elsewhere",
    )
    lines: list[Sequence[str]] = [header]
    for result in results:
        if result.boundary is None:
            continue
        share = np.asarray(result.boundary.count, np.float64).sum((0, 2)) / np.maximum(
            np.asarray(result.stats.count, np.float64).sum((0, 2)), 1
        )
        figures = [
            nan_mean(_error(name, part), axis=0)
            for name in ("ACE", "ECE")
            for part in (result.boundary, result.interior)
        ]
        for j, class_name in enumerate(result.class_names):
            cells = [f"{column[j]:.4f}" if not math.isnan(column[j]) else "n/a" for column in figures]
            lines.append((result.name, class_name, f"{share[j]:.1%}", *cells))
    return Section("Near borders and away from them, in numbers", "Means over cases.", lines, "boundary")


def _volumes(results: Sequence[ModelResult], table: Sequence[Mapping[str, Any]]) -> Section:
    volumes = ("True (ml)", "Predicted (ml)", "Expected (ml)")
    interval = f"{_LEVEL:.0%} interval", "It holds"
    lines: list[Sequence[str]] = [
        ("Model", "Class", *volumes, "Predicted − true", "95% of cases within", *interval)
    ]
    for result in results:
        subject_of = dict(zip(result.case_names, result.subjects, strict=True))
        for class_name in result.class_names:
            rows = [row for row in table if (row["model"], row["class"]) == (result.name, class_name)]
            true, predicted, expected = (
                np.array([row[f"{name}_ml"] for row in rows]) for name in ("true", "predicted", "expected")
            )
            difference = predicted - true
            ends = np.quantile(difference, (0.025, 0.975)) if len(rows) > 1 else (math.nan, math.nan)
            relative = difference.sum() / true.sum() if true.sum() else math.nan
            lines.append(
                (
                    result.name,
                    class_name,
                    *(f"{x.mean():.4g}" for x in (true, predicted, expected)),
                    wording.signed_percent(float(relative)),
                    "n/a" if math.isnan(ends[0]) else f"{_signed(ends[0])} to {_signed(ends[1])} ml",
                    *_volume_interval(expected, true, np.array([subject_of[row["case"]] for row in rows])),
                )
            )
    how = (
        "Means over cases. The expected volume is the sum of the probabilities; it should be right on average. The "
        "interval is around the expected volume and is meant to hold the true one of a new case; it comes from the "
        "ratios of true to expected volume. Whether it holds a case is judged with the interval of all cases of "
        "other subjects."
    )
    return Section("Volumes", how, lines, "volumes")


def _volume_interval(expected: np.ndarray, true: np.ndarray, subjects: np.ndarray) -> tuple[str, str]:
    """The interval relative to the expected volume, and the share of cases that other subjects' interval holds."""
    expected, true, subjects = (x[expected > 0] for x in (expected, true, subjects))
    expected, true = expected.astype(np.float32), true.astype(np.float32)
    others = [subjects != subject for subject in subjects]
    if min(map(np.sum, others), default=0) < _FEWEST_IN_INTERVAL:
        return "n/a", "n/a"
    ends = _ratio_interval(np.ones(1, np.float32), expected, true)
    low, high = np.array(
        [_ratio_interval(expected[i : i + 1], expected[o], true[o]) for i, o in enumerate(others)]
    )[..., 0].T
    words = " to ".join(wording.signed_percent(float(end[0]) - 1) for end in ends)
    return words, wording.percent(float(np.mean((low <= true) & (true <= high))))


_ratio_interval = jax.jit(functools.partial(volume_interval, level=_LEVEL))


def _signed(x: float) -> str:
    return f"{x:+.3g}".replace("-", wording.MINUS)


def _confidence(study: Study, results: Sequence[ModelResult], first_class: int) -> Section:
    """Whether expected Dice, which needs no label, finds the bad cases."""
    from scipy.stats import spearmanr  # here, since its import takes long

    lines: list[Sequence[str]] = [
        (
            "Model",
            "Cases",
            "Rank correlation",
            "Dice of all",
            "Dice of the surer half",
            "Area of risk-coverage",
        )
    ]
    for result in results:
        dice = nan_mean(result.metrics()["Dice"], axis=1)
        expected = [float(nan_mean(case.expected_dice()[first_class:])) for case in study.cases[result.name]]
        pairs = np.array([pair for pair in zip(expected, dice, strict=True) if np.isfinite(pair).all()])
        if len(pairs) < _FEWEST_RANKED or (np.ptp(pairs, 0) == 0).any():
            continue
        curve = jax.jit(risk_coverage)(pairs[:, 0], 1 - pairs[:, 1])
        surer = 1 - float(curve.risk[(len(pairs) + 1) // 2 - 1])
        correlation: Any = spearmanr(*pairs.T)
        numbers = (correlation.statistic, pairs[:, 1].mean(), surer, float(curve.area))
        lines.append((result.name, str(len(pairs)), *map(wording.number, numbers)))
    how = (
        "Whether the expected Dice of a case, which needs no label, tells how good its label map is: Spearman's "
        "rank correlation with the true Dice; the mean Dice of the half of the cases that expect more; and the "
        "mean of 1 \N{MINUS SIGN} Dice while ever less sure cases are accepted (smaller is better)."
    )
    return Section("Does the expected Dice find the bad cases?", how, lines, "volumes")


def _thresholds(results: Sequence[ModelResult]) -> Section:
    """The threshold that the probabilities of each case ask for, and the Dice that it gives; for hard bins."""
    header = ("Model", "Class", "Threshold", "Dice of the label maps", "Dice above the threshold")
    lines: list[Sequence[str]] = [header]
    for result in results:
        count, _, label_sum = (np.asarray(x, np.float64) for x in _fields(result.stats))
        thresholds = np.asarray(jax.jit(dice_thresholds)(result.stats), np.float64)
        bins = result.stats.num_bins
        above = np.arange(bins) >= np.rint(np.nan_to_num(thresholds, nan=1.0) * bins)[..., None]
        with np.errstate(invalid="ignore"):  # no voxel is predicted, and none is true
            dice = 2 * (label_sum * above).sum(-1) / ((count * above).sum(-1) + label_sum.sum(-1))
        for j, class_name in enumerate(result.class_names):
            means = (float(nan_mean(column[:, j])) for column in (thresholds, result.dice, dice))
            lines.append((result.name, class_name, *map(wording.number, means)))
    how = (
        "Means over cases. Dice is not largest where each voxel gets its most probable class. Of each case, the "
        "threshold is the one above which the voxels of a class have the largest expected Dice, which needs no "
        "label. If probabilities are calibrated, it lies at half of this Dice."
    )
    return Section("Thresholds for a larger Dice", how, lines, "volumes")


def _look_first(study: Study, results: Sequence[ModelResult], first_class: int) -> Section:
    lines: list[Sequence[str]] = [("Case", "Model", "Expected Dice", "Dice", "ACE")]
    found = []
    for result in results:
        ace, dice = (nan_mean(result.metrics()[name], axis=1) for name in ("ACE", "Dice"))
        for i, case in enumerate(study.cases[result.name]):
            expected = float(nan_mean(case.expected_dice()[first_class:]))
            if not math.isnan(expected):
                found.append((expected, case.name, result.name, float(dice[i]), float(ace[i])))
    most = max(_FIRST // max(len(results), 1), 3)
    first = [one for result in results for one in sorted(x for x in found if x[2] == result.name)[:most]]
    for expected, case, model, dice, ace in sorted(first):
        lines.append((case, model, *(wording.number(x) for x in (expected, dice, ace))))
    how = "The cases of which the probabilities themselves expect the lowest Dice, without any label."
    return Section("Cases to look at first", how, lines, "volumes")


# Points and pictures.


def _points(table: Sequence[Mapping[str, Any]], x: str, y: str) -> list[Point]:
    chosen = [
        (row["model"], row["class"], row["case"], row[x], row[y])
        for row in table
        if math.isfinite(row[x]) and math.isfinite(row[y])
    ]
    if len(chosen) <= _MOST_POINTS:
        return chosen
    keep = np.random.default_rng(0).choice(len(chosen), _MOST_POINTS, replace=False)
    return [chosen[i] for i in np.sort(keep)]


def _pictures(
    study: Study, results: Sequence[ModelResult], label_names: Sequence[str], folder: Path
) -> list[CasePicture]:
    """The worst cases and the best one of each model; their files are written."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for number, result in enumerate(results):
        metrics = {name: nan_mean(values, axis=1) for name, values in result.metrics().items()}
        order = [
            int(i) for i in np.argsort(-metrics["ACE"], kind="stable") if not math.isnan(metrics["ACE"][i])
        ]
        chosen = [("Worst", i) for i in order[:_WORST]] + [("Best", i) for i in order[_WORST:][-1:]]
        for rank, i in chosen:
            case = result.case_names[i]
            one = study.slice_of(result.name, case)
            shown = {}
            for title, data in panels(one, len(label_names)):
                file = f"{number:02d}-{safe_name(case)}-{title.split()[0].lower()}.png"
                (folder / file).write_bytes(data)
                shown[title] = file
            figures = ", ".join(
                f"{name} {wording.number(float(metrics[name][i]))}" for name in ("ACE", "MCE", "Dice")
            )
            cut = f", slice {one.index}" if one.index >= 0 else ""
            pictures.append(CasePicture(result.name, case, rank, f"{figures}{cut}", shown))
    return pictures


def _fields(stats: BinStatistics) -> tuple[Any, Any, Any]:
    return stats.count, stats.prob_sum, stats.label_sum


def _error(name: str, stats: BinStatistics | None) -> Float[np.ndarray, "cases classes"]:
    if stats is None:
        raise ValueError("the result has no statistics near borders.")
    return np.asarray(CALIBRATION_ERRORS[name](stats), np.float64)


def label_names_of(class_names: Sequence[str], *, regions: bool) -> list[str]:
    """Names of the values of a label map: the classes, or background and regions."""
    return ["background", *class_names] if regions else list(class_names)
