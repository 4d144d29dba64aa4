"""Configurations of runs: frozen dataclasses, whose fields are command-line options and are kept as JSON."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from train.data.augment_config import AugmentConfig
from train.data.geometry import Geometry
from train.errors import InputError, check_numbers
from train.models.registry import NetworkConfig, config_class
from train.plugins import is_external

if TYPE_CHECKING:
    from train.data import Dataset

IMPORTED = "imported"
"""Stands in place of the loss of an imported run, in its configuration and in tables."""
_DEFAULT: Any = None  # of `ModelConfig.network`: the default options of its architecture


@dataclass(frozen=True)
class DataConfig:
    """The data set, its split into training, validation and test cases, and its preprocessing."""

    data: str = "phantom"
    """phantom (embedded, 3-D), phantom2d, or LAYOUT:PATH, a folder of volumes: msd (Medical Segmentation
    Decathlon), nnunet, brats, acdc, amos, amos-ct (its CT scans) or kits; or of 2-D images such as PNG: msd,
    nnunet, png (with a folder of labels for each annotator) or bu-bil."""
    num_test: int | float = 40
    """Number of test cases, or their share if below 1. A subject's cases stay together."""
    num_val: int | float = 20
    """Number of validation cases, or their share if below 1."""
    subjects: str = ""
    """Regular expression that finds the subject in the name of a case, such as 'patient[0-9]+', where a subject has
    several cases. They stay together in splits and in intervals. Left out, the layout's: each case is a subject,
    except in acdc and brats."""
    split_seed: int = 0
    """Seed of the split."""
    splits: str = ""
    """File that names the cases of the split: splits.json of another run, or nnU-Net's splits_final.json or a MONAI
    datalist. Of these two --fold chooses a fold, whose held-out cases are the test cases."""
    protocol: str = ""
    """Published split: paper-brats, followup-brats, followup-acdc, followup-amos or followup-kits. If the data set
    lacks its test cases, num_test and num_val apply."""
    fold: int | None = None
    """Fold of --splits, counted from 0."""
    patch: tuple[int, ...] = ()
    """Voxels along each axis of a training patch; left out, the largest case rounded up to the network's strides,
    at most 128."""
    eval_patch: tuple[int, ...] = ()
    """Voxels along each axis of the sliding window of validation, evaluation and prediction; left out, the training
    patch."""
    channel_order: tuple[int, ...] = ()
    """Channels that the network gets, by their index in the data set, if each channel has its own file; left out,
    all in the data set's order. In brats: 0 FLAIR, 1 T1, 2 T1 with contrast, 3 T2."""
    intensities: tuple[float, float] | None = None
    """Lowest and highest intensity, such as -100 200 for CT. Values outside are clipped. Left out, the layout's."""
    label_values: tuple[int, ...] = ()
    """Value of each class in the label files, background first, such as 255 0 where 0 is the foreground; left out,
    the layout's."""
    spacing: tuple[float, ...] | Literal["median"] = ()
    """Millimetres between voxels (right, anterior, superior) after resampling, or median for the data set's median;
    left out, each scan keeps its own. 2-D images have a spacing of 1, so that 2 2 1 halves their sides. Evaluation
    and prediction use each scan's original grid."""
    interpolation: Literal["linear", "cubic"] = "linear"
    """Interpolation of intensities in resampling."""
    crop_margin: int | None = None
    """Voxels kept around the bounding box of a scan's foreground (non-zero voxels; in CT voxels above the lowest
    intensity). The rest is cropped. Left out, nothing is cropped."""
    annotators: Literal["first", "majority", "average", "random"] = "first"
    """Training label of a case with several annotators: the first, the majority, the average (share of each class),
    or an average with random weights for each patch. Evaluation uses the first with first, else the average."""
    foreground_crops: float = 0.0
    """Share of training patches that are centred on a random voxel of a random foreground class (0.33 in nnU-Net).
    Other patches lie anywhere; in a scan with ignored voxels, around a voxel with a label."""
    cache_dir: str = ""
    """Folder that keeps decoded and preprocessed volumes, uncompressed, for this and other runs. It may be deleted
    at any time. Left out, nothing is kept after the run."""
    loader_threads: int = 1
    """Threads that prepare batches ahead of training."""
    prefetch: int = 2
    """Largest number of batches that each thread holds."""

    def __post_init__(self) -> None:
        counts = ("num_test", "num_val", "split_seed", "fold", "channel_order")
        sizes = ("patch", "eval_patch", "loader_threads", "prefetch")
        limits = dict.fromkeys(counts, (0, math.inf)) | dict.fromkeys(sizes, (1, math.inf))
        check_numbers(self, foreground_crops=(0, 1), **limits)

    @property
    def has_soft_labels(self) -> bool:
        """Whether training labels are shares of classes instead of class ids."""
        return self.annotators in ("average", "random")

    @property
    def sliding_window(self) -> tuple[int, ...]:
        """The patch that the network sees in evaluation and prediction."""
        return self.eval_patch or self.patch

    @property
    def geometry(self) -> Geometry:
        """Cropping and resampling of the scans."""
        return Geometry(self.spacing, self.interpolation, self.crop_margin)


@dataclass(frozen=True)
class ModelConfig:
    """The network: what all architectures share, and the options of the chosen one."""

    architecture: str = "unet"
    """unet, segresnet (with --deep-supervision MONAI's SegResNetDS), unetr (a transformer, evaluated with the
    --patch that it was trained on), or a network of your own, package.module:factory(KEY=VALUE). The options below
    are those of the chosen network: --architecture NAME --help shows them."""
    activation: Literal["softmax", "sigmoid"] = "softmax"
    """softmax over all classes, background first; or a sigmoid for each region (for each foreground class of a data
    set without regions). Regions may overlap and have no background."""
    regions: tuple[str, ...] = ()
    """sigmoid: names of the regions, in the order of the network's output channels; left out, the data set's
    regions in its order."""
    dropout: float = 0.0
    """Dropout rate."""
    slices: bool = False
    """Apply a 2-D network to each slice of 3-D images along their last axis. A --patch whose last side is 1 holds
    single slices."""
    norm: Literal["", "instance", "affine-instance", "group", "batch"] = ""
    """Normalisation; left out, instance, for segresnet group (8 groups). batch is for imported weights: training
    leaves its means and variances as they are."""
    network: NetworkConfig = _DEFAULT

    def __post_init__(self) -> None:
        kind = config_class(self.architecture)
        if self.network is None:
            object.__setattr__(self, "network", kind())
        if type(self.network) is not kind:
            raise InputError(
                f"network is a {type(self.network).__name__}, but the architecture is {self.architecture}: give "
                f"a {kind.__name__}."
            )
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}: give a rate from 0 to below 1.")
        for name in ("norm", "dropout") if is_external(self.architecture) else ():
            if value := getattr(self, name):
                raise InputError(
                    f"{name} is {value}, but a network from outside takes no --{name}: make it an argument of the "
                    f"factory {self.architecture.partition('(')[0]}."
                )
        if self.regions and self.activation != "sigmoid":
            raise InputError(
                f"regions is {self.regions}, but the activation is {self.activation}: leave it out or choose "
                "--activation sigmoid."
            )


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
    """Learning rate after the warm-up."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises."""
    warmup_from: float = 0.0
    """Learning rate before the warm-up, as a share of the peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    clip_norm: float = 0.0
    """Largest global norm of the gradient; 0 does not clip."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, such as 0.999, which is evaluated and predicts instead
    of the newest weights; 0 for none."""
    ace_delay: float = 0.3
    """Share of the steps in which mL1-ACE has no weight."""
    ace_ramp: float = 0.1
    """Share of the steps over which mL1-ACE then rises to its full weight."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of convolutions and activations. Parameters, optimiser, norms' statistics and loss stay float32."""
    ignore_empty_classes: bool = False
    """mL1-ACE: a class without a voxel in an image counts as calibrated there."""
    seed: int = 0
    """Seed of weights, order of cases, crops and augmentation."""
    validate_every: int = 0
    """Steps between validations; 0 for four in a run."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 for one with each validation."""
    keep_best: Literal["none", "dice", "ace", "ece", "mce", "dice-ace"] = "none"
    """Keep the best checkpoint by this metric of the validation cases (dice-ace: Dice minus ACE) besides the newest
    ones. Every validation then makes a checkpoint."""

    def __post_init__(self) -> None:
        numbers = ("warmup_steps", "weight_decay", "clip_norm", "validate_every", "checkpoint_every")
        limits = dict.fromkeys(numbers, (0, math.inf)) | dict.fromkeys(("steps", "batch_size"), (1, math.inf))
        limits |= dict.fromkeys(("warmup_from", "ace_delay", "ace_ramp"), (0, 1))
        if not 0 <= self.ema < 1:
            raise InputError(f"ema is {self.ema}: give a decay from 0 (no average) to below 1.")
        check_numbers(self, seed=(0, 2**32 - 1), **limits)
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate is {self.learning_rate}: give a positive number.")
        if self.ace_delay + self.ace_ramp > 1 + 1e-9 or self.ace_delay == 1:
            raise InputError(
                f"ace_delay is {self.ace_delay} and ace_ramp {self.ace_ramp}, so that mL1-ACE never has its full "
                "weight: give shares of the steps whose sum is 1 or less, and a delay below 1."
            )

    def score(self, metrics: Mapping[str, float]) -> float:
        """The value of `keep_best`, with the sign that makes larger values better; -inf if it was not measured.

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
    """Devices, and how a step fits into their memory. Results depend on these options only in rounding, so they are
    not kept with the run, and a resumed run may choose others."""

    mesh: str = ""
    """Axes of the device mesh, as in data=2,space=2,fsdp=2: data splits the batch; space splits each volume along
    its first axis; fsdp splits the batch, parameters and optimiser. An axis without a size takes all remaining
    devices, by default data."""
    accumulate: int = 1
    """Parts of a batch that are processed one after the other to save memory; 0 for one patch of each device at a
    time."""
    remat: bool = False
    """Compute activations again in the backward pass instead of storing them, to save memory."""
    coordinator: str = ""
    """HOST:PORT of process 0, if several processes train together: start each with the same command and its own
    --process-id. auto, if SLURM, Open MPI or a TPU pod tells JAX all three values."""
    num_processes: int | None = None
    """Number of processes that train together."""
    process_id: int | None = None
    """Number of this process, from 0. Process 0 writes logs and pages."""

    def __post_init__(self) -> None:
        last = math.inf if self.num_processes is None else self.num_processes - 1
        limits = {"accumulate": (0, math.inf), "num_processes": (1, math.inf), "process_id": (0, last)}
        check_numbers(self, **limits)


@dataclass(frozen=True)
class RunConfig:
    """All options that decide the results of a run."""

    loss: str
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    init: str = ""  # folder of the run whose weights it starts from


@dataclass(frozen=True)
class DataInfo:
    """Properties of the data that a trained network needs. Prediction reads them from the run.

    A network with sigmoids that was imported without its data set has no `class_names`, only regions.
    """

    name: str
    class_names: tuple[str, ...]
    num_channels: int
    spatial_dims: int
    intensity_range: tuple[float, float] | None = None
    geometry: Geometry = field(default_factory=Geometry)

    @classmethod
    def of(cls, dataset: "Dataset") -> "DataInfo":
        """The properties of `dataset`."""
        return cls(**{field.name: getattr(dataset, field.name) for field in dataclasses.fields(cls)})


def check_same_data(data: str, found: DataInfo, run: Path, trained: DataInfo) -> None:
    """Raises `InputError` if `data` differs from what `run` was trained on in more than its name."""
    if not trained.class_names:
        found = dataclasses.replace(found, class_names=())
    for name, before in dataclasses.asdict(dataclasses.replace(trained, name=found.name)).items():
        if (now := dataclasses.asdict(found)[name]) != before:
            raise InputError(
                f"{data} has {name} = {now}, {run} was trained on {before}: they must be the same."
            )


def resolve_regions(model: ModelConfig, dataset: "Dataset") -> ModelConfig:
    """Names the region of each output channel of a network with sigmoids.

    Raises:
        InputError: if a region is named twice, or unknown in the data set.
    """
    if model.activation == "softmax":
        return model
    from train.data.case import region_ids

    known = tuple(region_ids(dataset))
    regions = model.regions or known
    if len(set(regions)) < len(regions) or not set(regions) <= set(known):
        raise InputError(
            f"The network's regions are {', '.join(regions)}, {dataset.name} has {', '.join(known)}: name each "
            "output channel's region once, as the data set calls it."
        )
    return dataclasses.replace(model, regions=regions)


def resolve_patch(
    patch: Sequence[int], largest_shape: Sequence[int], divisors: Sequence[int], *, option: str = "patch"
) -> tuple[int, ...]:
    """Checks a patch. An empty one becomes the smallest that holds every case, at most 128 along each axis.

    Raises:
        InputError: if the patch has another rank than the data, or the network's strides do not divide it.

    Example:
        >>> resolve_patch((), (41, 59, 46), (8, 8, 8))
        (48, 64, 48)
    """
    if not patch:
        return tuple(
            min(-(-size // divisor) * divisor, 128 // divisor * divisor or divisor)
            for size, divisor in zip(largest_shape, divisors, strict=True)
        )
    if len(patch) != len(largest_shape):
        raise InputError(
            f"{option} {tuple(patch)} has {len(patch)} sides, the data {len(largest_shape)} axes: give as many."
        )
    sides = list(zip(patch, divisors, strict=True))
    if any(size < 1 or size % divisor for size, divisor in sides):
        fitting = tuple(max(1, round(size / divisor)) * divisor for size, divisor in sides)
        raise InputError(
            f"{option} {tuple(patch)} is not divided by the network's strides, whose products along the axes are "
            f"{tuple(divisors)}; {fitting} would be."
        )
    return tuple(patch)


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(kind: Any, values: dict[str, Any]) -> Any:
    """The instance of `kind` that `to_json` wrote. Options that did not exist then have their defaults."""
    if not isinstance(values, dict):
        raise TypeError(f"a {type(values).__name__} in place of options")
    values = _of_today(kind, values)
    known = [f for f in dataclasses.fields(kind) if f.name in values]
    return kind(**{f.name: _restore(f.type, values[f.name]) for f in known})


def _of_today(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The values of a configuration under the names that they have today."""
    if kind is ModelConfig:
        architecture = values.get("architecture", ModelConfig.architecture)
        # Version 0.1 kept the options of all networks beside one another.
        network = from_json(config_class(architecture), values.get("network", values))
        return {**values, "network": network}
    if kind is DataInfo and "window" in values:  # version 0.1
        return {**values, "intensity_range": values["window"]}
    return values


def _restore(kind: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(kind) and not dataclasses.is_dataclass(value):
        return from_json(kind, value)
    return tuple(value) if isinstance(value, list) else value


def read_config(folder: Path) -> tuple[RunConfig, DataInfo]:
    """The configuration of the run in `folder`, and the properties of its data.

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
        raise InputError(f"{file} holds an impossible option: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is not a run's configuration ({type(error).__name__}: {error}).") from error
