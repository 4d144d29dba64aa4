"""What a command keeps of each case, so that a second start goes on where the first one stopped.

What is kept of a case carries a key: the settings, and path, size and time of change of every file that it was made
from. It is used again only under the same key.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

CASES = "cases"
"""Folder of what is kept of each case, within the folder of a report."""
_FORMAT = 1
_LONGEST_ENDING = 40


@dataclasses.dataclass(frozen=True)
class Kept:
    """Where a command keeps what it has done.

    Attributes:
        folder: with a file for each case, perhaps in folders of models.
        settings: what results depend on beside the files; JSON.
        files: from the words that name a case, `(model, case)` or `(case,)`, to the files that it is made from.
    """

    folder: Path
    settings: list[Any]
    files: Callable[..., Iterable[Path]]

    def path(self, *case: str) -> Path:
        """The file of a case."""
        return self.folder.joinpath(*map(safe_name, case[:-1]), f"{safe_name(case[-1])}.npz")

    def key(self, *case: str) -> str:
        """What a case is made from."""
        return json.dumps([*self.settings, *case, versions_of(self.files(*case))], sort_keys=True)


def save_arrays(path: Path, key: str, arrays: Mapping[str, Any]) -> None:
    """Writes arrays and the key of a case, whole or not at all."""
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, format=np.array(_FORMAT), key=np.array(key), **arrays)


def load_arrays(path: Path, key: str) -> dict[str, Any] | None:
    """Reads what `save_arrays` wrote; None if the file is absent or broken, or was made from something else."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            if int(file["format"]) != _FORMAT or str(file["key"]) != key:
                return None
            return {name: file[name] for name in file.files if name not in ("format", "key")}
    except Exception:  # whatever a broken file raises
        return None


def versions_of(files: Iterable[Path]) -> list[list[Any]]:
    """Path, size and time of change of files; a file that is missing has only its path."""
    entries = []
    for file in files:
        try:
            info = file.stat()
            entries.append([os.fspath(file), info.st_size, info.st_mtime_ns])
        except OSError:
            entries.append([os.fspath(file)])
    return entries


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden name beside a file, with its ending, that gets the file's own name when the context ends well.

    What a killed process left under the hidden name is overwritten by the next one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{_digest(path.name)}{''.join(path.suffixes[-2:])[-_LONGEST_ENDING:]}")
    partial.unlink(missing_ok=True)  # a link would lead elsewhere
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def safe_name(name: str) -> str:
    """A file name without separators, unlike that of any other name.

    Example:
        >>> safe_name("../A b")
        'A-b-da87ebe7'
    """
    plain = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")[:60]
    return plain if plain == name and plain else f"{plain}-{_digest(name)}".lstrip("-")


def _digest(name: str) -> str:
    return hashlib.sha1(name.encode("utf-8", "surrogateescape"), usedforsecurity=False).hexdigest()[:8]
