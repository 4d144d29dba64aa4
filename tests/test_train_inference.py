"""Whole volumes: windows as in a plain loop over them, statistics that never leave the device, few programs."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import export
from networks import make_unet

import calib_jax
from train.data.geometry import Geometry
from train.data.phantom import PhantomDataset
from train.data.transforms import crop_back, pad_to_hold
from train.errors import InputError
from train.evaluate import CaseStatistics, SumsOfClasses, case_statistics, evaluate
from train.inference import (
    VolumePredictor,
    add_windows,
    cut_windows,
    ensemble,
    in_a_row,
    inside,
    jitted,
    plan_windows,
    volume_predictor,
    weighted_mean,
)
from train.sharding import device_mesh, whole_on
from train.step import TrainState, init_state

SHAPES = [(5, 6, 7), (8, 8, 8), (8, 20, 13), (31, 9, 8), (3, 19, 30)]


def voxelwise(scale: Any, images: jax.Array) -> jax.Array:
    """A network whose output depends on no neighbour, so that windows cannot matter."""
    return jax.nn.softmax(jnp.concatenate([jnp.zeros_like(images), scale * images], -1))


def by_place(scale: Any, images: jax.Array) -> jax.Array:
    """One of three classes whose output depends on where in its window a voxel lies."""
    place = jnp.broadcast_to(jnp.linspace(-1, 1, images[0].size).reshape(1, *images.shape[1:]), images.shape)
    return jax.nn.softmax(jnp.concatenate([scale * images, place, scale * images * place], -1))


def twin(forward: Any, image: np.ndarray, patch: tuple[int, ...], overlap: float) -> np.ndarray:
    """The sliding window on the host, one window at a time, in float64."""
    padded = pad_to_hold(image, patch)
    axes = []
    for length, size in zip(padded.shape, patch, strict=False):
        most = max(int(size * (1 - overlap)), 1)
        count = int(np.ceil((length - size) / most)) + 1
        axes.append(np.linspace(0, length - size, count).round().astype(int))
    grid = np.meshgrid(*[(np.arange(n) - (n - 1) / 2) / (n / 8) for n in patch], indexing="ij")
    weight = np.maximum(np.exp(-sum(offset**2 for offset in grid) / 2), 1e-3)[..., None]
    total = norm = 0
    for corner in itertools.product(*axes):
        window = tuple(slice(c, c + n) for c, n in zip(corner, patch, strict=True))
        probs = np.asarray(forward(1.0, padded[window][None])[0], np.float64)
        part = np.zeros((*padded.shape[:-1], probs.shape[-1] + 1))
        part[window] = np.concatenate([weight * probs, weight], -1)
        total, norm = total + part[..., :-1], norm + part[..., -1:]
    return crop_back(total / norm, image.shape[:-1])


def volume(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(*shape, 1)).astype(np.float32)


def labels(shape: tuple[int, ...], classes: int = 3) -> np.ndarray:
    return np.random.default_rng(1).integers(0, classes, shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("overlap", "windows"), [(0.0, 4), (0.25, 1), (0.5, 3)])
def test_equal_to_a_loop_over_windows(shape: tuple[int, ...], overlap: float, windows: int) -> None:
    image = volume(shape)
    predict = VolumePredictor(by_place, 1.0, (8, 8, 8), overlap, windows)
    np.testing.assert_allclose(predict(image), twin(by_place, image, (8, 8, 8), overlap), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("windows", [1, 3])
def test_devices_share_the_windows(shape: tuple[int, ...], windows: int) -> None:
    """The numbers are those of one device; no device sees more windows than its share."""
    seen = []

    def network(scale: Any, images: jax.Array) -> jax.Array:
        seen.append(len(images))
        return by_place(scale, images)

    mesh = device_mesh()
    weights = whole_on(mesh, jnp.float32(1))
    predict = VolumePredictor(network, weights, (8, 8, 8), 0.5, windows, mesh)
    image = volume(shape)
    np.testing.assert_allclose(predict(image), twin(by_place, image, (8, 8, 8), 0.5), atol=1e-6)
    plan = predict.plan(shape)
    assert seen == [max(plan.counted.shape[1] // mesh.size, 1)] <= [windows]


@pytest.mark.parametrize("shape", [(24,), (17, 40)])
def test_volumes_of_other_ranks(shape: tuple[int, ...]) -> None:
    image, patch = volume(shape), (16,) * len(shape)
    expected = twin(by_place, image, patch, 0.5)
    np.testing.assert_allclose(VolumePredictor(by_place, 1.0, patch)(image), expected, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_windows_do_not_show(shape: tuple[int, ...]) -> None:
    image = volume(shape)
    probs = VolumePredictor(voxelwise, 1.0, (8, 8, 8))(image)
    np.testing.assert_allclose(probs, voxelwise(1.0, jnp.asarray(image)), atol=1e-6)


def test_one_window_is_what_the_network_says() -> None:
    image = volume((8, 8))
    expected = jax.jit(by_place)(1.0, image[None])[0]
    np.testing.assert_array_equal(VolumePredictor(by_place, 1.0, (8, 8))(image), expected)


def test_the_middle_of_a_window_weighs_more_than_its_rim() -> None:
    """Where two windows overlap, the one whose centre is nearer decides."""

    def second_window(weights: Any, images: jax.Array) -> jax.Array:
        del weights
        second = jnp.broadcast_to(images[:, :1] > 0, images.shape).astype(jnp.float32)
        return jnp.concatenate([1 - second, second], -1)

    place = np.arange(24, dtype=np.float32)[:, None]
    probs = VolumePredictor(second_window, None, (16,))(place)[:, 1]
    assert probs[0] == 0
    assert probs[-1] == 1
    assert np.all(np.diff(probs) > -1e-6)
    assert probs[9] < 0.5 < probs[14]


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.4, 0.5, 0.9])
def test_plan_covers_every_volume_and_nothing_else(overlap: float) -> None:
    counts: dict[tuple[int, ...], set[int]] = {}
    for length in range(1, 60):
        plan = plan_windows((length,), (8,), overlap, 4)
        starts = plan.corners[plan.counted][:, 0]
        seen = np.zeros(plan.canvas[0], bool)
        for start in starts:
            seen[start : start + 8] = True
        np.testing.assert_array_equal(crop_back(seen, (max(length, 8),)), True)
        assert seen.sum() == max(length, 8)
        assert max(length, 8) <= plan.canvas[0] <= max(length, 8) + 4
        assert np.all(np.diff(starts) <= max(int(8 * (1 - overlap)), 1))
        counts.setdefault(plan.canvas, set()).add(len(starts))
    assert all(len(numbers) == 1 for numbers in counts.values())


@pytest.mark.parametrize(
    ("windows", "devices", "groups"),
    [
        *[(1, 1, (1, 1)), (5, 1, (2, 3)), (8, 1, (2, 4)), (9, 1, (3, 3)), (7, 1, (2, 4))],
        *[(1, 8, (1, 1)), (2, 8, (1, 8)), (30, 8, (1, 32)), (33, 8, (2, 24)), (40, 8, (2, 24))],
    ],
)
def test_few_places_are_filled_up(windows: int, devices: int, groups: tuple[int, int]) -> None:
    plan = plan_windows((4 + 4 * windows,), (8,), 0.5, 4, devices)
    assert plan.counted.shape == groups
    assert plan.counted.sum() == windows


def test_programs_are_shared() -> None:
    """A summary is traced once for each filled size, a network once for each number of windows in a group."""
    traced, seen = [], []

    def count(probs: jax.Array, label: jax.Array, where: jax.Array) -> jax.Array:
        del label
        traced.append(probs.shape)
        return where.sum()

    def network(scale: Any, images: jax.Array) -> jax.Array:
        seen.append(images.shape)
        return voxelwise(scale, images)

    for scale, shape in enumerate([(17, 9), (18, 10), (18, 9), (17, 10), (3, 5), (8, 8), (31, 8), (99, 61)]):
        predict = VolumePredictor(network, float(scale), (8, 8))
        assert predict.summary(count, volume(shape), labels(shape)) == np.prod(shape)
    assert traced == [(4096, 2), (8192, 2)]
    assert seen == [(4, 8, 8, 1), (1, 8, 8, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_are_those_of_the_returned_probabilities(shape: tuple[int, ...]) -> None:
    image, label = volume(shape), labels(shape)
    predict = VolumePredictor(by_place, 3.0, (8, 8, 8))
    probs = predict(image)
    stats, dice = predict.summary(CaseStatistics(), image, label)
    for expected_stats, expected_dice in (case_statistics(probs, label), plain_statistics(probs, label)):
        np.testing.assert_array_equal(stats.count, expected_stats.count)
        np.testing.assert_array_equal(stats.label_sum, expected_stats.label_sum)
        np.testing.assert_allclose(stats.prob_sum, expected_stats.prob_sum, rtol=1e-6)
        np.testing.assert_allclose(dice, expected_dice, rtol=1e-6)
    np.testing.assert_array_equal(stats.count.sum(-1), label.size)


def plain_statistics(probs: np.ndarray, label: np.ndarray) -> tuple[calib_jax.BinStatistics, jax.Array]:
    """By the library's functions for images, without padding."""
    stats = calib_jax.bin_statistics(probs[None, ..., 1:], label[None].astype(np.int32) - 1)
    dice = calib_jax.dice_score(probs[None].argmax(-1), label[None], num_classes=probs.shape[-1])
    return jax.tree.map(lambda a: a[0], stats), dice[0, 1:]


@pytest.mark.parametrize("dense", [False, True])
def test_regions_are_sums_of_classes(dense: bool) -> None:
    """As BraTS has them; the first is made of two classes, the second of one."""

    def regions(probs: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
        if dense:
            return SumsOfClasses(((1, 2), (2,)))(probs, label)
        return (probs[..., 1] + probs[..., 2])[..., None], jnp.where(label >= 1, 0, -1)

    image, label = volume((12, 9)), labels((12, 9))
    predict = VolumePredictor(by_place, 3.0, (8, 8))
    probs = predict(image)
    stats, dice = predict.summary(CaseStatistics(regions), image, label)
    members = [((1, 2), probs[..., 1] + probs[..., 2]), ((2,), probs[..., 2])]
    for i, (ids, region_probs) in enumerate(members[: 2 if dense else 1]):
        true, predicted = np.isin(label, ids), np.isin(probs.argmax(-1), ids)
        expected = calib_jax.bin_statistics(region_probs[None, ..., None], 1 - true[None].astype(np.int32))
        np.testing.assert_array_equal(stats.count[i], expected.count[0, 0])
        np.testing.assert_array_equal(stats.label_sum[i], expected.label_sum[0, 0])
        np.testing.assert_allclose(stats.prob_sum[i], expected.prob_sum[0, 0], rtol=1e-6)
        overlap = 2 * (true & predicted).sum() / (true.sum() + predicted.sum())
        np.testing.assert_allclose(dice[i], overlap, rtol=1e-6)


class Sigmoids:
    """A network of two overlapping regions whose output depends on the place in its window."""

    regions = ("inside", "organ")

    def __call__(self, scale: Any, images: jax.Array) -> jax.Array:
        images = images[..., :1]
        place = jnp.linspace(-1, 1, images[0].size).reshape(1, *images.shape[1:])
        return jax.nn.sigmoid(jnp.concatenate([scale * images, 2 + images * place], -1))


@pytest.mark.parametrize("shape", SHAPES)
def test_sigmoids_are_averaged_like_any_numbers(shape: tuple[int, ...]) -> None:
    """Not as shares of a whole: where windows agree nothing changes, and nothing exceeds 1."""
    image, forward = volume(shape), Sigmoids()
    probs = VolumePredictor(forward, 1.0, (8, 8, 8))(image)
    np.testing.assert_allclose(probs, twin(forward, image, (8, 8, 8), 0.5), atol=1e-6)
    sure = VolumePredictor(Sigmoids(), 1e6, (8, 8, 8))(np.abs(image))
    np.testing.assert_allclose(sure[..., 0], 1, atol=1e-6)
    assert sure.max() <= 1


def test_evaluation_of_sigmoids() -> None:
    """By the regions that the network has, in its order, each predicted where it is more probable than not."""

    class WithRegions(PhantomDataset):
        regions = {"organ": (1, 2, 3), "unseen": (1,), "inside": (2, 3)}  # noqa: RUF012

    dataset = WithRegions(spatial_shape=(24, 24), num_cases=2)
    predict = VolumePredictor(Sigmoids(), 1.0, (16, 16))
    result = evaluate("sigmoids", predict, dataset, dataset.case_names)
    assert result.class_names == ("inside", "organ")
    for i, case in enumerate(map(dataset.load, range(2))):
        probs = predict(case.image)
        for j, ids in enumerate([(2, 3), (1, 2, 3)]):
            true, predicted = np.isin(case.label, ids), probs[..., j] > 0.5
            expected = calib_jax.bin_statistics(probs[None, ..., j : j + 1], true[None, ..., None])
            np.testing.assert_array_equal(result.stats.count[i, j], expected.count[0, 0])
            np.testing.assert_array_equal(result.stats.label_sum[i, j], expected.label_sum[0, 0])
            overlap = 2 * (true & predicted).sum() / (true.sum() + predicted.sum())
            np.testing.assert_allclose(result.dice[i, j], overlap, rtol=1e-6)


def test_cropped_voxels_are_of_no_region() -> None:
    image = np.zeros((6, 7, 8, 1), np.float32)
    image[2:4, 2:5, 3:6] = 1
    placement = Geometry(crop_margin=0).place(image, np.eye(4))
    whole = placement.back(np.full((2, 3, 3, 2), 0.7, np.float32), background=False)
    np.testing.assert_array_equal(
        whole, np.broadcast_to(np.where(image == 1, np.float32(0.7), 0), whole.shape)
    )


def test_evaluation_of_a_data_set_by_regions() -> None:
    class WithRegions(PhantomDataset):
        regions = {"organ": (1, 2, 3), "inside": (2, 3)}  # noqa: RUF012

    dataset = WithRegions(spatial_shape=(24, 24), num_cases=3)
    predict = VolumePredictor(voxelwise, 1.0, (16, 16))
    cases = dataset.case_names[::2]
    result = evaluate("voxelwise", predict, dataset, cases)
    assert result.class_names == ("organ", "inside")
    assert result.stats.count.shape == (2, 2, 20)
    np.testing.assert_array_equal(result.stats.count.sum(-1), 24 * 24)
    np.testing.assert_array_equal(
        result.stats.label_sum.sum(2),
        [[(dataset.load(i).label > inner).sum() for inner in (0, 1)] for i in (0, 2)],
    )


def test_statistics_stay_small() -> None:
    """Few numbers leave the device. Temporaries take at most 1.6 times the memory of the probabilities."""
    probs = jax.ShapeDtypeStruct((2**22, 3), jnp.float32)
    label, where = (jax.ShapeDtypeStruct(probs.shape[:1], dtype) for dtype in (jnp.uint8, bool))
    lowered = jitted(CaseStatistics()).lower(probs, label, where)
    assert max(np.prod(leaf.shape) for leaf in jax.tree.leaves(lowered.out_info)) == 2 * 20
    memory = lowered.compile().memory_analysis()
    assert memory.output_size_in_bytes < 4096
    assert memory.temp_size_in_bytes < 1.6 * 4 * np.prod(probs.shape)


def test_windows_are_added_in_place() -> None:
    """The sum on the canvas exists once, whatever the number of windows."""
    total = jax.ShapeDtypeStruct((96, 96, 96, 3), jnp.float32)
    windows, corners = jax.ShapeDtypeStruct((4, 32, 32, 32, 3), jnp.float32), jnp.zeros((4, 3), jnp.int32)
    memory = add_windows.lower(total, windows, corners, jnp.ones(4, bool)).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 4 * np.prod(total.shape)
    assert memory.temp_size_in_bytes < 1.5 * 4 * np.prod(windows.shape)


def tiny_unet(dropout: float) -> tuple[nnx.GraphDef, TrainState]:
    sizes: Any = {"in_channels": 2, "out_channels": 3, "spatial_dims": 3, "channels": (4, 8), "strides": (2,)}
    return init_state(make_unet(**sizes, dropout=dropout, rngs=nnx.Rngs(0)), optax.identity())


def test_dropout_is_off() -> None:
    image = np.random.default_rng(0).normal(size=(12, 8, 8, 2)).astype(np.float32)
    graphdef, state = tiny_unet(0.5)
    plain, plain_state = tiny_unet(0.0)
    probs = volume_predictor(graphdef, state, (8, 8, 8))(image)
    expected = volume_predictor(plain, plain_state._replace(params=state.params), (8, 8, 8))(image)
    np.testing.assert_allclose(probs, expected, atol=1e-6)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for(platform: str) -> None:
    """Each of the programs of a volume."""
    predict = volume_predictor(*tiny_unet(0.1), (8, 8, 8))
    plan = predict.plan((12, 8, 9))
    image = jnp.zeros((*plan.canvas, 2))
    probs, windows = jnp.zeros((*plan.canvas, 3)), jnp.zeros((plan.counted.shape[1], 8, 8, 8, 3))
    corners, counted = jnp.asarray(plan.corners[0]), jnp.asarray(plan.counted[0])
    shape, label = jnp.zeros(3, jnp.int32), jnp.zeros(plan.canvas, jnp.uint8)
    where = jnp.ones(plan.canvas, bool)
    programs: list[tuple[Any, tuple[Any, ...]]] = [
        (cut_windows, (image, corners, predict.patch)),
        (jitted(predict.forward), (predict.weights, jnp.zeros((4, 8, 8, 8, 2)))),
        (add_windows, (probs, windows, corners, counted)),
        (weighted_mean, (probs, True)),
        (inside, (shape, plan.canvas)),
        (in_a_row, ((probs, label, where), 2048)),
        (jitted(CaseStatistics()), (probs, label, where)),
    ]
    for program, arguments in programs:
        exported = export.export(program, platforms=[platform])(*arguments)
        assert exported.platforms == (platform,)
    # The last program gives bins and Dice, and nothing else leaves the device.
    assert [leaf.shape for leaf in exported.out_avals] == [(2, 20)] * 3 + [(2,)]


@pytest.mark.parametrize("regions", [(), ("a", "b", "c")])
def test_an_ensemble_averages_probabilities(regions: tuple[str, ...]) -> None:
    sizes = {"channels": (4, 8), "strides": (2,), "in_channels": 1, "out_channels": 3}
    members = []
    for seed in range(3):
        graphdef, state = init_state(make_unet(**sizes, rngs=nnx.Rngs(seed)), optax.sgd(0.1))
        members.append(volume_predictor(graphdef, state, (8, 8, 8), regions))
    image = volume((9, 11, 8))
    mean = np.mean([np.asarray(each(image), np.float64) for each in members], 0)
    np.testing.assert_allclose(ensemble(members)(image), mean, atol=2e-6)
    other = VolumePredictor(members[0].forward, members[0].weights, (8, 8, 16))
    with pytest.raises(InputError, match="different networks"):
        ensemble([members[0], other])
