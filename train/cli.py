"""Train segmentation networks under calibration losses and show what these do.

Without a command: `compare`, Dice against Dice + mL1-ACE on an embedded phantom. `python -m train COMMAND --help`
explains the options of a command.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro

from train.config import DataConfig, DataInfo, DeviceConfig, ModelConfig, RunConfig, TrainingConfig
from train.console import console
from train.data import AugmentConfig
from train.errors import CasesFailed, InputError, Stopped, check_numbers
from train.numerics import numerics
from train.options import check_given, given_options
from train.published import Row
from train.recipes import RECIPES, describe, find_recipe
from train.terms import describe as describe_terms


@dataclass(frozen=True)
class _Options:
    """Options of every command that trains."""

    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    init: Path | None = None
    """Run to start from, such as an imported one: its network, its newest weights and, unless given, its patch."""
    devices: DeviceConfig = field(default_factory=DeviceConfig)
    out: Path | None = None
    """Output folder, new or empty. Default: one under runs/ named after the command and the time."""
    resume: bool = False
    """Go on with the run in --out, from its last checkpoint."""

    def config(self, loss: str) -> RunConfig:
        init = str(self.init) if self.init else ""
        return RunConfig(loss, self.data, self.model, self.training, self.augment, init)

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

    losses: Annotated[
        tuple[str, ...],
        tyro.conf.arg(help=f"Losses to compare, the baseline first. Each is {describe_terms()}"),
    ] = ("dice", "dice+2*ace")
    seeds: tuple[int, ...] = ()
    """Seeds to train every loss with, for means and spreads over them; left out, the one of --seed."""
    temperature: bool = False
    """Show each network with temperature scaling as well, fitted on its validation cases, in a row `LOSS+T`."""
    checkpoint: Literal["last", "best"] = "last"
    """Evaluate each network's newest weights, or the best ones by --keep-best on the validation cases."""
    recipe: tuple[str, ...] = ()
    """Published experiments that differ in their losses only, see `recipes`: their losses and settings become the
    defaults, and their figures stand beside these."""

    def run(self) -> None:
        from train.compare import compare
        from train.processes import is_first, join_processes

        folder = self.folder("compare")
        join_processes(self.devices)
        page = compare(
            self.config(self.losses[0]),
            self.losses,
            folder,
            seeds=self.seeds,
            temperature=self.temperature,
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

    loss: Annotated[str, tyro.conf.arg(help=f"The loss: {describe_terms()}")] = "dice+2*ace"
    recipe: str = ""
    """Published experiment to follow."""
    temperature: bool = False
    """With --recipe: evaluate with temperature scaling as well, fitted on the validation cases."""

    def run(self) -> None:
        from train.compare import evaluate_run
        from train.fit import fit
        from train.processes import is_first, join_processes
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
            print(f"\nRun: {folder}")
        if not self.recipe:
            if is_first():
                print(f"Next: python -m train evaluate {folder}")
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
class Evaluate:
    """Evaluate a trained network on the cases its run never saw: Dice, ACE, ECE, MCE, figures and a page.

    python -m train evaluate runs/ace --data msd:Task04_Hippocampus
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(name="run", metavar="RUN")]
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

    def run(self) -> None:
        from train.compare import evaluate_run

        page = evaluate_run(
            self.run_folder,
            self.data,
            self.split,
            self.out,
            self.checkpoint,
            temperature=self.temperature,
        )
        print(f"\nPage with figures: {page}")


@dataclass(frozen=True)
class Predict:
    """Label maps and class probabilities of a folder of volumes as NIfTI, with each volume's own affine.

    python -m train predict runs/ace --images scans --out predictions

    Scans that cannot be predicted are named at the end, and the exit status is then 1. The same command goes on in
    the same --out with the scans that are not predicted yet.

    Of a network with --activation sigmoid the probabilities are those of its regions, without a background, and the
    label is 1 where a region is more probable than not: one map or, of several regions, one for each along the
    fourth axis.
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(name="run", metavar="RUN")]
    """Folder of the run."""
    images: Path
    """Folder of volumes: .nii, .nii.gz, .mgz, .mha, .nrrd and others."""
    out: Path
    """Output folder: new, empty, or one that the same command has begun to fill."""
    checkpoint: Literal["last", "best"] = "last"
    """Weights of the newest checkpoint, or the best one's of a run with --keep-best."""

    def run(self) -> None:
        from train.predict import predict_folder

        written = predict_folder(self.run_folder, self.images, self.out, self.checkpoint)
        print(f"\n{len(written)} files in {self.out}")


@dataclass(frozen=True)
class Check:
    """Read every voxel of a data set and list what is wrong with its files, before a run stops at them.

    python -m train check msd:Task04_Hippocampus

    The exit status is 0 without faults, 1 with some, and 2 if there is no such data set.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """LAYOUT:PATH, as --data of the other commands."""
    out: Path = Path("faults.csv")
    """File that the faults are written to: case, file, problem. An earlier list of faults is replaced."""

    def run(self) -> int:
        from train.check import check_data, faults_file

        with faults_file(self.out) as write:
            report = check_data(self.data)
            print(report.summary())
            write(report.faults)
        print(f"\nList of faults: {self.out}")
        return 1 if report.faults else 0


@dataclass(frozen=True)
class ImportMonai:
    """Make a run of a network that was trained with MONAI: UNet, SegResNet, SegResNetDS or UNETR.

    The run can be evaluated, can predict, and can be trained on under another loss (fit --init):

        python -m train import-monai model.pt --architecture segresnet --init-filters 16 --data msd:PATH --out RUN

    Without --data, say what the network was trained on with --class-names, --num-channels and --patch. Volumes
    are turned to RAS order and normalised as the trainer does it, channels come in the data set's order, and
    class probabilities are a softmax over all classes, background first.

    With --activation sigmoid each output channel is the probability of a region: of those of the data set, in the
    order of --regions, or without --data of those that --class-names names, in order (background is none of them).
    """

    weights: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="WEIGHTS")]
    """A .safetensors file, or, with PyTorch installed, a .pt, .pth or .ckpt one that holds a state_dict."""
    out: Path
    """Folder of the run, new or empty."""
    data: DataConfig = field(default_factory=lambda: DataConfig(data=""))
    model: ModelConfig = field(default_factory=ModelConfig)
    class_names: tuple[str, ...] = ()
    """Without --data: its classes, background first, as a data set names them; with --activation sigmoid what each
    output channel stands for, without a background."""
    num_channels: int = 1
    """Without --data: channels of its images."""
    spatial_dims: int = 3
    """Without --data: 2 or 3."""
    window: tuple[float, float] | None = None
    """Without --data: intensities are cut off to this range, as -200 300 for CT."""

    def run(self) -> None:
        from train.monai.import_run import import_monai

        if bool(self.data.data) == bool(self.class_names):
            raise InputError(
                "Give either --data or --class-names: one of them says what the network tells apart."
            )
        names = self.class_names
        if len(set(names)) < len(names):
            raise InputError(f"--class-names {' '.join(names)} names a class twice: give each of them once.")
        model, info = self.model, None
        if names and model.activation == "sigmoid":
            model, info = self._sigmoids(), self._info(())
        elif names:
            info = self._info(names)
        for note in import_monai(self.weights, model, self.data, self.out, info):
            print(f"note: {note}", file=sys.stderr)
        print(f"\nRun: {self.out}\nNext: python -m train evaluate {self.out}")

    def _sigmoids(self) -> ModelConfig:
        """The network, each of its channels named after a region."""
        names = self.class_names[self.class_names[0].lower() == "background" :]
        if self.model.regions or not names:
            raise InputError(
                "Without --data a network with sigmoids needs --class-names, one for each output channel and none "
                "for the background, in place of --regions."
            )
        return dataclasses.replace(self.model, regions=names)

    def _info(self, class_names: tuple[str, ...]) -> DataInfo:
        if self.data.spacing == "median":
            raise InputError("Without --data there is no median spacing: give --spacing in millimetres.")
        check_numbers(self, num_channels=(1, math.inf), spatial_dims=(2, 3))
        if self.window and not self.window[0] < self.window[1]:
            raise InputError(f"window is {self.window}: give the lowest intensity, then the highest.")
        sizes = class_names, self.num_channels, self.spatial_dims
        return DataInfo(self.weights.stem, *sizes, self.window, self.data.geometry)


@dataclass(frozen=True)
class Status:
    """How far a run, or each run of a comparison, has come, and whether it still goes on: steps, time left, last
    validation, checkpoints.

    python -m train status runs/ace
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(name="run", metavar="RUN")]
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
        print(describe([find_recipe(name) for name in self.names or RECIPES]))


def published(recipes: Sequence[str]) -> list[Row]:
    """What was published of these experiments."""
    return [row for name in recipes for row in find_recipe(name).published]


COMMANDS = {
    "compare": Compare,
    "fit": Fit,
    "recipes": Recipes,
    "import-monai": ImportMonai,
    "check": Check,
    "evaluate": Evaluate,
    "predict": Predict,
    "status": Status,
}


def _defaults(arguments: Sequence[str]) -> dict[str, _Options]:
    """The commands that get other defaults by a `--recipe` among the arguments.

    Raises:
        InputError: if there is no such recipe, or several differ in more than their losses.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", nargs="*", default=[])
    recipes = [find_recipe(name) for name in parser.parse_known_args(arguments)[0].recipe]
    if not recipes:
        return {}
    names, configs = [recipe.name for recipe in recipes], [recipe.config for recipe in recipes]
    first = configs[0]
    for name, config in zip(names, configs, strict=True):
        if dataclasses.replace(config, loss=first.loss) != first:
            raise InputError(f"{name} and {names[0]} differ in more than their losses: compare them apart.")
    settings: dict[str, Any] = {
        "data": first.data,
        "training": first.training,
        "model": first.model,
        "augment": first.augment,
        "devices": recipes[0].devices,
    }
    return {
        "fit": Fit(loss=first.loss, recipe=names[0], **settings),
        "compare": Compare(
            losses=tuple(config.loss for config in configs),
            recipe=tuple(names),
            checkpoint="best",
            **settings,
        ),
    }


def _command_line(arguments: Sequence[str]) -> Any:
    """All commands as one type for tyro, with the defaults that these arguments ask for."""
    defaults = _defaults(arguments)
    named = [
        Annotated[
            kind,
            tyro.conf.subcommand(name, default=defaults[name])
            if name in defaults
            else tyro.conf.subcommand(name),
        ]
        for name, kind in COMMANDS.items()
    ]
    return Union[tuple(named)]  # noqa: UP007, of types that are only known now


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; 0 if it succeeded, 2 after bad input, which ends in one sentence on stderr.

    1 if a check found faults, or some cases failed.
    """
    with console(), numerics():
        return _run(sys.argv[1:] if arguments is None else arguments)


def _run(arguments: list[str]) -> int:
    command: Any = None
    first = arguments[0] if arguments else ""
    # Options without a command are those of the main job.
    if not first or (first.startswith("-") and first not in ("-h", "--help")):
        arguments = ["compare", *arguments]
    try:
        command = tyro.cli(
            _command_line(arguments),
            args=arguments,
            prog="python -m train",
            description=__doc__,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
        check_given(command, given_options(arguments))
        return command.run() or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CasesFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        return stopped.exit_status
    except KeyboardInterrupt:
        hint = (
            "; add --resume to the same command with --out to go on" if isinstance(command, _Options) else ""
        )
        hint = "; start the same command again to go on" if isinstance(command, Predict) else hint
        print(f"\ninterrupted{hint}", file=sys.stderr)
        return 130
