"""`python -m train plan`: what a step needs is what the compiled step of that run takes, and verdicts are right."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from train import plan as planning
from train.abstract import (
    Run,
    abstract_step,
    abstract_windows,
    bytes_on_each,
    compile_step,
    compile_validation,
)
from train.cli import main
from train.config import (
    DataConfig,
    DataInfo,
    DeviceConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    from_json,
    to_json,
)
from train.data.augment_config import NO_AUGMENTATION
from train.errors import InputError
from train.fit import _batches, _train_step, initial_state
from train.inference import jitted, volume_predictor
from train.models.configs import UNetConfig
from train.sharding import batch_spec, device_mesh, put_batch
from train.step import TrainState
from train.targets import GIB, CompilationFailed, parse_target
from train.task import open_task

TINY = ["--steps", "4", "--batch-size", "8", "--channels", "4", "8", "--strides", "2", "--warmup-steps", "1"]
OFF = [word for name in ("flip", "gamma", "intensity", "noise") for word in (f"--{name}-prob", "0")]
DESCRIBED = ["--patch", "8", "8", "--num-channels", "2", "--class-names", "background", "organ", *TINY, *OFF]

SMALL = RunConfig(
    "ce",
    data=DataConfig("phantom2d", num_test=1, num_val=1, patch=(16, 8)),
    model=ModelConfig(network=UNetConfig((2, 4), (2,), 1), dropout=0.2),
    training=TrainingConfig(steps=4, batch_size=8, warmup_steps=1),
    augment=NO_AUGMENTATION,
)


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def lowered_by_fit(config: RunConfig, devices: DeviceConfig) -> tuple[Any, TrainState, Any, Run]:
    """The step that `fit` compiles, the state and batch that it has, and the run as `plan` knows it."""
    task = open_task(config, devices)
    info = DataInfo.of(task.dataset)
    graphdef, state = initial_state(task, info)
    batch = put_batch(next(_batches(task)), task.mesh)
    step = _train_step(task, graphdef).lower(state, batch)
    return step, state, batch, Run(task.config, info, devices)


def test_the_planned_step_is_that_of_fit() -> None:
    config = dataclasses.replace(SMALL, loss="dice+ace")
    step, _, _, run = lowered_by_fit(config, DeviceConfig("data=2,fsdp=2,space=2", remat=True))
    planned, *arguments = abstract_step(run, device_mesh(run.devices.mesh))
    assert planned.lower(*arguments).as_text() == step.as_text()


def test_the_plan_is_the_memory_of_the_step_that_fit_compiles() -> None:
    step, state, batch, run = lowered_by_fit(SMALL, DeviceConfig())
    memory = step.compile().memory_analysis()
    planned = compile_step(parse_target("cpu:8"), to_json(run))
    for name in ("argument", "output", "alias", "temp"):
        assert planned[f"{name}_bytes"] == getattr(memory, f"{name}_size_in_bytes"), name
    parts = {"batch": batch, "weight": (state.params, state.rest), "optimizer": (state.step, state.opt_state)}
    for name, part in parts.items():
        on_one = sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(part))
        assert planned[f"{name}_bytes"] == on_one, name
    assert planned["mesh"] == {"data": 8, "fsdp": 1, "space": 1}


def test_the_planned_validation_is_that_of_fit() -> None:
    task = open_task(SMALL, DeviceConfig())
    info = DataInfo.of(task.dataset)
    graphdef, state = initial_state(task, info)
    predict = volume_predictor(graphdef, state, task.config.data.sliding_window)
    assert predict.mesh is not None
    shape = (8 * predict.windows_per_batch, 16, 8, info.num_channels)
    windows = jax.device_put(np.zeros(shape, np.float32), NamedSharding(predict.mesh, batch_spec(1)))
    program = jitted(predict.forward, mesh=predict.mesh).lower(predict.weights, windows)
    run = Run(task.config, info, DeviceConfig())
    planned, arguments = abstract_windows(run, device_mesh(), predict.windows_per_batch)
    assert planned.lower(*arguments).as_text() == program.as_text()
    found = compile_validation(parse_target("cpu:8"), to_json(run))
    memory = program.compile().memory_analysis()
    assert found["temp_bytes"] == memory.temp_size_in_bytes
    assert found["output_bytes"] == memory.output_size_in_bytes
    # Seven devices send what they have seen and found to the first; the state and a batch are there as well.
    on_one = windows.addressable_data(0).nbytes + memory.output_size_in_bytes
    others = found["waiting_bytes"] - 7 * on_one - bytes_on_each(state)
    assert others == bytes_on_each(abstract_step(run, device_mesh())[2])
    # The first of them holds the whole volume: 2 channels, twice 4 classes, labels and mask.
    large = compile_validation(
        parse_target("cpu:8"), to_json(dataclasses.replace(run, largest_shape=(264, 8)))
    )
    assert large["temp_bytes"] == found["temp_bytes"]
    assert large["waiting_bytes"] - found["waiting_bytes"] == 264 * 8 * (4 * (2 + 2 * 4) + 2)


def test_a_run_without_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "plan.json"
    assert run("plan", *DESCRIBED, "--loss", "ce", "--target", "cpu:2", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "cpu:2: 2 CPU devices that share this machine" in printed
    assert "as it stands: fits" in printed
    assert "The run fits on 2 CPU devices that share this machine:" in printed
    expected = ["python -m train fit --patch 8 8", *TINY, *OFF, "--loss ce --data LAYOUT:PATH"]
    assert " ".join(expected) in printed
    (target,) = json.loads(out.read_text())["targets"]
    (attempt,) = target["attempts"]
    assert attempt["fits"]
    assert attempt["needed_bytes"] == attempt["total_bytes"] + attempt["batch_bytes"]
    assert attempt["validation"]["fits"]
    # Four patches on each device, with two channels of float32, labels and numbers of cases.
    assert attempt["batch_bytes"] == 4 * (8 * 8 * (2 * 4 + 4) + 4)
    assert attempt["collectives"]["all-reduce"]["count"] == 1


GIVEN = Run(
    RunConfig("dice", DataConfig(patch=(32, 16)), ModelConfig(network=UNetConfig((4, 8), (2,)))),
    DataInfo("data", ("background", "organ"), 1, 2),
    DeviceConfig(),
)


def outcomes(
    monkeypatch: pytest.MonkeyPatch,
    needs: Any,
    run: Run = GIVEN,
    target: str = "v5e:2x2",
    validation: Any = lambda: 1,
) -> list:
    """The attempts for a target, where `needs(run)` are the bytes of a step and `validation()` of validation."""

    def run_for(target: Any, function: str, request: Any, limit_s: float) -> dict[str, int]:
        of_step = function == "train.abstract:compile_step"
        total = needs(from_json(Run, request)) if of_step else validation()
        return {"total_bytes": total, "waiting_bytes": 0, "volume_bytes": 2 * GIB}

    monkeypatch.setattr(planning, "run_for", run_for)
    return list(planning._attempts(run, parse_target(target), 1))


def test_savings_are_tried_in_order_until_the_run_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    training = dataclasses.replace(GIVEN.config.training, batch_size=16)
    run = dataclasses.replace(GIVEN, config=dataclasses.replace(GIVEN.config, training=training))

    def names(needs: Any) -> list[str]:
        return [attempt["options"] for attempt in outcomes(monkeypatch, needs, run)]

    everything = [
        "",
        "--remat",
        "--remat --accumulate 0",
        "--remat --accumulate 0 --mesh data=2,space=2",
        "--remat --accumulate 0 --mesh space=4",
        "--remat --accumulate 0 --mesh space=4 --precision bfloat16",
    ]
    assert names(lambda run: 16 * GIB) == everything
    assert names(lambda run: GIB) == everything[:1]
    assert names(lambda run: (1 if run.devices.remat else 20) * GIB) == everything[:2]
    assert names(lambda run: (20 if run.devices.accumulate else 1) * GIB) == everything[:3]
    assert names(lambda run: (1 if "space" in run.devices.mesh else 20) * GIB) == everything[:4]
    half = names(lambda run: (1 if run.config.training.precision == "bfloat16" else 20) * GIB)
    assert half == everything


def test_what_saves_memory_already_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = DeviceConfig("data=1,fsdp=2,space=2", accumulate=0, remat=True)
    training = dataclasses.replace(GIVEN.config.training, precision="bfloat16")
    run = dataclasses.replace(
        GIVEN, config=dataclasses.replace(GIVEN.config, training=training), devices=devices
    )
    found = outcomes(monkeypatch, lambda run: 20 * GIB, run)
    assert [attempt["options"] for attempt in found] == ["", "--mesh space=4"]


@pytest.mark.parametrize(
    "message",
    [
        "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
        "Ran out of memory on HBM, the total memory required for HLO temporaries (20.50G) exceeds available HBM.",
    ],
)
def test_a_compiler_that_runs_out_of_memory_says_how_much_it_needs(
    message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needs(run: Run) -> int:
        if run.devices.remat:
            return GIB
        raise CompilationFailed(f"JaxRuntimeError: RESOURCE_EXHAUSTED: {message}")

    first, second = outcomes(monkeypatch, needs)
    assert (first["fits"], first["needed_bytes"], second["fits"]) == (False, int(20.5 * GIB), True)


def test_another_failure_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def needs(run: Run) -> int:
        raise CompilationFailed("not done after 1 s")

    (attempt,) = outcomes(monkeypatch, needs)
    verdict = planning._verdict([attempt], parse_target("v5e:2x2"), [])
    assert verdict == "Whether the run fits on 4 TPU v5e chips is not known: not done after 1 s"


def test_an_impossible_saving_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def needs(run: Run) -> int:
        if "space" in run.devices.mesh and run.config.training.precision == "float32":
            raise InputError("no halves")
        return 20 * GIB if run.config.training.precision == "float32" else GIB

    *_, split, again, half = outcomes(monkeypatch, needs)
    assert split["refused"] == again["refused"] == "no halves"
    assert half["options"] == "--remat --precision bfloat16"


def test_validation_must_fit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> int:
        raise CompilationFailed("not done after 1 s")

    (large,) = outcomes(monkeypatch, lambda run: GIB, validation=lambda: 20 * GIB)
    (unknown,) = outcomes(monkeypatch, lambda run: GIB, validation=fails)
    assert not large["fits"] | unknown["fits"]
    target = parse_target("v5e:2x2")
    assert (
        planning._line(large, target)
        == "  as it stands: the step fits, 1.00 GiB of 15.0 GiB on each device; validation does not"
    )
    verdicts = [planning._verdict([attempt], target, []) for attempt in (large, unknown)]
    assert verdicts == [
        "The step fits on 4 TPU v5e chips, but validation needs 20.0 GiB of 15.0 GiB, 2.00 GiB of it for the "
        "largest volume. Choose a smaller --eval-patch, or leave out validation with --num-val 0.",
        "The step fits on 4 TPU v5e chips. Whether validation fits is not known: not done after 1 s",
    ]
    data = dataclasses.replace(GIVEN.config.data, num_val=0)
    without = dataclasses.replace(GIVEN, config=dataclasses.replace(GIVEN.config, data=data))
    (attempt,) = outcomes(monkeypatch, lambda run: GIB, without, validation=fails)
    assert attempt["fits"]


def test_volumes_are_split_where_the_batch_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of four on eight chips; then what saves memory is tried beside it."""

    def needs(run: Run) -> int:
        if "space" not in run.devices.mesh:
            raise InputError("give a multiple of 8")
        return (1 if run.devices.remat else 20) * GIB

    found = outcomes(monkeypatch, needs, target="v5e:2x4")
    assert [attempt["options"] for attempt in found] == [
        "",
        "--mesh data=4,space=2",
        "--mesh data=4,space=2 --remat",
    ]
    verdict = planning._verdict(found, parse_target("v5e:2x4"), [])
    assert verdict.startswith(
        "The run is impossible on 8 TPU v5e chips as it stands. It fits with --mesh data=4"
    )


def test_verdicts_end_with_the_command_to_use() -> None:
    target = parse_target("v5e:2x2")
    arguments = [
        "--data",
        "msd:X",
        "--mesh",
        "fsdp",
        "--target",
        "v5e:2x2",
        "h100",
        "--limit-s=3",
        "--steps",
        "3",
    ]
    no = {"options": "", "fits": False, "needed_bytes": 20 * GIB}
    yes = {"options": "--remat --mesh space=2", "fits": True, "needed_bytes": GIB}
    assert planning._verdict([no, yes], target, arguments) == (
        "The run does not fit on 4 TPU v5e chips as it stands. It fits with --remat --mesh space=2:\n"
        "  python -m train fit --data msd:X --steps 3 --remat --mesh space=2"
    )
    assert "at best it needs 20.0 GiB of 15.0 GiB on each device" in planning._verdict(
        [no], target, arguments
    )


def test_the_status_says_whether_all_targets_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {
        "batch_bytes": 0,
        "waiting_bytes": 0,
        "weight_bytes": 1,
        "optimizer_bytes": 2,
        "temp_bytes": 3,
        "compile_s": 1.0,
    }

    def run_for(target: Any, *_: object) -> dict[str, Any]:
        total = 10 if target.platform == "cpu" else 2**50
        return {**figures, "collectives": {}, "total_bytes": total}

    monkeypatch.setattr(planning, "run_for", run_for)
    monkeypatch.setattr("train.targets.Target.install", "")
    assert run("plan", *DESCRIBED, "--target", "cpu") == 0
    assert run("plan", *DESCRIBED, "--target", "cpu", "v5e:1x1") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "v9:1x1"], "target is 'v9:1x1'"),
        ([*DESCRIBED, "--target", "cpu:3"], "batch_size is 8: give a multiple of the 3 devices"),
        (["--class-names", "background", "organ"], "give --patch"),
        (["--num-channels", "3"], "num_channels already"),
        ([*DESCRIBED, "--data", "msd:X"], "data is not opened where --class-names are given"),
        ([*DESCRIBED, "--patch", "7", "8"], "not divided by the network's strides"),
    ],
)
def test_impossible_plans(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", *arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["v5e:2x2", "h100"])
def test_plans_for_chips_that_are_not_here(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if command := parse_target(name).install:
        pytest.skip(f"needs the compiler for {name}: {command}")
    assert run("plan", *DESCRIBED, "--loss", "ce", "--target", name) == 0
    assert "as it stands: fits" in capsys.readouterr().out


def test_shapes_stand_for_the_state() -> None:
    """Nothing is allocated, and every leaf says which device holds what."""
    run = dataclasses.replace(
        GIVEN, config=dataclasses.replace(GIVEN.config, training=TrainingConfig(batch_size=8))
    )
    _, state, batch = abstract_step(run, device_mesh("fsdp=8"))
    leaves = jax.tree.leaves((state, batch))
    assert leaves
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding for leaf in leaves)
    assert isinstance(state.params, nnx.State)
    assert batch["index"].shape == (8,)
