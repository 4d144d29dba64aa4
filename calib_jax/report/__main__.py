"""`python -m calib_jax.report FOLDER`: makes the page again from the results saved beside it."""

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from calib_jax._terminal import print_in_any_encoding
from calib_jax.report.archive import ReportInputs, load_inputs
from calib_jax.report.details import PICTURES
from calib_jax.report.page import write_report
from calib_jax.report.table import compare_models
from calib_jax.report.text import format_table
from calib_jax.report.wording import headline

_EXAMPLES = """\
FOLDER is a folder that write_report wrote to, or a folder with results saved by ModelResult.save (*.npz), which
are taken in the order of their file names.

examples:
  python -m calib_jax.report runs/compare
  python -m calib_jax.report runs/compare --baseline "Dice + CE" --title "Hippocampus, 60 test cases"
  python -m calib_jax.report my_results --reference "true posterior" --out pages/mine
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page and prints the table; returns the exit status."""
    print_in_any_encoding()
    options = _parser().parse_args(arguments)
    try:
        inputs = _with_options(load_inputs(options.folder), options)
        rows = compare_models(inputs.results, baseline=inputs.baseline, reference=inputs.reference)
        out = options.out or options.folder
        if (
            out != options.folder and (options.folder / PICTURES).is_dir()
        ):  # the page names and shows these files
            shutil.copytree(options.folder / PICTURES, out / PICTURES, dirs_exist_ok=True)
            shutil.copy2(options.folder / "cases.csv", out / "cases.csv")
        page = write_report(
            out,
            **{field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)},
            rows=rows,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(format_table(rows, per_class=options.per_class), headline(rows), f"Wrote {page}", sep="\n\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m calib_jax.report",
        description="Makes the HTML report that compares models again from their saved results.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="folder with the results")
    add("--out", type=Path, metavar="FOLDER", help="output folder (default: FOLDER itself)")
    add("--title", help="title of the page (default: as before)")
    add("--baseline", metavar="NAME", help="model to compare with (default: as before, or the first)")
    add("--reference", metavar="NAME", help="result to show without a test (default: as before)")
    add("--per-class", action="store_true", help="print a line for each class in the terminal's table")
    return parser


def _with_options(inputs: ReportInputs, options: argparse.Namespace) -> ReportInputs:
    """The saved inputs with the values of the command line in place of the saved ones."""
    if options.reference is not None:
        inputs = _with_reference(inputs, options.reference)
    given = {"title": options.title, "baseline": options.baseline}
    return dataclasses.replace(inputs, **{name: value for name, value in given.items() if value is not None})


def _with_reference(inputs: ReportInputs, name: str) -> ReportInputs:
    models = list(inputs.shown)
    names = [model.name for model in models]
    if name not in names:
        raise ValueError(f"no result is called {name!r}: the reference is one of {', '.join(names)}.")
    reference = models.pop(names.index(name))
    if not models:
        raise ValueError(f"{name!r} is the only result, so it cannot be the reference of another.")
    baseline = inputs.baseline if inputs.baseline != name else models[0].name
    return dataclasses.replace(inputs, results=tuple(models), reference=reference, baseline=baseline)


if __name__ == "__main__":
    sys.exit(main())
