"""Data sets from outside of the project: `ArrayDataset` writes one in few lines, `check_dataset` checks any."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from inspect import getattr_static
from typing import Any

import numpy as np
from jaxtyping import Shaped

from train.data.case import Case, Dataset
from train.data.geometry import Geometry
from train.data.ignore import IGNORE
from train.data.preprocess import normalise
from train.errors import InputError


@dataclass(frozen=True, eq=False)
class ArrayDataset:
    """A data set from a function that reads the image and the label of a case as arrays.

    Attributes:
        name: of the data set.
        class_names: by class id, background first.
        case_names: unique.
        read: case name -> (image, label). The image has shape [*spatial, channels], or [*spatial] for one channel,
            in any unit; `load` normalises it. The label has class ids [*spatial]. Several threads call `read`.
        intensity_range: smallest and largest intensity, as for CT; None normalises over the non-zero voxels. See
            `train.data.preprocess.normalise`.
        regions: class ids of each evaluation region by its name; empty to evaluate the foreground classes.
        has_ignore: whether labels may hold `IGNORE` (255) for voxels without a label.
        subjects: subject of each case, if a subject has several cases; empty for one case per subject.
        held_out: names of the cases that are reserved for testing.

    Example:
        >>> image = np.arange(12.0).reshape(3, 4)
        >>> data = ArrayDataset("toy", ("background", "bright"), ("a", "b"), lambda name: (image, image > 5))
        >>> len(data), data.num_channels, data.largest_shape, data.load(1).label.sum()
        (2, 1, (3, 4), np.uint64(6))
    """

    name: str
    class_names: tuple[str, ...]
    case_names: tuple[str, ...]
    read: Callable[[str], tuple[Shaped[np.ndarray, "..."], Shaped[np.ndarray, "..."]]]
    intensity_range: tuple[float, float] | None = None
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    has_ignore: bool = False
    subjects: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "subjects", self.subjects or self.case_names)

    def __len__(self) -> int:
        return len(self.case_names)

    @property
    def geometry(self) -> Geometry:
        """Arrays keep their grid."""
        return Geometry()

    @property
    def num_channels(self) -> int:
        """Channels of the first case."""
        return self._first_shape[-1]

    @property
    def spatial_dims(self) -> int:
        """Spatial axes of the first case."""
        return len(self._first_shape) - 1

    @cached_property
    def largest_shape(self) -> tuple[int, ...]:
        """Largest size along each axis. Reads every case once."""
        shapes = [np.shape(self.read(name)[1]) for name in self.case_names]
        return tuple(max(sides) for sides in zip(*shapes, strict=True))

    @cached_property
    def _first_shape(self) -> tuple[int, ...]:
        return self.load(0).image.shape

    def load(self, index: int) -> Case:
        """Reads and normalises case `index`.

        Raises:
            InputError: the label does not hold whole numbers from 0 to 255.
        """
        name = self.case_names[index]
        image, label = map(np.asarray, self.read(name))
        with np.errstate(invalid="ignore"):  # NaN, which differs from its id
            ids = label.astype(np.uint8)
        if not np.array_equal(ids, label):
            raise InputError(
                f"Case {name} of {self.name} has labels that are no class ids: give whole numbers from 0 to 255."
            )
        channels_last = image if image.ndim > label.ndim else image[..., None]
        return Case(name, normalise(channels_last, self.intensity_range), ids, np.eye(4))


def check_dataset(dataset: Any, origin: str) -> Dataset:
    """Checks that an object keeps to the `Dataset` protocol, and its first case with `check_case`.

    Args:
        dataset: what the user's function returned.
        origin: how the user named it.

    Raises:
        InputError: says what is missing or wrong.
    """
    members = [name for name in vars(Dataset) if not name.startswith("_")]
    absent = object()
    # Static, since a property may read every case.
    missing = [name for name in [*members, "__len__"] if getattr_static(dataset, name, absent) is absent]
    if missing:
        raise InputError(
            f"{origin} gave a {type(dataset).__name__} without {', '.join(missing)}: return a "
            "train.data.ArrayDataset, or an object with all attributes of train.data.Dataset."
        )
    if type(dataset).__hash__ is None:
        raise InputError(
            f"{origin} gave a {type(dataset).__name__} without a hash: give its dataclass eq=False."
        )
    names, counts = dataset.case_names, (len(dataset), len(dataset.case_names), len(dataset.subjects))
    if not names:
        raise InputError(f"{origin} has no case: check where it looks for them.")
    if len(set(names)) < len(names):
        raise InputError(f"{origin} gives two cases the same name: give each case a name of its own.")
    if len(set(counts)) > 1:
        raise InputError(
            f"{origin} has {counts[0]} cases, {counts[1]} case_names and {counts[2]} subjects: give equally many."
        )
    if not set(dataset.held_out) <= set(names):
        raise InputError(f"{origin} holds out cases that are not in case_names: correct held_out.")
    if dataset.spatial_dims not in (2, 3):
        raise InputError(f"{origin} has spatial_dims {dataset.spatial_dims}: give 2 or 3.")
    check_case(dataset, 0)
    return dataset


def check_case(dataset: Dataset, index: int) -> None:
    """Loads a case and checks its arrays.

    Raises:
        InputError: says which array has a wrong shape, type or value.
    """
    case = dataset.load(index)
    where = f"Case {dataset.case_names[index]} of {dataset.name}"
    image, label, dims = np.asanyarray(case.image), np.asanyarray(case.label), dataset.spatial_dims
    if image.dtype != np.float32 or image.ndim != dims + 1 or image.shape[-1] != dataset.num_channels:
        raise InputError(
            f"{where} has an image of {image.dtype} {image.shape}: give float32 with {dims} spatial axes, then "
            f"{dataset.num_channels} channels."
        )
    if label.dtype != np.uint8 or label.shape != image.shape[:-1]:
        raise InputError(
            f"{where} has a label of {label.dtype} {label.shape}: give uint8 {image.shape[:-1]}, as the image."
        )
    if any(np.greater(label.shape, dataset.largest_shape)):
        raise InputError(f"{where} has shape {label.shape}, beyond largest_shape {dataset.largest_shape}.")
    if not np.isfinite(image).all():
        raise InputError(f"{where} has voxels that are NaN or infinite: leave it out or replace them.")
    known = [*range(len(dataset.class_names)), *([IGNORE] if dataset.has_ignore else [])]
    unknown = np.setdiff1d(label, known)
    if unknown.size:
        raise InputError(
            f"{where} has the class id {unknown[0]}, but class_names gives ids 0 to {len(dataset.class_names) - 1}"
            f"{'' if dataset.has_ignore else ' and has_ignore is False'}: correct the label or class_names."
        )
