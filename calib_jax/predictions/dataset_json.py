"""What a `dataset.json` of nnU-Net or of the Medical Segmentation Decathlon says about labels."""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from calib_jax.predictions.case import PredictionError

_NUMBER = re.compile(r"\s*[+-]?[0-9]+\s*")


@dataclasses.dataclass(frozen=True)
class DeclaredLabels:
    """The labels of a data set.

    Attributes:
        class_names: one name per class, background first. Class ids are the labels' numbers.
        regions: label numbers of each region; empty unless the data set is region-based.
        ignore_values: numbers that mark voxels without a label.
    """

    class_names: tuple[str, ...]
    regions: Mapping[str, tuple[int, ...]]
    ignore_values: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class DatasetJson:
    """A `dataset.json`.

    Attributes:
        file: its path.
        labels: classes, regions, and values to ignore.
        class_order: for regions, the label number that each region writes into a label map, later ones over
            earlier ones (`regions_class_order`); empty if it is not declared.
        reorients: whether nnU-Net's reader turned the scans to RAS order (`NibabelIOWithReorient`).
    """

    file: Path
    labels: DeclaredLabels
    class_order: tuple[int, ...]
    reorients: bool


def find_dataset_json(folders: Iterable[Path]) -> Path | None:
    """The first `dataset.json` in these folders or in the folders that they lie in."""
    for folder in folders:
        for place in (folder, folder.resolve().parent):
            if (place / "dataset.json").is_file():
                return place / "dataset.json"
    return None


def read_dataset_json(file: Path) -> DatasetJson:
    """Reads a `dataset.json`.

    Raises:
        PredictionError: the file cannot be read, is no JSON object, or declares no labels that make sense.
    """
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise PredictionError(f"{file} cannot be read ({error.strerror}): check the path.") from error
    except (ValueError, RecursionError) as error:
        raise PredictionError(f"{file} is not valid JSON ({error}): mend or fetch it again.") from error
    declared = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(declared, dict) or not declared:
        raise PredictionError(
            f'{file} holds no object "labels": give {{"background": 0, NAME: NUMBER, ...}}.'
        )
    order = content.get("regions_class_order") or []
    is_order = isinstance(order, list) and all(type(number) is int for number in order)
    reader = str(content.get("overwrite_image_reader_writer"))
    return DatasetJson(
        file,
        declared_labels(file, declared),
        tuple(order) if is_order else (),
        reader.endswith("NibabelIOWithReorient"),
    )


def declared_labels(file: Path, declared: Mapping[str, Any]) -> DeclaredLabels:
    """The labels that "labels" declares: {"0": "background"} (MSD) or {"background": 0} (nnU-Net).

    A list among the labels makes the data set region-based, as in nnU-Net: every label but the background is a
    region. The label "ignore" is no class; its number marks voxels without a label.

    Args:
        file: path for error messages.
        declared: the object "labels".

    Raises:
        PredictionError: a number is no whole number, or belongs to two labels, or a number is left out.
    """
    by_number = all(isinstance(name, str) and _NUMBER.fullmatch(number) for number, name in declared.items())
    pairs = [(name, number) for number, name in declared.items()] if by_number else declared.items()
    labels = [_label(file, name, value) for name, value in pairs]
    ignored = [label for label in labels if label.name.strip().lower() == "ignore"]
    labels = [label for label in labels if label not in ignored]
    has_regions = any(label.is_region for label in labels)
    # The name of a class that only regions name is its number.
    names = {number: f"label {number}" for label in labels for number in label.numbers}
    names |= {label.numbers[0]: label.name for label in reversed(labels) if not label.is_region}
    ignore_values = tuple(dict.fromkeys(number for label in ignored for number in label.numbers))
    singles = [label.numbers[0] for label in labels if not label.is_region]
    twice = len(set(singles)) < len(singles) and not has_regions
    if twice or not names.keys().isdisjoint(ignore_values):
        raise PredictionError(f"{file} declares the labels {declared}: give each a number of its own.")
    if sorted(names) != list(range(len(names))) or len(names) < 2:
        raise PredictionError(
            f"{file} declares the labels {declared}: give 0 for the background, then 1, 2, ... without a gap"
            f"{', and any other number for ignore' if ignored else ''}."
        )
    regions = {label.name: label.numbers for label in labels if label.numbers != (0,)}
    return DeclaredLabels(
        tuple(names[number] for number in range(len(names))), regions if has_regions else {}, ignore_values
    )


class _Label(NamedTuple):
    """An entry of "labels".

    Attributes:
        name: of a class or a region, or "ignore".
        numbers: its different values in the files.
        is_region: whether the entry is a list, and not the background's.
    """

    name: str
    numbers: tuple[int, ...]
    is_region: bool


def _label(file: Path, name: str, value: Any) -> _Label:
    try:
        numbers = _numbers(value)
    except ValueError as error:
        raise PredictionError(
            f"{file} declares the label {name!r} as {json.dumps(value)}: give a whole number, or for a region "
            "a list of them."
        ) from error
    return _Label(name, numbers, isinstance(value, list) and numbers != (0,))


def _numbers(value: Any) -> tuple[int, ...]:
    """One number, or the different numbers of a list, which may hold lists."""
    if isinstance(value, list) and value:
        return tuple(dict.fromkeys(number for part in value for number in _numbers(part)))
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return (int(value),)
    if type(value) is int or (isinstance(value, float) and value.is_integer()):
        return (int(value),)
    raise ValueError(value)
