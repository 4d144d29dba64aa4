"""What a report measures of a case, beside the library's functions and a slow twin."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import twin
from stand_in import noisy_case

import calib_jax
from calib_jax._sums.bins import Bins
from calib_jax._sums.host import inner_edges, sums_in_bins
from calib_jax.predictions import Case
from calib_jax.report import measure as measuring
from calib_jax.report.findings import over_confidence
from calib_jax.report.measure import CaseFigures, measure, near_border
from calib_jax.report.sweeping import ERRORS, KINDS, sweep_case

BINNINGS = ("hard", "adaptive", "soft")


def edge_probs(num_bins):
    """Probabilities of one class at each edge and beside it."""
    edges = calib_jax.bin_edges(num_bins)
    beside = [np.nextafter(edges, np.float32(side), dtype=np.float32) for side in (-1, 2)]
    return np.clip(np.concatenate([edges, *beside]), 0, 1).astype(np.float32)


def host_statistics(probs, labels, bins):
    """`[3, bins]` of one class."""
    inner = inner_edges(probs, bins)
    return sums_in_bins(probs, labels, inner, bins)


class TestSumsInBins:
    @pytest.mark.parametrize("num_bins", [1, 2, 3, 10, 15, 20, 33, 100])
    def test_edges_fall_into_the_bins_of_the_library_and_of_the_twin(self, num_bins):
        probs = edge_probs(num_bins)
        labels = np.arange(probs.size) % 3 == 0
        count, prob_sum, label_sum = host_statistics(probs, labels, Bins("hard", num_bins))
        slow = twin.bin_statistics(probs[None, :, None], labels[None, :, None], num_bins)
        np.testing.assert_array_equal(count, slow.count[0, 0])
        np.testing.assert_allclose(prob_sum, slow.prob_sum[0, 0], rtol=1e-12)
        np.testing.assert_array_equal(label_sum, slow.label_sum[0, 0])
        ours = calib_jax.bin_statistics(
            probs[None, :, None], labels[None, :, None].astype(np.float32), num_bins=num_bins
        )
        np.testing.assert_array_equal(count, ours.count[0, 0])
        np.testing.assert_array_equal(label_sum, ours.label_sum[0, 0])

    @pytest.mark.parametrize("binning", BINNINGS)
    def test_equals_the_library(self, binning):
        rng = np.random.default_rng(0)
        probs = np.concatenate([rng.beta(0.2, 0.2, 900), np.zeros(50), np.ones(50)]).astype(np.float32)
        labels = rng.random(1000) < probs
        ours = calib_jax.bin_statistics(
            probs[None, :, None], labels[None, :, None].astype(np.float32), binning=binning
        )
        found = host_statistics(probs, labels, Bins(binning, 20))
        tolerance = {"rtol": 1e-6, "atol": 1e-5}
        np.testing.assert_allclose(found[0], ours.count[0, 0], **tolerance)
        np.testing.assert_allclose(found[1], ours.prob_sum[0, 0], **tolerance)
        np.testing.assert_allclose(found[2], ours.label_sum[0, 0], **tolerance)


def with_strides(case, order):
    """The same case with another memory order."""
    probs = {
        "class first": lambda x: np.moveaxis(np.ascontiguousarray(np.moveaxis(x, -1, 0)), 0, -1),
        "Fortran": np.asfortranarray,
        "reversed": lambda x: np.ascontiguousarray(x[::-1])[::-1],
        "C": lambda x: x,
    }[order](case.probs)
    return dataclasses.replace(case, probs=probs)


class TestMeasure:
    @pytest.mark.parametrize("order", ["C", "class first", "Fortran", "reversed"])
    def test_equals_the_library(self, order, monkeypatch):
        monkeypatch.setattr(measuring, "CHUNK", 300)
        case = with_strides(noisy_case(), order)
        found = measure(case, Bins("hard", 20))
        probs, labels = case.probs[None], case.labels[None]
        stats = calib_jax.bin_statistics(probs, labels)
        np.testing.assert_array_equal(found.bins[0], stats.count[0])
        np.testing.assert_allclose(found.bins[1:], [stats.prob_sum[0], stats.label_sum[0]], rtol=1e-6)
        dice = calib_jax.dice_score(case.probs.argmax(-1)[None], labels, num_classes=3)
        np.testing.assert_allclose(found.dice(), dice[0], rtol=1e-6)
        np.testing.assert_allclose(found.brier(), calib_jax.brier_score(probs, labels)[0], rtol=1e-6)
        nll = calib_jax.negative_log_likelihood(jnp.log(probs), labels)
        np.testing.assert_allclose(found.mean_nll(), [nll[0]] * 3, rtol=1e-6)

    def test_a_label_map_beside_the_probabilities_is_the_prediction(self):
        case = noisy_case()
        given = np.roll(case.labels, 1, axis=0)
        found = measure(dataclasses.replace(case, predicted=given.astype(np.uint8)), Bins("hard", 20))
        dice = calib_jax.dice_score(given[None], case.labels[None], num_classes=3)
        np.testing.assert_allclose(found.dice(), dice[0], rtol=1e-6)
        np.testing.assert_array_equal(found.bins, measure(case, Bins("hard", 20)).bins)

    def test_likelihood_of_certain_voxels_right_and_wrong(self):
        probs = np.eye(3, dtype=np.float32)[[0, 0, 1, 2, 2, 1]]
        probs[5] = 0.25, 0.75, 0
        labels = np.array([0, 1, 1, 2, -1, 1], np.int32)
        case = Case("a", "m", probs[None], labels[None], None, None, (1.0, 1.0))
        found = measure(case, Bins("hard", 20))
        tiny = np.finfo(np.float32).tiny
        np.testing.assert_allclose(found.nll, -np.log(tiny) - np.log(0.75))
        assert found.labelled == 5

    def test_more_classes_than_a_byte_counts(self):
        rng = np.random.default_rng(0)
        probs = rng.dirichlet(np.ones(200), (20, 20)).astype(np.float32)
        labels = rng.integers(0, 200, (20, 20)).astype(np.int32)
        found = measure(Case("a", "m", probs, labels, None, None, (1.0, 1.0)), Bins("hard", 20))
        np.testing.assert_array_equal(found.true, np.bincount(labels.ravel(), minlength=200))
        nll = calib_jax.negative_log_likelihood(jnp.log(probs[None]), labels[None])
        np.testing.assert_allclose(found.mean_nll()[0], nll[0], rtol=1e-6)

    def test_ignored_voxels_do_not_count(self):
        case = noisy_case()
        where = np.random.default_rng(1).random(case.labels.shape) < 0.6
        labels = np.where(where, case.labels, -1)
        found = measure(dataclasses.replace(case, labels=labels, where=where), Bins("hard", 20))
        stats = calib_jax.bin_statistics(case.probs[None], case.labels[None], where=where[None])
        np.testing.assert_array_equal(found.bins[0], stats.count[0])
        assert found.voxels == where.sum() == found.labelled
        nll = calib_jax.negative_log_likelihood(
            jnp.log(case.probs[None]), case.labels[None], where=where[None]
        )
        np.testing.assert_allclose(found.mean_nll()[0], nll[0], rtol=1e-6)
        assert len(found.sample.labels) <= where.sum()
        assert found.sample.weight.sum() == pytest.approx(where.sum())

    def test_regions_that_overlap(self):
        rng = np.random.default_rng(0)
        probs = rng.random((6, 5, 4, 2)).astype(np.float32)
        labels = rng.random((6, 5, 4, 2)) < probs
        found = measure(Case("a", "m", probs, labels, None, None, (1.0, 1.0, 1.0)), Bins("hard", 20))
        stats = calib_jax.bin_statistics(probs[None], labels[None].astype(np.float32))
        np.testing.assert_array_equal(found.bins[0], stats.count[0])
        chosen = probs > 0.5
        dice = 2 * (chosen & labels).sum((0, 1, 2)) / (chosen.sum((0, 1, 2)) + labels.sum((0, 1, 2)))
        np.testing.assert_allclose(found.dice(), dice)
        right = np.where(labels, probs, 1 - probs.astype(float))
        np.testing.assert_allclose(found.mean_nll(), -np.log(right).mean((0, 1, 2)), rtol=1e-6)

    def test_expected_dice_and_volumes_by_hand(self):
        probs = np.array([[[0.25, 0.75], [0.75, 0.25]], [[0.0, 1.0], [1.0, 0.0]]], np.float32)
        labels = np.array([[1, 1], [1, 0]], np.int32)
        found = measure(Case("a", "m", probs, labels, None, None, (2.0, 3.0)), Bins("hard", 20))
        assert found.expected_dice()[1] == pytest.approx(2 * 1.75 / (2 + 2))
        assert (found.predicted[1], found.true[1], found.prob_total[1]) == (2, 3, pytest.approx(2.0))
        assert found.voxel_ml == pytest.approx(0.006)

    def test_a_class_that_is_nowhere_has_no_dice(self):
        probs = np.zeros((4, 4, 3), np.float32)
        probs[..., 0] = 1
        found = measure(
            Case("a", "m", probs, np.zeros((4, 4), np.int32), None, None, (1.0, 1.0)), Bins("hard", 20)
        )
        np.testing.assert_array_equal(np.isnan(found.dice()), [False, True, True])
        assert found.mean_nll()[0] == 0

    def test_says_what_it_needs(self):
        case = noisy_case()
        with pytest.raises(ValueError, match="case: there is no label"):
            measure(dataclasses.replace(case, labels=None), Bins("hard", 20))
        with pytest.raises(ValueError, match="every voxel has the ignore label"):
            measure(dataclasses.replace(case, where=np.zeros(case.labels.shape, bool)), Bins("hard", 20))

    def test_file_there_and_back(self, tmp_path):
        figures = measure(noisy_case(image=True), Bins("hard", 20))
        figures.save(tmp_path / "a" / "b.npz", "key")
        again = CaseFigures.load(tmp_path / "a" / "b.npz", "key")
        assert again is not None
        for name in ("bins", "boundary_bins", "squared_error", "nll", "overlap", "prob_inside"):
            np.testing.assert_array_equal(getattr(again, name), getattr(figures, name))
        assert (again.name, again.voxels, again.voxel_ml) == (figures.name, figures.voxels, figures.voxel_ml)
        np.testing.assert_array_equal(again.sample.probs, figures.sample.probs)
        assert again.slice is not None
        np.testing.assert_array_equal(again.slice.image, figures.slice.image)
        assert CaseFigures.load(tmp_path / "a" / "b.npz", "other") is None
        (tmp_path / "a" / "b.npz").write_bytes(b"PK\x03\x04 broken")
        assert CaseFigures.load(tmp_path / "a" / "b.npz", "key") is None


class TestNearBorder:
    def test_equals_a_distance_in_steps(self):
        labels = np.random.default_rng(0).integers(0, 2, (9, 8, 7)) * (np.arange(7) > 3)
        near = near_border(labels)
        # One step from the border and a second one, by brute force.
        padded = np.pad(labels, 1, mode="edge")
        touches = np.zeros(labels.shape, bool)
        for axis in range(3):
            for shift in (-1, 1):
                touches |= np.roll(padded, shift, axis)[1:-1, 1:-1, 1:-1] != labels
        reached = np.pad(touches, 1)
        expected = touches.copy()
        for axis in range(3):
            for shift in (-1, 1):
                expected |= np.roll(reached, shift, axis)[1:-1, 1:-1, 1:-1]
        np.testing.assert_array_equal(near, expected)

    def test_thick_slices_are_not_neighbours(self):
        labels = np.zeros((5, 5, 3), np.int32)
        labels[..., 2] = 1
        assert near_border(labels).any()
        assert not near_border(labels, spacing=(1.0, 1.0, 10.0)).any()

    def test_ignored_voxels_have_no_border(self):
        labels = np.array([0, 0, 0, -1, -1])
        assert not near_border(labels, labels >= 0).any()


def test_over_confidence_has_a_sign():
    count = np.full((1, 1, 2), 10)
    for prob, frequency, sign in ((0.9, 0.7, 1), (0.7, 0.9, -1)):
        both = np.array([1 - prob, prob]), np.array([1 - frequency, frequency])
        stats = calib_jax.BinStatistics(count, count * both[0], count * both[1])
        assert over_confidence(stats).item() == pytest.approx(sign * 0.2)


@pytest.mark.parametrize("masked", [False, True])
def test_sweep_equals_the_library(masked):
    case = noisy_case()
    where = np.random.default_rng(2).random(case.labels.shape) < 0.7 if masked else None
    numbers = (5, 20)
    found = sweep_case(dataclasses.replace(case, where=where), numbers)
    functions = {
        "ACE": calib_jax.average_calibration_error,
        "ECE": calib_jax.expected_calibration_error,
        "MCE": calib_jax.maximum_calibration_error,
    }
    for (i, kind), (j, number) in ((x, y) for x in enumerate(KINDS) for y in enumerate(numbers)):
        stats = calib_jax.bin_statistics(
            case.probs[None],
            case.labels[None],
            num_bins=number,
            binning=kind,
            where=None if where is None else where[None],
        )
        for k, name in enumerate(ERRORS):
            np.testing.assert_allclose(found[i, j, k], functions[name](stats)[0], rtol=1e-4, atol=1e-6)
