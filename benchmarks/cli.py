"""Measure this project beside the PyTorch reference (MONAI), interleaved, in one run.

Every benchmark first asserts that both give the same numbers, then times them in turn on the same inputs and
cores, prints ratios (ours / reference) and writes JSON and a plot. Without a command: `all`.
`python -m benchmarks COMMAND --help` explains the options of a command.

Needs the extras `train` and `reference` (PyTorch and MONAI).
"""

import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.inference import Inference
from benchmarks.loss import Loss
from benchmarks.memory import Memory
from benchmarks.parts import Parts
from benchmarks.scaling import Scaling
from benchmarks.step import Step, Step2D

BENCHMARKS: dict[str, Any] = {
    "loss": Loss,
    "parts": Parts,
    "step": Step,
    "step-2d": Step2D,
    "inference": Inference,
    "memory": Memory,
    "scaling": Scaling,
}


@dataclass(frozen=True)
class All:
    """Run every benchmark as it is by default, one after the other (the default command)."""

    out: Path = Path("benchmarks/results")
    """Folder for the results; each benchmark writes one JSON file named after it, and its plot."""

    def run(self) -> None:
        failed = []
        for name in BENCHMARKS:
            print(f"\n== {name} ==", flush=True)
            # In a process of its own: what one leaves in memory changes how fast the next one gets its own.
            command = [sys.executable, "-m", "benchmarks", name, "--out", str(self.out / f"{name}.json")]
            if subprocess.run(command).returncode:  # the others' results are worth having all the same
                failed.append(name)
        assert not failed, f"failed: {', '.join(failed)}"


def main(arguments: list[str] | None = None) -> int:
    """Runs a benchmark; 1 if the two sides disagree, 2 if the reference is not installed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    first = arguments[0] if arguments else ""
    # Options without a command are those of `all`.
    if not first or (first.startswith("-") and first not in ("-h", "--help")):
        arguments = ["all", *arguments]
    command = tyro.extras.subcommand_cli_from_dict(
        {"all": All, **BENCHMARKS}, args=arguments, prog="python -m benchmarks", description=__doc__
    )
    missing = [name for name in ("torch", "monai") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"error: {' and '.join(missing)} not installed: pip install 'calib_jax[train,reference]'",
            file=sys.stderr,
        )
        return 2
    try:
        command.run()
    except AssertionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
