"""The reference: MONAI's network and losses on PyTorch, and mL1-ACE in two formulations.

One formulation uses MONAI's `calibration_binning`. The other is the paper's own, written from its description.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from monai.losses.dice import DiceLoss
from monai.metrics.calibration import calibration_binning
from monai.networks.nets.unet import UNet


def at_its_fastest() -> None:
    """Lets PyTorch use every core of this process and try cuDNN's algorithms before it chooses one, as XLA does."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.backends.cudnn.benchmark = True


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Within this context neither side rounds float32 to TF32, as both do by default on NVIDIA GPUs."""
    import jax

    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with jax.default_matmul_precision("highest"):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def device() -> torch.device:
    """The GPU if PyTorch and JAX both have one, else the CPU."""
    import jax

    return torch.device("cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu")


def wait() -> None:
    """Waits until `device()` has finished its work."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def paper_unet(in_channels: int, classes: int, spatial_dims: int = 3) -> UNet:
    """The paper's U-Net with random weights, on `device()`."""
    return UNet(spatial_dims, in_channels, classes, (8, 16, 32, 64), (2, 2, 2), num_res_units=2).to(device())


def parameters(model: UNet) -> dict[str, np.ndarray]:
    """Weights by MONAI's names."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in model.named_parameters()}


def gradients(model: UNet) -> dict[str, np.ndarray]:
    """Gradients of the last backward pass by MONAI's names."""
    named = model.named_parameters()
    return {name: tensor.grad.cpu().numpy().copy() for name, tensor in named if tensor.grad is not None}


def channel_first(array: np.ndarray) -> torch.Tensor:
    """A channel-last array as a channel-first tensor on `device()`."""
    return torch.tensor(np.ascontiguousarray(np.moveaxis(array, -1, 1)), device=device())


def class_ids(labels: np.ndarray) -> torch.Tensor:
    """Labels as a tensor of int64 on `device()`."""
    return torch.tensor(labels, dtype=torch.int64, device=device())


def mean_l1_ace(probs: torch.Tensor, one_hot: torch.Tensor, num_bins: int = 20) -> torch.Tensor:
    """Mean over images and classes of the mean gap over non-empty bins."""
    mean_prob, mean_label, _ = calibration_binning(probs, one_hot, num_bins=num_bins)
    return torch.nanmean((mean_prob - mean_label).abs(), dim=-1).mean()


def paper_l1_ace(probs: torch.Tensor, one_hot: torch.Tensor, num_bins: int = 20) -> torch.Tensor:
    """mL1-ACE as the paper computes it: a count and two means per image and class, scattered into bins."""
    edges = torch.linspace(0, 1 + torch.finfo(torch.float32).eps, num_bins + 1, device=probs.device)
    pairs = zip(probs.flatten(0, 1).flatten(1), one_hot.flatten(0, 1).flatten(1), strict=True)
    return torch.stack([_paper_gap(prob, label, edges[1:]) for prob, label in pairs]).mean()


def _paper_gap(prob: torch.Tensor, label: torch.Tensor, upper_edges: torch.Tensor) -> torch.Tensor:
    index = torch.bucketize(prob, upper_edges)
    zeros = torch.zeros_like(upper_edges)
    count = zeros.scatter_add(0, index, torch.ones_like(prob))
    mean_prob = zeros.scatter_reduce(0, index, prob, "mean", include_self=False)
    mean_label = zeros.scatter_reduce(0, index, label, "mean", include_self=False)
    return torch.nanmean(torch.where(count > 0, (mean_prob - mean_label).abs(), torch.nan))


ACE_LOSSES = {"monai": mean_l1_ace, "paper": paper_l1_ace}


class AceInputs(NamedTuple):
    """Inputs of mL1-ACE in PyTorch: channel first, labels one-hot, on `device()`."""

    probs: torch.Tensor
    one_hot: torch.Tensor


def ace_inputs(
    probs: Float[np.ndarray, "batch *spatial classes"], labels: Int[np.ndarray, "batch *spatial"]
) -> AceInputs:
    """Inputs of mL1-ACE in PyTorch. Ids outside `[0, classes)` belong to no class, as in calib_jax."""
    ids, classes = class_ids(labels), probs.shape[-1]
    one_hot = torch.stack([(ids == label).float() for label in range(classes)], dim=1)
    return AceInputs(channel_first(probs).requires_grad_(), one_hot)


def ace_program(
    loss: Callable[..., torch.Tensor], inputs: AceInputs, num_bins: int
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """A function that returns the loss and its gradient once both are computed."""

    def program() -> tuple[torch.Tensor, torch.Tensor]:
        value = loss(*inputs, num_bins=num_bins)
        (gradient,) = torch.autograd.grad(value, inputs.probs)
        wait()
        return value.detach(), gradient

    return program


class Loss:
    """MONAI's Dice loss, plus mL1-ACE if `ace` is True."""

    def __init__(self, classes: int, *, ace: bool):
        self.classes, self.ace = classes, ace
        self.dice = DiceLoss(softmax=True, to_onehot_y=True)

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = self.dice(logits, labels[:, None])
        if not self.ace:
            return loss
        one_hot = torch.nn.functional.one_hot(labels, self.classes).movedim(-1, 1).float()
        return loss + mean_l1_ace(torch.softmax(logits, 1), one_hot)
