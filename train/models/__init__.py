"""Networks: `unet`, `segresnet` and `unetr`, made of `blocks` and `layers`; `registry` finds them by name."""

from train.models.registry import make_network
from train.models.segresnet import SegResNet
from train.models.unet import UNet
from train.models.unetr import UNETR

__all__ = ["UNETR", "SegResNet", "UNet", "make_network"]
