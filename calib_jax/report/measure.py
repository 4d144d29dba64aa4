"""Every figure of one predicted case, in one pass over its voxels.

`measure` works in NumPy: cases differ in shape, and to compile a program for each shape would take longer than the
sums. Sums are float64, counts are exact. `CaseFigures` is what a report keeps of a case, a few hundred kilobytes.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from calib_jax._kept import load_arrays, save_arrays
from calib_jax._sums.bins import Bins
from calib_jax._sums.host import CHUNK, inner_edges, sums_in_bins

if TYPE_CHECKING:
    from calib_jax.predictions import Case

BORDER_VOXELS: Final = 2
_CERTAIN = 0.999  # voxels whose largest probability is below it are sampled first
_SAMPLED = 6144, 2048  # so many uncertain and certain voxels
_SAMPLED_VALUES = 1 << 18  # fewer voxels where there are many classes
_BLOCK = 256  # voxels in which a rank is looked for
_TINY = float(np.finfo(np.float32).tiny)
_LARGEST_SLICE = 256  # pixels
_MARGIN = 8  # pixels around what is shown of a slice


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """Voxels of a case that stand for all of them, for fitting and judging a calibrator.

    Attributes:
        probs: probabilities of the voxels.
        labels: class ids, or memberships of regions.
        weight: number of voxels that each stands for.
    """

    probs: Float[np.ndarray, "voxels classes"]
    labels: Int[np.ndarray, "voxels"] | Bool[np.ndarray, "voxels classes"]
    weight: Float[np.ndarray, "voxels"]


@dataclasses.dataclass(frozen=True, eq=False)
class Slice:
    """The slice of a case with the most wrong voxels, ready to be drawn.

    Attributes:
        index: number of the slice along the axis that was cut, -1 for a 2-D image.
        label, prediction: class ids; regions are numbered from 1 and small ones lie on top.
        confidence: probability of the predicted class, from 0 to 255.
        image: grey values from 0 to 255; empty if no image was given.
        counted: whether voxels are labelled.
    """

    index: int
    label: UInt8[np.ndarray, "rows columns"]
    prediction: UInt8[np.ndarray, "rows columns"]
    confidence: UInt8[np.ndarray, "rows columns"]
    image: UInt8[np.ndarray, "*rows_and_columns"]
    counted: Bool[np.ndarray, "rows columns"]


@dataclasses.dataclass(frozen=True, eq=False)
class CaseFigures:
    """Sums over the voxels of a case, from which all of its figures follow.

    Attributes:
        name: name of the case.
        bins: count, probability sum and label sum `[3, classes, bins]`.
        boundary_bins: the same of the voxels near a border of the labels; see `near_border`.
        voxels: number of counted voxels.
        squared_error: sum of squared errors of the probabilities.
        nll: sum of negative log-likelihoods: one value for exclusive classes, one for each region otherwise.
        labelled: number of voxels that `nll` sums over.
        overlap, predicted, true: voxels of each class in both maps, in the predicted and in the true one.
        prob_total: sum of probabilities, which is the expected volume.
        prob_inside: sum of probabilities over the voxels that are predicted to be of the class.
        voxel_ml: volume of a voxel in ml.
        sample: voxels that stand for all of them.
        slice: the slice with the most wrong voxels; None where it is not needed.
    """

    name: str
    bins: Float[np.ndarray, "3 classes bins"]
    boundary_bins: Float[np.ndarray, "3 classes bins"]
    voxels: int
    squared_error: Float[np.ndarray, "classes"]
    nll: Float[np.ndarray, "values"]
    labelled: int
    overlap: Int[np.ndarray, "classes"]
    predicted: Int[np.ndarray, "classes"]
    true: Int[np.ndarray, "classes"]
    prob_total: Float[np.ndarray, "classes"]
    prob_inside: Float[np.ndarray, "classes"]
    voxel_ml: float
    sample: Sample
    slice: Slice | None

    def dice(self) -> Float[np.ndarray, "classes"]:
        """Dice of the label maps; NaN where neither has the class."""
        return _ratio(2.0 * self.overlap, self.predicted + self.true)

    def expected_dice(self) -> Float[np.ndarray, "classes"]:
        """Dice that the probabilities themselves expect of the prediction, without any label; see `DEFINITIONS`."""
        return _ratio(2.0 * self.prob_inside, self.predicted + self.prob_total)

    def brier(self) -> Float[np.ndarray, "classes"]:
        """Brier score of each class; NaN where nothing was counted."""
        return _ratio(self.squared_error, np.full(self.squared_error.shape, self.voxels))

    def mean_nll(self) -> Float[np.ndarray, "classes"]:
        """Negative log-likelihood per voxel: that of the case for every class, or of each region."""
        return np.broadcast_to(_ratio(self.nll, np.full(self.nll.shape, self.labelled)), self.dice().shape)

    def save(self, path: Path, key: str) -> None:
        """Writes the figures, whole or not at all; `key` says what they were computed from."""
        arrays = {f"slice_{name}": value for name, value in vars(self.slice).items()} if self.slice else {}
        arrays |= {f"sample_{name}": value for name, value in vars(self.sample).items()}
        arrays |= {name: value for name, value in vars(self).items() if name not in ("sample", "slice")}
        save_arrays(path, key, arrays)

    @classmethod
    def load(cls, path: Path, key: str) -> "CaseFigures | None":
        """Reads figures that `save` wrote; None if there are none, or they were computed from something else."""
        if (arrays := load_arrays(path, key)) is None:
            return None
        own = ("name", "sample", "slice")
        fields = {field.name for field in dataclasses.fields(cls)} - set(own)
        try:
            return cls(
                name=str(arrays["name"]),
                sample=Sample(**_read(arrays, Sample, "sample_")),
                slice=Slice(**_read(arrays, Slice, "slice_")),
                **{name: _scalar(arrays[name]) for name in fields},
            )
        except KeyError:  # another version wrote it
            return None

    @staticmethod
    def load_slice(path: Path) -> Slice:
        """The slice alone of a file that `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            return Slice(**_read(file, Slice, "slice_"))


def measure(case: "Case", bins: Bins) -> CaseFigures:
    """Computes every figure of a case.

    Args:
        case: probabilities, labels, mask, image and spacing of a case.
        bins: how [0, 1] is divided into bins.

    Returns:
        `CaseFigures`; voxels outside of `case.where` are not counted.

    Raises:
        ValueError: if the case has no label, or no voxel counts.

    References:
        Expected Dice: Borges et al., "Soft Dice Confidence", arXiv 2402.10665.
    """
    if case.labels is None:
        raise ValueError(f"{case.name}: there is no label to compare with.")
    if case.where is not None and not case.where.any():
        raise ValueError(f"{case.name}: every voxel has the ignore label, so nothing can be counted.")
    voxels = _Voxels(case)
    chunks = _Sums(voxels, bins)
    for start in range(0, voxels.size, CHUNK):
        chunks.add(start, min(start + CHUNK, voxels.size))
    spacing = (*case.spacing, 1.0, 1.0)[:3]
    return CaseFigures(
        name=case.name,
        bins=chunks.bins,
        boundary_bins=chunks.boundary_bins,
        voxels=chunks.voxels,
        squared_error=chunks.squared_error,
        nll=chunks.nll,
        labelled=chunks.voxels if voxels.regions else int(chunks.true.sum()),
        overlap=chunks.overlap,
        predicted=chunks.predicted,
        true=chunks.true,
        prob_total=chunks.bins[1].sum(-1),
        prob_inside=chunks.prob_inside,
        voxel_ml=float(np.prod(spacing)) / 1000,
        sample=_sample(voxels, chunks),
        slice=_slice(case, voxels, chunks),
    )


class _Voxels:
    """The arrays of a case as rows of voxels, in the order in which the probabilities lie in memory.

    Attributes:
        axes: spatial axes in this order.
        shape: spatial shape in this order.
        probs: `[classes, voxels]`; labels: `[voxels]` or `[regions, voxels]`; where, boundary: `[voxels]`.
        predicted: the label map beside the probabilities, like the labels; None if there is none.
    """

    def __init__(self, case: "Case"):
        assert case.labels is not None
        probs, spatial = case.probs, case.probs.shape[:-1]
        self.axes = sorted(range(len(spatial)), key=lambda axis: -abs(probs.strides[axis]))
        self.shape = tuple(spatial[axis] for axis in self.axes)
        self.probs = probs.transpose(-1 % probs.ndim, *self.axes).reshape(probs.shape[-1], -1)
        self.regions = case.labels.ndim == probs.ndim
        labels = _narrow(case.labels)
        self.labels = self.in_order(labels)
        self.where = None if case.where is None else self.in_order(case.where)
        self.predicted = None if case.predicted is None else self.in_order(case.predicted)
        self.boundary = self.in_order(near_border(labels, case.where, case.spacing))
        self.size = self.probs.shape[1]

    def in_order(self, x: np.ndarray) -> np.ndarray:
        if x.ndim == len(self.axes):
            return x.transpose(self.axes).reshape(-1)
        return x.transpose(-1 % x.ndim, *self.axes).reshape(x.shape[-1], -1)

    def in_space(self, x: np.ndarray) -> np.ndarray:
        """A row of voxels as an array over the spatial axes of the case."""
        return x.reshape(self.shape).transpose(np.argsort(self.axes))


def _narrow(labels: np.ndarray) -> np.ndarray:
    """Class ids in one byte, if they fit: they are compared again and again."""
    fits = labels.dtype != bool and labels.min() >= -128 and labels.max() < 128
    return labels.astype(np.int8) if fits else labels


class _Sums:
    """The sums of `CaseFigures`, and the label map and confidence of every voxel."""

    def __init__(self, voxels: _Voxels, bins: Bins):
        classes = len(voxels.probs)
        self.of, self.bin_options = voxels, bins
        where = slice(None) if voxels.where is None else voxels.where
        self.inner = [
            inner_edges(row if bins.binning != "adaptive" else row[where], bins) for row in voxels.probs
        ]
        self.bins, self.boundary_bins = np.zeros((2, 3, classes, bins.num_bins))
        self.squared_error, self.prob_inside = np.zeros((2, classes))
        self.nll = np.zeros(classes if voxels.regions else 1)
        self.overlap, self.predicted, self.true = np.zeros((3, classes), np.int64)
        self.voxels = 0
        shape = voxels.probs.shape if voxels.regions else (voxels.size,)
        self.prediction = np.zeros(shape, bool if voxels.regions else np.min_scalar_type(classes))
        self.confidence = np.zeros(voxels.size, np.float32)

    def add(self, start: int, stop: int) -> None:
        """Adds the voxels from `start` to `stop`."""
        part = slice(start, stop)
        probs = np.ascontiguousarray(self.of.probs[:, part], np.float32)
        labels, boundary = self.of.labels[..., part], self.of.boundary[part]
        given = None if self.of.predicted is None else self.of.predicted[..., part]
        prediction, confidence = _predicted(probs, given, regions=self.of.regions)
        self.prediction[..., part], self.confidence[part] = prediction, confidence
        if self.of.where is not None and not (keep := self.of.where[part]).all():
            probs, labels, boundary = probs[:, keep], labels[..., keep], boundary[keep]
            prediction, confidence = prediction[..., keep], confidence[keep]
        near = np.flatnonzero(boundary)
        near_probs, near_labels = probs[:, near], labels[..., near]
        self.voxels += probs.shape[1]
        for c, (values, inner) in enumerate(zip(probs, self.inner, strict=True)):
            member, near_member, chosen = (
                x[c] if self.of.regions else x == c for x in (labels, near_labels, prediction)
            )
            self.bins[:, c] += sums_in_bins(values, member, inner, self.bin_options)
            self.boundary_bins[:, c] += sums_in_bins(near_probs[c], near_member, inner, self.bin_options)
            error = np.subtract(values, member, dtype=np.float64)
            self.squared_error[c] += np.square(error, out=error).sum()  # a dot product would start threads
            self.prob_inside[c] += values[chosen].sum(dtype=np.float64)
            self.overlap[c] += np.count_nonzero(member & chosen)
            self.predicted[c] += np.count_nonzero(chosen)
            self.true[c] += np.count_nonzero(member)
        if self.of.regions:
            self._add_likelihoods_of_regions(probs, labels)
        else:
            self._add_likelihoods(probs, labels, np.flatnonzero((confidence < 1) | (prediction != labels)))

    def _add_likelihoods_of_regions(self, probs: np.ndarray, labels: np.ndarray) -> None:
        for c, (values, member) in enumerate(zip(probs, labels, strict=True)):
            right = np.where(member, values, 1 - values.astype(np.float64))
            self.nll[c] -= np.log(np.maximum(right[right < 1], _TINY)).sum()

    def _add_likelihoods(self, probs: np.ndarray, labels: np.ndarray, unsure: np.ndarray) -> None:
        """Adds the voxels `unsure`: in all others the label is predicted with probability 1."""
        ids = labels[unsure]
        known = (ids >= 0) & (ids < len(probs))
        unsure = unsure[known]
        chosen = probs[ids[known], unsure]
        below = chosen < 1
        unsure, chosen = unsure[below], np.maximum(chosen[below].astype(np.float64), _TINY)
        # The sum of the others in float64 keeps the digits that 1 - p in float32 would lose.
        others = probs[:, unsure].sum(0, dtype=np.float64) - chosen
        self.nll[0] += np.log1p(np.maximum(others, 0) / chosen).sum()


def near_border(
    labels: Int[np.ndarray, "*spatial"] | Bool[np.ndarray, "*spatial regions"],
    where: Bool[np.ndarray, "*spatial"] | None = None,
    spacing: tuple[float, ...] | None = None,
) -> Bool[np.ndarray, "*spatial"]:
    """Whether each voxel lies within two voxels of a border between labels, stepping from face to face.

    Axes whose spacing exceeds three times the smallest one are left out: their neighbours are too far away. Borders
    of voxels that do not count are no borders.

    Args:
        labels: class ids, or memberships of regions; a border of any region is a border.
        where: voxels that count; None counts all.
        spacing: millimetres from voxel to voxel along each axis; None for equal ones.

    Example:
        >>> near_border(np.array([0, 0, 0, 0, 1, 1, 1, 1])).tolist()
        [False, False, True, True, True, True, False, False]
    """
    ndim = labels.ndim if labels.dtype != bool else labels.ndim - 1
    spacing = spacing or (1.0,) * ndim
    axes = [axis for axis in range(ndim) if spacing[axis] <= 3 * min(spacing)]
    shaped_alike = labels if labels.ndim == ndim else labels[..., 0]
    found = np.zeros_like(shaped_alike, bool)  # in the same order in memory
    box = _bounding_box(np.any(labels, -1) if labels.dtype == bool else np.not_equal(labels, 0))
    if box is None:
        return found
    box = tuple(slice(max(x.start - BORDER_VOXELS, 0), x.stop + BORDER_VOXELS) for x in box)
    inside, near = labels[box], found[box]
    counted = None if where is None else where[box]
    for axis in axes:
        below, above = _neighbours(axis)
        differs = inside[below] != inside[above]
        if differs.ndim > ndim:
            differs = differs.any(-1)
        if counted is not None:
            differs &= counted[below] & counted[above]
        near[below] |= differs
        near[above] |= differs
    for _ in range(BORDER_VOXELS - 1):
        reached = near.copy("K")
        for axis in axes:
            below, above = _neighbours(axis)
            near[below] |= reached[above]
            near[above] |= reached[below]
    return found


def _neighbours(axis: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    before = (slice(None),) * axis
    return (*before, slice(None, -1)), (*before, slice(1, None))


def _bounding_box(mask: Bool[np.ndarray, "*spatial"]) -> tuple[slice, ...] | None:
    """The smallest box that holds all true voxels; None if there is none."""
    box = []
    for axis in range(mask.ndim):
        found = np.flatnonzero(mask.any(tuple(other for other in range(mask.ndim) if other != axis)))
        if not found.size:
            return None
        box.append(slice(int(found[0]), int(found[-1]) + 1))
    return tuple(box)


def _predicted(
    probs: Float[np.ndarray, "classes voxels"], given: np.ndarray | None, *, regions: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Prediction, class ids or memberships, and its probability; of regions, the least certain one's.

    The prediction is the given label map; without one, the most probable class, or the regions above 1/2.
    """
    if regions:
        chosen = probs > 0.5 if given is None else given
        return chosen, np.where(chosen, probs, 1 - probs).min(0)
    if given is not None:
        confidence = np.zeros(given.shape, np.float32)
        for c, values in enumerate(probs):
            np.copyto(confidence, values, where=given == c)
        return given, confidence
    best, winner = probs[0].copy(), np.zeros(probs.shape[1], np.min_scalar_type(len(probs)))
    for c, values in enumerate(probs[1:], 1):
        better = values > best
        winner[better] = c
        np.maximum(best, values, out=best)
    return winner, best


def _sample(voxels: _Voxels, sums: _Sums) -> Sample:
    """A stratified sample: uncertain voxels, which decide about calibration, and some of the others."""
    rng = np.random.default_rng(voxels.size)
    most = max(_SAMPLED_VALUES // len(voxels.probs), 64)
    picked, weights = [], []
    certain = sums.confidence >= _CERTAIN
    for is_certain, number in zip((False, True), _SAMPLED, strict=True):
        stratum = certain if is_certain else ~certain
        if voxels.where is not None:
            stratum = stratum & voxels.where
        size = int(np.count_nonzero(stratum))
        drawn = _at_ranks(stratum, _drawn(rng, size, min(number, most)))
        picked.append(drawn)
        weights.append(np.full(drawn.size, size / max(drawn.size, 1)))
    index = np.concatenate(picked)
    return Sample(
        np.ascontiguousarray(voxels.probs[:, index].T, np.float32),
        np.ascontiguousarray(voxels.labels[..., index].T, bool if voxels.regions else np.int32),
        np.concatenate(weights),
    )


def _drawn(rng: np.random.Generator, size: int, number: int) -> np.ndarray:
    """Indices without repetition: all of them, or one from each of `number` equal stretches."""
    if size <= number:
        return np.arange(size)
    ends = np.arange(number + 1) * size // number
    return ends[:-1] + (rng.random(number) * np.diff(ends)).astype(np.intp)


def _at_ranks(mask: Bool[np.ndarray, "voxels"], ranks: Int[np.ndarray, "drawn"]) -> Int[np.ndarray, "drawn"]:
    """`np.flatnonzero(mask)[ranks]`, without a list of all true voxels, which is eight times the mask.

    Example:
        >>> _at_ranks(np.array([False, True, True, False, True]), np.array([0, 2])).tolist()
        [1, 4]
    """
    blocks = np.zeros(-(-mask.size // _BLOCK) * _BLOCK, bool)
    blocks[: mask.size] = mask
    blocks = blocks.reshape(-1, _BLOCK)
    ends = np.count_nonzero(blocks, axis=1).cumsum()
    block = np.searchsorted(ends, ranks, side="right")
    rank = ranks - np.concatenate([[0], ends])[block]
    return block * _BLOCK + (blocks[block].cumsum(1, dtype=np.int16) <= rank[:, None]).sum(1)


def _slice(case: "Case", voxels: _Voxels, sums: _Sums) -> Slice:
    assert case.labels is not None
    label, prediction = (_as_map(x, voxels, sums.true) for x in (voxels.labels, sums.prediction))
    confidence = voxels.in_space(sums.confidence)
    counted = np.ones_like(label, bool) if case.where is None else case.where
    index = -1
    image = case.image
    if label.ndim == 3:
        # Across the thickest slices; of equal ones across the last axis.
        axis = max(range(3), key=lambda a: (round(case.spacing[a], 3), a))
        others = tuple(a for a in range(3) if a != axis)
        wrong = np.count_nonzero((label != prediction) & counted, axis=others)
        area = np.count_nonzero(label, axis=others)
        index = int(np.lexsort((-abs(np.arange(wrong.size) - wrong.size // 2), area, wrong))[-1])
        here = (*[slice(None)] * axis, index)  # a view; `take` would copy the volume first
        label, prediction, confidence, counted = (
            np.rot90(x[here]) for x in (label, prediction, confidence, counted)
        )
        image = None if image is None else np.rot90(image[here])
    box = _bounding_box((label > 0) | (prediction > 0)) or tuple(slice(0, n) for n in label.shape)
    box = tuple(slice(max(x.start - _MARGIN, 0), x.stop + _MARGIN) for x in box)
    step = max(-(-n // _LARGEST_SLICE) for n in label[box].shape)
    box = tuple(slice(x.start, x.stop, step) for x in box)
    return Slice(
        index=index,
        label=np.ascontiguousarray(label[box]),
        prediction=np.ascontiguousarray(prediction[box]),
        confidence=np.rint(255 * np.clip(confidence[box], 0, 1)).astype(np.uint8),
        image=np.zeros((0, 0), np.uint8) if image is None else _grey(image[box]),
        counted=np.ascontiguousarray(counted[box]),
    )


def _as_map(x: np.ndarray, voxels: _Voxels, size: np.ndarray) -> UInt8[np.ndarray, "*spatial"]:
    """Class ids as uint8, 0 for those outside of the classes; regions from the largest to the smallest."""
    if not voxels.regions:
        return voxels.in_space(np.where((x >= 0) & (x < min(len(voxels.probs), 256)), x, 0).astype(np.uint8))
    painted = np.zeros(voxels.size, np.uint8)
    for region in np.argsort(-size, kind="stable"):
        painted[x[region]] = region + 1
    return voxels.in_space(painted)


def _grey(image: np.ndarray) -> UInt8[np.ndarray, "rows columns"]:
    finite = np.where(np.isfinite(image), image, 0)
    low, high = np.percentile(finite, (1, 99))
    return np.rint(255 * np.clip((finite - low) / max(high - low, 1e-12), 0, 1)).astype(np.uint8)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> Float[np.ndarray, "values"]:
    """The quotient in float64, NaN where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)


def _read(file: Any, of: type, prefix: str) -> dict[str, Any]:
    return {field.name: _scalar(file[prefix + field.name]) for field in dataclasses.fields(of)}


def _scalar(x: np.ndarray) -> Any:
    return x.item() if x.ndim == 0 else x
