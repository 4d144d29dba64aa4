"""Who trains, who validates, who is kept for the test: drawn or read once, kept with the run."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from train.errors import InputError


@dataclass(frozen=True)
class Splits:
    """Names of cases; the three are disjoint."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]


def split_cases(
    case_names: Sequence[str],
    *,
    num_test: float,
    num_val: float,
    seed: int,
    subjects: Sequence[str] | None = None,
) -> Splits:
    """Draws test cases, then validation cases; the rest is for training.

    The draw depends on the set of names and the seed, not on the order in which the names are listed; the
    test cases do not depend on `num_val`.

    Args:
        case_names: unique.
        num_test: cases, or below 1 their share, as in 0.2.
        num_val: likewise.
        seed: which cases.
        subjects: whose each case is, where somebody has several: these stay together, so that a split may hold a
            few cases more than asked for.

    Raises:
        InputError: a count is negative or broken, or nothing would be left to train on.

    >>> split_cases(["a", "b", "c"], num_test=1, num_val=1, seed=0)
    Splits(train=('b',), val=('a',), test=('c',))
    """
    wanted = {
        option: _count(option, number, len(case_names))
        for option, number in (("num_test", num_test), ("num_val", num_val))
    }
    pairs = sorted(zip(subjects or case_names, case_names, strict=True))
    cases_of = {who: [name for _, name in cases] for who, cases in groupby(pairs, lambda pair: pair[0])}
    left = np.random.default_rng(seed).permutation(sorted(cases_of)).tolist()
    parts: dict[str, list[str]] = {}
    for option, number in wanted.items():
        part = parts.setdefault(option, [])
        while left and len(part) < number:
            part += cases_of[left.pop(0)]
    if not left:
        raise InputError(
            f"num_test + num_val is {num_test} + {num_val}, but there are {len(case_names)} cases: "
            "leave at least one to train on."
        )
    train = [name for who in left for name in cases_of[who]]
    return Splits(*(tuple(sorted(part)) for part in (train, parts["num_val"], parts["num_test"])))


def chosen_splits(
    path: Path,
    case_names: Sequence[str],
    *,
    fold: int | None,
    num_val: float,
    seed: int,
    subjects: Sequence[str] | None = None,
) -> Splits:
    """The splits that a file names, checked against the data set.

    Three kinds of file are read:

    - what `write_splits` writes;
    - nnU-Net's `splits_final.json`, a list of folds, each with "train" and "val";
    - a datalist of MONAI, in which each entry under "training" has its "fold".

    In the latter two the cases that `fold` holds back are the test cases, since it is by them that a fold is
    judged; validation cases are drawn from the others, as in `split_cases`.

    Args:
        path: the file.
        case_names: of the data set.
        fold: which one, counted from 0, where the file has several.
        num_val: validation cases, or their share, of those that the fold trains on.
        seed: which of them.
        subjects: as in `split_cases`.

    Raises:
        InputError: the file cannot be read, has no such fold, names a case twice or one that there is not, or
            leaves nothing to train on.
    """
    found = _read_json(path)
    folds = _folds(path, found)
    if folds is None:
        if fold is not None:
            raise InputError(f"{path} holds no folds, but fold is {fold}: leave --fold out.")
        splits = _as_splits(path, found)
        _check_known(path, splits, case_names)
    else:
        if fold is None or not 0 <= fold < len(folds):
            raise InputError(
                f"{path} holds {len(folds)} folds, fold is {fold}: give --fold 0 to {len(folds) - 1}."
            )
        rest, test = folds[fold]
        _check_known(path, _disjoint(path, Splits(rest, (), test)), case_names)
        owner = dict(zip(case_names, subjects or case_names, strict=True))
        drawn = split_cases(
            rest, num_test=0, num_val=num_val, seed=seed, subjects=[owner[name] for name in rest]
        )
        splits = Splits(drawn.train, drawn.val, tuple(sorted(test)))
    if not splits.train:
        raise InputError(f"{path} leaves no case to train on.")
    return splits


def write_splits(path: Path, splits: Splits) -> None:
    """Writes the splits as JSON: `{"train": [...], "val": [...], "test": [...]}`."""
    path.write_text(json.dumps(asdict(splits), indent=1) + "\n", encoding="utf-8")


def read_splits(path: Path) -> Splits:
    """Reads what `write_splits` wrote.

    Raises:
        InputError: no such file, or it does not hold disjoint lists of names under these three keys.
    """
    return _as_splits(path, _read_json(path))


def _count(option: str, number: float, cases: int) -> int:
    if not number >= 0 or (number >= 1 and number != int(number)):
        raise InputError(f"{option} is {number}: give 0 or more cases, or a share of them below 1.")
    return int(number) if number >= 1 else round(number * cases)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _as_splits(path: Path, found: Any) -> Splits:
    try:
        return _disjoint(path, Splits(*(_names(found[key]) for key in ("train", "val", "test"))))
    except (TypeError, KeyError) as error:
        raise _unreadable(path, error) from error


def _folds(path: Path, found: Any) -> list[tuple[tuple[str, ...], tuple[str, ...]]] | None:
    """What each fold trains on and what it holds back; None if the file is of the kind without folds."""
    try:
        if isinstance(found, list):
            return [(_names(fold["train"]), _names(fold["val"])) for fold in found]
        if not (isinstance(found, dict) and "training" in found):
            return None
        fold_of = {_case_of(entry["image"]): int(entry["fold"]) for entry in found["training"]}
    except (TypeError, KeyError, ValueError) as error:
        raise _unreadable(path, error) from error
    return [
        (
            tuple(name for name, held in fold_of.items() if held != fold),
            tuple(name for name, held in fold_of.items() if held == fold),
        )
        for fold in range(max(fold_of.values(), default=-1) + 1)
    ]


def _names(listed: Any) -> tuple[str, ...]:
    if not isinstance(listed, list):
        raise TypeError(f"a {type(listed).__name__} in place of a list of names")
    return tuple(map(str, listed))


def _case_of(image: Any) -> str:
    """The case's name in the path of its (first) image."""
    file = Path(image[0] if isinstance(image, list) else image)
    return file.name.removesuffix(".gz").removesuffix(".nii")


def _disjoint(path: Path, splits: Splits) -> Splits:
    names = splits.train + splits.val + splits.test
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{path} lists {twice[0]} more than once: each case belongs to one split.")
    return splits


def _check_known(path: Path, splits: Splits, case_names: Sequence[str]) -> None:
    unknown = sorted({*splits.train, *splits.val, *splits.test} - set(case_names))
    if unknown:
        raise InputError(
            f"{path} names {unknown[0]}, the first of {len(unknown)} that are no cases of the data, which has "
            f"{case_names[0]} and {len(case_names) - 1} others: correct the list or --data."
        )


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} could not be read as splits ({type(error).__name__}: {error}): "
        'it must be JSON with lists of case names under "train", "val" and "test", or with folds as in '
        "nnU-Net's splits_final.json."
    )
