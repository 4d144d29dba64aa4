"""A whole volume evaluated by a sliding window, with its statistics, beside the reference's."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

from benchmarks import timing
from train.config import DataInfo, RunConfig
from train.evaluate import NUM_BINS, CaseStatistics
from train.inference import Network, VolumePredictor, plan_windows
from train.monai.mapping import load_monai_weights
from train.task import make_model

OURS, REFERENCE = "calib_jax", "reference"
TARGET = 0.8
"""Our time over the reference's, at most."""
# What the reference averages over windows: scores, as MONAI's users do, which takes one softmax, or probabilities,
# as is done here, which takes one for each window.
Average = Literal["probabilities", "scores"]


class Volume(NamedTuple):
    """A case without its padding: `[*spatial, channels]` and class ids `[*spatial]`."""

    image: np.ndarray
    label: np.ndarray


class Statistics(NamedTuple):
    """Of each foreground class: the sums of `BinStatistics`, `[classes, bins]`, and Dice `[classes]`."""

    voxels: np.ndarray
    prob_sum: np.ndarray
    label_sum: np.ndarray
    dice: np.ndarray


@dataclass(frozen=True)
class Inference:
    """Time to evaluate a whole volume (sliding window, bin statistics, Dice) beside MONAI's on PyTorch, as a ratio.

    Both run the paper's U-Net with the same weights over as many windows, weigh them by the same Gaussian and take
    20 bins. From arrays on the host to statistics on the host, after a first call.
    """

    shape: tuple[int, int, int] = (240, 240, 155)
    """Voxels along each axis; those of BraTS."""
    channels: int = 4
    """Channels of the image."""
    classes: int = 4
    """Classes, background included."""
    patch: tuple[int, int, int] = (128, 128, 128)
    """Window; that which the trainer takes for volumes of the default shape."""
    overlap: float = 0.5
    """Share of a window that the next one covers again."""
    windows_per_batch: int = 4
    """Windows that the network sees at a time, at most (MONAI's sw_batch_size)."""
    rounds: int = 5
    """Timed rounds; each evaluates the volume with both programs."""
    warmup: int = 1
    """Rounds before these."""
    out: Path = Path("benchmarks/results/inference.json")
    """Where the results go, as JSON."""

    def run(self) -> None:
        from benchmarks import reference

        reference.use_all_cores()
        network = reference.paper_unet(self.channels, self.classes).eval()
        predict = self._predictor(reference.parameters(network))
        self._check_agreement(network, predict)
        volume = self._volume(self.shape)
        programs: dict[str, Callable[[], Any]] = {
            OURS: lambda: our_statistics(predict, volume),
            REFERENCE: self._reference_program(network, volume, "scores"),
        }
        samples = timing.interleaved(programs, warmup=self.warmup, rounds=self.rounds)
        self._report(samples)

    def _report(self, samples: dict[str, list[float]]) -> None:
        ratio = timing.ratio(samples, OURS, REFERENCE)
        spread = timing.ratio_spread(samples, OURS, REFERENCE)
        print(timing.format_samples(samples))
        print(
            f"whole volume: {ratio:.2f} of the reference's time (by round {spread['min']:.2f} to "
            f"{spread['max']:.2f}; 1 = equal, lower = faster; target {TARGET})"
        )
        settings = {
            name: getattr(self, name)
            for name in ("shape", "channels", "classes", "patch", "overlap", "windows_per_batch")
        }
        windows = int(self._plan(self.shape).counted.sum())
        figures = {"target": TARGET, "windows": windows, "ratio": ratio, "ratio_by_round": spread}
        timing.write_results(self.out, {**settings, **figures, "seconds": samples})
        print(f"written to {self.out}")

    def _plan(self, shape: tuple[int, ...]) -> Any:
        return plan_windows(shape, self.patch, self.overlap, self.windows_per_batch)

    def _volume(self, shape: tuple[int, ...]) -> Volume:
        """A noisy image of the labels it goes with, so that probabilities spread over some bins."""
        rng = np.random.default_rng(0)
        label = rng.integers(0, self.classes, shape, dtype=np.uint8)
        image = rng.standard_normal((*shape, self.channels), np.float32) + label[..., None].astype(np.float32)
        return Volume(image, label)

    def _predictor(self, parameters: dict[str, np.ndarray]) -> VolumePredictor:
        """The trainer's own, with the reference's weights."""
        data = DataInfo("random", tuple(map(str, range(self.classes))), self.channels, spatial_dims=3)
        model = make_model(RunConfig("dice"), data)
        load_monai_weights(model, parameters)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        return VolumePredictor(
            Network(graphdef), (params, rest), self.patch, self.overlap, self.windows_per_batch
        )

    def _reference_program(self, network: Any, volume: Volume, average: Average) -> Callable[[], Statistics]:
        """Sliding window, softmax, `calibration_binning` and Dice of MONAI, on tensors that are there."""
        import torch
        from monai.inferers.utils import sliding_window_inference
        from monai.metrics.calibration import calibration_binning
        from monai.metrics.meandice import compute_dice
        from monai.networks.utils import one_hot

        from benchmarks import reference

        image = reference.channel_first(volume.image[None])
        label = reference.class_ids(volume.label)[None, None]

        def softmax(x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(x, 1)

        @torch.inference_mode()
        def program() -> Statistics:
            windowed = (lambda x: softmax(network(x))) if average == "probabilities" else network
            probs = sliding_window_inference(
                image, self.patch, self.windows_per_batch, windowed, self.overlap, mode="gaussian"
            )
            assert isinstance(probs, torch.Tensor)
            probs = softmax(probs) if average == "scores" else probs
            true = one_hot(label, self.classes)
            predicted = one_hot(probs.argmax(1, keepdim=True), self.classes)
            bins = calibration_binning(probs[:, 1:], true[:, 1:], num_bins=NUM_BINS)
            dice = compute_dice(predicted, true, include_background=False)
            mean_prob, mean_label, count = (x[0].cpu().numpy() for x in bins)
            prob_sum, label_sum = (np.nan_to_num(mean) * count for mean in (mean_prob, mean_label))
            return Statistics(count, prob_sum, label_sum, dice[0].cpu().numpy())

        return program

    def _check_agreement(self, network: Any, predict: VolumePredictor) -> None:
        """Asserts that both give the same statistics of a volume of two windows, and of one as large as a window.

        Two windows lie in the same places for both, where more than that may not: MONAI's last one moves up to
        the volume's end, ours are spread evenly. Where there are several, ours averages probabilities.
        """
        stride = int(self.patch[0] * (1 - self.overlap))
        two_windows = (self.patch[0] + stride, *self.patch[1:])
        checks: list[tuple[tuple[int, ...], Average]] = [
            (two_windows, "probabilities"),
            (self.patch, "scores"),
        ]
        for shape, average in checks:
            volume = self._volume(shape)
            theirs = self._reference_program(network, volume, average)()
            difference = largest_difference(our_statistics(predict, volume), theirs)
            size = "x".join(map(str, shape))
            assert difference < 1e-4, f"{size}: statistics differ by {difference:.1e} of the voxels"
            print(f"{size}: same statistics, differing by {difference:.1e} of the voxels or in Dice at most")


def our_statistics(predict: VolumePredictor, volume: Volume) -> Statistics:
    """As the trainer evaluates a case."""
    stats, dice = jax.device_get(predict.summary(CaseStatistics(), *volume))
    return Statistics(stats.count, stats.prob_sum, stats.label_sum, dice)


def largest_difference(ours: Statistics, theirs: Statistics) -> float:
    """The largest, of sums as a share of the voxels: those within rounding of an edge may change their bin."""
    voxels = ours.voxels[0].sum()
    sums = [abs(a - b).max() / voxels for a, b in zip(ours[:3], theirs[:3], strict=True)]
    return float(np.max([*sums, abs(ours.dice - theirs.dice).max()]))
