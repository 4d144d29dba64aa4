"""The exceptions that mean something to the user."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any


class InputError(Exception):
    """Bad input: one sentence that names the file or option, says what was found and what to do.

    `python -m train` prints the sentence and exits with status 2; nothing already on disk is touched.
    """


class NotFinite(Exception):
    """Training came to numbers that are not finite; says where, with the cases of that step's batch."""

    def __init__(self, where: str, cases: Sequence[str]):
        super().__init__(f"{where}, whose batch held {', '.join(cases)}")


class Stopped(Exception):
    """A run was asked to stop, and has saved what it needs to go on.

    Attributes:
        exit_status: of the command, as a shell has it for the signal that asked.
    """

    def __init__(self, message: str, exit_status: int):
        super().__init__(message)
        self.exit_status = exit_status


class CasesFailed(Exception):
    """Some cases failed and the others went through: a message, then each case with one sentence.

    `python -m train` prints it and exits with status 1.
    """

    def __init__(self, message: str, problems: Mapping[str, str]):
        super().__init__(
            "\n".join([message, *(f"  {case}: {problem}" for case, problem in problems.items())])
        )


def describe(error: Exception) -> str:
    """What went wrong, in one line: the sentence of an InputError, or kind and first line of another exception."""
    if isinstance(error, InputError):
        return str(error)
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def check_numbers(config: Any, **limits: tuple[float, float]) -> None:
    """Checks the numbers in a configuration: all are finite, and those named lie within their limits.

    Args:
        config: a dataclass; a field may be a number, a tuple of them, or None.
        limits: smallest and largest value of a field, both allowed.

    Raises:
        InputError: for the first that does not.
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
