"""Memory that mL1-ACE, forward and backward, takes beyond its inputs and gradient, beside PyTorch's."""

import ctypes
import gc
import multiprocessing
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import loss, timing

TARGET = 1.0
"""Bytes beyond inputs and gradient over bytes of the probabilities, at most, on a CPU."""
COMPILED = f"{loss.OURS} (compiler's plan)"
_TINY = "1x4x8x8x8"
_M_MMAP_THRESHOLD = -3  # malloc.h


@dataclass(frozen=True)
class Memory:
    """Memory of mL1-ACE forward and backward beyond inputs and gradient, as a share of the probabilities' bytes.

    Ours twice: what the compiled program plans for, and, as the references', the peak of a fresh process (Linux).
    """

    shape: str = "1x4x224x224x144"
    """Batch, classes, then voxels along each axis."""
    kind: loss.Kind = "blobs"
    """Kind of data, see `python -m benchmarks loss --help`."""
    num_bins: int = 20
    """Bins."""
    rounds: int = 3
    """Fresh processes for each program."""
    out: Path = Path("benchmarks/results/memory.json")
    """Where the results go, as JSON; the plot goes beside it, as PNG."""

    def run(self) -> None:
        from benchmarks import plots, reference

        reference.use_all_cores()
        data = loss.make_data(loss.parse_shape(self.shape), self.kind)
        programs = loss.ace_programs(data, reference.ace_inputs(*data), self.num_bins)
        errors = loss.check_agreement(programs, loss.exact_loss(data, self.num_bins))
        print(f"{self.shape} {self.kind}: same loss and gradient", flush=True)
        used = {COMPILED: [planned_bytes(data, self.num_bins)], **self._peaks(data, list(programs))}
        self._report(used, errors, data.probs.nbytes, plots)

    def _peaks(self, data: loss.Data, names: list[str]) -> dict[str, list[int]]:
        """Bytes by program, in turn. Every measurement has its own process, which reads the data from files."""
        used: dict[str, list[int]] = {name: [] for name in names}
        with tempfile.TemporaryDirectory() as folder:
            for field, array in data._asdict().items():
                np.save(Path(folder) / f"{field}.npy", array)
            for name in names * self.rounds:
                spawn = multiprocessing.get_context("spawn")
                with ProcessPoolExecutor(1, mp_context=spawn) as process:
                    used[name].append(process.submit(extra_bytes, name, folder, self.num_bins).result())
        return used

    def _report(self, used: dict[str, list[int]], errors: dict[str, float], unit: int, plots: Any) -> None:
        share = {name: timing.spread([value / unit for value in values]) for name, values in used.items()}
        references = [name for name in errors if name != loss.OURS]
        medians = {name: statistics.median(values) for name, values in used.items()}
        ratios = {
            ours: {name: medians[ours] / medians[name] for name in references}
            for ours in (loss.OURS, COMPILED)
        }
        print(timing.format_table([self._row(name, share[name], medians, references) for name in share]))
        print(f"target on CPU: {TARGET:.2f} of the probabilities' bytes ({unit / 1e6:.0f} MB)")
        settings = {"shape": self.shape, "kind": self.kind, "num_bins": self.num_bins, "target": TARGET}
        figures = {"probs_bytes": unit, "bytes": used, "share": share, "ratio": ratios, "loss_error": errors}
        timing.write_results(self.out, settings | figures)
        print(f"written to {self.out} and {plots.save(plots.memory(share, TARGET), self.out)}")

    def _row(
        self, name: str, share: dict[str, float], medians: dict[str, float], references: list[str]
    ) -> dict[str, str]:
        ours = name not in references
        return {
            "": name,
            "MB": f"{medians[name] / 1e6:.1f}",
            "of probs": f"{share['median']:.3f}",
            "min": f"{share['min']:.3f}",
            "max": f"{share['max']:.3f}",
            **{
                f"/ {other}": f"{medians[name] / medians[other]:.3f}" if ours else "-" for other in references
            },
        }


def planned_bytes(data: loss.Data, num_bins: int) -> int:
    """Temporary memory of the compiled loss and gradient."""
    compiled = loss.our_loss(num_bins).lower(*data).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def extra_bytes(name: str, folder: str, num_bins: int) -> int:
    """Peak of this process while it computes loss and gradient, less what it held before and less the gradient.

    Call it in a fresh process: memory that was freed but not handed back would hide what the program takes. Good
    to about 1 MB.
    """
    data = loss.Data(*(np.load(Path(folder) / f"{field}.npy") for field in loss.Data._fields))
    _hand_back_freed_memory()
    # Libraries and thread pools are set up before, on data of another size.
    _program(name, loss.make_data(loss.parse_shape(_TINY), "uniform"), num_bins)()
    program = _program(name, data, num_bins)
    before = _reset_peak()
    program()
    return _status("VmHWM") - before - data.probs.nbytes


def _hand_back_freed_memory() -> None:
    """Whatever is over 1 MiB goes back when freed: what glibc keeps for later differs from run to run by 100 MB."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _program(name: str, data: loss.Data, num_bins: int) -> loss.Program:
    """One program, compiled but not run."""
    if name == loss.OURS:
        compiled = loss.our_loss(num_bins).lower(*data).compile()
        probs, labels = jax.block_until_ready([jax.numpy.asarray(array) for array in data])
        return lambda: jax.block_until_ready(compiled(probs, labels))
    from benchmarks import reference

    reference.use_all_cores()
    return reference.ace_program(reference.ACE_LOSSES[name], reference.ace_inputs(*data), num_bins)


def _reset_peak() -> int:
    """Sets the peak to what is held now, where the kernel lets us, and returns that."""
    gc.collect()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmHWM")


def _status(field: str) -> int:
    """A figure of this process in bytes. `ru_maxrss` will not do: a child starts with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])
