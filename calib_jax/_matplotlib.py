"""Matplotlib whatever the user's configuration of it, and the style of figures that are written to files."""

import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

_SETTINGS = ("MPLBACKEND", "MATPLOTLIBRC", "MPLCONFIGDIR")


def _import() -> Any:
    """Imports matplotlib, if need be as if the user had not configured it.

    The import fails if MPLBACKEND names no backend, or if a `matplotlibrc` cannot be read.
    """
    try:
        import matplotlib

        return matplotlib
    except ImportError:
        raise
    except Exception:
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            del sys.modules[name]  # half imported
    kept = {name: os.environ.pop(name) for name in _SETTINGS if name in os.environ}
    try:
        with tempfile.TemporaryDirectory() as empty, contextlib.chdir(empty):  # there may be a ./matplotlibrc
            os.environ["MPLCONFIGDIR"] = empty
            import matplotlib

            return matplotlib
    finally:
        os.environ.pop("MPLCONFIGDIR", None)
        os.environ.update(kept)


matplotlib = _import()


@contextlib.contextmanager
def figure_style(settings: Mapping[str, Any]) -> Iterator[None]:
    """A context to draw and save figures in: `settings` on top of matplotlib's defaults, the user's own left out.

    Warnings of matplotlib, about a character that its font lacks for one, do not leave it.
    """
    defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    backend = matplotlib.rcParams._get("backend")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with matplotlib.rc_context(defaults | dict(settings)):
            # A box plot reads all parameters, and reading an undecided backend decides it and imports pyplot.
            matplotlib.rcParams._set("backend", "agg")
            try:
                yield
            finally:
                matplotlib.rcParams._set("backend", backend)
