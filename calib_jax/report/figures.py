"""Figures of the report: the list of figures and their layout. The page explains how to read them."""

import base64
import dataclasses
import functools
import io
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from calib_jax import plots  # first, since it imports matplotlib despite a broken configuration

# isort: split
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from calib_jax._matplotlib import figure_style
from calib_jax.report import wording
from calib_jax.report.archive import ReportInputs
from calib_jax.report.details import Details
from calib_jax.report.table import case_means
from calib_jax.results import METRICS, History, ModelResult, Result

_WIDTH = 11.0  # inches: 1056 CSS pixels, the width of the page's column, so that type keeps its size
_PANEL = 3.4
_BOX_PLOTS = ("ACE", "MCE", "Dice")
_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "calib_jax",
    "axes.unicode_minus": True,
}


@dataclasses.dataclass(frozen=True)
class ReportFigure:
    """A figure of the report.

    Attributes:
        name: file name without its ending; the part before a hyphen is the kind of figure.
        title: heading of the figure among those of its kind, or "".
        alt: description of the figure for readers who cannot see it.
        draw: draws the figure, without pyplot.
    """

    name: str
    title: str
    alt: str
    draw: Callable[[], Figure]


def report_figures(inputs: ReportInputs) -> Iterator[ReportFigure]:
    """The figures of a report in the order of the page."""
    results, shown, histories = inputs.results, inputs.shown, inputs.histories
    names, all_names = ([result.name for result in some] for some in (results, shown))
    classes = [(None, "all", "All classes together")]
    if len(shown[0].class_names) > 1:
        classes += [(i, f"class-{i}", name) for i, name in enumerate(shown[0].class_names)]

    alt = f"Box plots of {', '.join(_BOX_PLOTS)} over the cases for {', '.join(names)}."
    yield ReportFigure("cases", "", alt, lambda: _box_plots(results))
    for index, suffix, title in classes:
        alt = f"Reliability diagrams of {', '.join(all_names)}: {title}."
        drawing = functools.partial(_reliability_diagrams, shown, index)
        yield ReportFigure(f"reliability-{suffix}", title, alt, drawing)
    for index, suffix, title in classes:
        alt = f"Dataset reliability histograms of {', '.join(all_names)}: {title}."
        drawing = functools.partial(_reliability_histograms, shown, index)
        yield ReportFigure(f"histogram-{suffix}", title, alt, drawing)
    if all(isinstance(result, ModelResult) and result.boundary is not None for result in results):
        alt = f"Reliability near borders and away from them of {', '.join(names)}."
        yield ReportFigure("boundary", "", alt, lambda: _near_borders_and_away(results))
    if (details := inputs.details) and (details.volumes or details.expected):
        alt = (
            f"Scatter plots of {', '.join(names)}: predicted against true volume, true against expected Dice."
        )
        yield ReportFigure("volumes", "", alt, functools.partial(_agreement, names, details))
    if _measured_metrics(histories):
        alt = f"Training and validation curves of {', '.join(histories)}."
        yield ReportFigure("training", "", alt, lambda: _training_curves(names, histories))


def draw(figure: ReportFigure, folder: Path, *, save_svg: bool = False) -> str:
    """Draws a figure, saves it in `folder` as PNG and perhaps as SVG, and returns it as a data URI of SVG."""
    png, svg = io.BytesIO(), io.BytesIO()
    with style():
        drawing = figure.draw()
        drawing.savefig(svg, format="svg", backend="svg", metadata={"Date": None})
        drawing.set_layout_engine("none")  # everything stays where it is
        drawing.savefig(png, format="png", backend="agg", dpi=200)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{figure.name}.png").write_bytes(png.getvalue())
    if save_svg:
        (folder / f"{figure.name}.svg").write_bytes(svg.getvalue())
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.getvalue()).decode('ascii')}"


def style() -> AbstractContextManager[None]:
    """The context in which figures are drawn and saved, independent of the user's configuration."""
    return figure_style(_STYLE)


def _box_plots(results: Sequence[Result]) -> Figure:
    names, legend = [result.name for result in results], []
    if len(names) <= 3:
        ticks = [_plain(textwrap.fill(name, 48 // len(names), max_lines=3)) for name in names]
    else:  # numbers, which a legend explains
        ticks = [str(i + 1) for i in range(len(names))]
        legend = [f"{tick}  {_in_legend(name)}" for tick, name in zip(ticks, names, strict=True)]
    height = 3.7 + 0.2 * (-(-len(legend) // 3))
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    for ax, metric in zip(figure.subplots(1, len(_BOX_PLOTS)), _BOX_PLOTS, strict=True):
        plots.paired_cases(_by_case(results, metric), ticks, ax=ax)
        title = f"{metric}, {wording.direction(metric)}"
        ax.set_title(title, loc="left", fontweight="bold", color=plots.INK)
    if legend:
        handles = plots.model_legend(legend)
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _reliability_diagrams(results: Sequence[Result], index: int | None) -> Figure:
    rows = 1 if len(results) > 1 else 2  # of the legend, which is wider than one panel
    figure, panels = _square_panels([result.name for result in results], below=0.72, footer=0.1 + 0.2 * rows)
    for result, (square, below) in zip(results, panels, strict=True):
        # The band resamples rows of the statistics. Repeats of a case and cases of a subject are not independent.
        dependent = result.repeats or len(set(result.subjects)) < len(result.subjects)
        band = None if dependent else 0.95
        label = _in_title(result.name)
        plots.reliability_diagram(result.stats, class_index=index, label=label, band=band, ax=square)
        plots.bin_counts(result.stats, class_index=index, ax=below)
        below.set_xlabel("mean predicted probability")
        square.set(xlabel="", xticklabels=[])
    _share_y_labels(figure, panels)
    figure.legend(handles=plots.gap_legend(), loc="lower center", ncols=3 - rows, frameon=False)
    return figure


def _reliability_histograms(results: Sequence[Result], index: int | None) -> Figure:
    figure, panels = _square_panels([result.name for result in results], right=1.0)
    shares = [plots.histogram_share(result.stats, class_index=index) for result in results]
    options = {"class_index": index, "max_share": max(1e-9, *(float(share.max()) for share in shares))}
    for result, (square, _) in zip(results, panels, strict=True):
        label = _in_title(result.name)
        plots.reliability_histogram(result.stats, label=label, colorbar=False, ax=square, **options)
    _share_y_labels(figure, panels)
    last, inch = panels[_columns(len(panels)) - 1][0].get_position(), 1 / figure.get_figwidth()
    bar = figure.add_axes((last.x1 + 0.15 * inch, last.y0, 0.13 * inch, last.height))
    plots.style_colorbar(figure.colorbar(panels[0][0].images[0], cax=bar))
    return figure


def _near_borders_and_away(results: Sequence[Result]) -> Figure:
    """Two reliability diagrams for each model, each over all of its classes."""
    parts = [
        (
            part if len(results) == 1 else f"{textwrap.shorten(result.name, 30, placeholder='…')}, {part}",
            stats,
        )
        for result in results
        if isinstance(result, ModelResult)
        for part, stats in (("near borders", result.boundary), ("elsewhere", result.interior))
        if stats is not None
    ]
    figure, panels = _square_panels([name for name, _ in parts], below=0.72, footer=0.3)
    for (name, stats), (square, below) in zip(parts, panels, strict=True):
        plots.reliability_diagram(stats, label=_in_title(name), band=None, ax=square)
        plots.bin_counts(stats, ax=below)
        below.set_xlabel("mean predicted probability")
        square.set(xlabel="", xticklabels=[])
    _share_y_labels(figure, panels)
    figure.legend(handles=plots.gap_legend(), loc="lower center", ncols=2, frameon=False)
    return figure


def _agreement(names: Sequence[str], details: Details) -> Figure:
    """Predicted against true volume, and true against expected Dice: a dot for each model, class and case."""
    figure = Figure(figsize=(min(_WIDTH, 9.6), 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for ax, points, logarithmic in ((left, details.volumes, True), (right, details.expected, False)):
        by_model = {name: [point[3:] for point in points if point[0] == name] for name in names}
        drawn = {name: np.array(xy, float).reshape(-1, 2) for name, xy in by_model.items()}
        plots.agreement(drawn, logarithmic=logarithmic, ax=ax)
    left.set(xlabel="true volume (ml)", ylabel="predicted volume (ml)")
    right.set(xlabel="expected Dice, from the probabilities alone", ylabel="Dice")
    if len(names) > 1:
        handles = plots.model_legend([_in_legend(name) for name in names])
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _training_curves(names: Sequence[str], histories: Mapping[str, History]) -> Figure:
    metrics = _measured_metrics(histories)
    spelled = {metric.lower(): metric for metric in METRICS}
    figure = Figure(figsize=(min(_WIDTH, 1.2 + 4.9 * len(metrics)), 3.7), layout="constrained")
    legends = {}  # one legend for all axes, below them, where it hides no curve
    in_order = {_in_legend(name): histories.get(name, {}) for name in dict.fromkeys([*names, *histories])}
    for ax, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        plots.loss_curves(in_order, metric=metric, ax=ax)
        ax.set_ylabel(spelled.get(metric, metric.replace("_", " ")))
        legend = ax.get_legend()
        assert legend is not None
        texts = [text.get_text() for text in legend.get_texts()]
        legends |= dict(zip(texts, legend.legend_handles, strict=True))
        legend.remove()
    figure.legend(legends.values(), legends, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _columns(number: int) -> int:
    """Number of columns for `number` panels: at most four, with rows as even as possible."""
    return -(-number // -(-number // 4))


def _square_panels(
    names: Sequence[str], *, below: float = 0.0, right: float = 0.2, footer: float = 0.0
) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """A grid of square axes, each above an axes of height `below`, if that is not 0. Lengths are in inches."""
    left, gap, label = 0.62, 0.42, 0.5
    title = 0.28 + 0.17 * max(_in_title(name).count("\n") for name in names)
    columns = _columns(len(names))
    rows = -(-len(names) // columns)
    side = min(_PANEL, (_WIDTH - left - right - gap * (columns - 1)) / columns)
    under = below + 0.12 if below else 0.0
    row_height = title + side + under + label
    width = left + side * columns + gap * (columns - 1) + right
    height = rows * row_height + footer
    figure = Figure(figsize=(width, height))

    def axes(x: float, y: float, tall: float) -> Axes:
        return figure.add_axes((x / width, y / height, side / width, tall / height))

    panels = []
    for i in range(len(names)):
        row, column = divmod(i, columns)
        x = left + column * (side + gap)
        y = height - row * row_height - title - side
        square = axes(x, y, side)
        panels.append((square, axes(x, y - under, below) if below else square))
    return figure, panels


def _share_y_labels(figure: Figure, panels: Sequence[tuple[Axes, Axes]]) -> None:
    """Keeps the labels of the y axes in the first column only."""
    for i, panel in enumerate(panels):
        for ax in panel:
            if i % _columns(len(panels)):
                ax.set_ylabel("")
            else:
                ax.yaxis.set_label_coords(-0.42 / (ax.get_position().width * figure.get_figwidth()), 0.5)


def _by_case(results: Sequence[Result], metric: str) -> Float[np.ndarray, "models cases"]:
    """Means over classes, a row per model and a column per case of any model."""
    means = [case_means(result.case_names, result.metrics()[metric]) for result in results]
    cases = dict.fromkeys(name for result in results for name in result.case_names)
    return np.array([[mean.get(name, np.nan) for name in cases] for mean in means])


def _measured_metrics(histories: Mapping[str, History]) -> list[str]:
    """Metrics that the histories hold as `train_*` or `val_*`: the loss first, at most three."""
    found = dict.fromkeys(
        column.split("_", 1)[1]
        for history in histories.values()
        for column in history
        if column.startswith(("train_", "val_"))
    )
    return sorted(found, key=lambda metric: metric != "loss")[:3]


def _plain(name: str) -> str:
    """A name whose dollar signs do not start a formula."""
    return name.replace("$", r"\$")


def _in_title(name: str) -> str:
    """A name in at most two lines that fit over a panel."""
    return _plain(textwrap.fill(name, 26, max_lines=2, placeholder="…"))


def _in_legend(name: str) -> str:
    return _plain(textwrap.shorten(name, 44, placeholder="…"))
