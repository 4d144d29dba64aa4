"""Tables of a run's figures beside published ones: means and standard deviations over cases, as in the papers."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calib_jax.report import METRICS, Result

HEADER = ("", "cases", *METRICS)


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: name of a model, or of a region of the model above.
        cases: number of cases.
        figures: mean and standard deviation over cases of each metric in `METRICS`. A case's figure is the mean
            over its regions.
    """

    name: str
    cases: int
    figures: tuple[tuple[float, float], ...]

    def cells(self) -> tuple[str, ...]:
        """The texts of the line, in the order of `HEADER`."""
        return self.name, str(self.cases), *(f"{mean:.4f} ± {std:.4f}" for mean, std in self.figures)


def rows_of(result: Result) -> list[Row]:
    """The row of a result, and the rows of its regions if it has several."""
    names = result.class_names if len(result.class_names) > 1 else ()
    columns = {result.name: slice(None)} | {f"  {name}": slice(k, k + 1) for k, name in enumerate(names)}
    metrics = [result.metrics()[metric] for metric in METRICS]
    return [
        Row(name, len(result.case_names), tuple(_spread(values[:, part]) for values in metrics))
        for name, part in columns.items()
    ]


def _spread(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation over the cases with a defined value."""
    means = np.nanmean(values[~np.isnan(values).all(1)], 1)
    return (float(means.mean()), float(means.std())) if means.size else (float("nan"), float("nan"))


def to_markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    lines = [HEADER, ("---", *["---:"] * (len(HEADER) - 1)), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write_table(folder: Path, rows: Sequence[Row]) -> None:
    """Writes `published.md`, `published.csv` and `published.json`."""
    (folder / "published.md").write_text(to_markdown(rows), encoding="utf-8")
    numbers = [
        {"name": row.name.strip(), "cases": row.cases}
        | {
            f"{metric}{kind}": None if np.isnan(value) else value
            for metric, pair in zip(METRICS, row.figures, strict=True)
            for kind, value in zip(("", "_std"), pair, strict=True)
        }
        for row in rows
    ]
    (folder / "published.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    with (folder / "published.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, numbers[0])
        writer.writeheader()
        writer.writerows(numbers)
