"""Networks: `unet`, `segresnet` and `unetr` of `blocks` and `layers`; MONAI's
weights in them, through `monai`; and by name, from `registry`."""

from train.models.monai import load_monai_weights
from train.models.registry import make_network
from train.models.segresnet import SegResNet
from train.models.unet import UNet
from train.models.unetr import UNETR

__all__ = ["UNETR", "SegResNet", "UNet", "load_monai_weights", "make_network"]
