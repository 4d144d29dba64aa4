"""Runs that are killed at any moment and resumed end as if they had been left alone, bit by bit."""

import os
from pathlib import Path

import killed

KILLS = int(os.environ.get("CALIB_JAX_KILLS", "2"))


def test_killed_and_resumed_is_as_never_stopped(tmp_path: Path) -> None:
    steps = 12 * KILLS
    whole = killed.start(killed.command(tmp_path / "whole", steps=steps), tmp_path / "said-whole.txt")
    try:
        assert killed.run_with_kills(tmp_path, KILLS, steps=steps) == KILLS
        assert whole.wait() == 0, (tmp_path / "said-whole.txt").read_text()[-2000:]
    finally:
        whole.kill()
    killed.assert_same_runs(tmp_path / "whole", tmp_path / "killed", steps=steps)
