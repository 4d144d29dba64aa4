"""The standard streams of a command, and what other libraries print there."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from calib_jax._terminal import print_in_any_encoding

# These libraries log their own workings. Their failures are raised as well.
_LOGGERS = ("absl", "etils", "grain", "matplotlib", "orbax", "tensorstore")
_OTHERS = r"(?!(train|calib_jax)(\.|$))"


@contextlib.contextmanager
def console() -> Iterator[None]:
    """A context in which printing never fails and warnings of other libraries are not shown.

    Characters that the terminal's encoding lacks are replaced. If stdout or stderr is closed, as by `| head`,
    nothing more is printed there.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # otherwise the next file to be opened would take the place of a closed stdout or stderr
    os.close(descriptor)
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    formatwarning = warnings.formatwarning
    with contextlib.ExitStack() as stack:
        if sys.stdout is not None:
            stack.enter_context(contextlib.redirect_stdout(_Stream(sys.stdout)))
        if sys.stderr is not None:
            stack.enter_context(contextlib.redirect_stderr(_Stream(sys.stderr)))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=_OTHERS)
        warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            warnings.formatwarning = formatwarning
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


class _Stream:
    """A text stream to which writing never fails."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            with contextlib.redirect_stdout(self._stream):
                print_in_any_encoding()  # from now on
            self._stream.write(text)
        except (OSError, ValueError):  # ValueError: the stream is closed
            self._give_up()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        """Discards further output, and what Python would write when it exits."""
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())


def format_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with equal keys as a text table; the first column is aligned left, the others right."""
    lines = [list(rows[0]), *([*row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pads = ["<", *">" * (len(widths) - 1)]
    return "\n".join(
        "  ".join(f"{cell:{pad}{width}}" for cell, pad, width in zip(line, pads, widths, strict=True))
        for line in lines
    )
