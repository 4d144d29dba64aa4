"""Options of the networks of this package. Importing them needs no Flax."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from train.errors import InputError, check_numbers
from train.models.registry import NetworkConfig

PATCH_SIZE = 16
"""Side of the patches that become tokens of UNETR, in voxels."""


@dataclass(frozen=True)
class UNetConfig(NetworkConfig):
    """MONAI's residual U-Net. The defaults are the paper's."""

    channels: tuple[int, ...] = (8, 16, 32, 64)
    """Channels of each level."""
    strides: tuple[int, ...] = (2, 2, 2)
    """Stride from each level to the next. Thick slices want other strides across than within: then give those of
    all axes for the first step, for the second, and so on, as in 2 2 1 2 2 1 2 2 2."""
    num_res_units: int = 2
    """Convolutions in a residual unit; 0 for plain convolutions."""

    def __post_init__(self) -> None:
        check_numbers(self, channels=(1, math.inf), num_res_units=(0, math.inf))
        steps = len(self.channels) - 1
        if (
            not self.strides
            or len(self.strides) not in (steps, 2 * steps, 3 * steps)
            or min(self.strides) < 1
        ):
            raise InputError(
                f"strides {self.strides} do not fit channels {self.channels}: give two or more channels, and one "
                "stride, 1 or more, between each two levels, or one for each axis there."
            )

    def strides_of_axes(self, spatial_dims: int) -> list[tuple[int, ...]]:
        """The stride along each axis, from each level to the next.

        Raises:
            InputError: the strides are those of another number of axes.
        """
        steps = len(self.channels) - 1
        if len(self.strides) == steps:
            return [(stride,) * spatial_dims for stride in self.strides]
        if len(self.strides) != steps * spatial_dims:
            raise InputError(
                f"strides {self.strides} are of {len(self.strides) // steps} axes, the images have {spatial_dims}: "
                f"give {steps} or {steps * spatial_dims} strides."
            )
        return [self.strides[i * spatial_dims : (i + 1) * spatial_dims] for i in range(steps)]

    def divisors(self, spatial_dims: int) -> tuple[int, ...]:
        return tuple(map(math.prod, zip(*self.strides_of_axes(spatial_dims), strict=True)))

    def make(self, *, patch: tuple[int, ...], **sizes: Any) -> Any:
        from train.models.unet import UNet

        return UNet(self, **sizes)


@dataclass(frozen=True)
class SegResNetConfig(NetworkConfig):
    """MONAI's SegResNet, or SegResNetDS with deep supervision. The defaults are MONAI's."""

    init_filters: int = 8
    """Channels of the finest level; each further level has twice as many."""
    blocks_down: tuple[int, ...] = (1, 2, 2, 4)
    """Residual blocks of each level on the way down, the finest first."""
    blocks_up: tuple[int, ...] = ()
    """Residual blocks of each level on the way up, the coarsest first; left out, one at each level."""
    deep_supervision: int = 0
    """Number of levels whose logits are trained, with weights 1, 1/2, 1/4, ...; 1 or more make MONAI's
    SegResNetDS, 0 its SegResNet."""

    default_norm: ClassVar[str] = "group"

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("init_filters", "blocks_down", "blocks_up"), (1, math.inf))
        check_numbers(self, deep_supervision=(0, max(len(self.blocks_down) - 1, 0)), **sizes)
        if len(self.blocks_down) < 2 or len(self.blocks_up) not in (0, len(self.blocks_down) - 1):
            raise InputError(
                f"blocks_down is {self.blocks_down} and blocks_up {self.blocks_up}: give two levels or more, and "
                "one fewer on the way up."
            )

    def divisors(self, spatial_dims: int) -> tuple[int, ...]:
        return (2 ** (len(self.blocks_down) - 1),) * spatial_dims

    def make(self, *, patch: tuple[int, ...], **sizes: Any) -> Any:
        from train.models.segresnet import SegResNet

        return SegResNet(self, **sizes)


@dataclass(frozen=True)
class UNETRConfig(NetworkConfig):
    """MONAI's UNETR, a transformer that sees patches of one size only. The defaults are MONAI's."""

    feature_size: int = 16
    """Channels of the finest level."""
    hidden_size: int = 768
    """Channels of a token."""
    mlp_dim: int = 3072
    """Channels inside the perceptron of a transformer block."""
    num_heads: int = 12
    """Attention heads, a divisor of the channels of a token."""

    fixed_patch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_numbers(self, **{field.name: (1, math.inf) for field in dataclasses.fields(self)})
        if self.hidden_size % self.num_heads:
            raise InputError(
                f"hidden_size is {self.hidden_size}: give a multiple of num_heads, {self.num_heads}."
            )

    def divisors(self, spatial_dims: int) -> tuple[int, ...]:
        return (PATCH_SIZE,) * spatial_dims

    def make(self, *, patch: tuple[int, ...], spatial_dims: int, **sizes: Any) -> Any:
        from train.models.unetr import UNETR

        return UNETR(self, image_size=patch, **sizes)
