"""Measure this project beside the PyTorch reference (MONAI), in turn, in one run.

Every benchmark first checks that both sides give the same numbers. It then times them in turn on the same inputs
and cores, prints ratios (ours / reference) and writes JSON and a plot. The default command is `all`.
`python -m benchmarks COMMAND --help` explains the options of a command.

Needs the extras `train` and `reference` (PyTorch and MONAI). `compiled` runs nothing and has no reference: it needs
`train` and the compilers of its targets, and is no part of `all`.
"""

import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks import options
from train.errors import InputError

BENCHMARKS: dict[str, Any] = {
    "loss": options.Loss,
    "parts": options.Parts,
    "step": options.Step,
    "step-2d": options.Step2D,
    "inference": options.Inference,
    "memory": options.Memory,
    "scaling": options.Scaling,
}


@dataclass(frozen=True)
class All:
    """Run every benchmark beside the reference with its default options, one after the other (the default)."""

    out: Path = options.RESULTS
    """Folder for the results; each benchmark writes a JSON file named after it, and its plot."""

    def run(self) -> None:
        failed = []
        for name in BENCHMARKS:
            print(f"\n== {name} ==", flush=True)
            # Each benchmark has its own process, since memory that one leaves changes the speed of the next.
            command = [sys.executable, "-m", "benchmarks", name, "--out", str(self.out / f"{name}.json")]
            if subprocess.run(command).returncode:
                failed.append(name)
        assert not failed, f"failed: {', '.join(failed)}"


def main(arguments: list[str] | None = None) -> int:
    """Runs a benchmark; returns 1 if the two sides disagree, 2 after bad input or without the reference."""
    arguments = sys.argv[1:] if arguments is None else arguments
    first = arguments[0] if arguments else ""
    # Options without a command belong to `all`.
    if not first or (first.startswith("-") and first not in ("-h", "--help")):
        arguments = ["all", *arguments]
    command = tyro.extras.subcommand_cli_from_dict(
        {"all": All, **BENCHMARKS, "compiled": options.Compiled},
        args=arguments,
        prog="python -m benchmarks",
        description=__doc__,
    )
    missing = [name for name in ("torch", "monai") if importlib.util.find_spec(name) is None]
    if missing and not isinstance(command, options.Compiled):
        print(
            f"error: {' and '.join(missing)} not installed: pip install 'calib_jax[train,reference]'",
            file=sys.stderr,
        )
        return 2
    try:
        command.run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except AssertionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
