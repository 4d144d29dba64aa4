"""Writes `docs/api.md` from the docstrings: `python docs/make_api.py`. A test holds the two together."""

import inspect
import textwrap
from pathlib import Path

import calib_jax

PAGE = Path(__file__).parent / "api.md"
SECTIONS = {
    "Losses": "losses",
    "Other losses of the field": "alternatives",
    "From voxels to bins": "binning",
    "Calibration errors": "errors",
    "Other metrics": "metrics",
    "Whole data sets": "accumulators",
    "Reliability": "reliability",
    "Intervals": "bootstrap",
    "Post-hoc scaling": "scaling",
}


def page() -> str:
    """The page: one section for each module, one entry for each public name."""
    parts = [
        "# API of calib_jax",
        "",
        "Made from the docstrings by `docs/make_api.py`. Arrays are batch first and channel last.",
    ]
    for title, module in SECTIONS.items():
        names = [name for name in calib_jax.__all__ if _module(name) == f"calib_jax.{module}"]
        parts += ["", f"## {title}", *(line for name in names for line in _entry(name))]
    return "\n".join(parts) + "\n"


def _module(name: str) -> str:
    return getattr(calib_jax, name).__module__


def _entry(name: str) -> list[str]:
    thing = getattr(calib_jax, name)
    doc = inspect.getdoc(thing) or ""
    return ["", f"### `{name}`", "", "```text", f"{name}{_arguments(thing)}", "", textwrap.dedent(doc), "```"]


def _arguments(thing: object) -> str:
    """Argument names and defaults; shapes are in the text."""
    if inspect.isclass(thing):
        return ""
    parameters = inspect.signature(thing).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(bare))


if __name__ == "__main__":
    PAGE.write_text(page())
