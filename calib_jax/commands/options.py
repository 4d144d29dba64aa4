"""Options that several commands share: which folders to read, and how to bin."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calib_jax._terminal import printable

FOR_THE_GRID = "for the grid of .npz and .npy files without a label map beside them"
"""What images are for where only probabilities are read."""


def add_folders(parser: argparse.ArgumentParser, *, labels: bool = True, images: str = "") -> None:
    """Adds the options that say what to read.

    Args:
        parser: of the command.
        labels: whether labels are read; else `--labels` is no option.
        images: what images are for; without it, `--images` is no option.
    """
    add = parser.add_argument_group("what to read").add_argument
    add(
        "--probs",
        action="append",
        required=True,
        metavar="[NAME=]DIR",
        help="folder of predicted probabilities (nnU-Net's .npz, NIfTI, .npy, .mha, .nrrd, PNG, TIFF); give it "
        "once for each model, with a name",
    )
    if labels:
        add(
            "--labels",
            type=Path,
            required=True,
            metavar="DIR",
            help="folder of true label maps, matched by file name",
        )
    else:
        parser.set_defaults(labels=None)
    if images:
        add("--images", type=Path, metavar="DIR", help=f"folder of images, {images}")
    add("--logits", action="store_true", help="the files hold logits rather than probabilities")
    add(
        "--dataset-json",
        type=Path,
        metavar="FILE",
        help="nnU-Net's dataset.json: class names, regions, ignore label (default: found beside the predictions)",
    )
    add("--class-names", nargs="+", metavar="NAME", help="names of all classes, background first")


def add_subjects(add: Any) -> None:
    """Adds the option that says which cases are of one subject, to a group of options."""
    add(
        "--subjects",
        metavar="REGEX",
        help="regular expression that finds the subject in the name of a case, such as 'patient[0-9]+', where a "
        "subject has several cases; intervals and tests are then over subjects (default: each case is a subject)",
    )


def subjects_of(options: argparse.Namespace, case_names: Sequence[str]) -> dict[str, str]:
    """Subject of each case by the case's name; empty without the option.

    Raises:
        ValueError: if the option does not fit the names.
    """
    from calib_jax._subjects import find_subjects

    return find_subjects(options.subjects, case_names) if options.subjects else {}


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """Adds the number of threads."""
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="cases to read at a time, each of them in memory (default: 1)",
    )


def check_jobs(options: argparse.Namespace) -> None:
    """Raises ValueError unless there is at least one job."""
    if options.jobs < 1:
        raise ValueError(f"--jobs must be at least 1; got {options.jobs}.")


def first_class(options: argparse.Namespace, predictions: Any) -> int:
    """Index of the first class that is reported: the background is left out unless it is asked for."""
    everything = predictions.regions or options.include_background or len(predictions.class_names) == 1
    return 0 if everything else 1


def named_folders(given: Sequence[str]) -> Path | dict[str, Path]:
    """The folders of `--probs`: a single path without a name, or paths by name of the model.

    Raises:
        ValueError: if two models have one name.

    Example:
        >>> named_folders(["fold0"]).as_posix(), list(named_folders(["A=x", "runs/B"]))
        ('fold0', ['A', 'B'])
    """
    pairs = []
    for text in given:
        name, equals, folder = text.partition("=")
        is_named = bool(equals and name) and not Path(text).exists()
        pairs.append((name, Path(folder)) if is_named else ("", Path(text)))
    if len(pairs) == 1 and not pairs[0][0]:
        return pairs[0][1]
    folders: dict[str, Path] = {}
    for name, folder in pairs:
        name = name or folder.resolve().name
        if name in folders:
            raise ValueError(
                f"--probs: two folders are called {name!r}: give each model a name, as in --probs {name}1={folder}."
            )
        folders[name] = folder
    return folders


def check_report_folder(options: argparse.Namespace) -> None:
    """Raises ValueError if the report would be written among the files that it is about."""
    folders = named_folders(options.probs)
    read = [*(folders.values() if isinstance(folders, dict) else [folders]), options.labels]
    for folder in read:
        if folder is not None and folder.resolve() == options.out.resolve():
            raise ValueError(f"--out {options.out} is a folder to read: choose another output folder.")


def print_notices(predictions: Any, *, printed: Sequence[str] = ()) -> None:
    """Prints what a reader should know about the files and has not been `printed`."""
    for notice in predictions.notices:
        if notice not in printed:
            print(f"note: {printable(notice)}", file=sys.stderr)


def open_folders(options: argparse.Namespace) -> Any:
    """`calib_jax.predictions.open_predictions` with the options of `add_folders`."""
    from calib_jax.predictions import open_predictions

    return open_predictions(
        named_folders(options.probs),
        options.labels,
        images=getattr(options, "images", None),
        dataset_json=options.dataset_json,
        logits=options.logits,
        class_names=options.class_names,
    )
