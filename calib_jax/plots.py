"""Calibration figures: matplotlib axes in, axes out. Nothing is saved or shown here.

Every function draws on the `ax` it is given and returns it; without one it opens a new pyplot figure,
which is then the caller's to show and close. Where pyplot cannot open one, because its backend is unknown or
needs a display, the figure is one that pyplot does not know. Needs the extra `report`
(`pip install 'calib_jax[report]'`).

    from calib_jax import plots
    plots.reliability_diagram(stats, label="Dice + mL1-ACE").figure.savefig("reliability.png")
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import calib_jax._matplotlib  # noqa: F401 (first, since it imports matplotlib whatever its configuration)

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
from matplotlib.ticker import MaxNLocator, PercentFormatter

from calib_jax import reliability
from calib_jax._checks import check_number
from calib_jax.binning import BinStatistics
from calib_jax.errors import (
    average_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
)

History = Mapping[str, Sequence[float | int | None] | np.ndarray]
"""One model's training history: columns of equal length, `epoch` and any of `train_*` and `val_*`."""

# Okabe and Ito's colours, told apart by readers with any common colour vision. Two of them always mean the
# direction of an error, the others always a model.
OVER: Final = "#D55E00"
UNDER: Final = "#0072B2"
MODEL_COLORS: Final = (
    *("#5B5B5B", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31"),
    *("#6A3D9A", "#8C1C13", "#A8C545", "#1B3A6B", "#0B7A75", "#FF9E80"),
)

_GAP_ALPHA: Final = 0.42
_TICKS: Final = (0, 0.25, 0.5, 0.75, 1)
_TICK_LABELS: Final = ("0", "0.25", "0.5", "0.75", "1")
_CURVES: Final[Mapping[str, Mapping[str, Any]]] = {
    "train": {"linestyle": (0, (3, 1.5)), "linewidth": 1.0, "alpha": 0.75},
    "val": {"linestyle": "-", "linewidth": 1.7},
}
_ERRORS: Final[Mapping[str, Callable[[BinStatistics], Any]]] = {
    "ACE": average_calibration_error,
    "ECE": expected_calibration_error,
    "MCE": maximum_calibration_error,
}
INK: Final = "#1F2933"
_MUTED: Final = "#7B8794"
_GRID: Final = "#E4E7EB"
_HEAT: Final = LinearSegmentedColormap.from_list(
    "calib_jax.heat", ["#F3F6FA", "#C6DBEF", "#6BAED6", "#2171B5", "#08306B", "#03132E"]
)


def reliability_diagram(
    stats: BinStatistics,
    *,
    class_index: int | None = None,
    label: str | None = None,
    band: float | None = 0.95,
    ax: Axes | None = None,
) -> Axes:
    """Observed frequency against predicted probability, all images pooled, with the gaps shaded.

    Bars reach from the predicted probability to the observed frequency: orange where the model is
    over-confident (predicts more than it finds), blue where it is under-confident. The widest gap is marked.
    ACE, ECE and MCE in the corner are means over images, as in the tables, not errors of the pooled curve,
    in which the errors of single images cancel. The grey band is where the curve of another draw of images
    would lie (bootstrap over images).

    Args:
        stats: bin statistics `[images, classes, bins]`.
        class_index: the class to draw; None pools all of them.
        label: title, as a rule the name of the model.
        band: coverage of the band at each bin; None draws none, nor can one be drawn from a single image.
        ax: axes to draw on.

    Returns:
        The axes.

    Raises:
        ValueError: if `stats` has another rank or the class is not there.

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
    _diagonal(ax)
    _gap_bars(ax, prob[filled], frequency[filled], 1 / stats.num_bins)
    if band is not None and len(chosen.count) > 1:
        low, high = _frequency_band(chosen, band)
        ax.fill_between(prob, low, high, color=INK, alpha=0.14, linewidth=0, zorder=1.8)
    ax.plot(prob, frequency, "-o", color=INK, markersize=3.2, linewidth=1.3, zorder=3)
    if filled.any():
        _mark_widest_gap(ax, prob, frequency)
    _errors_in_corner(ax, chosen, prob[filled], frequency[filled])
    _unit_square(ax, "mean predicted probability", "observed frequency")
    return _titled(ax, label)


def bin_counts(
    stats: BinStatistics,
    *,
    class_index: int | None = None,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Voxels per probability bin over all images, on a log axis: what stands behind each point of a curve.

    Args:
        stats: bin statistics `[images, classes, bins]`.
        class_index: the class to draw; None adds all of them up.
        label: title.
        ax: axes to draw on.

    Returns:
        The axes.
    """
    ax = _axes(ax)
    count = _pooled_curve(_chosen(stats, class_index))[2]
    width = 1 / stats.num_bins
    ax.bar((np.arange(stats.num_bins) + 0.5) * width, count, 0.86 * width, color="#9AA5B1", zorder=2)
    largest = max(float(count.max()), 1.0)
    # Limits before the scale, which otherwise looks for a count above zero and warns if there is none.
    ax.set_ylim(0.5, 3 * largest)
    ax.set_yscale("log")
    ax.set(xlim=(0, 1), xlabel="predicted probability", ylabel="voxels")
    ax.set_xticks(_TICKS, _TICK_LABELS)
    ax.set_yticks(_decades(largest))
    ax.minorticks_off()
    return _titled(_clean(ax), label)


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
        class_index: the class to draw; None counts every image and class.
        label: title.
        max_share: share at the dark end of the colours, to give several figures the same scale.
        colorbar: whether to draw the colour bar, which takes its room from `ax`.
        ax: axes to draw on.

    Returns:
        The axes.

    References:
        Barfoot et al., arXiv 2403.06759.
    """
    if max_share is not None:
        check_number("max_share", max_share, 1e-9)
    ax = _axes(ax)
    chosen = _chosen(stats, class_index)
    share = histogram_share(stats, class_index=class_index)
    norm = PowerNorm(0.5, vmin=0, vmax=max_share or max(float(share.max()), 1e-9))
    image = ax.imshow(
        np.ma.masked_equal(share, 0), origin="lower", extent=(0, 1, 0, 1), cmap=_HEAT, norm=norm, zorder=1
    )
    _diagonal(ax)
    prob, frequency, _ = _pooled_curve(chosen)
    outline = [effects.Stroke(linewidth=2.8, foreground="white"), effects.Normal()]
    ax.plot(prob, frequency, color=OVER, linewidth=1.4, path_effects=outline, zorder=4)
    _unit_square(ax, "predicted probability (bin)", "observed frequency (bin)")
    if colorbar:
        bar = ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.03)
        style_colorbar(bar)
    return _titled(ax, label)


def histogram_share(
    stats: BinStatistics, *, class_index: int | None = None
) -> Float[np.ndarray, "bins bins"]:
    """Share of images in each cell of `reliability_histogram`: `[frequency bin, probability bin]`."""
    flat = _one_class(_chosen(stats, class_index))
    return np.asarray(reliability.reliability_histogram(flat), np.float64)[0] / max(flat.count.shape[0], 1)


def style_colorbar(bar: Any) -> None:
    """Gives a colour bar of `reliability_histogram` its label and ticks."""
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
        history: columns `train_{metric}`, `val_{metric}` and, as a rule, `epoch`, of equal length with NaN
            or None where nothing was measured; or such a mapping for each model by its name.
        metric: which columns to draw.
        ax: axes to draw on.

    Returns:
        The axes.

    Raises:
        ValueError: if there are no such columns.
    """
    models = _by_model(history)
    colors = dict(zip(models, model_colors(len(models)), strict=True))
    kinds = [kind for kind in _CURVES if any(f"{kind}_{metric}" in model for model in models.values())]
    if not kinds:
        raise ValueError(
            f"history has neither 'train_{metric}' nor 'val_{metric}': there is nothing to draw."
        )
    ax = _axes(ax)
    drawn = [(name, kind) for name, model in models.items() for kind in kinds if f"{kind}_{metric}" in model]
    for name, kind in drawn:
        ax.plot(*_measured(models[name], f"{kind}_{metric}"), color=colors[name], **_CURVES[kind])
    named = {name: colors[name] for name, _ in drawn if name}
    ax.set(xlabel="epoch", ylabel=metric)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(axis="y", color=_GRID, linewidth=0.8)
    ax.legend(handles=_curve_legend(named, kinds), frameon=False, fontsize="small", labelcolor=INK)
    return _clean(ax)


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
        ax: axes to draw on.

    Returns:
        The axes.

    Raises:
        ValueError: if there is not one row for each name.
    """
    if np.ndim(values) != 2 or len(values) != len(names):
        raise ValueError(
            f"values must be [models, cases] with a row for each of the {len(names)} names; got {np.shape(values)}."
        )
    ax = _axes(ax)
    at = np.arange(len(names), dtype=float)
    jitter = np.random.default_rng(0).uniform(-0.09, 0.09, values.shape[1])
    x = at[:, None] + jitter
    lines = np.stack([x.T, values.T], axis=-1)
    alpha = float(np.clip(12 / max(values.shape[1], 1), 0.06, 0.35))
    ax.add_collection(LineCollection(list(lines), colors=_MUTED, linewidths=0.6, alpha=alpha, zorder=1))
    for i, color in enumerate(model_colors(len(names))):
        found = values[i][np.isfinite(values[i])]
        ax.scatter(x[i], values[i], s=7, color=color, alpha=0.55, linewidths=0, zorder=2)
        if found.size:
            _box(ax, at[i], found, color)
            ax.plot(at[i], found.mean(), "D", color="white", markeredgecolor=INK, markersize=5, zorder=4)
    ax.set(xlim=(-0.5, len(names) - 0.5), ylabel=ylabel)
    ax.set_xticks(at, names)
    ax.grid(axis="y", color=_GRID, linewidth=0.8)
    return _clean(ax)


def gap_legend() -> list[Patch]:
    """Legend handles for the colours of the gaps in a reliability diagram."""
    return [
        Patch(facecolor=OVER, alpha=_GAP_ALPHA, label="over-confident: predicts more than it finds"),
        Patch(facecolor=UNDER, alpha=_GAP_ALPHA, label="under-confident: predicts less than it finds"),
    ]


def model_legend(names: Sequence[str]) -> list[Patch]:
    """Legend handles for the colours of the models."""
    return [
        Patch(color=color, label=name) for name, color in zip(names, model_colors(len(names)), strict=True)
    ]


def model_colors(number: int) -> list[str]:
    """The colours of the first `number` models, the same in every figure."""
    return [MODEL_COLORS[i % len(MODEL_COLORS)] for i in range(number)]


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt  # here, so that figures made without it need no display or global state

        return plt.subplots(layout="constrained")[1]
    except Exception:  # whatever the backend raises that the user's configuration names
        return Figure(layout="constrained").add_subplot()


def _chosen(stats: BinStatistics, class_index: int | None) -> BinStatistics:
    """The class asked for (or all of them) as float64, in which sums over a whole data set are exact."""
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
    """Every image and class as an image of one class."""
    return jax.tree.map(lambda a: a.reshape(-1, 1, a.shape[-1]), chosen)


def _pooled_curve(chosen: BinStatistics) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean probability, observed frequency and count of each bin over all images and classes."""
    curve = reliability.reliability_curve(_one_class(chosen))
    prob, frequency, count = curve.mean_prob, curve.mean_label, curve.count
    return np.asarray(prob)[0], np.asarray(frequency)[0], np.asarray(count)[0]


def _frequency_band(chosen: BinStatistics, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Interval of the pooled observed frequency of each bin, images drawn with all their classes."""
    pooled = jax.tree.map(lambda a: a.sum(1, keepdims=True), chosen)
    low, high = _band(jax.random.key(0), pooled, level=level)
    return np.asarray(low)[0], np.asarray(high)[0]


_band = jax.jit(reliability.reliability_band, static_argnames="level")


def _mean_error(error: Callable[[BinStatistics], Any], chosen: BinStatistics) -> float:
    """Mean over images of the mean over classes, NaN left out."""
    values = np.asarray(error(chosen), np.float64)
    return _nan_mean(np.array([_nan_mean(row) for row in values]))


def _nan_mean(values: np.ndarray) -> float:
    found = values[np.isfinite(values)]
    return float(found.mean()) if found.size else float("nan")


def _gap_bars(ax: Axes, prob: np.ndarray, frequency: np.ndarray, width: float) -> None:
    colors = [OVER if gap > 0 else UNDER for gap in prob - frequency]
    ax.bar(
        prob,
        frequency - prob,
        0.86 * width,
        bottom=prob,
        color=colors,
        alpha=_GAP_ALPHA,
        linewidth=0,
        zorder=2,
    )


def _mark_widest_gap(ax: Axes, prob: np.ndarray, frequency: np.ndarray) -> None:
    """A ring around the point furthest from the diagonal, and on the far side of it how far that is."""
    widest = int(np.nanargmax(np.abs(prob - frequency)))
    x, y = float(prob[widest]), float(frequency[widest])
    color = OVER if x > y else UNDER
    down = y > 0.9 or (x > y and y > 0.1)
    aside = 0 if x < 0.16 or x > 0.84 else 1 if down else -1
    ax.plot(
        x, y, "o", markersize=9, markerfacecolor="none", markeredgecolor=color, markeredgewidth=1.6, zorder=5
    )
    ax.annotate(
        f"{abs(x - y):.2f}",
        (x, y),
        xytext=(5 * aside, (-1 if down else 1) * (9 - 4 * abs(aside))),
        textcoords="offset points",
        ha={-1: "right", 0: "center", 1: "left"}[aside],
        va="top" if down else "bottom",
        fontsize="small",
        fontweight="bold",
        color=color,
        path_effects=[effects.Stroke(linewidth=2.5, foreground="white"), effects.Normal()],
        zorder=6,
    )


def _errors_in_corner(ax: Axes, chosen: BinStatistics, prob: np.ndarray, frequency: np.ndarray) -> None:
    """ACE, ECE and MCE in the corner away from the curve."""
    text = "\n".join(f"{name} {_mean_error(error, chosen):.3f}" for name, error in _ERRORS.items())
    above = np.sum((prob < 0.45) & (frequency > 0.62))
    below = np.sum((prob > 0.55) & (frequency < 0.38))
    x, y, ha, va = (0.04, 0.965, "left", "top") if above <= below else (0.965, 0.04, "right", "bottom")
    box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": _GRID, "alpha": 0.92}
    ax.text(
        x,
        y,
        text,
        transform=ax.transAxes,
        ha=ha,
        va=va,
        multialignment="left",
        fontsize="small",
        color=INK,
        bbox=box,
        linespacing=1.35,
        zorder=7,
    )


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


def _diagonal(ax: Axes) -> None:
    ax.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1.5)


def _unit_square(ax: Axes, xlabel: str, ylabel: str) -> None:
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel=xlabel, ylabel=ylabel)
    ax.set_xticks(_TICKS, _TICK_LABELS)
    ax.set_yticks(_TICKS, _TICK_LABELS)
    _clean(ax)


def _decades(largest: float) -> list[float]:
    """At most four powers of ten up to `largest`, from 1 on."""
    top = int(np.log10(largest))
    return [10.0**power for power in range(0, top + 1, max(1, -(-(top + 1) // 4)))]


def _clean(ax: Axes) -> Axes:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(_MUTED)
    ax.tick_params(color=_MUTED, labelcolor=INK, length=3)
    ax.xaxis.label.set_color(INK)
    ax.yaxis.label.set_color(INK)
    ax.set_axisbelow(True)
    return ax


def _titled(ax: Axes, label: str | None) -> Axes:
    if label:
        ax.set_title(label, loc="left", color=INK, fontweight="bold")
    return ax


def _by_model(history: Mapping[str, Any]) -> Mapping[str, History]:
    if all(isinstance(value, Mapping) for value in history.values()):
        return history
    return {"": history}


def _curve_legend(colors: Mapping[str, str], kinds: Sequence[str]) -> list[Line2D]:
    """A handle for each model in its colour, and one for each kind of curve."""
    models = [Line2D([], [], color=color, linewidth=2.5, label=name) for name, color in colors.items()]
    words = {"train": "training", "val": "validation"}
    return models + [Line2D([], [], color=INK, label=words[kind], **_CURVES[kind]) for kind in kinds]


def _measured(model: History, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values where `column` was measured."""
    y = np.array([np.nan if value is None else value for value in model[column]], np.float64)
    x = np.asarray(model.get("epoch", np.arange(1, y.size + 1)), np.float64)
    if x.shape != y.shape:
        raise ValueError(
            f"{column!r} has {y.size} values for {x.size} epochs: give NaN where nothing was measured."
        )
    return x[np.isfinite(y)], y[np.isfinite(y)]
