"""Timing several programs in turn, so that a machine that changes its speed changes it for all of them."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

_PACKAGES = ("calib_jax", "jax", "jaxlib", "flax", "optax", "torch", "monai", "numpy")
# PyTorch's threads spin for a while after their work; whoever comes next should not pay for it.
_REST_SECONDS = 0.05


def interleaved(
    programs: Mapping[str, Callable[[], Any]], *, warmup: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each call. A program returns when its work is done.

    Args:
        programs: by name; each round calls every one of them once, in this order.
        warmup: rounds that are not counted (compilation, caches).
        rounds: rounds that are.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for i in tqdm(range(warmup + rounds), "rounds"):
        for name, program in programs.items():
            time.sleep(_REST_SECONDS)
            start = time.perf_counter()
            program()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(samples: Mapping[str, Sequence[float]], ours: str, reference: str) -> float:
    """Median of ours over median of the reference: lower is faster than the reference."""
    return statistics.median(samples[ours]) / statistics.median(samples[reference])


def format_samples(samples: Mapping[str, Sequence[float]]) -> str:
    """A line for each program: median, fastest and slowest in milliseconds."""
    width = max(map(len, samples))
    lines = [f"{'':{width}}  {'median':>9}  {'min':>9}  {'max':>9}   ms"]
    for name, seconds in samples.items():
        figures = (statistics.median(seconds), min(seconds), max(seconds))
        lines.append(f"{name:{width}}  " + "  ".join(f"{1000 * s:9.1f}" for s in figures))
    return "\n".join(lines)


def write_results(file: Path, results: Mapping[str, Any]) -> None:
    """Writes results with what it takes to repeat them: command, versions, machine."""
    kept = {
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "cores": len(os.sched_getaffinity(0)),
        "machine": _processor(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
        **results,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(kept, indent=1) + "\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()
