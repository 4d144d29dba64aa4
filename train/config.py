"""What a run is made of. Typed, frozen, kept with the run as JSON."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

from train.data import AugmentConfig, Dataset, Geometry, region_ids
from train.errors import InputError, check_numbers

IMPORTED = "imported"
"""What stands in place of a loss in the configuration of an imported run, and as its name in tables."""


@dataclass(frozen=True)
class DataConfig:
    """Where cases come from and who trains, validates and tests."""

    data: str = "phantom"
    """phantom (embedded, 3-D), phantom2d, or LAYOUT:PATH, a folder of volumes: msd (Medical Segmentation
    Decathlon), nnunet, brats, acdc, amos, amos-ct (its CT scans) or kits."""
    num_test: int | float = 40
    """Cases held back as test, or their share if below 1. A subject's cases stay together."""
    num_val: int | float = 20
    """Cases held back for validation, or their share."""
    split_seed: int = 0
    """Which cases; the same seed gives the same split."""
    splits: str = ""
    """File that names the cases instead: splits.json of another run, or nnU-Net's splits_final.json or a MONAI
    datalist with --fold, whose held-out cases are then the test cases."""
    protocol: str = ""
    """Published split, which stands before the counts above wherever the data has its test cases: paper-brats,
    followup-brats, followup-acdc, followup-amos or followup-kits."""
    fold: int | None = None
    """Which fold of --splits, counted from 0."""
    patch: tuple[int, ...] = ()
    """Voxels along each axis that the network sees at once; left out, the largest case rounded up to the
    network's strides, 128 at most."""
    eval_patch: tuple[int, ...] = ()
    """The same for validation, evaluation and prediction, which see larger volumes through such windows; left out,
    the training patch."""
    channel_order: tuple[int, ...] = ()
    """Channels that the network gets, by their place in the data set, where each has its own file; left out, all
    as they come. In brats: 0 FLAIR, 1 T1, 2 T1 with contrast, 3 T2."""
    intensities: tuple[float, float] | None = None
    """Range that intensities are cut off to, as -100 200 for CT; left out, what the layout is known by."""
    spacing: tuple[float, ...] | Literal["median"] = ()
    """Millimetres between voxels (right, anterior, superior) that scans are resampled to, or median for that of
    the data set; left out, each keeps its own. Evaluated and predicted are the scans' own grids all the same."""
    interpolation: Literal["linear", "cubic"] = "linear"
    """Of intensities, when resampling."""
    crop_margin: int | None = None
    """Crops scans to the box of their foreground (non-zero voxels; in CT those above the lowest intensity) and
    this many voxels around it; left out, nothing is cropped."""
    annotators: Literal["first", "average", "random"] = "first"
    """Where a case has several labels: train on the first, on the share of each class among them, or on their
    average with random weights drawn anew for each patch. But for first, evaluation is by the plain shares."""
    foreground_crops: float = 0.0
    """Share of the training patches that are centred on a random voxel of a random foreground class (0.33 in
    nnU-Net); the others lie anywhere, or in a scan with ignored voxels around one that has a label."""
    cache_dir: str = ""
    """Folder in which decoded and preprocessed volumes are kept, for this and other runs. It takes as much as they
    do uncompressed, and may be deleted at any time; left out, nothing is kept beyond the run."""
    loader_threads: int = 1
    """Threads that read and cut batches ahead of the training."""
    prefetch: int = 2
    """Batches that each of them has ready or in work, at most."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            num_test=(0, math.inf),
            num_val=(0, math.inf),
            split_seed=(0, math.inf),
            fold=(0, math.inf),
            patch=(1, math.inf),
            eval_patch=(1, math.inf),
            channel_order=(0, math.inf),
            foreground_crops=(0, 1),
            loader_threads=(1, math.inf),
            prefetch=(1, math.inf),
        )

    @property
    def sliding_window(self) -> tuple[int, ...]:
        """What the network sees at once in evaluation."""
        return self.eval_patch or self.patch

    @property
    def geometry(self) -> Geometry:
        """What is done to the grids of the scans."""
        return Geometry(self.spacing, self.interpolation, self.crop_margin)


@dataclass(frozen=True)
class ModelConfig:
    """The network. Defaults of the U-Net are the paper's, those of the others MONAI's."""

    architecture: Literal["unet", "segresnet", "unetr"] = "unet"
    """unet, segresnet (with --deep-supervision MONAI's SegResNetDS), or unetr, a transformer, which sees
    patches of one size only: it is evaluated through windows of the --patch that it was trained on."""
    activation: Literal["softmax", "sigmoid"] = "softmax"
    """What makes probabilities of the outputs: softmax over all classes, background first; or a sigmoid for each
    region (of a data set without regions, each foreground class), which may overlap and has no background."""
    regions: tuple[str, ...] = ()
    """sigmoid: the regions by name, in the order of the network's output channels; left out, those of the data set
    in its order."""
    dropout: float = 0.0
    """Dropout rate."""
    norm: Literal["", "instance", "affine-instance", "group", "batch"] = ""
    """Normalisation; left out, instance, and for segresnet groups of channels (8 of them). batch is for imported
    weights: their means and variances, which training leaves as they are."""
    channels: tuple[int, ...] = (8, 16, 32, 64)
    """unet: channels of each level."""
    strides: tuple[int, ...] = (2, 2, 2)
    """unet: stride between levels."""
    num_res_units: int = 2
    """unet: convolutions in a residual unit; 0 for plain ones."""
    init_filters: int = 8
    """segresnet: channels of the finest level, doubled at each further one."""
    blocks_down: tuple[int, ...] = (1, 2, 2, 4)
    """segresnet: residual blocks of each level on the way down."""
    blocks_up: tuple[int, ...] = ()
    """segresnet: the same on the way up, the coarsest first; left out, one at each level."""
    deep_supervision: int = 0
    """segresnet: levels whose logits are trained, weighted 1, 1/2, 1/4, ...; 1 or more make it MONAI's
    SegResNetDS."""
    feature_size: int = 16
    """unetr: channels of the finest level."""
    hidden_size: int = 768
    """unetr: channels of a token."""
    mlp_dim: int = 3072
    """unetr: channels inside a transformer block's perceptron."""
    num_heads: int = 12
    """unetr: heads of attention."""

    def __post_init__(self) -> None:
        sizes = (
            "channels",
            "init_filters",
            "blocks_down",
            "blocks_up",
            "feature_size",
            "hidden_size",
            "mlp_dim",
        )
        limits = dict.fromkeys((*sizes, "num_heads"), (1, math.inf))
        check_numbers(self, num_res_units=(0, math.inf), deep_supervision=(0, math.inf), **limits)
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}: give a rate from 0 to below 1.")

    @property
    def divisor(self) -> int:
        """What every side of a patch must be a multiple of."""
        if self.architecture == "segresnet":
            return 2 ** (len(self.blocks_down) - 1)
        return 16 if self.architecture == "unetr" else prod(self.strides)

    def check(self) -> None:
        """Raises `InputError` on options that exclude one another, and on strides that are none."""
        for owner, options in ARCHITECTURE_OPTIONS.items():
            for option in options if owner != self.architecture else ():
                if getattr(self, option) != getattr(ModelConfig, option):
                    raise InputError(
                        f"{option} is an option of {owner}, but the architecture is {self.architecture}: leave it "
                        f"out or choose --architecture {owner}."
                    )
        if self.regions and self.activation != "sigmoid":
            raise InputError(
                f"regions is {self.regions}, but the activation is {self.activation}: leave it out or choose "
                "--activation sigmoid."
            )
        if len(self.strides) != len(self.channels) - 1 or min(self.strides) < 1:
            raise InputError(
                f"strides {self.strides} do not fit channels {self.channels}: "
                "give one stride, 1 or more, between each two levels."
            )


# Options that only one architecture has.
ARCHITECTURE_OPTIONS = {
    "unet": ("channels", "strides", "num_res_units"),
    "segresnet": ("init_filters", "blocks_down", "blocks_up", "deep_supervision"),
    "unetr": ("feature_size", "hidden_size", "mlp_dim", "num_heads"),
}


@dataclass(frozen=True)
class TrainingConfig:
    """How the network is trained."""

    steps: int = 800
    """Optimiser steps."""
    batch_size: int = 4
    """Patches per step, over all devices."""
    learning_rate: float = 5e-3
    """Peak of the learning rate (Adam)."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises."""
    warmup_from: float = 0.0
    """Share of the peak that it rises from."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    clip_norm: float = 0.0
    """Largest global norm of the gradient; 0 does not clip."""
    ace_delay: float = 0.3
    """Share of the steps before mL1-ACE sets in."""
    ace_ramp: float = 0.1
    """Share of the steps over which its weight then rises to its full value."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of convolutions and activations; parameters, optimiser, statistics of norms and the loss stay float32."""
    ignore_empty_classes: bool = False
    """mL1-ACE: classes that an image has no voxel of count as calibrated."""
    seed: int = 0
    """Seed of weights, order of cases, crops and augmentation."""
    validate_every: int = 0
    """Steps between validations; 0 for four in a run."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 for one with each validation."""
    keep_best: Literal["none", "dice", "ace", "ece", "mce", "dice-ace"] = "none"
    """Besides the newest checkpoints keep the best by this metric of the validation cases (dice-ace: Dice minus
    ACE); every validation then makes a checkpoint."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            steps=(1, math.inf),
            batch_size=(1, math.inf),
            warmup_steps=(0, math.inf),
            warmup_from=(0, 1),
            weight_decay=(0, math.inf),
            clip_norm=(0, math.inf),
            ace_delay=(0, 1),
            ace_ramp=(0, 1),
            seed=(0, 2**32 - 1),
            validate_every=(0, math.inf),
            checkpoint_every=(0, math.inf),
        )
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate is {self.learning_rate}: give a positive number.")
        if self.ace_delay + self.ace_ramp > 1 + 1e-9 or self.ace_delay == 1:
            raise InputError(
                f"ace_delay is {self.ace_delay} and ace_ramp {self.ace_ramp}, so that mL1-ACE never has its full "
                "weight: give shares of the steps whose sum is 1 or less, and a delay below 1."
            )

    def score(self, metrics: Mapping[str, float]) -> float:
        """How good a network is by `keep_best`, more being better; -inf where that was not measured.

        Example:
            >>> round(TrainingConfig(keep_best="dice-ace").score({"Dice": 0.8, "ACE": 0.1}), 3)
            0.7
        """
        signed = {"dice": 1, "ace": -1, "ece": -1, "mce": -1}
        known = {name.lower(): value for name, value in metrics.items()}
        score = sum(signed[name] * known.get(name, math.nan) for name in self.keep_best.split("-"))
        return -math.inf if math.isnan(score) else score


@dataclass(frozen=True)
class DeviceConfig:
    """What a run is computed on, and how it fits there. None of this changes its numbers beyond their rounding, so
    it is not kept with the run: one that is resumed may choose anew."""

    mesh: str = ""
    """How all devices share the work, as in data=2,space=2,fsdp=2: data splits the batch, space each volume along
    its first axis, fsdp the batch and also parameters and optimiser. An axis without a size takes the devices that
    are left; default: data does."""
    accumulate: int = 1
    """Parts in which a batch is taken one after the other, to save memory; 0 for as many as leave each device one
    patch at a time."""
    remat: bool = False
    """Compute activations again in the backward pass instead of keeping them, to save memory."""
    coordinator: str = ""
    """HOST:PORT of process 0 where several processes train as one, each started with this same command but for its
    --process-id; or auto, where SLURM, Open MPI or a TPU pod tells JAX all three."""
    num_processes: int | None = None
    """How many processes train as one."""
    process_id: int | None = None
    """Which of them this one is, from 0 on; only 0 writes logs and pages."""

    def __post_init__(self) -> None:
        last = math.inf if self.num_processes is None else self.num_processes - 1
        limits = {"accumulate": (0, math.inf), "num_processes": (1, math.inf), "process_id": (0, last)}
        check_numbers(self, **limits)


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes."""

    loss: str
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    init: str = ""  # folder of the run whose weights it starts from

    def __post_init__(self) -> None:
        self.model.check()


@dataclass(frozen=True)
class DataInfo:
    """What a trained network has to know of its data, kept with the run so that predicting needs no data set.

    A network with sigmoids that was imported without its data set has no `class_names`: only its regions are known.
    """

    name: str
    class_names: tuple[str, ...]
    num_channels: int
    spatial_dims: int
    window: tuple[float, float] | None = None
    geometry: Geometry = field(default_factory=Geometry)

    @classmethod
    def of(cls, dataset: Dataset) -> "DataInfo":
        """What is to be kept of `dataset`."""
        return cls(
            dataset.name,
            dataset.class_names,
            dataset.num_channels,
            dataset.spatial_dims,
            dataset.intensity_range,
            dataset.geometry,
        )


def check_same_data(data: str, found: DataInfo, run: Path, trained: DataInfo) -> None:
    """Raises `InputError` unless `data` has what the network of `run` was trained on, whatever its name."""
    if not trained.class_names:
        found = dataclasses.replace(found, class_names=())
    for name, before in dataclasses.asdict(dataclasses.replace(trained, name=found.name)).items():
        if (now := dataclasses.asdict(found)[name]) != before:
            raise InputError(
                f"{data} has {name} = {now}, {run} was trained on {before}: they must be the same."
            )


def resolve_regions(model: ModelConfig, dataset: Dataset) -> ModelConfig:
    """`model` with the regions of its output channels named, if it has sigmoids.

    Raises:
        InputError: a region twice, or one that the data set does not have.
    """
    if model.activation == "softmax":
        return model
    known = tuple(region_ids(dataset))
    regions = model.regions or known
    if len(set(regions)) < len(regions) or not set(regions) <= set(known):
        raise InputError(
            f"The network's regions are {', '.join(regions)}, {dataset.name} has {', '.join(known)}: name each "
            "output channel's region once, as the data set calls it."
        )
    return dataclasses.replace(model, regions=regions)


def resolve_patch(
    patch: Sequence[int], largest_shape: Sequence[int], divisor: int, *, option: str = "patch"
) -> tuple[int, ...]:
    """The patch asked for, checked, or the smallest that holds every case, 128 at most along each axis.

    Raises:
        InputError: if it has another rank than the data or the network's strides do not divide it.

    Example:
        >>> resolve_patch((), (41, 59, 46), 8)
        (48, 64, 48)
    """
    if not patch:
        most = 128 // divisor * divisor or divisor
        return tuple(min(-(-size // divisor) * divisor, most) for size in largest_shape)
    if len(patch) != len(largest_shape):
        raise InputError(
            f"{option} {tuple(patch)} has {len(patch)} sides, the data {len(largest_shape)} axes."
        )
    if any(size < 1 or size % divisor for size in patch):
        fitting = tuple(max(1, round(size / divisor)) * divisor for size in patch)
        raise InputError(
            f"{option} {tuple(patch)} is not divided by the network's strides, whose product is {divisor}; "
            f"{fitting} would be."
        )
    return tuple(patch)


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(kind: Any, values: dict[str, Any]) -> Any:
    """The configuration that `to_json` wrote, an instance of `kind`; newer options keep their defaults."""
    if not isinstance(values, dict):
        raise TypeError(f"a {type(values).__name__} in place of options")
    known = [f for f in dataclasses.fields(kind) if f.name in values]
    return kind(**{f.name: _restore(f.type, values[f.name]) for f in known})


def _restore(kind: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        return from_json(kind, value)
    return tuple(value) if isinstance(value, list) else value


def read_config(folder: Path) -> tuple[RunConfig, DataInfo]:
    """The configuration of the run in `folder`, and what it knows of its data.

    Raises:
        InputError: if there is none, or it cannot be read.
    """
    file = folder / "config.json"
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return from_json(RunConfig, kept["config"]), from_json(DataInfo, kept["data"])
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no run: {file} does not exist.") from error
    except InputError as error:
        raise InputError(f"{file} holds an option that cannot be: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is not a run's configuration ({type(error).__name__}: {error}).") from error
