"""`calib-jax sweep`: how calibration errors depend on the bins."""

import argparse
import csv
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib_jax.commands import options as shared

if TYPE_CHECKING:
    from calib_jax.report.sweeping import Point

_NUMBERS = (5, 10, 15, 20, 25, 30, 40, 50, 75, 100)
_DESCRIPTION = """\
Shows how ACE, ECE and MCE depend on the number of bins and on their kind: bins of equal width, or of equal mass,
which hold the same number of voxels of a case and class. Each case is read once.
"""
_EXAMPLE = """\
example:
  calib-jax sweep --probs predictions --labels labelsTs --out sweep

OUT gets sweep.csv, sweep.json, sweep.svg and sweep.png. The table is of the mean over classes.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLE
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    shared.add_folders(parser, images=False)
    add = parser.add_argument_group("what to measure").add_argument
    add(
        "--num-bins",
        type=int,
        nargs="+",
        default=list(_NUMBERS),
        metavar="N",
        help=f"numbers of bins (default: {' '.join(map(str, _NUMBERS))})",
    )
    add("--include-background", action="store_true", help="count the background as a class too")
    shared.add_jobs(parser)


def run(options: argparse.Namespace) -> int:
    """Measures the cases, writes the files and prints the table."""
    if min(options.num_bins) < 1:
        raise ValueError(f"--num-bins must be at least 1; got {min(options.num_bins)}.")
    shared.check_jobs(options)
    shared.check_report_folder(options)
    from calib_jax.report import sweeping
    from calib_jax.report.study import Progress, for_each_case

    numbers = sorted(set(options.num_bins))
    predictions = shared.open_folders(options)
    before = predictions.notices
    shared.print_notices(predictions)
    with Progress() as progress:
        found, faults = for_each_case(
            predictions,
            lambda model, name: sweeping.sweep_case(predictions.read(name, model), numbers),
            jobs=options.jobs,
            progress=progress,
            fault=lambda sentence: progress.say(f"fault: {sentence}"),
        )
    shared.print_notices(predictions, printed=before)
    if not found:
        raise ValueError("no case could be read, see the sentences above.")
    first = shared.first_class(options, predictions)
    errors = {
        model: [found[model, name][..., first:] for name in predictions.case_names if (model, name) in found]
        for model in predictions.models
    }
    errors = {model: cases for model, cases in errors.items() if cases}
    points = list(sweeping.summarise(errors, numbers, predictions.class_names[first:]))
    _write(points, options.out)
    print(_table(points))
    print(f"\nWrote {options.out / 'sweep.csv'}, sweep.json, sweep.svg and sweep.png")
    return 1 if faults else 0


def _write(points: "list[Point]", folder: Path) -> None:
    from calib_jax.report import figures, sweeping

    folder.mkdir(parents=True, exist_ok=True)
    rows = [dataclasses.asdict(point) for point in points]
    for row in rows:
        row["class"] = row.pop("class_name")
    with open(folder / "sweep.csv", "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(
            file, ["model", "class", *(x for x in rows[0] if x not in ("model", "class"))]
        )
        writer.writeheader()
        writer.writerows(rows)
    finite: list[dict[str, Any]] = [
        {key: None if isinstance(x, float) and math.isnan(x) else x for key, x in row.items()} for row in rows
    ]
    text = json.dumps({"command": [*sys.argv], "sweep": finite}, indent=1, ensure_ascii=False)
    (folder / "sweep.json").write_text(text, encoding="utf-8", errors="backslashreplace")
    drawing = figures.ReportFigure("sweep", "", "", lambda: sweeping.draw(points))
    figures.draw(drawing, folder, save_svg=True)


def _table(points: "list[Point]") -> str:
    """A block per model: a line for each number of bins."""
    from calib_jax.report import sweeping
    from calib_jax.report.wording import number

    chosen = {(x.model, x.binning, x.num_bins, x.metric): x.mean for x in sweeping.overall(points)}
    heads = [(kind, metric) for kind in sweeping.KINDS for metric in sweeping.ERRORS]
    lines = []
    for model in dict.fromkeys(point.model for point in points):
        lines += ["", model] if lines else [model]
        lines.append(" " * 6 + "".join(f"{title:<27}" for title in sweeping.KINDS.values()).rstrip())
        lines.append("bins  " + "".join(f"{metric:<9}" for _, metric in heads).rstrip())
        for num_bins in sorted({point.num_bins for point in points}):
            cells = [f"{number(chosen[model, kind, num_bins, metric]):<9}" for kind, metric in heads]
            lines.append(f"{num_bins:<6}" + "".join(cells).rstrip())
    return "\n".join(lines)
