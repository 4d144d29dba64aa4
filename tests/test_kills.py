"""Runs that are killed at any moment and resumed end as if they had been left alone, bit by bit."""

import os
from pathlib import Path

import killed

KILLS = int(os.environ.get("CALIB_JAX_KILLS", "3"))


def test_killed_and_resumed_is_as_never_stopped(tmp_path: Path) -> None:
    steps = 12 * KILLS
    assert killed.start(killed.command(tmp_path / "whole", steps=steps), tmp_path / "said.txt").wait() == 0
    assert killed.run_with_kills(tmp_path, KILLS, steps=steps) == KILLS
    killed.assert_same_runs(tmp_path / "whole", tmp_path / "killed", steps=steps)
