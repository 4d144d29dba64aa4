"""Measures every case of a folder of predictions, one case in memory per job, and keeps what is done.

Each case leaves a small file in the folder of the report. A second start uses this file, unless files of the case
or options have changed.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import numpy as np

from calib_jax._sums.bins import Bins
from calib_jax.binning import BinStatistics
from calib_jax.report.measure import CaseFigures, Slice, measure
from calib_jax.results import ModelResult

if TYPE_CHECKING:
    from calib_jax.predictions import Predictions

Value = TypeVar("Value")

CASES = "cases"
_FAULTS = (ValueError, OSError, MemoryError, SystemError)
_LINE_EVERY = 10.0  # seconds between lines of progress where output is no terminal


@dataclasses.dataclass(frozen=True)
class Study:
    """Figures of all cases.

    Attributes:
        cases: figures of the readable cases of each model, in the order of their names; without slices, which
            are large.
        folder: folder of the report.
        faults: what went wrong, one sentence for each case.
        reused: number of cases that were found measured.
    """

    cases: Mapping[str, Sequence[CaseFigures]]
    folder: Path
    faults: Sequence[str]
    reused: int

    def slice_of(self, model: str, name: str) -> Slice:
        """The slice of a case, from its file."""
        return CaseFigures.load_slice(_path(self.folder, model, name))


class Stopped(KeyboardInterrupt):
    """Ctrl-C while cases are measured; says how many are."""


def measure_cases(
    predictions: "Predictions",
    bins: Bins,
    folder: Path,
    *,
    options: Mapping[str, Any],
    jobs: int = 1,
    progress: Callable[[int, int], Any] | None = None,
    fault: Callable[[str], Any] | None = None,
) -> Study:
    """Measures every case of every model.

    Args:
        predictions: return value of `calib_jax.predictions.open_predictions`.
        bins: how [0, 1] is divided into bins.
        folder: folder of the report; figures of cases go to `cases/MODEL/CASE.npz` in it.
        options: what the figures depend on beside the files; JSON.
        jobs: number of threads, each of which holds a case.
        progress: called with the number of finished cases and of all cases, from this thread.
        fault: called with the sentence of a case that cannot be read, when it is found.

    Raises:
        Stopped: on Ctrl-C, after the cases that were being measured are kept.
    """

    def one(model: str, name: str) -> tuple[CaseFigures, bool]:
        path = _path(folder, model, name)
        facts = [options, dataclasses.asdict(bins), list(predictions.class_names), model, name]
        key = json.dumps([*facts, _versions_of(predictions.files(name, model))], sort_keys=True)
        kept = CaseFigures.load(path, key)
        if kept is not None:
            return dataclasses.replace(kept, slice=None), True
        figures = measure(predictions.read(name, model), bins)
        figures.save(path, key)
        return dataclasses.replace(figures, slice=None), False

    try:
        found, faults = for_each_case(predictions, one, jobs=jobs, progress=progress, fault=fault)
    except Stopped as stopped:
        message = f"{stopped} They are kept in {folder / CASES}, and the same command goes on from there."
        raise Stopped(message) from None
    reused = sum(old for _, old in found.values())
    by_model = {
        model: [found[model, name][0] for name in predictions.case_names if (model, name) in found]
        for model in predictions.models
    }
    return Study(by_model, folder, faults, reused)


def for_each_case(
    predictions: "Predictions",
    work: Callable[[str, str], Value],
    *,
    jobs: int = 1,
    progress: Callable[[int, int], Any] | None = None,
    fault: Callable[[str], Any] | None = None,
) -> tuple[dict[tuple[str, str], Value], list[str]]:
    """Calls `work(model, case name)` for every case of every model, in threads.

    Returns:
        What `work` returned, by model and case, and a sentence for each case whose files are at fault.

    Raises:
        Stopped: on Ctrl-C, after the calls that have begun.
    """
    tasks = [(model, name) for name in predictions.case_names for model in predictions.models]
    found: dict[tuple[str, str], Value] = {}
    faults: list[str] = []
    again: list[tuple[str, str]] = []

    def take(task: tuple[str, str], result: Callable[[], Value], *, may_repeat: bool) -> None:
        try:
            found[task] = result()
        except _FAULTS as error:
            if may_repeat:
                again.append(task)
                return
            faults.append(_sentence(error, *task))
            if fault:
                fault(faults[-1])

    with concurrent.futures.ThreadPoolExecutor(jobs, "case") as pool:
        pending = {pool.submit(work, *task): task for task in tasks}
        try:
            for done, future in enumerate(concurrent.futures.as_completed(pending), 1):
                take(pending[future], future.result, may_repeat=jobs > 1)
                if progress:
                    progress(done, len(tasks))
            # Some faults go away when a case is alone: too little memory, and Python 3.11's parser, which NumPy
            # reads headers with and which may fail in threads (CPython issue 106905).
            for task in again:
                take(task, functools.partial(work, *task), may_repeat=False)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            ended = [future for future in pending if future.done() and not future.cancelled()]
            kept = sum(future.exception() is None for future in ended)
            raise Stopped(f"stopped: {kept} of {len(tasks)} cases are measured.") from None
    return found, sorted(faults)


def results_of(
    study: Study, class_names: Sequence[str], *, first_class: int, integer_counts: bool = True
) -> list[ModelResult]:
    """The result of each model that has any case, of the classes from `first_class` on."""
    results = []
    for model, cases in study.cases.items():
        if cases:
            names = tuple(class_names[first_class:])
            stats, boundary = (
                _stacked([getattr(case, field)[:, first_class:] for case in cases], integer_counts)
                for field in ("bins", "boundary_bins")
            )
            dice, brier, nll = (
                np.stack([getattr(case, method)()[first_class:] for case in cases])
                for method in ("dice", "brier", "mean_nll")
            )
            case_names = tuple(case.name for case in cases)
            results.append(ModelResult(model, case_names, names, stats, dice, brier, nll, boundary))
    return results


def _stacked(bins: Sequence[np.ndarray], integer_counts: bool) -> BinStatistics:
    count, prob_sum, label_sum = np.stack(bins, 1)
    return BinStatistics(count.astype(np.int64) if integer_counts else count, prob_sum, label_sum)


def _path(folder: Path, model: str, name: str) -> Path:
    return folder / CASES / safe_name(model) / f"{safe_name(name)}.npz"


def safe_name(name: str) -> str:
    """A file name without separators, unlike that of any other name.

    Example:
        >>> safe_name("../A b")
        'A-b-da87ebe7'
    """
    plain = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")[:60]
    digest = hashlib.sha1(name.encode("utf-8", "surrogateescape"), usedforsecurity=False).hexdigest()[:8]
    return plain if plain == name and plain else f"{plain}-{digest}".lstrip("-")


class Progress:
    """A progress bar on a terminal, plain lines elsewhere. Use it as a context, and call it."""

    def __init__(self, stream: TextIO | None = None, noun: str = "case"):
        self.stream, self.noun, self.bar = stream or sys.stderr, noun, None
        self.before, self.start = time.monotonic(), time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, done: int, total: int) -> None:
        if self.stream.isatty():
            if self.bar is None:
                from tqdm import tqdm

                self.bar = tqdm(total=total, unit=self.noun, file=self.stream, dynamic_ncols=True)
            self.bar.update(done - self.bar.n)
        elif done == total or time.monotonic() - self.before >= _LINE_EVERY:
            self.before = time.monotonic()
            print(
                f"{done} of {total} {self.noun}s, {self.before - self.start:.0f} s",
                file=self.stream,
                flush=True,
            )

    def say(self, sentence: str) -> None:
        """Prints a sentence without disturbing the bar."""
        if self.bar is None:
            print(sentence, file=self.stream, flush=True)
        else:
            self.bar.write(sentence, file=self.stream)


def _sentence(error: BaseException, model: str, name: str) -> str:
    """The message on one line; an exception that does not say which case it is about gets its name."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError):
        text = f"the case does not fit into memory ({text}): try --jobs 1, or more memory."
    return text if name in text else f"{name} of {model}: {text}"


def _versions_of(files: Iterable[Path]) -> list[list[Any]]:
    """Path, size and time of change of files; a file that is missing has only its path."""
    entries = []
    for file in files:
        try:
            info = file.stat()
            entries.append([os.fspath(file), info.st_size, info.st_mtime_ns])
        except OSError:
            entries.append([os.fspath(file)])
    return entries
