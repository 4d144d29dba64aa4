"""Warnings of a fit, as lines for the user of a command."""

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def warnings_as_notes(what: str) -> Iterator[None]:
    """A context whose `RuntimeWarning`s are printed when it ends, each as a note on `what`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, RuntimeWarning):
            print(f"note: {what}, {warning.message}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
