"""Numbers over the course of a run: CSV files that grow, and the same for TensorBoard."""

import csv
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tensorboardX import SummaryWriter

from calib_jax import plots
from calib_jax.report import ModelResult
from train.errors import InputError


class RunLog:
    """What a run writes down as it goes on: `log.csv` (every step), `validation.csv`, and both for TensorBoard.

    Args:
        folder: of the run.
        start: step that it starts at.
    """

    def __init__(self, folder: Path, start: int):
        self._folder = folder
        self._steps = CsvLog(folder / "log.csv", before_step=start)
        self._validation = CsvLog(folder / "validation.csv", before_step=start + 1)
        self._board = TensorBoardLog(folder / "tensorboard", from_step=start)
        self._pending: list[dict[str, Any]] = []
        self._cases: list[list[str]] = []
        self._since = time.perf_counter()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self._board.close()

    def pend(self, row: dict[str, Any], cases: list[str]) -> None:
        """Takes a step's metrics, which the device may not have computed yet, and the names of its cases."""
        self._pending.append(row)
        self._cases.append(cases)

    def flush(self) -> float:
        """Waits for the pending steps and logs them; the last step's loss.

        Raises:
            InputError: if the loss is no longer a number.
        """
        rows, cases = jax.device_get(self._pending), self._cases
        self._pending, self._cases = [], []
        now = time.perf_counter()
        speed = len(rows) / (now - self._since)
        self._since = now
        rows = [row | {"steps_per_second": speed} for row in rows]
        self._steps.add(rows)
        self._board.add("train", rows)
        for row, names in zip(rows, cases, strict=True):
            self._check(row, names)
        return float(rows[-1]["loss"])

    def _check(self, row: Mapping[str, float], cases: list[str]) -> None:
        if not np.isfinite(row["loss"]):
            raise InputError(
                f"The loss is not finite from step {row['step']} on, whose batch held {', '.join(cases)}: lower "
                "--learning-rate or set --clip-norm, and start again or --resume from the last checkpoint in "
                f"{self._folder / 'checkpoints'}."
            )

    def validation(self, step: int, metrics: Mapping[str, float], result: ModelResult) -> None:
        """Logs a validation, with its reliability diagram."""
        rows = [{"step": step, **metrics}]
        self._validation.add(rows)
        self._board.add("validation", rows)
        figure = Figure(figsize=(4, 4), layout="constrained")
        plots.reliability_diagram(result.stats, band=None, ax=figure.add_subplot())
        self._board.add_figure("validation/reliability", figure, step)
        self._since = time.perf_counter()  # the time that it took is not the steps'


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

    def add(self, rows: Sequence[Mapping[str, float]]) -> None:
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


class TensorBoardLog:
    """Scalars and figures of one run, for `tensorboard --logdir runs`.

    Args:
        folder: of its event files.
        from_step: a resumed run's first step; what an earlier one logged from there on is not shown.
    """

    def __init__(self, folder: Path, *, from_step: int = 0):
        self._writer = SummaryWriter(str(folder), purge_step=from_step or None)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()

    def add(self, group: str, rows: Sequence[Mapping[str, float]]) -> None:
        """Scalars `group/name` of rows that have a `step`."""
        for row in rows:
            for name, value in row.items():
                if name != "step":
                    self._writer.add_scalar(f"{group}/{name}", float(value), int(row["step"]))

    def add_figure(self, name: str, figure: Figure, step: int) -> None:
        """A matplotlib figure."""
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        self._writer.add_image(name, pixels, step, dataformats="HWC")


def read_log(file: Path) -> list[dict[str, float]]:
    """The rows of a log; none if there is no such file."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(lines)]
