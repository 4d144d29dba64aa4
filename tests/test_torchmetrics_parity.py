"""The same ECE and MCE as torchmetrics on flattened predictions, and what the debiased error is made of.

torchmetrics bins confidences as [l, r) between the edges i / n, without the reference's eps, and gives 1.0 a bin of
its own; here that is `closed="left"`, for probabilities that do not lie within rounding of an edge.
"""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import calib_jax

torch = pytest.importorskip("torch")
functional = pytest.importorskip("torchmetrics.functional.classification")


def draw(seed, size, classes, num_bins, sharpness):
    """Softmax probabilities with their confidence away from every edge, and labels that follow them loosely."""
    rng = np.random.default_rng(seed)
    logits = (sharpness * rng.standard_normal((4 * size + 64, classes))).astype(np.float32)
    probs = np.asarray(jax.nn.softmax(logits))
    confidence = probs.max(-1) * num_bins
    probs = probs[np.abs(confidence - np.round(confidence)) > 1e-4][:size]
    cumulative = np.cumsum(probs**0.7 / (probs**0.7).sum(-1, keepdims=True), axis=-1)
    labels = (rng.random((len(probs), 1)) > cumulative).sum(-1).clip(0, classes - 1)
    return probs, labels.astype(np.int32)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([1, 7, 100]),
    classes=st.sampled_from([2, 3, 5]),
    num_bins=st.sampled_from([1, 2, 15, 40]),
    sharpness=st.sampled_from([0.3, 2.0, 6.0]),
)
def test_top_label_errors_are_torchmetrics(seed, size, classes, num_bins, sharpness):
    probs, labels = draw(seed, size, classes, num_bins, sharpness)
    stats = calib_jax.top_label_statistics(probs[None], labels[None], num_bins=num_bins, closed="left")
    for norm, error in {
        "l1": calib_jax.expected_calibration_error,
        "max": calib_jax.maximum_calibration_error,
    }.items():
        theirs = functional.multiclass_calibration_error(
            torch.tensor(probs), torch.tensor(labels, dtype=torch.long), classes, n_bins=num_bins, norm=norm
        )
        np.testing.assert_allclose(error(stats)[0, 0], theirs.item(), atol=1e-6)


def test_ece_of_one_class_is_torchmetrics_binary_error():
    probs, labels = draw(5, 5000, 2, 20, 1.5)
    keep = np.abs(probs[:, 1] * 20 - np.round(probs[:, 1] * 20)) > 1e-4
    probs, labels = probs[keep], labels[keep]
    stats = calib_jax.bin_statistics(probs[None], labels[None], closed="left")
    theirs = functional.binary_calibration_error(
        torch.tensor(probs[:, 1]), torch.tensor(labels, dtype=torch.long), n_bins=20, norm="l1"
    )
    np.testing.assert_allclose(calib_jax.expected_calibration_error(stats)[0, 1], theirs.item(), atol=1e-6)
