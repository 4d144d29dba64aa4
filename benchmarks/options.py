"""Options of every benchmark. This module imports nothing heavy, so that help and errors come at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["blobs", "one-bin", "uniform"]
Precision = Literal["float32", "bfloat16"]

RESULTS = Path("benchmarks/results")


def parse_shape(text: str) -> tuple[int, ...]:
    """`"2x4x96x96x96"` -> batch, classes and spatial sizes."""
    try:
        shape = tuple(map(int, text.split("x")))
    except ValueError:
        shape = ()
    if len(shape) < 3 or min(shape) < 1:
        raise SystemExit(f"error: a shape is batch, classes and sizes, as in 2x4x96x96x96; got {text!r}")
    return shape


@dataclass(frozen=True)
class Loss:
    """Time mL1-ACE (value and gradient with respect to probabilities) beside PyTorch, as ratios.

    References: "monai" is the loss on MONAI's `calibration_binning`; "paper" is the paper's formulation; both are
    also timed under `torch.compile`. The floor is a copy of the probabilities.

        python -m benchmarks loss --shapes 2x4x96x96x96 --kinds blobs --no-compile
    """

    shapes: tuple[str, ...] = ("2x4x96x96x96", "1x4x224x224x144")
    """Batch, classes, then voxels along each axis."""
    kinds: tuple[Kind, ...] = ("blobs", "one-bin")
    """blobs: probabilities of a segmentation, most voxels confident. one-bin: at least 90% of the voxels of each
    class in one bin. uniform: equally many voxels in each bin."""
    num_bins: int = 20
    """Number of bins."""
    rounds: int = 15
    """Timed rounds; each calls every program once."""
    warmup: int = 2
    """Untimed rounds before the timed ones."""
    compile: bool = True
    """Also time the references under torch.compile; if that fails, the results hold the reason."""
    out: Path = RESULTS / "loss.json"
    """JSON file for the results; the plot is saved beside it as PNG."""

    def __post_init__(self) -> None:
        for shape in self.shapes:
            parse_shape(shape)

    def run(self) -> None:
        from benchmarks import loss

        loss.run(self)


@dataclass(frozen=True)
class Parts:
    """Time Dice + cross-entropy + mL1-ACE with the gradient from logits, as one loss and part by part.

    The parts are optax's Dice and cross-entropy and `mL1_ace` of a softmax, one program each. The reference is
    MONAI's DiceCELoss plus mL1-ACE on its `calibration_binning`.
    """

    shape: str = "4x3x48x64x48"
    """Batch, classes, then voxels along each axis."""
    rounds: int = 15
    """Timed rounds; each calls every program once."""
    warmup: int = 3
    """Untimed rounds before the timed ones."""
    out: Path = RESULTS / "parts.json"
    """JSON file for the results."""

    def __post_init__(self) -> None:
        parse_shape(self.shape)

    def run(self) -> None:
        from benchmarks import parts

        parts.run(self)


@dataclass(frozen=True)
class Step:
    """Time one training step (forward, loss, backward, Adam) beside MONAI on PyTorch, as a ratio."""

    patch: tuple[int, ...] = (48, 64, 48)
    """Voxels along each of two or three axes."""
    batch_size: int = 4
    """Patches per step."""
    channels: int = 1
    """Channels of the image."""
    classes: int = 3
    """Classes, including the background."""
    precision: Precision = "float32"
    """Precision of convolutions and activations on both sides; for bfloat16 the reference uses `torch.autocast`."""
    compile: bool = True
    """Also time the reference under `torch.compile`."""
    rounds: int = 31
    """Timed rounds; each takes one step of every program."""
    warmup: int = 3
    """Untimed rounds before the timed ones."""
    out: Path = RESULTS / "step.json"
    """JSON file for the results."""

    def run(self) -> None:
        from benchmarks import step

        step.run(self)


@dataclass(frozen=True)
class Step2D(Step):
    """Time one training step on slices instead of volumes."""

    patch: tuple[int, ...] = (192, 192)
    """Pixels along each axis."""
    batch_size: int = 16
    """Patches per step."""
    out: Path = RESULTS / "step-2d.json"
    """JSON file for the results."""


@dataclass(frozen=True)
class Inference:
    """Time the evaluation of a whole volume (sliding window, bin statistics, Dice) beside MONAI, as a ratio.

    Both sides run the paper's U-Net with the same weights on equally many windows, use the same Gaussian weights
    and take 20 bins. The time is from arrays on the host to statistics on the host, after a first call.
    """

    shape: tuple[int, int, int] = (240, 240, 155)
    """Voxels along each axis; the default is BraTS."""
    channels: int = 4
    """Channels of the image."""
    classes: int = 4
    """Classes, including the background."""
    patch: tuple[int, int, int] = (128, 128, 128)
    """Size of a window; the trainer uses the default for volumes of the default shape."""
    overlap: float = 0.5
    """Share of a window that the next one covers again."""
    windows_per_batch: int = 4
    """Largest number of windows that the network processes at once (MONAI's sw_batch_size)."""
    rounds: int = 5
    """Timed rounds; each evaluates the volume with both programs."""
    warmup: int = 1
    """Untimed rounds before the timed ones."""
    out: Path = RESULTS / "inference.json"
    """JSON file for the results."""

    def run(self) -> None:
        from benchmarks import inference

        inference.run(self)


@dataclass(frozen=True)
class Memory:
    """Measure the memory of mL1-ACE (value and gradient) beyond inputs and gradient, in bytes of the probabilities.

    Ours is measured twice: as the plan of the compiled program and, like the references, as the peak of a fresh
    process (Linux).
    """

    shape: str = "1x4x224x224x144"
    """Batch, classes, then voxels along each axis."""
    kind: Kind = "blobs"
    """Kind of data, see `python -m benchmarks loss --help`."""
    num_bins: int = 20
    """Number of bins."""
    rounds: int = 3
    """Fresh processes for each program."""
    out: Path = RESULTS / "memory.json"
    """JSON file for the results; the plot is saved beside it as PNG."""

    def __post_init__(self) -> None:
        parse_shape(self.shape)

    def run(self) -> None:
        from benchmarks import memory

        memory.run(self)


@dataclass(frozen=True)
class Scaling:
    """Time mL1-ACE (value and gradient) per voxel and class against voxels, bins and classes, beside MONAI.

    Growth is the largest rise of that cost from one point of an axis to any later point. It is computed from the
    medians and from the quickest samples, which a machine that changes its speed between two points affects least.
    """

    voxels: tuple[int, ...] = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000)
    """Voxels of the image, rounded to a cube."""
    bins: tuple[int, ...] = (5, 10, 20, 50, 100, 200)
    """Numbers of bins."""
    classes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Numbers of classes."""
    fixed_voxels: int = 1_000_000
    """Voxels where bins or classes vary."""
    fixed_bins: int = 20
    """Bins where voxels or classes vary."""
    fixed_classes: int = 4
    """Classes where voxels or bins vary."""
    least: int = 4_000_000
    """Voxels times classes in a sample. Smaller inputs are computed several times per sample: otherwise the sample
    would measure how long threads take to wake up."""
    rounds: int = 7
    """Timed rounds; each calls both programs."""
    warmup: int = 1
    """Untimed rounds before the timed ones."""
    out: Path = RESULTS / "scaling.json"
    """JSON file for the results; the plot is saved beside it as PNG."""

    def run(self) -> None:
        from benchmarks import scaling

        scaling.run(self)


@dataclass(frozen=True)
class Compiled:
    """Compile losses, training steps and an evaluation for GPUs and TPUs that need not be here; nothing is run.

    The results hold, of each program on each target: the seconds to compile; the bytes of temporaries, arguments
    and outputs on one device; the largest arrays that are written; the bytes accessed and the operations, where the
    compiler counts them; what the devices exchange. Each compilation has its own process. If the file exists, its
    other figures are kept.

        python -m benchmarks compiled --targets v5e:1x1 h100 --programs ace dice 'step(precision=bfloat16)'

    Programs: `ace` is mL1-ACE and its gradient; `dice` and `loss` are `segmentation_loss` of Dice alone and of
    Dice + cross-entropy + mL1-ACE, with the gradient; `bins`, `brier` and `nll` are bin statistics, Brier score and
    negative log-likelihood. These take arguments, as in `ace(binning=soft)` or `loss(focal=1)`. `step` is the
    training step of the paper's recipe, with the arguments network (unet, segresnet, unetr), precision, remat,
    accumulate and mesh; `windows` is the network on a group of windows of a volume; `statistics` are the bins and
    Dice of the volume. All but `step` take one device of a target.
    """

    targets: tuple[str, ...] = (
        "cpu",
        "cpu:8",
        "h100",
        "h100:8",
        "v5e:1x1",
        "v5e:2x4",
        "v5e:8x8",
        "v5e:16x16",
        "v5p:1x1x1",
        "v5p:2x2x2",
        "v6e:1x1",
        "v6e:2x4",
    )
    """Devices: cpu or cpu:8 (fake devices), h100 or h100:8, v5e:2x4, v5p:2x2x2, v6e:4x4 and so on."""
    programs: tuple[str, ...] = (
        "ace",
        "dice",
        "loss",
        "step",
        "step(remat=True)",
        "step(precision=bfloat16)",
        "step(precision=bfloat16,remat=True)",
        "step(precision=bfloat16,remat=True,accumulate=0)",
        "step(precision=bfloat16,mesh='data=1,fsdp')",
        "step(precision=bfloat16,mesh='space=2')",
        "step(network=segresnet,precision=bfloat16,remat=True)",
        "step(network=unetr,precision=bfloat16,remat=True)",
        "windows",
        "statistics",
    )
    """What to compile."""
    loss_shapes: tuple[str, ...] = ("4x3x48x64x48", "1x4x224x224x144")
    """Of losses and metrics: batch, classes, then voxels along each axis."""
    patch: tuple[int, ...] = (224, 224, 144)
    """Of step: voxels along each axis."""
    batch_size: int = 8
    """Of step: patches per step. On more devices, as many patches as devices."""
    shape: tuple[int, ...] = (240, 240, 155)
    """Of statistics: voxels along each axis of the volume."""
    eval_patch: tuple[int, ...] = (128, 128, 128)
    """Of windows and statistics: size of a window."""
    channels: int = 4
    """Of step and windows: channels of the image."""
    classes: int = 4
    """Of step, windows and statistics: classes, including the background."""
    limit_s: float = 1200.0
    """Seconds that one compilation may take; what takes longer is noted and left."""
    out: Path = RESULTS / "compiled.json"
    """JSON file for the results; their table is saved beside it as Markdown."""

    def __post_init__(self) -> None:
        for shape in self.loss_shapes:
            parse_shape(shape)

    def run(self) -> None:
        from benchmarks import compiled

        compiled.run(self)
