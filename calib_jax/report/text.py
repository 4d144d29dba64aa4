"""The table as text for a terminal."""

import textwrap
from collections.abc import Sequence

from calib_jax.report import wording
from calib_jax.report.details import Details
from calib_jax.report.table import ModelRow
from calib_jax.results import HIGHER_IS_BETTER, METRICS

_WIDTH = 120
_NAME_WIDTH = 24
_CELL_WIDTH = 20


def format_table(rows: Sequence[ModelRow], *, per_class: bool = False) -> str:
    """The rows as aligned plain text for a terminal, at most 120 columns wide.

    Args:
        rows: return value of `compare_models`.
        per_class: whether to add a line for each class below each model.

    Returns:
        Lines joined by newlines. Each model has a line with the means and their confidence intervals. Further
        lines show the spread over repeats, if there are any, and the relative changes from the baseline with the
        p-values of the paired tests.
    """
    classes = list(rows[0].metrics[METRICS[0]].per_class) if per_class else []
    names = ["model", *(row.name for row in rows), *(f"  {name}" for name in classes)]
    width = min(max(map(len, names)), _NAME_WIDTH)
    arrows = [f"{name} {'↑' if name in HIGHER_IS_BETTER else '↓'}" for name in METRICS]
    lines = [_line(width, "model", "cases", arrows)]
    lines.append("─" * (width + 7 + (2 + _CELL_WIDTH) * len(METRICS)))
    for row in rows:
        lines += _model_lines(row, width, classes)
    notes = [line for note in wording.footnote(rows) for line in textwrap.wrap(note, _WIDTH)]
    return "\n".join([*lines, "", *notes])


def _model_lines(row: ModelRow, width: int, classes: Sequence[str]) -> list[str]:
    summaries = [row.metrics[name] for name in METRICS]
    values = [f"{wording.number(s.mean)} {wording.interval(s.low, s.high)}" for s in summaries]
    lines = [_line(width, row.name, str(max(s.cases for s in summaries)), values)]
    if any(s.per_repeat for s in summaries):
        lines.append(_line(width, "", "", [wording.spread(s) for s in summaries]))
    if any(s.change for s in summaries):
        lines.append(_line(width, "", "", [wording.change(s.change) if s.change else "" for s in summaries]))
    for name in classes:
        lines.append(_line(width, f"  {name}", "", [wording.number(s.per_class[name]) for s in summaries]))
    return lines


def _line(width: int, name: str, cases: str, cells: Sequence[str]) -> str:
    shown = name if len(name) <= width else name[: width - 1] + "…"
    return "  ".join([f"{shown:<{width}}", f"{cases:>5}", *(f"{c:<{_CELL_WIDTH}}" for c in cells)]).rstrip()


def format_summary(details: Details) -> str:
    """The findings in plain words, of each model under its name if there are several."""
    named = len(details.summary) > 1
    return "\n".join(
        "\n".join(["", *([f"{model}:"] if named else []), *sentences])
        for model, sentences in details.summary.items()
    )
