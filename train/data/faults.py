"""What is wrong with the files of a data set, collected before anything is read from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train.errors import InputError, describe

_SHOWN = 20


@dataclass(frozen=True)
class Fault:
    """One file that cannot be used.

    Attributes:
        case: its name.
        file: path of the file.
        problem: what was found and what to do, as a sentence whose subject is the file.
    """

    case: str
    file: str
    problem: str

    @classmethod
    def of(cls, case: str, files: Sequence[Path], error: Exception) -> "Fault":
        """The fault of the file that the error's sentence begins with; of the first of `files` if it names none."""
        sentence = describe(error)
        named = [str(file) for file in files if sentence.startswith(f"{file} ")]
        if not named:
            return cls(
                case, str(files[0]), f"cannot be read ({sentence.rstrip('.')}): mend or leave out this file."
            )
        return cls(case, named[0], sentence.removeprefix(f"{named[0]} "))


def refuse(faults: Sequence[Fault]) -> None:
    """Does nothing without faults.

    Raises:
        InputError: the first fault in full, then the others, up to 20 of them.
    """
    if not faults:
        return
    first, *others = faults
    if not others:
        raise InputError(f"{first.file} {first.problem}")
    found, _, remedy = first.problem.rpartition(": ")
    listed = "; ".join(f"{fault.file} {_found(fault)}" for fault in others[: _SHOWN - 1])
    hidden = len(faults) - _SHOWN
    more = f"; and {hidden} more, which `python -m train check` lists" if hidden > 0 else ""
    raise InputError(
        f"{first.file} {found}, the first of {len(faults)} files with faults: {remedy} The others: {listed}{more}."
    )


def _found(fault: Fault) -> str:
    return fault.problem.rpartition(": ")[0]
