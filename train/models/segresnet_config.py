"""Options of SegResNet. Importing them needs no Flax."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from train.errors import check_numbers
from train.models.registry import NetworkConfig


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
        check_numbers(self, deep_supervision=(0, math.inf), **sizes)

    @property
    def divisor(self) -> int:
        return 2 ** (len(self.blocks_down) - 1)

    def make(self, *, patch: tuple[int, ...], **sizes: Any) -> Any:
        from train.models.segresnet import SegResNet

        return SegResNet(**dataclasses.asdict(self), **sizes)
