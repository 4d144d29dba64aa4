"""A data set is a sequence of cases: the types of both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool

from train.data.annotators import soft_label
from train.data.geometry import Geometry, Placement
from train.data.shapes import Affine, Annotations, Ids, Image, Shares


@dataclass(frozen=True)
class Source:
    """The truth of a case on its file's own grid, where that is not the grid of the network.

    Attributes:
        placement: the way from the file's grid to the network's and back.
        label: as in `Case`.
        annotations: as in `Case`.
    """

    placement: Placement
    label: Ids
    annotations: Annotations | None = None


@dataclass(frozen=True)
class Case:
    """One subject, ready for the model.

    Attributes:
        name: unique within its data set.
        image: normalised intensities (see `train.data.preprocess.normalise`).
        label: class ids; 0 is background, `IGNORE` is a voxel without a label. Of several annotators the majority.
        affine: voxel index to millimetres, as in NIfTI.
        posterior: the probabilities that the label was drawn from, where they are known (phantoms only).
        annotations: class ids of each annotator, where the data set keeps them apart.
        source: the truth on the file's grid, where the arrays above are on another grid.
    """

    name: str
    image: Image
    label: Ids
    affine: Affine
    posterior: Shares | None = None
    annotations: Annotations | None = None
    source: Source | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the arrays take. Arrays mapped from files take none."""
        arrays = [self.image, self.label, self.posterior, self.annotations]
        if self.source is not None:
            arrays += [self.source.label, self.source.annotations]
        return sum(0 if array is None or isinstance(array, np.memmap) else array.nbytes for array in arrays)

    def truth(self, num_classes: int) -> Ids | Shares:
        """The reference of evaluation on the file's own grid: class ids, or shares of the classes among annotators.

        `mask_ignored` says which voxels have a label.
        """
        own = self.source or self
        return own.label if own.annotations is None else soft_label(own.annotations, num_classes)


@runtime_checkable
class Dataset(Protocol):
    """Cases by index. A subclass inherits what is optional; `ArrayDataset` needs no class.

    `load` is pure: cases may be cached, and loaded from any thread. A data set is hashable.
    """

    @property
    def name(self) -> str: ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class id, background first."""
        ...

    @property
    def num_channels(self) -> int: ...

    @property
    def spatial_dims(self) -> int:
        """2 or 3."""
        ...

    @property
    def largest_shape(self) -> tuple[int, ...]:
        """Voxels along each axis that hold every case."""
        ...

    @property
    def case_names(self) -> tuple[str, ...]:
        """Unique names, in the order of `load`'s index."""
        ...

    def load(self, index: int) -> Case:
        """Reads or generates case `index`, `0 <= index < len(self)`."""
        ...

    def __len__(self) -> int:
        return len(self.case_names)

    @property
    def regions(self) -> Mapping[str, tuple[int, ...]]:
        """Class ids of each evaluation region by its name; empty to evaluate the foreground classes."""
        return {}

    @property
    def has_ignore(self) -> bool:
        """Whether labels may hold `IGNORE`. Losses and metrics then skip those voxels."""
        return False

    @property
    def intensity_range(self) -> tuple[float, float] | None:
        """Range that intensities are clipped to, see `train.data.preprocess.normalise`."""
        return None

    @property
    def geometry(self) -> Geometry:
        """How scans are cropped and resampled."""
        return Geometry()

    @property
    def subjects(self) -> tuple[str, ...]:
        """Subject of each case. Cases of one subject belong to one split."""
        return self.case_names

    @property
    def held_out(self) -> tuple[str, ...]:
        """Names of the cases that the data set reserves for testing."""
        return ()


def region_ids(dataset: Dataset) -> dict[str, tuple[int, ...]]:
    """Class ids of each region by its name. Without regions, each foreground class is one."""
    classes = {name: (index,) for index, name in enumerate(dataset.class_names)}
    return dict(dataset.regions) or dict(list(classes.items())[1:])


def ids_of(dataset: Dataset, regions: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Class ids of each of the named regions."""
    known = region_ids(dataset)
    return tuple(known[name] for name in regions)


def members_of(label: Ids, groups: Sequence[Sequence[int]]) -> Bool[np.ndarray, "*spatial regions"]:
    """Whether each voxel belongs to each of the regions, which are given by their class ids."""
    return np.stack([np.isin(label, ids) for ids in groups], -1)
