"""`calib-jax report`: how far to trust predictions."""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib_jax._kept import CASES, replacing
from calib_jax.commands import options as shared

if TYPE_CHECKING:
    from calib_jax.report.study import Study

_DESCRIPTION = """\
Measures how far predicted probabilities can be trusted, and writes a page that says it in words, numbers and
figures.

Each case is read once, one at a time. What was measured of a case is kept in OUT/cases, so that a report that was
stopped goes on where it was, and a report over one more case reads this case alone.
"""
_EXAMPLE = """\
examples:
  calib-jax report --probs predictions --labels labelsTs --out report
  calib-jax report --probs nnunet=fold0 --probs monai=out --labels labelsTs --images imagesTs --out report --jobs 4

OUT gets index.html (one file with everything in it), metrics.csv, cases.csv, report.json, and figures/ as SVG and
PNG.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLE
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the report")
    shared.add_folders(parser, images="to show behind the labels")
    add = parser.add_argument_group("what to measure").add_argument
    add("--num-bins", type=int, default=20, metavar="N", help="number of bins (default: 20)")
    add(
        "--binning",
        choices=("hard", "soft", "adaptive"),
        default="hard",
        help="bins of equal width, the same with soft borders, or bins of equal mass (default: hard)",
    )
    add(
        "--local",
        action="store_true",
        help="also cross-validate local calibration, which reads each case twice more and takes minutes",
    )
    add("--include-background", action="store_true", help="report the background as a class too")
    shared.add_subjects(add)
    add("--baseline", metavar="NAME", help="model that the others are compared with (default: the first)")
    add("--title", help="title of the page")
    shared.add_jobs(parser)


def run(options: argparse.Namespace) -> int:
    """Measures the cases and writes the report."""
    if options.num_bins < 1:
        raise ValueError(f"--num-bins must be at least 1; got {options.num_bins}.")
    shared.check_jobs(options)
    shared.check_report_folder(options)
    from calib_jax._sums.bins import Bins
    from calib_jax.report.study import measure_cases

    predictions = shared.open_folders(options)
    if options.baseline is not None and options.baseline not in predictions.models:
        raise ValueError(
            f"--baseline {options.baseline!r} is no model: there are {', '.join(predictions.models)}."
        )
    before = predictions.notices
    shared.print_notices(predictions)
    subjects = shared.subjects_of(options, predictions.case_names)
    with _beside(options.jobs) as beside:
        try:
            study = measure_cases(
                predictions,
                Bins(options.binning, options.num_bins),
                options.out,
                options={"logits": options.logits, "images": options.images is not None},
                jobs=options.jobs,
            )
        except KeyboardInterrupt:
            _all_notices(options.out, predictions.notices, reused=True)
            raise
        shared.print_notices(predictions, printed=before)
        _write(options, predictions, study, subjects, beside)
    return 1 if study.faults else 0


def _write(
    options: argparse.Namespace,
    predictions: Any,
    study: "Study",
    subjects: Mapping[str, str],
    beside: ProcessPoolExecutor | None,
) -> None:
    from calib_jax._case_loop import Progress
    from calib_jax._sums.bins import Bins
    from calib_jax.report import compare_models, findings, format_table, write_report
    from calib_jax.report.archive import ReportInputs
    from calib_jax.report.gains import cross_validate, cross_validate_local
    from calib_jax.report.page import draw_figures
    from calib_jax.report.study import results_of
    from calib_jax.report.text import format_summary
    from calib_jax.results import write_rows

    bins = Bins(options.binning, options.num_bins)
    regions, names = predictions.regions, predictions.class_names
    first = shared.first_class(options, predictions)
    results = results_of(study, names, first_class=first, subjects=subjects)
    shown = [result.name for result in results]
    baseline = options.baseline if options.baseline in shown else shown[0]
    table = list(findings.case_table(study, results, first_class=first))
    write_rows(options.out / "cases.csv", list(table[0]), table)
    inputs = ReportInputs(tuple(results), "", {}, {}, None, baseline, details=findings.points_of(table))
    drawing = beside and beside.submit(draw_figures, inputs, options.out)
    rows = compare_models(results, baseline=baseline)
    gains = {
        result.name: cross_validate(
            study.cases[result.name], result, bins, first_class=first, regions=regions
        )
        for result in results
    }
    if options.local:
        with Progress(noun="read case") as progress:
            for result in results:
                gains[result.name] += cross_validate_local(
                    predictions, result, bins, first_class=first, progress=progress
                )
    details = findings.details_of(
        study,
        results,
        table,
        gains,
        first_class=first,
        label_names=findings.label_names_of(names, regions=regions),
        notices=_all_notices(options.out, predictions.notices, reused=study.reused > 0),
        folder=options.out,
    )
    number = len({case for result in results for case in result.case_names})
    page = write_report(
        options.out,
        results,
        title=options.title or _title(shown, number),
        baseline=baseline,
        rows=rows,
        details=details,
        drawn=drawing and drawing.result,
        provenance={"command": _command(), **_settings(options, names, regions), **_versions()},
    )
    print(format_table(rows, per_class=True))
    print(format_summary(details))
    print(f"\nWrote {page}")


@contextlib.contextmanager
def _beside(jobs: int) -> Iterator[ProcessPoolExecutor | None]:
    """A process that draws while calibrators are fitted here; None for one job."""
    if jobs == 1:
        yield None
        return
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _ignore_interrupts) as process:
        process.submit(_be_ready_to_draw)
        yield process


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which is the other process's to handle


def _be_ready_to_draw() -> None:
    """Imports what drawing needs, while the other process waits for files."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # a GPU is in use by the other process
    importlib.import_module("calib_jax.report.figures")


def _all_notices(folder: Path, notices: Sequence[str], *, reused: bool) -> list[str]:
    """The notices, and those of the starts in which reused cases were read; kept in a file of the folder."""
    found, file = list(notices), folder / CASES / "notices.json"
    if reused and file.is_file():
        with contextlib.suppress(ValueError):
            found += [x for x in json.loads(file.read_text(encoding="utf-8")) if isinstance(x, str)]
    found = list(dict.fromkeys(found))
    with replacing(file) as partial:
        partial.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def _title(models: Sequence[str], cases: int) -> str:
    what = f" of {', '.join(models)}" if len(models) > 1 else ""
    return f"Calibration{what} on {cases} {'case' if cases == 1 else 'cases'}"


def _command() -> str:
    return shlex.join(["calib-jax", *sys.argv[1:]])


def _settings(options: argparse.Namespace, class_names: Any, regions: bool) -> dict[str, str]:
    kinds = {"hard": "equal width", "soft": "equal width with soft borders", "adaptive": "equal mass"}
    folders = shared.named_folders(options.probs)
    probs = (
        "\n".join(f"{name}: {path}" for name, path in folders.items())
        if isinstance(folders, dict)
        else folders
    )
    return {
        "predictions": str(probs),
        "labels": str(options.labels),
        "bins": f"{options.num_bins} of {kinds[options.binning]}",
        "regions" if regions else "classes": ", ".join(class_names),
        "background": "reported" if options.include_background or regions else "left out of the averages",
    }


def _versions() -> dict[str, str]:
    import platform

    import jax
    import numpy as np

    import calib_jax

    return {
        "versions": f"calib_jax {calib_jax.__version__}, NumPy {np.__version__}, JAX {jax.__version__}, Python "
        f"{platform.python_version()}"
    }
