"""Who trained, validated and tested in published experiments, case by case."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np

from train.data.splits import Splits

SEED = 12345  # of the follow-up


def partition(names: Sequence[str], ratios: Sequence[float], seed: int) -> list[list[str]]:
    """Names in random parts of these relative sizes, the same as MONAI's `partition_dataset(shuffle=True)`.

    Example:
        >>> partition(["a", "b", "c", "d"], (3, 1), seed=0)
        [['c', 'd', 'b'], ['a']]
    """
    order = list(range(len(names)))
    # The frozen generator of old, since it is its very order that is wanted.
    np.random.RandomState(seed).shuffle(order)
    parts, start = [], 0
    for ratio in ratios:
        stop = min(start + int(ratio / sum(ratios) * len(names) + 0.5), len(names))
        parts.append([names[index] for index in order[start:stop]])
        start = stop
    return parts


@dataclass(frozen=True)
class Protocol:
    """A published split.

    Attributes:
        test: (names, names that the data set itself sets apart) -> the test cases; none where these are others.
        ratios: relative numbers of cases to train on and to validate with, among the others.
        seed: which of them.
    """

    test: Callable[[Sequence[str], Sequence[str]], Sequence[str]]
    ratios: tuple[float, float]
    seed: int

    def splits(self, case_names: Sequence[str], held_out: Sequence[str]) -> Splits | None:
        """The split of a data set, or None of one that lacks the test cases."""
        names = sorted(case_names)
        test = set(self.test(names, held_out))
        train, val = partition([name for name in names if name not in test], self.ratios, self.seed)
        if not test or not test <= set(names) or not train:
            return None
        return Splits(*(tuple(sorted(part)) for part in (train, val, test)))


def _brats_test(names: Sequence[str], held_out: Sequence[str]) -> Sequence[str]:
    """The 200 cases of BraTS 2021 that the paper tested on."""
    return resources.files("train.data").joinpath("brats2021_test.txt").read_text(encoding="utf-8").split()


def _own_test(names: Sequence[str], held_out: Sequence[str]) -> Sequence[str]:
    return held_out


def _fifth(names: Sequence[str], held_out: Sequence[str]) -> Sequence[str]:
    return partition(names, (0.8, 0.2), seed=42)[1]


PROTOCOLS = {
    "paper-brats": Protocol(_brats_test, (19, 1), 0),
    "followup-brats": Protocol(_brats_test, (19, 1), SEED),
    "followup-acdc": Protocol(_own_test, (9, 1), SEED),
    "followup-amos": Protocol(_own_test, (9, 1), SEED),
    "followup-kits": Protocol(_fifth, (9, 1), SEED),
}
