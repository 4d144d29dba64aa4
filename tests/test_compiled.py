"""`python -m benchmarks compiled` on small programs for CPUs that are described, not opened."""

import json
from pathlib import Path

import pytest

pytest.importorskip("tyro")
pytest.importorskip("flax")

from benchmarks import compiled, options
from benchmarks.cli import main
from train.errors import InputError
from train.targets import CompilationFailed, parse_target

SMALL = options.Compiled(
    programs=("ace", "step(precision=bfloat16,remat=True)", "windows"),
    targets=("cpu", "cpu:2"),
    loss_shapes=("2x3x8x8",),
    patch=(16, 16),
    batch_size=2,
    shape=(20, 16),
    eval_patch=(16, 16),
    channels=1,
    classes=3,
)


def small(**changes: object) -> list[str]:
    """The options of `SMALL` on the command line."""
    arguments = ["compiled"]
    for name, value in {**vars(SMALL), **changes}.items():
        values = value if isinstance(value, tuple) else (value,)
        arguments += [f"--{name.replace('_', '-')}", *map(str, values)]
    return arguments


def rows(file: Path) -> dict[tuple[str, str], dict]:
    return {(row["target"], row["program"]): row for row in json.loads(file.read_text())["rows"]}


def test_a_loss_is_told_in_units_of_the_probabilities(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "compiled.json"
    assert main(small(programs=("ace",), out=out)) == 0
    found = rows(out)
    assert found.keys() == {("cpu", "ace 2x3x8x8")}  # cpu:2 would compile the same for one device
    row = found["cpu", "ace 2x3x8x8"]
    assert row["unit_bytes"] == 4 * 2 * 3 * 8 * 8
    # Probabilities and labels come in, the loss and its gradient go out.
    assert row["argument_bytes"] == row["unit_bytes"] + 4 * 2 * 8 * 8
    assert row["output_bytes"] >= row["unit_bytes"] + 4
    assert row["collectives"] == {}
    assert row["largest_arrays"]
    assert {"trace_s", "compile_s", "temp_bytes", "bytes_accessed", "flops", "compilers"} <= row.keys()
    temporaries = f"{row['temp_bytes'] / row['unit_bytes']:.2f} x"
    assert temporaries in capsys.readouterr().out
    header, line, cells = out.with_suffix(".md").read_text().splitlines()
    assert header.startswith("| target | program | seconds | memory |")
    assert line.count("---") == header.count("|") - 1
    assert temporaries in cells


@pytest.mark.parametrize(
    "name",
    [
        "ace 2x3x8x8",
        "ace(binning=soft) 2x3x8x8",
        "dice 2x3x8x8",
        "brier 2x3x8x8",
        "nll 2x3x8x8",
        "bins(num_bins=5) 2x3x8x8",
        "loss(binning=adaptive) 2x3x8x8",
        "windows",
        "statistics",
    ],
)
def test_programs_of_one_device(name: str) -> None:
    """In this process, whose devices they take as the target's."""
    lowered, arguments = of(name)
    lowered.lower(*arguments)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("step", (8, 1, 1)),
        ("step(network=segresnet,remat=True)", (8, 1, 1)),
        ("step(network=unetr,precision=bfloat16)", (8, 1, 1)),
        ("step(accumulate=0,mesh='data=1,fsdp=4,space=2')", (1, 4, 2)),
    ],
)
def test_steps_are_those_of_the_trainer(name: str, mesh: tuple[int, ...]) -> None:
    step, (state, batch) = of(name)
    assert batch["image"].sharding.mesh.devices.shape == mesh
    assert batch["image"].shape == (8, 16, 16, 1)  # as many patches as devices
    assert callable(step.lower)
    assert state.step.shape == ()


def of(name: str) -> compiled.Lowerable:
    return compiled.program(name, SMALL, list(parse_target("cpu:8").devices()))


def test_rows_of_earlier_runs_are_kept_and_failures_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "compiled.json"

    def run_for(target: object, function: str, request: dict, limit_s: float) -> dict:
        if request["name"] == "windows":
            raise CompilationFailed(f"not done after {limit_s:g} s")
        figures = dict.fromkeys(("total_bytes", "temp_bytes", "bytes_accessed", "flops", "compile_s"), 2**30)
        exchanged = {"all-reduce": {"count": 2, "bytes": 2**20}}
        return {**figures, "collectives": exchanged, "largest_arrays": []}

    monkeypatch.setattr(compiled, "run_for", run_for)
    assert main(small(out=out, limit_s=3)) == 0
    printed = capsys.readouterr().out
    assert "cpu, windows: failed after 0 s: not done after 3 s" in printed
    assert "2 all-reduce, 1.00 MiB" in printed
    assert main(small(out=out, programs=("step",), targets=("cpu:2",))) == 0
    names = {name for _, name in rows(out)}
    assert names == {"ace 2x3x8x8", "step(precision=bfloat16,remat=True)", "windows", "step"}
    # What has changed is compiled again.
    assert main(small(out=out, programs=("step",), targets=("cpu:2",), patch=(32, 16))) == 0
    assert {name for _, name in rows(out)} == {"ace 2x3x8x8", "step", "windows"}


def test_what_is_not_installed_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.metadata.distributions", lambda: iter(()))
    assert main(small(out=tmp_path / "compiled.json", targets=("v5e:2x2",))) == 0
    assert (
        "v5e:2x2: skipped, its compiler is not installed: pip install 'jax[tpu]==" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("ece", "program is 'ece': give ace, dice, loss, brier, nll, bins, windows, statistics, or step"),
        ("step(depth=3)", "program is 'step(depth=3)': give"),
        ("windows(patch=3)", "program is 'windows(patch=3)': give"),
        ("ace(depth=3)", "ace has no argument 'depth': it takes num_bins, binning"),
        ("ace(num_bins=many)", "ace takes num_bins as a whole number"),
    ],
)
def test_unknown_programs(program: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compiled", "--programs", program]) == 2
    assert words in capsys.readouterr().err
    with pytest.raises(InputError):
        compiled._named(program, SMALL)


@pytest.mark.parametrize(("target", "limit"), [("v5e:1x1", 0.2), ("h100", 1.1)])
def test_losses_for_chips_that_are_not_here(target: str, limit: float, tmp_path: Path) -> None:
    """A TPU would pad three classes to 128 lanes, 43 times the memory, if an axis were moved at the wrong place."""
    if command := parse_target(target).install:
        pytest.skip(f"needs the compiler for {target}: {command}")
    programs = ("ace", "ace(binning=adaptive)", "ace(include_background=False)", "brier")
    out = tmp_path / "compiled.json"
    assert main(small(out=out, targets=(target,), programs=programs, loss_shapes=("4x3x48x64x48",))) == 0
    for row in rows(out).values():
        assert row["temp_bytes"] <= limit * row["unit_bytes"]
