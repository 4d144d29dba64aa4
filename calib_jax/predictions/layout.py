"""Which axis of a stored array is the classes', and how its other axes lie on the grid of the label."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from nibabel.orientations import apply_orientation, ornt_transform

from calib_jax.predictions.arrays import NNUNET_KEYS, PAGES, ArrayFile
from calib_jax.predictions.case import PredictionError
from calib_jax.predictions.grids import GRID_TOLERANCE, Grid, affine_of
from calib_jax.predictions.values import sample

Turn = tuple[tuple[int, int], ...]
"""For each axis, the axis that it becomes and its direction, 1 or -1."""
_RAS = np.array([[0, 1], [1, 1], [2, 1]])


@dataclass(frozen=True)
class Reference:
    """The grid that arrays are brought to.

    Attributes:
        name: of the file that it comes from, for messages.
        shape: two or three spatial lengths.
        grid: of a volume; None for arrays and images, which do not say where they lie.
    """

    name: str
    shape: tuple[int, ...]
    grid: Grid | None

    @classmethod
    def of(cls, file: ArrayFile) -> "Reference":
        """The grid of a file with one number per voxel, or with channels behind the spatial axes of a volume."""
        if file.volume is not None:
            return cls(str(file.path), file.volume.shape, Grid.of(file.volume))
        shape = file.shape[:2] if file.kind == "image" else file.shape
        return cls(str(file.path), shape, None)


@dataclass(frozen=True)
class Layout:
    """How a stored array lies on a grid.

    Attributes:
        stored: shape of the stored array.
        class_axis: of the stored array; None if it has none.
        is_reversed: whether its spatial axes are in the opposite order.
        shape: its spatial lengths after that, with or without axes of length 1.
        turns: flips and permutations of three axes, one after the other, to the axes of the label.
    """

    stored: tuple[int, ...]
    class_axis: int | None
    is_reversed: bool
    shape: tuple[int, ...]
    turns: tuple[Turn, ...] = ()

    def from_stored(self, array: np.ndarray) -> np.ndarray:
        """A view of the stored array with the axes of the label, then the classes."""
        return self.to_grid(
            array[..., None] if self.class_axis is None else np.moveaxis(array, self.class_axis, -1)
        )

    def to_stored(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `from_stored`."""
        array = self.from_grid(array)
        return array[..., 0] if self.class_axis is None else np.moveaxis(array, -1, self.class_axis)

    def to_grid(self, array: np.ndarray) -> np.ndarray:
        """`from_stored` for an array whose last axis is the classes'."""
        if self.is_reversed:
            array = array.transpose(*reversed(range(array.ndim - 1)), array.ndim - 1)
        array = array.reshape(*self.shape, array.shape[-1])  # adds or drops axes of length 1
        for turn in self.turns:
            array = apply_orientation(array, np.array(turn))
        return array

    def from_grid(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_grid`."""
        for turn in reversed(self.turns):
            array = apply_orientation(array, ornt_transform(_RAS, np.array(turn)))
        spatial = [size for axis, size in enumerate(self.stored) if axis != self.class_axis]
        array = array.reshape(*(reversed(spatial) if self.is_reversed else spatial), array.shape[-1])
        return (
            array.transpose(*reversed(range(array.ndim - 1)), array.ndim - 1) if self.is_reversed else array
        )


def find_layouts(
    file: ArrayFile, reference: Reference | None, channels: int | None, *, reorients: bool = False
) -> tuple[list[Layout], str]:
    """All layouts in which a stored array fits, the most usual first, and a notice about its affine.

    Args:
        file: with probabilities.
        reference: grid of the label, or of the segmentation beside the file; None if there is neither.
        channels: number of channels; None if it is not known. One foreground channel counts as two classes.
        reorients: whether the program that wrote the file turned scans to RAS order.

    Raises:
        PredictionError: the array fits in no way.
    """
    found: list[Layout] = []
    notices: list[str] = []
    for class_axis, is_reversed in itertools.product(_class_axes(file, reference, channels), (False, True)):
        spatial = tuple(size for axis, size in enumerate(file.shape) if axis != class_axis)
        spatial = _spatial(file, spatial[::-1] if is_reversed else spatial)
        layout = Layout(file.shape, class_axis, is_reversed, spatial)
        if is_reversed and (file.volume is not None or file.kind == "image"):
            continue  # these formats define the order of their axes
        if reference is None:
            found.append(layout)
        elif file.volume is not None and reference.grid is not None:
            own = Grid(file.volume.header, spatial)
            if turned := _by_affine(layout, own, str(file.path), reference):
                found.append(turned[0])
                notices.append(turned[1])
        else:
            if _longer(spatial) == _longer(reference.shape):
                found.append(dataclasses.replace(layout, shape=reference.shape))
            if is_reversed and reference.grid is not None:
                found += _from_ras(layout, reference.grid)
    if not found:
        raise PredictionError(_fits_nowhere(file, reference, channels))
    is_nnunet = file.key in NNUNET_KEYS and (reference is None or reference.grid is not None)
    # Stable: axes of classes keep their order.
    found.sort(key=lambda layout: (layout.is_reversed != is_nnunet, bool(layout.turns) != reorients))
    return list(dict.fromkeys(found)), next(filter(None, notices), "")


def turn_to(layout: Layout, grid: Grid, reference: Reference, name: str) -> tuple[Layout, str]:
    """A layout on one grid, turned to the axes of another.

    Args:
        layout: on `grid`.
        grid: of the segmentation beside the file.
        reference: of the label.
        name: of the file with `grid`.

    Returns:
        The layout on the grid of the label, and a notice if the affines contradict the shapes.

    Raises:
        PredictionError: the grids differ.
    """
    if reference.grid is not None:
        turned = _by_affine(layout, grid, name, reference)
    else:
        fits = _longer(grid.file_shape) == _longer(reference.shape)
        turned = (
            (dataclasses.replace(layout, shape=reference.shape), "") if fits and not layout.turns else None
        )
    if turned is None:
        raise PredictionError(
            f"{name} has shape {grid.file_shape}, but {reference.name} has {reference.shape}: export both on one "
            "grid."
        )
    return turned


def _class_axes(file: ArrayFile, reference: Reference | None, channels: int | None) -> list[int | None]:
    """Axes that may be the classes', the most usual first; None for an array without one."""
    rank, last = len(file.shape), len(file.shape) - 1
    if file.key in NNUNET_KEYS:
        axes: list[int | None] = [0]
    elif file.kind == "image":
        axes = ([0] if file.key == PAGES else [last]) if rank > 2 else []
    elif reference is None and rank == (3 if file.volume is not None else 2):
        axes = []
    else:
        axes = [last, 0]
        if reference is None and file.shape[0] < file.shape[last]:
            axes = [0, last]
        if rank > 3:
            axes += [3 if file.volume is not None else 1]  # beside an axis of length 1
    if channels is not None:
        fits = (channels, 1) if channels == 2 else (channels,)
        axes = [axis for axis in axes if axis is not None and file.shape[axis] in fits]
    is_single = (
        channels in (None, 1, 2) and file.key not in NNUNET_KEYS and (reference is not None or not axes)
    )
    return [*dict.fromkeys(axes), *([None] if is_single else [])]


def _longer(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _spatial(file: ArrayFile, spatial: tuple[int, ...]) -> tuple[int, ...]:
    """At most three spatial lengths; exactly three of a volume, even if it is flat."""
    while len(spatial) > 3 and 1 in spatial:
        last = len(spatial) - 1 - spatial[::-1].index(1)
        spatial = (*spatial[:last], *spatial[last + 1 :])
    return (*spatial, 1, 1)[:3] if file.volume is not None and len(spatial) < 3 else spatial


def _by_affine(layout: Layout, own: Grid, name: str, reference: Reference) -> tuple[Layout, str] | None:
    """The layout turned as the affines say, and a notice if these contradict the shapes; None if shapes differ."""
    grid = reference.grid
    assert grid is not None
    if sorted(own.file_shape) != sorted(reference.shape):
        return None
    turn = grid.turn(own)
    apart, in_voxels = grid.distance(own)
    is_straight = np.array_equal(turn, _RAS)
    if in_voxels <= GRID_TOLERANCE:
        return (layout if is_straight else _turned(layout, turn)), ""
    if own.file_shape != reference.shape:
        return None
    has_no_affine = np.array_equal(np.abs(affine_of(own.header)), np.eye(4))
    if is_straight or has_no_affine:
        return layout, f"{name} has another affine than {reference.name}: voxels are compared index by index."
    raise PredictionError(
        f"{name} has an affine that differs from that of {reference.name} by up to {apart:.3g} mm: export both on "
        "one grid."
    )


def _from_ras(layout: Layout, grid: Grid) -> list[Layout]:
    """The layout of an array in RAS order, unless that is the order of the grid."""
    if np.array_equal(grid.orientation, _RAS) or _longer(layout.shape) != _longer(grid.shape):
        return []
    on_grid = dataclasses.replace(layout, shape=grid.shape)
    return [_turned(on_grid, ornt_transform(_RAS, grid.orientation))]


def _turned(layout: Layout, turn: np.ndarray) -> Layout:
    as_tuple = tuple((int(axis), int(direction)) for axis, direction in turn)
    return dataclasses.replace(layout, turns=(*layout.turns, as_tuple))


def _fits_nowhere(file: ArrayFile, reference: Reference | None, channels: int | None) -> str:
    found = f"{file.path} has shape {file.shape}"
    classes = f"{channels} classes" if channels else "classes"
    if file.key == NNUNET_KEYS[1]:
        return (
            f"{found}, but nnU-Net v1 crops what it saves: export probabilities at the full size of the scan."
        )
    if reference is None:
        return f"{found}, which has no axis of {classes}: export class probabilities."
    return (
        f"{found}, but {reference.name} has {reference.shape}: export {classes} along the first or last axis, on "
        "one grid with it."
    )


def read_stored(files: Sequence[ArrayFile], layouts: Sequence[Layout]) -> tuple[np.ndarray, list[Layout]]:
    """The numbers of one file, or of one for each class, with the classes last; and layouts with this class axis.

    Args:
        files: of a case.
        layouts: in which the first file fits, see `find_layouts`.

    Raises:
        PredictionError: a file cannot be read, or is stored in another way than the first one.
    """
    first, *others = files
    array = first.read()
    layouts = _with_constant_sums(layouts, array)
    axis = layouts[0].class_axis
    for file in others:
        if file.shape != first.shape or file.dtype != first.dtype:
            raise PredictionError(
                f"{file.path} holds {file.dtype} of shape {file.shape}, but {first.path} {first.dtype} of shape "
                f"{first.shape}: export the classes of a case alike."
            )
        if file.volume is not None and first.volume is not None:
            own, one = affine_of(file.volume.header), affine_of(first.volume.header)
            if not np.allclose(own, one, atol=1e-3):
                raise PredictionError(
                    f"{file.path} has another affine than {first.path}: export both on one grid."
                )
    last = [array[..., None] if axis is None else np.moveaxis(array, axis, -1)]
    for file in others:
        array = file.read()
        last.append(array[..., None] if axis is None else np.moveaxis(array, axis, -1))
    values = last[0] if len(last) == 1 else np.concatenate(last, axis=-1)
    return values, [layout for layout in layouts if layout.class_axis == axis]


def _with_constant_sums(layouts: Sequence[Layout], array: np.ndarray) -> list[Layout]:
    """Of several possible class axes those along which numbers have one sum, as probabilities have; or all."""
    axes = {layout.class_axis for layout in layouts} - {None}
    if len(axes) < 2:
        return list(layouts)

    def is_constant(axis: int | None) -> bool:
        sums = (
            sample(np.moveaxis(array, axis, -1)).astype(np.float64).sum(-1)
            if axis is not None
            else np.zeros(1)
        )
        return bool(np.ptp(sums) <= 0.02 * abs(sums.max()))

    kept = [layout for layout in layouts if is_constant(layout.class_axis)]
    return kept or list(layouts)
