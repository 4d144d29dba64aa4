"""Published experiments as configurations: `python -m train fit --recipe paper_brats_dice_ace --data brats:PATH`.

A recipe holds the configuration of a run, the published figures, and what this trainer does otherwise.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from train.config import DataConfig, DeviceConfig, ModelConfig, RunConfig, TrainingConfig
from train.data.augment_config import AugmentConfig
from train.errors import InputError
from train.models.segresnet_config import SegResNetConfig
from train.published import Row, to_markdown


@dataclass(frozen=True)
class Source:
    """Where an experiment was published."""

    label: str
    paper: str
    repository: str


@dataclass(frozen=True)
class Recipe:
    """A published experiment.

    Attributes:
        name: what it reproduces.
        source: where it was published.
        layout: layout of the data, as in `--data LAYOUT:PATH`.
        config: configuration of the run.
        devices: how a step fits into memory; the results do not depend on it.
        published: figures of the test cases.
        differs: what this trainer does otherwise than the source.
    """

    name: str
    source: Source
    layout: str
    config: RunConfig
    devices: DeviceConfig
    published: tuple[Row, ...]
    differs: tuple[str, ...]

    @property
    def command(self) -> str:
        """The command that trains and evaluates it."""
        temperature = " --temperature" if len(self.published) > 1 else ""
        return f"python -m train fit --recipe {self.name} --data {self.layout}:PATH{temperature}"


PAPER = Source(
    "Barfoot et al. 2024",
    "Average Calibration Error: A Differentiable Loss for Improved Reliability in Image Segmentation, "
    "arXiv 2403.06759",
    "github.com/cai4cai/ACE-DLIRIS",
)
FOLLOWUP = Source(
    "Barfoot et al. 2025", "the follow-up, arXiv 2506.03942", "github.com/cai4cai/Average-Calibration-Losses"
)

_LOSSES = {
    "ce": "ce",
    "ce_ace": "0.5*ce+0.5*ace",
    "dice": "dice",
    "dice_ace": "0.5*dice+0.5*ace",
    "dice_ce": "dice+ce",
    "dice_ce_ace": "0.33*dice+0.33*ce+0.33*ace",
    "dice_ce_softace": "0.33*dice+0.33*ce+0.33*softace",
}
# Published mean and standard deviation over cases of each metric; +T is with temperature scaling.
_FILE = Path(__file__).with_suffix(".csv")
_FIGURES = {name: figures for name, *figures in csv.reader(_FILE.read_text(encoding="utf-8").splitlines())}

# The test and validation cases of a data set without the published test cases.
_SPLIT = DataConfig(num_test=0.2, num_val=0.1)
_BRATS_DATA = replace(
    _SPLIT,
    patch=(224, 224, 144),
    eval_patch=(240, 240, 160),
    channel_order=(1, 2, 3, 0),  # t1, t1ce, t2, flair
)
_CROPPED = replace(_SPLIT, crop_margin=0, foreground_crops=0.5)
_BRATS_AUGMENT = AugmentConfig(
    zoom_prob=0.3,
    rotation_prob=0.3,
    smooth_prob=0.2,
    gamma_prob=0.3,
    gamma=(0.7, 1.5),
    intensity_prob=0.0,
    noise_prob=0.2,
)
_AFFINE = AugmentConfig(
    flip_prob=0.0,
    zoom_prob=0.5,
    zoom=(0.9, 1.1),
    rotation_prob=0.5,
    rotation=5.73,  # 0.1 rad
    gamma_prob=0.0,
    intensity_prob=0.0,
    noise_prob=0.0,
)
_BRATS_DIFFERS = (
    "intensities are normalised before the augmentation, not after it; exponents of gamma are drawn on a "
    "logarithmic scale",
)
_AFFINE_DIFFERS = (
    "no shear; shifts of at most 0.1 voxel are left out",
    "zoom and rotation are drawn independently, where one chance of 0.5 governed both",
    "half of the crops are centred on foreground, on each class equally often; the other half lies anywhere",
    "evaluation uses the scans' original grids, where theirs used the resampled ones",
)
_FOLLOWUP_DIFFERS = (
    "the denominator of Dice sums probabilities, where theirs sums squares; the numerator is smoothed too, where "
    "theirs smooths the denominator alone",
)
_CT_DIFFERS = (
    "clipped intensities are z-scored instead of scaled to 0 to 1",
    "a step's 8 patches come from 8 cases, where theirs took 4 patches from each of 2 cases",
)
_SEGRESNET = ModelConfig(
    "segresnet",
    norm="affine-instance",
    network=SegResNetConfig(init_filters=32, blocks_down=(1, 2, 2, 4, 4), deep_supervision=4),
)


def _recipes(
    source: Source, experiment: str, data_set: str, cases: int, layout: str, config: RunConfig, *differs: str
) -> Iterator[Recipe]:
    """An experiment under each loss that `_FIGURES` has for its data set."""
    config = replace(config, data=replace(config.data, data=f"{layout}:PATH"))
    # With one patch of each device at a time, the step of the whole batch fits into 20 GiB.
    devices = DeviceConfig(accumulate=0)
    for losses, loss in _LOSSES.items():
        name = data_set + losses
        rows = []
        for row in (name, f"{name}+T"):
            if row in _FIGURES:
                numbers = map(float, _FIGURES[row])
                rows.append(Row(f"{source.label}, {row}", cases, tuple(zip(numbers, numbers, strict=True))))
        if rows:
            config = replace(config, loss=loss)
            yield Recipe(f"{experiment}_{name}", source, layout, config, devices, tuple(rows), differs)


def _followup(
    data_set: str,
    layout: str,
    cases: int,
    data: DataConfig,
    augment: AugmentConfig,
    *differs: str,
    batch_size: int,
    learning_rate: float,
    epochs: int,
    epoch: int,
) -> Iterator[Recipe]:
    """The follow-up's SegResNet with deep supervision on a data set. `epoch` is the number of steps in an epoch."""
    training = TrainingConfig(
        steps=epochs * epoch,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=2 * epoch,
        warmup_from=0.5,
        weight_decay=1e-5,
        ace_delay=0.0,
        ace_ramp=0.0,
        precision="bfloat16",
        ignore_empty_classes=True,
        seed=12345,
        validate_every=10 * epoch,
        keep_best="dice",
    )
    config = RunConfig("", replace(data, protocol=f"followup-{data_set}"), _SEGRESNET, training, augment)
    differs = (*differs, *_FOLLOWUP_DIFFERS)
    return _recipes(FOLLOWUP, "followup", f"{data_set}_", cases, layout, config, *differs)


# The paper's U-Net on BraTS 2021. An epoch has 16 steps.
_PAPER_CONFIG = RunConfig(
    "",
    data=replace(_BRATS_DATA, protocol="paper-brats"),
    training=TrainingConfig(
        steps=1000 * 16,
        batch_size=8,
        learning_rate=1e-3,
        schedule="constant",
        warmup_steps=0,
        ace_delay=0.0,
        ace_ramp=0.0,
        validate_every=10 * 16,
        keep_best="dice",
    ),
    augment=_BRATS_AUGMENT,
)
_ALL = (
    *_recipes(PAPER, "paper_brats", "", 200, "brats", _PAPER_CONFIG, *_BRATS_DIFFERS),
    *_followup(
        "acdc",
        "acdc",
        100,
        replace(_CROPPED, patch=(256, 256, 16), spacing=(1.0, 1.0, 5.0)),
        _AFFINE,
        *_AFFINE_DIFFERS,
        batch_size=2,
        learning_rate=2e-4,
        epochs=600,
        epoch=90,  # 180 frames
    ),
    *_followup(
        "amos",
        "amos-ct",
        100,
        replace(
            _CROPPED,
            patch=(176, 176, 64),
            eval_patch=(192, 192, 64),
            spacing=(1.0, 1.0, 5.0),
            intensities=(-100.0, 200.0),
        ),
        _AFFINE,
        *_AFFINE_DIFFERS,
        *_CT_DIFFERS,
        batch_size=8,
        learning_rate=2e-4,
        epochs=600,
        epoch=90,  # 180 cases, 2 a step
    ),
    *_followup(
        "kits",
        "kits",
        98,
        replace(
            _CROPPED,
            patch=(128, 128, 128),
            eval_patch=(256, 256, 256),
            spacing=(1.0, 1.0, 1.0),
            intensities=(-54.0, 242.0),
        ),
        _AFFINE,
        *_AFFINE_DIFFERS,
        *_CT_DIFFERS,
        batch_size=8,
        learning_rate=1e-4,
        epochs=1250,
        epoch=176,  # 352 cases, 2 a step
    ),
    *_followup(
        "brats",
        "brats",
        200,
        _BRATS_DATA,
        _BRATS_AUGMENT,
        *_BRATS_DIFFERS,
        batch_size=2,
        learning_rate=1e-4,
        epochs=1250,
        epoch=128,
    ),
)
RECIPES = {recipe.name: recipe for recipe in _ALL}


def find_recipe(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        InputError: if there is none.
    """
    if name not in RECIPES:
        raise InputError(f"There is no recipe {name!r}: give one of {', '.join(RECIPES)}.")
    return RECIPES[name]


def describe(recipes: Sequence[Recipe]) -> str:
    """Source, command, settings, published figures and differences of each recipe, as text."""
    texts = []
    for recipe in recipes:
        config, training = recipe.config, recipe.config.training
        lines = [
            recipe.name,
            f"  source    {recipe.source.paper}; {recipe.source.repository}",
            f"  command   {recipe.command}",
            f"  settings  {config.model.architecture}, {config.loss}, {training.steps} steps of "
            f"{training.batch_size} patches of {'x'.join(map(str, config.data.patch))}, learning rate "
            f"{training.learning_rate:g} ({training.schedule}), split {config.data.protocol}",
            *(f"  differs   {text}" for text in recipe.differs),
            *(f"  {line}" for line in to_markdown(recipe.published).splitlines()),
        ]
        texts.append("\n".join(lines))
    return "\n\n".join(texts)
