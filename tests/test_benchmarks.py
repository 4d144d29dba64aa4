"""The benchmarks on tiny inputs: they run, write what they promise, and stop where the two sides disagree."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

MISSING = [name for name in ("torch", "monai", "tyro", "flax") if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(f"benchmarks need {' and '.join(MISSING)}", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # whatever PyTorch and MONAI have to say when imported
    import torch

    from benchmarks import cli as command_line
    from benchmarks import loss, memory, options, parts, plots, reference, scaling, timing

SHAPE = "2x3x6x5x4"
EVERYWHERE = {"command", "cores", "machine", "device", "python", "versions"}


@pytest.fixture(autouse=True)
def threads():
    """PyTorch's number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def results(benchmark):
    """What a run of the benchmark writes, with the file of its plot there."""
    benchmark.run()
    assert benchmark.out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    written = json.loads(benchmark.out.read_text())
    assert written.keys() > EVERYWHERE
    assert {"jax", "torch", "monai"} <= written["versions"].keys()
    return written


def programs_of(kind="blobs", num_bins=20):
    data = loss.make_data(options.parse_shape(SHAPE), kind)
    return loss.ace_programs(data, reference.ace_inputs(*data), num_bins), loss.exact_loss(data, num_bins)


def test_parts(tmp_path):
    options.Parts(SHAPE, rounds=1, warmup=0, out=tmp_path / "parts.json").run()
    written = json.loads((tmp_path / "parts.json").read_text())
    seconds = {name: values[0] for name, values in written["seconds"].items()}
    apart = sum(seconds[name] for name in ("dice", "cross-entropy", "mL1-ACE"))
    assert written["ratio"]["parts"] == seconds["segmentation_loss"] / apart
    with pytest.raises(AssertionError, match="sum of its parts"):
        parts.check_agreement({"segmentation_loss": 2.0, "reference": 2.0, "dice": 1.0})


def test_step(monkeypatch, tmp_path, capsys):
    """Both sides' steps, after a check that losses and gradients agree; a reference that does not compile."""

    class Uncompiled(torch.nn.Conv2d):
        def forward(self, input):
            raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", lambda network, dynamic: Uncompiled(1, 1, 1))
    file = tmp_path / "step.json"
    options.Step2D((64, 64), 8, precision="bfloat16", rounds=2, warmup=0, out=file).run()
    kept, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert kept["precision"] == "bfloat16"
    assert set(kept["ratio"]) == {"reference"}
    assert all(len(samples) == 2 for samples in kept["seconds"].values())
    assert "dice+ace: same loss" in printed
    assert "torch.compile failed: RuntimeError: no compiler\n" in printed


def test_inference(tmp_path, capsys):
    torch.manual_seed(
        0
    )  # of 6,144 voxels, a single one that changes its bin by rounding is more than the tolerance
    file = tmp_path / "inference.json"
    options.Inference((20, 16, 16), 1, 3, (16, 16, 16), rounds=1, warmup=0, out=file).run()
    assert json.loads(file.read_text())["windows"] == 2
    assert "24x16x16: same statistics" in capsys.readouterr().out


def test_loss(tmp_path, capsys):
    benchmark = options.Loss((SHAPE,), ("blobs", "one-bin"), rounds=1, warmup=0, compile=False)
    written = results(dataclasses.replace(benchmark, out=tmp_path / "new" / "loss.json"))
    assert written["targets"] == {"monai": 0.2, "paper": 0.12}
    assert [case["kind"] for case in written["cases"]] == ["blobs", "one-bin"]
    for case in written["cases"]:
        assert case["seconds"].keys() == {"calib_jax", "monai", "paper", "copy (JAX)", "copy (NumPy)"}
        seconds = {name: values[0] for name, values in case["seconds"].items()}
        assert case["ratio"]["monai"]["median"] == seconds["calib_jax"] / seconds["monai"]
        assert abs(case["loss_error"]["calib_jax"]) < 1e-6
    assert "/ paper (target 0.12)" in capsys.readouterr().out


@pytest.mark.parametrize("failing", [True, False])
def test_a_compiler_that_fails_is_recorded(failing, monkeypatch):
    def compiler(function, **_):
        if failing and function is reference.paper_l1_ace:
            raise RuntimeError("no C++ compiler\nand a long story")
        return function

    monkeypatch.setattr(torch, "compile", compiler)
    data = loss.make_data(options.parse_shape(SHAPE), "blobs")
    inputs = reference.ace_inputs(*data)
    programs = loss.ace_programs(data, inputs, 20)
    compiled, reasons = loss.compiled_programs(programs, inputs, 20)
    assert set(compiled) == {"monai compiled"} | (set() if failing else {"paper compiled"})
    assert reasons == ({"paper": "RuntimeError: no C++ compiler"} if failing else {})


def test_a_compiled_reference_that_is_wrong_is_recorded(monkeypatch):
    def compiler(function, **_):
        return lambda *args, **options: 1.1 * function(*args, **options)

    monkeypatch.setattr(torch, "compile", compiler)
    data = loss.make_data(options.parse_shape(SHAPE), "blobs")
    inputs = reference.ace_inputs(*data)
    compiled, reasons = loss.compiled_programs(loss.ace_programs(data, inputs, 20), inputs, 20)
    assert not compiled
    assert set(reasons) == {"monai", "paper"}


@pytest.mark.parametrize("kind", ["blobs", "one-bin", "uniform"])
@pytest.mark.parametrize("num_bins", [5, 64])
def test_both_sides_agree(kind, num_bins):
    errors = loss.check_agreement(*programs_of(kind, num_bins))
    assert errors.keys() == {"calib_jax", "monai", "paper"}
    assert max(map(abs, errors.values())) < 1e-5


@pytest.mark.parametrize("name", ["monai", "paper"])
@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_a_wrong_reference_stops_the_benchmark(name, part):
    programs, exact = programs_of()
    value, gradient = programs[name]()
    wrong = (value * 1.01, gradient) if part == "loss" else (value, gradient * 1.01)
    with pytest.raises(AssertionError, match=part):
        loss.check_agreement(programs | {name: lambda: wrong}, exact)


def test_one_wrong_gradient_in_a_bin_is_noticed():
    programs, exact = programs_of()
    value, gradient = programs["calib_jax"]()
    largest = jnp.abs(gradient).argmax()  # the voxel of a bin of its own
    wrong = gradient.reshape(-1).at[largest].multiply(-1).reshape(gradient.shape)
    with pytest.raises(AssertionError, match="gradients"):
        loss.check_agreement(programs | {"calib_jax": lambda: (value, wrong)}, exact)


def test_ours_wrong_stops_the_benchmark(monkeypatch, tmp_path, capsys):
    right = loss.mL1_ace
    monkeypatch.setattr(loss, "mL1_ace", lambda *args, **options: 1.0001 * right(*args, **options))
    out = tmp_path / "loss.json"
    assert command_line.main(["loss", "--shapes", SHAPE, "--no-compile", "--out", str(out)]) == 1
    assert "in float64" in capsys.readouterr().err
    assert not out.exists()


def test_memory(tmp_path):
    written = results(options.Memory("1x2x64x32x32", num_bins=10, rounds=1, out=tmp_path / "memory.json"))
    assert written["probs_bytes"] == 4 * 2 * 64 * 32 * 32
    assert written["bytes"].keys() == {"calib_jax", memory.COMPILED, "monai", "paper"}
    assert written["bytes"][memory.COMPILED][0] > 0
    assert written["share"].keys() == written["bytes"].keys()
    assert written["ratio"]["calib_jax"].keys() == {"monai", "paper"}


def test_scaling(tmp_path):
    benchmark = options.Scaling(
        (125, 1000),
        (5, 7),
        (1, 3),
        fixed_voxels=512,
        least=1,
        rounds=1,
        warmup=0,
        out=tmp_path / "scaling.json",
    )
    written = results(benchmark)
    assert [[point[axis] for point in written[axis]] for axis in ("voxels", "bins", "classes")] == [
        [125, 1000],
        [5, 7],
        [1, 3],
    ]
    costs = [point["cost"]["monai"]["median"] for point in written["voxels"]]
    assert written["growth"]["voxels"]["monai"] == pytest.approx(costs[1] / costs[0])


def test_scaling_stops_where_the_sides_disagree(monkeypatch, tmp_path):
    monkeypatch.setitem(reference.ACE_LOSSES, "monai", lambda *args, **_: reference.mean_l1_ace(*args, 3))
    with pytest.raises(AssertionError, match="of monai"):
        options.Scaling(fixed_voxels=64, voxels=(64,), out=tmp_path / "scaling.json").run()


def test_growth_is_the_largest_rise():
    assert scaling.growth([3.0, 1.0, 2.0, 1.5]) == 2
    assert scaling.growth([3.0, 2.0]) == pytest.approx(2 / 3)
    assert scaling.growth([3.0]) == 1


def test_kinds_of_data():
    """Nine of ten voxels in one bin; most voxels of a segmentation sure; uniform ones in all bins alike."""
    shape = (1, 4, 24, 24, 24)
    share = {
        kind: np.stack([np.histogram(probs, 20, (0, 1))[0] for probs in _classes(shape, kind)]) / 24**3
        for kind in ("blobs", "one-bin", "uniform")
    }
    assert share["one-bin"].max(1).min() > 0.88
    assert (share["blobs"][:, 0] + share["blobs"][:, -1]).min() > 0.7
    assert np.ptp(share["uniform"]) < 0.02


def _classes(shape, kind):
    return np.moveaxis(loss.make_data(shape, kind).probs[0], -1, 0)


def test_labels_of_no_class_have_no_one_hot():
    probs = np.full((1, 3, 2), 0.5, np.float32)
    inputs = reference.ace_inputs(probs, np.array([[0, 1, 2]], np.int32))
    assert inputs.one_hot.tolist() == [[[1, 0, 0], [0, 1, 0]]]
    assert inputs.probs.shape == (1, 2, 3)


def test_spread_and_ratios():
    assert timing.spread([4.0, 1.0, 2.0]) == {"median": 2, "q1": 1.5, "q3": 3, "min": 1, "max": 4}
    assert timing.spread([4.0])["q1"] == 4
    # The machine is half as fast in the second round.
    ratios = timing.ratio_spread({"a": [1.0, 2.0], "b": [2.0, 4.0]}, "a", "b")
    assert set(ratios.values()) == {0.5}


def test_interleaved_takes_turns():
    calls = []
    programs = {name: lambda name=name: calls.append(name) for name in "ab"}
    samples = timing.interleaved(programs, warmup=1, rounds=2)
    assert calls == ["a", "a", "b", "b"] * 3
    assert {name: len(seconds) for name, seconds in samples.items()} == {"a": 2, "b": 2}


def test_all_runs_every_benchmark_in_its_own_process_and_goes_on_after_a_failure(monkeypatch, tmp_path):
    commands = []

    def run(command):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1 if "loss" in command else 0)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(AssertionError, match=r"failed: loss$"):
        command_line.All(tmp_path).run()
    module = [sys.executable, "-m", "benchmarks"]
    assert commands == [[*module, n, "--out", str(tmp_path / f"{n}.json")] for n in command_line.BENCHMARKS]


def test_without_a_command_all_is_run(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(command_line.All, "run", lambda self: ran.append(self.out))
    assert command_line.main([]) == 0
    assert command_line.main(["--out", str(tmp_path)]) == 0
    assert [str(folder) for folder in ran] == ["benchmarks/results", str(tmp_path)]


def test_options_import_nothing_heavy():
    heavy = {"jax", "torch", "monai", "flax", "train.step", "matplotlib"}
    code = f"import sys, benchmarks.cli; sys.exit(str({heavy} & set(sys.modules) or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.stderr.strip()


def test_help_names_every_benchmark(capsys):
    with pytest.raises(SystemExit):
        command_line.main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("all", "loss", "step", "memory", "scaling"))


def test_missing_reference_is_told(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command_line.main(["loss"]) == 2
    assert "torch and monai not installed" in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["2x4", "axbxc", "2x0x4", "2,4,8"])
def test_a_shape_that_is_none_is_told(shape):
    with pytest.raises(SystemExit, match="2x4x96x96x96"):
        options.parse_shape(shape)


def test_figures_of_one_case_and_of_three(tmp_path):
    summary = {name: timing.spread([0.1, 0.2]) for name in ("calib_jax", "monai")}
    case = {"shape": SHAPE, "kind": "blobs", "summary": summary}
    assert len(plots.loss([case]).axes) == 1
    assert len(plots.loss(3 * [case]).axes) == 3
    assert plots.save(plots.loss([case]), tmp_path / "a.json") == tmp_path / "a.png"


def test_nothing_is_left_unfinished():
    """Programs block: what they return is there."""
    programs, _ = programs_of()
    assert all(array.is_ready() for array in jax.tree.leaves(programs["calib_jax"]()))
