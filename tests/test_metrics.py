"""Dice of label maps."""

import jax
import numpy as np
import pytest

from calib_jax import dice_score

pytestmark = pytest.mark.usefixtures("strict_promotion")

SHAPE = (3, 5, 4, 6)


def label_maps(seed=51, classes=4):
    rng = np.random.default_rng(seed)
    return rng.integers(0, classes, (2, *SHAPE)).astype(np.int32)


def dice_by_hand(predictions, labels, classes):
    """2 |A and B| / (|A| + |B|) from sets of voxels."""
    scores = np.full((predictions.shape[0], classes), np.nan)
    for b, c in np.ndindex(scores.shape):
        a = {tuple(v) for v in np.argwhere(predictions[b] == c)}
        t = {tuple(v) for v in np.argwhere(labels[b] == c)}
        if a or t:
            scores[b, c] = 2 * len(a & t) / (len(a) + len(t))
    return scores


def test_dice_equals_the_formula():
    predictions, labels = label_maps()
    scores = jax.jit(dice_score, static_argnames="num_classes")(predictions, labels, num_classes=4)
    assert scores.shape == (3, 4)
    np.testing.assert_allclose(scores, dice_by_hand(predictions, labels, 4), rtol=1e-6)


def test_a_class_in_neither_map_is_nan_and_in_one_map_is_zero():
    predictions, labels = label_maps(classes=3)
    labels = np.where(labels == 2, 0, labels)
    scores = np.asarray(dice_score(predictions, labels, num_classes=4))
    np.testing.assert_array_equal(scores[:, 2], 0)
    np.testing.assert_array_equal(np.isnan(scores), np.tile([False, False, False, True], (3, 1)))


def test_a_perfect_map_scores_one_and_a_disjoint_one_zero():
    _, labels = label_maps(classes=2)
    np.testing.assert_array_equal(dice_score(labels, labels, num_classes=2), np.ones((3, 2)))
    np.testing.assert_array_equal(dice_score(1 - labels, labels, num_classes=2), np.zeros((3, 2)))


def test_dice_is_symmetric():
    predictions, labels = label_maps()
    one_way = dice_score(predictions, labels, num_classes=4)
    np.testing.assert_array_equal(one_way, dice_score(labels, predictions, num_classes=4))


@pytest.mark.parametrize("dtype", ["uint8", "int64"])
def test_label_maps_of_any_integer(dtype):
    predictions, labels = label_maps()
    expected = dice_score(predictions, labels, num_classes=4)
    scores = dice_score(predictions.astype(dtype), labels.astype(dtype), num_classes=4)
    np.testing.assert_array_equal(scores, expected)
