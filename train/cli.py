"""Train segmentation networks under calibration losses and show what these do.

Without a command: `compare`, Dice against Dice + mL1-ACE on an embedded phantom. `python -m train COMMAND --help`
explains the options of a command.
"""

import argparse
import dataclasses
import inspect
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from train.config import (
    DataConfig,
    DataInfo,
    DeviceConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    read_config,
)
from train.console import console
from train.data.augment_config import AugmentConfig
from train.errors import CasesFailed, InputError, Stopped, check_numbers
from train.models.registry import NETWORKS, config_class
from train.plugins import is_external

# Each command imports what it runs, so that `--help` and errors about options come at once.
RunFolder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(name="run", metavar="RUN")]
RunFolders = Annotated[
    tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(name="runs", metavar="RUN [RUN ...]")
]


@dataclass(frozen=True)
class _RunOptions:
    """Options that say what a run is."""

    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    init: Path | None = None
    """Run to start from, such as an imported one: its network, its newest weights and, unless given, its patch."""
    devices: DeviceConfig = field(default_factory=DeviceConfig)

    def config(self, loss: str) -> RunConfig:
        init = str(self.init) if self.init else ""
        return RunConfig(loss, self.data, self.model, self.training, self.augment, init)


@dataclass(frozen=True)
class _Options(_RunOptions):
    """Options of every command that trains."""

    out: Path | None = None
    """Output folder, new or empty. Default: one under runs/ named after the command and the time."""
    resume: bool = False
    """Go on with the run in --out, from its last checkpoint."""

    def folder(self, command: str) -> Path:
        from train.run.folder import default_folder

        if self.out is None and self.devices.coordinator:
            raise InputError("Several processes need the same output folder: give --out.")
        return self.out or default_folder(command)


@dataclass(frozen=True)
class Compare(_Options):
    """Train the same network under several losses and compare them on held-out cases (the default command).

    Without options: Dice against Dice + mL1-ACE on the embedded phantom. On your own data:

        python -m train compare --data msd:Task04_Hippocampus --losses dice 'dice+2*ace' dice+ce 'dice+ce+2*ace'
    """

    losses: tuple[str, ...] = ("dice", "dice+2*ace")
    """Losses to compare, the baseline first: weighted terms joined by +, as in dice+0.5*ace."""
    seeds: tuple[int, ...] = ()
    """Seeds to train every loss with, for means and spreads over them; left out, the one of --seed."""
    temperature: bool = False
    """Show each network with temperature scaling as well, fitted on its validation cases (of several annotators to
    the majority), in a row `LOSS+T`."""
    local_calibration: bool = True
    """Show each network with local calibration as well, fitted on its validation cases, in a row `LOSS+L`. The
    labels stay those of the network. Without validation cases there is no such row."""
    ensembles: bool = False
    """Show the mean probabilities of the --seeds of each loss as well, in a row `LOSS~3` for three seeds."""
    pairs: bool = False
    """Show the labels of the first loss with the probabilities of each other loss as well, in a row `FIRST|LOSS`.
    These are two networks; `predict RUN --labels-of FIRST_RUN` writes the labels and probabilities of both.
    This option and those before it add rows to a comparison that is done, with --resume."""
    checkpoint: Literal["last", "best"] = "last"
    """Evaluate each network's newest weights, or the best ones by --keep-best on the validation cases."""
    recipe: tuple[str, ...] = ()
    """Published experiments that differ in their losses only, see `recipes`: their losses and settings become the
    defaults, and their figures stand beside these."""

    def run(self) -> None:
        from train.compare import compare
        from train.processes import is_first, join_processes
        from train.recipes import published

        folder = self.folder("compare")
        join_processes(self.devices)
        page = compare(
            self.config(self.losses[0]),
            self.losses,
            folder,
            seeds=self.seeds,
            temperature=self.temperature,
            local=self.local_calibration,
            ensembles=self.ensembles,
            pairs=self.pairs,
            which=self.checkpoint,
            devices=self.devices,
            resume=self.resume,
            published=published(self.recipe),
        )
        if is_first():
            print(f"\nPage with figures: {page}")


@dataclass(frozen=True)
class Fit(_Options):
    """Train one network with one loss.

    python -m train fit --loss 'dice+2*ace' --data msd:Task04_Hippocampus --steps 2000 --out runs/ace

    With --recipe NAME a published experiment, see `python -m train recipes`: its settings become the defaults, and
    the test cases are evaluated in the end, beside the figures that were published.

        python -m train fit --recipe paper_brats_dice_ace --data brats:PATH
    """

    loss: str = "dice+2*ace"
    """Weighted terms joined by +, as in dice+0.5*ace."""
    recipe: str = ""
    """Published experiment to follow."""
    temperature: bool = False
    """With --recipe: evaluate with temperature scaling as well, fitted on the validation cases."""

    def run(self) -> None:
        from train.compare import evaluate_run
        from train.fit import fit
        from train.processes import is_first, join_processes
        from train.recipes import published
        from train.task import check_best_is_known, open_task

        if self.temperature and not self.recipe:
            raise InputError(
                "--temperature is for --recipe; without one, evaluate the run with --temperature."
            )
        folder = self.folder("fit")
        join_processes(self.devices)
        task = open_task(self.config(self.loss), self.devices)
        if self.temperature and not task.splits.val:
            raise InputError("--temperature is fitted on validation cases, and num_val is 0: hold some back.")
        if not self.recipe:
            check_best_is_known(task)
        fit(task, folder, resume=self.resume)
        if is_first():
            print(f"\nRun: {folder}" + ("" if self.recipe else f"\nNext: python -m train evaluate {folder}"))
        if not self.recipe:
            return
        best = task.config.training.keep_best != "none" and task.splits.val
        page = evaluate_run(
            folder,
            task.config.data.data,
            "test",
            None,
            "best" if best else "last",
            temperature=self.temperature,
            published=published((self.recipe,)),
            resume=self.resume,
        )
        if is_first():
            print(f"\nPage with figures: {page}")


@dataclass(frozen=True)
class Plan(_RunOptions):
    """Say whether a run fits into the memory of devices that need not be here, and what it spends there.

    The options are those of `fit`, whose --help lists the terms of a loss. The step of that run and the network in
    its validation are compiled for the devices; nothing is run.

        python -m train plan --recipe paper_brats_dice_ace --data brats:PATH --target v5e:4x4 h100:8

    If the step does not fit, --remat, then --accumulate 0, then --mesh with volumes split over devices (space),
    then --precision bfloat16 are added, one after the other, until it fits. If the devices cannot share the batch,
    volumes are split first. With --patch, --num-channels and --class-names no data set is needed.

    The exit status is 0 if the run fits on every target as it stands, 1 if it does not, 2 after bad input.
    """

    loss: str = "dice+2*ace"
    """Weighted terms joined by +, as in dice+0.5*ace."""
    recipe: str = ""
    """Published experiment to follow."""
    target: tuple[str, ...] = ("cpu",)
    """Devices to plan for: cpu or cpu:8 (devices that share this machine), h100 or h100:8, or a TPU with its
    topology, as in v5e:4x4, v5p:2x2x1, v6e:2x4. GPUs and TPUs need the compiler of jax[cuda13] or jax[tpu]."""
    num_channels: int = 1
    """Without a data set: channels of the images."""
    class_names: tuple[str, ...] = ()
    """Without a data set: the classes, background first."""
    limit_s: float = 1800.0
    """Seconds that one compilation may take."""
    out: Path | None = None
    """JSON file for the figures."""
    arguments: tyro.conf.Suppress[tuple[str, ...]] = ()  # the options as the user wrote them

    def run(self) -> int:
        from train.plan import plan

        return plan(self)


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a trained network on the cases its run never saw: Dice, ACE, ECE, MCE, figures and a page.

    python -m train evaluate runs/ace --data msd:Task04_Hippocampus
    """

    run_folder: RunFolder
    """Folder of the run."""
    data: str | None = None
    """Data set; default: the run's own. Of another data set all cases are evaluated that the run was not trained or
    validated on. The run's own is recognised by its images, wherever the folder lies."""
    split: str = "test"
    """train, val or test cases of the run's own data set."""
    out: Path | None = None
    """Output folder, new or empty. Default: evaluate-SPLIT in the run's folder."""
    checkpoint: Literal["last", "best"] = "last"
    """Weights of the newest checkpoint, or the best one's of a run with --keep-best."""
    temperature: bool = False
    """Show it with temperature scaling as well, fitted on its run's validation cases."""
    local_calibration: bool = False
    """Show it with local calibration as well, fitted on its run's validation cases. The labels stay."""

    def run(self) -> None:
        from train.compare import evaluate_run

        page = evaluate_run(
            self.run_folder,
            self.data,
            self.split,
            self.out,
            self.checkpoint,
            temperature=self.temperature,
            local=self.local_calibration,
        )
        print(f"\nPage with figures: {page}")


@dataclass(frozen=True)
class Predict:
    """Label maps and class probabilities of volumes as NIfTI, with each volume's own affine.

    python -m train predict runs/ace --images scans --out predictions

    python -m train predict runs/ace --split test --out predictions

    python -m train predict runs/seed0 runs/seed1 --images scans --out predictions --uncertainty

    Scans that cannot be predicted are named at the end, and the exit status is then 1. The same command goes on in
    the same --out with the scans that are not predicted yet.

    Of a network with --activation sigmoid the probabilities are those of its regions, without a background, and the
    label is 1 where a region is more probable than not: one map or, of several regions, one for each along the
    fourth axis.
    """

    run_folders: RunFolders
    """Folder of the run; of several runs the probabilities are averaged."""
    out: Path
    """Output folder: new, empty, or one that the same command has begun to fill."""
    images: Path | None = None
    """Folder of volumes: .nii, .nii.gz, .mgz, .mha, .nrrd and others."""
    split: Literal["train", "val", "test"] | None = None
    """Instead of --images, cases of the run's own data: its validation cases, to fit a calibrator to them with
    `calib-jax calibrate`, or its test cases, for `calib-jax report`."""
    checkpoint: Literal["last", "best"] = "last"
    """Weights of the newest checkpoint, or the best one's of a run with --keep-best."""
    uncertainty: bool = False
    """Also write NAME_entropy, the entropy of each voxel in nats, and of several runs NAME_mutual_information, the
    part of it that is disagreement between the networks."""
    local_calibration: bool = False
    """Write locally calibrated probabilities, fitted on the first run's validation cases, which must be there. The
    labels stay."""
    labels_of: Path | None = None
    """Folder of another run, whose labels are written with the probabilities of RUN_FOLDERS: Dice may train labels
    and mL1-ACE probabilities, see `compare --pairs`."""

    def run(self) -> None:
        from train.predict import predict_folder

        written = predict_folder(
            self.run_folders,
            self.images,
            self.out,
            self.checkpoint,
            split=self.split,
            uncertainty=self.uncertainty,
            labels_of=self.labels_of,
            local=self.local_calibration,
        )
        print(f"\n{len(written)} files in {self.out}")


@dataclass(frozen=True)
class Check:
    """Read every voxel of a data set and list what is wrong with its files, before a run stops at them.

    python -m train check msd:Task04_Hippocampus

    The exit status is 0 without faults, 1 with some, and 2 if there is no such data set.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """LAYOUT:PATH, as --data of the other commands."""
    label_values: tuple[int, ...] = ()
    """Value of each class in the label files, background first; left out, the layout's."""
    out: Path = Path("faults.csv")
    """File that the faults are written to: case, file, problem. An earlier list of faults is replaced."""

    def run(self) -> int:
        from train.check import check_data, faults_file

        with faults_file(self.out) as write:
            report = check_data(self.data, self.label_values)
            print(report.summary())
            write(report.faults)
        print(f"\nList of faults: {self.out}")
        return 1 if report.faults else 0


@dataclass(frozen=True)
class ImportMonai:
    """Make a run of a network that was trained with MONAI: UNet, SegResNet, SegResNetDS or UNETR.

    The run can be evaluated, can predict, and can be trained further under another loss (fit --init):

        python -m train import-monai model.pt --architecture segresnet --init-filters 16 --data msd:PATH --out RUN

    Without --data, --class-names, --num-channels and --patch say what the network was trained on. Volumes are
    turned to RAS order and normalised as in training here. Channels are in the data set's order. Class
    probabilities are a softmax over all classes, background first.

    With --activation sigmoid each output channel is the probability of a region: of the data set's regions in the
    order of --regions, or without --data of those in --class-names, in order and without a background.
    """

    weights: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="WEIGHTS")]
    """A .safetensors file or, with PyTorch installed, a .pt, .pth or .ckpt file that holds a state_dict."""
    out: Path
    """Folder of the run, new or empty."""
    data: DataConfig = field(default_factory=lambda: DataConfig(data=""))
    model: ModelConfig = field(default_factory=ModelConfig)
    class_names: tuple[str, ...] = ()
    """Without --data: the classes, background first, as a data set names them; with --activation sigmoid the
    name of each output channel, without a background."""
    num_channels: int = 1
    """Without --data: channels of the images."""
    spatial_dims: int = 3
    """Without --data: 2 or 3."""

    def run(self) -> None:
        from train.monai.import_run import import_monai

        names = self.class_names
        if bool(self.data.data) == bool(names):
            raise InputError(
                "Give either --data or --class-names: the network's classes come from one of them."
            )
        if len(set(names)) < len(names):
            raise InputError(f"--class-names {' '.join(names)} names a class twice: give each of them once.")
        model, info = self._without_data() if names else (self.model, None)
        for note in import_monai(self.weights, model, self.data, self.out, info):
            print(f"note: {note}", file=sys.stderr)
        print(f"\nRun: {self.out}\nNext: python -m train evaluate {self.out}")

    def _without_data(self) -> tuple[ModelConfig, DataInfo]:
        """The network and its data, as the options describe them."""
        data, model, names = self.data, self.model, self.class_names
        if model.activation == "sigmoid":
            regions = names[names[0].lower() == "background" :]
            if model.regions or not regions:
                raise InputError(
                    "Without --data a network with sigmoids needs --class-names, one for each output channel and "
                    "none for the background, in place of --regions."
                )
            model, names = dataclasses.replace(model, regions=regions), ()
        if data.spacing == "median":
            raise InputError("Without --data there is no median spacing: give --spacing in millimetres.")
        check_numbers(self, num_channels=(1, math.inf), spatial_dims=(2, 3))
        if data.intensities and not data.intensities[0] < data.intensities[1]:
            raise InputError(f"intensities is {data.intensities}: give the lowest, then the highest.")
        sizes = names, self.num_channels, self.spatial_dims
        return model, DataInfo(self.weights.stem, *sizes, data.intensities, data.geometry)


@dataclass(frozen=True)
class Status:
    """How far a run, or each run of a comparison, has come, and whether it still goes on: steps, time left, last
    validation, checkpoints.

    python -m train status runs/ace
    """

    run_folder: RunFolder
    """Folder of the run or of the comparison."""

    def run(self) -> None:
        from train.run.status import status

        print(status(self.run_folder))


@dataclass(frozen=True)
class Recipes:
    """List the published experiments that `fit --recipe` and `compare --recipe` follow: source, command, settings,
    published figures, and what is done otherwise here.

    python -m train recipes paper_brats_dice_ace
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = ()
    """Those to list; all by default."""

    def run(self) -> None:
        from train.recipes import RECIPES, describe, find_recipe

        print(describe([find_recipe(name) for name in self.names or RECIPES]))


COMMANDS = {
    "compare": Compare,
    "fit": Fit,
    "plan": Plan,
    "recipes": Recipes,
    "import-monai": ImportMonai,
    "check": Check,
    "evaluate": Evaluate,
    "predict": Predict,
    "status": Status,
}


def parse(arguments: Sequence[str]) -> Any:
    """The command that the arguments name, with its options.

    Raises:
        InputError: if an option has an impossible value, or no effect.
        SystemExit: after `--help`, or if the arguments cannot be parsed.
    """
    name, *options = arguments or ["compare"]
    if name.startswith("-") and name not in ("-h", "--help"):  # options without a command
        name, options = "compare", list(arguments)
    settings: Any = {"config": (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)}
    if name not in COMMANDS:
        return tyro.extras.subcommand_cli_from_dict(
            COMMANDS, args=arguments, prog="python -m train", description=__doc__, **settings
        )
    kind, given = COMMANDS[name], given_options(options)
    if not issubclass(kind, _RunOptions | ImportMonai):
        return tyro.cli(kind, args=options, prog=f"python -m train {name}", **settings)
    if {"-h", "--help"} & set(options) and issubclass(kind, _Options):
        from train.terms import describe

        settings["description"] = f"{inspect.getdoc(kind)}\n\nA loss is made of {describe()}"
    default, init = _default(kind, options)
    _check_network_options(default.model, init, given)
    command = tyro.cli(kind, args=options, prog=f"python -m train {name}", default=default, **settings)
    if init:
        _check_as_initial(command.model, default.model, init, given)
    from train.options import check_given

    check_given(command, given)
    return dataclasses.replace(command, arguments=tuple(options)) if kind is Plan else command


def given_options(arguments: Sequence[str]) -> set[str]:
    """Names of the options among the arguments, as Python spells them.

    Example:
        >>> sorted(given_options(["fit", "--ace-delay", "0.2", "--loss=dice"]))
        ['ace_delay', 'loss']
    """
    names = (text.partition("=")[0] for text in arguments if text.startswith("--"))
    return {name.removeprefix("--").replace("-", "_") for name in names}


def _default(kind: type[Any], arguments: Sequence[str]) -> tuple[Any, str]:
    """The command with the defaults that `--recipe`, `--init` and `--architecture` ask for; the value of `--init`.

    The parser offers the options of the network that these defaults hold.

    Raises:
        InputError: if there is no such recipe, run or network, or these contradict one another.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", nargs="*", default=[])
    parser.add_argument("--architecture", nargs="?")
    parser.add_argument("--init", nargs="?")
    given = parser.parse_known_args(arguments)[0]
    trains = issubclass(kind, _RunOptions)
    settings: dict[str, Any] = _recipe_settings(kind, given.recipe) if trains and given.recipe else {}
    model, init = settings.get("model", ModelConfig()), given.init if trains and given.init else ""
    if init:
        initial = read_config(Path(init))[0].model
        if given.recipe and model != initial:
            raise InputError(
                f"The networks of --init {init} and --recipe {' '.join(given.recipe)} differ: leave one out."
            )
        model = initial
    if given.architecture and given.architecture != model.architecture:
        if init:
            raise InputError(f"architecture {_COMES_FROM.format(init)}")
        own = {"norm": "", "dropout": 0.0} if is_external(given.architecture) else {}
        model = dataclasses.replace(model, architecture=given.architecture, network=None, **own)
    if not trains:
        settings = {"weights": tyro.MISSING, "out": tyro.MISSING}
    return kind(**settings | {"model": model}), init


def _recipe_settings(kind: type[Any], names: Sequence[str]) -> dict[str, Any]:
    from train.recipes import DEVICES, find_recipe

    recipes = [find_recipe(name) for name in names]
    first, *others = (recipe.config for recipe in recipes)
    for name, config in zip(names[1:], others, strict=True):
        if dataclasses.replace(config, loss=first.loss) != first:
            raise InputError(f"{name} and {names[0]} differ in more than their losses: compare them apart.")
    settings = {part: getattr(first, part) for part in ("data", "training", "model", "augment")}
    settings["devices"] = DEVICES
    if kind is not Compare:
        return settings | {"loss": first.loss, "recipe": names[0]}
    losses = tuple(recipe.config.loss for recipe in recipes)
    return settings | {"losses": losses, "recipe": tuple(names), "checkpoint": "best"}


_COMES_FROM = "and the network's other options come from --init {}: leave it out."


def _check_network_options(model: ModelConfig, init: str, given: set[str]) -> None:
    """Raises `InputError` for an option of another network than `model`."""
    known = {field.name for field in dataclasses.fields(model.network)}
    for owner in NETWORKS if given - known else ():
        options = {field.name for field in dataclasses.fields(config_class(owner))} - known
        for name in sorted(options & given):
            if init:
                raise InputError(f"{name} {_COMES_FROM.format(init)}")
            raise InputError(
                f"{name} is an option of {owner}, but the architecture is {model.architecture}: leave it out or "
                f"choose --architecture {owner}."
            )


def _check_as_initial(model: ModelConfig, initial: ModelConfig, init: str, given: set[str]) -> None:
    """Raises `InputError` for an option that differs from that of the run in `init`."""
    before = {**vars(initial), **vars(initial.network)}
    for name, value in {**vars(model), **vars(model.network)}.items():
        if name in given and value != before[name]:
            raise InputError(f"{name} {_COMES_FROM.format(init)}")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command. Returns its exit status.

    0 after success; 1 if a check found faults or some cases failed; 2 after bad input, with one sentence on stderr.
    """
    with console():
        return _run(sys.argv[1:] if arguments is None else arguments)


def _run(arguments: list[str]) -> int:
    command: Any = None
    try:
        command = parse(arguments)
        from train.numerics import numerics

        with numerics():
            return command.run() or 0
    except (InputError, CasesFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, CasesFailed) else 2
    except Stopped as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        return stopped.exit_status
    except KeyboardInterrupt:
        hint = ""
        if isinstance(command, _Options):
            hint = "; add --resume to the same command with --out to go on"
        elif isinstance(command, Predict):
            hint = "; start the same command again to go on"
        print(f"\ninterrupted{hint}", file=sys.stderr)
        return 130
