"""Finds files and reads JSON written on any system."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from train.errors import InputError


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """Matches in a folder, sorted, without hidden names such as the `._NAME` that macOS leaves in archives."""
    return sorted(
        path
        for path in folder.glob(pattern)
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def read_json(file: Path) -> Any:
    """Reads JSON in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no JSON, or has another encoding.
        InputError: an object in the file gives two values to one key.
    """

    def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found and found[key] != value:
                raise InputError(
                    f"{file} gives {key!r} twice, as {found[key]} and as {value}: keep one of the two."
                )
            found[key] = value
        return found

    try:
        return json.loads(file.read_bytes(), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise ValueError(f"its text is no UTF-8 from byte {error.start} on, save it as UTF-8") from error


def make_folder(folder: Path, what: str) -> None:
    """Makes a folder, unless it exists, and the folders that it lies in.

    Raises:
        InputError: it cannot be made; `what` names it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{what} {folder} cannot be made ({error.strerror}): choose another.") from error


@contextlib.contextmanager
def parsing(file: Path, what: str) -> Iterator[None]:
    """A context that turns whatever the content of a file raises into one sentence.

    Args:
        file: that is read in the context.
        what: the file must be, such as "a list of names"; may go on with ": " and what to do.

    Raises:
        InputError: for any exception of a file that cannot be read, or holds something else.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        is_not, _, remedy = what.partition(": ")
        raise InputError(
            f"{file} is not {is_not} ({type(error).__name__}: {error}): {remedy or 'mend or restore it'}."
        ) from error
