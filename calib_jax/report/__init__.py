"""A report for people: models compared in a table with intervals and tests, and as figures on one HTML page.

Needs the extra `report`: `pip install 'calib_jax[report]'`. The same page can be made again from its folder
with `python -m calib_jax.report FOLDER`.
"""

from calib_jax.report.page import write_report
from calib_jax.report.results import METRICS, ModelResult, RepeatedResult, Result
from calib_jax.report.table import Change, ModelRow, Summary, compare_models, to_json, write_csv
from calib_jax.report.text import format_table
from calib_jax.report.wording import headline

__all__ = [
    "METRICS",
    "Change",
    "ModelResult",
    "ModelRow",
    "RepeatedResult",
    "Result",
    "Summary",
    "compare_models",
    "format_table",
    "headline",
    "to_json",
    "write_csv",
    "write_report",
]
