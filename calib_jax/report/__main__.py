"""`python -m calib_jax.report FOLDER`: the page once more, from the results saved beside it."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from calib_jax.report.archive import ReportInputs, load_inputs
from calib_jax.report.page import write_report
from calib_jax.report.table import compare_models
from calib_jax.report.text import format_table, print_in_any_encoding
from calib_jax.report.wording import headline

_EXAMPLES = """\
FOLDER is one that write_report wrote to, or one with results of ModelResult.save (*.npz), taken in the
order of their file names.

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
        page = write_report(
            options.out or options.folder,
            **{field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)},
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
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the results are")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (default: FOLDER itself)")
    parser.add_argument("--title", help="title of the page (default: as before)")
    parser.add_argument(
        "--baseline", metavar="NAME", help="model to compare with (default: as before, or the first)"
    )
    parser.add_argument(
        "--reference", metavar="NAME", help="result to show without a test (default: as before)"
    )
    parser.add_argument(
        "--per-class", action="store_true", help="print each class in the terminal's table too"
    )
    return parser


def _with_options(inputs: ReportInputs, options: argparse.Namespace) -> ReportInputs:
    """The inputs with what the command line says instead of what was saved."""
    if options.reference is not None:
        inputs = _with_reference(inputs, options.reference)
    return dataclasses.replace(
        inputs,
        title=options.title if options.title is not None else inputs.title,
        baseline=options.baseline if options.baseline is not None else inputs.baseline,
    )


def _with_reference(inputs: ReportInputs, name: str) -> ReportInputs:
    everyone = [*inputs.results, *([inputs.reference] if inputs.reference else [])]
    names = [result.name for result in everyone]
    if name not in names:
        raise ValueError(f"no result is called {name!r}: the reference is one of {', '.join(names)}.")
    results = tuple(result for result in everyone if result.name != name)
    if not results:
        raise ValueError(f"{name!r} is the only result, so it cannot be the reference of another.")
    baseline = inputs.baseline if inputs.baseline != name else results[0].name
    return dataclasses.replace(
        inputs, results=results, reference=everyone[names.index(name)], baseline=baseline
    )


if __name__ == "__main__":
    sys.exit(main())
