"""Numbers over the course of a run: CSV files that grow, and the same for TensorBoard."""

import contextlib
import csv
import io
import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from calib_jax.results import ModelResult
from train.errors import NotFinite
from train.processes import is_first
from train.run.folder import writing, written_whole
from train.terms import is_term

_EVENTS: Any = event_pb2  # its classes are made at run time
_MEDIAN_OF = 20  # steps


class RunLog:
    """What a run writes down as it goes on: `log.csv` (every step), `validation.csv`, and both for TensorBoard.

    Of several processes that train as one, the first does.

    Args:
        folder: of the run.
        start: step that it starts at.
        batch_size: patches per step.
    """

    def __init__(self, folder: Path, start: int, batch_size: int):
        self._batch_size = batch_size
        self._writes = self._draws = is_first()
        if self._writes:
            self._steps = CsvLog(folder / "log.csv", before_step=start)
            self._validation = CsvLog(folder / "validation.csv", before_step=start + 1)
            self._board = TensorBoardLog(folder / "tensorboard", from_step=start)
        self._pending: list[dict[str, Any]] = []
        self._cases: list[list[str]] = []
        self._since = time.perf_counter()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writes:
            self._board.close()

    def pend(self, row: dict[str, Any], cases: list[str]) -> None:
        """Takes a step's metrics, which the device may not have computed yet, and the names of its cases."""
        self._pending.append(row)
        self._cases.append(cases)

    def flush(self) -> float:
        """Waits for the pending steps and logs them; the last step's loss.

        Raises:
            NotFinite: if the loss or its gradient is no longer a number.
            InputError: if the logs cannot be written.
        """
        rows, cases = jax.device_get(self._pending), self._cases
        self._pending, self._cases = [], []
        now = time.perf_counter()
        speed = len(rows) / (now - self._since)
        self._since = now
        speeds = {"steps_per_second": speed, "patches_per_second": speed * self._batch_size}
        rows = [row | speeds for row in rows]
        if self._writes:
            self._steps.add(rows)
            self._board.add("train", rows)
        for row, names in zip(rows, cases, strict=True):
            _check_finite(row, names)
        return float(rows[-1]["loss"])

    def divergence(self) -> str:
        """See `divergence`; nothing in processes that write no log."""
        return divergence(self._steps.rows) if self._writes else ""

    def validation(self, step: int, metrics: Mapping[str, float], result: ModelResult) -> None:
        """Logs a validation, with its reliability diagram.

        Raises:
            InputError: if the logs cannot be written.
        """
        if not self._writes:
            return
        rows = [{"step": step, **metrics}]
        self._validation.add(rows)
        self._board.add("validation", rows)
        if self._draws:
            try:
                picture = reliability_picture(result)
            except Exception as error:  # whatever matplotlib raises: a training goes on without its pictures
                self._draws = False
                print(f"note: TensorBoard gets no reliability diagrams, since matplotlib failed: {error!r}")
            else:
                self._board.add_image("validation/reliability", picture, step)
        self._since = time.perf_counter()  # the time that it took is not the steps'


def reliability_picture(result: ModelResult) -> UInt8[np.ndarray, "height width rgb"]:
    """A reliability diagram of all classes together, drawn without pyplot in the report's style."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from calib_jax import plots
    from calib_jax.report import figures

    with figures.style():
        figure = Figure(figsize=(4, 4), layout="constrained")
        plots.reliability_diagram(result.stats, band=None, ax=figure.add_subplot())
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3]


def _check_finite(row: Mapping[str, float], cases: list[str]) -> None:
    for name, what in (("loss", "loss"), ("grad_norm", "gradient")):
        if not np.isfinite(row[name]):
            raise NotFinite(f"The {what} is not finite from step {row['step']} on", cases)


class CsvLog:
    """Rows of one CSV file; the first row's keys are the columns.

    Args:
        file: read if it is there, so that a resumed run goes on with it.
        before_step: rows from this step on are dropped: a resumed run takes these steps again.
    """

    def __init__(self, file: Path, *, before_step: int = 0):
        self._file = file
        rows, broken = parse_log(file)
        self.rows = [row for row in rows if row["step"] < before_step]
        if broken:
            damaged = file.with_name(f"{file.name}.damaged")
            with writing(damaged):
                shutil.copyfile(file, damaged)
            print(f"note: {broken_lines(file, broken)}; the file as it was is {damaged}", file=sys.stderr)
        if file.exists():
            self._write_whole()

    def add(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Appends rows, to the file as well."""
        new = [{name: float(value) for name, value in row.items()} for row in rows]
        known = bool(self.rows) and all(row.keys() <= self.rows[0].keys() for row in new)
        self.rows += new
        if known:
            with writing(self._file), self._file.open("a", encoding="utf-8", newline="") as file:
                file.write(self._text(new))
        else:  # the first rows, or those of a version that logs more
            self._write_whole()

    def _write_whole(self) -> None:
        if not self.rows:
            self._file.unlink(missing_ok=True)
            return
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        self.rows = [{name: row.get(name, np.nan) for name in columns} for row in self.rows]
        with writing(self._file), written_whole(self._file) as partial:
            text = self._text([dict(zip(columns, columns, strict=True)), *self.rows])
            partial.write_text(text, encoding="utf-8", newline="")

    def _text(self, rows: Sequence[Mapping[str, float | str]]) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(self.rows[0]), restval="nan")
        for row in rows:
            writer.writerow({n: v if isinstance(v, str) else f"{v:.7g}" for n, v in row.items()})
        return text.getvalue()


class TensorBoardLog:
    """Scalars and figures of one run, for `tensorboard --logdir runs`.

    Written by the caller's own thread, so that a full disk is an error here and now: a writer of its own thread
    would die there, and the run wait for it for ever.

    Args:
        folder: of its event files.
        from_step: a resumed run's first step; what an earlier one logged from there on is not shown.
    """

    def __init__(self, folder: Path, *, from_step: int = 0):
        self._folder = folder
        with writing(folder):
            folder.mkdir(exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        if from_step:
            restart = _EVENTS.SessionLog(status=_EVENTS.SessionLog.START)
            self._writer.write_event(
                _EVENTS.Event(wall_time=time.time(), step=from_step, session_log=restart)
            )

    def close(self) -> None:
        """Closes the file; all that was added is in it already, or could not be."""
        with contextlib.suppress(OSError):
            self._writer.close()

    def add(self, group: str, rows: Sequence[Mapping[str, float]]) -> None:
        """Scalars `group/name` of rows that have a `step`."""
        self._write(
            (int(row["step"]), summary.scalar(f"{group}/{name}", float(value)))
            for row in rows
            for name, value in row.items()
            if name != "step"
        )

    def add_image(self, name: str, pixels: UInt8[np.ndarray, "height width rgb"], step: int) -> None:
        """An image."""
        self._write([(step, summary.image(name, pixels, dataformats="HWC"))])

    def _write(self, contents: Iterable[tuple[int, Any]]) -> None:
        with writing(self._folder):
            for step, content in contents:
                self._writer.write_event(_EVENTS.Event(wall_time=time.time(), step=step, summary=content))
            self._writer.flush()


def read_log(file: Path) -> list[dict[str, float]]:
    """The rows of a log that can be read; none if there is no such file."""
    return parse_log(file)[0]


def parse_log(file: Path) -> tuple[list[dict[str, float]], list[int]]:
    """The rows of a log, and the numbers of the lines that are none.

    A last line that a killed run, or a full disk, left without its end is neither.
    """
    if not file.exists():
        return [], []
    header, *lines = file.read_text(encoding="utf-8-sig", errors="replace").split("\n")[:-1] or [""]
    columns = header.rstrip("\r").split(",")
    rows, broken = [], []
    for number, line in enumerate(lines, 2):
        row = _row(columns, line)
        if row is None:
            broken.append(number)
        else:
            rows.append(row)
    return rows, broken


def _row(columns: list[str], line: str) -> dict[str, float] | None:
    """A line's numbers; None if it has other than one for each column, or no step."""
    try:
        row = dict(zip(columns, map(float, line.split(",")), strict=True))
        return row if row["step"] >= 0 and row["step"].is_integer() else None
    except (ValueError, KeyError):
        return None


def broken_lines(file: Path, broken: Sequence[int]) -> str:
    """Says which lines of a log are left out; nothing for none."""
    if not broken:
        return ""
    some = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
    return f"{file} has {len(broken)} lines that cannot be read ({some}) and are left out"


def divergence(rows: Sequence[Mapping[str, float]]) -> str:
    """Says which terms of the loss have grown far beyond where they began, as under too high a learning rate.

    A term has if its median over the last 20 steps exceeds 10, and 10 times the least of the first 20; of a
    shorter run the halves are compared. Dice and calibration errors never do: they lie between 0 and 1.
    Terms are compared without their weights, so that one which sets in late changes nothing.

    Args:
        rows: of `log.csv`.

    Returns:
        A sentence, or nothing.

    Example:
        >>> losses = [0.7] * 50 + [5e6] * 50
        >>> divergence([{"step": step, "ce": loss} for step, loss in enumerate(losses)]).partition(";")[0]
        'the training has diverged: ce is 5e+06 at step 99 and was 0.7 at first'
    """
    size = min(_MEDIAN_OF, len(rows) // 2)
    if not size:
        return ""
    grown = []
    for term in filter(is_term, rows[-1]):
        first, last = (
            [row[term] for row in part if np.isfinite(row.get(term, np.nan))]
            for part in (rows[:size], rows[-size:])
        )
        if not (first and last):
            continue
        first, last = min(first), float(np.median(last))
        if last > 10 * max(first, 1.0):
            grown.append(f"{term} is {last:.3g} at step {rows[-1]['step']:.0f} and was {first:.3g} at first")
    if not grown:
        return ""
    return f"the training has diverged: {', '.join(sorted(grown))}; lower --learning-rate or give --clip-norm"
