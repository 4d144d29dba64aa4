"""The exceptions that mean something to the user."""

from collections.abc import Sequence


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
