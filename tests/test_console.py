"""What a command prints to may be closed or lack characters, and other libraries keep quiet."""

import io
import logging
import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import pytest

from train.console import console
from train.numerics import numerics


def test_characters_that_an_encoding_lacks_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    with console():
        print("Dice ↑ \udcc3")
    assert raw.getvalue() == b"Dice ^ \\udcc3\n"


def test_a_closed_pipe_ends_nothing() -> None:
    program = "from train.console import console\nwith console():\n for _ in range(9999): print('line')"
    environment = os.environ | {"MPLBACKEND": "nonsense", "MPLCONFIGDIR": "/dev/null/none"}
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"line\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


def test_only_our_warnings_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        with console():
            for module in ("orbax.checkpoint", "trainer", "train.data.volumes"):
                warnings.warn_explicit(f"from {module}", UserWarning, "file.py", 1, module=module)
            assert warnings.formatwarning("ours", UserWarning, "file.py", 1) == "note: ours\n"
            logging.getLogger("absl").warning("theirs")
    assert [str(warning.message) for warning in shown] == ["from train.data.volumes"]
    assert "theirs" not in capsys.readouterr().err


def test_nothing_stays_changed() -> None:
    before = sys.stdout, sys.stderr, warnings.formatwarning, logging.getLogger("orbax").level
    with console():
        assert sys.stdout is not before[0]
    assert before == (sys.stdout, sys.stderr, warnings.formatwarning, logging.getLogger("orbax").level)


def test_a_command_computes_in_float32_and_changes_no_switch() -> None:
    switches = {
        "jax_enable_x64": True,
        "jax_numpy_dtype_promotion": "strict",
        "jax_numpy_rank_promotion": "raise",
    }
    before = {name: getattr(jax.config, name) for name in switches}
    try:
        for name, value in switches.items():
            jax.config.update(name, value)
        with numerics():
            assert (jnp.arange(3) * 0.5 + jnp.ones((2, 3))).dtype == jnp.float32
        assert switches == {name: getattr(jax.config, name) for name in switches}
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
