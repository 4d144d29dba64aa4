"""The same figures as MONAI's `calibration_binning`: stored ones always, live ones where MONAI is installed.

MONAI's `right=False`, its default, is `torch.bucketize(..., right=False)`: a value on an edge goes to the LOWER
bin, (l, r]. Here that is `closed="right"`, the default; `right=True` is `closed="left"`. MONAI's docstring says
the opposite.
"""

import functools
from pathlib import Path

import jax
import make_golden
import numpy as np
import pytest
import twin
from hypothesis import given, settings
from hypothesis import strategies as st

import calib_jax

pytestmark = pytest.mark.usefixtures("strict_promotion")

CLOSED = {False: "right", True: "left"}  # by MONAI's `right`
STORED = np.load(Path(__file__).parent / "golden" / "monai.npz")
STORED_CASES = sorted({key.split("/")[0] for key in STORED})
ERRORS = {
    "average": calib_jax.average_calibration_error,
    "expected": calib_jax.expected_calibration_error,
    "maximum": calib_jax.maximum_calibration_error,
}


@functools.partial(jax.jit, static_argnames=("num_bins", "closed"))
def ours(probs, labels, num_bins, closed):
    """Bin means, counts, loss and gradient under the names of the stored ones."""
    stats = calib_jax.bin_statistics(probs, labels, num_bins=num_bins, closed=closed)
    loss, gradient = jax.value_and_grad(calib_jax.mL1_ace)(probs, labels, num_bins=num_bins, closed=closed)
    means = {"mean_prob": stats.mean_prob, "mean_label": stats.mean_label}
    return means | {"count": stats.count, "loss": loss, "gradient": gradient}


def assert_agrees(actual, expected):
    np.testing.assert_array_equal(actual["count"], expected["count"])
    for name in ("mean_prob", "mean_label"):
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-6, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(actual["loss"], expected["loss"], atol=1e-6)
    np.testing.assert_allclose(actual["gradient"], expected["gradient"], atol=1e-7)
    assert np.abs(expected["gradient"]).max() > 1e-4


@pytest.mark.parametrize("case", STORED_CASES)
def test_stored_figures_of_monai(case):
    expected = {key.split("/")[1]: STORED[key] for key in STORED if key.startswith(f"{case}/")}
    closed = CLOSED[bool(expected["right"])]
    labels = expected["labels"].astype(np.float32)
    assert_agrees(ours(expected["probs"], labels, int(expected["num_bins"]), closed), expected)


def test_stored_cases_tell_the_two_sides_apart():
    """Values on edges are the same in both cases and counted in different bins."""
    lower, upper = (STORED[f"edges_right_{right}/count"] for right in ("false", "true"))
    np.testing.assert_array_equal(STORED["edges_right_false/probs"], STORED["edges_right_true/probs"])
    assert (lower != upper).any()


@pytest.fixture(scope="module")
def monai_calibration():
    pytest.importorskip("torch")
    return pytest.importorskip("monai.metrics.calibration")


SHAPES = {"2-D": (2, 9, 8, 3), "3-D": (2, 5, 4, 6, 2)}
MAKES = {
    "one_hot": lambda shape: (twin.sample_probs(3, shape), twin.sample_labels("one_hot", shape)),
    "regions": lambda shape: (np.sqrt(twin.sample_probs(4, shape)), twin.sample_labels("regions", shape)),
    "soft": lambda shape: (twin.sample_probs(5, shape), twin.sample_labels("soft", shape)),
}


@pytest.mark.parametrize("right", [False, True], ids=["right=False", "right=True"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", MAKES)
def test_live_figures_of_monai(form, shape, right, monai_calibration):
    probs, labels = MAKES[form](SHAPES[shape])
    expected = make_golden.monai_loss(probs, labels, 20, right)
    assert_agrees(ours(probs, labels, 20, CLOSED[right]), expected)


@pytest.mark.parametrize("right", [False, True], ids=["right=False", "right=True"])
def test_live_values_on_edges_fall_into_the_bins_of_monai(right, monai_calibration):
    probs = make_golden.on_edges(20)
    labels = (np.arange(probs.size) % 2).astype(np.float32).reshape(probs.shape)
    expected = make_golden.monai_loss(probs, labels, 20, right)
    other = make_golden.monai_loss(probs, labels, 20, not right)
    assert (expected["count"] != other["count"]).any()
    assert_agrees(ours(probs, labels, 20, CLOSED[right]), expected)


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("include_background", [True, False])
def test_live_calibration_error_metric(kind, include_background, monai_calibration):
    probs, labels = MAKES["one_hot"](SHAPES["2-D"])
    metric = monai_calibration.CalibrationErrorMetric(
        num_bins=20,
        include_background=include_background,
        calibration_reduction=kind,
        metric_reduction="none",
    )
    import torch

    metric(*(torch.tensor(np.moveaxis(x, -1, 1).copy()) for x in (probs, labels)))
    expected = metric.aggregate().numpy()
    stats = jax.jit(calib_jax.bin_statistics)(probs, labels)
    errors = np.asarray(ERRORS[kind](stats))
    np.testing.assert_allclose(errors if include_background else errors[:, 1:], expected, atol=1e-6)
    name = {"average": "ace", "expected": "ece", "maximum": "mce"}[kind]
    np.testing.assert_allclose(twin.errors(twin.bin_statistics(probs, labels), name), errors, atol=1e-6)


def test_stored_figures_are_what_monai_says_today(monai_calibration):
    for case, (probs, labels, num_bins, right) in make_golden.inputs().items():
        np.testing.assert_array_equal(STORED[f"{case}/probs"], probs)
        for name, value in make_golden.monai_loss(probs, labels, num_bins, right).items():
            np.testing.assert_allclose(STORED[f"{case}/{name}"], value, rtol=1e-6, atol=1e-7, err_msg=name)


KINDS = ("uniform", "confident", "edges", "ends", "constant")


def adversarial(seed, kind, shape, num_bins):
    """Probabilities of one kind, and overlapping labels that follow them loosely."""
    rng = np.random.default_rng(seed)
    probs = {
        "uniform": lambda: rng.random(shape),
        "confident": lambda: rng.beta(0.05, 0.05, shape),
        "edges": lambda: rng.choice(make_golden.on_edges(num_bins).ravel(), shape),
        "ends": lambda: rng.choice([0.0, 1e-45, 1e-8, 2.0**-24, 1 - 2.0**-24, 1.0], shape),
        "constant": lambda: np.full(shape, rng.random()),
    }[kind]()
    probs = probs.astype(np.float32)
    return probs, (rng.random(shape) < 0.2 + 0.6 * probs).astype(np.float32)


@settings(max_examples=1500, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(KINDS),
    num_bins=st.sampled_from([1, 2, 10, 20, 33]),
    right=st.booleans(),
)
def test_any_case_is_binned_as_by_monai(seed, kind, num_bins, right, monai_calibration):
    """Counts equal and means within 1e-6, whatever the probabilities."""
    import torch

    probs, labels = adversarial(seed, kind, (2, 6, 5, 2), num_bins)
    channel_first = (torch.tensor(np.moveaxis(x, -1, 1).copy()) for x in (probs, labels))
    theirs = monai_calibration.calibration_binning(*channel_first, num_bins=num_bins, right=right)
    stats = statistics_of(num_bins, CLOSED[right])(probs, labels)
    mean_prob, mean_label, count = (np.asarray(x) for x in theirs)
    np.testing.assert_array_equal(stats.count, count)
    np.testing.assert_allclose(stats.mean_prob, np.where(count > 0, mean_prob, np.nan), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(
        stats.mean_label, np.where(count > 0, mean_label, np.nan), rtol=1e-6, atol=1e-7
    )


@functools.cache
def statistics_of(num_bins, closed):
    return jax.jit(functools.partial(calib_jax.bin_statistics, num_bins=num_bins, closed=closed))
