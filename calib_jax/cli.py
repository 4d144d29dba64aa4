"""The console script `calib-jax`: how far to trust predicted probabilities, and how to mend them without training.

Each command is a module of `calib_jax.commands`, which is imported when its command is given.
"""

import argparse
import contextlib
import importlib
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from calib_jax._terminal import print_in_any_encoding, printable

COMMANDS: Final[Mapping[str, str]] = {
    "report": "how far to trust predictions: a page, tables and figures",
    "calibrate": "fit a calibrator to a folder of predictions, apply it to another",
    "ensemble": "average the predictions of several models or folds",
    "triage": "which cases to look at first, without labels",
    "sweep": "how calibration errors depend on the number and kind of bins",
    "convert": "convert predictions between file formats",
}
_EXAMPLE = """\
example:
  calib-jax report --probs predictions --labels labelsTs --out report

`calib-jax COMMAND --help` explains a command. Exit status: 0 if all went well, 1 if some case could not be used,
2 if nothing could be done, 130 after Ctrl-C or SIGTERM.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with _printable(), _terminated_as_interrupted():
        options = _parser(arguments).parse_args(arguments)
        module = importlib.import_module(f"calib_jax.commands.{options.command}")
        try:
            return module.run(options)
        except KeyboardInterrupt as stop:
            print(str(stop) or "stopped.", file=sys.stderr)
            return 130
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == "calib_jax":
                raise
            print(
                f"error: {error.name} is not installed, which calib-jax {options.command} needs: "
                "pip install 'calib_jax[report]'.",
                file=sys.stderr,
            )
            return 2
        except BrokenPipeError:
            return 0
        except (ValueError, OSError, MemoryError) as error:
            words = " ".join(str(error).split()) or type(error).__name__
            print(f"error: {printable(words)}", file=sys.stderr)
            return 2


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all commands, with the options of the command that is given."""
    parser = argparse.ArgumentParser(
        prog="calib-jax",
        description="Tells how far to trust predicted probabilities of a segmentation, and mends them.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    given = next((x for x in arguments if not x.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == given:
            importlib.import_module(f"calib_jax.commands.{name}").add_arguments(command)
    return parser


@contextlib.contextmanager
def _printable() -> Iterator[None]:
    """Characters that the terminal's encoding lacks, such as an arrow or a file name, never stop a command."""
    print_in_any_encoding()
    yield


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does: what is done is kept, and nothing half-written stays."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # handlers belong to the main thread
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
