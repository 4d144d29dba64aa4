import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from train.data.augment_config import NO_AUGMENTATION, AugmentConfig
from train.data.augmentation import (
    _interpolate,
    _interpolate_channels,
    augment,
    random_affine,
    random_flip,
    random_gamma,
    random_intensity,
    random_noise,
    random_smooth,
)
from train.data.preprocess import normalise
from train.data.transforms import crop_back, cut_patch, draw_crop, pad_to_hold
from train.errors import InputError


def test_z_score_ignores_and_keeps_zeros():
    image = np.random.default_rng(0).gamma(2.0, 100.0, (8, 9, 10, 2)).astype(np.float32)
    image[:4] = 0
    scaled = normalise(image)
    assert scaled.dtype == np.float32
    assert not scaled[:4].any()
    np.testing.assert_allclose(scaled[4:].mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(scaled[4:].std((0, 1, 2)), 1, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_z_score_of_a_constant_channel_is_zero(value):
    assert not normalise(np.full((3, 3, 1), value, np.float32)).any()


def _fit(image, label, patch, rng, **options):
    crop = draw_crop(label, patch, rng, **options)
    return cut_patch(image, crop, patch), cut_patch(label, crop, patch)


def _marked(shape):
    """An image whose only channel equals its label, so that a joint move can be seen."""
    label = np.random.default_rng(1).integers(1, 200, shape).astype(np.uint8)
    return label[..., None].astype(np.float32), label


@pytest.mark.parametrize("shape", [(10, 10), (3, 20), (5, 4), (7, 11, 5)])
def test_a_patch_moves_image_and_label_together(shape):
    image, label = _marked(shape)
    patch = (7, 8, 6)[: len(shape)]
    fitted_image, fitted_label = _fit(image, label, patch, np.random.default_rng(0))
    assert fitted_label.shape == patch
    assert fitted_label.dtype == np.uint8
    np.testing.assert_array_equal(fitted_image[..., 0], fitted_label)
    assert np.count_nonzero(fitted_label) == np.prod(np.minimum(shape, patch))


def test_a_patch_pads_in_the_centre_and_crops_everywhere():
    image, label = _marked((3, 6))
    fitted = [_fit(image, label, (5, 4), np.random.default_rng(i))[1] for i in range(40)]
    assert all(not f[0].any() and not f[4].any() for f in fitted)
    corners = {f[1].tobytes() for f in fitted}
    assert corners == {label[0, start : start + 4].tobytes() for start in range(3)}


def test_foreground_crops_hold_each_class_alike_and_stay_inside():
    label = np.zeros((30, 20), np.uint8)
    label[3:20, 4:18] = 1
    label[29, 19] = 2
    crops = [draw_crop(label, (5, 4), np.random.default_rng(i), foreground_share=1.0) for i in range(200)]
    held = [label[crop] for crop in crops]
    assert all(part.shape == (5, 4) and part.any() for part in held)
    assert 0.4 < np.mean([(part == 2).any() for part in held]) < 0.6
    middles = [part[2, 2] for part in held if not (part == 2).any()]
    assert set(middles) == {1}, "but at the rim, the voxel drawn is in the middle"


def test_a_share_of_the_crops_is_foreground_and_none_without_foreground():
    label = np.zeros((400,), np.uint8)
    label[200] = 1
    held = [
        label[draw_crop(label, (3,), np.random.default_rng(i), foreground_share=0.33)].any()
        for i in range(400)
    ]
    assert 0.25 < np.mean(held) < 0.42
    corners = {
        draw_crop(0 * label, (3,), np.random.default_rng(i), foreground_share=1.0)[0].start for i in range(9)
    }
    assert len(corners) > 4


@pytest.mark.parametrize("patch", [(8, 20, 9), (10, 8, 8)])
def test_crop_back_undoes_pad_to_hold(patch):
    image, _ = _marked((9, 16, 5))
    padded = pad_to_hold(image, patch)
    assert padded.shape[:-1] == tuple(max(sides) for sides in zip(patch, (9, 16, 5), strict=True))
    np.testing.assert_array_equal(crop_back(padded, image.shape[:-1]), image)
    np.testing.assert_array_equal(crop_back(padded[..., 0], image.shape[:-1]), image[..., 0])


def _example(shape=(6, 5, 4)):
    image, label = _marked(shape)
    return jnp.asarray(image), jnp.asarray(label, jnp.int32)


def test_flips_move_image_and_label_together_and_stay_on_their_axes():
    image, label = _example()
    seen = set()
    for seed in range(20):
        flipped_image, flipped_label = random_flip(
            jax.random.key(seed), image, label, AugmentConfig(flip_prob=0.5, flip_axes=(0, 2))
        )
        np.testing.assert_array_equal(flipped_image[..., 0], flipped_label)
        match = [
            axes
            for axes in [(), (0,), (2,), (0, 2)]
            if np.array_equal(flipped_label, np.flip(np.asarray(label), axes))
        ]
        seen.update(match)
    assert seen == {(), (0,), (2,), (0, 2)}


def test_noise_has_a_standard_deviation_up_to_the_largest():
    image = jnp.zeros((40, 40, 1))
    config = AugmentConfig(noise_std=0.5)
    stds = [float(random_noise(jax.random.key(i), image, config).std()) for i in range(20)]
    assert max(stds) <= 0.52
    assert max(stds) - min(stds) > 0.2


def test_intensity_changes_each_channel_linearly_within_its_range():
    image = jnp.stack([jnp.linspace(-1, 1, 20), jnp.linspace(0, 3, 20)], axis=-1)
    changed = random_intensity(
        jax.random.key(0), image, AugmentConfig(intensity_scale=0.2, intensity_shift=0.1)
    )
    for channel in range(2):
        slope, offset = np.polyfit(image[:, channel], changed[:, channel], 1)
        assert abs(slope - 1) <= 0.2
        assert abs(offset) <= 0.1 + 1e-6


def test_gamma_keeps_range_and_order():
    image = jax.random.normal(jax.random.key(1), (50, 2))
    changed = random_gamma(jax.random.key(0), image, AugmentConfig(gamma=(0.5, 0.6)))
    np.testing.assert_allclose(changed.min(0), image.min(0), atol=1e-5)
    np.testing.assert_allclose(changed.max(0), image.max(0), atol=1e-5)
    np.testing.assert_array_equal(jnp.argsort(changed, axis=0), jnp.argsort(image, axis=0))
    assert (changed >= image - 1e-5).all(), "an exponent below 1 brightens"


def test_gamma_of_a_constant_image_is_the_image():
    image = jnp.full((4, 4, 1), 2.0)
    changed = random_gamma(jax.random.key(0), image, AugmentConfig(gamma=(0.5, 2.0)))
    np.testing.assert_array_equal(changed, image)


def _affine(key, image, label, *, zoom=(1.0, 1.0), rotation=0.0, prob=1.0):
    config = AugmentConfig(zoom_prob=prob, zoom=zoom, rotation_prob=prob, rotation=rotation)
    return random_affine(key, image, label, config)


def _one_hot(label, classes=4):
    return jax.nn.one_hot(label, classes)


@pytest.mark.parametrize(("shape", "factor"), [((12, 9), 1.5), ((8, 9, 7), 0.73)])
def test_zoom_is_that_of_scipy(shape, factor):
    image = jax.random.normal(jax.random.key(0), (*shape, 1))
    label = jax.random.randint(jax.random.key(1), shape, 0, 4)
    zoomed, ids = _affine(jax.random.key(2), image, label, zoom=(factor, factor))
    centre = (np.array(shape) - 1) / 2
    options = {"offset": centre - centre / factor, "mode": "nearest"}
    matrix = np.eye(len(shape)) / factor
    expected = scipy.ndimage.affine_transform(np.asarray(image[..., 0]), matrix, order=1, **options)
    np.testing.assert_allclose(zoomed[..., 0], expected, atol=2e-5)
    np.testing.assert_array_equal(
        ids, scipy.ndimage.affine_transform(np.asarray(label), matrix, order=0, **options)
    )


@pytest.mark.parametrize("shape", [(24, 20), (16, 18, 20)])
def test_zoom_and_rotation_are_drawn_within_their_ranges(shape):
    """An image of its own coordinates shows where each voxel came from."""
    dims = len(shape)
    image = jnp.stack(jnp.meshgrid(*(jnp.arange(float(n)) for n in shape), indexing="ij"), -1)
    label = jnp.zeros(shape, jnp.int32)
    inner = tuple(slice(n // 2 - 3, n // 2 + 3) for n in shape)
    start = np.asarray(image[inner]).reshape(-1, dims) - (np.array(shape) - 1) / 2
    affine = jax.jit(lambda key: _affine(key, image, label, zoom=(0.7, 1.5), rotation=15.0)[0])
    zooms, cosines = [], []
    for seed in range(12):
        source = np.asarray(affine(jax.random.key(seed))[inner]).reshape(-1, dims) - (np.array(shape) - 1) / 2
        matrix = np.linalg.lstsq(start, source)[0]
        zooms.append(np.linalg.det(matrix) ** (-1 / dims))
        turn = matrix * zooms[-1]
        np.testing.assert_allclose(turn @ turn.T, np.eye(dims), atol=1e-4)
        cosines.append(turn.diagonal().min())
    assert 0.7 <= min(zooms) < 0.95 < 1.15 < max(zooms) <= 1.5
    assert min(cosines) >= np.cos(np.radians(15)) ** (dims - 1) - 1e-4
    assert np.ptp(cosines) > 0.01


def test_soft_labels_are_resampled_as_images_and_ids_stay_ids():
    ids = jnp.asarray(scipy.ndimage.zoom(np.arange(8).reshape(2, 2, 2) % 4, 6, order=0), jnp.int32)
    key, soft = jax.random.key(0), _one_hot(ids)
    image, moved = _affine(key, soft, soft, zoom=(0.7, 1.5), rotation=15.0)
    np.testing.assert_array_equal(image, moved)
    np.testing.assert_allclose(moved.sum(-1), 1, atol=1e-5)
    nearest = _affine(key, soft, ids, zoom=(0.7, 1.5), rotation=15.0)[1]
    assert nearest.dtype == jnp.int32
    sure = np.asarray(moved.max(-1) > 0.99)
    assert sure.mean() > 0.3
    np.testing.assert_array_equal(np.asarray(nearest)[sure], np.asarray(moved.argmax(-1))[sure])


def test_channels_in_turn_are_interpolated_as_all_at_once():
    """The program of TPUs, on the platform the tests run on."""
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.normal(size=(5, 6, 7, 3)), jnp.float32)
    matrix = jnp.asarray(np.eye(3) + rng.normal(size=(3, 3)) / 5, jnp.float32)
    in_turn, at_once = jax.jit(_interpolate_channels)(image, matrix), _interpolate(image, matrix)
    np.testing.assert_allclose(in_turn, at_once, atol=1e-6)


def test_an_affine_map_that_is_not_drawn_is_exactly_the_identity():
    image, label = _example((6, 5, 4))
    same_image, same_label = _affine(
        jax.random.key(0), image, label, zoom=(0.7, 1.5), rotation=15.0, prob=0.0
    )
    np.testing.assert_array_equal(same_image, image)
    np.testing.assert_array_equal(same_label, label)


def test_smoothing_is_that_of_scipy_and_keeps_a_constant():
    shape = (16, 14, 15)
    image = jax.random.normal(jax.random.key(0), (*shape, 2))
    smooth = random_smooth(jax.random.key(1), image, AugmentConfig(smooth_std=(1.0, 1.0)))
    expected = scipy.ndimage.gaussian_filter(np.asarray(image), (*[1.0] * len(shape), 0.0), truncate=6)
    inner = tuple(slice(6, -6) for _ in shape)
    np.testing.assert_allclose(smooth[inner], expected[inner], atol=1e-5)
    constant = random_smooth(
        jax.random.key(2), jnp.full((*shape, 1), 3.0), AugmentConfig(smooth_std=(0.5, 1.15))
    )
    np.testing.assert_allclose(constant, 3.0, rtol=1e-5)


@pytest.mark.parametrize("what", ["zoom", "rotation", "smooth", "gamma", "intensity", "noise"])
def test_every_chance_is_kept(what):
    image = jax.random.normal(jax.random.key(0), (6, 6, 1))
    config = dataclasses.replace(NO_AUGMENTATION, **{f"{what}_prob": 0.5})
    run = jax.jit(jax.vmap(lambda key: augment(key, image, jnp.zeros((6, 6), jnp.int32), config)[0]))
    same = np.asarray(jnp.all(jnp.isclose(run(jax.random.split(jax.random.key(1), 200)), image), (1, 2, 3)))
    assert 0.35 < same.mean() < 0.65


@pytest.mark.parametrize(("shape", "soft"), [((10, 8), False), ((6, 8, 7), True)])
def test_all_augmentations_together(shape, soft):
    config = AugmentConfig(zoom_prob=0.5, rotation_prob=0.5, smooth_prob=0.5, gamma_prob=0.5, noise_prob=0.5)
    images = jax.random.normal(jax.random.key(0), (3, *shape, 2))
    ids = jax.random.randint(jax.random.key(1), (3, *shape), 0, 4)
    labels = _one_hot(ids) if soft else ids
    keys = jax.random.split(jax.random.key(2), 3)
    with jax.numpy_dtype_promotion("strict"):
        new_images, new_labels = jax.jit(jax.vmap(lambda *x: augment(*x, config)))(keys, images, labels)
    assert (new_images.shape, new_images.dtype) == (images.shape, images.dtype)
    assert (new_labels.shape, new_labels.dtype) == (labels.shape, labels.dtype)
    assert bool(jnp.isfinite(new_images).all())


def test_augment_is_a_function_of_its_key_and_keeps_labels_with_the_image():
    image, label = _example()
    config = AugmentConfig(noise_std=0.0, intensity_scale=0.0, intensity_shift=0.0, gamma=(1.0, 1.0))
    keys = jax.random.split(jax.random.key(0), 8)
    batch = jnp.stack([image] * 8), jnp.stack([label] * 8)
    run = jax.jit(jax.vmap(augment, in_axes=(0, 0, 0, None)), static_argnums=3)
    images, labels = run(keys, *batch, config)
    np.testing.assert_array_equal(images[..., 0], labels)
    assert len({np.asarray(one).tobytes() for one in labels}) == 2
    np.testing.assert_array_equal(images, run(keys, *batch, config)[0])
    full_images, full_labels = run(keys, *batch, AugmentConfig())
    assert full_images.dtype == jnp.float32
    assert full_labels.dtype == jnp.int32
    assert len({np.asarray(one).tobytes() for one in full_images}) == 8


def test_no_augmentation_changes_and_costs_nothing():
    image, label = _example()
    same_image, same_label = augment(jax.random.key(0), image, label, NO_AUGMENTATION)
    assert same_image is image
    assert same_label is label


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flip_prob": 1.5}, "flip_prob is 1.5"),
        ({"noise_std": -1.0}, "noise_std is -1.0"),
        ({"gamma": (1.5, 0.7)}, r"gamma is \(1.5, 0.7\)"),
        ({"gamma": (0.0, 1.0)}, "gamma is"),
        ({"zoom": (1.5, 0.7)}, r"zoom is \(1.5, 0.7\): give a smallest and a largest factor"),
        ({"zoom_prob": -0.1}, "zoom_prob is -0.1: give a number from 0 to 1"),
        ({"rotation": 200.0}, "rotation is 200.0: give a number from 0 to 180"),
        ({"smooth_std": (0.0, 1.0)}, r"smooth_std is \(0.0, 1.0\)"),
        ({"noise_prob": float("nan")}, "noise_prob is nan"),
    ],
)
def test_bad_strengths_are_told(change, message):
    with pytest.raises(InputError, match=message):
        AugmentConfig(**change)
