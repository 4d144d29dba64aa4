"""Figures: what they draw, and that they leave nothing behind."""

import io
import subprocess
import sys

import matplotlib

matplotlib.use("Agg")

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from calib_jax import BinStatistics, bin_statistics, plots

HISTORY = {"epoch": [1, 2, 3], "train_loss": [0.9, 0.6, 0.5], "val_loss": [None, 0.7, float("nan")]}


@pytest.fixture
def stats():
    """Two images of one class in four bins: over-confident high up, under-confident low down."""
    count = np.array([[[10, 0, 4, 10]], [[30, 0, 0, 10]]])
    prob = np.array([[[0.1, 0.0, 0.6, 0.9]], [[0.1, 0.0, 0.0, 0.9]]])
    label_sum = np.array([[[2, 0, 2, 5]], [[6, 0, 0, 9]]], dtype=float)
    return BinStatistics(count, prob * count, label_sum)


@pytest.fixture
def ax():
    return Figure().add_subplot()


DRAWINGS = {
    "reliability_diagram": lambda stats, ax: plots.reliability_diagram(stats, label="U-Net", ax=ax),
    "bin_counts": lambda stats, ax: plots.bin_counts(stats, ax=ax),
    "reliability_histogram": lambda stats, ax: plots.reliability_histogram(stats, ax=ax),
    "loss_curves": lambda stats, ax: plots.loss_curves(HISTORY, ax=ax),
    "paired_cases": lambda stats, ax: plots.paired_cases(
        np.array([[0.1, 0.2], [0.3, np.nan]]), ["a", "b"], ax=ax
    ),
}


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
def test_draws_on_the_axes_given_and_opens_no_figure(draw, stats, ax):
    before = plt.get_fignums()
    assert draw(stats, ax) is ax
    ax.figure.canvas.draw()
    assert plt.get_fignums() == before


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
def test_without_axes_opens_one_figure(draw, stats):
    before = len(plt.get_fignums())
    figure = draw(stats, None).figure
    assert len(plt.get_fignums()) == before + 1
    plt.close(figure)
    assert len(plt.get_fignums()) == before


@pytest.mark.parametrize("error", [ImportError("Cannot load backend 'QtAgg'"), ValueError("no backend")])
def test_without_axes_and_pyplot_opens_a_figure_all_the_same(error, stats, monkeypatch):
    def fail(**_):
        raise error

    monkeypatch.setattr(plt, "subplots", fail)
    ax = plots.reliability_diagram(stats)
    ax.figure.savefig(io.BytesIO(), format="png")


def curve(ax):
    return next(
        line.get_xydata() for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata()) > 1
    )


def test_curve_pools_the_images(stats, ax):
    expected = [[0.1, 8 / 40], [np.nan, np.nan], [0.6, 0.5], [0.9, 14 / 20]]
    np.testing.assert_allclose(curve(plots.reliability_diagram(stats, ax=ax)), expected, rtol=1e-6)


def test_errors_in_the_corner_are_means_over_images(stats, ax):
    plots.reliability_diagram(stats, ax=ax)
    (text,) = [text.get_text() for text in ax.texts if "ACE" in text.get_text()]
    ace = ((0.1 + 0.1 + 0.4) / 3 + (0.1 + 0.0) / 2) / 2
    ece = ((1.0 + 0.4 + 4.0) / 24 + 3.0 / 40) / 2
    mce = (0.4 + 0.1) / 2
    assert text == f"ACE {ace:.3f}\nECE {ece:.3f}\nMCE {mce:.3f}"


def test_gaps_are_coloured_by_their_direction_and_the_widest_is_marked(stats, ax):
    plots.reliability_diagram(stats, ax=ax)
    colors = [bar.get_facecolor()[:3] for bar in ax.patches]
    assert colors == [to_rgb(plots.UNDER), to_rgb(plots.OVER), to_rgb(plots.OVER)]
    assert [(bar.get_y(), bar.get_height()) for bar in ax.patches] == [
        (pytest.approx(0.1), pytest.approx(0.1)),
        (pytest.approx(0.6), pytest.approx(-0.1)),
        (pytest.approx(0.9), pytest.approx(-0.2)),
    ]
    (ring,) = [line for line in ax.lines if line.get_markerfacecolor() == "none"]
    assert ring.get_xydata().tolist() == [[pytest.approx(0.9), pytest.approx(0.7)]]
    assert "0.20" in [text.get_text() for text in ax.texts]


def test_class_index_chooses_and_none_pools(ax):
    count = np.full((1, 2, 2), 10)
    prob_sum = count * np.array([0.25, 0.75])
    stats = BinStatistics(count, prob_sum, np.array([[[0.0, 10.0], [10.0, 10.0]]]))
    drawn = {
        index: curve(plots.reliability_diagram(stats, class_index=index, ax=Figure().add_subplot()))[
            :, 1
        ].tolist()
        for index in (None, 0, 1, -1)
    }
    assert drawn == {None: [0.5, 1.0], 0: [0.0, 1.0], 1: [1.0, 1.0], -1: [1.0, 1.0]}


def test_counts_add_up_past_32_bits(ax):
    count = np.full((4, 1, 2), 2**30, dtype=np.int32)
    stats = BinStatistics(count, 0.25 * count.astype(np.float32), 0.5 * count.astype(np.float32))
    plots.bin_counts(stats, ax=ax)
    assert [bar.get_height() for bar in ax.patches] == [2.0**32, 2.0**32]
    np.testing.assert_allclose(curve(plots.reliability_diagram(stats, ax=Figure().add_subplot()))[:, 1], 0.5)


def test_histogram_shows_shares_of_images(stats, ax):
    share = plots.histogram_share(stats)
    expected = np.zeros((4, 4))
    expected[0, 0] = 1  # both images: frequency 0.2 in the first bin
    expected[1, 2] = expected[1, 3] = 0.5  # one image each: 0.5, which (l, r] bins put into the second
    expected[3, 3] = 0.5  # 0.9
    np.testing.assert_array_equal(share, expected)
    (image,) = plots.reliability_histogram(stats, max_share=0.8, ax=ax).images
    np.testing.assert_array_equal(np.ma.filled(image.get_array(), 0), expected)
    assert (image.norm.vmin, image.norm.vmax) == (0, 0.8)


def test_adaptive_bins_are_drawn_where_their_probabilities_lie(ax):
    probs = np.random.default_rng(0).beta(0.5, 4, (3, 4000, 2)).astype(np.float32)
    labels = (np.random.default_rng(1).random(probs.shape) < probs).astype(np.float32)
    adaptive, hard = (
        jax.device_get(bin_statistics(probs, labels, num_bins=10, binning=binning))
        for binning in ("adaptive", "hard")
    )
    plots.bin_counts(adaptive, class_index=1, ax=ax)
    heights = np.array([bar.get_height() for bar in ax.patches])
    assert heights.sum() == 3 * 4000
    assert heights[0] > 1.5 * 4000  # most probabilities are small: bins of equal mass would have equal bars
    share = plots.histogram_share(adaptive)
    assert share[:, 0].sum() == 1  # every image has probabilities near 0
    assert share[:, -1].sum() == 0
    plots.reliability_diagram(adaptive, ax=Figure().add_subplot())
    chosen = plots._chosen(hard, None)
    assert plots._in_equal_bins(chosen) is chosen


def test_nothing_counted_still_draws(ax):
    nothing = BinStatistics(np.zeros((2, 1, 4), int), np.zeros((2, 1, 4)), np.zeros((2, 1, 4)))
    for draw in (plots.reliability_diagram, plots.bin_counts, plots.reliability_histogram):
        draw(nothing, ax=Figure().add_subplot()).figure.canvas.draw()


def test_loss_curves_leave_out_what_was_not_measured(ax):
    training, validation = plots.loss_curves(HISTORY, ax=ax).lines
    assert training.get_xydata().tolist() == [[1, 0.9], [2, 0.6], [3, 0.5]]
    assert validation.get_xydata().tolist() == [[2, 0.7]]


def test_loss_curves_of_models_keep_their_colours(ax):
    plots.loss_curves({"a": {}, "b": {"val_ace": [0.2, 0.1]}}, metric="ace", ax=ax)
    (line,) = ax.lines
    assert line.get_color() == plots.MODEL_COLORS[1]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["b", "validation"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda stats: plots.reliability_diagram(stats, class_index=1), "there are 1 classes"),
        (lambda stats: plots.bin_counts(stats.sum()), r"must be \[images, classes, bins\]"),
        (lambda stats: plots.loss_curves(HISTORY, metric="dice"), "neither 'train_dice' nor 'val_dice'"),
        (
            lambda stats: plots.paired_cases(np.ones((2, 3)), ["a"]),
            r"row for each of the 1 names; got \(2, 3\)",
        ),
        (lambda stats: plots.reliability_histogram(stats, max_share=0.0), "max_share"),
        (lambda stats: plots.reliability_diagram(stats, band=1.5), "level"),
        (lambda stats: plots.loss_curves({"epoch": [1], "val_loss": [1.0, 2.0]}), "2 values for 1 epochs"),
    ],
)
def test_says_what_is_wrong(call, message, stats):
    with pytest.raises(ValueError, match=message):
        call(stats)
    plt.close("all")


def test_library_and_report_import_nothing_heavy():
    heavy = {"matplotlib", "jinja2", "scipy.stats"}
    code = f"import sys, calib_jax.report; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
