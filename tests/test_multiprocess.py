"""Two processes of four devices each train as one process of eight does, and stop together."""

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from train.cli import main

PROGRAM = Path(__file__).with_name("train_processes.py")
OPTIONS = [
    *["fit", "--data", "phantom2d", "--num-test", "3", "--num-val", "3", "--batch-size", "8"],
    *["--channels", "4", "8", "--strides", "2", "--warmup-steps", "1", "--dropout", "0.2"],
    *["--steps", "60", "--validate-every", "20", "--learning-rate", "1e-4"],
    *["--mesh", "data=4,fsdp=2"],
]


def in_two_processes(out: Path, *options: str, sigterm_after: int = 0) -> list[int]:
    """Exit statuses of the two; the second one gets the signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = ["--out", str(out), "--coordinator", address, "--num-processes", "2"]
    commands = [
        [
            *[sys.executable, str(PROGRAM), str(sigterm_after if process else 0)],
            *[*OPTIONS, *options, *both, "--process-id", str(process)],
        ]
        for process in range(2)
    ]
    environment = os.environ | {"PYTHONPATH": str(PROGRAM.parents[1])}
    children = [subprocess.Popen(command, env=environment) for command in commands]
    try:
        return [child.wait(timeout=300) for child in children]
    finally:
        for child in children:
            child.kill()


def rows(run: Path, name: str) -> list[dict[str, float]]:
    with (run / name).open(newline="") as lines:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(lines)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    assert main([*OPTIONS, "--out", str(out)]) == 0
    return out


def test_two_processes_stop_together_and_one_goes_on(one_process: Path, tmp_path: Path) -> None:
    """SIGTERM to one of them ends both after the same step; one process then ends as if there had been no other."""
    out = tmp_path / "run"
    assert in_two_processes(out, sigterm_after=3) == [143, 143]
    expected, found = rows(one_process, "log.csv"), rows(out, "log.csv")
    stopped = len(found)
    assert 3 <= stopped < len(expected)
    assert_same(expected[:stopped], found, 1e-5)
    assert max(int(path.name) for path in (out / "checkpoints").iterdir()) == stopped
    assert main([*OPTIONS, "--mesh", "data=8", "--out", str(out), "--resume"]) == 0
    assert_same(expected, rows(out, "log.csv"), 1e-4)
    assert_same(rows(one_process, "validation.csv"), rows(out, "validation.csv"), 1e-3)


def assert_same(expected: list[dict[str, float]], found: list[dict[str, float]], tolerance: float) -> None:
    for one, other in zip(expected, found, strict=True):
        for name in one.keys() - {"steps_per_second", "patches_per_second", "data_wait"}:
            np.testing.assert_allclose(other[name], one[name], rtol=tolerance, atol=tolerance, err_msg=name)
