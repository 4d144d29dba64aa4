"""Training, validation and test cases of published experiments."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np

from train.data.splits import Splits

SEED = 12345  # of the follow-up paper


def partition(names: Sequence[str], ratios: Sequence[float], seed: int) -> list[list[str]]:
    """Random parts of these relative sizes, equal to those of MONAI's `partition_dataset(shuffle=True)`.

    Example:
        >>> partition(["a", "b", "c", "d"], (3, 1), seed=0)
        [['c', 'd', 'b'], ['a']]
    """
    order = list(range(len(names)))
    # MONAI draws with this legacy generator.
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
        test: (names, names that the data set holds out) -> names of the test cases, also if the data set lacks
            them; empty if there are none.
        ratios: relative numbers of training and validation cases among the others.
        seed: of the draw.
    """

    test: Callable[[Sequence[str], Sequence[str]], Sequence[str]]
    ratios: tuple[float, float]
    seed: int

    def splits(self, case_names: Sequence[str], held_out: Sequence[str]) -> Splits | None:
        """The split of a data set; None if the data set lacks the test cases."""
        names = sorted(case_names)
        test = set(self.test(names, held_out))
        train, val = partition([name for name in names if name not in test], self.ratios, self.seed)
        if not test or not test <= set(names) or not train:
            return None
        return Splits(*(tuple(sorted(part)) for part in (train, val, test)))


def _brats_test(names: Sequence[str], held_out: Sequence[str]) -> Sequence[str]:
    """The 200 cases of BraTS 2021 that the paper tested on."""
    return resources.files("train.data").joinpath("brats2021_test.txt").read_text(encoding="utf-8").split()


PROTOCOLS = {
    "paper-brats": Protocol(_brats_test, (19, 1), 0),
    "followup-brats": Protocol(_brats_test, (19, 1), SEED),
    "followup-acdc": Protocol(lambda _, held_out: held_out, (9, 1), SEED),
    "followup-amos": Protocol(lambda _, held_out: held_out, (9, 1), SEED),
    "followup-kits": Protocol(lambda names, _: partition(names, (0.8, 0.2), seed=42)[1], (9, 1), SEED),
}
