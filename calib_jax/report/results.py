"""What the report knows about one model: its bin statistics and Dice per case and class, on disk as .npz.

A model trained several times is one model with several such results.
"""

import csv
import dataclasses
import os
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, Final

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

    @property
    def repeats(self) -> Mapping[str, "ModelResult"]:
        """None: the model was trained once; see `RepeatedResult`."""
        return {}

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
        _write_rows(path, _CASE_COLUMNS, _case_rows(self))


@dataclasses.dataclass(frozen=True, eq=False)
class RepeatedResult:
    """One model trained several times, as with several seeds, in one row of the table.

    A metric of a case is its mean over the repeats, so that intervals and tests stay over cases. Diagrams pool the
    repeats.

    Attributes:
        name: how the model is called in tables and figures.
        repeats: the result of each training by what tells it apart, such as `seed 0`; on the same cases and
            classes.

    Raises:
        ValueError: if there is no repeat, or two are on different cases or classes.

    Example:
        >>> bins = np.array([[[10]]])
        >>> def result(name, frequency):
        ...     stats = BinStatistics(bins, 0.9 * bins, frequency * bins)
        ...     return ModelResult(name, ("case 1",), ("tumour",), stats, np.array([[0.8]]))
        >>> both = RepeatedResult("U-Net", {"seed 0": result("a", 0.5), "seed 1": result("b", 0.7)})
        >>> round(both.metrics()["ACE"].item(), 3)
        0.3
    """

    name: str
    repeats: Mapping[str, ModelResult]

    def __post_init__(self) -> None:
        if not self.repeats:
            raise ValueError(f"{self.name!r} has no repeat: give at least one result.")
        for repeat, result in self.repeats.items():
            if (result.case_names, result.class_names) != (self.case_names, self.class_names):
                raise ValueError(
                    f"repeat {repeat!r} of {self.name!r} has other cases or classes than "
                    f"{next(iter(self.repeats))!r}: evaluate all of them on the same cases."
                )

    @property
    def case_names(self) -> tuple[str, ...]:
        """Those of every repeat."""
        return next(iter(self.repeats.values())).case_names

    @property
    def class_names(self) -> tuple[str, ...]:
        """Those of every repeat."""
        return next(iter(self.repeats.values())).class_names

    @property
    def stats(self) -> BinStatistics:
        """Bin statistics `[repeats * cases, classes, bins]`."""
        everyone = [result.stats for result in self.repeats.values()]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *everyone)

    def metrics(self) -> Mapping[str, Float[np.ndarray, "cases classes"]]:
        """Every metric of `METRICS`, per case and class: the mean over the repeats in which it is defined."""
        everyone = [result.metrics() for result in self.repeats.values()]
        return {name: _defined_mean(np.stack([metrics[name] for metrics in everyone])) for name in METRICS}

    def write_case_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes one row per repeat, case and class: repeat, case, class and every metric."""
        rows = ([repeat, *row] for repeat, result in self.repeats.items() for row in _case_rows(result))
        _write_rows(path, ("repeat", *_CASE_COLUMNS), rows)


Result = ModelResult | RepeatedResult


def _defined_mean(values: Float[np.ndarray, "repeats cases classes"]) -> Float[np.ndarray, "cases classes"]:
    """Mean over the first axis without the NaN; NaN where there is nothing else."""
    defined = ~np.isnan(values)
    number = defined.sum(0)
    total = np.where(defined, values, 0.0).sum(0)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


_CASE_COLUMNS: Final = ("case", "class", *(name.lower() for name in METRICS))


def _case_rows(result: ModelResult) -> Iterator[list[str]]:
    metrics = result.metrics()
    for i, case in enumerate(result.case_names):
        for j, class_name in enumerate(result.class_names):
            yield [case, class_name, *(f"{metrics[name][i, j]:.6g}" for name in METRICS)]


def _write_rows(path: str | os.PathLike[str], columns: tuple[str, ...], rows: Iterator[Any]) -> None:
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
