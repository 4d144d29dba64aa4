"""Results of models on a data set: bin statistics and Dice per case and class, saved as `.npz`.

`ModelResult` holds the result of one model. `RepeatedResult` holds those of a model that was trained several
times. `calib_jax.report` makes tables, figures and a page from either.
"""

import csv
import dataclasses
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

CALIBRATION_ERRORS: Final[Mapping[str, Callable[[BinStatistics], Any]]] = {
    "ACE": average_calibration_error,
    "ECE": expected_calibration_error,
    "MCE": maximum_calibration_error,
}
METRICS: Final = ("Dice", *CALIBRATION_ERRORS)
"""Metrics that every result has. A result may also have those of `SCORES`."""
SCORES: Final = ("Brier", "NLL")
HIGHER_IS_BETTER: Final = frozenset({"Dice"})

History = Mapping[str, Sequence[float | int | None] | np.ndarray]
"""Training history of one model: columns of equal length, `epoch` and any of `train_*` and `val_*`."""

_FORMAT: Final = 1
_BIN_FIELDS: Final = tuple(field.name for field in dataclasses.fields(BinStatistics))
_OPTIONAL: Final = ("brier", "nll")
_BOUNDARY: Final = "boundary_"


@dataclasses.dataclass(frozen=True, eq=False)
class ModelResult:
    """Result of one model on a data set, from which every table and figure can be made.

    Attributes:
        name: name of the model in tables and figures.
        case_names: one name per case; models are compared on the cases whose names they share.
        class_names: one name per reported class; the background is usually left out.
        stats: bin statistics `[cases, classes, bins]`, stored as NumPy arrays.
        dice: Dice coefficient `[cases, classes]`, NaN where it is undefined.
        brier: Brier score `[cases, classes]`; None if it was not measured.
        nll: negative log-likelihood per voxel `[cases, classes]`, with the case's own in every class where classes
            exclude each other; None if it was not measured.
        boundary: bin statistics of the voxels near a border of the labels, of the shape of `stats`; None if they
            were not measured.
        subjects: subject of each case, such as the patient of a scan. Cases of one subject are not independent, so
            intervals and tests are over subjects. Left out, each case is a subject of its own.

    Raises:
        ValueError: if the shapes do not match the names, a case or class name occurs twice, or there are not as
            many subjects as cases.

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
    brier: Float[np.ndarray, "cases classes"] | None = None
    nll: Float[np.ndarray, "cases classes"] | None = None
    boundary: BinStatistics | None = None
    subjects: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "subjects", tuple(self.subjects) or self.case_names)
        if len(self.subjects) != len(self.case_names):
            raise ValueError(
                f"{self.name!r} has {len(self.subjects)} subjects and {len(self.case_names)} case names: name the "
                "subject of each case, or leave subjects out."
            )
        shapes = {}
        for field in ("stats", "boundary"):
            if (stats := getattr(self, field)) is not None:
                object.__setattr__(self, field, jax.tree.map(np.asarray, stats))
                shapes[field] = getattr(self, field).count.shape[:-1]
        for field in ("dice", *_OPTIONAL):
            if (values := getattr(self, field)) is not None:
                object.__setattr__(self, field, np.asarray(values, np.float64))
                shapes[field] = getattr(self, field).shape
        expected = (len(self.case_names), len(self.class_names))
        for field, shape in shapes.items():
            if shape != expected:
                raise ValueError(
                    f"{field} of {self.name!r} has shape {shape} over cases and classes, but there are "
                    f"{expected[0]} case names and {expected[1]} class names: name each case and class."
                )
        for kind, names in (("case", self.case_names), ("class", self.class_names)):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{kind} names of {self.name!r} must differ, but {twice[0]!r} occurs twice.")

    @property
    def repeats(self) -> Mapping[str, "ModelResult"]:
        """Empty, since the model was trained once; see `RepeatedResult`."""
        return {}

    def metrics(self) -> Mapping[str, Float[np.ndarray, "cases classes"]]:
        """Every metric of `METRICS`, and those of `SCORES` that were measured, per case and class.

        A metric is NaN where nothing was counted.
        """
        errors = {name: np.asarray(f(self.stats), np.float64) for name, f in CALIBRATION_ERRORS.items()}
        scores = {name: getattr(self, name.lower()) for name in SCORES}
        return {"Dice": self.dice} | errors | {name: x for name, x in scores.items() if x is not None}

    @property
    def interior(self) -> BinStatistics | None:
        """Bin statistics of the voxels away from borders; None if those near them were not measured."""
        if self.boundary is None:
            return None
        return jax.tree.map(lambda whole, part: whole - part, self.stats, self.boundary)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the result to `path`, usually `*.npz`, for `load` and `python -m calib_jax.report`."""
        with open(path, "wb") as file:
            np.savez_compressed(
                file,
                format=np.array(_FORMAT),
                name=np.array(self.name),
                case_names=np.array(self.case_names, dtype=np.str_),
                class_names=np.array(self.class_names, dtype=np.str_),
                subjects=np.array(self.subjects, dtype=np.str_),
                dice=self.dice,
                **{field: getattr(self.stats, field) for field in _BIN_FIELDS},
                **self._optional_arrays(),
            )

    def _optional_arrays(self) -> dict[str, Any]:
        """What may be missing from a file. Versions that do not know these arrays ignore them."""
        arrays = {name: getattr(self, name) for name in _OPTIONAL}
        if self.boundary is not None:
            arrays |= {_BOUNDARY + field: getattr(self.boundary, field) for field in _BIN_FIELDS}
        return {name: values for name, values in arrays.items() if values is not None}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ModelResult":
        """Reads a file that `save` wrote.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if `save` did not write the file.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                if file["format"] != _FORMAT:
                    raise ValueError(f"its format is {file['format']}, and this version reads {_FORMAT}")
                boundary = [file[_BOUNDARY + x] for x in _BIN_FIELDS if _BOUNDARY + x in file.files]
                return cls(
                    name=str(file["name"]),
                    case_names=tuple(file["case_names"].tolist()),
                    class_names=tuple(file["class_names"].tolist()),
                    stats=BinStatistics(*(file[field] for field in _BIN_FIELDS)),
                    dice=file["dice"],
                    **{name: file[name] for name in _OPTIONAL if name in file.files},
                    boundary=BinStatistics(*boundary) if boundary else None,
                    subjects=tuple(file["subjects"].tolist()) if "subjects" in file.files else (),
                )
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{os.fspath(path)} is not a result saved by ModelResult.save: {error}"
            ) from error

    def write_case_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes one row per case and class: case, class and every metric (`nan` where undefined)."""
        write_rows(path, _case_columns(self), _case_rows(self))


@dataclasses.dataclass(frozen=True, eq=False)
class RepeatedResult:
    """Results of one model that was trained several times, for example with several seeds.

    The model takes one row of a table. A metric of a case is its mean over the repeats, so intervals and tests are
    over cases. Diagrams pool the repeats.

    Attributes:
        name: name of the model in tables and figures.
        repeats: result of each training by a name such as `seed 0`, all on the same cases and classes.

    Raises:
        ValueError: if `repeats` is empty, or two repeats have different cases, classes or subjects.

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
            if (result.case_names, result.class_names, result.subjects) != (
                self.case_names,
                self.class_names,
                self.subjects,
            ):
                raise ValueError(
                    f"repeat {repeat!r} of {self.name!r} has other cases, classes or subjects than "
                    f"{next(iter(self.repeats))!r}: evaluate all of them on the same cases."
                )

    @property
    def case_names(self) -> tuple[str, ...]:
        """Case names, which all repeats share."""
        return next(iter(self.repeats.values())).case_names

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names, which all repeats share."""
        return next(iter(self.repeats.values())).class_names

    @property
    def subjects(self) -> tuple[str, ...]:
        """Subject of each case, which all repeats share."""
        return next(iter(self.repeats.values())).subjects

    @property
    def stats(self) -> BinStatistics:
        """Bin statistics `[repeats * cases, classes, bins]`."""
        stats = [result.stats for result in self.repeats.values()]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *stats)

    def metrics(self) -> Mapping[str, Float[np.ndarray, "cases classes"]]:
        """Every metric that all repeats have, per case and class: its mean over the repeats that define it."""
        repeats = [result.metrics() for result in self.repeats.values()]
        shared = [name for name in repeats[0] if all(name in metrics for metrics in repeats)]
        return {name: nan_mean(np.stack([metrics[name] for metrics in repeats]), axis=0) for name in shared}

    def write_case_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes one row per repeat, case and class: repeat, case, class and every metric."""
        rows = ({"repeat": repeat, **row} for repeat, one in self.repeats.items() for row in _case_rows(one))
        write_rows(path, ("repeat", *_case_columns(self)), rows)


Result = ModelResult | RepeatedResult


def nan_mean(values: Any, axis: int | None = None) -> Any:
    """Mean of the values that are not NaN, in float64; NaN where every value is NaN or there is none.

    Example:
        >>> nan_mean([[1.0, np.nan], [np.nan, np.nan]], axis=1).tolist()
        [1.0, nan]
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # np.nanmean warns where it returns NaN
        return np.nanmean(np.asarray(values, np.float64), axis)


def write_rows(
    path: str | os.PathLike[str], columns: Sequence[str], rows: Iterable[Mapping[str, Any]]
) -> None:
    """Writes `rows` as CSV in UTF-8; a column that a row lacks stays empty."""
    # A name from the file system may hold surrogates, which become escapes.
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _case_columns(result: "Result") -> tuple[str, ...]:
    return ("case", "class", *(name.lower() for name in result.metrics()))


def _case_rows(result: ModelResult) -> Iterator[dict[str, str]]:
    metrics = result.metrics()
    for i, case in enumerate(result.case_names):
        for j, class_name in enumerate(result.class_names):
            figures = {name.lower(): f"{values[i, j]:.6g}" for name, values in metrics.items()}
            yield {"case": case, "class": class_name, **figures}
