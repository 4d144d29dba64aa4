"""Reads label maps: class ids, regions, and voxels without a label."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32

from calib_jax.predictions.arrays import ArrayFile
from calib_jax.predictions.case import PredictionError

LABEL_TOLERANCE = 1e-3
"""Largest distance of a label from a whole number. Float32 copies and scaled headers round labels."""

_MOST = 2**20  # values up to which a table is kept


def read_ids(file: ArrayFile) -> Int32[np.ndarray, "*shape"]:
    """The whole numbers of a label map, `[*spatial]`, or `[*spatial, channels]` if it has several channels.

    Raises:
        PredictionError: the file is corrupt, holds other numbers, or is an image in colour.
    """
    values = file.read()
    if file.kind == "image" and values.ndim == 3:
        colours = values[..., :-1] if values.shape[-1] in (2, 4) else values  # without the alpha channel
        if (colours != colours[..., :1]).any():
            raise PredictionError(
                f"{file.path} is a picture in colour: give label maps with one number per pixel."
            )
        values = values[..., 0]
    if file.volume is not None:
        channels = file.volume.channels
        values = values.reshape(*file.volume.shape, *([channels] if channels > 1 else []))
    low, high = float(values.min()), float(values.max())
    if not max(abs(low), abs(high)) < 2**23:
        raise PredictionError(
            f"{file.path} holds labels from {low:g} to {high:g}: labels must be small whole numbers."
        )
    if file.dtype.kind in "bui" and not file.is_scaled:
        return values.astype(np.int32)
    whole = np.rint(values)
    apart = np.abs(values - whole)
    if float(apart.max()) > LABEL_TOLERANCE:
        raise PredictionError(
            f"{file.path} holds the label value {values.flat[int(apart.argmax())]:g}: labels must be whole numbers."
        )
    return whole.astype(np.int32)


def to_labels(
    ids: np.ndarray,
    *,
    path: object,
    num_classes: int,
    regions: Sequence[tuple[int, ...]],
    ignore_values: Sequence[int],
) -> tuple[
    Int32[np.ndarray, "*spatial"] | Bool[np.ndarray, "*spatial regions"],
    Bool[np.ndarray, "*spatial"] | None,
    str,
]:
    """Labels as a `Case` has them, where they count, and a notice or an empty string.

    Args:
        ids: as stored, see `read_ids`; with channels, one-hot classes or regions.
        path: of the file, for messages.
        num_classes: number of classes, background included.
        regions: label numbers of each region; empty unless predictions are regions.
        ignore_values: numbers that mark voxels without a label.

    Raises:
        PredictionError: a number is declared nowhere, or there is another number of channels.
    """
    if ids.ndim == 4:
        return _dense(ids, path, num_classes, bool(regions), len(regions)), None, ""
    low, high = int(ids.min()), int(ids.max())
    is_plain = low >= 0 and high < num_classes and not any(low <= value <= high for value in ignore_values)
    if is_plain and not regions:
        return ids, None, ""
    known = [*range(num_classes), *(value for value in ignore_values if abs(value) < 2**31)]
    notice = ""
    found = _values(ids)
    if num_classes == 2 and found.tolist() in ([0, 255], [255]) and 255 not in ignore_values:
        notice = f"{path} holds 0 and 255: 255 is taken for class 1."
        ids, found = ids // 255, found // 255
    if (unknown := found[~np.isin(found, known)]).size:
        raise PredictionError(
            f"{path} holds the label value {unknown[0]} (found: {_some(found)}), but there are {num_classes} "
            'classes: correct it, or declare it as "ignore" in dataset.json.'
        )
    ignored = np.array([value for value in found.tolist() if value in ignore_values], np.int32)
    where = ~np.isin(ids, ignored) if ignored.size else None
    if regions:
        highest = max(int(found[-1]), 0)
        table = np.zeros((highest + 2, len(regions)), bool)  # the last row is that of negative numbers
        for column, numbers in enumerate(regions):
            table[[number for number in numbers if number <= highest], column] = True
        return table[np.maximum(ids, -1)], where, notice
    return (ids if where is None else np.where(where, ids, np.int32(-1))), where, notice


def _dense(ids: np.ndarray, path: object, num_classes: int, is_regions: bool, num_regions: int) -> np.ndarray:
    wanted = num_regions if is_regions else num_classes
    found = _values(ids)
    if ids.shape[-1] != wanted or not np.isin(found, (0, 1)).all():
        raise PredictionError(
            f"{path} has {ids.shape[-1]} channels with values {_some(found)}: give one label map, or {wanted} "
            "channels of 0 and 1."
        )
    if is_regions:
        return ids.astype(bool)
    if (ids.sum(-1) != 1).any():
        raise PredictionError(f"{path} has voxels of no class or of several: give one class for each voxel.")
    return ids.argmax(-1).astype(np.int32)


def _values(ids: np.ndarray) -> Int32[np.ndarray, "values"]:
    """The different values, sorted."""
    low, high = int(ids.min()), int(ids.max())
    if high - low > _MOST:
        return np.unique(ids)
    return np.flatnonzero(np.bincount((ids - low).ravel(order="K"))).astype(np.int32) + np.int32(low)


def _some(values: np.ndarray) -> str:
    shown = ", ".join(map(str, values[:8].tolist()))
    return shown + (", ..." if len(values) > 8 else "")


def predicted_ids(
    probs: np.ndarray, *, regions: bool, class_order: Sequence[int], threshold: float = 0.5
) -> np.ndarray | None:
    """The label map that probabilities give: the most probable class, or regions one over the other.

    Args:
        probs: `[*spatial, classes]`.
        regions: whether channels are regions of their own.
        class_order: the number that each region writes; without it there is no label map of regions.
        threshold: above which a region is predicted.
    """
    if not regions:
        return probs.argmax(-1) if probs.shape[-1] > 1 else (probs[..., 0] > threshold).astype(np.int64)
    if len(class_order) != probs.shape[-1]:
        return None
    ids = np.zeros(probs.shape[:-1], np.int64)
    for index, number in enumerate(class_order):
        ids[probs[..., index] > threshold] = number
    return ids


def agreement(predicted: np.ndarray, segmentation: np.ndarray) -> tuple[float, int]:
    """Share of equal labels among voxels where either has foreground, 1 if there are none; and their number."""
    either = (predicted != 0) | (segmentation != 0)
    voxels = int(either.sum())
    return (float((predicted == segmentation)[either].mean()) if voxels else 1.0), voxels
