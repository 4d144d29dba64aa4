"""Cases in, bin statistics and Dice per case and class out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Num, UInt8

import calib_jax
from calib_jax import BinStatistics, metrics
from calib_jax.report import ModelResult
from train.data import Case, Dataset, mask_ignored, region_ids
from train.inference import VolumePredictor
from train.processes import is_first, join_shares, own_share
from train.progress import progress

NUM_BINS = 20
# Voxels are padded to a multiple of this, so that cases of many sizes share a few compiled programs.
_VOXELS = 2**16

# Class ids, or their shares among several annotators.
Label = Integer[Array, "*voxels"] | Float[Array, "*voxels classes"]
# What is reported in place of the classes: (probs [..., classes], labels) -> (probs [..., regions], labels,
# either ids of regions [...] or an array like those probs). Linear in probs: a region's probability is a sum
# of class probabilities.
Regions = Callable[[Array, Array], tuple[Array, Array]]


def foreground(
    probs: Float[Array, "*voxels classes"], label: Label
) -> tuple[Float[Array, "*voxels foreground"], Label]:
    """Every class but background, whose voxels get id -1: they are of no class."""
    return probs[..., 1:], label[..., 1:] if label.ndim == probs.ndim else label.astype(jnp.int32) - 1


@dataclass(frozen=True)
class SumsOfClasses:
    """Regions that are made of classes and may overlap, as those of BraTS do.

    Attributes:
        groups: class ids of each region.
    """

    groups: tuple[tuple[int, ...], ...]

    def __call__(
        self, probs: Float[Array, "*voxels classes"], label: Label
    ) -> tuple[Float[Array, "*voxels regions"], Num[Array, "*voxels regions"]]:
        if label.ndim == probs.ndim:
            return self._sums(probs), self._sums(label)
        members = self.members(label)
        return self._sums(probs), members

    def members(self, label: Int[Array, "*voxels"]) -> UInt8[Array, "*voxels regions"]:
        """1 where a class id belongs to the region, else 0."""
        members = [jnp.isin(label, jnp.array(ids, label.dtype)) for ids in self.groups]
        return jnp.stack(members, -1).astype(jnp.uint8)

    def _sums(self, shares: Float[Array, "*voxels classes"]) -> Float[Array, "*voxels regions"]:
        return jnp.stack([shares[..., list(ids)].sum(-1) for ids in self.groups], -1)


@dataclass(frozen=True)
class OwnRegions(SumsOfClasses):
    """Regions whose probabilities the network gives itself, each by a sigmoid; only the labels are of classes."""

    def __call__(
        self, probs: Float[Array, "*voxels regions"], label: Label
    ) -> tuple[Float[Array, "*voxels regions"], Num[Array, "*voxels regions"]]:
        return probs, self.members(label) if label.ndim < probs.ndim else self._sums(label)


def regions_of(dataset: Dataset, predicted: Sequence[str] = ()) -> tuple[Regions, tuple[str, ...]]:
    """What is reported of a data set, and its names: regions or, without any, the foreground classes.

    Of a network with sigmoids these are the regions that it has `predicted`, in that order.
    """
    if predicted:
        ids = region_ids(dataset)
        return OwnRegions(tuple(ids[name] for name in predicted)), tuple(predicted)
    if not dataset.regions:
        return foreground, dataset.class_names[1:]
    return SumsOfClasses(tuple(dataset.regions.values())), tuple(dataset.regions)


@dataclass(frozen=True)
class CaseStatistics:
    """Bin statistics and Dice of each region of a case, as a `train.inference.Summary`.

    Attributes:
        regions: what is reported; a function that stays the same one, since programs are kept by it.
        has_ignore: whether voxels may have no label; these are left out.
    """

    regions: Regions = foreground
    has_ignore: bool = False

    def __call__(
        self,
        probs: Float[Array, "*spatial classes"],
        label: UInt8[Array, "*spatial"] | Float[Array, "*spatial classes"],
        where: Bool[Array, "*spatial"],
    ) -> tuple[BinStatistics, Float[Array, "regions"]]:
        """Bins are filled with the shares of a soft label; Dice is that of its most frequent class.

        Predicted are the classes of largest probability or, under sigmoids, the regions more probable than not.
        """
        if self.has_ignore:
            label, labelled = mask_ignored(label)
            where = where & labelled
        shares = label.reshape(1, -1, label.shape[-1]) if label.ndim == probs.ndim else None
        ids = label if shares is None else label.argmax(-1)
        probs = probs.reshape(1, -1, probs.shape[-1])
        ids, where = ids.reshape(1, -1).astype(jnp.int32), where.reshape(1, -1)
        region_probs, region_label = self.regions(probs, ids if shares is None else shares)
        stats = calib_jax.bin_statistics(region_probs, region_label, num_bins=NUM_BINS, where=where)
        # As certain probabilities, the predicted label map falls into regions in the same way.
        own = isinstance(self.regions, OwnRegions)
        certain = probs if own else jax.nn.one_hot(probs.argmax(-1), probs.shape[-1])
        certain_regions, region_ids = self.regions(certain, ids)
        members = _members(region_ids, region_probs)
        dice = metrics.dice_of_counts(
            *metrics.overlap_counts(certain_regions > 0.5, members, where[..., None])
        )
        return jax.tree.map(lambda a: a[0], (stats, dice))


def _members(label: Array, probs: Array) -> Bool[Array, "one voxels regions"]:
    """Which regions each voxel is of."""
    return label > 0.5 if label.ndim == probs.ndim else metrics.is_class(label, probs.shape[-1])


_statistics = jax.jit(
    lambda statistics, probs, label, where: statistics(probs, label, where), static_argnums=0
)


def evaluate(name: str, predict: VolumePredictor, dataset: Dataset, case_names: Sequence[str]) -> ModelResult:
    """Statistics and Dice of whole volumes, 20 bins, per case and foreground class, or region where there are any.

    They are those of the file's own grid, to which probabilities are interpolated where the network sees another
    one: figures then mean the same whatever the spacing. Several annotators count by their shares of each class.
    Voxels without a label are left out; a case without any other has NaN.

    Args:
        name: how the model is called in tables.
        predict: the model.
        dataset: where the cases come from.
        case_names: the cases to evaluate.
    """
    regions, names = regions_of(dataset, predict.regions)
    summary = CaseStatistics(regions, dataset.has_ignore)

    def statistics(case: Case) -> tuple[BinStatistics, Array]:
        if case.source is None and case.annotations is None:
            return predict.summary(summary, case.image, case.label)
        probs = predict(case.image)
        if case.source is not None:
            probs = case.source.placement.back(probs, background=not predict.regions)
        truth = case.truth(len(dataset.class_names))
        return case_statistics(probs, truth, regions=regions, has_ignore=dataset.has_ignore)

    return _collect(name, statistics, dataset, case_names, names)


def evaluate_posterior(
    dataset: Dataset, case_names: Sequence[str], region_names: Sequence[str] = ()
) -> ModelResult | None:
    """The same for the probabilities that the labels were drawn from, where the data set knows them.

    Reported are the named regions; without names, what `evaluate` reports of a softmax.

    No network can be calibrated better on these cases but by chance: what error is left comes from the
    finite number of voxels, and from neighbouring labels being drawn together.
    """
    if dataset.load(0).posterior is None:
        return None
    regions, names = regions_of(dataset)
    if tuple(region_names or names) != names:
        names, ids = tuple(region_names), region_ids(dataset)
        regions = SumsOfClasses(tuple(ids[name] for name in names))
    return _collect(
        "true posterior",
        lambda case: case_statistics(
            np.asarray(case.posterior), case.label, regions=regions, has_ignore=dataset.has_ignore
        ),
        dataset,
        case_names,
        names,
    )


def _collect(
    name: str,
    statistics: Callable[[Case], tuple[BinStatistics, Array]],
    dataset: Dataset,
    case_names: Sequence[str],
    region_names: Sequence[str],
) -> ModelResult:
    index_of = {case: index for index, case in enumerate(dataset.case_names)}
    rows: list[tuple[BinStatistics, Array]] = []
    share = own_share(case_names)
    for case_name in progress(share, desc=f"evaluating {name}", leave=False, disable=not is_first()):
        case = dataset.load(index_of[case_name])
        # Waits for the case before only now that this one is read; and no more than two are held at a time.
        rows[-1:] = jax.device_get(rows[-1:])
        rows.append(statistics(case))
    rows = jax.device_get(rows)
    stats = jax.tree.map(lambda *parts: np.stack(parts), *[stats for stats, _ in rows])
    dice = np.stack([dice for _, dice in rows])
    stats, dice = join_shares((stats, dice), len(case_names))
    return ModelResult(name, tuple(case_names), tuple(region_names), stats, dice)


def case_statistics(
    probs: Float[np.ndarray, "*spatial classes"],
    label: UInt8[np.ndarray, "*spatial"] | Float[np.ndarray, "*spatial classes"],
    *,
    regions: Regions = foreground,
    has_ignore: bool = False,
) -> tuple[BinStatistics, Float[Array, "regions"]]:
    """Bin statistics and Dice of a case whose probabilities are at hand."""
    voxels = np.prod(probs.shape[:-1], dtype=int)
    padding = -voxels % _VOXELS
    where = np.arange(voxels + padding) < voxels
    flat = [array.reshape(voxels, *array.shape[probs.ndim - 1 :]) for array in (probs, label)]
    padded = [np.pad(array, [(0, padding), *[(0, 0)] * (array.ndim - 1)]) for array in flat]
    return _statistics(CaseStatistics(regions, has_ignore), *padded, where)
