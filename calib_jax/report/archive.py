"""Inputs of a report on disk, from which the page can be made again without running a model."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calib_jax.report.details import Details
from calib_jax.results import History, ModelResult, RepeatedResult, Result

Table = Sequence[Sequence[str]]

_INDEX = "report.json"
_RESULTS = "results"


@dataclasses.dataclass(frozen=True)
class ReportInputs:
    """Arguments of `write_report`.

    Attributes:
        results: one result per model.
        title: title of the page.
        histories: training curves by name of the model.
        provenance: origin of the numbers: command, versions, data.
        reference: a further result that is shown but not tested.
        baseline: name of the model that the others are compared with.
        tables: further tables by title, each a list of rows of cells with the header first.
        details: findings and pictures of cases; None for a comparison alone.
    """

    results: tuple[Result, ...]
    title: str
    histories: Mapping[str, History]
    provenance: Mapping[str, str]
    reference: Result | None
    baseline: str
    tables: Mapping[str, Table] = dataclasses.field(default_factory=dict)
    details: Details | None = None

    @property
    def shown(self) -> tuple[Result, ...]:
        """The results, and the reference if there is one."""
        return self.results if self.reference is None else (*self.results, self.reference)


def save_inputs(folder: Path, inputs: ReportInputs, figures: Mapping[str, Any] | None = None) -> None:
    """Writes `report.json`, and one `results/*.npz` per model or repeat, into `folder`.

    Args:
        folder: of the report.
        inputs: what the page can be made from again.
        figures: further entries of `report.json`, for other programs to read.
    """
    (folder / _RESULTS).mkdir(parents=True, exist_ok=True)
    saved = [_save(folder, i, model) for i, model in enumerate(inputs.shown)]
    index = {
        "title": inputs.title,
        "results": saved[: len(inputs.results)],
        "reference": saved[-1] if inputs.reference else None,
        "baseline": inputs.baseline,
        "histories": without_nan(inputs.histories),
        "provenance": {key: str(value) for key, value in inputs.provenance.items()},
        "tables": inputs.tables,
        **({"details": without_nan(inputs.details.to_json())} if inputs.details else {}),
        **(figures or {}),
    }
    # A file name may hold surrogates: they become escapes, which JSON reads back.
    text = json.dumps(index, indent=1, ensure_ascii=False)
    (folder / _INDEX).write_text(text, encoding="utf-8", errors="backslashreplace")


def load_inputs(folder: Path) -> ReportInputs:
    """Reads the files that `save_inputs` wrote; without a `report.json`, every result by file name.

    Raises:
        ValueError: if the folder does not exist, holds no result, or a file cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {os.fspath(folder)}.")
    if not (folder / _INDEX).is_file():
        files = sorted(folder.glob("*.npz")) or sorted((folder / _RESULTS).glob("*.npz"))
        if not files:
            raise ValueError(
                f"{os.fspath(folder)} holds neither a {_INDEX} nor a result (*.npz): name a folder that "
                "write_report or ModelResult.save wrote to."
            )
        results = tuple(map(ModelResult.load, files))
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
            details=Details.from_json(index["details"]) if "details" in index else None,
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / _INDEX} is not an index written by write_report: {error!r}") from error
    except FileNotFoundError as error:
        raise ValueError(f"{folder / _INDEX} names {error.filename}, which does not exist.") from error


def file_stem(index: int, name: str) -> str:
    """A file name for a model: its index in the report and the characters that all file systems allow."""
    return f"{index:02d}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')[:60] or 'model'}"


def _save(folder: Path, index: int, model: Result) -> str | dict[str, Any]:
    """Saves a result; returns its entry in the index, a path or one path per repeat."""

    def save(name: str, result: ModelResult) -> str:
        path = f"{_RESULTS}/{file_stem(index, name)}.npz"
        result.save(folder / path)
        return path

    if isinstance(model, ModelResult):
        return save(model.name, model)
    paths = {repeat: save(f"{model.name} {repeat}", result) for repeat, result in model.repeats.items()}
    return {"name": model.name, "repeats": paths}


def _load(folder: Path, entry: str | dict[str, Any]) -> Result:
    if isinstance(entry, str):
        return ModelResult.load(folder / entry)
    repeats = {repeat: ModelResult.load(folder / path) for repeat, path in entry["repeats"].items()}
    return RepeatedResult(entry["name"], repeats)


def without_nan(value: Any) -> Any:
    """Mappings and lists of numbers as JSON can hold them: None where nothing finite was measured."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str):
        if any(isinstance(x, str | Mapping | list | tuple) for x in value):
            return [without_nan(x) for x in value]
        return [without_nan(x) for x in np.asarray(value, np.float64).tolist()]
    return None if isinstance(value, float) and not math.isfinite(value) else value
