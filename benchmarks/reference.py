"""The reference: MONAI's network and losses on PyTorch, with mL1-ACE written on MONAI's `calibration_binning`."""

import os

import numpy as np
import torch
from monai.losses.dice import DiceLoss
from monai.metrics.calibration import calibration_binning
from monai.networks.nets.unet import UNet


def use_all_cores() -> None:
    """As many threads as this process may use cores, which is what XLA takes."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))


def paper_unet(in_channels: int, classes: int) -> UNet:
    """The paper's 3-D U-Net with random weights."""
    return UNet(3, in_channels, classes, (8, 16, 32, 64), (2, 2, 2), num_res_units=2)


def parameters(model: UNet) -> dict[str, np.ndarray]:
    """Weights by MONAI's names."""
    return {name: tensor.detach().numpy().copy() for name, tensor in model.named_parameters()}


def gradients(model: UNet) -> dict[str, np.ndarray]:
    """Gradients of the last backward pass by MONAI's names."""
    named = model.named_parameters()
    return {name: tensor.grad.numpy().copy() for name, tensor in named if tensor.grad is not None}


def channel_first(array: np.ndarray) -> torch.Tensor:
    """A channel-last array as PyTorch has it."""
    return torch.tensor(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


def mean_l1_ace(probs: torch.Tensor, one_hot: torch.Tensor, num_bins: int = 20) -> torch.Tensor:
    """Mean over images and classes of the mean gap over non-empty bins."""
    mean_prob, mean_label, _ = calibration_binning(probs, one_hot, num_bins=num_bins)
    return torch.nanmean((mean_prob - mean_label).abs(), dim=-1).mean()


class Loss:
    """Dice as MONAI computes it, plus mL1-ACE where `ace` is True."""

    def __init__(self, classes: int, *, ace: bool):
        self.classes, self.ace = classes, ace
        self.dice = DiceLoss(softmax=True, to_onehot_y=True)

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = self.dice(logits, labels[:, None])
        if not self.ace:
            return loss
        one_hot = torch.nn.functional.one_hot(labels, self.classes).movedim(-1, 1).float()
        return loss + mean_l1_ace(torch.softmax(logits, 1), one_hot)
