"""What the report knows about one model: its bin statistics and Dice per case and class, on disk as .npz."""

import csv
import dataclasses
import os
import zipfile
from collections.abc import Mapping
from typing import Final

import jax
import numpy as np
from jaxtyping import Float

from calib_jax.binning import BinStatistics
from calib_jax.errors import (
    average_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
)

METRICS: Final = ("Dice", "ACE", "ECE", "MCE")
HIGHER_IS_BETTER: Final = frozenset({"Dice"})

_FORMAT: Final = 1
_BIN_FIELDS: Final = tuple(field.name for field in dataclasses.fields(BinStatistics))


@dataclasses.dataclass(frozen=True, eq=False)
class ModelResult:
    """One model's results on a data set, enough to make every table and figure again.

    Attributes:
        name: how the model is called in tables and figures.
        case_names: one name per case; models are compared on the cases whose names they share.
        class_names: the classes reported, as a rule the foreground ones.
        stats: bin statistics `[cases, classes, bins]`; kept as NumPy arrays.
        dice: Dice coefficient `[cases, classes]`, NaN where it is undefined.

    Raises:
        ValueError: if the shapes do not fit the names, or a case or class name occurs twice.

    Example:
        >>> bins = np.array([[[8, 2]]])
        >>> stats = BinStatistics(bins, 1.0 * np.array([[[0.8, 1.8]]]), 1.0 * np.array([[[0, 1]]]))
        >>> result = ModelResult("U-Net", ("case 1",), ("tumour",), stats, np.array([[0.8]]))
        >>> {name: round(float(value[0, 0]), 3) for name, value in result.metrics().items()}
        {'Dice': 0.8, 'ACE': 0.25, 'ECE': 0.16, 'MCE': 0.4}
    """

    name: str
    case_names: tuple[str, ...]
    class_names: tuple[str, ...]
    stats: BinStatistics
    dice: Float[np.ndarray, "cases classes"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "stats", jax.tree.map(np.asarray, self.stats))
        object.__setattr__(self, "dice", np.asarray(self.dice, np.float64))
        expected = (len(self.case_names), len(self.class_names))
        for what, shape in (("stats", self.stats.count.shape[:-1]), ("dice", self.dice.shape)):
            if shape != expected:
                raise ValueError(
                    f"{what} of {self.name!r} has shape {shape} over cases and classes, but there are "
                    f"{expected[0]} case names and {expected[1]} class names: name each case and class."
                )
        for what, names in (("case", self.case_names), ("class", self.class_names)):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{what} names of {self.name!r} must differ, but {twice[0]!r} occurs twice.")

    def metrics(self) -> Mapping[str, Float[np.ndarray, "cases classes"]]:
        """Every metric of `METRICS`, per case and class; NaN where nothing was counted."""
        errors = {
            "ACE": average_calibration_error,
            "ECE": expected_calibration_error,
            "MCE": maximum_calibration_error,
        }
        return {"Dice": self.dice} | {
            name: np.asarray(error(self.stats), np.float64) for name, error in errors.items()
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the result to `path` (by custom `.npz`), for `load` and `python -m calib_jax.report`."""
        with open(path, "wb") as file:
            np.savez_compressed(
                file,
                format=np.array(_FORMAT),
                name=np.array(self.name),
                case_names=np.array(self.case_names, dtype=np.str_),
                class_names=np.array(self.class_names, dtype=np.str_),
                dice=self.dice,
                **{field: getattr(self.stats, field) for field in _BIN_FIELDS},
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ModelResult":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is something else than a saved result.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                if file["format"] != _FORMAT:
                    raise ValueError(f"format {file['format']} where {_FORMAT} is known")
                return cls(
                    name=str(file["name"]),
                    case_names=tuple(file["case_names"].tolist()),
                    class_names=tuple(file["class_names"].tolist()),
                    stats=BinStatistics(*(file[field] for field in _BIN_FIELDS)),
                    dice=file["dice"],
                )
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{os.fspath(path)} is not a result saved by ModelResult.save: {error}"
            ) from error

    def write_case_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes one row per case and class: case, class and every metric (`nan` where undefined)."""
        metrics = self.metrics()
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["case", "class", *(name.lower() for name in METRICS)])
            for i, case in enumerate(self.case_names):
                for j, class_name in enumerate(self.class_names):
                    writer.writerow([case, class_name, *(f"{metrics[name][i, j]:.6g}" for name in METRICS)])
