"""Options of augmentation. Importing them needs no jax."""

import math
from dataclasses import dataclass

from train.errors import InputError, check_numbers


@dataclass(frozen=True)
class AugmentConfig:
    """Chances and strengths of augmentations. A chance or strength of zero turns one off, at no cost in the step.

    The paper uses zoom_prob 0.3, rotation_prob 0.3, smooth_prob 0.2, gamma_prob 0.3 with gamma 0.7 to 1.5,
    noise_prob 0.2, intensity_prob 0.

    Attributes:
        flip_prob: chance of a flip, for each axis independently.
        flip_axes: spatial axes that may be flipped. Axis 0 is left-right in volumes on disk; anatomy is not
            symmetric along the other two.
        zoom_prob: chance of a zoom.
        zoom: smallest and largest factor, the same along all axes. A factor above 1 enlarges.
        rotation_prob: chance of a rotation.
        rotation: largest angle about each axis, in degrees.
        smooth_prob: chance of Gaussian smoothing.
        smooth_std: smallest and largest standard deviation of the kernel along each axis, in voxels.
        gamma_prob: chance of a change of gamma.
        gamma: smallest and largest exponent of intensities scaled to [0, 1]; 1 to 1 is off.
        intensity_prob: chance of a change of contrast and offset.
        intensity_scale: largest relative change of a channel's contrast, 0.1 for factors 0.9 to 1.1.
        intensity_shift: largest offset of a channel, in standard deviations of the image.
        noise_prob: chance of added noise.
        noise_std: largest standard deviation of the noise. Each image draws its own, uniformly from 0.
    """

    flip_prob: float = 0.5
    flip_axes: tuple[int, ...] = (0,)
    zoom_prob: float = 0.0
    zoom: tuple[float, float] = (0.7, 1.5)
    rotation_prob: float = 0.0
    rotation: float = 15.0
    smooth_prob: float = 0.0
    smooth_std: tuple[float, float] = (0.5, 1.15)
    gamma_prob: float = 1.0
    gamma: tuple[float, float] = (0.8, 1.25)
    intensity_prob: float = 1.0
    intensity_scale: float = 0.1
    intensity_shift: float = 0.1
    noise_prob: float = 1.0
    noise_std: float = 0.1

    def __post_init__(self) -> None:
        chances = ("flip", "zoom", "rotation", "smooth", "gamma", "intensity", "noise")
        strengths = ("noise_std", "intensity_scale", "intensity_shift")
        limits = {f"{name}_prob": (0, 1) for name in chances} | dict.fromkeys(strengths, (0, math.inf))
        check_numbers(self, rotation=(0, 180), **limits)
        if len(set(self.flip_axes)) < len(self.flip_axes) or min(self.flip_axes, default=0) < 0:
            raise InputError(f"flip_axes is {self.flip_axes}: give different axes, counted from 0.")
        for option, what in (("zoom", "factor"), ("gamma", "exponent"), ("smooth_std", "standard deviation")):
            low, high = getattr(self, option)
            if not 0 < low <= high:
                raise InputError(
                    f"{option} is {(low, high)}: give a smallest and a largest {what}, both positive."
                )

    @property
    def mixes_voxels(self) -> bool:
        """Whether a voxel may get values from anywhere in its volume."""
        return bool(self.zoom_prob or self.rotation_prob or self.smooth_prob)


NO_AUGMENTATION = AugmentConfig(flip_prob=0.0, gamma_prob=0.0, intensity_prob=0.0, noise_prob=0.0)
