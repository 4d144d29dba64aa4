"""Networks."""

from train.models.unet import UNet, load_monai_weights

__all__ = ["UNet", "load_monai_weights"]
