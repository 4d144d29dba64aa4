"""Memory that mL1-ACE, forward and backward, takes beyond its inputs and gradient, beside PyTorch's."""

import ctypes
import gc
import multiprocessing
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np

from benchmarks import loss, timing
from benchmarks.options import Memory, parse_shape
from train.console import format_table

TARGET = 1.0
"""Largest memory beyond inputs and gradient, in bytes of the probabilities, that meets the target on a CPU."""
COMPILED = f"{loss.OURS} (compiler's plan)"
_TINY = "1x4x8x8x8"
_M_MMAP_THRESHOLD = -3  # malloc.h


def run(options: Memory) -> None:
    """Checks that the programs agree, measures their memory, and writes the results and their plot."""
    from benchmarks import plots, reference

    reference.at_its_fastest()
    data = loss.make_data(parse_shape(options.shape), options.kind)
    programs = loss.ace_programs(data, reference.ace_inputs(*data), options.num_bins)
    errors = loss.check_agreement(programs, loss.exact_loss(data, options.num_bins))
    print(f"{options.shape} {options.kind}: same loss and gradient", flush=True)
    used = {COMPILED: [planned_bytes(data, options.num_bins)], **_peaks(options, data, list(programs))}
    unit = data.probs.nbytes
    share = {name: timing.spread([value / unit for value in values]) for name, values in used.items()}
    medians = {name: statistics.median(values) for name, values in used.items()}
    references = [name for name in errors if name != loss.OURS]
    ratios = {
        ours: {name: medians[ours] / medians[name] for name in references} for ours in (loss.OURS, COMPILED)
    }
    rows = []
    for name, shares in share.items():
        rows.append({"": name, "MB": f"{medians[name] / 1e6:.1f}", "of probs": f"{shares['median']:.3f}"})
        rows[-1] |= {which: f"{shares[which]:.3f}" for which in ("min", "max")}
        rows[-1] |= {f"/ {n}": f"{ratios[name][n]:.3f}" if name in ratios else "-" for n in references}
    print(format_table(rows))
    print(f"target on CPU: {TARGET:.2f} of the probabilities' bytes ({unit / 1e6:.0f} MB)")
    settings = timing.settings(options, "shape", "kind", "num_bins")
    figures = {"probs_bytes": unit, "bytes": used, "share": share, "ratio": ratios, "loss_error": errors}
    timing.write_results(options.out, {**settings, "target": TARGET, **figures})
    plots.save(plots.memory(share, TARGET), options.out)


def _peaks(options: Memory, data: loss.Data, names: list[str]) -> dict[str, list[int]]:
    """Bytes by program, measured in turn. Each measurement has its own process, which reads the data from files."""
    used: dict[str, list[int]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for field, array in data._asdict().items():
            np.save(Path(folder) / f"{field}.npy", array)
        for name in names * options.rounds:
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                used[name].append(process.submit(extra_bytes, name, folder, options.num_bins).result())
    return used


def planned_bytes(data: loss.Data, num_bins: int) -> int:
    """Temporary memory that the compiled program of loss and gradient plans for."""
    compiled = loss.our_loss(num_bins).lower(*data).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def extra_bytes(name: str, folder: str, num_bins: int) -> int:
    """Peak memory of this process during loss and gradient, minus its memory before and minus the gradient.

    Call it in a fresh process: memory that was freed but not returned to the kernel would hide what the program
    takes. The error is about 1 MB.
    """
    data = loss.Data(*(np.load(Path(folder) / f"{field}.npy") for field in loss.Data._fields))
    _hand_back_freed_memory()
    # A first call on data of another size sets up libraries and thread pools.
    _program(name, loss.make_data(parse_shape(_TINY), "uniform"), num_bins)()
    program = _program(name, data, num_bins)
    before = _reset_peak()
    program()
    return _status("VmHWM") - before - data.probs.nbytes


def _hand_back_freed_memory() -> None:
    """Makes glibc return freed blocks over 1 MiB: what it keeps otherwise differs by 100 MB from run to run."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _program(name: str, data: loss.Data, num_bins: int) -> loss.Program:
    """A program that is compiled but has not run."""
    if name == loss.OURS:
        compiled = loss.our_loss(num_bins).lower(*data).compile()
        probs, labels = jax.block_until_ready([jax.numpy.asarray(array) for array in data])
        return lambda: jax.block_until_ready(compiled(probs, labels))
    from benchmarks import reference

    reference.at_its_fastest()
    return reference.ace_program(reference.ACE_LOSSES[name], reference.ace_inputs(*data), num_bins)


def _reset_peak() -> int:
    """Sets the peak to the current memory, if the kernel allows it, and returns it."""
    gc.collect()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmHWM")


def _status(field: str) -> int:
    """A field of this process's status in bytes. `ru_maxrss` would start with the value of the parent process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])
