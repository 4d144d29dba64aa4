"""Exceptions with a message for the user."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any


class InputError(Exception):
    """Bad input: one sentence that names the file or option, what was found, and what to do.

    `python -m train` prints the sentence and exits with status 2. Files on disk are left as they are.
    """


class NotFinite(Exception):
    """Numbers in training are no longer finite: says from which step on, and the cases of that step's batch."""

    def __init__(self, where: str, cases: Sequence[str]):
        super().__init__(f"{where}, whose batch held {', '.join(cases)}")


class Stopped(Exception):
    """A signal asked a run to stop, and the run has saved a checkpoint.

    Attributes:
        exit_status: of the command: 128 plus the signal's number, as in a shell.
    """

    def __init__(self, message: str, exit_status: int):
        super().__init__(message)
        self.exit_status = exit_status


class CasesFailed(Exception):
    """Some cases failed and the others succeeded: a message, then one sentence for each failed case.

    `python -m train` prints it and exits with status 1.
    """

    def __init__(self, message: str, problems: Mapping[str, str]):
        super().__init__(
            "\n".join([message, *(f"  {case}: {problem}" for case, problem in problems.items())])
        )


def describe(error: Exception) -> str:
    """One line about an exception: the sentence of an InputError, or type and first line of another."""
    if isinstance(error, InputError):
        return str(error)
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def check_numbers(config: Any, **limits: tuple[float, float]) -> None:
    """Checks that all numbers in a configuration are finite and lie within their limits.

    Args:
        config: a dataclass; a field may be a number, a tuple of numbers, or anything else, which is not checked.
        limits: smallest and largest allowed value of a field.

    Raises:
        InputError: names the first field that fails.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        numbers = [n for n in (value if isinstance(value, tuple) else (value,)) if isinstance(n, int | float)]
        if not all(map(math.isfinite, numbers)):
            raise InputError(f"{field.name} is {value}: give finite numbers.")
        low, high = limits.get(field.name, (-math.inf, math.inf))
        if not all(low <= number <= high for number in numbers):
            wanted = f"{low} or more" if math.isinf(high) else f"a number from {low} to {high}"
            raise InputError(f"{field.name} is {value}: give {wanted}.")
