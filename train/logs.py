"""Numbers over the course of a run, as CSV files that grow."""

import csv
from collections.abc import Mapping
from pathlib import Path


class CsvLog:
    """Rows of one CSV file; the first row's keys are the columns.

    Args:
        file: read if it is there, so that a resumed run goes on with it.
        before_step: rows from this step on are dropped: a resumed run takes these steps again.
    """

    def __init__(self, file: Path, *, before_step: int = 0):
        self._file = file
        self.rows = [row for row in read_log(file) if row["step"] < before_step]
        if file.exists():
            self._write("w", self.rows)

    def add(self, rows: list[Mapping[str, float]]) -> None:
        """Appends rows, to the file as well."""
        new = [{name: float(value) for name, value in row.items()} for row in rows]
        self._write("a" if self.rows else "w", new, header=not self.rows)
        self.rows += new

    def _write(self, mode: str, rows: list[dict[str, float]], *, header: bool = True) -> None:
        if not rows and not self.rows:
            self._file.unlink(missing_ok=True)
            return
        with self._file.open(mode, newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list((self.rows or rows)[0]))
            if header:
                writer.writeheader()
            writer.writerows({name: f"{value:.7g}" for name, value in row.items()} for row in rows)


def read_log(file: Path) -> list[dict[str, float]]:
    """The rows of a log; none if there is no such file."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(lines)]
