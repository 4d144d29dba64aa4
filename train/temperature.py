"""Temperature scaling of a trained network: fitted on cases that the network was not trained on."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, UInt8

import calib_jax
from calib_jax._notes import warnings_as_notes
from train.data import Dataset
from train.data.case import ids_of
from train.data.ignore import mask_ignored
from train.data.pipeline import CachedCases
from train.data.transforms import pad_to_hold
from train.errors import InputError
from train.inference import Network, VolumePredictor, cut_windows
from train.losses import Regions, as_pairs


@dataclass(frozen=True)
class Tempered:
    """A network whose logits are divided by a temperature. Its weights are (the network's weights, temperature)."""

    network: Network

    @property
    def regions(self) -> tuple[str, ...]:
        """Name of the region of each output channel, for sigmoids; empty for a softmax over classes."""
        return self.network.regions

    def __call__(
        self, weights: Any, images: Float[Array, "batch *patch channels"]
    ) -> Float32[Array, "batch *patch classes"]:
        """Softmax or sigmoids of the logits over the temperature."""
        network_weights, temperature = weights
        logits = self.network.logits(network_weights, images)
        return self.network.probabilities(calib_jax.apply_temperature(logits, temperature))


@dataclass(frozen=True)
class _Logits:
    network: Network

    def __call__(self, weights: Any, images: Array) -> Array:
        return self.network.logits(weights, images)


def temper(predict: VolumePredictor, temperature: Float32[Array, ""]) -> VolumePredictor:
    """`predict` with the logits of its network divided by `temperature` in each sliding window."""
    assert isinstance(predict.forward, Network)
    return replace(
        predict, forward=Tempered(predict.forward), weights=(predict.weights, np.asarray(temperature))
    )


def fit_temperature(
    predict: VolumePredictor, dataset: Dataset, case_names: Sequence[str]
) -> Float32[Array, ""]:
    """Fits the temperature that minimises the mean negative log-likelihood over the voxels of whole cases.

    Volumes larger than the patch count through all their sliding windows, each window by itself. Voxels without a
    label are left out. Sigmoids share one temperature, fitted to the likelihood of all regions.

    Args:
        predict: a trained `Network`.
        dataset: the data set of the cases.
        case_names: cases that the network was not trained on. They are kept in memory; their logits are not.

    Raises:
        InputError: if no temperature can be fitted, for example because no voxel has a label.
    """
    assert isinstance(predict.forward, Network)
    cases = CachedCases(dataset, case_names)
    regions = ids_of(dataset, predict.regions)
    logits = _Logits(predict.forward)

    def batches() -> Iterator[tuple[Array, Array, Array]]:
        for index in range(len(cases)):
            _, case = cases[index]
            plan = predict.plan(case.image.shape[:-1])
            labelled = mask_ignored(case.label)[1] if dataset.has_ignore else np.ones_like(case.label, bool)
            known = np.stack([case.label, labelled.astype(case.label.dtype)], -1)
            image, known = (jax.device_put(pad_to_hold(x, plan.canvas)) for x in (case.image, known))
            for corners, counted in zip(plan.corners, plan.counted, strict=True):
                scores = predict.on_windows(logits, image, corners)
                yield _observations(scores, cut_windows(known, corners, predict.patch), counted, regions)

    with warnings_as_notes("fitting the temperature"):
        try:
            return calib_jax.fit_temperature(batches)
        except ValueError as error:
            raise InputError(f"No temperature can be fitted on {', '.join(case_names)}: {error}") from error


@functools.partial(jax.jit, static_argnames="regions")
def _observations(
    logits: Float[Array, "windows *patch classes"],
    known: UInt8[Array, "windows *patch two"],
    counted: Bool[Array, "windows"],
    regions: Regions,
) -> tuple[Array, Array, Array]:
    """Logits, labels and the mask of voxels to count, of windows whose `known` are class ids and that mask.

    Their shape is `[windows, *patch, ...]`, or `[windows * regions, *patch, ...]` for a network with sigmoids, see
    `as_pairs`.
    """
    labels, where = known[..., 0].astype(jnp.int32), known[..., 1] == 1
    where &= jnp.expand_dims(counted, tuple(range(1, labels.ndim)))
    if regions:
        logits, labels = as_pairs(logits, labels, regions)
        where = jnp.repeat(where, len(regions), axis=0)
    return logits, labels, where
