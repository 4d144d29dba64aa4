"""The report as one self-contained HTML page, with its figures, tables and inputs beside it."""

import base64
import dataclasses
import io
import itertools
import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from calib_jax.plots import History
from calib_jax.report import archive, figures, wording
from calib_jax.report.archive import ReportInputs, Table
from calib_jax.report.results import HIGHER_IS_BETTER, METRICS, Result
from calib_jax.report.table import ModelRow, check_comparable, compare_models, to_json, write_csv

_WORST = 10
_WORST_METRICS = ("ACE", "MCE", "Dice")


def write_report(
    folder: str | os.PathLike[str],
    results: Sequence[Result],
    *,
    title: str,
    histories: Mapping[str, History] | None = None,
    provenance: Mapping[str, str] | None = None,
    reference: Result | None = None,
    baseline: int | str = 0,
    tables: Mapping[str, Table] | None = None,
) -> Path:
    """Writes a report that compares models on a data set.

    `index.html` stands alone: style and figures are inside, nothing is loaded from the network. Beside it
    lie `figures/*.png`, the table as `table.csv` and `table.json`, every case in `cases/*.csv`, and the
    inputs (`report.json`, `results/*.npz`), from which `python -m calib_jax.report FOLDER` makes the page
    again.

    Args:
        folder: where to write; made if it is not there, older files of the same name are replaced.
        results: one result per model, with the same classes; `RepeatedResult` for one trained several times.
        title: title of the page.
        histories: training curves by name of the model; see `calib_jax.plots.loss_curves`.
        provenance: what the reader needs to trust and repeat the numbers, such as command, versions, data.
        reference: a further result to show without a test, such as the best that any model could reach.
        baseline: index or name of the model that the others are compared with.
        tables: further tables by title, as lines of cells, the head first: published figures, say.

    Returns:
        Path of `index.html`.

    Raises:
        ValueError: if the results cannot be compared; see `compare_models`.
    """
    folder = Path(folder)
    base = results[check_comparable(results, baseline=baseline, reference=reference)]
    inputs = ReportInputs(
        tuple(results), title, histories or {}, provenance or {}, reference, base.name, tables or {}
    )
    rows = compare_models(results, baseline=base.name, reference=reference)
    archive.save_inputs(folder, inputs)
    _write_tables(folder, rows, results)
    page = folder / "index.html"
    html = render(inputs, rows, png_folder=folder / "figures")
    page.write_text(html, encoding="utf-8", errors="backslashreplace")  # a file's name may be no Unicode
    return page


def render(inputs: ReportInputs, rows: Sequence[ModelRow], *, png_folder: Path | None = None) -> str:
    """The page as a string of HTML.

    Args:
        inputs: what to report.
        rows: its table, from `compare_models`.
        png_folder: where to save every figure as PNG too; None saves none.

    Returns:
        The HTML.
    """
    drawn = figures.report_figures(inputs.results, reference=inputs.reference, histories=inputs.histories)
    embedded = []
    try:
        for figure in drawn:
            embedded.append(_embedded(figure, png_folder))
    except OSError:  # a full disk
        raise
    except Exception as error:  # numbers that took hours are not lost to a picture of them
        warnings.warn(
            f"the page lacks figures: matplotlib failed with {error!r}.", RuntimeWarning, stacklevel=3
        )
    base, best = wording.base_and_best(rows)
    beside = _shown_with_cases(inputs.results, base.name, best.name)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        title=inputs.title,
        headline=wording.headline(rows),
        tiles=[_tile(name, base, best) for name in METRICS],
        arrows={
            name: "higher is better" if name in HIGHER_IS_BETTER else "lower is better" for name in METRICS
        },
        rows=rows,
        leaders=_leaders(rows),
        footnote=wording.footnote(rows),
        sections=_sections(embedded),
        worst=_worst_cases(beside, best.name),
        worst_of=best.name,
        worst_models=[result.name for result in beside],
        worst_metrics=_WORST_METRICS,
        tables=inputs.tables,
        provenance=inputs.provenance,
        wording=wording,
    )


def _write_tables(folder: Path, rows: Sequence[ModelRow], results: Sequence[Result]) -> None:
    (folder / "cases").mkdir(exist_ok=True)
    write_csv(rows, folder / "table.csv")
    (folder / "table.json").write_text(
        json.dumps(to_json(rows), indent=1, ensure_ascii=False), encoding="utf-8", errors="backslashreplace"
    )
    for i, result in enumerate(results):
        result.write_case_csv(folder / "cases" / f"{archive.file_stem(i, result.name)}.csv")


@dataclasses.dataclass(frozen=True)
class _Embedded:
    """A figure of the page with its picture as a data URI."""

    section: str
    title: str
    how_to_read: str
    alt: str
    uri: str


def _embedded(figure: figures.ReportFigure, png_folder: Path | None) -> _Embedded:
    if png_folder is not None:
        png_folder.mkdir(parents=True, exist_ok=True)
        (png_folder / f"{figure.name}.png").write_bytes(_picture(figure.figure, "png", dpi=200))
    svg = _picture(figure.figure, "svg", metadata={"Date": None})
    uri = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode('ascii')}"
    return _Embedded(figure.section, figure.title, figure.how_to_read, figure.alt, uri)


def _picture(figure: figures.Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with figures.style():
        figure.savefig(buffer, format=kind, backend={"png": "agg"}.get(kind, kind), **options)
    return buffer.getvalue()


def _sections(embedded: Iterable[_Embedded]) -> list[dict[str, Any]]:
    """Figures in a row under the same heading."""
    return [
        {"title": section, "figures": list(members)}
        for section, members in itertools.groupby(embedded, key=lambda figure: figure.section)
    ]


def _tile(metric: str, base: ModelRow, best: ModelRow) -> dict[str, Any]:
    """A large number at the head of the page: where the metric was, where it is, and how it changed."""
    before, after = base.metrics[metric], best.metrics[metric]
    tile = {"metric": metric, "before": "", "after": wording.number(after.mean), "change": "", "tone": "same"}
    change = after.change
    if change is None:
        return tile | {"change": wording.interval(after.low, after.high)}
    better = (change.difference > 0) == (metric in HIGHER_IS_BETTER)
    clear = change.p_value < 0.05 and change.difference != 0
    return tile | {
        "before": wording.number(before.mean),
        "change": wording.change(change),
        "tone": "same" if not clear else "better" if better else "worse",
    }


def _leaders(rows: Sequence[ModelRow]) -> dict[str, str]:
    """Name of the best model for each metric, the reference aside; none where there is nothing to compare."""
    leaders = {}
    for metric in METRICS:
        means = {row.name: row.metrics[metric].mean for row in rows if row.role != "reference"}
        means = {name: mean for name, mean in means.items() if not math.isnan(mean)}
        best = max if metric in HIGHER_IS_BETTER else min
        leaders[metric] = best(means, key=lambda name: means[name]) if len(means) > 1 else ""
    return leaders


def _worst_cases(results: Sequence[Result], worst_of: str) -> list[dict[str, Any]]:
    """The cases and classes with the largest ACE under the model `worst_of`, with all `results`."""
    chosen = next(result for result in results if result.name == worst_of)
    ace = chosen.metrics()["ACE"]
    worst_first = [divmod(int(i), ace.shape[1]) for i in np.argsort(-ace, axis=None, kind="stable")]
    measured = [(case, k) for case, k in worst_first if not math.isnan(ace[case, k])]
    tables = [_numbers_by_case(result) for result in results]
    return [
        {
            "case": chosen.case_names[case],
            "class": chosen.class_names[k],
            "values": [
                table.get((chosen.case_names[case], k), [""] * len(_WORST_METRICS)) for table in tables
            ],
        }
        for case, k in measured[:_WORST]
    ]


def _numbers_by_case(result: Result) -> dict[tuple[str, int], list[str]]:
    """What the table of single cases shows of a result, by name of the case and index of the class."""
    metrics = result.metrics()
    return {
        (name, k): [wording.number(float(metrics[metric][case, k])) for metric in _WORST_METRICS]
        for case, name in enumerate(result.case_names)
        for k in range(len(result.class_names))
    }


def _shown_with_cases(results: Sequence[Result], base: str, best: str) -> list[Result]:
    """As many models as fit beside each other: all, or of more than three the baseline and the best."""
    return [result for result in results if len(results) <= 3 or result.name in (base, best)]
