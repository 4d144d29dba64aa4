"""The folder of a run: its configuration, its lock, and how files are written to it."""

import contextlib
import fcntl
import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import jax
from jax.experimental import multihost_utils

from train.config import from_json, to_json
from train.errors import InputError, Stopped
from train.files import make_folder, parsing, read_json, visible
from train.processes import first_says, is_first, on_all, on_first

_PROCESS = "process.json"
PARTIAL = ".partial"
_STOPPING = (signal.SIGTERM, signal.SIGINT)
PACKAGES = ("calib_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def default_folder(name: str) -> Path:
    """A new folder under `runs/`, named after the command and the time."""
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def open_run(
    folder: Path, config: Any, *, resume: bool, check: Callable[[], None] = lambda: None, **more: Any
) -> None:
    """Makes `folder` the folder of a run of `config`, or checks that the run in it may be resumed.

    Args:
        folder: of the run.
        config: a dataclass.
        resume: accept a run of the same configuration in `folder`.
        check: called in every process for a new run, before anything is written.
        more: kept beside the configuration.

    Raises:
        InputError: the folder holds something and `resume` is False, holds a run of another configuration, or
            cannot be written; or `check` raised it.
    """
    file = folder / "config.json"
    on_first(lambda: _check_free(folder, config, resume))
    if first_says(resume and file.exists()):
        return
    on_all(check)
    on_first(lambda: _write_config(file, config, more))


def _check_free(folder: Path, config: Any, resume: bool) -> None:
    file = folder / "config.json"
    if resume and file.exists():
        _check_same(file, config)
    # A run killed at its very start leaves a partial file.
    elif folder.exists() and (not folder.is_dir() or any(path.suffix != PARTIAL for path in visible(folder))):
        found = "another run" if file.exists() else "something else"
        hint = " or, to go on with a training, add --resume" if file.exists() else ""
        raise InputError(f"Output folder {folder} already holds {found}: choose another --out{hint}.")


def _write_config(file: Path, config: Any, more: dict[str, Any]) -> None:
    started = {"command": command(), "directory": os.getcwd()}  # relative paths start from the directory
    make_folder(file.parent, "Output folder")
    with writing(file):
        write_json(file, {"config": to_json(config), **more, **started, "versions": versions()})


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """A context in which no other process trains in `folder`, and `process_of` describes this one.

    The claim is a lock on an open file, which the system releases when the process ends, however it ends.

    Raises:
        InputError: another process has claimed the folder.
    """
    if not is_first():  # the first process claims it for all
        yield
        return
    with writing(folder):
        file = (folder / _PROCESS).open("a+", encoding="utf-8")
    with file:
        _lock(file, folder)
        _note(file, "running")
        try:
            yield
        except BaseException as error:
            stopped = isinstance(error, Stopped | KeyboardInterrupt)
            _note(file, "stopped" if stopped else f"failed: {error or type(error).__name__}")
            raise
        _note(file, "finished")


@dataclass(frozen=True)
class Process:
    """The last process that claimed a folder.

    Attributes:
        running: whether it is alive.
        name: such as `process 12 on host`.
        state: its last note: `running`, `finished`, `stopped` or `failed: why`. A process whose note is
            `running` and that is not alive was killed.
    """

    running: bool
    name: str
    state: str


def process_of(folder: Path) -> Process | None:
    """The last process that claimed `folder`; None if none is known."""
    try:
        with (folder / _PROCESS).open(encoding="utf-8") as file:
            alive = not _try_lock(file, fcntl.LOCK_SH)
            note = json.load(file)
            return Process(alive, str(note["name"]), str(note["state"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lock(file: TextIO, folder: Path) -> None:
    for _ in range(10):  # `process_of` in another process locks it for a moment
        if _try_lock(file, fcntl.LOCK_EX):
            return
        time.sleep(0.1)
    owner = process_of(folder)
    raise InputError(
        f"{folder} is in use by {owner.name if owner else 'another process'}: wait until it ends, or stop it."
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A context that one process at a time can enter for the same folder. It leaves no file behind.

    Raises:
        InputError: another process is in the context.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        if not _try_lock(handle, fcntl.LOCK_EX):
            raise InputError(f"Another process is writing to {folder}: wait until it ends, or stop it.")
        yield
    finally:
        os.close(handle)


def _try_lock(file: TextIO | int, kind: int) -> bool:
    """Locks the file; False if another process holds a lock that excludes this one."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


def _note(file: TextIO, state: str) -> None:
    """Writes this process's state into its claim."""
    with contextlib.suppress(OSError):  # a full disk need not end the run here
        file.seek(0)
        file.truncate()
        name = f"process {os.getpid()} on {socket.gethostname()}"
        file.write(json.dumps({"name": name, "state": state, "since": time.strftime("%Y-%m-%d %H:%M:%S")}))
        file.flush()


@contextlib.contextmanager
def writing(what: Path) -> Iterator[None]:
    """A context that turns OSErrors, as of a full disk, into one sentence.

    Raises:
        InputError: for any OSError in the context.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{error.filename or what} could not be written ({error.strerror or error}): make room, or make the "
            "folder writable, and repeat the command, with --resume if it trains."
        ) from error


class stop_on_signal:
    """A context in which SIGTERM, which schedulers send before they take the machine, only sets `requested`.

    The first Ctrl-C does the same; a second one interrupts at once. Outside the main thread Python handles no
    signals, and the context changes nothing. Where several processes train as one, JAX handles SIGTERM in all
    of them, and Ctrl-C interrupts at once.

    Attributes:
        requested: the signal that asked this process to stop, or None.
    """

    requested: signal.Signals | None = None

    def __enter__(self) -> "stop_on_signal":
        in_main = threading.current_thread() is threading.main_thread()
        self._listens = in_main and not jax.distributed.is_initialized()
        if self._listens:
            self._before = {number: signal.signal(number, self._request) for number in _STOPPING}
        return self

    def __exit__(self, *exception: object) -> None:
        if self._listens:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def after(self, step: int) -> signal.Signals | None:
        """The signal to stop for after `step`, or None; the same in all processes if each asks after every step."""
        if multihost_utils.reached_preemption_sync_point(step):
            return signal.SIGTERM
        return self.requested

    def _request(self, number: int, _: object) -> None:
        if number == signal.SIGINT:
            if self.requested == signal.SIGINT:
                raise KeyboardInterrupt
            print(
                "\nstopping after this step, with a checkpoint; Ctrl-C again stops at once", file=sys.stderr
            )
        self.requested = signal.Signals(number)


def command() -> str:
    """The command line as a user would type it."""
    text = shlex.join(sys.argv[1:])
    return f"python -m train {os.fsencode(text).decode(errors='backslashreplace')}".strip()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect the numbers."""
    return {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in PACKAGES}


def write_json(file: Path, values: Any) -> None:
    """Writes JSON; a reader never sees half of it."""
    with written_whole(file) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """A context that gives a path beside `file` to write to, and renames it to `file` at the end."""
    partial = file.with_name(f"{file.name}{PARTIAL}")
    try:
        yield partial
        partial.replace(file)
    except BaseException:  # on a full disk the partial file would take room
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _check_same(file: Path, wanted: Any) -> None:
    with parsing(file, "a run's configuration"):
        # The run had the defaults of options that are newer.
        kept = to_json(from_json(type(wanted), read_json(file)["config"]))
    for name, (old, new) in _differences(kept, to_json(wanted)).items():
        raise InputError(f"{file} has {name} = {old}, this command has {new}: resume with the same options.")


def _differences(old: Any, new: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = {**old, **new}
        parts = [_differences(old.get(key), new.get(key), f"{name}.{key}".lstrip(".")) for key in keys]
        return {key: pair for part in parts for key, pair in part.items()}
    return {} if old == new else {name: (old, new)}
