"""The numbers of a run, step by step: CSV files, and the same for TensorBoard."""

import contextlib
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

from calib_jax.results import ModelResult
from train.errors import NotFinite
from train.processes import is_first
from train.run.folder import writing, written_whole
from train.terms import is_term

_MEDIAN_OF = 20  # steps


class RunLog:
    """The logs of a run: `log.csv` (every step), `validation.csv`, and both for TensorBoard.

    Of several processes that train as one, the first writes.

    Args:
        folder: of the run.
        start: the first step to log; later rows of an earlier process are dropped.
        batch_size: patches per step.
    """

    def __init__(self, folder: Path, start: int, batch_size: int):
        self._batch_size = batch_size
        self._writes = self._draws = is_first()
        if self._writes:
            self._steps = CsvLog(folder / "log.csv", before_step=start)
            self._validation = CsvLog(folder / "validation.csv", before_step=start + 1)
            self._board = TensorBoardLog(folder / "tensorboard", from_step=start)
        self._pending: list[tuple[dict[str, Any], list[str]]] = []
        self._since = time.perf_counter()
        self._has_diverged = False

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writes:
            self._board.close()

    def add_step(self, row: dict[str, Any], cases: list[str]) -> None:
        """Takes a step's metrics, which the device may still compute, and the names of its cases."""
        self._pending.append((row, cases))

    def flush(self) -> float:
        """Waits for the steps that were added and logs them; returns the last step's loss.

        Raises:
            NotFinite: the loss or its gradient is not finite.
            InputError: the logs cannot be written.
        """
        pending = jax.device_get([row for row, _ in self._pending])
        cases = [cases for _, cases in self._pending]
        self._pending = []
        now = time.perf_counter()
        speed = len(pending) / (now - self._since)
        self._since = now
        speeds = {"steps_per_second": speed, "patches_per_second": speed * self._batch_size}
        rows = [row | speeds for row in pending]
        if self._writes:
            self._steps.add(rows)
            self._board.add("train", rows)
        for row, names in zip(rows, cases, strict=True):
            for metric, what in (("loss", "loss"), ("grad_norm", "gradient")):
                if not np.isfinite(row[metric]):
                    raise NotFinite(f"The {what} is not finite from step {row['step']} on", names)
        return float(rows[-1]["loss"])

    def note_divergence(self) -> None:
        """Prints a note when the training first turns out to have diverged, see `divergence`."""
        if self._writes and not self._has_diverged and (sentence := divergence(self._steps.rows)):
            self._has_diverged = True
            print(f"\nnote: {sentence}", file=sys.stderr)

    def validation(self, step: int, metrics: Mapping[str, float], result: ModelResult) -> None:
        """Logs a validation with its reliability diagram.

        Raises:
            InputError: the logs cannot be written.
        """
        if not self._writes:
            return
        rows = [{"step": step, **metrics}]
        self._validation.add(rows)
        self._board.add("validation", rows)
        if self._draws:
            try:
                picture = reliability_picture(result)
            except Exception as error:  # whatever matplotlib raises, training continues without pictures
                self._draws = False
                print(f"note: TensorBoard gets no reliability diagrams, since matplotlib failed: {error!r}")
            else:
                self._board.add_image("validation/reliability", picture, step)
        self._since = time.perf_counter()  # the validation's time does not count as the steps'


def reliability_picture(result: ModelResult) -> UInt8[np.ndarray, "height width rgb"]:
    """A reliability diagram of all classes together, in the report's style and without pyplot."""
    from calib_jax import plots  # first, since it imports matplotlib despite a broken configuration

    # isort: split
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from calib_jax.report import figures

    with figures.style():
        figure = Figure(figsize=(4, 4), layout="constrained")
        plots.reliability_diagram(result.stats, band=None, ax=figure.add_subplot())
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3]


class CsvLog:
    """Rows of one CSV file; the first row's keys are the columns.

    Args:
        file: its rows are read if it exists.
        before_step: rows from this step on are dropped, since a resumed run logs these steps again.
    """

    def __init__(self, file: Path, *, before_step: int = 0):
        self._file = file
        rows, broken = parse_log(file)
        self.rows = [row for row in rows if row["step"] < before_step]
        if broken:
            damaged = file.with_name(f"{file.name}.damaged")
            with writing(damaged):
                shutil.copyfile(file, damaged)
            print(f"note: {broken_lines(file, broken)}; {damaged} is a copy of the file", file=sys.stderr)
        if file.exists():
            self._write_whole()

    def add(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Appends rows, also to the file."""
        new = [{name: float(value) for name, value in row.items()} for row in rows]
        known = bool(self.rows) and all(row.keys() <= self.rows[0].keys() for row in new)
        self.rows += new
        if known:
            with writing(self._file), self._file.open("a", encoding="utf-8", newline="") as file:
                file.write(self._lines(new))
        else:  # the first rows, or those of a version that logs more
            self._write_whole()

    def _write_whole(self) -> None:
        if not self.rows:
            self._file.unlink(missing_ok=True)
            return
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        self.rows = [{name: row.get(name, np.nan) for name in columns} for row in self.rows]
        with writing(self._file), written_whole(self._file) as partial:
            text = f"{','.join(columns)}\r\n{self._lines(self.rows)}"
            partial.write_text(text, encoding="utf-8", newline="")

    def _lines(self, rows: Sequence[Mapping[str, float]]) -> str:
        columns = self.rows[0]
        lines = (",".join(f"{row.get(name, np.nan):.7g}" for name in columns) for row in rows)
        return "".join(f"{line}\r\n" for line in lines)


class TensorBoardLog:
    """Scalars and images of one run, for `tensorboard --logdir runs`.

    The calling thread writes, so a full disk raises here. A writer's own thread would die of it, and the run would
    wait for that thread forever.

    Args:
        folder: of the event files.
        from_step: a resumed run's first step; TensorBoard hides what an earlier process logged from there on.
    """

    def __init__(self, folder: Path, *, from_step: int = 0):
        # Reading logs, as `python -m train status` does, needs no TensorBoard.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._summary, self._events = summary, event_pb2
        self._folder = folder
        with writing(folder):
            folder.mkdir(exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        if from_step:
            restart = self._events.SessionLog(status=self._events.SessionLog.START)
            self._writer.write_event(self._event(from_step, session_log=restart))

    def close(self) -> None:
        """Closes the file, into which everything was flushed or could not be."""
        with contextlib.suppress(OSError):
            self._writer.close()

    def add(self, group: str, rows: Sequence[Mapping[str, float]]) -> None:
        """Adds the scalars `group/name` of rows that have a `step`."""
        self._write(
            (int(row["step"]), self._summary.scalar(f"{group}/{name}", float(value)))
            for row in rows
            for name, value in row.items()
            if name != "step"
        )

    def add_image(self, name: str, pixels: UInt8[np.ndarray, "height width rgb"], step: int) -> None:
        """Adds an image."""
        self._write([(step, self._summary.image(name, pixels, dataformats="HWC"))])

    def _write(self, contents: Iterable[tuple[int, Any]]) -> None:
        with writing(self._folder):
            for step, content in contents:
                self._writer.write_event(self._event(step, summary=content))
            self._writer.flush()

    def _event(self, step: int, **content: Any) -> Any:
        return self._events.Event(wall_time=time.time(), step=step, **content)


def read_log(file: Path) -> list[dict[str, float]]:
    """The readable rows of a log; empty if there is no such file."""
    return parse_log(file)[0]


def parse_log(file: Path) -> tuple[list[dict[str, float]], list[int]]:
    """The readable rows of a log, and the numbers of the other lines.

    A last line without its end, left by a killed run or a full disk, is neither.
    """
    if not file.exists():
        return [], []
    header, *lines = file.read_text(encoding="utf-8-sig", errors="replace").split("\n")[:-1] or [""]
    columns = header.rstrip("\r").split(",")
    parsed = {number: _row(columns, line) for number, line in enumerate(lines, 2)}
    return [row for row in parsed.values() if row], [number for number, row in parsed.items() if not row]


def _row(columns: list[str], line: str) -> dict[str, float] | None:
    """A line's numbers; None unless it has one number for each column and a step."""
    try:
        row = dict(zip(columns, map(float, line.split(",")), strict=True))
        return row if row["step"] >= 0 and row["step"].is_integer() else None
    except (ValueError, KeyError):
        return None


def broken_lines(file: Path, broken: Sequence[int]) -> str:
    """A phrase for the lines of a log that are left out; empty if there are none."""
    if not broken:
        return ""
    some = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
    return f"{file} has {len(broken)} lines that cannot be read ({some}) and are left out"


def divergence(rows: Sequence[Mapping[str, float]]) -> str:
    """A sentence about the loss terms that have grown far beyond their first values; empty if none has.

    A term has diverged if its median over the last 20 steps exceeds 10, and 10 times the least of the first 20
    steps; in shorter runs the halves are compared. Too high a learning rate does this. Dice and calibration errors
    never diverge, since they lie between 0 and 1. The terms are unweighted, so a weight that rises changes nothing.

    Args:
        rows: of `log.csv`.

    Example:
        >>> losses = [0.7] * 50 + [5e6] * 50
        >>> divergence([{"step": step, "ce": loss} for step, loss in enumerate(losses)]).partition(";")[0]
        'the training has diverged: ce is 5e+06 at step 99 and was 0.7 at first'
    """
    size = min(_MEDIAN_OF, len(rows) // 2)
    grown = []
    for term in sorted(filter(is_term, rows[-1])) if size else ():
        first, last = (
            [row[term] for row in part if np.isfinite(row.get(term, np.nan))]
            for part in (rows[:size], rows[-size:])
        )
        if first and last and np.median(last) > 10 * max(min(first), 1.0):
            grown.append(
                f"{term} is {np.median(last):.3g} at step {rows[-1]['step']:.0f} and was {min(first):.3g} at first"
            )
    if not grown:
        return ""
    return f"the training has diverged: {', '.join(grown)}; lower --learning-rate or give --clip-norm"
