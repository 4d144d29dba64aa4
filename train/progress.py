"""Progress of a loop on stderr: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

_FIRST_LINE = 5.0  # seconds until the first plain line
_NEXT_LINE = 30.0  # seconds between plain lines


def progress(
    iterable: Iterable[Item],
    *,
    desc: str,
    total: int | None = None,
    initial: int = 0,
    unit: str = "case",
    leave: bool = True,
    disable: bool = False,
) -> "tqdm[Item] | _Lines[Item]":
    """Iterates over `iterable` and shows the progress on stderr.

    A terminal gets tqdm's bar. A file or a pipe gets plain lines: the first after a few seconds, then one every
    half minute, and one at the end. `set_postfix(name=value)` of the result shows values beside the progress.

    Args:
        iterable: the items.
        desc: what the loop does; starts each line.
        total: number of items, including those before `initial`; by default `initial` plus the length of
            `iterable`.
        initial: number of items done by an earlier run.
        unit: what an item is called.
        leave: keep the bar, or print the last line, when the loop ends. If False, a loop that ends within the
            first seconds prints nothing.
        disable: show nothing.

    Example:
        >>> for case in progress(["a", "b"], desc="reading", disable=True):
        ...     print(case)
        a
        b
    """
    if total is None and isinstance(iterable, Sized):
        total = initial + len(iterable)
    if not disable and sys.stderr is not None and sys.stderr.isatty():
        return tqdm(iterable, desc, total, leave, initial=initial, unit=unit)
    return _Lines(iterable, desc, total, initial, unit, leave, disable or sys.stderr is None)


def time_left(seconds: int) -> str:
    """`2:05 min left`."""
    return f"{seconds // 60}:{seconds % 60:02d} min left"


@dataclass
class _Lines(Generic[Item]):
    """`progress` as plain lines."""

    iterable: Iterable[Item]
    desc: str
    total: int | None
    initial: int
    unit: str
    leave: bool
    disable: bool
    values: dict[str, Any] = field(default_factory=dict)

    def set_postfix(self, **values: Any) -> None:
        self.values = values

    def __iter__(self) -> Iterator[Item]:
        if self.disable:
            yield from self.iterable
            return
        due, printed, done = time.monotonic() + _FIRST_LINE, -1, self.initial
        first_done = 0.0
        for done, item in enumerate(self.iterable, self.initial + 1):
            yield item
            now = time.monotonic()
            # The first item may include a compilation, so the speed counts from its end.
            first_done = first_done or now
            if now >= due:
                elapsed = now - first_done
                self._print(done, (done - self.initial - 1) / elapsed if elapsed else 0.0)
                due, printed = now + _NEXT_LINE, done
        if printed != done and (self.leave or printed >= 0):
            self._print(done, 0.0)

    def _print(self, done: int, speed: float) -> None:
        parts = [f"{self.unit} {done}" + (f" of {self.total}" if self.total is not None else "")]
        parts += [f"{name} {value}" for name, value in self.values.items()]
        if speed:
            parts.append(f"{speed:.3g} {self.unit}s/s")
            if self.total is not None:
                parts.append(time_left(round((self.total - done) / speed)))
        print(f"{self.desc}: {', '.join(parts)}", file=sys.stderr, flush=True)
