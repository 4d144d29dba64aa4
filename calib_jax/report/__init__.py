"""Reports that compare models: a table with intervals and tests, and figures on one HTML page.

Install the extra `report` (`pip install 'calib_jax[report]'`). `python -m calib_jax.report FOLDER` makes the page
again from the results saved in its folder.
"""

from calib_jax.report.page import write_report
from calib_jax.report.table import Change, ModelRow, Summary, compare_models, to_json, write_csv
from calib_jax.report.text import format_table
from calib_jax.report.wording import headline
from calib_jax.results import METRICS, ModelResult, RepeatedResult, Result

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
