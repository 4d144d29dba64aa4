"""The folder of a run: what is in it, and who may write to it."""

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
from train.files import visible
from train.processes import first_says, is_first, on_all, on_first

_PROCESS = "process.json"
PARTIAL = ".partial"
_STOPPING = (signal.SIGTERM, signal.SIGINT)
PACKAGES = ("calib_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def default_folder(name: str) -> Path:
    """A new folder under `runs/`, named after what is run and when."""
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def open_run(
    folder: Path, config: Any, *, resume: bool, check: Callable[[], None] = lambda: None, **more: Any
) -> None:
    """Claims `folder` for a run of `config`, new or to be resumed; `more` is kept beside the configuration.

    A new run calls `check` in every process, after the folder was found free and before anything is written to it.

    Raises:
        InputError: if the folder holds something and `resume` is False, or holds a run of another
            configuration, or cannot be written to, or if `check` does.
    """
    file = folder / "config.json"
    on_first(lambda: _refuse_others(folder, config, resume))
    if first_says(resume and file.exists()):
        return
    on_all(check)
    on_first(lambda: _write_config(folder, config, more))


def _refuse_others(folder: Path, config: Any, resume: bool) -> None:
    file = folder / "config.json"
    if resume and file.exists():
        _check_same(file, config)
        return
    if folder.exists() and (not folder.is_dir() or _holds_something(folder)):
        found = "another run" if file.exists() else "something else"
        hint = " or add --resume to go on with it" if file.exists() else ""
        raise InputError(f"Output folder {folder} already holds {found}: choose another --out{hint}.")


def _write_config(folder: Path, config: Any, more: dict[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = {"config": to_json(config), **more, **started(), "versions": versions()}
        write_json(folder / "config.json", kept)
    except OSError as error:
        raise InputError(
            f"Output folder {folder} cannot be written ({error.strerror}): choose another."
        ) from error


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """While in this context, no other process trains in `folder`, and `process_of` tells of this one.

    The claim is a lock on an open file, which the system drops with the process, however that ends.

    Raises:
        InputError: if another process has it.
    """
    if not is_first():  # which writes for all
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
    """The process that has, or last had, a folder.

    Attributes:
        running: whether it is alive.
        name: in words, `process 12 on host`.
        state: what it last said: `running`, `finished`, `stopped` or `failed: why`. One that says it runs and does
            not was killed.
    """

    running: bool
    name: str
    state: str


def process_of(folder: Path) -> Process | None:
    """The last process that claimed `folder`; None if there is no trace of one."""
    try:
        with (folder / _PROCESS).open(encoding="utf-8") as file:
            alive = not _try_lock(file, fcntl.LOCK_SH)
            said = json.loads(file.read())
            return Process(alive, str(said["name"]), str(said["state"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lock(file: TextIO, folder: Path) -> None:
    for _ in range(10):  # someone who asks for the state has it for a moment
        if _try_lock(file, fcntl.LOCK_EX):
            return
        time.sleep(0.1)
    owner = process_of(folder)
    raise InputError(
        f"{folder} is in use by {owner.name if owner else 'another process'}: wait for its end, or stop it first."
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While in this context no other process is in this context of the same folder; leaves no file behind.

    Raises:
        InputError: if another process is.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        if not _try_lock(handle, fcntl.LOCK_EX):
            raise InputError(f"Another process is writing to {folder}: wait for its end, or stop it first.")
        yield
    finally:
        os.close(handle)


def _try_lock(file: TextIO | int, kind: int) -> bool:
    """False if another process has a lock that excludes this one."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


def _note(file: TextIO, state: str) -> None:
    """Writes down what this process is doing; a full disk is not worth ending it for."""
    with contextlib.suppress(OSError):
        file.seek(0)
        file.truncate()
        name = f"process {os.getpid()} on {socket.gethostname()}"
        file.write(json.dumps({"name": name, "state": state, "since": time.strftime("%Y-%m-%d %H:%M:%S")}))
        file.flush()


@contextlib.contextmanager
def writing(what: Path) -> Iterator[None]:
    """Turns a full disk, or a place that cannot be written to, into one sentence.

    Raises:
        InputError: for any OSError of its block.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{error.filename or what} could not be written ({error.strerror or error}): make room, or make the "
            "folder writable, and add --resume to the same command to go on."
        ) from error


class stop_on_signal:
    """While in this context, SIGTERM (as a scheduler sends before it takes the machine) only sets `requested`.

    So does Ctrl-C the first time; a second one interrupts at once. Outside the main thread, where Python lets no
    one handle signals, it changes nothing. Where several processes train as one, JAX listens for SIGTERM in all of
    them from the start, and Ctrl-C interrupts at once.

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
        """The signal for which to stop after `step`: asked after each, it tells all processes the same."""
        if multihost_utils.reached_preemption_sync_point(step):
            return signal.SIGTERM
        return self.requested

    def _request(self, number: int, _: object) -> None:
        if number == signal.SIGINT:
            if self.requested == signal.SIGINT:
                raise KeyboardInterrupt
            print("\nstopping with a checkpoint after this step; Ctrl-C again stops at once", file=sys.stderr)
        self.requested = signal.Signals(number)


def started() -> dict[str, str]:
    """The command line, and the folder that its relative paths start from."""
    return {"command": command(), "directory": os.getcwd()}


def command() -> str:
    """The command line, as a user would type it."""
    text = shlex.join(sys.argv[1:])
    return f"python -m train {os.fsencode(text).decode(errors='backslashreplace')}".strip()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    return {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in PACKAGES}


def write_json(file: Path, values: Any) -> None:
    """Writes JSON as a whole."""
    with written_whole(file) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to, which then takes its place: a reader never sees half a file."""
    partial = file.with_name(f"{file.name}{PARTIAL}")
    try:
        yield partial
        partial.replace(file)
    except BaseException:  # such as a full disk, on which the half would take room
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _holds_something(folder: Path) -> bool:
    """Anything but what a run killed at its very start leaves."""
    return any(path.suffix != PARTIAL for path in visible(folder))


def _check_same(file: Path, wanted: Any) -> None:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))["config"]
        # An option that is newer than the run had its default.
        kept = to_json(from_json(type(wanted), kept))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} cannot be read ({error}): it is not a run's configuration.") from error
    for name, (old, new) in _differences(kept, to_json(wanted)).items():
        raise InputError(f"{file} has {name} = {old}, this command {new}: resume with the same options.")


def _differences(old: Any, new: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = {**old, **new}
        parts = [_differences(old.get(key), new.get(key), f"{name}.{key}".lstrip(".")) for key in keys]
        return {key: pair for part in parts for key, pair in part.items()}
    return {} if old == new else {name: (old, new)}
