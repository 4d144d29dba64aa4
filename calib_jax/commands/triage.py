"""`calib-jax triage`: which cases to look at first, without labels."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib_jax._terminal import printable
from calib_jax.commands import options as shared
from calib_jax.commands._table import write_table

if TYPE_CHECKING:
    from calib_jax.report.triage import Labelled

_SHOWN = 15
_LEVEL = 0.9
_DESCRIPTION = """\
Says without any label how good each predicted label map is likely to be, and how large each class is.

The probabilities themselves expect a Dice and a volume. Both are only as good as the probabilities: calibrate these
first (`calib-jax calibrate`). With the figures of a report on cases that have labels, each volume gets an interval
that is meant to hold the true volume in 90% of the cases.

What was measured of a case is kept in OUT/triage_cases, so that a start that was stopped goes on where it was.
"""
_EXAMPLE = """\
examples:
  calib-jax triage --probs calibrated --out triage
  calib-jax triage --probs calibrated --labelled report/cases.csv --out triage

OUT gets triage.csv and triage.json: for each case and class the expected Dice, the threshold that makes it largest,
and the predicted and expected volume in ml with the ends of its interval. The cases to look at first are printed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLE
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    shared.add_folders(parser, labels=False, images=shared.FOR_THE_GRID)
    add = parser.add_argument_group("what to say").add_argument
    add(
        "--labelled",
        type=Path,
        metavar="FILE",
        help="cases.csv of a report on other cases, predicted and calibrated in the same way: gives intervals of "
        "volumes",
    )
    add(
        "--level",
        type=float,
        metavar="SHARE",
        help=f"share of cases whose true volume the interval is to hold (default: {_LEVEL})",
    )
    add("--include-background", action="store_true", help="show the background as a class too")
    shared.add_jobs(parser)


def run(options: argparse.Namespace) -> int:
    """Measures the cases, writes the files and prints the cases to look at first."""
    if options.level is not None and options.labelled is None:
        raise ValueError("--level is of the interval that --labelled gives: give both.")
    level = _LEVEL if options.level is None else options.level
    if not 0 < level < 1:
        raise ValueError(f"--level must lie between 0 and 1; got {level}.")
    shared.check_jobs(options)
    shared.check_report_folder(options)
    from calib_jax.report import triage
    from calib_jax.report.study import measure_cases

    labelled, notices = (
        triage.read_labelled(options.labelled, level=level) if options.labelled is not None else ({}, [])
    )
    for notice in notices:
        print(f"note: {printable(notice)}", file=sys.stderr)
    predictions = shared.open_folders(options)
    before = predictions.notices
    shared.print_notices(predictions)
    labelled = _matched(labelled, list(predictions.models), predictions.class_names, options)
    study = measure_cases(
        predictions,
        triage.BINS,
        options.out,
        options={"logits": options.logits, "labels": False},
        jobs=options.jobs,
        kept_in="triage_cases",
        figures_of=lambda model, name: triage.expect(
            predictions.read(name, model, parts=("predicted",)), regions=predictions.regions
        ),
    )
    shared.print_notices(predictions, printed=before)
    rows = list(
        triage.rows_of(
            study.cases,
            predictions.class_names,
            first_class=shared.first_class(options, predictions),
            labelled=labelled,
            level=level,
        )
    )
    write_table(rows, options.out, "triage")
    print(_table(rows))
    print(f"\nWrote {options.out / 'triage.csv'} and triage.json")
    return 1 if study.faults else 0


def _matched(
    labelled: "Labelled", models: list[str], class_names: Sequence[str], options: argparse.Namespace
) -> "Labelled":
    """The volumes under the names of the models here: a single model on both sides may have two names."""
    if not labelled:
        return {}
    there = list(dict.fromkeys(model for model, _ in labelled))
    if len(models) == len(there) == 1:
        labelled, there = {(models[0], name): volumes for (_, name), volumes in labelled.items()}, models
    if missing := [model for model in models if model not in there]:
        raise ValueError(
            f"{options.labelled} is of {', '.join(there)} and lacks {', '.join(missing)}: name the models as "
            "there, as in --probs NAME=DIR."
        )
    found = dict.fromkeys(name for _, name in labelled)
    if not found.keys() & set(class_names):
        raise ValueError(
            f"{options.labelled} is of the classes {', '.join(found)}, and the predictions of "
            f"{', '.join(class_names)}: give --class-names or --dataset-json as for the report."
        )
    return labelled


def _table(rows: list[dict[str, Any]]) -> str:
    """The cases of the lowest expected Dice, each with the class that lowers it most."""
    by_case: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if not math.isnan(row["expected_dice"]):
            by_case.setdefault((row["model"], row["case"]), []).append(row)
    if not by_case:
        return "No class is expected anywhere."
    means = {key: sum(row["expected_dice"] for row in of) / len(of) for key, of in by_case.items()}
    lowest = sorted(means, key=lambda key: means[key])[:_SHOWN]
    several = len({model for model, _ in means}) > 1
    lines = ["Look at these first (expected Dice: mean over classes, lowest class):"]
    names = {key: printable(" ".join(key if several else key[1:])) for key in lowest}
    width = max(map(len, names.values()))
    for key in lowest:
        worst = min(by_case[key], key=lambda row: row["expected_dice"])
        lines.append(
            f"{names[key]:<{width}}  {means[key]:.3f}  {worst['expected_dice']:.3f} {worst['class']}"
        )
    if len(means) > len(lowest):
        lines.append(f"and {len(means) - len(lowest)} more, see triage.csv")
    return "\n".join(lines)
