"""Published experiments as configurations: `python -m train fit --recipe paper_brats_dice_ace --data brats:PATH`.

A recipe is a run's configuration with the figures that it was published with, and what of it this trainer does
otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from train.config import DataConfig, DeviceConfig, ModelConfig, RunConfig, TrainingConfig
from train.data import AugmentConfig
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
        layout: of the data, as in `--data LAYOUT:PATH`.
        config: of the run.
        devices: how a step fits into memory, with the same numbers.
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
        """Trains and evaluates it."""
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

# Dice, ACE, ECE, MCE, each mean and standard deviation over cases; in the paper also with temperature scaling (T).
_PAPER_LOSSES = {
    "ce": "ce",
    "ce_ace": "0.5*ce+0.5*ace",
    "dice": "dice",
    "dice_ace": "0.5*dice+0.5*ace",
    "dice_ce": "dice+ce",
    "dice_ce_ace": "0.33*dice+0.33*ce+0.33*ace",
}
_PAPER_CASES = 200
_PAPER_FIGURES = {
    "ce": "0.8644 0.1348 0.1325 0.0640 0.0007 0.0008 0.2545 0.1241",
    "ce+T": "0.8624 0.1349 0.1405 0.0464 0.0012 0.0007 0.2772 0.0999",
    "ce_ace": "0.8423 0.1472 0.1225 0.0736 0.0007 0.0007 0.2336 0.1434",
    "ce_ace+T": "0.8420 0.1475 0.1187 0.0543 0.0037 0.0006 0.2290 0.1131",
    "dice": "0.8679 0.1420 0.2468 0.0501 0.0009 0.0011 0.5827 0.1098",
    "dice+T": "0.8679 0.1420 0.2352 0.0528 0.0009 0.0011 0.5502 0.1140",
    "dice_ace": "0.8658 0.1345 0.1367 0.0694 0.0006 0.0007 0.2708 0.1327",
    "dice_ace+T": "0.8658 0.1344 0.1213 0.0626 0.0007 0.0006 0.2308 0.1163",
    "dice_ce": "0.8780 0.1306 0.1952 0.0617 0.0007 0.0009 0.4289 0.1338",
    "dice_ce+T": "0.8781 0.1305 0.1718 0.0672 0.0006 0.0008 0.3598 0.1411",
    "dice_ce_ace": "0.8523 0.1592 0.1380 0.0799 0.0007 0.0010 0.2662 0.1500",
    "dice_ce_ace+T": "0.8524 0.1591 0.1273 0.0710 0.0008 0.0009 0.2412 0.1305",
}
_FOLLOWUP_LOSSES = {
    "dice_ce": "dice+ce",
    "dice_ce_ace": "0.33*dice+0.33*ce+0.33*ace",
    "dice_ce_softace": "0.33*dice+0.33*ce+0.33*softace",
}
_FOLLOWUP_CASES = {"acdc": 100, "amos": 100, "kits": 98, "brats": 200}
_FOLLOWUP_FIGURES = {
    "acdc_dice_ce": "0.8804 0.0429 0.1310 0.0304 0.0016 0.0007 0.2840 0.0654",
    "acdc_dice_ce_ace": "0.8804 0.0348 0.1018 0.0317 0.0013 0.0006 0.2173 0.0666",
    "acdc_dice_ce_softace": "0.8705 0.0418 0.0776 0.0304 0.0011 0.0006 0.1572 0.0536",
    "amos_dice_ce": "0.8828 0.0444 0.1066 0.0249 0.0002 0.0002 0.2379 0.0524",
    "amos_dice_ce_ace": "0.8810 0.0466 0.1033 0.0266 0.0002 0.0002 0.2291 0.0554",
    "amos_dice_ce_softace": "0.8770 0.0429 0.0869 0.0221 0.0002 0.0002 0.1909 0.0422",
    "kits_dice_ce": "0.8588 0.1444 0.1644 0.0755 0.0015 0.0066 0.3219 0.1329",
    "kits_dice_ce_ace": "0.8634 0.1306 0.1305 0.0660 0.0008 0.0010 0.2398 0.1191",
    "kits_dice_ce_softace": "0.8598 0.1303 0.1089 0.0680 0.0016 0.0063 0.2006 0.1228",
    "brats_dice_ce": "0.9054 0.1070 0.1456 0.0700 0.0005 0.0006 0.2870 0.1298",
    "brats_dice_ce_ace": "0.9051 0.1123 0.1318 0.0640 0.0005 0.0008 0.2584 0.1213",
    "brats_dice_ce_softace": "0.8878 0.1271 0.1021 0.0600 0.0005 0.0007 0.1990 0.1112",
}

# One patch of each device at a time: the step of the whole batch fits into 20 GiB, with the same numbers.
_DEVICES = DeviceConfig(accumulate=0)
# Where a folder lacks the published test cases, as one of a few cases of one's own.
_NUM_TEST, _NUM_VAL = 0.2, 0.1
_BRATS_DATA = DataConfig(
    data="brats:PATH",
    patch=(224, 224, 144),
    eval_patch=(240, 240, 160),
    channel_order=(1, 2, 3, 0),  # t1, t1ce, t2, flair
    num_test=_NUM_TEST,
    num_val=_NUM_VAL,
)
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
    "zoom and rotation are drawn each on its own, where one chance of 0.5 governed both",
    "crops centred on foreground take each class as often as the others; the other half lies anywhere",
    "evaluation is on the scans' own grids, where theirs was on the resampled ones",
)
_FOLLOWUP_DIFFERS = (
    "Dice has plain sums below the line, theirs sums of squares; it is smoothed above and below it, theirs below",
)
_CT_DIFFERS = (
    "intensities cut off to the range are z-scored instead of scaled to 0 to 1",
    "a step's 8 patches come from 8 cases, where theirs were 4 each of 2",
)


def _rows(source: Source, name: str, cases: int, figures: dict[str, str]) -> tuple[Row, ...]:
    """The published rows of an experiment, the one with temperature scaling last."""
    found = [(ending, figures[name + ending]) for ending in ("", "+T") if name + ending in figures]
    return tuple(Row(f"{source.label}, {name}{ending}", cases, _pairs(text)) for ending, text in found)


def _pairs(text: str) -> tuple[tuple[float, float], ...]:
    numbers = [float(number) for number in text.split()]
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def _paper(losses: str) -> Recipe:
    """The paper's U-Net on BraTS 2021 under one of its six losses."""
    epoch = 16  # steps
    config = RunConfig(
        _PAPER_LOSSES[losses],
        data=replace(_BRATS_DATA, protocol="paper-brats"),
        training=TrainingConfig(
            steps=1000 * epoch,
            batch_size=8,
            learning_rate=1e-3,
            schedule="constant",
            warmup_steps=0,
            ace_delay=0.0,
            ace_ramp=0.0,
            validate_every=10 * epoch,
            keep_best="dice",
        ),
        augment=_BRATS_AUGMENT,
    )
    published = _rows(PAPER, losses, _PAPER_CASES, _PAPER_FIGURES)
    return Recipe(f"paper_brats_{losses}", PAPER, "brats", config, _DEVICES, published, _BRATS_DIFFERS)


@dataclass(frozen=True)
class _DataSet:
    """What the follow-up did alike under all losses on a data set; an epoch's steps are those of its own count."""

    layout: str
    data: DataConfig
    augment: AugmentConfig
    batch_size: int
    learning_rate: float
    epochs: int
    steps_per_epoch: int
    differs: tuple[str, ...]


_DATA_SETS = {
    "acdc": _DataSet(
        "acdc",
        DataConfig(
            data="acdc:PATH",
            patch=(256, 256, 16),
            spacing=(1.0, 1.0, 5.0),
            crop_margin=0,
            foreground_crops=0.5,
            num_test=_NUM_TEST,
            num_val=_NUM_VAL,
        ),
        _AFFINE,
        batch_size=2,
        learning_rate=2e-4,
        epochs=600,
        steps_per_epoch=90,  # 180 frames
        differs=_AFFINE_DIFFERS,
    ),
    "amos": _DataSet(
        "amos-ct",
        DataConfig(
            data="amos-ct:PATH",
            patch=(176, 176, 64),
            eval_patch=(192, 192, 64),
            spacing=(1.0, 1.0, 5.0),
            crop_margin=0,
            foreground_crops=0.5,
            intensities=(-100.0, 200.0),
            num_test=_NUM_TEST,
            num_val=_NUM_VAL,
        ),
        _AFFINE,
        batch_size=8,
        learning_rate=2e-4,
        epochs=600,
        steps_per_epoch=90,  # 180 cases, 2 a step
        differs=(*_AFFINE_DIFFERS, *_CT_DIFFERS),
    ),
    "kits": _DataSet(
        "kits",
        DataConfig(
            data="kits:PATH",
            patch=(128, 128, 128),
            eval_patch=(256, 256, 256),
            spacing=(1.0, 1.0, 1.0),
            crop_margin=0,
            foreground_crops=0.5,
            intensities=(-54.0, 242.0),
            num_test=_NUM_TEST,
            num_val=_NUM_VAL,
        ),
        _AFFINE,
        batch_size=8,
        learning_rate=1e-4,
        epochs=1250,
        steps_per_epoch=176,  # 352 cases, 2 a step
        differs=(*_AFFINE_DIFFERS, *_CT_DIFFERS),
    ),
    "brats": _DataSet(
        "brats",
        _BRATS_DATA,
        _BRATS_AUGMENT,
        batch_size=2,
        learning_rate=1e-4,
        epochs=1250,
        steps_per_epoch=128,
        differs=_BRATS_DIFFERS,
    ),
}
_SEGRESNET = ModelConfig(
    "segresnet",
    norm="affine-instance",
    network=SegResNetConfig(init_filters=32, blocks_down=(1, 2, 2, 4, 4), deep_supervision=4),
)


def _followup(data_set: str, losses: str) -> Recipe:
    """The follow-up's SegResNet with deep supervision on one of its data sets under one of its losses."""
    on, name = _DATA_SETS[data_set], f"{data_set}_{losses}"
    config = RunConfig(
        _FOLLOWUP_LOSSES[losses],
        data=replace(on.data, protocol=f"followup-{data_set}"),
        model=_SEGRESNET,
        training=TrainingConfig(
            steps=on.epochs * on.steps_per_epoch,
            batch_size=on.batch_size,
            learning_rate=on.learning_rate,
            warmup_steps=2 * on.steps_per_epoch,
            warmup_from=0.5,
            weight_decay=1e-5,
            ace_delay=0.0,
            ace_ramp=0.0,
            precision="bfloat16",
            ignore_empty_classes=True,
            seed=12345,
            validate_every=10 * on.steps_per_epoch,
            keep_best="dice",
        ),
        augment=on.augment,
    )
    published = _rows(FOLLOWUP, name, _FOLLOWUP_CASES[data_set], _FOLLOWUP_FIGURES)
    differs = (*on.differs, *_FOLLOWUP_DIFFERS)
    return Recipe(f"followup_{name}", FOLLOWUP, on.layout, config, _DEVICES, published, differs)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        *(_paper(losses) for losses in _PAPER_LOSSES),
        *(_followup(data_set, losses) for data_set in _DATA_SETS for losses in _FOLLOWUP_LOSSES),
    )
}


def find_recipe(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        InputError: if there is none.
    """
    if name not in RECIPES:
        raise InputError(f"There is no recipe {name!r}: give one of {', '.join(RECIPES)}.")
    return RECIPES[name]


def describe(recipes: Sequence[Recipe]) -> str:
    """Source, command, settings, published figures and differences of each, as text."""
    return "\n\n".join(_described(recipe) for recipe in recipes)


def _described(recipe: Recipe) -> str:
    config, training = recipe.config, recipe.config.training
    lines = [
        recipe.name,
        f"  source    {recipe.source.paper}; {recipe.source.repository}",
        f"  command   {recipe.command}",
        f"  settings  {config.model.architecture}, {config.loss}, {training.steps} steps of {training.batch_size} "
        f"patches of {'x'.join(map(str, config.data.patch))}, learning rate {training.learning_rate:g} "
        f"({training.schedule}), split {config.data.protocol}",
        *(f"  differs   {text}" for text in recipe.differs),
        *(f"  {line}" for line in to_markdown(recipe.published).splitlines()),
    ]
    return "\n".join(lines)
