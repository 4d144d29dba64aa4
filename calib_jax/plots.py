"""Calibration figures: functions that take matplotlib axes, draw on them and return them.

No function saves or shows anything. Without `ax`, a function opens a new pyplot figure, which the caller shows and
closes. If pyplot cannot open one, because its backend is unknown or needs a display, the figure is not registered
with pyplot. Install the extra `report` (`pip install 'calib_jax[report]'`).

    from calib_jax import plots
    plots.reliability_diagram(stats, label="Dice + mL1-ACE").figure.savefig("reliability.png")
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import calib_jax._matplotlib  # noqa: F401 (first, since it imports matplotlib despite a broken configuration)

# isort: split
import jax
import matplotlib.patheffects as effects
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from calib_jax import reliability
from calib_jax._checks import check_number
from calib_jax.binning import BinStatistics
from calib_jax.results import CALIBRATION_ERRORS, History, nan_mean

# Colours of Okabe and Ito, which readers with any common colour vision tell apart. Two of them always mean the
# direction of an error, the others always a model.
OVER: Final = "#D55E00"
UNDER: Final = "#0072B2"
MODEL_COLORS: Final = (
    *("#5B5B5B", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31"),
    *("#6A3D9A", "#8C1C13", "#A8C545", "#1B3A6B", "#0B7A75", "#FF9E80"),
)
INK: Final = "#1F2933"

_MUTED: Final = "#7B8794"
_GRID: Final = "#E4E7EB"
_HEAT: Final = LinearSegmentedColormap.from_list(
    "calib_jax.heat", ["#F3F6FA", "#C6DBEF", "#6BAED6", "#2171B5", "#08306B", "#03132E"]
)
_GAP_ALPHA: Final = 0.42
_TICKS: Final = (0, 0.25, 0.5, 0.75, 1)
_TICK_LABELS: Final = ("0", "0.25", "0.5", "0.75", "1")
_CURVES: Final[Mapping[str, Mapping[str, Any]]] = {
    "train": {"linestyle": (0, (3, 1.5)), "linewidth": 1.0, "alpha": 0.75},
    "val": {"linestyle": "-", "linewidth": 1.7},
}


def reliability_diagram(
    stats: BinStatistics,
    *,
    class_index: int | None = None,
    label: str | None = None,
    band: float | None = 0.95,
    ax: Axes | None = None,
) -> Axes:
    """Reliability diagram: observed frequency against predicted probability, with all images pooled.

    Bars span the gap between predicted probability and observed frequency: orange where the model
    predicts more than it finds, blue where it predicts less. A ring marks the widest gap.
    ACE, ECE and MCE in the corner are means over images, as in the tables; they are not errors of the pooled curve,
    in which opposite errors of images cancel. The grey band is a bootstrap interval of the curve over images.

    Args:
        stats: bin statistics `[images, classes, bins]`.
        class_index: index of the class to draw; None pools all classes.
        label: title, usually the name of the model.
        band: coverage of the band at each bin; None draws no band. A single image has no band.
        ax: axes to draw on; None opens a figure.

    Returns:
        The axes.

    Raises:
        ValueError: if `stats` has another rank or there is no class `class_index`.

    Example:
        >>> from matplotlib.figure import Figure
        >>> count = np.array([[[8, 2]]])
        >>> stats = BinStatistics(count, count * np.array([0.1, 0.9]), count * np.array([0.0, 0.5]))
        >>> ax = reliability_diagram(stats, label="U-Net", ax=Figure().add_subplot())
        >>> ax.get_title(loc="left"), ax.get_ylabel()
        ('U-Net', 'observed frequency')

    References:
        Niculescu-Mizil and Caruana, "Predicting Good Probabilities with Supervised Learning", ICML 2005.
    """
    ax = _axes(ax)
    chosen = _chosen(stats, class_index)
    prob, frequency, _ = _pooled_curve(chosen)
    filled = np.isfinite(prob)
    gap = (frequency - prob)[filled]
    colors = [OVER if size < 0 else UNDER for size in gap]
    width, bars = 0.86 / stats.num_bins, {"alpha": _GAP_ALPHA, "linewidth": 0, "zorder": 2}
    _diagonal(ax)
    ax.bar(prob[filled], gap, width, bottom=prob[filled], color=colors, **bars)
    if band is not None and len(chosen.count) > 1:
        placed = _in_equal_bins(chosen)
        pooled = jax.tree.map(lambda a: a.sum(1, keepdims=True), placed)  # images keep all their classes
        low, high = _band(jax.random.key(0), pooled, level=band)
        ax.fill_between(
            prob, np.asarray(low)[0], np.asarray(high)[0], color=INK, alpha=0.14, lw=0, zorder=1.8
        )
    ax.plot(prob, frequency, "-o", color=INK, markersize=3.2, linewidth=1.3, zorder=3)
    if filled.any():
        _mark_widest_gap(ax, prob, frequency)
    _write_errors(ax, chosen, prob[filled], frequency[filled])
    _unit_square(ax, "mean predicted probability", "observed frequency")
    return _finish(ax, label)


def bin_counts(
    stats: BinStatistics,
    *,
    class_index: int | None = None,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Bar chart of the voxels in each probability bin over all images, on a log axis.

    Args:
        stats: bin statistics `[images, classes, bins]`.
        class_index: index of the class to draw; None adds up all classes.
        label: title.
        ax: axes to draw on; None opens a figure.

    Returns:
        The axes.
    """
    ax = _axes(ax)
    _, _, count = _pooled_curve(_chosen(stats, class_index))
    width = 1 / stats.num_bins
    ax.bar((np.arange(stats.num_bins) + 0.5) * width, count, 0.86 * width, color="#9AA5B1", zorder=2)
    largest = max(float(count.max()), 1.0)
    # Set the limits before the scale, which otherwise warns if no count is above zero.
    ax.set_ylim(0.5, 3 * largest)
    ax.set_yscale("log")
    ax.set(xlim=(0, 1), xlabel="predicted probability", ylabel="voxels")
    ax.set_xticks(_TICKS, _TICK_LABELS)
    decades = int(np.log10(largest)) + 1
    ax.set_yticks([10.0**power for power in range(0, decades, -(-decades // 4))])  # at most four
    ax.minorticks_off()
    return _finish(ax, label)


def reliability_histogram(
    stats: BinStatistics,
    *,
    class_index: int | None = None,
    label: str | None = None,
    max_share: float | None = None,
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Dataset reliability histogram: the reliability curves of all images, counted on a grid.

    Colour is the share of images whose bin at this predicted probability has this observed frequency, on a
    square-root scale. The orange curve pools all images, as a reliability diagram does.

    Args:
        stats: bin statistics `[images, classes, bins]`.
        class_index: index of the class to draw; None counts every image and class.
        label: title.
        max_share: share at the dark end of the colours, which gives several figures the same scale.
        colorbar: whether to draw a colour bar, which takes its room from `ax`.
        ax: axes to draw on; None opens a figure.

    Returns:
        The axes.

    References:
        Barfoot et al., arXiv 2403.06759.
    """
    if max_share is not None:
        check_number("max_share", max_share, 1e-9)
    ax = _axes(ax)
    share = histogram_share(stats, class_index=class_index)
    norm = PowerNorm(0.5, vmin=0, vmax=max_share or max(float(share.max()), 1e-9))
    grid, square = np.ma.masked_equal(share, 0), (0, 1, 0, 1)
    image = ax.imshow(grid, origin="lower", extent=square, cmap=_HEAT, norm=norm, zorder=1)
    _diagonal(ax)
    prob, frequency, _ = _pooled_curve(_chosen(stats, class_index))
    ax.plot(prob, frequency, color=OVER, linewidth=1.4, path_effects=_white_outline(2.8), zorder=4)
    _unit_square(ax, "predicted probability (bin)", "observed frequency (bin)")
    if colorbar:
        style_colorbar(ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.03))
    return _finish(ax, label)


def histogram_share(
    stats: BinStatistics, *, class_index: int | None = None
) -> Float[np.ndarray, "bins bins"]:
    """Share of images in each cell of `reliability_histogram`: `[frequency bin, probability bin]`."""
    flat = _one_class(_chosen(stats, class_index))
    return np.asarray(_histogram(flat), np.float64)[0] / max(flat.count.shape[0], 1)


def style_colorbar(bar: Any) -> None:
    """Sets the label and ticks of a colour bar of `reliability_histogram`."""
    bar.ax.yaxis.set_major_locator(MaxNLocator(5))
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    bar.set_label("share of images", color=INK)
    bar.ax.tick_params(color=_MUTED, labelcolor=INK, length=2)
    bar.outline.set_visible(False)


def loss_curves(
    history: History | Mapping[str, History], *, metric: str = "loss", ax: Axes | None = None
) -> Axes:
    """Training (thin, dashed) and validation (solid) curves over the epochs, for one or several models.

    Args:
        history: columns `train_{metric}`, `val_{metric}` and usually `epoch`, of equal length, with NaN or None
            where nothing was measured; or one such mapping per model, by name.
        metric: metric whose columns are drawn.
        ax: axes to draw on; None opens a figure.

    Returns:
        The axes.

    Raises:
        ValueError: if no model has such columns.
    """
    by_model: Any = (
        history if all(isinstance(value, Mapping) for value in history.values()) else {"": history}
    )
    drawn = [
        (kind, name, color)
        for name, color in zip(by_model, model_colors(len(by_model)), strict=True)
        for kind in _CURVES
        if f"{kind}_{metric}" in by_model[name]
    ]
    if not drawn:
        raise ValueError(
            f"history has neither 'train_{metric}' nor 'val_{metric}': there is nothing to draw."
        )
    ax = _axes(ax)
    for kind, name, color in drawn:
        ax.plot(*_measured(by_model[name], f"{kind}_{metric}"), color=color, **_CURVES[kind])
    ax.set(xlabel="epoch", ylabel=metric)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(axis="y", color=_GRID, linewidth=0.8)
    colors = {name: color for _, name, color in drawn if name}
    words = {"train": "training", "val": "validation"}
    handles = [Line2D([], [], color=color, linewidth=2.5, label=name) for name, color in colors.items()]
    for kind in sorted({kind for kind, _, _ in drawn}):
        handles.append(Line2D([], [], color=INK, label=words[kind], **_CURVES[kind]))
    ax.legend(handles=handles, frameon=False, fontsize="small", labelcolor=INK)
    return _finish(ax)


def paired_cases(
    values: Float[np.ndarray, "models cases"],
    names: Sequence[str],
    *,
    ylabel: str = "",
    ax: Axes | None = None,
) -> Axes:
    """A metric of every case under every model: boxes over the cases, and lines that follow each case.

    Args:
        values: one row per model, one column per case; NaN is left out.
        names: names of the models.
        ylabel: name of the metric.
        ax: axes to draw on; None opens a figure.

    Returns:
        The axes.

    Raises:
        ValueError: if `values` does not have one row for each name.
    """
    if np.ndim(values) != 2 or len(values) != len(names):
        raise ValueError(
            f"values must be [models, cases] with a row for each of the {len(names)} names; got {np.shape(values)}."
        )
    ax = _axes(ax)
    at = np.arange(len(names), dtype=float)
    x = at[:, None] + np.random.default_rng(0).uniform(-0.09, 0.09, values.shape[1])
    lines = list(np.stack([x.T, values.T], axis=-1))
    alpha = float(np.clip(12 / max(values.shape[1], 1), 0.06, 0.35))
    ax.add_collection(LineCollection(lines, colors=_MUTED, linewidths=0.6, alpha=alpha, zorder=1))
    for i, color in enumerate(model_colors(len(names))):
        found = values[i][np.isfinite(values[i])]
        ax.scatter(x[i], values[i], s=7, color=color, alpha=0.55, linewidths=0, zorder=2)
        if found.size:
            _box(ax, at[i], found, color)
            ax.plot(at[i], found.mean(), "D", color="white", markeredgecolor=INK, markersize=5, zorder=4)
    ax.set(xlim=(-0.5, len(names) - 0.5), ylabel=ylabel)
    ax.set_xticks(at, names)
    ax.grid(axis="y", color=_GRID, linewidth=0.8)
    return _finish(ax)


def agreement(
    points: Mapping[str, Float[np.ndarray, "points 2"]],
    *,
    logarithmic: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Scatter plot of a prediction against the truth, around the diagonal on which they agree.

    Args:
        points: x and y of each point, by name of the model.
        logarithmic: whether both axes are logarithmic; points with a zero are left out.
        ax: axes to draw on; None opens a figure.

    Returns:
        The axes.
    """
    ax = _axes(ax)
    shown = []
    for (_, xy), color in zip(points.items(), model_colors(len(points)), strict=True):
        xy = xy[(xy > 0).all(1)] if logarithmic else xy
        alpha = float(np.clip(30 / max(len(xy), 1), 0.25, 0.8))
        ax.scatter(*xy.T, s=14, color=color, alpha=alpha, linewidths=0, zorder=2)
        shown.append(xy)
    values = np.concatenate([np.zeros((0, 2)), *shown])
    if values.size:
        low, high = float(values.min()), float(values.max())
        low, high = (low / 1.3, high * 1.3) if logarithmic else (low - 0.03, high + 0.03)
        if logarithmic:
            ax.set(xscale="log", yscale="log")
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.set_minor_formatter(NullFormatter())
        ax.plot([low, high], [low, high], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1.5)
        ax.set(xlim=(low, high), ylim=(low, high))
    ax.set_aspect("equal")
    ax.grid(color=_GRID, linewidth=0.8)
    return _finish(ax)


def gap_legend() -> list[Patch]:
    """Legend handles for the colours of the gaps in a reliability diagram."""
    return [
        Patch(facecolor=OVER, alpha=_GAP_ALPHA, label="predicts more than it finds"),
        Patch(facecolor=UNDER, alpha=_GAP_ALPHA, label="predicts less than it finds"),
    ]


def model_legend(names: Sequence[str]) -> list[Patch]:
    """Legend handles for the colours of the models."""
    colors = model_colors(len(names))
    return [Patch(color=color, label=name) for name, color in zip(names, colors, strict=True)]


def model_colors(number: int) -> list[str]:
    """The colours of the first `number` models, the same in every figure."""
    return [MODEL_COLORS[i % len(MODEL_COLORS)] for i in range(number)]


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt  # here, since pyplot needs a backend and has global state

        return plt.subplots(layout="constrained")[1]
    except Exception:  # the backend of the user's configuration may raise anything
        return Figure(layout="constrained").add_subplot()


def _chosen(stats: BinStatistics, class_index: int | None) -> BinStatistics:
    """The chosen class, or all classes, as float64, in which sums over a whole data set are exact."""
    if stats.count.ndim != 3:
        raise ValueError(f"stats must be [images, classes, bins]; their shape is {stats.count.shape}.")
    classes = stats.count.shape[1]
    if class_index is not None and not -classes <= class_index < classes:
        raise ValueError(
            f"class_index {class_index} is out of range: there are {classes} classes, from 0 on."
        )
    which = slice(None) if class_index is None else [class_index]
    return jax.tree.map(lambda a: np.asarray(a, np.float64)[:, which], stats)


def _one_class(chosen: BinStatistics) -> BinStatistics:
    """The statistics with each class of an image as an image of its own: `[images * classes, 1, bins]`."""
    return jax.tree.map(lambda a: a.reshape(-1, 1, a.shape[-1]), _in_equal_bins(chosen))


def _in_equal_bins(chosen: BinStatistics) -> BinStatistics:
    """Statistics of adaptive bins, each added to the bin of equal width that holds its mean probability.

    Adaptive bins lie elsewhere in each image and class. Other statistics stay as they are: the mean of a hard bin
    lies in the bin, that of a soft one at most half a width beside it.
    """
    filled, num_bins = chosen.count > 0, chosen.num_bins
    mean = np.divide(chosen.prob_sum, chosen.count, out=np.zeros_like(chosen.count), where=filled)
    beside = np.where(filled, abs(mean * num_bins - np.arange(num_bins) - 0.5), 0)
    if beside.max(initial=0) <= 1.01:
        return chosen
    index = np.clip(np.ceil(mean * num_bins).astype(int) - 1, 0, num_bins - 1)
    belongs = index[..., None] == np.arange(num_bins)
    return jax.tree.map(lambda a: np.where(belongs & filled[..., None], a[..., None], 0).sum(-2), chosen)


def _pooled_curve(chosen: BinStatistics) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean probability, observed frequency and count of each bin over all images and classes."""
    curve = reliability.reliability_curve(_one_class(chosen))
    prob, frequency, count = (np.asarray(a)[0] for a in (curve.mean_prob, curve.mean_label, curve.count))
    return prob, frequency, count


# A program each, since JAX would compile one for each of their operations.
_band = jax.jit(reliability.reliability_band, static_argnames="level")
_histogram = jax.jit(reliability.reliability_histogram)


def _mark_widest_gap(ax: Axes, prob: np.ndarray, frequency: np.ndarray) -> None:
    """Draws a ring around the point furthest from the diagonal and writes the gap on the ring's far side."""
    widest = int(np.nanargmax(np.abs(prob - frequency)))
    x, y = float(prob[widest]), float(frequency[widest])
    color = OVER if x > y else UNDER
    down = y > 0.9 or (x > y and y > 0.1)
    aside = 0 if x < 0.16 or x > 0.84 else 1 if down else -1
    ax.plot(x, y, "o", ms=9, markerfacecolor="none", markeredgecolor=color, markeredgewidth=1.6, zorder=5)
    ax.annotate(
        f"{abs(x - y):.2f}",
        (x, y),
        xytext=(5 * aside, (-1 if down else 1) * (9 - 4 * abs(aside))),
        textcoords="offset points",
        ha={-1: "right", 0: "center", 1: "left"}[aside],
        va="top" if down else "bottom",
        color=color,
        path_effects=_white_outline(2.5),
        fontsize="small",
        fontweight="bold",
        zorder=6,
    )


def _write_errors(ax: Axes, chosen: BinStatistics, prob: np.ndarray, frequency: np.ndarray) -> None:
    """Writes ACE, ECE and MCE (means over images of the mean over classes) into a corner away from the curve."""
    lines = []
    for name, error in CALIBRATION_ERRORS.items():
        lines.append(f"{name} {nan_mean(nan_mean(error(chosen), axis=1)):.3f}")
    above = np.sum((prob < 0.45) & (frequency > 0.62))
    below = np.sum((prob > 0.55) & (frequency < 0.38))
    x, y, ha, va = (0.04, 0.965, "left", "top") if above <= below else (0.965, 0.04, "right", "bottom")
    box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": _GRID, "alpha": 0.92}
    text = {"multialignment": "left", "fontsize": "small", "color": INK, "linespacing": 1.35, "zorder": 7}
    ax.text(x, y, "\n".join(lines), transform=ax.transAxes, ha=ha, va=va, bbox=box, **text)


def _box(ax: Axes, at: float, values: np.ndarray, color: str) -> None:
    line = {"color": INK, "linewidth": 1.0}
    ax.boxplot(
        values,
        positions=[at],
        widths=0.44,
        showfliers=False,
        patch_artist=True,
        manage_ticks=False,
        boxprops={"facecolor": (color, 0.16), "edgecolor": INK, "linewidth": 1.0},
        whiskerprops=line,
        capprops=line,
        medianprops=line | {"linewidth": 1.6},
        zorder=3,
    )


def _white_outline(width: float) -> list[effects.AbstractPathEffect]:
    return [effects.Stroke(linewidth=width, foreground="white"), effects.Normal()]


def _diagonal(ax: Axes) -> None:
    ax.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1.5)


def _unit_square(ax: Axes, xlabel: str, ylabel: str) -> None:
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel=xlabel, ylabel=ylabel)
    ax.set_xticks(_TICKS, _TICK_LABELS)
    ax.set_yticks(_TICKS, _TICK_LABELS)


def _finish(ax: Axes, label: str | None = None) -> Axes:
    """Sets the colours that all figures share, and the title."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(_MUTED)
    ax.tick_params(color=_MUTED, labelcolor=INK, length=3)
    ax.xaxis.label.set_color(INK)
    ax.yaxis.label.set_color(INK)
    ax.set_axisbelow(True)
    if label:
        ax.set_title(label, loc="left", color=INK, fontweight="bold")
    return ax


def _measured(model: History, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values where `column` was measured."""
    y = np.asarray(model[column], np.float64)
    x = np.asarray(model.get("epoch", np.arange(1, y.size + 1)), np.float64)
    if x.shape != y.shape:
        raise ValueError(
            f"{column!r} has {y.size} values for {x.size} epochs: give NaN where nothing was measured."
        )
    return x[np.isfinite(y)], y[np.isfinite(y)]
