"""Whether a run fits into the memory of devices, and what it spends there, without the devices."""

import dataclasses
import json
import math
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import jax

from train.abstract import Run
from train.config import DataInfo, read_config, to_json
from train.console import format_table
from train.data.case import ids_of
from train.errors import InputError
from train.sharding import DATA, FSDP, SPACE, mesh_shape
from train.targets import CompilationFailed, Target, format_bytes, parse_target, run_for, use_no_device
from train.task import find_divisors, open_cases, resolve_config

if TYPE_CHECKING:
    from train.cli import Plan

# What the compiler of TPUs says of a program that needs too much.
_NEEDED = re.compile(r"(?:HLO temporaries \(|Used )([\d.]+)([KMGT])")
_PARTS = {
    "weights": "weight_bytes",
    "optimiser": "optimizer_bytes",
    "batch": "batch_bytes",
    "activations, temporaries": "temp_bytes",
}
_COLUMNS = ["", "needs", *_PARTS, "other", "validation", "exchanges", "exchanged", "compiled in"]
# Options of `plan` that `fit` does not have.
_OWN_OPTIONS = ("--target", "--num-channels", "--class-names", "--limit-s", "--out")


def plan(command: "Plan") -> int:
    """Plans the run of a command for each of its targets: prints tables and verdicts.

    Returns:
        0 if the run fits on every target as it stands, else 1.

    Raises:
        InputError: the run is impossible, or the compiler of a target is not installed.
    """
    targets = [parse_target(name) for name in dict.fromkeys(command.target)]
    for target in targets:
        target.check_installed()
    use_no_device()
    run = _open_run(command)
    found = []
    for target in targets:
        attempts = []
        print(
            f"{target.name}: {target.title}, {format_bytes(target.usable)} of {format_bytes(target.memory)} each"
        )
        print(f"  the rest is a margin: {target.margin}", flush=True)
        for attempt in _attempts(run, target, command.limit_s):
            attempts.append(attempt)
            print(_line(attempt, target), flush=True)
        verdict = _verdict(attempts, target, command.arguments)
        print(_table(attempts) + "\n" + verdict + "\n", flush=True)
        kept = {**dataclasses.asdict(target), "usable": target.usable}
        found.append({"target": kept, "attempts": attempts, "verdict": verdict})
    if command.out:
        results = {"jax": jax.__version__, "config": to_json(run.config), "targets": found}
        command.out.parent.mkdir(parents=True, exist_ok=True)
        command.out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"written to {command.out}")
    return 0 if all(each["attempts"][0]["fits"] for each in found) else 1


def _open_run(command: "Plan") -> Run:
    """Resolves the options of a command, with its data set or with what the command says of it."""
    config = command.config(command.loss)
    dataset = _described(command) if command.class_names else open_cases(config.data)
    config = resolve_config(config, dataset)
    regions = ids_of(dataset, config.model.regions)
    shape = () if command.class_names else dataset.largest_shape
    return Run(config, DataInfo.of(dataset), command.devices, regions, dataset.has_ignore, shape)


def _described(command: "Plan") -> Any:
    """Stands for a data set of which only the classes and channels are known."""
    patch = command.data.patch
    if not patch:
        raise InputError("Without a data set nothing says how large a patch is: give --patch.")
    if command.init:
        info = read_config(command.init)[1]
    else:
        info = DataInfo("data", (), 0, 0, command.data.intensities, command.data.geometry)
    known = {**vars(info), "class_names": command.class_names, "num_channels": command.num_channels}
    return SimpleNamespace(
        **known | {"spatial_dims": len(patch)}, largest_shape=patch, regions={}, has_ignore=False
    )


def _attempts(run: Run, target: Target, limit_s: float) -> Iterator[dict[str, Any]]:
    """The run as it stands, then with more and more of what saves memory, until it fits.

    If the devices cannot share the batch, volumes are split first.

    Raises:
        InputError: no mesh can split the run.
    """
    attempt = first = _attempt(run, target, limit_s, {})
    added: dict[str, str] = {}
    if "refused" in first:
        for mesh in _meshes(run, target):
            added = {"--mesh": mesh}
            attempt = _attempt(_with(run, added), target, limit_s, added)
            if "refused" not in attempt:
                break
        else:
            raise InputError(first["refused"])
        yield first
    yield attempt
    for option, values in _savings(_with(run, added), target):
        for value in values:
            # What fails for another reason than memory fails again. Nothing of this helps validation.
            if attempt["fits"] or "validation" in attempt or not attempt.get("out_of_memory", True):
                return
            tried = {**added, option: value}
            attempt = _attempt(_with(run, tried), target, limit_s, tried)
            yield attempt
            # Later attempts keep what saves memory. A mesh replaces the one before.
            if "refused" not in attempt:
                added = tried


def _savings(run: Run, target: Target) -> Iterator[tuple[str, list[str]]]:
    """Options that save memory and are not used yet, with the values to try, in order."""
    data, fsdp, _ = mesh_shape(run.devices.mesh, target.num_devices)
    batch_size = run.config.training.batch_size
    if not run.devices.remat:
        yield "--remat", [""]
    if run.devices.accumulate and run.devices.accumulate * data * fsdp < batch_size:
        yield "--accumulate", ["0"]
    if meshes := _meshes(run, target):
        yield "--mesh", meshes
    if run.config.training.precision == "float32":
        yield "--precision", ["bfloat16"]


def _meshes(run: Run, target: Target) -> list[str]:
    """Meshes that split volumes over 2, 4, ... times as many devices as that of the run, where that is possible."""
    data, fsdp, space = mesh_shape(run.devices.mesh, target.num_devices)
    step = space * find_divisors(run.config, run.info)[0]
    meshes = []
    for factor in (2, 4, 8, 16, 32):
        of_data = math.gcd(factor, data)
        of_fsdp = factor // of_data
        if fsdp % of_fsdp == 0 and run.config.data.patch[0] % (factor * step) == 0:
            sizes = {DATA: data // of_data, FSDP: fsdp // of_fsdp, SPACE: space * factor}
            meshes.append(",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1))
    return meshes


def _with(run: Run, options: Mapping[str, str]) -> Run:
    """The run with options of `_savings`."""
    devices, config = run.devices, run.config
    if "--remat" in options:
        devices = dataclasses.replace(devices, remat=True)
    if "--mesh" in options:
        devices = dataclasses.replace(devices, mesh=options["--mesh"])
    if "--accumulate" in options:
        devices = dataclasses.replace(devices, accumulate=int(options["--accumulate"]))
    if "--precision" in options:
        training = dataclasses.replace(config.training, precision="bfloat16")
        config = dataclasses.replace(config, training=training)
    return dataclasses.replace(run, config=config, devices=devices)


def _attempt(run: Run, target: Target, limit_s: float, added: Mapping[str, str]) -> dict[str, Any]:
    """Compiles a run for a target: figures of its step and, if that fits, its validation, and whether both fit."""
    options = " ".join(filter(None, [word for pair in added.items() for word in pair]))
    attempt = {"options": options, **_outcome("compile_step", run, target, limit_s)}
    if attempt["fits"] and run.config.data.num_val:
        validation = _outcome("compile_validation", run, target, limit_s)
        attempt |= {"fits": validation["fits"], "validation": validation}
    return attempt


def _outcome(function: str, run: Run, target: Target, limit_s: float) -> dict[str, Any]:
    """Figures of a program of the run, and whether it fits."""
    try:
        figures = run_for(target, f"train.abstract:{function}", to_json(run), limit_s)
    except CompilationFailed as error:
        reason = str(error)
        return {"fits": False, "failed": reason, **_out_of_memory(reason)}
    except InputError as error:
        return {"fits": False, "refused": str(error)}
    needed = figures["total_bytes"] + figures["waiting_bytes"]
    return {"fits": needed <= target.usable, "needed_bytes": needed, **figures}


def _out_of_memory(message: str) -> dict[str, Any]:
    """Whether a compiler failed because a program needs too much, and the bytes that it needs if that is told."""
    if "RESOURCE_EXHAUSTED" not in message or "hbm" not in message.lower():
        return {"out_of_memory": False, "needed_bytes": None}
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = _NEEDED.search(message)
    return {
        "out_of_memory": True,
        "needed_bytes": int(float(found[1]) * units[found[2]]) if found else None,
    }


def _line(attempt: Mapping[str, Any], target: Target) -> str:
    """What came of an attempt, in one line."""
    name = f"  {attempt['options'] or 'as it stands'}: "
    if "refused" in attempt:
        return f"{name}impossible: {attempt['refused']}"
    if not attempt.get("out_of_memory", True):
        return f"{name}the compiler failed: {attempt['failed']}"
    fits = "fits" if attempt["fits"] else "does not fit"
    if attempt["needed_bytes"] is None:
        return f"{name}{fits}: {attempt['failed']}"
    usable, needed = format_bytes(target.usable), attempt["needed_bytes"]
    if "validation" in attempt:
        if not attempt["fits"]:
            return (
                f"{name}the step fits, {format_bytes(needed)} of {usable} on each device; validation does not"
            )
        needed = max(needed, attempt["validation"]["needed_bytes"])
    return f"{name}{fits}, {format_bytes(needed)} of {usable} on each device"


def _table(attempts: Sequence[Mapping[str, Any]]) -> str:
    """Each attempt's use of memory on one device, and what devices exchange in a step."""
    rows = []
    for attempt in attempts:
        row = dict.fromkeys(_COLUMNS, "-") | {"": attempt["options"] or "as it stands"}
        if attempt.get("needed_bytes"):
            row["needs"] = format_bytes(attempt["needed_bytes"])
        if "total_bytes" in attempt:
            exchanged = attempt["collectives"]
            known = {name: attempt[key] for name, key in _PARTS.items()}
            row |= {name: format_bytes(size) for name, size in known.items()}
            # Code, and the padding of arrays in the chip's tiles.
            row["other"] = format_bytes(max(attempt["total_bytes"] - sum(known.values()), 0))
            row["exchanges"] = str(sum(kind["count"] for kind in exchanged.values()))
            row["exchanged"] = format_bytes(sum(kind["bytes"] for kind in exchanged.values()))
            row["compiled in"] = f"{attempt['compile_s']:.0f} s"
        if attempt.get("validation", {}).get("needed_bytes"):
            row["validation"] = format_bytes(attempt["validation"]["needed_bytes"])
        rows.append(row)
    return textwrap.indent(format_table(rows), "  ")


def _verdict(attempts: Sequence[Mapping[str, Any]], target: Target, arguments: Sequence[str]) -> str:
    """Whether the run fits, and the command of the first attempt that does."""
    first, last = attempts[0], attempts[-1]
    if first["fits"]:
        return f"The run fits on {target.title}:\n  {_fit_command(arguments, '')}"
    if last["fits"]:
        cannot = "is impossible" if "refused" in first else "does not fit"
        found = f"The run {cannot} on {target.title} as it stands. It fits with {last['options']}:"
        return f"{found}\n  {_fit_command(arguments, last['options'])}"
    if "validation" in last:
        return _verdict_on_validation(last, target)
    if not last.get("out_of_memory", True):
        return f"Whether the run fits on {target.title} is not known: {last['failed']}"
    needs = [attempt["needed_bytes"] for attempt in attempts if attempt.get("needed_bytes") is not None]
    least = (
        f": at best it needs {format_bytes(min(needs))} of {format_bytes(target.usable)} on each device"
        if needs
        else ""
    )
    return (
        f"The run does not fit on {target.title}{least}. Choose a smaller patch, fewer patches per step, or more "
        "devices."
    )


def _verdict_on_validation(attempt: Mapping[str, Any], target: Target) -> str:
    """Of a run whose step fits, but not its validation."""
    validation = attempt["validation"]
    step = f"The step fits on {target.title}" + (f" with {attempt['options']}" if attempt["options"] else "")
    if not validation.get("out_of_memory", True) or "refused" in validation:
        reason = validation.get("failed") or validation["refused"]
        return f"{step}. Whether validation fits is not known: {reason}"
    needs = "does not"
    if needed := validation["needed_bytes"]:
        needs = f"needs {format_bytes(needed)} of {format_bytes(target.usable)}"
    if volume := validation.get("volume_bytes"):
        needs += f", {format_bytes(volume)} of it for the largest volume"
    advice = "Choose a smaller --eval-patch, or leave out validation with --num-val 0."
    return f"{step}, but validation {needs}. {advice}"


def _fit_command(arguments: Sequence[str], added: str) -> str:
    """The command that trains the run of a plan with options added."""
    new = added.split()
    replaced = {*_OWN_OPTIONS, *(word for word in new if word.startswith("--"))}
    kept: list[str] = []
    keep = True
    for word in arguments:
        if word.startswith("--"):
            keep = word.partition("=")[0].replace("_", "-") not in replaced
        if keep:
            kept.append(word)
    data = [] if any(word.partition("=")[0] == "--data" for word in kept) else _data_of(arguments)
    return shlex.join(["python", "-m", "train", "fit", *kept, *data, *new])


def _data_of(arguments: Sequence[str]) -> list[str]:
    described = any(word.partition("=")[0].replace("_", "-") == "--class-names" for word in arguments)
    return ["--data", "LAYOUT:PATH"] if described else []
