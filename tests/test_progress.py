"""Progress of loops: plain lines where there is no terminal, a bar where there is one."""

import io
import sys

import pytest

from train import progress as module
from train.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, which only the test moves."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    text = capsys.readouterr().err
    assert "\r" not in text
    return text.splitlines()


def test_plain_lines_say_step_loss_and_time_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    bar = progress(range(20, 100), desc="dice", initial=20, unit="step")
    for step in bar:
        clock[0] += 20 if step == 20 else 1  # the first one compiles
        bar.set_postfix(loss=f"{1 / step:.3f}")
    found = lines(capsys)
    assert found[0] == "dice: step 21 of 100, loss 0.050"
    assert found[1] == "dice: step 51 of 100, loss 0.020, 1 steps/s, 0:49 min left"
    assert found[2] == "dice: step 81 of 100, loss 0.013, 1 steps/s, 0:19 min left"
    assert found[3:] == ["dice: step 100 of 100, loss 0.010"]


def test_short_loops_print_one_line_or_none(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(iter("ab"), desc="reading")) == ["a", "b"]
    assert lines(capsys) == ["reading: case 2"]
    assert list(progress("ab", desc="reading", leave=False)) == ["a", "b"]
    assert list(progress("ab", desc="reading", disable=True)) == ["a", "b"]
    assert lines(capsys) == []


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = progress("ab", desc="reading")
    for _ in bar:
        bar.set_postfix(loss="1")
    assert "\r" in terminal.getvalue()


def test_no_stderr_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress("ab", desc="reading")) == ["a", "b"]
