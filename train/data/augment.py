"""Augmentation on the device: keyed pure functions of one example, run under `vmap` inside the step."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from train.errors import InputError


@dataclass(frozen=True)
class AugmentConfig:
    """Strengths; zero (or a gamma range of 1 to 1) turns an augmentation off, at no cost in the step.

    Attributes:
        flip_prob: chance of a flip, for each of the axes on its own.
        flip_axes: spatial axes that may be flipped. Axis 0 is left-right in volumes stored in RAS or LAS
            order; anatomy is not symmetric along the other two.
        noise_std: largest standard deviation of the added noise; an image's own is uniform from 0 to it.
        intensity_scale: largest relative change of a channel's contrast, 0.1 for factors 0.9 to 1.1.
        intensity_shift: largest offset of a channel, in standard deviations of the image.
        gamma: smallest and largest exponent applied to intensities scaled to 0 to 1.
    """

    flip_prob: float = 0.5
    flip_axes: tuple[int, ...] = (0,)
    noise_std: float = 0.1
    intensity_scale: float = 0.1
    intensity_shift: float = 0.1
    gamma: tuple[float, float] = (0.8, 1.25)

    def __post_init__(self) -> None:
        if not 0 <= self.flip_prob <= 1:
            raise InputError(f"flip_prob is {self.flip_prob}: give a probability from 0 to 1.")
        for option in ("noise_std", "intensity_scale", "intensity_shift"):
            if getattr(self, option) < 0:
                raise InputError(f"{option} is {getattr(self, option)}: give 0 or more.")
        if not 0 < self.gamma[0] <= self.gamma[1]:
            raise InputError(f"gamma is {self.gamma}: give a smallest and a largest exponent, both positive.")


NO_AUGMENTATION = AugmentConfig(
    flip_prob=0.0, flip_axes=(), noise_std=0.0, intensity_scale=0.0, intensity_shift=0.0, gamma=(1.0, 1.0)
)


def augment(
    key: PRNGKeyArray,
    image: Float[Array, "*spatial channels"],
    label: Int[Array, "*spatial"],
    config: AugmentConfig,
) -> tuple[Float[Array, "*spatial channels"], Int[Array, "*spatial"]]:
    """Applies, in this order: flip, gamma, scale and shift, noise. Image and label move together.

    Args:
        key: one per example and step.
        image: z-scored intensities.
        label: class ids.
        config: strengths, static under jit.

    Example, for a batch::

        keys = jax.random.split(key, batch_size)
        images, labels = jax.vmap(augment, in_axes=(0, 0, 0, None))(keys, images, labels, config)
    """
    flip_key, gamma_key, intensity_key, noise_key = jax.random.split(key, 4)
    if config.flip_prob and config.flip_axes:
        image, label = random_flip(flip_key, image, label, prob=config.flip_prob, axes=config.flip_axes)
    if config.gamma != (1.0, 1.0):
        image = random_gamma(gamma_key, image, gamma=config.gamma)
    if config.intensity_scale or config.intensity_shift:
        image = random_intensity(
            intensity_key, image, scale=config.intensity_scale, shift=config.intensity_shift
        )
    if config.noise_std:
        image = random_noise(noise_key, image, max_std=config.noise_std)
    return image, label


def random_flip(
    key: PRNGKeyArray,
    image: Float[Array, "*spatial channels"],
    label: Int[Array, "*spatial"],
    *,
    prob: float,
    axes: Sequence[int],
) -> tuple[Float[Array, "*spatial channels"], Int[Array, "*spatial"]]:
    """Reverses each of the spatial `axes` with probability `prob`, image and label alike.

    Raises:
        InputError: an axis that the label does not have.
    """
    if not all(0 <= axis < label.ndim for axis in axes):
        raise InputError(f"flip_axes is {tuple(axes)}: the data has spatial axes 0 to {label.ndim - 1}.")
    for axis, flip in zip(axes, jax.random.bernoulli(key, prob, (len(axes),)), strict=True):
        image = jnp.where(flip, jnp.flip(image, axis), image)
        label = jnp.where(flip, jnp.flip(label, axis), label)
    return image, label


def random_gamma(
    key: PRNGKeyArray, image: Float[Array, "*spatial channels"], *, gamma: tuple[float, float]
) -> Float[Array, "*spatial channels"]:
    """y = x^g on intensities scaled to 0 to 1 per channel, then scaled back; log g is uniform."""
    axes = tuple(range(image.ndim - 1))
    low, high = image.min(axes), image.max(axes)
    span = jnp.where(high > low, high - low, 1.0)
    low_log, high_log = jnp.log(jnp.array(gamma, image.dtype))
    exponent = jnp.exp(jax.random.uniform(key, (), image.dtype, low_log, high_log))
    return ((image - low) / span) ** exponent * span + low


def random_intensity(
    key: PRNGKeyArray, image: Float[Array, "*spatial channels"], *, scale: float, shift: float
) -> Float[Array, "*spatial channels"]:
    """y = a·x + b per channel, a uniform in 1 ± scale and b uniform in ± shift."""
    change = jax.random.uniform(key, (2, image.shape[-1]), image.dtype, -1.0, 1.0)
    return (1 + scale * change[0]) * image + shift * change[1]


def random_noise(
    key: PRNGKeyArray, image: Float[Array, "*spatial channels"], *, max_std: float
) -> Float[Array, "*spatial channels"]:
    """Adds white Gaussian noise; its standard deviation is drawn for the image, uniform in 0 to `max_std`."""
    std_key, noise_key = jax.random.split(key)
    std = jax.random.uniform(std_key, (), image.dtype, 0.0, max_std)
    return image + std * jax.random.normal(noise_key, image.shape, image.dtype)
