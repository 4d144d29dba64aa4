"""The phantom's promise: labels are drawn from exactly the posterior that the case carries."""

import numpy as np
import pytest

from train.data.open import open_dataset
from train.data.phantom import PhantomDataset, draw_label, nested_depths, ordinal_posterior, smooth_field

SHAPES = [(32, 32, 32), (48, 40), (20, 24, 28)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_case_is_what_the_contract_says(shape):
    dataset = PhantomDataset(spatial_shape=shape, num_cases=3, seed=1)
    case = dataset.load(2)
    assert case.image.shape == (*shape, dataset.num_channels)
    assert case.image.dtype == np.float32
    assert case.label.shape == shape
    assert case.label.dtype == np.uint8
    assert case.posterior.shape == (*shape, len(dataset.class_names))
    assert case.name == dataset.case_names[2] == "phantom_0002"
    np.testing.assert_array_equal(case.affine, np.eye(4))
    np.testing.assert_allclose(case.image.mean(axis=tuple(range(len(shape)))), 0, atol=1e-5)
    np.testing.assert_allclose(case.image.std(axis=tuple(range(len(shape)))), 1, atol=1e-5)


def test_cases_are_a_function_of_seed_and_index():
    first, again, other_seed = (PhantomDataset(seed=seed).load(5) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.label, again.label)
    np.testing.assert_array_equal(first.posterior, again.posterior)
    assert not np.array_equal(first.label, other_seed.label)
    assert not np.array_equal(first.label, PhantomDataset(seed=3).load(6).label)


def test_the_posterior_is_a_distribution():
    for index in range(5):
        posterior = PhantomDataset().load(index).posterior
        assert posterior.min() >= 0
        np.testing.assert_allclose(posterior.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("name", ["phantom", "phantom2d"])
def test_every_class_occurs_in_every_case(name):
    dataset = open_dataset(name)
    for index in range(20):
        assert set(np.unique(dataset.load(index).label)) == {0, 1, 2, 3}


def test_the_smooth_field_is_standard_normal_at_every_voxel():
    rng = np.random.default_rng(0)
    fields = np.stack([smooth_field(rng, (9, 12), 3.0) for _ in range(4000)])
    np.testing.assert_allclose(fields.mean(0), 0, atol=5 / np.sqrt(4000))
    np.testing.assert_allclose(fields.std(0), 1, atol=0.06)
    neighbours = (fields[:, 1:] * fields[:, :-1]).mean(0)
    assert neighbours.min() > 0.9, "the field must be smooth"


def test_many_annotators_of_one_case_agree_with_its_posterior_at_every_voxel():
    rng = np.random.default_rng(0)
    z = nested_depths(rng, (16, 16)) / 1.5
    draws = np.stack([draw_label(rng, z) for _ in range(4000)])
    frequency = np.stack([(draws == k).mean(0) for k in range(4)], axis=-1)
    np.testing.assert_allclose(frequency, ordinal_posterior(z), atol=5 * 0.5 / np.sqrt(4000))


def test_over_many_cases_the_posterior_is_calibrated():
    """Among voxels given probability p of class k, a fraction p has class k, in each of ten bins."""
    count, gap = np.zeros((4, 10)), np.zeros((4, 10))
    dataset = PhantomDataset(spatial_shape=(24, 24), num_cases=600)
    for index in range(len(dataset)):
        case = dataset.load(index)
        for k in range(4):
            probability = case.posterior[..., k].ravel().astype(np.float64)
            bins = np.minimum((probability * 10).astype(int), 9)
            count[k] += np.bincount(bins, minlength=10)
            gap[k] += np.bincount(bins, (case.label.ravel() == k) - probability, minlength=10)
    assert count.min() > 1000
    assert np.abs(gap / count).max() < 0.03


def test_the_best_possible_segmentation_is_good_but_not_perfect():
    dataset, dice = PhantomDataset(), []
    for index in range(20):
        case = dataset.load(index)
        best = case.posterior.argmax(-1)
        for k in (1, 2, 3):
            overlap = ((best == k) & (case.label == k)).sum()
            dice.append(2 * overlap / ((best == k).sum() + (case.label == k).sum()))
    assert 0.75 < np.mean(dice) < 0.92
