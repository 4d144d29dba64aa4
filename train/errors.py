"""The exceptions that mean something to the user."""

from collections.abc import Mapping, Sequence


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
