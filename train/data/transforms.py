"""Host-side array transforms: cut patches, pad for whole-volume inference and back."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Shaped

from train.data.ignore import IGNORE
from train.data.shapes import Ids


def draw_crop(
    label: Ids,
    patch: Sequence[int],
    rng: np.random.Generator,
    *,
    foreground_share: float = 0.0,
    has_ignore: bool = False,
) -> tuple[slice, ...]:
    """Draws where to cut a patch out of a volume.

    Args:
        label: class ids of the volume.
        patch: voxels along each spatial axis.
        rng: draws the corner uniformly.
        foreground_share: share of the crops that are centred on foreground instead: on a random voxel of a random
            foreground class that is present, shifted to stay inside of the volume.
        has_ignore: whether voxels may be `IGNORE`. If some are, the other crops are centred likewise on a random
            labelled voxel, since a crop without labels teaches nothing.

    Returns:
        A slice for each spatial axis, for `cut_patch`. It may reach beyond a volume that is smaller than the patch.
    """
    room = np.maximum(np.subtract(label.shape, patch), 0)
    # A share of 0 must not draw, so that the corners stay the same.
    foreground = foreground_share > 0 and rng.random() < foreground_share
    centre = _random_foreground_voxel(label, rng) if foreground else None
    if centre is None and has_ignore:
        centre = _random_labelled_voxel(label, rng)
    middle = np.array(patch) // 2
    corner = rng.integers(0, room + 1) if centre is None else np.clip(centre - middle, 0, room)
    return tuple(slice(start, start + size) for start, size in zip(corner.tolist(), patch, strict=True))


def _random_foreground_voxel(label: Ids, rng: np.random.Generator) -> Int[np.ndarray, " axes"] | None:
    """A random voxel of a random foreground class; None if there is only background."""
    places = np.flatnonzero(label)
    ids = label.reshape(-1)[places]
    classes = np.setdiff1d(ids, IGNORE)
    if not classes.size:
        return None
    of_class = places[ids == rng.choice(classes)]
    return np.array(np.unravel_index(rng.choice(of_class), label.shape))


def _random_labelled_voxel(label: Ids, rng: np.random.Generator) -> Int[np.ndarray, " axes"] | None:
    """A random labelled voxel; None if all voxels or no voxels have a label."""
    labelled = label != IGNORE
    counts = labelled.reshape(len(labelled), -1).sum(1)
    if counts.sum() in (0, labelled.size):
        return None
    # Draw a slice first: indices of all voxels would take eight times the memory of the label.
    first = rng.choice(len(counts), p=counts / counts.sum())
    place = rng.choice(np.flatnonzero(labelled[first]))
    return np.array((first, *np.unravel_index(place, label.shape[1:])))


def cut_patch(
    array: Shaped[np.ndarray, "..."], crop: Sequence[slice], patch: Sequence[int], *, fill: int = 0
) -> Shaped[np.ndarray, "..."]:
    """Cuts a crop out of an array and pads it to a patch on all sides.

    Zero is the mean of a z-scored image, and background in a label.

    Args:
        array: leading axes are the spatial ones, any axes may follow (channels, annotators).
        crop: from `draw_crop`.
        patch: voxels along each spatial axis.
        fill: value of the padding.

    >>> cut_patch(np.array([1, 2, 3]), (slice(1, 6),), (5,)).tolist()
    [0, 2, 3, 0, 0]
    """
    return _pad_centred(array[tuple(crop)], patch, fill)


def pad_to_hold(
    array: Shaped[np.ndarray, "*spatial channels"], patch: Sequence[int]
) -> Shaped[np.ndarray, "*padded channels"]:
    """Pads with zeros on all sides until a patch fits; `crop_back` is the inverse.

    Args:
        array: a whole volume, channel last.
        patch: smallest size along each spatial axis.

    >>> pad_to_hold(np.ones((35, 70, 1)), (48, 64)).shape
    (48, 70, 1)
    """
    return _pad_centred(array, np.maximum(array.shape[:-1], patch))


def crop_back(array: Shaped[np.ndarray, "..."], spatial_shape: Sequence[int]) -> Shaped[np.ndarray, "..."]:
    """Removes the padding of `pad_to_hold`.

    Args:
        array: leading axes are the padded spatial ones, any axes may follow (channels, classes).
        spatial_shape: shape before `pad_to_hold`.

    >>> padded = pad_to_hold(np.arange(3.0)[:, None], (4,))
    >>> crop_back(padded, (3,)).ravel().tolist()
    [0.0, 1.0, 2.0]
    """
    starts = [(padded - size) // 2 for padded, size in zip(array.shape, spatial_shape, strict=False)]
    return array[tuple(slice(start, start + size) for start, size in zip(starts, spatial_shape, strict=True))]


def _pad_centred(array: np.ndarray, spatial_shape: Sequence[int] | np.ndarray, fill: int = 0) -> np.ndarray:
    """Pads the leading axes to `spatial_shape`, an odd voxel at the end."""
    missing = np.subtract(spatial_shape, array.shape[: len(spatial_shape)])
    widths = [(int(n) // 2, int(n) - int(n) // 2) for n in missing]
    return np.pad(array, widths + [(0, 0)] * (array.ndim - len(widths)), constant_values=fill)
