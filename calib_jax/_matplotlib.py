"""Import of matplotlib despite a broken configuration, and the style of figures that are written to files."""

import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

_SETTINGS = ("MPLBACKEND", "MATPLOTLIBRC", "MPLCONFIGDIR")


def _import() -> Any:
    """Imports matplotlib, without the user's configuration if that makes the import fail.

    The import fails if MPLBACKEND names no backend, or if a `matplotlibrc` cannot be read.
    """
    try:
        import matplotlib

        return matplotlib
    except ImportError:
        raise
    except Exception:
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            del sys.modules[name]  # partly imported
    kept = {name: os.environ.pop(name) for name in _SETTINGS if name in os.environ}
    try:
        with tempfile.TemporaryDirectory() as empty, contextlib.chdir(empty):  # away from a ./matplotlibrc
            os.environ["MPLCONFIGDIR"] = empty
            import matplotlib

            return matplotlib
    finally:
        os.environ.pop("MPLCONFIGDIR", None)
        os.environ.update(kept)


matplotlib = _import()


@contextlib.contextmanager
def figure_style(settings: Mapping[str, Any]) -> Iterator[None]:
    """A context for drawing and saving figures: matplotlib's defaults and `settings`, not the user's parameters.

    The context suppresses warnings of matplotlib, such as those about characters that its font lacks.
    """
    defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    backend = matplotlib.rcParams._get("backend")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with matplotlib.rc_context(defaults | dict(settings)):
            # A box plot reads all parameters, and reading an undecided backend would choose one and import pyplot.
            matplotlib.rcParams._set("backend", "agg")
            try:
                yield
            finally:
                matplotlib.rcParams._set("backend", backend)
