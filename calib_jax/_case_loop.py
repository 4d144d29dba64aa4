"""Works through cases: in threads, with progress on stderr, and with faults that end their own case only."""

import concurrent.futures
import functools
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TextIO, TypeVar

from calib_jax._terminal import printable

Value = TypeVar("Value")
Words = tuple[str, ...]
"""What names a case: `(model, case)`, or `(case,)`."""

FAULTS = (ValueError, OSError, MemoryError, SystemError)
"""Exceptions that end one case only."""
_LINE_EVERY = 10.0  # seconds between lines of progress where output is no terminal


class Stopped(KeyboardInterrupt):
    """Ctrl-C between cases; says how many are done."""


class Outcome(NamedTuple, Generic[Value]):
    """What came of the cases.

    Attributes:
        found: what the work returned, in the order of the cases.
        faults: a sentence for each case that failed, sorted.
        reused: number of cases that an earlier start had done.
    """

    found: dict[Words, Value]
    faults: list[str]
    reused: int

    @property
    def status(self) -> int:
        """Exit status of a command: 1 if any case failed."""
        return 1 if self.faults else 0


def for_each_case(
    cases: Sequence[Words],
    work: Callable[..., Value],
    *,
    find: Callable[..., Value | None] | None = None,
    done: str = "read",
    place: object = None,
    jobs: int = 1,
) -> Outcome[Value]:
    """Calls `work(*case)` for every case that an earlier start has not done.

    Args:
        cases: what `work` is called with.
        work: raises one of `FAULTS` if the case cannot be used.
        find: what is kept of a case, None for nothing.
        done: what has happened to a case when `work` returns, in a word.
        place: where results are kept; None if they are not.
        jobs: number of threads, each of which holds a case.

    Raises:
        ValueError: no case could be used.
        Stopped: on Ctrl-C, after the calls that have begun.
    """
    found: dict[Words, Value] = {}
    for case in cases if find else ():
        if (value := find(*case)) is not None:  # type: ignore[misc]
            found[case] = value
    before, remaining = len(found), [case for case in cases if case not in found]
    faults: list[str] = []
    again: list[Words] = []

    def take(case: Words, result: Callable[[], Value], *, may_repeat: bool) -> None:
        try:
            found[case] = result()
        except FAULTS as error:
            if may_repeat:
                again.append(case)
                return
            faults.append(sentence(error, *case))
            progress.say(f"fault: {faults[-1]}")

    with Progress() as progress, concurrent.futures.ThreadPoolExecutor(jobs, "case") as pool:
        if before:
            progress.say(f"{before} of {len(cases)} cases were {done} before.")
        pending: dict[concurrent.futures.Future[Value], Words] = {}
        try:
            for case in remaining:
                pending[pool.submit(work, *case)] = case
            for number, future in enumerate(concurrent.futures.as_completed(pending), before + 1):
                take(pending[future], future.result, may_repeat=jobs > 1)
                progress(number, len(cases), before)
            # Some faults go away when a case is alone: too little memory, and Python 3.11's parser, which NumPy
            # reads headers with and which may fail in threads (CPython issue 106905).
            for case in again:
                take(case, functools.partial(work, *case), may_repeat=False)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            ended = [future for future in pending if future.done() and not future.cancelled()]
            number = before + sum(future.exception() is None for future in ended)
            where = f" They are kept in {place}, and the same command goes on from there." if place else ""
            raise Stopped(f"stopped: {number} of {len(cases)} cases are {done}.{where}") from None
    if not found:
        raise ValueError("no case could be read, see the sentences above.")
    return Outcome({case: found[case] for case in cases if case in found}, sorted(faults), before)


def sentence(error: BaseException, *case: str) -> str:
    """The message on one line. An exception that does not say which case it is about gets its name.

    Example:
        >>> sentence(ValueError("a.npz is truncated."), "m", "a"), sentence(ValueError("truncated."), "m", "a")
        ('a.npz is truncated.', 'a of m: truncated.')
    """
    text, *words = (printable(" ".join(x.split())) for x in (str(error) or type(error).__name__, *case))
    if isinstance(error, MemoryError):
        text = f"the case does not fit into memory ({text}): try --jobs 1, or more memory."
    named = re.search(rf"(?<!\w){re.escape(words[-1])}(?!\w)", text)
    return text if named else f"{' of '.join(reversed(words))}: {text}"


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

    def __call__(self, done: int, total: int, initial: int = 0) -> None:
        """Shows how many are done; `initial` of them were done before this start."""
        if self.stream.isatty():
            if self.bar is None:
                from tqdm import tqdm

                self.bar = tqdm(
                    total=total, unit=self.noun, file=self.stream, dynamic_ncols=True, initial=initial
                )
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
