"""A report's inputs on disk, so that the page can be made again without running a model again."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calib_jax.plots import History
from calib_jax.report.results import ModelResult, RepeatedResult, Result

Table = Sequence[Sequence[str]]

_INDEX = "report.json"
_RESULTS = "results"


@dataclasses.dataclass(frozen=True)
class ReportInputs:
    """What `write_report` was given.

    Attributes:
        results: one result per model.
        title: title of the page.
        histories: training curves per model.
        provenance: where the numbers come from: command, versions, data.
        reference: a further result that is shown but not tested.
        baseline: name of the model that the others are compared with.
        tables: further tables by title, as lines of cells, the head first.
    """

    results: tuple[Result, ...]
    title: str
    histories: Mapping[str, History]
    provenance: Mapping[str, str]
    reference: Result | None
    baseline: str
    tables: Mapping[str, Table] = dataclasses.field(default_factory=dict)


def save_inputs(folder: Path, inputs: ReportInputs) -> None:
    """Writes `report.json` and a `results/*.npz` for each model, or each of its repeats, into `folder`."""
    (folder / _RESULTS).mkdir(parents=True, exist_ok=True)
    models = [*inputs.results, *([inputs.reference] if inputs.reference else [])]
    saved = [_save(folder, i, model) for i, model in enumerate(models)]
    index = {
        "title": inputs.title,
        "results": saved[: len(inputs.results)],
        "reference": saved[-1] if inputs.reference else None,
        "baseline": inputs.baseline,
        "histories": {
            name: {column: [_json_number(value) for value in values] for column, values in history.items()}
            for name, history in inputs.histories.items()
        },
        "provenance": {key: str(value) for key, value in inputs.provenance.items()},
        "tables": inputs.tables,
    }
    # What is no Unicode, as a file's name may be, becomes an escape that JSON reads back.
    text = json.dumps(index, indent=1, ensure_ascii=False)
    (folder / _INDEX).write_text(text, encoding="utf-8", errors="backslashreplace")


def load_inputs(folder: Path) -> ReportInputs:
    """Reads what `save_inputs` wrote; without a `report.json`, every result in `folder` by file name.

    Raises:
        ValueError: if the folder is not there, holds no result, or a file cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {os.fspath(folder)}.")
    if not (folder / _INDEX).is_file():
        results = tuple(ModelResult.load(path) for path in _result_files(folder))
        return ReportInputs(results, "Calibration report", {}, {}, None, results[0].name)
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8-sig"))
        return ReportInputs(
            results=tuple(_load(folder, entry) for entry in index["results"]),
            title=index["title"],
            histories=index["histories"],
            provenance=index["provenance"],
            reference=_load(folder, index["reference"]) if index["reference"] else None,
            baseline=index["baseline"],
            tables=index.get("tables", {}),
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / _INDEX} is not an index written by write_report: {error!r}") from error
    except FileNotFoundError as error:
        raise ValueError(f"{folder / _INDEX} names {error.filename}, which is not there.") from error


def _save(folder: Path, index: int, model: Result) -> str | dict[str, Any]:
    """Writes a result; its entry in the index, a path or for each repeat one."""
    if isinstance(model, ModelResult):
        path = f"{_RESULTS}/{file_stem(index, model.name)}.npz"
        model.save(folder / path)
        return path
    paths = {
        repeat: f"{_RESULTS}/{file_stem(index, f'{model.name} {repeat}')}.npz" for repeat in model.repeats
    }
    for repeat, result in model.repeats.items():
        result.save(folder / paths[repeat])
    return {"name": model.name, "repeats": paths}


def _load(folder: Path, entry: str | dict[str, Any]) -> Result:
    if isinstance(entry, str):
        return ModelResult.load(folder / entry)
    repeats = {repeat: ModelResult.load(folder / path) for repeat, path in entry["repeats"].items()}
    return RepeatedResult(entry["name"], repeats)


def file_stem(index: int, name: str) -> str:
    """A file name for a model: its place in the report and what of its name file systems agree on."""
    return f"{index:02d}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')[:60] or 'model'}"


def _result_files(folder: Path) -> Sequence[Path]:
    files = sorted(folder.glob("*.npz")) or sorted((folder / _RESULTS).glob("*.npz"))
    if not files:
        raise ValueError(
            f"{os.fspath(folder)} holds neither a {_INDEX} nor a result (*.npz): name a folder that "
            "write_report or ModelResult.save wrote to."
        )
    return files


def _json_number(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
