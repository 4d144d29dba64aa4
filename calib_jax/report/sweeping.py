"""Calibration errors under many numbers and kinds of bins, from one pass over a case.

The probabilities of a class are sorted once, those of its members and the others apart. Sums between any two edges
are then differences of running sums.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from jaxtyping import Bool, Float

from calib_jax._sums.bins import Bins
from calib_jax._sums.host import inner_edges, quantile_ranks
from calib_jax.report.table import mean_interval
from calib_jax.results import nan_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from calib_jax.predictions import Case

KINDS: Final[Mapping[str, str]] = {"hard": "equal width", "adaptive": "equal mass"}
ERRORS: Final = ("ACE", "ECE", "MCE")
Errors = Float[np.ndarray, "kinds numbers errors classes"]


@dataclasses.dataclass(frozen=True)
class Point:
    """A calibration error under one choice of bins: mean over cases with its 95% bootstrap interval.

    Attributes:
        model, binning, num_bins, metric: what was measured.
        class_name: `mean` is the mean over classes.
        mean, low, high: NaN where nothing was counted; ends for fewer than two subjects.
        cases: number of cases in which something was counted.
    """

    model: str
    binning: str
    num_bins: int
    metric: str
    class_name: str
    mean: float
    low: float
    high: float
    cases: int


def sweep_case(case: "Case", numbers: Sequence[int]) -> Errors:
    """ACE, ECE and MCE of each class under every kind and number of bins.

    Args:
        case: probabilities and labels.
        numbers: numbers of bins.

    Returns:
        Errors by `KINDS`, number and `ERRORS`; NaN where nothing was counted.

    Raises:
        ValueError: if the case has no label.
    """
    if case.labels is None:
        raise ValueError(f"{case.name}: there is no label to compare with.")
    classes = case.probs.shape[-1]
    errors = np.full((len(KINDS), len(numbers), len(ERRORS), classes), np.nan)
    counted = slice(None) if case.where is None else case.where
    for c in range(classes):
        member = (case.labels[..., c] if case.labels.ndim == case.probs.ndim else case.labels == c)[counted]
        one = _Sorted(case.probs[..., c][counted].reshape(-1), member.reshape(-1))
        for (i, kind), (j, number) in ((x, y) for x in enumerate(KINDS) for y in enumerate(numbers)):
            errors[i, j, :, c] = one.errors(Bins("adaptive" if kind == "adaptive" else "hard", number))
    return errors


class _Sorted:
    """Sorted probabilities of one class: of its members, of the others, and of both."""

    def __init__(self, probs: Float[np.ndarray, "voxels"], member: Bool[np.ndarray, "voxels"]):
        parts = [np.sort(probs[chosen]) for chosen in (member, ~member)]
        self.all = np.sort(np.concatenate(parts), kind="stable")
        self.parts = [(part, np.concatenate([[0.0], part.cumsum(dtype=np.float64)])) for part in parts]

    def errors(self, bins: Bins) -> Float[np.ndarray, "errors"]:
        """ACE, ECE and MCE."""
        inner = self.all[quantile_ranks(self.all.size, bins.num_bins)]
        if bins.binning == "hard":
            inner = inner_edges(self.all, bins)
        counts, sums = [], []
        for values, running in self.parts:
            ends = np.concatenate([[0], np.searchsorted(values, inner, side="right"), [values.size]])
            counts.append(np.diff(ends))
            sums.append(np.diff(running[ends]))
        count = counts[0] + counts[1]
        filled = count > 0
        if not filled.any():
            return np.full(len(ERRORS), np.nan)
        gaps = abs(sums[0] + sums[1] - counts[0])[filled] / count[filled]
        return np.array([gaps.mean(), gaps @ count[filled] / count.sum(), gaps.max()])


def summarise(
    errors: Mapping[str, Mapping[str, Errors]],
    subjects: Mapping[str, str],
    numbers: Sequence[int],
    class_names: Sequence[str],
) -> Iterator[Point]:
    """Means over cases and intervals over subjects, for the mean over classes and for each class.

    Args:
        errors: of the cases of each model by their names, of the classes that are named.
        subjects: subject of each case by the case's name; a case that is not there is a subject of its own.
        numbers: numbers of bins.
        class_names: names of the classes.
    """
    for model, cases in errors.items():
        stacked, of_cases = np.stack(list(cases.values())), [subjects.get(name, name) for name in cases]
        for i, kind in enumerate(KINDS):
            for j, number in enumerate(numbers):
                for k, metric in enumerate(ERRORS):
                    values = stacked[:, i, j, k]
                    columns = {"mean": nan_mean(values, axis=1)} if len(class_names) > 1 else {}
                    columns |= dict(zip(class_names, values.T, strict=True))
                    for name, column in columns.items():
                        mean, low, high = mean_interval(column, of_cases, resamples=1000)
                        size = int(np.isfinite(column).sum())
                        yield Point(model, kind, number, metric, name, mean, low, high, size)


def overall(points: Sequence[Point]) -> list[Point]:
    """The points of the mean over classes, or of the only class."""
    names = dict.fromkeys(point.class_name for point in points)
    chosen = "mean" if "mean" in names else next(iter(names))
    return [point for point in points if point.class_name == chosen]


def draw(points: Sequence[Point]) -> "Figure":
    """ACE, ECE and MCE against the number of bins: solid for equal width, dashed for equal mass."""
    from calib_jax import plots

    # isort: split
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    models = list(dict.fromkeys(point.model for point in points))
    figure = Figure(figsize=(11.0, 3.9), layout="constrained")
    styles: dict[str, Any] = {"hard": "-", "adaptive": (0, (4, 2))}
    for ax, metric in zip(figure.subplots(1, len(ERRORS)), ERRORS, strict=True):
        for model, color in zip(models, plots.model_colors(len(models)), strict=True):
            for kind, style in styles.items():
                chosen = [
                    (point.num_bins, point.mean, point.low, point.high)
                    for point in overall(points)
                    if (point.model, point.binning, point.metric) == (model, kind, metric)
                ]
                number, mean, low, high = np.array(chosen).T
                ax.plot(number, mean, linestyle=style, marker="o", markersize=3, color=color)
                ax.fill_between(number, low, high, color=color, alpha=0.12, linewidth=0)
        ax.set_title(metric, loc="left", fontweight="bold", color=plots.INK)
        ax.set(xlabel="number of bins", ylim=(0, None))
        ax.grid(axis="y", color="#E4E7EB", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
    handles: list[Any] = (
        plots.model_legend([name.replace("$", r"\$") for name in models]) if len(models) > 1 else []
    )
    handles += [
        Line2D([], [], color=plots.INK, linestyle=styles[x], label=f"bins of {KINDS[x]}") for x in KINDS
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure
