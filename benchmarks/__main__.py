"""Measure this project beside the PyTorch reference (MONAI), interleaved, in one run.

Needs the extra `reference` (PyTorch and MONAI).
"""

import importlib.util
import sys

import tyro

from benchmarks.step import Step

COMMANDS = {"step": Step}


def main() -> int:
    """Runs a benchmark; 2 if the reference is not installed."""
    command = tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="python -m benchmarks", description=__doc__)
    missing = [name for name in ("torch", "monai") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"error: {' and '.join(missing)} not installed: pip install 'calib_jax[train,reference]'",
            file=sys.stderr,
        )
        return 2
    command.run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
