"""Training, validation and test cases: drawn or read from a file once, then kept with the run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from train.data.names import known_name, name_cases
from train.errors import InputError
from train.files import parsing, read_json

_FORM = (
    'a list of splits: give JSON with lists of case names under "train", "val" and "test", or with folds as in '
    "nnU-Net's splits_final.json"
)


@dataclass(frozen=True)
class Splits:
    """Names of cases; the three are disjoint."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]


def split_cases(subject_of: Mapping[str, str], *, num_test: float, num_val: float, seed: int) -> Splits:
    """Draws test cases, then validation cases. The remaining cases are for training.

    The draw depends on the set of names and the seed, not on the order of the names. The test cases do not depend
    on `num_val`.

    Args:
        subject_of: subject of each case, by the case's name. Cases of one subject stay together, so a split may
            hold a few cases more than its number.
        num_test: number of cases, or below 1 a share, as in 0.2.
        num_val: number or share, likewise.
        seed: of the draw.

    Raises:
        InputError: a number is negative or not whole, or no case is left to train on.

    >>> split_cases({"a": "a", "b": "b", "c": "c"}, num_test=1, num_val=1, seed=0)
    Splits(train=('b',), val=('a',), test=('c',))
    """
    cases_of: dict[str, list[str]] = {}
    for name, subject in sorted(subject_of.items()):
        cases_of.setdefault(subject, []).append(name)
    left = np.random.default_rng(seed).permutation(sorted(cases_of)).tolist()
    parts: list[list[str]] = []
    for option, number in (("num_test", num_test), ("num_val", num_val)):
        if not number >= 0 or (number >= 1 and number != int(number)):
            raise InputError(f"{option} is {number}: give 0 or more cases, or a share of them below 1.")
        wanted = number if number >= 1 else round(number * len(subject_of))
        part: list[str] = []
        while left and len(part) < wanted:
            part += cases_of[left.pop(0)]
        parts.append(part)
    if not left:
        raise InputError(
            f"num_test + num_val is {num_test} + {num_val}, but there are {len(subject_of)} cases: "
            "leave at least one to train on."
        )
    test, val = parts
    train = [name for subject in left for name in cases_of[subject]]
    return Splits(*(tuple(sorted(part)) for part in (train, val, test)))


def chosen_splits(
    path: Path, subject_of: Mapping[str, str], *, fold: int | None, num_val: float, seed: int
) -> Splits:
    """Reads splits from a file and checks them against the data set.

    Three kinds of file are known:

    - `splits.json`, written by `write_splits`;
    - nnU-Net's `splits_final.json`, a list of folds, each with "train" and "val";
    - a datalist of MONAI whose entries under "training" have a "fold", or which has cases under "validation" or
      "test". The names in the paths of its images identify a case.

    With folds, the held-out cases of `fold` are the test cases, since a fold is judged by them. Validation cases
    are drawn from the others, as in `split_cases`.

    Args:
        path: the file.
        subject_of: subject of each case of the data set, by the case's name.
        fold: index from 0, for a file with folds.
        num_val: number or share of validation cases among the training cases of the fold.
        seed: of the draw.

    Raises:
        InputError: the file cannot be read, has no such fold, names a case twice or an unknown case, or leaves no
            case to train on.
    """
    with parsing(path, _FORM):
        found = _by_section(read_json(path), list(subject_of))
        is_folds = isinstance(found, list)
        folds = [Splits(_names(held["train"]), (), _names(held["val"])) for held in found] if is_folds else []
    if not is_folds:
        if fold is not None:
            raise InputError(f"{path} holds no folds, but fold is {fold}: leave --fold out.")
        splits = _as_splits(path, found)
    elif fold is None or not 0 <= fold < len(folds):
        raise InputError(
            f"{path} holds {len(folds)} folds, fold is {fold}: give --fold 0 to {len(folds) - 1}."
        )
    else:
        splits = _disjoint(path, folds[fold])
    unknown = sorted({*splits.train, *splits.val, *splits.test} - subject_of.keys())
    if unknown:
        first, *others = subject_of
        raise InputError(
            f"{path} names {unknown[0]}, the first of {len(unknown)} that are no cases of the data, which has "
            f"{first} and {len(others)} others: correct the list or --data."
        )
    if is_folds:
        others = {name: subject_of[name] for name in splits.train}
        drawn = split_cases(others, num_test=0, num_val=num_val, seed=seed)
        splits = Splits(drawn.train, drawn.val, tuple(sorted(splits.test)))
    if not splits.train:
        raise InputError(f"{path} leaves no case to train on.")
    return splits


def write_splits(path: Path, splits: Splits) -> None:
    """Writes the splits as JSON: `{"train": [...], "val": [...], "test": [...]}`."""
    path.write_text(json.dumps(asdict(splits), indent=1) + "\n", encoding="utf-8")


def read_splits(path: Path) -> Splits:
    """Reads what `write_splits` wrote.

    Raises:
        InputError: there is no such file, or it lacks disjoint lists of names under these three keys.
    """
    with parsing(path, _FORM):
        found = read_json(path)
    return _as_splits(path, found)


def _as_splits(path: Path, found: Any) -> Splits:
    with parsing(path, _FORM):
        return _disjoint(path, Splits(*(_names(found[key]) for key in ("train", "val", "test"))))


def _by_section(found: Any, case_names: Sequence[str]) -> Any:
    """A datalist of MONAI as folds or, without folds, as splits. Other content is returned as it is."""
    if not (isinstance(found, dict) and "training" in found):
        return found
    sections = {"training": found["training"]}
    for key in ("validation", "test", "testing"):
        listed = found.get(key)
        # A list may name images without labels.
        sections[key] = [
            entry
            for entry in (listed if isinstance(listed, list) else [])
            if not isinstance(entry, str) and "label" in entry
        ]
    entries = [entry for section in sections.values() for entry in section]
    images = [_image_paths(entry["image"]) for entry in entries]
    known = frozenset(case_names)
    names = iter(
        known_name(paths, name, known) for paths, name in zip(images, name_cases(images), strict=True)
    )
    train, val, *test = ([next(names) for _ in section] for section in sections.values())
    if (val or any(test)) and not any("fold" in entry for entry in entries):
        return {"train": train, "val": val, "test": [name for section in test for name in section]}
    folds = [int(entry["fold"]) for entry in sections["training"]]
    pairs = list(zip(train, folds, strict=True))
    return [
        {
            "train": [name for name, held in pairs if held != fold],
            "val": [name for name, held in pairs if held == fold],
        }
        for fold in range(max(folds, default=-1) + 1)
    ]


def _image_paths(image: Any) -> tuple[PurePath, ...]:
    """Paths of a case's images, also as Windows writes them."""
    listed: list[Any] = image if isinstance(image, list) and image else [image]
    return tuple(PurePath(path.replace("\\", "/") if isinstance(path, str) else path) for path in listed)


def _names(listed: Any) -> tuple[str, ...]:
    if not isinstance(listed, list):
        raise TypeError(f"a {type(listed).__name__} in place of a list of names")
    return tuple(map(str, listed))


def _disjoint(path: Path, splits: Splits) -> Splits:
    names = splits.train + splits.val + splits.test
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{path} lists {twice[0]} more than once: each case belongs to one split.")
    return splits
