"""`calib-jax sweep`: how calibration errors depend on the bins."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from calib_jax.commands import options as shared
from calib_jax.commands._table import write_table

if TYPE_CHECKING:
    from calib_jax.report.sweeping import Point

_NUMBERS = (5, 10, 15, 20, 25, 30, 40, 50, 75, 100)
_DESCRIPTION = """\
Shows how ACE, ECE and MCE depend on the number of bins and on their kind: bins of equal width, or of equal mass,
which hold the same number of voxels of a case and class. Each case is read once. What was measured of it is kept in
OUT/sweep_cases, so that a sweep that was stopped goes on where it was.
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
    shared.add_folders(parser)
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
    shared.add_subjects(add)
    shared.add_jobs(parser)


def run(options: argparse.Namespace) -> int:
    """Measures the cases, writes the files and prints the table."""
    if min(options.num_bins) < 1:
        raise ValueError(f"--num-bins must be at least 1; got {min(options.num_bins)}.")
    shared.check_jobs(options)
    shared.check_report_folder(options)
    from calib_jax._case_loop import for_each_case
    from calib_jax._kept import Kept, load_arrays, save_arrays
    from calib_jax.report import sweeping
    from calib_jax.report.study import cases_of

    numbers = sorted(set(options.num_bins))
    predictions = shared.open_folders(options)
    subjects = shared.subjects_of(options, predictions.case_names)
    before = predictions.notices
    shared.print_notices(predictions)
    settings = ["sweep", options.logits, list(predictions.class_names), numbers]
    kept = Kept(options.out / "sweep_cases", settings, lambda model, name: predictions.files(name, model))

    def find(model: str, name: str) -> sweeping.Errors | None:
        arrays = load_arrays(kept.path(model, name), kept.key(model, name))
        return arrays["errors"] if arrays is not None else None

    def work(model: str, name: str) -> sweeping.Errors:
        key = kept.key(model, name)
        errors = sweeping.sweep_case(predictions.read(name, model), numbers)
        save_arrays(kept.path(model, name), key, {"errors": errors})
        return errors

    cases = cases_of(predictions)
    outcome = for_each_case(cases, work, find=find, done="measured", place=kept.folder, jobs=options.jobs)
    shared.print_notices(predictions, printed=before)
    first = shared.first_class(options, predictions)
    errors = {
        model: {name: errors[..., first:] for (of, name), errors in outcome.found.items() if of == model}
        for model in predictions.models
    }
    errors = {model: cases for model, cases in errors.items() if cases}
    points = list(sweeping.summarise(errors, subjects, numbers, predictions.class_names[first:]))
    _write(points, options.out)
    print(_table(points))
    print(f"\nWrote {options.out / 'sweep.csv'}, sweep.json, sweep.svg and sweep.png")
    return outcome.status


def _write(points: "list[Point]", folder: Path) -> None:
    from calib_jax.report import figures, sweeping

    rows = []
    for point in points:
        row = dataclasses.asdict(point)
        rows.append({"model": row.pop("model"), "class": row.pop("class_name"), **row})
    write_table(rows, folder, "sweep")
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
