"""The surroundings of a command: what it prints to, and what other libraries say and read there."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

# What these libraries log is about their own workings. What fails is raised as well.
_LOGGERS = ("absl", "etils", "grain", "matplotlib", "orbax", "tensorstore")
_NOT_OURS = r"(?!(train|calib_jax)(\.|$))"


@contextlib.contextmanager
def console() -> Iterator[None]:
    """While in this context, nothing that is printed can fail, and warnings of other libraries are not shown.

    Characters that the terminal's encoding lacks are printed as escapes. Where stdout or stderr is closed, as by
    `| head`, nothing more is printed.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # else the first file that is opened would be where closed stdout or stderr was
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
        warnings.filterwarnings("ignore", module=_NOT_OURS)
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
    """A text stream whose writing never fails."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError):  # ValueError: it is closed
            self._give_up()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        """Leads what follows, and what Python still has to write when it exits, to nowhere."""
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())
