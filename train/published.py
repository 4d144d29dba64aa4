"""A run's figures beside published ones, as the papers' tables have them: means and spreads over cases."""

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
        name: of the model, or of a region of the model above.
        cases: how many.
        figures: mean and standard deviation over cases of each of `METRICS`; a case's figure is the mean over its
            regions.
    """

    name: str
    cases: int
    figures: tuple[tuple[float, float], ...]

    def cells(self) -> tuple[str, ...]:
        """Its text, in the order of `HEADER`."""
        return self.name, str(self.cases), *(f"{mean:.4f} ± {std:.4f}" for mean, std in self.figures)


def rows_of(result: Result) -> list[Row]:
    """A result's own row and, where there are several, that of each region."""
    metrics = [result.metrics()[name] for name in METRICS]
    regions = result.class_names if len(result.class_names) > 1 else ()
    own = Row(result.name, len(result.case_names), tuple(_spread(values) for values in metrics))
    return [
        own,
        *(
            Row(f"  {region}", own.cases, tuple(_spread(values[:, [k]]) for values in metrics))
            for k, region in enumerate(regions)
        ),
    ]


def _spread(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation over cases of what is defined."""
    counted = ~np.isnan(values)
    cases = counted.any(1)
    means = np.where(counted, values, 0).sum(1)[cases] / counted.sum(1)[cases]
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
