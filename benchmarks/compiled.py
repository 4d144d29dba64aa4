"""What XLA's compilers make of losses, steps and evaluation on GPUs and TPUs, without the devices."""

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import calib_jax
from benchmarks import timing
from benchmarks.options import Compiled, parse_shape
from train.abstract import Run, abstract_step, abstract_windows
from train.config import DataInfo, DeviceConfig, ModelConfig, RunConfig
from train.console import format_table
from train.errors import InputError
from train.hlo import compile_and_describe
from train.numerics import numerics
from train.plugins import check_arguments, keyword_parameters, parse_call
from train.recipes import find_recipe
from train.targets import CompilationFailed, Target, format_bytes, parse_target, run_for, use_no_device

RECIPE = "paper_brats_dice_ace"
"""Its network, loss and augmentation are those of `step`."""
# Functions of (logits or probabilities, labels). Those of losses are compiled with their gradient.
_LOSSES = {
    "ace": calib_jax.mL1_ace,
    "dice": functools.partial(calib_jax.segmentation_loss, cross_entropy=0.0, ace=0.0),
    "loss": calib_jax.segmentation_loss,
}
_METRICS = {
    "brier": calib_jax.brier_score,
    "nll": calib_jax.negative_log_likelihood,
    "bins": calib_jax.bin_statistics,
}
_OF_VOXELS = _LOSSES | _METRICS
_OF_VOLUMES = ("windows", "statistics")
_STEP = {"network": "unet", "precision": "float32", "remat": False, "accumulate": 1, "mesh": ""}
_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda13-pjrt", "jax-cuda12-pjrt")
# A program and its arguments, to be lowered.
Lowerable = tuple[Any, tuple[Any, ...]]


def run(options: Compiled) -> None:
    """Compiles every program for every target, prints the table and writes the results after each of them."""
    use_no_device()
    targets = [parse_target(name) for name in options.targets]
    names = [name for written in options.programs for name in _named(written, options)]
    rows = _kept(options)
    done: set[tuple[str, str]] = set()
    for target in targets:
        if command := target.install:
            print(f"{target.name}: skipped, its compiler is not installed: {command}", flush=True)
            continue
        for name in names:
            kind = target.name.partition(":")[0]
            if not name.startswith("step") and (kind, name) in done:
                continue  # on the same kind of device, of which it takes one
            done.add((kind, name))
            rows[target.name, name] = row = _row(target, name, options)
            print(f"{target.name}, {name}: {_outcome(row)}", flush=True)
            _write(options, rows)
    if rows:
        print(format_table([_cells(row) for row in rows.values()]))
        print(f"written to {options.out} and {options.out.with_suffix('.md').name}")


def _named(written: str, options: Compiled) -> list[str]:
    """The names in the results of a program as the user wrote it: losses and metrics have one for each shape.

    Raises:
        InputError: there is no such program, or it has no such argument.
    """
    call = parse_call(written)
    if call.name in _OF_VOXELS:
        check_arguments(call, keyword_parameters(_OF_VOXELS[call.name]))
        return [f"{written} {shape}" for shape in options.loss_shapes]
    if call.name in _OF_VOLUMES and not call.arguments:
        return [written]
    if call.name == "step" and call.arguments.keys() <= _STEP.keys():
        return [written]
    known = f"{', '.join((*_OF_VOXELS, *_OF_VOLUMES))}, or step with any of {', '.join(_STEP)}"
    raise InputError(f"program is {written!r}: give {known}.")


def _row(target: Target, name: str, options: Compiled) -> dict[str, Any]:
    """The figures of a program, or why there are none."""
    fixed = {"target": target.name, "program": name, "settings": _settings(options, name)}
    fixed |= {"memory_bytes": target.memory, "compilers": timing.versions(_COMPILERS)}
    request = {"name": name, "options": {**dataclasses.asdict(options), "out": ""}}
    start = time.perf_counter()
    try:
        figures = run_for(target, "benchmarks.compiled:compile_for", request, options.limit_s)
    except (CompilationFailed, InputError) as error:
        # What follows names files of the machine that compiled.
        why, *_ = str(error).split("\n\nSuspected Python Code Location")
        return {**fixed, "failed": why[:2000], "after_s": round(time.perf_counter() - start, 1)}
    return {**fixed, **figures}


def _settings(options: Compiled, name: str) -> dict[str, Any]:
    """The options that a program depends on."""
    of_step = ("patch", "batch_size", "channels", "classes")
    of_volume = ("shape", "eval_patch", "channels", "classes")
    names = of_step if name.startswith("step") else of_volume if name in _OF_VOLUMES else ()
    return timing.settings(options, *names)


def compile_for(target: Target, request: Any) -> dict[str, Any]:
    """Compiles a program for a target, in a process that `train.targets.run_for` started.

    Args:
        target: the devices.
        request: the program's name and the benchmark's options.

    Returns:
        `train.hlo.compile_and_describe`; of a loss the bytes of the probabilities too.
    """
    values: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in request["options"].items()}
    options, name = Compiled(**values), request["name"]
    devices = list(target.devices())
    with numerics():
        function, arguments = program(name, options, devices)
        # A step names its mesh by itself.
        mesh = contextlib.nullcontext() if name.startswith("step") else _mesh_of_one(devices[0])
        with mesh:
            figures = compile_and_describe(function, arguments, target.compiler_options())
    if parse_call(name.rpartition(" ")[0] or name).name in _OF_VOXELS:
        figures["unit_bytes"] = 4 * math.prod(parse_shape(name.rpartition(" ")[2]))
    return figures


def program(name: str, options: Compiled, devices: Sequence[Any]) -> Lowerable:
    """A program by its name in the results, over all the devices or on the first one."""
    if name.startswith("step"):
        return _step(name, options, devices)
    return _of_volume(name, options, devices[0]) if name in _OF_VOLUMES else _of_voxels(name, devices[0])


def _on(device: Any) -> NamedSharding:
    """The whole array on one device."""
    return NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())


def _mesh_of_one(device: Any) -> contextlib.AbstractContextManager[Any]:
    """Within this context, programs are traced for that device, and not for the one that runs this."""
    return jax.sharding.use_abstract_mesh(_on(device).mesh.abstract_mesh)


def _of_voxels(name: str, device: Any) -> Lowerable:
    written, _, shape = name.rpartition(" ")
    call = parse_call(written)
    batch, classes, *sizes = parse_shape(shape)
    scores = jax.ShapeDtypeStruct((batch, *sizes, classes), jnp.float32, sharding=_on(device))
    labels = jax.ShapeDtypeStruct((batch, *sizes), jnp.int32, sharding=_on(device))

    def figure(scores: Any, labels: Any) -> Any:
        return _OF_VOXELS[call.name](scores, labels, **call.arguments)

    return jax.jit(jax.value_and_grad(figure) if call.name in _LOSSES else figure), (scores, labels)


def _step(name: str, options: Compiled, devices: Sequence[Any]) -> Lowerable:
    from train.sharding import device_mesh

    arguments = {**_STEP, **parse_call(name).arguments}
    memory = DeviceConfig(arguments["mesh"], arguments["accumulate"], arguments["remat"])
    mesh = device_mesh(memory.mesh, devices)
    config = _config(options, arguments["network"])
    batch_size = max(options.batch_size, len(devices))
    training = dataclasses.replace(config.training, batch_size=batch_size, precision=arguments["precision"])
    config = dataclasses.replace(config, training=training)
    step, state, batch = abstract_step(Run(config, _info(options, options.patch), memory), mesh)
    return step, (state, batch)


def _config(options: Compiled, network: str) -> RunConfig:
    """The paper's recipe with the patch of the options and perhaps another network."""
    recipe = find_recipe(RECIPE).config
    model = recipe.model if network == recipe.model.architecture else ModelConfig(network)
    data = dataclasses.replace(recipe.data, patch=options.patch, eval_patch=options.eval_patch)
    return dataclasses.replace(recipe, data=data, model=model)


def _info(options: Compiled, patch: Sequence[int]) -> DataInfo:
    names = tuple(map(str, range(options.classes)))
    return DataInfo("data", names, options.channels, spatial_dims=len(patch))


def _of_volume(name: str, options: Compiled, device: Any) -> Lowerable:
    from train.evaluate import CaseStatistics
    from train.inference import jitted, plan_windows, row_size, windows_at_once
    from train.sharding import device_mesh

    patch = options.eval_patch
    plan = plan_windows(options.shape, patch, 0.5, windows_at_once(patch))
    if name == "windows":
        run = Run(_config(options, "unet"), _info(options, options.shape), DeviceConfig())
        return abstract_windows(run, device_mesh(devices=[device]), plan.counted.shape[1])
    size = row_size(plan.canvas, device.platform)
    voxels, here = plan.canvas if size is None else (size,), _on(device)
    probs = jax.ShapeDtypeStruct((*voxels, options.classes), jnp.float32, sharding=here)
    label, where = (jax.ShapeDtypeStruct(voxels, dtype, sharding=here) for dtype in (jnp.uint8, bool))
    return jitted(CaseStatistics(), device.platform), (probs, label, where)


def _outcome(row: Mapping[str, Any]) -> str:
    if "failed" in row:
        return f"failed after {row['after_s']:.0f} s: {row['failed'].splitlines()[0][:200]}"
    return f"compiled in {row['compile_s']:.1f} s, {format_bytes(row['total_bytes'])} on a device"


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    """A line of the table. Temporaries and bytes accessed of a loss are in units of the probabilities."""
    columns = (
        "seconds",
        "memory",
        "of memory",
        "temporaries",
        "accessed",
        "GFLOP",
        "largest array",
        "exchanged",
    )
    cells = {"target": row["target"], "program": row["program"]} | dict.fromkeys(columns, "-")
    if "failed" in row:
        return cells | {
            "seconds": f"> {row['after_s']:.0f}",
            "largest array": row["failed"].split(":")[0][:40],
        }
    unit = row.get("unit_bytes")

    def amount(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value / unit:.2f} x" if unit else format_bytes(value)

    largest = row["largest_arrays"][:1]
    exchanged = [
        f"{kind['count']} {name}, {format_bytes(kind['bytes'])}" for name, kind in row["collectives"].items()
    ]
    return cells | {
        "seconds": f"{row['compile_s']:.1f}",
        "memory": format_bytes(row["total_bytes"]),
        "of memory": f"{row['total_bytes'] / row['memory_bytes']:.2%}",
        "temporaries": amount(row["temp_bytes"]),
        "accessed": amount(row["bytes_accessed"]),
        "GFLOP": f"{row['flops'] / 1e9:.3g}" if row["flops"] else "-",
        "largest array": f"{largest[0]['shape']} {format_bytes(largest[0]['bytes'])}" if largest else "-",
        "exchanged": "; ".join(exchanged) or "-",
    }


def to_markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with equal keys as a table in Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([*row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _kept(options: Compiled) -> dict[tuple[str, str], dict[str, Any]]:
    """The figures of an earlier run with the same settings and compilers."""
    if not options.out.exists():
        return {}
    rows = json.loads(options.out.read_text())["rows"]
    now = timing.versions(_COMPILERS[:2])
    return {
        (row["target"], row["program"]): row
        for row in rows
        if row["settings"] == json.loads(json.dumps(_settings(options, row["program"])))
        and now.items() <= row["compilers"].items()
    }


def _write(options: Compiled, rows: Mapping[tuple[str, str], Mapping[str, Any]]) -> None:
    timing.write_results(options.out, {"rows": list(rows.values())}, say=False, with_device=False)
    table = to_markdown([_cells(row) for row in rows.values()])
    options.out.with_suffix(".md").write_text(table)
