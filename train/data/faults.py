"""Faults of the files of a data set, collected before a run depends on them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from train.errors import InputError, describe

_SHOWN = 20


@dataclass(frozen=True)
class Fault:
    """One file that cannot be used.

    Attributes:
        case: name of the case.
        file: path of the file.
        problem: what was found and what to do, a sentence whose subject is the file.
    """

    case: str
    file: str
    problem: str

    @classmethod
    def of(cls, case: str, file: Path, error: Exception) -> "Fault":
        """The fault of a file that raised `error`."""
        sentence = describe(error)
        if sentence.startswith(f"{file} "):
            return cls(case, str(file), sentence.removeprefix(f"{file} "))
        return cls(case, str(file), f"cannot be read ({sentence.rstrip('.')}): mend or leave out this file.")


@contextmanager
def collected(faults: list[Fault], case: str, file: Path) -> Iterator[None]:
    """Turns an exception about a file into a fault, so that the next file is checked too."""
    try:
        yield
    except Exception as error:
        faults.append(Fault.of(case, file, error))


def refuse(faults: Sequence[Fault]) -> None:
    """Raises if there are faults.

    Raises:
        InputError: names up to 20 faults, the first one in full.
    """
    if not faults:
        return
    first, *others = faults
    if not others:
        raise InputError(f"{first.file} {first.problem}")
    found, _, remedy = first.problem.rpartition(": ")
    listed = "; ".join(f"{fault.file} {fault.problem.rpartition(': ')[0]}" for fault in others[: _SHOWN - 1])
    hidden = len(faults) - _SHOWN
    more = f"; and {hidden} more, which `python -m train check` lists" if hidden > 0 else ""
    raise InputError(
        f"{first.file} {found}, the first of {len(faults)} files with faults: {remedy} The others: {listed}{more}."
    )
