"""Figures of the benchmarks, drawn from their results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from calib_jax.plots import INK, MODEL_COLORS

_STYLE: Final[dict[Any, Any]] = {"font.size": 9, "axes.titlesize": 10, "figure.facecolor": "white"}
_OURS: Final = MODEL_COLORS[1]
_REFERENCE: Final = MODEL_COLORS[0]
_FLOOR: Final = "#B8C2CC"


def save(figure: Figure, results: Path) -> Path:
    """Saves a figure as PNG beside the file of its results; returns the path."""
    file = results.with_suffix(".png")
    with matplotlib.rc_context(_STYLE):
        figure.savefig(file, dpi=130)
    print(f"written to {file}")
    return file


def scaling(
    axes: Mapping[str, Sequence[Mapping[str, Any]]], growths: Mapping[str, Mapping[str, float]]
) -> Figure:
    """Cost per voxel and class against voxels, bins and classes; bands span the middle half of the rounds."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 3.4), layout="constrained")
        panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
        for ax, (axis, points) in zip(panels, axes.items(), strict=True):
            _cost_curves(ax, axis, points, growths[axis])
        panels[0].set_ylabel("ns per voxel and class")
    return figure


def _cost_curves(
    ax: Axes, axis: str, points: Sequence[Mapping[str, Any]], growth: Mapping[str, float]
) -> None:
    where = [point[axis] for point in points]
    for side, color in zip(growth, (_OURS, _REFERENCE), strict=True):
        median, q1, q3 = (
            [1e9 * point["cost"][side][key] for point in points] for key in ("median", "q1", "q3")
        )
        ax.plot(where, median, "o-", color=color, markersize=4, label=f"{side} (grows x{growth[side]:.2f})")
        ax.fill_between(where, q1, q3, color=color, alpha=0.2, linewidth=0)
    ax.set(xscale="log", yscale="log", xlabel=axis, title=f"against {axis}")
    if axis != "voxels":
        ax.set_xticks(where, [str(value) for value in where])
        ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8)


def loss(cases: Sequence[Mapping[str, Any]]) -> Figure:
    """Median time of every program, one panel per case; lines span the middle half of the rounds."""
    with matplotlib.rc_context(_STYLE):
        columns = min(2, len(cases))
        rows = -(-len(cases) // columns)
        figure = Figure(figsize=(5 * columns, 2.6 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax in panels[len(cases) :]:
            ax.remove()
        for ax, case in zip(panels, cases, strict=False):
            summary = {
                name: {key: 1000 * value for key, value in figures.items()}
                for name, figures in case["summary"].items()
            }
            _bars(ax, summary)
            ax.set(title=f"mL1-ACE and gradient, {case['shape']}, {case['kind']}", xlabel="ms")
    return figure


def memory(share: Mapping[str, Mapping[str, float]], target: float) -> Figure:
    """Memory beyond inputs and gradient, in units of the bytes of the probabilities."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7, 2.6), layout="constrained")
        ax = figure.subplots()
        _bars(ax, share)
        ax.axvline(target, color=INK, linewidth=0.8, linestyle="--")
        ax.set(
            title="Memory of mL1-ACE beyond inputs and gradient",
            xlabel="bytes / bytes of the probabilities",
        )
    return figure


def _bars(ax: Axes, spreads: Mapping[str, Mapping[str, float]]) -> None:
    """One bar per name, the first on top; ours, references and floors have different colours."""
    for row, (name, figures) in enumerate(spreads.items()):
        color = _OURS if name.startswith("calib_jax") else _FLOOR if name.startswith("copy") else _REFERENCE
        ax.barh(row, figures["median"], color=color)
        ax.hlines(row, figures["q1"], figures["q3"], color=INK, linewidth=1.2)
        value = f"{figures['median']:{',.0f' if figures['median'] >= 100 else '.3g'}}"
        end = max(figures["median"], figures["q3"])
        ax.annotate(value, (end, row), (4, 0), textcoords="offset points", va="center")
    ax.set_yticks(range(len(spreads)), list(spreads))
    ax.invert_yaxis()
    ax.margins(x=0.15)
    ax.spines[["top", "right"]].set_visible(False)
