"""A tiny run as a process of its own that is killed: what `test_kills.py` is made of, and a script.

`python tests/killed.py 20` kills one run 20 times, at random and at chosen moments, resumes it each time and says
whether it ended as the one that was left alone.
"""

import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
VALIDATE_EVERY = 4
TINY = (
    *(
        "fit",
        "--data",
        "phantom2d",
        "--num-test",
        "3",
        "--num-val",
        "2",
        "--loss",
        "dice+ace",
        "--dropout",
        "0.2",
    ),
    *("--batch-size", "8", "--channels", "4", "8", "--strides", "2", "--warmup-steps", "1"),
    *("--validate-every", str(VALIDATE_EVERY), "--checkpoint-every", "2", "--keep-best", "dice-ace"),
)
_SPEEDS = ("steps_per_second", "patches_per_second", "data_wait")
_PATIENCE = 300.0  # seconds until a moment that does not come is an error


def command(out: Path, *, steps: int, resume: bool = False) -> list[str]:
    options = [*TINY, "--steps", str(steps), "--out", str(out), *(["--resume"] if resume else [])]
    return [sys.executable, "-m", "train", *options]


def start(arguments: list[str], said: Path) -> subprocess.Popen[bytes]:
    """The command on one device; what it compiles it finds again the next time."""
    quick = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(said.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    with said.open("wb") as file:
        return subprocess.Popen(
            arguments, cwd=ROOT, env=os.environ | quick, stdout=file, stderr=subprocess.STDOUT
        )


# Moments: (folder of the run) -> whether it is now, asked every millisecond from the start of the process on.
Moment = Callable[[Path], bool]


def rows(file: Path) -> int:
    """Rows of a log; none if there is no such file, which a run may replace at any moment."""
    try:
        return max(file.read_bytes().count(b"\n") - 1, 0)
    except FileNotFoundError:
        return 0


def while_writing(out: Path) -> bool:
    """A checkpoint is being written."""
    return any((out / "checkpoints").glob("*tmp*"))


def logged_since_start() -> Callable[[Path], int]:
    """A function that tells the steps in the log once the process has written to it."""
    begun = time.time()

    def steps(out: Path) -> int:
        log = out / "log.csv"
        try:
            return rows(log) if log.stat().st_mtime > begun else 0
        except FileNotFoundError:
            return 0

    return steps


def while_validating() -> Moment:
    """A validation has begun and its row is not written: the log is flushed before it."""
    steps = logged_since_start()

    def moment(out: Path) -> bool:
        done = steps(out)
        return (
            done > 0 and done % VALIDATE_EVERY == 0 and rows(out / "validation.csv") < done // VALIDATE_EVERY
        )

    return moment


def after(seconds: float) -> Moment:
    """A time after the first steps that this process logs."""
    steps, begun = logged_since_start(), []

    def moment(out: Path) -> bool:
        if not begun and steps(out):
            begun.append(time.monotonic())
        return bool(begun) and time.monotonic() - begun[0] >= seconds

    return moment


def kill_at(process: subprocess.Popen[bytes], moment: Moment, out: Path, said: Path) -> bool:
    """Kills the process at a moment; False if it had ended before."""
    given_up = time.monotonic() + _PATIENCE
    while process.poll() is None:
        if moment(out):
            process.send_signal(signal.SIGKILL)
            return process.wait() == -signal.SIGKILL
        if time.monotonic() > given_up:
            process.kill()
            raise TimeoutError(f"the moment did not come; the run said: {said.read_text()[-2000:]}")
        time.sleep(0.001)
    return False


def moment(number: int, rng: random.Random) -> Moment:
    """While writing, while validating and at a random time in turn, each made when its process starts."""
    kinds = (lambda: while_writing, while_validating, lambda: after(rng.uniform(0.0, 1.5)))
    return kinds[number % len(kinds)]()


def run_with_kills(folder: Path, kills: int, *, steps: int, seed: int = 0) -> int:
    """A run in `folder / "killed"`, killed and resumed; the number of kills that met it alive."""
    out, said, done = folder / "killed", folder / "said.txt", 0
    rng = random.Random(seed)
    for number in range(kills):
        process = start(command(out, steps=steps, resume=number > 0), said)
        done += kill_at(process, moment(number, rng), out, said)
    process = start(command(out, steps=steps, resume=True), said)
    assert process.wait() == 0, said.read_text()[-2000:]
    return done


def logged(folder: Path, name: str) -> list[dict[str, str]]:
    """A log without its speeds, which no two runs share."""
    rows = csv.DictReader((folder / name).read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in _SPEEDS} for row in rows]


def weights(folder: Path, which: str = "last") -> list[np.ndarray]:
    import jax

    from train.config import read_config
    from train.run.checkpoint import Checkpoints
    from train.step import init_state, make_optimizer
    from train.task import make_model

    config, info = read_config(folder)
    _, state = init_state(make_model(config, info), make_optimizer(config.training))
    with Checkpoints(folder / "checkpoints", config.training, read_only=True) as checkpoints:
        state, _ = checkpoints.restore(state, which)
    return [np.asarray(leaf) for leaf in jax.tree.leaves((state.params, state.opt_state))]


def assert_same_runs(first: Path, second: Path, *, steps: int) -> None:
    """Equal bits in the last and the best checkpoint, equal logs without a gap, the same checkpoints."""
    for which in ("last", "best"):
        for a, b in zip(weights(first, which), weights(second, which), strict=True):
            np.testing.assert_array_equal(a, b)
    for name in ("log.csv", "validation.csv"):
        assert logged(first, name) == logged(second, name)
    assert [row["step"] for row in logged(second, "log.csv")] == [str(i) for i in range(steps)]
    kept = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (first, second)]
    assert kept[0] == kept[1]
    assert all(name.isdigit() for name in kept[0])  # nothing half written is left


def main(kills: int) -> None:
    steps = 12 * kills
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = start(command(folder / "whole", steps=steps), folder / "said.txt")
        assert process.wait() == 0
        began = time.monotonic()
        done = run_with_kills(folder, kills, steps=steps)
        assert_same_runs(folder / "whole", folder / "killed", steps=steps)
        lines = len(logged(folder / "killed", "log.csv"))
        print(
            f"{done} of {kills} kills met the run alive ({time.monotonic() - began:.0f} s); {lines} steps logged,"
        )
        print("weights, optimiser, best checkpoint and logs equal to the run that was left alone, bit by bit")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
