"""Who trains, who validates, who is kept for the test: drawn once, kept with the run."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from train.errors import InputError


@dataclass(frozen=True)
class Splits:
    """Names of cases; the three are disjoint."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]


def split_cases(case_names: Sequence[str], *, num_test: int, num_val: int, seed: int) -> Splits:
    """Draws test cases, then validation cases; the rest is for training.

    The draw depends on the set of names and the seed, not on the order in which the names are listed; the
    test cases do not depend on `num_val`.

    Raises:
        InputError: a count is negative, or nothing would be left to train on.

    >>> split_cases(["a", "b", "c"], num_test=1, num_val=1, seed=0)
    Splits(train=('b',), val=('a',), test=('c',))
    """
    for option, count in (("num_test", num_test), ("num_val", num_val)):
        if count < 0:
            raise InputError(f"{option} is {count}: give 0 or more cases.")
    if num_test + num_val >= len(case_names):
        raise InputError(
            f"num_test + num_val is {num_test} + {num_val}, but there are {len(case_names)} cases: "
            "leave at least one to train on."
        )
    shuffled = np.random.default_rng(seed).permutation(sorted(case_names)).tolist()
    test, val, train = np.split(np.array(shuffled, dtype=object), [num_test, num_test + num_val])
    return Splits(*(tuple(sorted(part)) for part in (train, val, test)))


def write_splits(path: Path, splits: Splits) -> None:
    """Writes the splits as JSON: `{"train": [...], "val": [...], "test": [...]}`."""
    path.write_text(json.dumps(asdict(splits), indent=1) + "\n")


def read_splits(path: Path) -> Splits:
    """Reads what `write_splits` wrote.

    Raises:
        InputError: no such file, or it does not hold disjoint lists of names under these three keys.
    """
    try:
        found = json.loads(path.read_text())
        splits = Splits(*(tuple(map(str, found[key])) for key in ("train", "val", "test")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path} could not be read as splits ({type(error).__name__}: {error}): "
            'it must be JSON with lists of case names under "train", "val" and "test".'
        ) from error
    names = splits.train + splits.val + splits.test
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{path} lists {twice[0]} more than once: each case belongs to one split.")
    return splits
