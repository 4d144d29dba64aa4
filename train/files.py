"""Looks for files and reads JSON, whatever system wrote them."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from train.errors import InputError


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """What matches in a folder, sorted, without hidden names such as the `._NAME` that macOS leaves in archives."""
    return sorted(
        path
        for path in folder.glob(pattern)
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def read_json(file: Path) -> Any:
    """Reads JSON in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON, or in another encoding.
        InputError: an object of it gives a key two values.
    """
    try:
        return json.loads(file.read_bytes(), object_pairs_hook=partial(_unique_keys, file))
    except UnicodeDecodeError as error:
        raise ValueError(f"its text is no UTF-8 from byte {error.start} on, save it as UTF-8") from error


def _unique_keys(file: Path, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the file; a key that it gives two values would lose one of them."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise InputError(
                f"{file} gives {key!r} twice, as {found[key]} and as {value}: keep one of the two."
            )
        found[key] = value
    return found
