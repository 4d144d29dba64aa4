"""Cases in, bin statistics and Dice per case and class out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Num, UInt8

import calib_jax
from calib_jax import BinStatistics, LocalCalibration, metrics
from calib_jax._devices import on_one_device
from calib_jax._eager import fill_up, filled_size
from calib_jax._labels import are_dense, memberships
from calib_jax.results import ModelResult
from train.data import Case, Dataset
from train.data.case import region_ids
from train.data.ignore import mask_ignored
from train.data.shapes import Ids, Shares
from train.inference import VolumePredictor, jitted
from train.local_calibration import calibrate
from train.processes import is_first, join_shares, own_share
from train.progress import progress

NUM_BINS = 20
# Cases are filled up to at least so many voxels: small ones then share a compiled program.
_FEWEST_VOXELS = 2**16

# Class ids, or the share of each class among several annotators.
Label = Integer[Array, "*voxels"] | Float[Array, "*voxels classes"]
# A function from classes to the regions that are reported: (probs [..., classes], labels) -> (probs [..., regions],
# labels, either region ids [...] or an array of the shape of those probs). It is linear in probs: a region's
# probability is a sum of class probabilities.
Regions = Callable[[Array, Array], tuple[Array, Array]]


@dataclass(frozen=True)
class SumsOfClasses:
    """Regions that consist of classes and may overlap, as in BraTS.

    Attributes:
        groups: class ids of each region.
        predicted: whether the probabilities are the network's own sigmoids, so that only the labels hold classes.
    """

    groups: tuple[tuple[int, ...], ...]
    predicted: bool = False

    def __call__(
        self, probs: Float[Array, "*voxels classes"], label: Label
    ) -> tuple[Float[Array, "*voxels regions"], Num[Array, "*voxels regions"]]:
        sums = probs if self.predicted else self._sums(probs)
        if are_dense(label, probs):
            return sums, self._sums(label)
        # 1 where the class id belongs to the region, else 0.
        members = [jnp.isin(label, jnp.array(ids, label.dtype)) for ids in self.groups]
        return sums, jnp.stack(members, -1).astype(jnp.uint8)

    def _sums(self, shares: Float[Array, "*voxels classes"]) -> Float[Array, "*voxels regions"]:
        # Masks, since a selection of classes would be a copy on a TPU.
        axes = (1,) * (shares.ndim - 1)
        masks = (np.isin(np.arange(shares.shape[-1]), ids).reshape(*axes, -1) for ids in self.groups)
        return jnp.stack([jnp.where(mask, shares, 0).sum(-1) for mask in masks], -1)


def regions_of(
    dataset: Dataset, names: Sequence[str] = (), *, predicted: bool = False
) -> tuple[Regions | None, tuple[str, ...]]:
    """The regions to report for a data set, None for its foreground classes, and their names.

    Args:
        dataset: of the cases.
        names: of the regions; empty for the data set's regions or, if it has none, its foreground classes.
        predicted: whether a network with sigmoids predicted these regions.
    """
    ids = region_ids(dataset)
    names = tuple(names or ids)
    if not predicted and not dataset.regions and names == tuple(ids):
        return None, names
    return SumsOfClasses(tuple(ids[name] for name in names), predicted), names


@dataclass(frozen=True)
class CaseStatistics:
    """Bin statistics and Dice of each region of a case: a `train.inference.Summary`.

    Attributes:
        regions: to report; None for all classes but the background. The function is part of the key of compiled
            programs.
        has_ignore: whether voxels may be unlabelled; these are left out.
    """

    regions: Regions | None = None
    has_ignore: bool = False

    def __call__(
        self,
        probs: Float[Array, "*spatial classes"],
        label: UInt8[Array, "*spatial"] | Float[Array, "*spatial classes"],
        where: Bool[Array, "*spatial"],
    ) -> tuple[BinStatistics, Float[Array, "regions"]]:
        """Soft labels fill bins by their shares, and count for Dice as their most frequent class.

        The prediction is the class of largest probability or, under sigmoids, each region above 1/2.
        """
        if self.has_ignore:
            label, labelled = mask_ignored(label)
            where = where & labelled
        probs, label, where = probs[None], label[None], where[None]
        ids = label.argmax(-1) if are_dense(label, probs) else label
        if self.regions is None:
            # The background is left out at the end: a slice of the probabilities would be a copy on a TPU.
            first, predicted, true = 1, *(memberships(x, probs.shape[-1]) for x in (probs.argmax(-1), ids))
        else:
            first, (predicted, true) = 0, _region_maps(self.regions, probs, ids)
            probs, label = self.regions(probs, label)
        stats = calib_jax.bin_statistics(probs, label, num_bins=NUM_BINS, where=where)
        dice = metrics.dice_of_counts(*metrics.overlap_counts(predicted, true, where[..., None]))
        return jax.tree.map(lambda a: a[0, first:], (stats, dice))


def _region_maps(regions: Regions, probs: Array, ids: Array) -> tuple[Array, Array]:
    """Whether each voxel is predicted to belong to each region, and whether it does."""
    # The predicted label map, as probabilities of 0 and 1, maps to regions as they do.
    predicted = isinstance(regions, SumsOfClasses) and regions.predicted
    certain = probs if predicted else jax.nn.one_hot(probs.argmax(-1), probs.shape[-1])
    of_map, true = regions(certain, ids)
    dense = are_dense(true, of_map)
    return of_map > 0.5, true > 0.5 if dense else memberships(true, of_map.shape[-1])


def evaluate(
    name: str,
    predict: VolumePredictor,
    dataset: Dataset,
    case_names: Sequence[str],
    local: LocalCalibration | None = None,
) -> ModelResult:
    """Evaluates whole volumes: bin statistics (20 bins) and Dice per case and foreground class or region.

    A scan is evaluated on its original grid, to which the probabilities of a resampled scan are interpolated,
    so that figures do not depend on the spacing. Several annotators count by their shares of each class.
    Unlabelled voxels are left out; a case without a labelled voxel gives NaN.

    Args:
        name: of the model in tables.
        predict: the model.
        dataset: the data set of the cases.
        case_names: the cases to evaluate.
        local: calibrates the probabilities. Dice stays that of the network's labels.
    """
    regions, names = regions_of(dataset, predict.regions, predicted=bool(predict.regions))
    summary = CaseStatistics(regions, dataset.has_ignore)

    def statistics(case: Case) -> tuple[BinStatistics, Array]:
        if case.source is None and case.annotations is None and local is None:
            return predict.summary(summary, case.image, case.label)
        probs = predict(case.image)
        stats, dice = of_probs(case, probs)
        if local is not None:
            stats, _ = of_probs(case, calibrate(probs, case.image, local))
        return stats, dice

    def of_probs(case: Case, probs: Shares) -> tuple[BinStatistics, Array]:
        if case.source is not None:
            probs = case.source.placement.back(probs, background=not predict.regions)
        truth = case.truth(len(dataset.class_names))
        return case_statistics(probs, truth, regions=regions, has_ignore=dataset.has_ignore)

    return _collect(name, statistics, dataset, case_names, names)


def evaluate_posterior(
    dataset: Dataset, case_names: Sequence[str], region_names: Sequence[str] = ()
) -> ModelResult | None:
    """Evaluates the probabilities that the labels were drawn from; None if the data set does not know them.

    It reports the named regions; without names, the regions that `evaluate` reports for a softmax.

    No network is better calibrated on these cases, except by chance. The remaining error comes from the finite
    number of voxels, and from neighbouring labels that are drawn together.
    """
    if dataset.load(0).posterior is None:
        return None
    regions, names = regions_of(dataset, region_names)

    def statistics(case: Case) -> tuple[BinStatistics, Array]:
        posterior = np.asarray(case.posterior)
        return case_statistics(posterior, case.label, regions=regions, has_ignore=dataset.has_ignore)

    return _collect("true posterior", statistics, dataset, case_names, names)


def _collect(
    name: str,
    statistics: Callable[[Case], tuple[BinStatistics, Array]],
    dataset: Dataset,
    case_names: Sequence[str],
    region_names: Sequence[str],
) -> ModelResult:
    index_of = {case: index for index, case in enumerate(dataset.case_names)}
    subjects = tuple(dataset.subjects[index_of[case]] for case in case_names)
    rows: list[tuple[BinStatistics, Array]] = []
    share = own_share(case_names)
    for case_name in progress(share, desc=f"evaluating {name}", leave=False, disable=not is_first()):
        case = dataset.load(index_of[case_name])
        # Wait for the previous case only after this one is read. At most two cases are held at a time.
        rows[-1:] = jax.device_get(rows[-1:])
        rows.append(statistics(case))
    rows = jax.device_get(rows)
    stats = jax.tree.map(lambda *parts: np.stack(parts), *[stats for stats, _ in rows])
    dice = np.stack([dice for _, dice in rows])
    stats, dice = join_shares((stats, dice), len(case_names))
    return ModelResult(name, tuple(case_names), tuple(region_names), stats, dice, subjects=subjects)


def case_statistics(
    probs: Float[np.ndarray, "*spatial classes"],
    label: Ids | Float[np.ndarray, "*spatial classes"],
    *,
    regions: Regions | None = None,
    has_ignore: bool = False,
) -> tuple[BinStatistics, Float[Array, "regions"]]:
    """Bin statistics and Dice of a case from its probabilities."""
    voxels = probs.shape[:-1]
    size = filled_size(max(math.prod(voxels), _FEWEST_VOXELS))
    arrays = (fill_up(x[None], len(voxels), size)[0] for x in (probs, label, np.ones(voxels, bool)))
    return on_one_device(jitted(CaseStatistics(regions, has_ignore)), *arrays)
