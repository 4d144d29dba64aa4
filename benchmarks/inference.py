"""Evaluation of a whole volume by a sliding window, with its statistics, beside the reference's."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import torch
from flax import nnx
from monai.inferers.utils import sliding_window_inference
from monai.metrics.calibration import calibration_binning
from monai.metrics.meandice import compute_dice
from monai.networks.utils import one_hot

from benchmarks import reference, timing
from benchmarks.options import Inference
from train.config import DataInfo, RunConfig
from train.evaluate import NUM_BINS, CaseStatistics
from train.inference import Network, VolumePredictor, plan_windows
from train.monai.mapping import load_monai_weights
from train.task import make_model

OURS, REFERENCE = "calib_jax", "reference"
TARGET = 0.8
"""Largest ratio of our time to the reference's that meets the target."""
# The reference averages over windows either scores (as MONAI's users do, with one softmax in all) or probabilities
# (as calib_jax does, with one softmax per window).
Average = Literal["probabilities", "scores"]


class Volume(NamedTuple):
    """An image `[*spatial, channels]` and its class ids `[*spatial]`, without padding."""

    image: np.ndarray
    label: np.ndarray


class Statistics(NamedTuple):
    """Sums of `BinStatistics`, `[classes, bins]`, and Dice, `[classes]`, of the foreground classes."""

    voxels: np.ndarray
    prob_sum: np.ndarray
    label_sum: np.ndarray
    dice: np.ndarray


def run(options: Inference) -> None:
    """Checks that both sides agree, times them, prints the ratio and writes the results."""
    reference.at_its_fastest()
    network = reference.paper_unet(options.channels, options.classes).eval()
    predict = _predictor(options, reference.parameters(network))
    with reference.full_precision():
        _check_agreement(options, network, predict)
    volume = _volume(options, options.shape)
    programs: dict[str, Callable[[], Any]] = {
        OURS: lambda: our_statistics(predict, volume),
        REFERENCE: _reference_program(options, network, volume, "scores"),
    }
    samples = timing.interleaved(programs, warmup=options.warmup, rounds=options.rounds)
    ratio = timing.ratio(samples, OURS, REFERENCE)
    spread = timing.ratio_spread(samples, OURS, REFERENCE)
    print(timing.format_samples(samples))
    print(
        f"whole volume: {ratio:.2f} of the reference's time (by round {spread['min']:.2f} to "
        f"{spread['max']:.2f}; 1 = equal, lower = faster; target {TARGET})"
    )
    names = ("shape", "channels", "classes", "patch", "overlap", "windows_per_batch")
    windows = plan_windows(options.shape, options.patch, options.overlap, options.windows_per_batch)
    figures = {"target": TARGET, "windows": int(windows.counted.sum()), "ratio": ratio}
    results = {**timing.settings(options, *names), **figures, "ratio_by_round": spread, "seconds": samples}
    timing.write_results(options.out, results)


def _volume(options: Inference, shape: tuple[int, ...]) -> Volume:
    """A noisy image of its own labels, so that probabilities spread over some bins."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, options.classes, shape, dtype=np.uint8)
    noise = rng.standard_normal((*shape, options.channels), np.float32)
    return Volume(noise + label[..., None].astype(np.float32), label)


def _predictor(options: Inference, parameters: dict[str, np.ndarray]) -> VolumePredictor:
    """The trainer's predictor, with the reference's weights."""
    data = DataInfo("random", tuple(map(str, range(options.classes))), options.channels, spatial_dims=3)
    model = make_model(RunConfig("dice"), data)
    load_monai_weights(model, parameters)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    windows = options.patch, options.overlap, options.windows_per_batch
    return VolumePredictor(Network(graphdef), (params, rest), *windows)


def _reference_program(
    options: Inference, network: Any, volume: Volume, average: Average
) -> Callable[[], Statistics]:
    """Sliding window, softmax, `calibration_binning` and Dice of MONAI, on tensors that are on the device."""
    image = reference.channel_first(volume.image[None])
    label = reference.class_ids(volume.label)[None, None]

    def softmax(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, 1)

    @torch.inference_mode()
    def program() -> Statistics:
        predictor = (lambda x: softmax(network(x))) if average == "probabilities" else network
        probs = sliding_window_inference(
            image, options.patch, options.windows_per_batch, predictor, options.overlap, mode="gaussian"
        )
        assert isinstance(probs, torch.Tensor)
        probs = softmax(probs) if average == "scores" else probs
        true = one_hot(label, options.classes)
        predicted = one_hot(probs.argmax(1, keepdim=True), options.classes)
        bins = calibration_binning(probs[:, 1:], true[:, 1:], num_bins=NUM_BINS)
        dice = compute_dice(predicted, true, include_background=False)
        mean_prob, mean_label, count = (x[0].cpu().numpy() for x in bins)
        prob_sum, label_sum = (np.nan_to_num(mean) * count for mean in (mean_prob, mean_label))
        return Statistics(count, prob_sum, label_sum, dice[0].cpu().numpy())

    return program


def _check_agreement(options: Inference, network: Any, predict: VolumePredictor) -> None:
    """Asserts that both sides give the same statistics of a volume of two windows and of one of a single window.

    Two windows lie in the same places on both sides. More windows may not: MONAI moves the last window to the
    volume's end, and calib_jax spreads the windows evenly. Of several windows calib_jax averages probabilities.
    """
    stride = int(options.patch[0] * (1 - options.overlap))
    two_windows = (options.patch[0] + stride, *options.patch[1:])
    checks: tuple[tuple[tuple[int, ...], Average], ...] = (
        (two_windows, "probabilities"),
        (options.patch, "scores"),
    )
    for shape, average in checks:
        volume = _volume(options, shape)
        theirs = _reference_program(options, network, volume, average)()
        difference = largest_difference(our_statistics(predict, volume), theirs)
        size = "x".join(map(str, shape))
        assert difference < 1e-4, f"{size}: statistics differ by {difference:.1e} of the voxels"
        print(f"{size}: same statistics, differing by {difference:.1e} of the voxels or in Dice at most")


def our_statistics(predict: VolumePredictor, volume: Volume) -> Statistics:
    """Statistics of a volume, computed as the trainer evaluates a case."""
    stats, dice = jax.device_get(predict.summary(CaseStatistics(), *volume))
    return Statistics(stats.count, stats.prob_sum, stats.label_sum, dice)


def largest_difference(ours: Statistics, theirs: Statistics) -> float:
    """Largest difference of Dice, or of a sum as a share of the voxels.

    Sums differ a little, since voxels within rounding of a bin edge may change their bin.
    """
    voxels = ours.voxels[0].sum()
    sums = [abs(a - b).max() / voxels for a, b in zip(ours[:3], theirs[:3], strict=True)]
    return float(np.max([*sums, abs(ours.dice - theirs.dice).max()]))
