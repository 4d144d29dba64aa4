"""The figures of the report: which there are, how they are laid out, and how to read them."""

import dataclasses
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from calib_jax import plots
from calib_jax._matplotlib import figure_style
from calib_jax.report.results import HIGHER_IS_BETTER, METRICS, Result
from calib_jax.report.table import case_means

_WIDTH = 11.0  # inches: 1056 CSS pixels, the width of the page's column, so that type keeps its size
_PANEL = 3.4
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
_SPELLED = {metric.lower(): metric for metric in METRICS}

_READ_CASES = (
    "Each dot is a case (mean over its classes), and thin lines follow the same case from model to "
    "model. Boxes span the middle half of the cases with the median as a line, whiskers reach to the "
    "last case within 1.5 box heights, and diamonds are means."
)
_READ_RELIABILITY = (
    "Voxels of all cases are sorted into bins by predicted probability; each point compares a bin's "
    "mean prediction with how often the class was there, and a calibrated model follows the dashed "
    "diagonal. Orange bars are over-confidence, blue ones under-confidence, the ring marks the widest "
    "gap, and the grey bars count voxels. ACE, ECE and MCE are means over cases, as in the table: "
    "pooling lets opposite errors cancel, so a curve can look better than the single cases are."
)
_READ_HISTOGRAM = (
    "Here the cases are not pooled: each has a reliability curve of its own, and colour shows what "
    "share of cases passes through a cell. Mass along the dashed diagonal means that single cases are "
    "calibrated, a wide spread that they are not, even where the orange curve, which pools all cases, "
    "follows the diagonal. All panels share one colour scale."
)
_READ_TRAINING = (
    "Solid curves are validation, dashed ones training. Losses of models trained with different loss "
    "functions are on different scales: compare their shapes, not their heights. A validation curve "
    "that turns up while training still falls is over-fitting."
)


@dataclasses.dataclass(frozen=True)
class ReportFigure:
    """A figure with what stands around it.

    Attributes:
        name: file name without its ending.
        section: heading that it stands under; figures of one section follow each other.
        title: heading of its own within the section, or "".
        how_to_read: two or three sentences for the section.
        alt: what the figure shows, for those who cannot see it.
        figure: the drawing, not known to pyplot.
    """

    name: str
    section: str
    title: str
    how_to_read: str
    alt: str
    figure: Figure


def report_figures(
    results: Sequence[Result],
    *,
    reference: Result | None = None,
    histories: Mapping[str, plots.History] | None = None,
) -> Iterator[ReportFigure]:
    """Draws the figures of a report one after the other, in the order of the page."""
    everyone = [*results, *([reference] if reference is not None else [])]
    yield _styled(_paired_figure, results)
    yield from _per_class(everyone, _reliability_figure)
    yield from _per_class(everyone, _histogram_figure)
    if histories and _measured_metrics(histories):
        yield _styled(_history_figure, [result.name for result in results], histories)


def style() -> AbstractContextManager[None]:
    """The context in which the figures are drawn and saved, the same whatever the user's configuration."""
    return figure_style(_STYLE)


def _styled(draw: Callable[..., ReportFigure], *arguments: Any) -> ReportFigure:
    """A figure drawn in `style`, which is left before a generator gives the figure away."""
    with style():
        return draw(*arguments)


def _per_class(
    results: Sequence[Result], draw: Callable[[Sequence[Result], int | None, str], ReportFigure]
) -> Iterator[ReportFigure]:
    """All classes together, then, where there are several, each by itself."""
    names = results[0].class_names
    yield _styled(draw, results, None, "All classes together")
    if len(names) > 1:
        for index, name in enumerate(names):
            yield _styled(draw, results, index, name)


def _paired_figure(results: Sequence[Result]) -> ReportFigure:
    shown = ("ACE", "MCE", "Dice")
    names, legend = [result.name for result in results], []
    if len(names) <= 3:
        ticks = [_plain(textwrap.fill(name, 48 // len(names), max_lines=3)) for name in names]
    else:  # numbers, which a legend explains
        ticks = [str(i + 1) for i in range(len(names))]
        legend = [f"{tick}  {_in_legend(name)}" for tick, name in zip(ticks, names, strict=True)]
    height = 3.7 + 0.2 * (-(-len(legend) // 3))
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    for ax, metric in zip(_row(figure, len(shown)), shown, strict=True):
        plots.paired_cases(_by_case(results, metric), ticks, ax=ax)
        better = "higher is better" if metric in HIGHER_IS_BETTER else "lower is better"
        ax.set_title(f"{metric}, {better}", loc="left", fontweight="bold", color=plots.INK)
    if legend:
        handles = plots.model_legend(legend)
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return ReportFigure(
        name="cases",
        section="Case by case",
        title="",
        how_to_read=_READ_CASES,
        alt=f"Box plots of {', '.join(shown)} over the cases for {_listed(results)}.",
        figure=figure,
    )


def _reliability_figure(results: Sequence[Result], index: int | None, title: str) -> ReportFigure:
    figure, panels = _square_panels([result.name for result in results], below=0.72, footer=0.3)
    for result, (square, below) in zip(results, panels, strict=True):
        # The band takes every row of the statistics for a case of its own, which those of repeats are not.
        band = None if result.repeats else 0.95
        plots.reliability_diagram(
            result.stats, class_index=index, label=_in_title(result.name), band=band, ax=square
        )
        plots.bin_counts(result.stats, class_index=index, ax=below)
        below.set_xlabel("mean predicted probability")
        square.set(xlabel="", xticklabels=[])
    _share_y_labels(figure, panels)
    figure.legend(handles=plots.gap_legend(), loc="lower center", ncols=2, frameon=False)
    return ReportFigure(
        name=f"reliability-{_suffix(index)}",
        section="Reliability diagrams",
        title=title,
        how_to_read=_READ_RELIABILITY,
        alt=f"Reliability diagrams of {_listed(results)}: {title}.",
        figure=figure,
    )


def _histogram_figure(results: Sequence[Result], index: int | None, title: str) -> ReportFigure:
    figure, panels = _square_panels([result.name for result in results], right=1.0)
    shares = [plots.histogram_share(result.stats, class_index=index) for result in results]
    largest = max(max(float(share.max()) for share in shares), 1e-9)
    for result, (square, _) in zip(results, panels, strict=True):
        plots.reliability_histogram(
            result.stats,
            class_index=index,
            label=_in_title(result.name),
            max_share=largest,
            colorbar=False,
            ax=square,
        )
    _share_y_labels(figure, panels)
    last, inch = panels[_columns(len(panels)) - 1][0].get_position(), 1 / figure.get_figwidth()
    bar = figure.add_axes((last.x1 + 0.15 * inch, last.y0, 0.13 * inch, last.height))
    plots.style_colorbar(figure.colorbar(panels[0][0].images[0], cax=bar))
    return ReportFigure(
        name=f"histogram-{_suffix(index)}",
        section="Dataset reliability histograms",
        title=title,
        how_to_read=_READ_HISTOGRAM,
        alt=f"Dataset reliability histograms of {_listed(results)}: {title}.",
        figure=figure,
    )


def _history_figure(names: Sequence[str], histories: Mapping[str, plots.History]) -> ReportFigure:
    metrics = _measured_metrics(histories)
    figure = Figure(figsize=(min(_WIDTH, 1.2 + 4.9 * len(metrics)), 3.7), layout="constrained")
    legends = {}  # one for all axes, below them, where it hides no curve
    in_order = {_in_legend(name): histories.get(name, {}) for name in dict.fromkeys([*names, *histories])}
    for ax, metric in zip(_row(figure, len(metrics)), metrics, strict=True):
        plots.loss_curves(in_order, metric=metric, ax=ax)
        ax.set_ylabel(_SPELLED.get(metric, metric.replace("_", " ")))
        legend = ax.get_legend()
        assert legend is not None
        texts = [text.get_text() for text in legend.get_texts()]
        legends |= dict(zip(texts, legend.legend_handles, strict=True))
        legend.remove()
    figure.legend(legends.values(), legends, loc="outside lower center", ncols=4, frameon=False)
    return ReportFigure(
        name="training",
        section="Training",
        title="",
        how_to_read=_READ_TRAINING,
        alt=f"Training and validation curves of {', '.join(histories)}.",
        figure=figure,
    )


def _columns(number: int) -> int:
    """Up to four panels in a row, rows as even as possible."""
    return -(-number // -(-number // 4))


def _square_panels(
    names: Sequence[str], *, below: float = 0.0, right: float = 0.2, footer: float = 0.0
) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """A grid of square axes, each with an axes of height `below` under it. All measures are in inches."""
    left, gap, label = 0.62, 0.42, 0.5
    title = 0.28 + 0.17 * max(_in_title(name).count("\n") for name in names)
    number, columns = len(names), _columns(len(names))
    rows = -(-number // columns)
    side = min(_PANEL, (_WIDTH - left - right - gap * (columns - 1)) / columns)
    under = below + 0.12 if below else 0.0
    row_height = title + side + under + label
    width = left + side * columns + gap * (columns - 1) + right
    height = rows * row_height + footer
    figure = Figure(figsize=(width, height))

    def axes(x: float, y: float, tall: float) -> Axes:
        return figure.add_axes((x / width, y / height, side / width, tall / height))

    panels = []
    for i in range(number):
        row, column = divmod(i, columns)
        x = left + column * (side + gap)
        y = height - row * row_height - title - side
        square = axes(x, y, side)
        panels.append((square, axes(x, y - under, below) if below else square))
    return figure, panels


def _share_y_labels(figure: Figure, panels: Sequence[tuple[Axes, Axes]]) -> None:
    """Leaves the names of the y axes to the first column."""
    for i, panel in enumerate(panels):
        for ax in panel:
            if i % _columns(len(panels)):
                ax.set_ylabel("")
            else:
                ax.yaxis.set_label_coords(-0.42 / (ax.get_position().width * figure.get_figwidth()), 0.5)


def _row(figure: Figure, number: int) -> list[Axes]:
    return list(figure.subplots(1, number, squeeze=False)[0])


def _by_case(results: Sequence[Result], metric: str) -> Float[np.ndarray, "models cases"]:
    """Means over classes, a row per model and a column per case of any model."""
    means = [case_means(result.case_names, result.metrics()[metric]) for result in results]
    cases = dict.fromkeys(name for result in results for name in result.case_names)
    return np.array([[mean.get(name, np.nan) for name in cases] for mean in means])


def _measured_metrics(histories: Mapping[str, plots.History]) -> list[str]:
    """What the histories hold as `train_*` or `val_*`, the loss first, at most three."""
    found = dict.fromkeys(
        column.split("_", 1)[1]
        for history in histories.values()
        for column in history
        if column.startswith(("train_", "val_"))
    )
    return sorted(found, key=lambda metric: metric != "loss")[:3]


def _suffix(index: int | None) -> str:
    return "all" if index is None else f"class-{index}"


def _plain(name: str) -> str:
    """A name whose dollar signs do not start a formula."""
    return name.replace("$", r"\$")


def _in_title(name: str) -> str:
    """At most two lines that fit over a panel."""
    return _plain(textwrap.fill(name, 26, max_lines=2, placeholder="…"))


def _in_legend(name: str) -> str:
    return _plain(textwrap.shorten(name, 44, placeholder="…"))


def _listed(results: Sequence[Result]) -> str:
    return ", ".join(result.name for result in results)
