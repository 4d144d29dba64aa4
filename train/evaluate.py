"""Cases in, bin statistics and Dice per case and class out."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

import calib_jax
from calib_jax import BinStatistics
from calib_jax.report import ModelResult
from train.data import Case, Dataset

NUM_BINS = 20
# Voxels are padded to a multiple of this, so that cases of many sizes share a few compiled programs.
_VOXELS = 2**16

# An image `[*spatial, channels]` to class probabilities `[*spatial, classes]` on the same grid.
Predict = Callable[[np.ndarray], np.ndarray]


def evaluate(name: str, predict: Predict, dataset: Dataset, case_names: Sequence[str]) -> ModelResult:
    """Statistics and Dice of the foreground classes over whole volumes, 20 bins, per case.

    Args:
        name: how the model is called in tables.
        predict: an image's class probabilities, on its own grid.
        dataset: where the cases come from.
        case_names: the cases to evaluate.
    """
    return _collect(name, lambda case: predict(case.image), dataset, case_names)


def evaluate_posterior(dataset: Dataset, case_names: Sequence[str]) -> ModelResult | None:
    """The same for the probabilities that the labels were drawn from, where the data set knows them.

    No network can be calibrated better on these cases but by chance: what error is left comes from the
    finite number of voxels, and from neighbouring labels being drawn together.
    """
    if dataset.load(0).posterior is None:
        return None
    return _collect("true posterior", lambda case: np.asarray(case.posterior), dataset, case_names)


def _collect(
    name: str, probabilities: Callable[[Case], np.ndarray], dataset: Dataset, case_names: Sequence[str]
) -> ModelResult:
    index_of = {case: index for index, case in enumerate(dataset.case_names)}
    rows = []
    for case_name in tqdm(case_names, f"evaluating {name}", unit="case", leave=False):
        case = dataset.load(index_of[case_name])
        rows.append(jax.device_get(case_statistics(probabilities(case), case.label)))
    stats = jax.tree.map(lambda *parts: np.stack(parts), *[stats for stats, _ in rows])
    dice = np.stack([dice for _, dice in rows])
    return ModelResult(name, tuple(case_names), dataset.class_names[1:], stats, dice)


def case_statistics(
    probs: Float[np.ndarray, "*spatial classes"], label: UInt8[np.ndarray, "*spatial"]
) -> tuple[BinStatistics, Float[Array, "foreground"]]:
    """Bin statistics and Dice of one case's foreground classes, without background."""
    flat_probs, flat_label = probs.reshape(-1, probs.shape[-1]), label.reshape(-1)
    padding = -len(flat_label) % _VOXELS
    where = np.arange(len(flat_label) + padding) < len(flat_label)
    return _flat_statistics(
        np.pad(flat_probs, ((0, padding), (0, 0))), np.pad(flat_label, (0, padding)), where
    )


@jax.jit
def _flat_statistics(
    probs: Float[Array, "voxels classes"], label: UInt8[Array, "voxels"], where: Array
) -> tuple[BinStatistics, Array]:
    label = label.astype(jnp.int32)
    # Padding is background in both maps, and background is not reported.
    predicted = jnp.where(where, probs.argmax(-1), 0)
    dice = calib_jax.dice_score(predicted[None], label[None], num_classes=probs.shape[-1])
    stats = calib_jax.bin_statistics(
        probs[None, :, 1:], label[None] - 1, num_bins=NUM_BINS, where=where[None]
    )
    return jax.tree.map(lambda a: a[0], stats), dice[0, 1:]
