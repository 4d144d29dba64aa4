"""The folder of a run: what is in it, and who may write to it."""

import json
import signal
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from train.config import from_json, to_json
from train.errors import InputError

PACKAGES = ("calib_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def default_folder(name: str) -> Path:
    """A new folder under `runs/`, named after what is run and when."""
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def open_run(folder: Path, config: Any, *, resume: bool, **more: Any) -> None:
    """Claims `folder` for a run of `config`, new or to be resumed; `more` is kept beside the configuration.

    Raises:
        InputError: if the folder holds something and `resume` is False, or holds a run of another
            configuration, or cannot be written to.
    """
    file = folder / "config.json"
    if resume and file.exists():
        _check_same(file, config)
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        found = "another run" if file.exists() else "something else"
        hint = " or add --resume to go on with it" if file.exists() else ""
        raise InputError(f"Output folder {folder} already holds {found}: choose another --out{hint}.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = {"config": to_json(config), **more, "command": command(), "versions": versions()}
        write_json(file, kept)
    except OSError as error:
        raise InputError(
            f"Output folder {folder} cannot be written ({error.strerror}): choose another."
        ) from error


class stop_on_sigterm:
    """While in this context, SIGTERM (as a scheduler sends before it takes the machine) only sets `requested`.

    Outside the main thread, where Python lets no one handle signals, it changes nothing.
    """

    requested = False

    def __enter__(self) -> "stop_on_sigterm":
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._before)

    def _request(self, *_: object) -> None:
        self.requested = True


def command() -> str:
    """The command line, as a user would type it."""
    return " ".join(["python -m train", *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    return {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in PACKAGES}


def write_json(file: Path, values: Any) -> None:
    """Writes JSON beside its final name first, so that a reader never sees half a file."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    partial.replace(file)


def _check_same(file: Path, config: Any) -> None:
    try:
        # By way of the configuration, so that a run older than an option has that option's default.
        kept = to_json(from_json(type(config), json.loads(file.read_text())["config"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} cannot be read ({error}): it is not a run's configuration.") from error
    for name, (old, new) in _differences(kept, to_json(config)).items():
        raise InputError(f"{file} has {name} = {old}, this command {new}: resume with the same options.")


def _differences(old: Any, new: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = {**old, **new}
        parts = [_differences(old.get(key), new.get(key), f"{name}.{key}".lstrip(".")) for key in keys]
        return {key: pair for part in parts for key, pair in part.items()}
    return {} if old == new else {name: (old, new)}
