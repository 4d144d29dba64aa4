"""What probabilities say about cases without labels: expected Dice, thresholds, and volumes with intervals."""

import csv
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from jaxtyping import Float

from calib_jax._sums.bins import Bins
from calib_jax.binning import BinStatistics
from calib_jax.decisions import dice_thresholds, volume_interval
from calib_jax.report.measure import CaseFigures, measure

if TYPE_CHECKING:
    from calib_jax.predictions import Case

BINS: Final = Bins("hard", 200)  # thresholds to 0.005
_FEWEST: Final = 1.0  # voxels that are expected of a class, below which a ratio of volumes says nothing
Labelled = Mapping[tuple[str, str], Float[np.ndarray, "2 cases"]]
"""Expected and true volumes in ml of cases with labels, by model and class."""


def expect(case: "Case", *, regions: bool) -> CaseFigures:
    """Figures of a case whose prediction takes the place of its label; errors therefore mean nothing.

    Args:
        case: probabilities, and the label map beside them if there is one.
        regions: whether channels are regions, which overlap.
    """
    prediction = case.predicted
    if prediction is None:
        prediction = case.probs > 0.5 if regions else case.probs.argmax(-1).astype(np.int32)
    return measure(dataclasses.replace(case, labels=prediction, where=None), BINS)


def read_labelled(path: Path, *, level: float) -> tuple[Labelled, list[str]]:
    """Expected and true volumes from the `cases.csv` of a report, and notices.

    Classes with too few cases for an interval at this level are left out, with a notice.

    Raises:
        ValueError: the file lacks the columns, or has too few cases for any class.
    """
    needed = ("model", "class", "expected_ml", "true_ml", "expected_voxels")
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if missing := set(needed).difference(rows.fieldnames or ()):
            lacks = f"{path} lacks the columns {', '.join(sorted(missing))}"
            raise ValueError(f"{lacks}: give the cases.csv that `calib-jax report` wrote.")
        found: dict[tuple[str, str], list[list[float]]] = {}
        for row in rows:
            try:
                voxels, *volumes = (
                    float(row[name]) for name in ("expected_voxels", "expected_ml", "true_ml")
                )
            except (TypeError, ValueError):
                raise ValueError(
                    f"{path} holds no volumes in line {rows.line_num}: make the report again."
                ) from None
            if voxels >= _FEWEST:
                found.setdefault((row["model"], row["class"]), []).append(volumes)
    labelled, notices = {}, []
    for (model, name), pairs in found.items():
        volumes = np.array(pairs, np.float32).T
        try:
            volume_interval(np.ones(1, np.float32), *volumes, level=level)
        except ValueError as error:
            notices.append(f"{path} gives no interval for {name} of {model}: {error}")
        else:
            labelled[model, name] = volumes
    if not labelled:
        raise ValueError(notices[0] if notices else f"{path} has no case.")
    return labelled, notices


def rows_of(
    cases: Mapping[str, Sequence[CaseFigures]],
    class_names: Sequence[str],
    *,
    first_class: int,
    labelled: Labelled,
    level: float,
) -> Iterator[dict[str, Any]]:
    """A row for each model, case and class.

    Args:
        cases: of each model, from `expect`; a model may have none.
        class_names: all classes.
        first_class: index of the first class that gets rows.
        labelled: volumes of cases with labels; a model or class without any gets no interval.
        level: of the intervals.

    Yields:
        `expected_dice`; `dice_threshold`, see `calib_jax.dice_thresholds`; predicted and expected volume in ml, and
        the ends of the interval of the true volume, None if there is none.
    """
    for model, figures in cases.items():
        if not figures:
            continue
        stats = BinStatistics(*np.stack([case.bins[:, first_class:] for case in figures], 1))
        thresholds = np.asarray(dice_thresholds(stats), np.float64)
        expected = np.array([case.prob_total[first_class:] * case.voxel_ml for case in figures])
        low, high = (np.full(expected.shape, None) for _ in range(2))
        for k, name in enumerate(class_names[first_class:]):
            if (volumes := labelled.get((model, name))) is not None:
                low[:, k], high[:, k] = (
                    np.asarray(x, np.float64) for x in volume_interval(expected[:, k], *volumes, level=level)
                )
        for i, case in enumerate(figures):
            dice = case.expected_dice()[first_class:]
            predicted = case.predicted[first_class:] * case.voxel_ml
            for k, name in enumerate(class_names[first_class:]):
                yield {
                    "model": model,
                    "case": case.name,
                    "class": name,
                    "expected_dice": float(dice[k]),
                    "dice_threshold": float(thresholds[i, k]),
                    "predicted_ml": float(predicted[k]),
                    "expected_ml": float(expected[i, k]),
                    "low_ml": low[i, k],
                    "high_ml": high[i, k],
                }
