"""From the grid of a file to the grid of the network, and back.

scipy and nibabel are imported where they are called, since the command line reads `Geometry` for its options.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float32, UInt8

from train.data.ignore import IGNORE
from train.data.shapes import Affine, Ids, Image, Shares
from train.errors import InputError


@dataclass(frozen=True)
class Geometry:
    """How every scan is cropped, then resampled, in training, evaluation and prediction alike.

    Attributes:
        spacing: millimetres between voxels along the axes right, anterior, superior. Of a 2-D image, whose own
            spacing is 1, the third is not used. "median" is the median of the data set. Empty keeps each scan's own
            spacing.
        interpolation: of intensities. Labels are resampled linearly, class by class; each voxel takes the class
            with the largest share.
        crop_margin: voxels to keep around the bounding box of the foreground. None crops nothing. Foreground is
            what is not zero or, where intensities are clipped to a range, what is above the lowest one.
    """

    spacing: tuple[float, ...] | Literal["median"] = ()
    interpolation: Literal["linear", "cubic"] = "linear"
    crop_margin: int | None = None

    def __post_init__(self) -> None:
        spacing = self.spacing
        if spacing != "median" and (
            len(spacing) not in (0, 3) or not all(0 < mm < math.inf for mm in spacing)
        ):
            raise InputError(
                f"spacing is {spacing}: give three positive lengths in mm, right, anterior and superior, or median."
            )
        if self.crop_margin is not None and self.crop_margin < 0:
            raise InputError(f"crop_margin is {self.crop_margin}: give 0 or more voxels.")

    def __bool__(self) -> bool:
        """Whether any scan changes its grid."""
        return bool(self.spacing) or self.crop_margin is not None

    def resolved(self, affines: Sequence[Affine]) -> "Geometry":
        """The same geometry with "median" replaced by the median spacing of these scans."""
        if self.spacing != "median":
            return self
        from nibabel.affines import voxel_sizes

        median = np.median([voxel_sizes(affine) for affine in affines], axis=0)
        return replace(self, spacing=tuple(median.tolist()))

    def shape_of(self, shape: Sequence[int], affine: Affine) -> tuple[int, ...]:
        """Voxels along each axis after resampling, without a crop."""
        if not self.spacing:
            return tuple(shape)
        axes = len(shape)
        lengths = np.multiply(shape, spacing_of(affine, axes)) / np.array(self.spacing[:axes], float)
        return tuple(max(round(length), 1) for length in lengths.tolist())

    def place(self, image: Image, affine: Affine, *, clipped: bool = False) -> "Placement":
        """Where a scan lies on the network's grid.

        Args:
            image: normalised intensities. The crop depends on them.
            affine: of the scan, in RAS order.
            clipped: whether the intensities were clipped to a range.
        """
        shape = image.shape[:-1]
        box = tuple(slice(0, size) for size in shape)
        if self.crop_margin is not None:
            from scipy.ndimage import find_objects

            inside = (image > image.min() if clipped else image != 0).any(-1)
            found = (find_objects(inside.astype(np.uint8)) or [box])[0]
            box = tuple(
                slice(max(side.start - self.crop_margin, 0), min(side.stop + self.crop_margin, size))
                for side, size in zip(found, shape, strict=True)
            )
        corner, held = np.array([side.start for side in box]), tuple(side.stop - side.start for side in box)
        return Placement(shape, box, self.shape_of(held, affine), _moved(affine, corner))


@dataclass(frozen=True)
class Placement:
    """The way of one scan to the network's grid and back. Both grids cover the same box, edge to edge.

    Attributes:
        source_shape: spatial shape of the scan, in RAS order.
        box: the crop, a slice per axis of the scan.
        shape: spatial shape of the network's input.
        box_affine: affine of the crop on the scan's own grid, from voxel index to millimetres.
    """

    source_shape: tuple[int, ...]
    box: tuple[slice, ...]
    shape: tuple[int, ...]
    box_affine: Affine

    @property
    def affine(self) -> Affine:
        """The affine of the network's grid, from voxel index to millimetres."""
        steps = np.array([side.stop - side.start for side in self.box]) / self.shape
        scaled = self.box_affine.copy()
        scaled[:3, : len(steps)] *= steps
        return _moved(scaled, (steps - 1) / 2 / steps)

    def image(
        self, image: Image, interpolation: Literal["linear", "cubic"]
    ) -> Float32[np.ndarray, "*resampled channels"]:
        """Intensities on the network's grid."""
        return _resample(image[self.box], self.shape, order={"linear": 1, "cubic": 3}[interpolation])

    def label(self, label: Ids) -> UInt8[np.ndarray, "*resampled"]:
        """Class ids on the network's grid: the class with the largest share, or the lower id of a tie.

        A voxel becomes `IGNORE` where more than half of it is `IGNORE`, as in `mask_ignored`.
        """
        cut = label[self.box]
        if cut.shape == self.shape:
            return cut
        ids, largest = np.zeros(self.shape, np.uint8), np.zeros(self.shape, np.float32)
        for value in np.unique(cut):  # `IGNORE` is the last
            share = _resample((cut == value).astype(np.float32)[..., None], self.shape, order=1)[..., 0]
            ids[share > (0.5 if value == IGNORE else largest)] = value
            largest = np.maximum(share, largest)
        return ids

    def back(self, probs: Float32[np.ndarray, "*resampled classes"], *, background: bool = True) -> Shares:
        """Class probabilities on the scan's own grid, interpolated linearly.

        Args:
            probs: on the network's grid.
            background: whether the first class is background. Voxels outside of the crop then have probability 1 of
                background, else 0 of every class.
        """
        whole = np.zeros((*self.source_shape, probs.shape[-1]), np.float32)
        whole[..., 0] = background
        whole[self.box] = _resample(probs, whole[self.box].shape[:-1], order=1)
        return whole


def spacing_of(affine: Affine, axes: int) -> tuple[float, ...]:
    """Millimetres from voxel to voxel along the first axes."""
    from nibabel.affines import voxel_sizes

    return tuple(voxel_sizes(affine)[:axes].tolist())


def _resample(
    array: Image, shape: Sequence[int], *, order: int
) -> Float32[np.ndarray, "*resampled channels"]:
    """Spline interpolation between voxel centres; the outermost values extend to the edge of the grid."""
    if array.shape[:-1] == tuple(shape):
        return array
    from scipy.ndimage import zoom

    factors = np.divide(shape, array.shape[:-1])
    resampled = np.empty((*shape, array.shape[-1]), np.float32)
    for channel in range(array.shape[-1]):
        zoom(
            array[..., channel], factors, resampled[..., channel], order=order, mode="nearest", grid_mode=True
        )
    return resampled


def _moved(affine: Affine, corner: np.ndarray) -> Affine:
    """The affine of the grid whose first voxel is voxel `corner` of the given grid."""
    moved = affine.copy()
    moved[:3, 3] += affine[:3, : len(corner)] @ corner
    return moved
