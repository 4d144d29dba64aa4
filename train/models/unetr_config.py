"""Options of UNETR. Importing them needs no Flax."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from train.errors import check_numbers
from train.models.registry import NetworkConfig

PATCH_SIZE = 16
"""Side of the patches that become tokens, in voxels."""


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
    """Attention heads."""

    fixed_patch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_numbers(self, **{field.name: (1, math.inf) for field in dataclasses.fields(self)})

    @property
    def divisor(self) -> int:
        return PATCH_SIZE

    def make(self, *, patch: tuple[int, ...], spatial_dims: int, **sizes: Any) -> Any:
        from train.models.unetr import UNETR

        return UNETR(image_size=patch, **dataclasses.asdict(self), **sizes)
