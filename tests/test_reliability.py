"""Reliability curves and dataset reliability histograms, counted by hand."""

import jax
import numpy as np
import pytest
import twin

from calib_jax import BinStatistics, bin_statistics, reliability_curve, reliability_histogram

pytestmark = pytest.mark.usefixtures("strict_promotion")


def three_images():
    """Three images of two classes in four bins, frequencies chosen, some on bin edges; zeros are empty bins."""
    count = np.int32(
        [
            [[10, 4, 0, 10], [8, 0, 0, 0]],
            [[10, 4, 0, 20], [4, 0, 0, 0]],
            [[10, 0, 8, 0], [0, 0, 0, 0]],
        ]
    )
    label_sum = np.float32(
        [
            [[0, 1, 0, 10], [3, 0, 0, 0]],  # frequencies 0, 0.25, -, 1; 0.375
            [[1, 3, 0, 8], [2, 0, 0, 0]],  # 0.1, 0.75, -, 0.4; 0.5
            [[9, 0, 5, 0], [0, 0, 0, 0]],  # 0.9, -, 0.625, -; nothing
        ]
    )
    centres = np.float32([0.125, 0.375, 0.625, 0.875])
    return BinStatistics(count, count * centres, label_sum)


def test_histogram_by_hand():
    histogram = reliability_histogram(three_images())
    assert histogram.shape == (2, 4, 4)
    first = [  # rows: frequency bins (0, 0.25], ...; columns: probability bins
        [2, 1, 0, 0],
        [0, 0, 0, 1],
        [0, 1, 1, 0],
        [1, 0, 0, 1],
    ]
    second = [[0, 0, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(histogram, [first, second])
    assert np.issubdtype(histogram.dtype, np.integer)


def test_histogram_counts_each_filled_bin_of_each_image_once():
    probs, labels = twin.sample_probs(41, (6, 9, 8, 3)), twin.sample_labels("ids", (6, 9, 8, 3))
    stats = jax.jit(bin_statistics)(probs, labels)
    histogram = jax.jit(reliability_histogram)(stats)
    np.testing.assert_array_equal(histogram.sum(1), (np.asarray(stats.count) > 0).sum(0))
    expected = np.zeros((3, 20, 20), int)
    sums = twin.bin_statistics(probs, labels)
    for b, c, m in zip(*np.nonzero(sums.count), strict=True):
        expected[c, twin.bin_of(sums.label_sum[b, c, m] / sums.count[b, c, m], 20), m] += 1
    np.testing.assert_array_equal(histogram, expected)


def test_histogram_of_calibrated_images_lies_on_the_diagonal():
    probs = ((np.arange(400) + 0.5) / 400).astype(np.float32).reshape(1, 400, 1)
    stats = jax.jit(bin_statistics)(np.repeat(probs, 3, axis=0), np.repeat(probs, 3, axis=0))
    np.testing.assert_array_equal(reliability_histogram(stats)[0], 3 * np.eye(20))


def test_histograms_of_parts_of_a_data_set_add_up():
    stats = three_images()
    parts = [
        BinStatistics(*(x[i : i + 1] for x in (stats.count, stats.prob_sum, stats.label_sum)))
        for i in range(3)
    ]
    np.testing.assert_array_equal(
        sum(reliability_histogram(part) for part in parts), reliability_histogram(stats)
    )


def test_curve_pools_the_voxels_of_all_images():
    curve = reliability_curve(three_images())
    np.testing.assert_array_equal(curve.count, [[30, 8, 8, 30], [12, 0, 0, 0]])
    centres = np.array([0.125, 0.375, 0.625, 0.875])
    nan = np.nan
    np.testing.assert_allclose(curve.mean_prob, [centres, [0.125, nan, nan, nan]], rtol=1e-6)
    np.testing.assert_allclose(
        curve.mean_label, [[10 / 30, 4 / 8, 5 / 8, 18 / 30], [5 / 12, nan, nan, nan]], rtol=1e-6
    )


def test_curve_pools_more_voxels_than_int32_holds():
    """Five hundred volumes of 240 x 240 x 155 in one bin, counted image by image in int32."""
    count = np.full((500, 1, 2), 240 * 240 * 155, np.int32)
    stats = BinStatistics(count, 0.25 * count, 0.5 * count)
    curve = reliability_curve(stats)
    np.testing.assert_array_equal(curve.count, np.full((1, 2), 500 * 240 * 240 * 155))
    np.testing.assert_allclose(curve.mean_prob, [[0.25, 0.25]], rtol=1e-6)
    np.testing.assert_allclose(curve.mean_label, [[0.5, 0.5]], rtol=1e-6)


def test_curve_of_a_device_array_pools_more_voxels_than_int32_holds():
    """The same from `bin_statistics`, whose counts are int32 on the device."""
    count = jax.numpy.full((500, 1, 2), 240 * 240 * 155, jax.numpy.int32)
    total = count.astype(np.float32)
    curve = reliability_curve(BinStatistics(count, 0.25 * total, 0.5 * total))
    np.testing.assert_allclose(curve.mean_prob, [[0.25, 0.25]], rtol=1e-4)
    np.testing.assert_allclose(curve.mean_label, [[0.5, 0.5]], rtol=1e-4)
