"""Timing of several programs in turn, so that a change of the machine's speed affects all of them."""

import contextlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

Name = TypeVar("Name")

_PACKAGES = ("calib_jax", "jax", "jaxlib", "flax", "optax", "torch", "monai", "numpy")


def interleaved(
    programs: Mapping[Name, Callable[[], Any]], *, warmup: int, rounds: int, title: str = "rounds"
) -> dict[Name, list[float]]:
    """Seconds of each call. A program must return only when its work is done.

    In its turn each program is called twice, and the second call is timed, like one of many steps in training. The
    first call wakes the cores, fills the caches and outlasts the threads of the previous program, which spin for a
    while after their work.

    Args:
        programs: programs by name; each round takes each of them once, in this order.
        warmup: rounds that are not counted (compilation, caches).
        rounds: rounds that are counted.
        title: title of the progress bar.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in programs}
    for i in tqdm(range(warmup + rounds), title):
        for name, program in programs.items():
            program()
            start = time.perf_counter()
            program()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(samples: Mapping[str, Sequence[float]], ours: str, reference: str) -> float:
    """Median of ours over median of the reference; below 1, ours is faster."""
    return statistics.median(samples[ours]) / statistics.median(samples[reference])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    q1, median, q3 = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [values[0]]
    )
    return {"median": median, "q1": q1, "q3": q3, "min": min(values), "max": max(values)}


def ratio_spread(samples: Mapping[str, Sequence[float]], ours: str, reference: str) -> dict[str, float]:
    """Spread of ours over the reference within each round, in which the machine's speed is nearly constant."""
    return spread([a / b for a, b in zip(samples[ours], samples[reference], strict=True)])


def format_samples(samples: Mapping[str, Sequence[float]]) -> str:
    """A line for each program: median, quartiles and extremes in milliseconds."""
    width = max(map(len, samples))
    lines = [f"{'':{width}}  " + "  ".join(f"{name:>9}" for name in spread([0.0])) + "   ms"]
    for name, seconds in samples.items():
        lines.append(f"{name:{width}}  " + "  ".join(f"{1000 * s:9.1f}" for s in spread(seconds).values()))
    return "\n".join(lines)


def write_results(
    file: Path, results: Mapping[str, Any], *, say: bool = True, with_device: bool = True
) -> None:
    """Writes results as JSON, with the command, versions and machine that are needed to repeat them.

    Args:
        file: the JSON file.
        results: plain JSON values.
        say: whether to print the file's name.
        with_device: whether to name the device that JAX runs on, which opens it.
    """
    kept = {
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "cores": len(os.sched_getaffinity(0)),
        "machine": _processor(),
        **({"device": _device()} if with_device else {}),
        "python": platform.python_version(),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "versions": versions(_PACKAGES),
        **results,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(kept, indent=1) + "\n")
    if say:
        print(f"written to {file}")


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found: dict[str, str] = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def settings(options: Any, *names: str) -> dict[str, Any]:
    """The named options of a benchmark, for its results."""
    return {name: getattr(options, name) for name in names}


def first_line(error: Exception) -> str:
    """Type of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _device() -> str:
    import jax

    return f"{jax.default_backend()}: {jax.devices()[0].device_kind}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()
