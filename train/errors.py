"""The one exception that means: the user can mend this."""


class InputError(Exception):
    """Bad input: one sentence that names the file or option, says what was found and what to do.

    `python -m train` prints the sentence and exits with status 2; nothing already on disk is touched.
    """


class Stopped(Exception):
    """A run was asked to stop, and has saved what it needs to go on."""
