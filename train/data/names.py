"""Names of cases from the paths of their images, for lists without names."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from train.data.volume_files import stem

_SEPARATOR = re.compile(r"([-_. ]+)")
CHANNEL = re.compile(r"_\d{4}$")  # the end of a file's stem in nnU-Net


def name_cases(cases: Sequence[Sequence[PurePath]]) -> list[str]:
    """Names each case by the last part of its path that differs between all cases.

    Several images of a case are named by the beginning that they share: `CASE` for `CASE_t1.nii.gz` and
    `CASE_t2.nii.gz`. If no single part differs between all cases, several parts are joined. The names do not
    depend on the order of the cases. Two cases share a name only if their paths are equal, or equal after
    joining.

    >>> name_cases([[Path("a/t1.nii.gz")], [Path("b/t1.nii.gz")]])
    ['a', 'b']
    """
    parts = [_parts(images) for images in cases]
    number = len(set(parts))
    names = [part[-1] for part in parts]
    return next((found for found in _candidates(parts) if all(found) and len(set(found)) == number), names)


def known_name(images: Sequence[PurePath], name: str, known: frozenset[str]) -> str:
    """`name` if it is known, else the last known name in the paths of the case, else `name`."""
    *folders, last = _parts(images)
    first = stem(Path(images[0]))
    guesses = (name, last, first, CHANNEL.sub("", first), *reversed(folders))
    return next((guess for guess in guesses if guess in known), name)


def _parts(images: Sequence[PurePath]) -> tuple[str, ...]:
    """The folders of the first image, then the beginning that the names of all images share."""
    first = images[0]
    tokens = [_SEPARATOR.split(stem(Path(image))) for image in images]
    number = next(
        (i for i, column in enumerate(zip(*tokens, strict=False)) if len(set(column)) > 1),
        min(map(len, tokens)),
    )
    whole = stem(Path(first))
    shared = "".join(tokens[0][:number]).rstrip("-_. ") if number < len(tokens[0]) else whole
    folders = (part for part in first.parts[:-1] if part != first.anchor)
    return (*folders, shared or whole)


def _candidates(parts: Sequence[tuple[str, ...]]) -> Iterator[list[str]]:
    depth = max(map(len, parts), default=0)
    for level in range(1, depth + 1):
        if all(len(part) >= level for part in parts):
            yield [part[-level] for part in parts]
    for level in range(2, depth + 1):
        varying = [
            i for i in range(level, 0, -1) if len({part[-i : len(part) - i + 1] for part in parts}) > 1
        ]
        for levels in (varying, [*varying, 1]):  # a path without these folders is told by its file
            yield ["_".join(part[-i] for i in dict.fromkeys(levels) if i <= len(part)) for part in parts]
