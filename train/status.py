"""How far runs have come, read from their folders while they go on or after they ended."""

import json
from pathlib import Path

from train.config import RunConfig, read_config
from train.errors import InputError
from train.logs import read_log


def status(folder: Path) -> str:
    """One paragraph for the run in `folder`, or one for each run of the comparison in it.

    Raises:
        InputError: if there is no run.
    """
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} holds no run: {folder / 'config.json'} does not exist.")
    runs = [folder] if _is_run(folder) else sorted(file.parent for file in folder.glob("*/config.json"))
    if not runs:
        return f"{folder}: nothing trained yet."
    return "\n\n".join(_paragraph(run, read_config(run)[0]) for run in runs if _is_run(run))


def _is_run(folder: Path) -> bool:
    """A comparison's configuration holds that of its runs, a run's own names one loss."""
    return "loss" in json.loads((folder / "config.json").read_text())["config"]


def _paragraph(run: Path, config: RunConfig) -> str:
    steps = config.training.steps
    rows, validations = read_log(run / "log.csv"), read_log(run / "validation.csv")
    done = int(rows[-1]["step"]) + 1 if rows else 0
    lines = [f"{run}: {config.loss} on {config.data.data}, step {done} of {steps}{_time_left(rows, steps)}"]
    if rows:
        lines.append(f"  training loss {rows[-1]['loss']:.4f}, learning rate {rows[-1]['learning_rate']:.2e}")
    if validations:
        last = dict(validations[-1])
        lines.append(
            f"  validation at step {last.pop('step'):.0f}: "
            + ", ".join(f"{name} {value:.4f}" for name, value in last.items())
        )
    kept = sorted(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit())
    lines.append(f"  checkpoints at steps {', '.join(map(str, kept)) or 'none'}")
    return "\n".join(lines)


def _time_left(rows: list[dict[str, float]], steps: int) -> str:
    if not rows or rows[-1]["step"] + 1 >= steps:
        return ""
    speed = rows[-1].get("steps_per_second", 0.0)
    if not speed:
        return ""
    minutes, seconds = divmod(int((steps - rows[-1]["step"] - 1) / speed), 60)
    return f", {minutes}:{seconds:02d} min left at {speed:.2f} steps/s"
