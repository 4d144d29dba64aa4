"""The results of a command as files for other programs."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_table(rows: Sequence[Mapping[str, Any]], folder: Path, name: str) -> None:
    """Writes rows with equal columns as `NAME.csv`, and with the command as `NAME.json`, where NaN is null."""
    from calib_jax.report.archive import without_nan
    from calib_jax.results import write_rows

    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / f"{name}.csv", list(rows[0]), rows)
    text = json.dumps({"command": [*sys.argv], name: without_nan(rows)}, indent=1, ensure_ascii=False)
    (folder / f"{name}.json").write_text(text, encoding="utf-8", errors="backslashreplace")
