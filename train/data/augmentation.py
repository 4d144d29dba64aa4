"""Augmentation on the device: pure functions of a key and one example, under `vmap` inside the step."""

import itertools
import math
from collections.abc import Sequence
from functools import reduce

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, Int, PRNGKeyArray

from train.data.augment_config import AugmentConfig

Image = Float[Array, "*spatial channels"]
# Class ids, or the probability of each class if annotators disagree.
Label = Int[Array, "*spatial"] | Float[Array, "*spatial classes"]


def augment(key: PRNGKeyArray, image: Image, label: Label, config: AugmentConfig) -> tuple[Image, Label]:
    """Applies zoom and rotation, flip, smoothing, gamma, scale and shift, noise, in this order.

    Image and label move together. Under `vmap` a chance between 0 and 1 costs as much as 1.

    Args:
        key: one per example and step.
        image: z-scored intensities.
        label: class ids, or the probability of each class.
        config: strengths, static under jit.

    Example, for a batch::

        keys = jax.random.split(key, batch_size)
        images, labels = jax.vmap(augment, in_axes=(0, 0, 0, None))(keys, images, labels, config)
    """
    keys = jax.random.split(key, 7)
    flip_key, gamma_key, intensity_key, noise_key, affine_key, smooth_key, chance_key = keys
    if config.zoom_prob or config.rotation_prob:
        image, label = random_affine(affine_key, image, label, config)
    if config.flip_prob and config.flip_axes:
        image, label = random_flip(flip_key, image, label, config)
    has_change = config.intensity_scale or config.intensity_shift
    changes = (
        (config.smooth_prob, smooth_key, random_smooth),
        (config.gamma_prob * (config.gamma != (1, 1)), gamma_key, random_gamma),
        (config.intensity_prob * bool(has_change), intensity_key, random_intensity),
        (config.noise_prob * bool(config.noise_std), noise_key, random_noise),
    )
    for chance, (prob, key, change) in zip(jax.random.split(chance_key, len(changes)), changes, strict=True):
        if prob:  # probabilities 0 and 1 are resolved at trace time
            changed = change(key, image, config)
            image = changed if prob == 1 else jnp.where(jax.random.bernoulli(chance, prob), changed, image)
    return image, label


def random_affine(
    key: PRNGKeyArray, image: Image, label: Label, config: AugmentConfig
) -> tuple[Image, Label]:
    """Zooms and rotates about the centre in one resampling. Voxels beyond the rim repeat the rim.

    Images and soft labels are interpolated linearly; class ids come from the nearest voxel.

    Args:
        key: draws whether to zoom, one factor, whether to rotate, and an angle per plane, all uniform.
        image: the rotation ignores the spacing of the voxels.
        label: of the same voxels.
        config: its `zoom_prob`, `zoom`, `rotation_prob` and `rotation`.
    """
    shape = image.shape[:-1]
    planes = list(itertools.combinations(range(len(shape)), 2))
    zooms_key, factor_key, turns_key, angle_key = jax.random.split(key, 4)
    zooms = jax.random.bernoulli(zooms_key, config.zoom_prob)
    turns = jax.random.bernoulli(turns_key, config.rotation_prob)
    factor = jnp.where(zooms, jax.random.uniform(factor_key, (), image.dtype, *config.zoom), 1)
    most = math.radians(config.rotation)
    angles = jnp.where(turns, jax.random.uniform(angle_key, (len(planes),), image.dtype, -most, most), 0)
    matrix = _rotation(angles, planes, len(shape)) / factor
    if label.ndim == image.ndim:
        return _interpolate(image, matrix), _interpolate(label, matrix)
    nearest = map_coordinates(label.astype(image.dtype), _coordinates(matrix, shape), 0, mode="nearest")
    return _interpolate(image, matrix), nearest.astype(label.dtype)


def _rotation(
    angles: Float[Array, " planes"], planes: Sequence[tuple[int, int]], dims: int
) -> Float[Array, "{dims} {dims}"]:
    """The product of a rotation in each plane of two axes."""
    matrix = jnp.eye(dims, dtype=angles.dtype)
    for (i, j), cos, sin in zip(planes, jnp.cos(angles), jnp.sin(angles), strict=True):
        rows, columns = jnp.array([i, i, j, j]), jnp.array([i, j, i, j])
        turn = jnp.eye(dims, dtype=angles.dtype).at[rows, columns].set(jnp.stack([cos, -sin, sin, cos]))
        matrix = jnp.matmul(matrix, turn, precision="highest")
    return matrix


def _coordinates(matrix: Float[Array, "dims dims"], shape: Sequence[int]) -> list[Float[Array, "*spatial"]]:
    """The source coordinates of each voxel of the result, one array for each axis."""
    middles = [(size - 1) / 2 for size in shape]
    lines = [
        jnp.arange(size, dtype=matrix.dtype) - middle for size, middle in zip(shape, middles, strict=True)
    ]
    offsets = jnp.meshgrid(*lines, indexing="ij", sparse=True)
    # Not a matrix product, which accelerators would round, and TPUs compile slowly in full precision.
    turned = [reduce(jnp.add, map(jnp.multiply, row, offsets)) for row in matrix]
    return [offset + middle for offset, middle in zip(turned, middles, strict=True)]


def _interpolate(array: Image, matrix: Float[Array, "dims dims"]) -> Image:
    """Linear interpolation at `_coordinates`, constant beyond the rim."""
    return jax.lax.platform_dependent(array, matrix, tpu=_interpolate_channels, default=_sum_of_corners)


def _interpolate_channels(array: Image, matrix: Float[Array, "dims dims"]) -> Image:
    """`_interpolate`, one channel after the other. TPUs pad rows of few channels and compile them slowly."""
    channels = jnp.moveaxis(array, -1, 0)
    return jnp.moveaxis(jax.lax.map(lambda channel: _sum_of_corners(channel, matrix), channels), 0, -1)


def _sum_of_corners(
    array: Float[Array, "*spatial_and_channels"], matrix: Float[Array, "dims dims"]
) -> Float[Array, "*spatial_and_channels"]:
    """`_interpolate` with or without channels.

    Equals `map_coordinates` of order 1. The loop over corners computes the result once; XLA for CPU would otherwise
    fuse the gathers into every read of the smoothing, and repeat them there.
    """
    shape, channels = array.shape[: len(matrix)], array.shape[len(matrix) :]
    voxels = array.reshape(-1, *channels)

    def add_corner(total: Array, corner: Array) -> tuple[Array, None]:
        weights, places = jnp.ones(shape, array.dtype), jnp.zeros(shape, jnp.int32)
        for axis, coordinate in enumerate(_coordinates(matrix, shape)):
            lower = jnp.floor(coordinate)
            weight = coordinate - lower
            weights *= jnp.where(corner[axis] == 1, weight, 1 - weight)
            place = jnp.clip(lower.astype(jnp.int32) + corner[axis], 0, shape[axis] - 1)
            places = places * shape[axis] + place
        values = voxels.at[places].get(mode="promise_in_bounds")
        return total + weights.reshape(*shape, *(1 for _ in channels)) * values, None

    corners = jnp.array(list(itertools.product((0, 1), repeat=len(shape))), jnp.int32)
    return jax.lax.scan(add_corner, jnp.zeros_like(array), corners)[0]


def random_flip(key: PRNGKeyArray, image: Image, label: Label, config: AugmentConfig) -> tuple[Image, Label]:
    """Reverses each of `flip_axes` with probability `flip_prob`, image and label alike."""
    axes = config.flip_axes
    for axis, flip in zip(axes, jax.random.bernoulli(key, config.flip_prob, (len(axes),)), strict=True):
        image = jnp.where(flip, jnp.flip(image, axis), image)
        label = jnp.where(flip, jnp.flip(label, axis), label)
    return image, label


def random_smooth(key: PRNGKeyArray, image: Image, config: AugmentConfig) -> Image:
    """Averages with Gaussian weights. Their standard deviation along each axis is uniform in `smooth_std`.

    The weights inside of the volume sum to 1, so that the rim does not darken.
    """
    stds = jax.random.uniform(key, (image.ndim - 1,), image.dtype, *config.smooth_std)
    for axis, size in enumerate(image.shape[:-1]):
        places = jnp.arange(size, dtype=image.dtype)
        weights = jax.nn.softmax(-0.5 * jnp.square((places[:, None] - places[None, :]) / stds[axis]))
        image = jnp.moveaxis(jnp.tensordot(weights, image, (1, axis), precision="highest"), 0, axis)
    return image


def random_gamma(key: PRNGKeyArray, image: Image, config: AugmentConfig) -> Image:
    """y = x^g on intensities scaled to [0, 1] per channel, then scaled back; log g is uniform."""
    axes = tuple(range(image.ndim - 1))
    low, high = image.min(axes), image.max(axes)
    span = jnp.where(high > low, high - low, 1.0)
    low_log, high_log = jnp.log(jnp.array(config.gamma, image.dtype))
    exponent = jnp.exp(jax.random.uniform(key, (), image.dtype, low_log, high_log))
    return ((image - low) / span) ** exponent * span + low


def random_intensity(key: PRNGKeyArray, image: Image, config: AugmentConfig) -> Image:
    """y = a·x + b per channel, a uniform in 1 ± `intensity_scale` and b in ± `intensity_shift`."""
    change = jax.random.uniform(key, (2, image.shape[-1]), image.dtype, -1.0, 1.0)
    return (1 + config.intensity_scale * change[0]) * image + config.intensity_shift * change[1]


def random_noise(key: PRNGKeyArray, image: Image, config: AugmentConfig) -> Image:
    """Adds white Gaussian noise. Its standard deviation is uniform in 0 to `noise_std`, one draw per image."""
    std_key, noise_key = jax.random.split(key)
    std = jax.random.uniform(std_key, (), image.dtype, 0.0, config.noise_std)
    return image + std * jax.random.normal(noise_key, image.shape, image.dtype)
