"""What every data set hands out: cases, by index."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, UInt8

from train.data.annotators import soft_label
from train.data.geometry import Geometry, Placement


@dataclass(frozen=True)
class Source:
    """The truth of a case on its file's own grid, where the network sees another one.

    Attributes:
        placement: the way from that grid to the network's and back.
        label: as in `Case`.
        annotations: as in `Case`.
    """

    placement: Placement
    label: UInt8[np.ndarray, "*spatial"]
    annotations: UInt8[np.ndarray, "*spatial annotators"] | None = None


@dataclass(frozen=True)
class Case:
    """One subject, ready for the model.

    Attributes:
        name: unique within its data set.
        image: intensities, z-scored per channel over the non-zero voxels (see `z_score_nonzero`).
        label: class ids, 0 is background and `IGNORE` a voxel without a label; of several annotators the majority.
        affine: voxel index to millimetres, as in NIfTI.
        posterior: the probabilities the label was drawn from, where they are known (phantoms only).
        annotations: each annotator's class ids, where they are kept apart.
        source: the truth on the file's grid, where the arrays above lie on another one.
    """

    name: str
    image: Float32[np.ndarray, "*spatial channels"]
    label: UInt8[np.ndarray, "*spatial"]
    affine: Float[np.ndarray, "4 4"]
    posterior: Float32[np.ndarray, "*spatial classes"] | None = None
    annotations: UInt8[np.ndarray, "*spatial annotators"] | None = None
    source: Source | None = None

    @property
    def num_bytes(self) -> int:
        """Memory that the arrays take, in bytes; those mapped from files take none."""
        arrays = [self.image, self.label, self.posterior, self.annotations]
        if self.source is not None:
            arrays += [self.source.label, self.source.annotations]
        return sum(0 if array is None or isinstance(array, np.memmap) else array.nbytes for array in arrays)

    def truth(
        self, num_classes: int
    ) -> UInt8[np.ndarray, "*spatial"] | Float32[np.ndarray, "*spatial classes"]:
        """What a prediction is measured by, on the file's own grid: class ids or, of several annotators, shares.

        `mask_ignored` tells which voxels have a label.
        """
        own = self.source or self
        return own.label if own.annotations is None else soft_label(own.annotations, num_classes)


@runtime_checkable
class Dataset(Protocol):
    """Cases by index; `load` is pure, so cases may be cached and loaded from any thread."""

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
    def regions(self) -> Mapping[str, tuple[int, ...]]:
        """Evaluation regions by name, each with the class ids that make it up; empty for the classes themselves."""
        ...

    @property
    def has_ignore(self) -> bool:
        """Whether labels may hold `IGNORE`, whose voxels are then masked everywhere."""
        ...

    @property
    def window(self) -> tuple[float, float] | None:
        """Range that intensities are cut off to, see `train.data.io.read_channels`."""
        ...

    @property
    def geometry(self) -> Geometry:
        """What is done to the grids of the files."""
        ...

    @property
    def case_names(self) -> tuple[str, ...]:
        """Unique names, in the order of `load`'s index."""
        ...

    @property
    def subjects(self) -> tuple[str, ...]:
        """Whose each case is; cases of one subject belong in one split."""
        ...

    @property
    def held_out(self) -> tuple[str, ...]:
        """Cases that the data set itself sets apart for testing."""
        ...

    def __len__(self) -> int: ...

    def load(self, index: int) -> Case:
        """Reads or generates case `index`, `0 <= index < len(self)`."""
        ...


def region_ids(dataset: Dataset) -> dict[str, tuple[int, ...]]:
    """Class ids of each region by its name; of a data set without regions, of each foreground class."""
    classes = {name: (index,) for index, name in enumerate(dataset.class_names)}
    return dict(dataset.regions) or dict(list(classes.items())[1:])
