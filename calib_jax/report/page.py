"""The report as one self-contained HTML page, with its figures, tables and inputs beside it."""

import base64
import functools
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calib_jax.report import archive, wording
from calib_jax.report.archive import ReportInputs, Table
from calib_jax.report.details import CasePicture, Details
from calib_jax.report.table import ModelRow, check_comparable, compare_models, to_json, write_csv
from calib_jax.results import HIGHER_IS_BETTER, METRICS, SCORES, History, Result

Figures = dict[str, list[dict[str, str]]]

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
    rows: Sequence[ModelRow] | None = None,
    details: Details | None = None,
    drawn: Callable[[], Figures] | None = None,
) -> Path:
    """Writes a report that compares models on a data set.

    `index.html` contains its style and figures and loads nothing from the network. The folder also gets
    `figures/*.png`, the table as `table.csv` and `table.json`, every case in `cases/*.csv`, and the inputs
    (`report.json`, `results/*.npz`), from which `python -m calib_jax.report FOLDER` makes the page again. With
    `details`, the table is `metrics.csv`, a part of `report.json`, and figures are saved as SVG too.

    Args:
        folder: output folder; it is created if needed, and older files of the same names are replaced.
        results: one result per model, all with the same classes; `RepeatedResult` for a model trained several
            times.
        title: title of the page.
        histories: training curves by name of the model; see `calib_jax.plots.loss_curves`.
        provenance: facts that a reader needs to repeat the numbers, such as command, versions and data.
        reference: a further result to show without a test, such as the best that any model could reach.
        baseline: index or name of the model that the others are compared with.
        tables: further tables by title, such as published figures; each is a list of rows of cells with the
            header first.
        rows: return value of `compare_models` for the same `results`, `baseline` and `reference`, to save the
            time of computing it again; None computes it.
        details: findings, further tables and pictures of cases, whose files lie in the folder already.
        drawn: function that returns what `draw_figures` returned, such as the `result` of a future; None draws.

    Returns:
        Path of `index.html`.

    Raises:
        ValueError: if the results cannot be compared (see `compare_models`), or `rows` are of other models.
    """
    folder = Path(folder)
    base = results[check_comparable(results, baseline=baseline, reference=reference)]
    if rows is None:
        rows = compare_models(results, baseline=base.name, reference=reference)
    inputs = ReportInputs(
        tuple(results), title, histories or {}, provenance or {}, reference, base.name, tables or {}, details
    )
    shown = [result.name for result in inputs.shown]
    if [row.name for row in rows] != shown or wording.base_and_best(rows)[0].name != base.name:
        raise ValueError(
            f"rows are of {', '.join(row.name for row in rows)}, and the report is of {', '.join(shown)} with the "
            f"baseline {base.name}: give compare_models the same results, baseline and reference."
        )
    if details is None:
        archive.save_inputs(folder, inputs)
        write_tables(folder, rows, results)
    else:
        archive.save_inputs(folder, inputs, to_json(rows))
        write_csv(rows, folder / "metrics.csv")
    page = folder / "index.html"
    html = render(inputs, rows, folder, drawn)
    page.write_text(html, encoding="utf-8", errors="backslashreplace")  # a file name may hold surrogates
    return page


def render(
    inputs: ReportInputs,
    rows: Sequence[ModelRow],
    folder: Path,
    drawn: Callable[[], Figures] | None = None,
) -> str:
    """The page as a string of HTML.

    Args:
        inputs: arguments of `write_report`.
        rows: the table, from `compare_models`.
        folder: folder of the report, to which every figure is also saved.
        drawn: see `write_report`.
    """
    import jinja2

    base, best = wording.base_and_best(rows)
    beside = [
        result
        for result in inputs.results
        if len(inputs.results) <= 3 or result.name in (base.name, best.name)
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        inputs=inputs,
        tiles=[_tile(name, base, best) for name in METRICS],
        rows=rows,
        leaders=_leaders(rows),
        figures=_if_it_succeeds(drawn or functools.partial(draw_figures, inputs, folder)),
        details=inputs.details,
        pictures=_pictures(inputs.details, folder),
        same_in_classes=_same_in_classes(rows),
        worst=_worst_cases(beside, best.name),
        worst_of=best.name,
        worst_models=[result.name for result in beside],
        worst_metrics=_WORST_METRICS,
        wording=wording,
    )


def write_tables(folder: Path, rows: Sequence[ModelRow], results: Sequence[Result]) -> None:
    """Writes the table as `table.csv` and `table.json`, and every case of each model to `cases/*.csv`."""
    (folder / "cases").mkdir(exist_ok=True)
    write_csv(rows, folder / "table.csv")
    (folder / "table.json").write_text(
        json.dumps(to_json(rows), indent=1, ensure_ascii=False), encoding="utf-8", errors="backslashreplace"
    )
    for i, result in enumerate(results):
        result.write_case_csv(folder / "cases" / f"{archive.file_stem(i, result.name)}.csv")


def _pictures(details: Details | None, folder: Path) -> list[tuple[CasePicture, list[tuple[str, str]]]]:
    """Every picture of a case with its panels: title and data URI. A panel whose file is gone is left out."""
    if details is None:
        return []
    files = details.picture_files(folder)
    uris = {
        file: f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
        for file, path in files.items()
        if path.is_file()
    }
    return [
        (picture, [(title, uris[file]) for title, file in picture.panels.items() if file in uris])
        for picture in details.pictures
    ]


def _same_in_classes(rows: Sequence[ModelRow]) -> set[str]:
    """Scores of a whole case, such as the likelihood of classes that exclude each other."""
    return {
        name
        for name in rows[0].metrics
        if name in SCORES and all(len(set(row.metrics[name].per_class.values())) == 1 for row in rows)
    }


def draw_figures(inputs: ReportInputs, folder: Path) -> Figures:
    """Draws the figures of a report into `folder/figures`, and returns them by kind, with pictures as data URIs."""
    from calib_jax.report import figures

    drawn: Figures = {}
    for figure in figures.report_figures(inputs):
        uri = figures.draw(figure, folder / "figures", save_svg=inputs.details is not None)
        entry = {"title": figure.title, "alt": figure.alt, "uri": uri}
        drawn.setdefault(figure.name.partition("-")[0], []).append(entry)
    return drawn


def _if_it_succeeds(draw: Callable[[], Figures]) -> Figures:
    try:
        return draw()
    except OSError:  # such as a full disk
        raise
    except Exception as error:  # a failure to draw must not cost the numbers, which took hours
        warnings.warn(
            f"the page lacks figures: drawing them failed with {error!r}.", RuntimeWarning, stacklevel=4
        )
        return {}


def _tile(metric: str, base: ModelRow, best: ModelRow) -> dict[str, Any]:
    """A large number at the head of the page: a metric before and after, and its change."""
    before, after = base.metrics[metric], best.metrics[metric]
    tile = {"metric": metric, "before": "", "after": wording.number(after.mean), "tone": "same"}
    change = after.change
    if change is None:
        return tile | {"change": wording.interval(after.low, after.high)}
    if change.p_value < 0.05 and change.difference != 0:
        better = (change.difference > 0) == (metric in HIGHER_IS_BETTER)
        tile["tone"] = "better" if better else "worse"
    return tile | {"before": wording.number(before.mean), "change": wording.change(change)}


def _leaders(rows: Sequence[ModelRow]) -> dict[str, str]:
    """Name of the best model for each metric, without the reference; "" if there is only one model."""
    leaders = {}
    for metric in rows[0].metrics:
        means = {row.name: row.metrics[metric].mean for row in rows if row.role != "reference"}
        means = {name: mean for name, mean in means.items() if not math.isnan(mean)}
        best = max if metric in HIGHER_IS_BETTER else min
        leaders[metric] = best(means, key=lambda name: means[name]) if len(means) > 1 else ""
    return leaders


def _worst_cases(results: Sequence[Result], worst_of: str) -> list[dict[str, Any]]:
    """Cases and classes with the largest ACE under the model `worst_of`, with the figures of all `results`."""
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
    """Cells of the table of single cases, by name of the case and index of the class."""
    metrics = result.metrics()
    return {
        (name, k): [wording.number(float(metrics[metric][case, k])) for metric in _WORST_METRICS]
        for case, name in enumerate(result.case_names)
        for k in range(len(result.class_names))
    }
