"""The progress of runs, read from their folders while they run or later."""

import math
from pathlib import Path

from train.config import read_config
from train.errors import InputError
from train.files import parsing, read_json, visible
from train.progress import time_left
from train.run.folder import process_of
from train.run.logs import broken_lines, divergence, parse_log


def status(folder: Path) -> str:
    """A paragraph about the run in `folder`, or one about each run of the comparison in it.

    Raises:
        InputError: the folder holds no run.
    """
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} holds no run: {folder / 'config.json'} does not exist.")
    if _is_run(folder):
        return _paragraph(folder)
    runs = [file.parent for file in visible(folder, "*/config.json") if _is_run(file.parent)]
    lines = [f"{folder}: comparison, {_process(folder)}" if runs else f"{folder}: nothing trained yet."]
    return "\n\n".join([*lines, *(_paragraph(run) for run in runs)])


def _is_run(folder: Path) -> bool:
    """Whether the folder is of a run, whose configuration has one loss, rather than of a comparison."""
    file = folder / "config.json"
    with parsing(file, "a run's configuration"):
        return "loss" in dict(read_json(file)["config"])


def _paragraph(run: Path) -> str:
    config = read_config(run)[0]
    log, validation = run / "log.csv", run / "validation.csv"
    (rows, broken), (validations, broken_validations) = parse_log(log), parse_log(validation)
    steps = config.training.steps
    done = int(rows[-1]["step"]) + 1 if rows else 0
    lines = [f"{run}: {config.loss} on {config.data.data}, step {done} of {steps}{_time_left(rows, steps)}"]
    lines.append(f"  {_process(run)}")
    if rows:
        loss, rate = (rows[-1].get(name, math.nan) for name in ("loss", "learning_rate"))
        lines.append(f"  training loss {loss:.4f}, learning rate {rate:.2e}")
    if validations:
        lines.append(f"  validation at {_measured(validations[-1])}")
    kept = sorted(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit())
    lines.append(f"  checkpoints at steps {', '.join(map(str, kept)) or 'none'}")
    measured = [row for row in validations if row["step"] in kept]
    if config.training.keep_best != "none" and measured:
        best = max(reversed(measured), key=config.training.score)  # the later one of equals
        lines.append(f"  best by {config.training.keep_best}: {_measured(best)}")
    notes = [broken_lines(log, broken), broken_lines(validation, broken_validations), divergence(rows)]
    return "\n".join([*lines, *(f"  note: {note}" for note in notes if note)])


def _process(folder: Path) -> str:
    """Whether a process is at work on the run, or how the last one ended."""
    process = process_of(folder)
    if process is None:
        return "no process known"
    if process.running:
        return f"running: {process.name}"
    if process.state == "running":
        return f"killed: {process.name} no longer runs; --resume goes on"
    return f"{process.state}; --resume goes on" if process.state == "stopped" else process.state


def _measured(row: dict[str, float]) -> str:
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in row.items() if name != "step")
    return f"step {row['step']:.0f}: {metrics}"


def _time_left(rows: list[dict[str, float]], steps: int) -> str:
    left = steps - rows[-1]["step"] - 1 if rows else 0
    speed = rows[-1].get("steps_per_second", 0.0) if rows else 0.0
    if left <= 0 or not speed:
        return ""
    return f", {time_left(int(left / speed))} at {speed:.2f} steps/s"
