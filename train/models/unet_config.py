"""Options of the U-Net. Importing them needs no Flax."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from train.errors import InputError, check_numbers
from train.models.registry import NetworkConfig


@dataclass(frozen=True)
class UNetConfig(NetworkConfig):
    """MONAI's residual U-Net. The defaults are the paper's."""

    channels: tuple[int, ...] = (8, 16, 32, 64)
    """Channels of each level."""
    strides: tuple[int, ...] = (2, 2, 2)
    """Stride from each level to the next."""
    num_res_units: int = 2
    """Convolutions in a residual unit; 0 for plain convolutions."""

    def __post_init__(self) -> None:
        check_numbers(self, channels=(1, math.inf), num_res_units=(0, math.inf))
        if len(self.strides) != len(self.channels) - 1 or min(self.strides, default=0) < 1:
            raise InputError(
                f"strides {self.strides} do not fit channels {self.channels}: give one stride, 1 or more, between "
                "each two levels."
            )

    @property
    def divisor(self) -> int:
        return math.prod(self.strides)

    def make(self, *, patch: tuple[int, ...], **sizes: Any) -> Any:
        from train.models.unet import UNet

        return UNet(**dataclasses.asdict(self), **sizes)
