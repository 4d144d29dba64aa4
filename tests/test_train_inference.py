"""Whole volumes: one window or many give the probabilities of a network that sees each voxel by itself."""

import numpy as np
import pytest

from train.inference import predict_volume


def voxelwise(images: np.ndarray) -> np.ndarray:
    """A network whose output depends on no neighbour, so that windows cannot matter."""
    scores = np.concatenate([np.zeros_like(images), images], -1)
    return np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)


@pytest.mark.parametrize("shape", [(5, 6, 7), (8, 8, 8), (8, 20, 13), (31, 9, 8)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_windows_do_not_show(shape: tuple[int, ...], overlap: float) -> None:
    image = np.random.default_rng(0).normal(size=(*shape, 1)).astype(np.float32)
    probs = predict_volume(voxelwise, image, (8, 8, 8), overlap=overlap)
    np.testing.assert_allclose(probs, voxelwise(image), atol=1e-6)


def test_every_call_has_the_same_shape() -> None:
    """So the network is compiled once, whatever the number of windows."""
    seen = set()

    def predict(images: np.ndarray) -> np.ndarray:
        seen.add(images.shape)
        return voxelwise(images)

    for length in (20, 27, 33):
        predict_volume(predict, np.zeros((length, 9, 1), np.float32), (8, 8))
    assert seen == {(4, 8, 8, 1)}


def test_the_middle_of_a_window_weighs_more_than_its_rim() -> None:
    """Where two windows overlap, the one whose centre is nearer decides."""
    calls = iter(range(4))

    def by_window(images: np.ndarray) -> np.ndarray:
        del images
        return np.stack([np.full((16, 1), float(i)) for i in range(4)]) + next(calls)

    probs = predict_volume(by_window, np.zeros((24, 1), np.float32), (16,))[:, 0]
    assert probs[0] == 0
    assert probs[-1] == 1
    assert np.all(np.diff(probs) >= 0)
    assert probs[9] < 0.5 < probs[14]
