"""Writes tests/golden/*.npz: what PyTorch and MONAI compute, for machines that have neither.

    python tests/make_golden.py

`edges.npz` holds `torch.linspace` bin edges; `monai.npz` holds inputs (channel last), MONAI's bin means and
counts, and the mL1-ACE loss and gradient that follow from them. MONAI's `right=False`, its default, is what
calib_jax calls `closed="right"`: bins (l, r]; its docstring says the opposite. `networks.npz` holds the logits of
MONAI's networks under fixed weights, and their gradient for the image (UNETR needs einops).
"""

from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "golden"
EDGE_BINS = (1, 2, 3, 5, 7, 10, 15, 20, 64, 100, 200, 1000)


def inputs():
    """Name -> (probs `[batch, *spatial, classes]`, labels of the same shape, bins, MONAI's `right`)."""
    rng = np.random.default_rng(7)
    softmax = rng.dirichlet(np.full(3, 0.4), (2, 6, 5, 4)).astype(np.float32)
    one_hot = np.eye(3, dtype=np.float32)[rng.integers(0, 3, softmax.shape[:-1])]
    regions = rng.beta(0.5, 0.7, (2, 9, 8, 3)).astype(np.float32)
    nested = np.cumsum(rng.random(regions.shape) < 0.35, axis=-1).clip(max=1).astype(np.float32)
    edges = on_edges(10)
    halves = (np.arange(edges.size) % 3 == 0).astype(np.float32).reshape(edges.shape)
    return {
        "softmax": (softmax, one_hot, 20, False),
        "regions": (regions, nested, 15, False),
        "edges_right_false": (edges, halves, 10, False),
        "edges_right_true": (edges, halves, 10, True),
    }


def on_edges(num_bins):
    """One image and class of every edge, its neighbours on both sides and the ends: `[1, voxels, 1]`."""
    import torch

    edges = torch.linspace(0.0, 1.0 + torch.finfo(torch.float32).eps, num_bins + 1).numpy()
    below, above = np.nextafter(edges, np.float32(-1)), np.nextafter(edges, np.float32(2))
    values = np.concatenate([edges, below, above, np.float32([0.0, 1.0, 1e-45, 0.33, 0.77])])
    return values.astype(np.float32)[None, :, None]


def monai_loss(probs, labels, num_bins, right):
    """Mean over non-empty bins, then over images and classes, and its gradient, all channel last."""
    import torch
    from monai.metrics.calibration import calibration_binning

    tensor = torch.tensor(np.moveaxis(probs, -1, 1).copy(), requires_grad=True)
    target = torch.tensor(np.moveaxis(labels, -1, 1).astype(np.float32).copy())
    mean_prob, mean_label, count = calibration_binning(tensor, target, num_bins=num_bins, right=right)
    loss = torch.nanmean(torch.abs(mean_prob - mean_label), dim=-1).mean()
    loss.backward()
    return {
        "mean_prob": mean_prob.detach().numpy(),
        "mean_label": mean_label.detach().numpy(),
        "count": count.detach().numpy().astype(np.int32),
        "loss": np.float32(loss.item()),
        "gradient": np.moveaxis(tensor.grad.numpy(), 1, -1),
    }


def networks():
    """Of each network in `networks.STORED`: logits (finest first) and the gradient for the image, channel last."""
    import torch
    from monai.networks import nets
    from networks import STORED, channel_last, pattern, patterned_state

    arrays = {}
    for name, (theirs, options, make, sizes) in STORED.items():
        network = getattr(nets, theirs)(in_channels=1, out_channels=3, **options)
        state = {key: torch.tensor(value) for key, value in patterned_state(make()).items()}
        network.load_state_dict(state, strict=False)  # what it stores and does not use is not there
        network = network.double()
        image = torch.tensor(np.moveaxis(pattern((2, *sizes, 1), 5.0, 1.0), -1, 1), dtype=torch.float64)
        image.requires_grad_()
        logits = network(image)
        logits = logits if isinstance(logits, list) else [logits]
        for i, level in enumerate(logits):
            g = torch.tensor(np.moveaxis(pattern(channel_last(level).shape, 3.0, 1.0), -1, 1).copy())
            level.backward(g.double(), retain_graph=True)
            arrays[f"{name}/logits{i}"] = channel_last(level).astype(np.float32)
        arrays[f"{name}/gradient"] = channel_last(image.grad).astype(np.float32)
    return arrays


def main():
    """Writes the three files."""
    import torch

    end = 1.0 + torch.finfo(torch.float32).eps
    FOLDER.mkdir(exist_ok=True)
    edges = {str(n): torch.linspace(0.0, end, n + 1).numpy() for n in EDGE_BINS}
    np.savez_compressed(FOLDER / "edges.npz", **edges)
    arrays = {}
    for name, (probs, labels, num_bins, right) in inputs().items():
        case = {"probs": probs, "labels": labels.astype(np.uint8), "num_bins": num_bins, "right": right}
        case |= monai_loss(probs, labels, num_bins, right)
        arrays |= {f"{name}/{key}": value for key, value in case.items()}
    np.savez_compressed(FOLDER / "monai.npz", **arrays)
    np.savez_compressed(FOLDER / "networks.npz", **networks())


if __name__ == "__main__":
    main()
