"""Whole volumes through a network that sees patches, in one program on the device.

A volume is padded to a canvas that volumes of similar size share, and seen through windows that overlap. Where
they lie is data to the program, and so is the volume's size: a few compiled programs serve a data set of many
sizes. What is to be known of the probabilities may be computed in the same program, so that they never leave
the device.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Shaped, UInt8

from train import cpu
from train.data import crop_back, pad_to_hold
from train.sharding import on_first_device
from train.step import TrainState

_VOXELS_AT_ONCE = 4 * 128**3  # of windows, in evaluation

# (weights, patches [batch, *patch, channels]) -> probabilities [batch, *patch, classes], which sum to 1 over
# classes unless the function has `regions`, see `Network`.
Forward = Callable[[Any, Array], Array]
# (probabilities [*canvas, classes], labels [*canvas], where [*canvas]) -> whatever is wanted of them. What `where`
# leaves out is padding.
Summary = Callable[[Array, Array, Array], Any]


@dataclass(frozen=True)
class Network:
    """The `Forward` of a Flax model, dropout off; its weights are (params, rest).

    Equal to another of the same model, so that compiled programs are found again.

    Attributes:
        graphdef: the model's static part.
        regions: the region of each channel, whose probability is a sigmoid; empty for a softmax over classes.
    """

    graphdef: nnx.GraphDef
    regions: tuple[str, ...] = ()

    def __call__(
        self, weights: Any, images: Float[Array, "batch *patch channels"]
    ) -> Float[Array, "batch *patch classes"]:
        return self.probabilities(self.logits(weights, images))

    def probabilities(
        self, logits: Float[Array, "batch *patch classes"]
    ) -> Float[Array, "batch *patch classes"]:
        """The softmax of `logits`, or the sigmoids."""
        return jax.nn.sigmoid(logits) if self.regions else jax.nn.softmax(logits)

    def logits(
        self, weights: Any, images: Float[Array, "batch *patch channels"]
    ) -> Float32[Array, "batch *patch classes"]:
        """What the model gives before the softmax or the sigmoids."""
        model = nnx.merge(self.graphdef, *weights)
        model.eval()
        return model(images).astype(jnp.float32)


@dataclass(frozen=True)
class VolumePredictor:
    """A trained network on volumes of any size.

    A volume that fits into the patch is padded to it and seen at once. A larger one is seen through windows
    that overlap; their probabilities are averaged with Gaussian weights, which trust a window's centre more
    than its rim.

    Attributes:
        forward: patches to probabilities; hashable, since programs are kept by it.
        weights: its first argument, any pytree of arrays.
        patch: window, in voxels.
        overlap: share of a window that the next one covers again, at least.
        windows_per_batch: windows that the network sees at a time, at most.
    """

    forward: Forward
    weights: Any
    patch: tuple[int, ...]
    overlap: float = 0.5
    windows_per_batch: int = 4

    def __call__(
        self, image: Float32[np.ndarray, "*spatial channels"]
    ) -> Float32[np.ndarray, "*spatial classes"]:
        """Class probabilities on the grid of `image`, on the host; they sum to 1 unless `regions` are predicted."""
        plan = self.plan(image.shape[:-1])
        padded = pad_to_hold(image, plan.canvas)
        program = volume_probabilities(self.forward, self.patch)
        probs = program(self.weights, padded, plan.corners, plan.counted)
        return crop_back(np.asarray(probs), image.shape[:-1])

    @property
    def regions(self) -> tuple[str, ...]:
        """The region of each channel of the probabilities, each a sigmoid; empty for a softmax over classes."""
        return getattr(self.forward, "regions", ())

    def summary(
        self,
        summary: Summary,
        image: Float32[np.ndarray, "*spatial channels"],
        label: UInt8[np.ndarray, "*spatial"],
    ) -> Any:
        """What `summary` says of the probabilities and labels; only that leaves the device, when it is read.

        Args:
            summary: pure function, hashable, since programs are kept by it.
            image: a volume, as the network was trained on.
            label: class ids on the same grid.
        """
        plan = self.plan(image.shape[:-1])
        return volume_summary(self.forward, self.patch, summary)(
            self.weights,
            pad_to_hold(image, plan.canvas),
            pad_to_hold(label[..., None], plan.canvas)[..., 0],
            np.array(label.shape, np.int32),
            plan.corners,
            plan.counted,
        )

    def plan(self, shape: Sequence[int]) -> "Plan":
        """Where the windows of a volume of this shape lie."""
        return plan_windows(shape, self.patch, self.overlap, self.windows_per_batch)


@functools.cache
def volume_probabilities(forward: Forward, patch: tuple[int, ...]) -> Callable[..., Array]:
    """The compiled program that gives class probabilities of a padded volume; zero where no window reaches."""

    def program(
        weights: Any,
        image: Float[Array, "*canvas channels"],
        corners: Int[Array, "groups windows axes"],
        counted: Bool[Array, "groups windows"],
    ) -> Float[Array, "*canvas classes"]:
        return _sliding_window(forward, weights, image, corners, counted, patch)

    return jax.jit(program, compiler_options=cpu.compiler_options())


@functools.cache
def volume_summary(forward: Forward, patch: tuple[int, ...], summary: Summary) -> Callable[..., Any]:
    """The compiled program that gives `summary` of a padded volume's probabilities."""

    def program(
        weights: Any,
        image: Float[Array, "*canvas channels"],
        label: UInt8[Array, "*canvas"],
        shape: Int32[Array, "axes"],  # of the volume without the padding
        corners: Int[Array, "groups windows axes"],
        counted: Bool[Array, "groups windows"],
    ) -> Any:
        probs = _sliding_window(forward, weights, image, corners, counted, patch)
        return summary(probs, label, inside(shape, label.shape))

    return jax.jit(program, compiler_options=cpu.compiler_options())


class Plan(NamedTuple):
    """Where the windows of a volume lie.

    Attributes:
        canvas: the size that the volume is padded to, centred.
        corners: of the windows, on the canvas, in the groups that the network sees at a time.
        counted: False for the windows that only fill up the last group.
    """

    canvas: tuple[int, ...]
    corners: Int32[np.ndarray, "groups windows axes"]
    counted: Bool[np.ndarray, "groups windows"]


def plan_windows(shape: Sequence[int], patch: Sequence[int], overlap: float, windows_per_batch: int) -> Plan:
    """Evenly spread windows that cover a volume, the first and last flush with its ends.

    The canvas is the patch and a whole number of half strides. All volumes on it take equally many windows.

    Example:
        >>> plan = plan_windows((20, 5), (8, 8), 0.5, 4)
        >>> plan.canvas, plan.corners.tolist()
        ((20, 8), [[[0, 0], [4, 0], [8, 0], [12, 0]]])
        >>> plan_windows((19, 8), (8, 8), 0.5, 4).canvas
        (20, 8)
    """
    axes = [_plan_axis(length, size, overlap) for length, size in zip(shape, patch, strict=True)]
    corners = list(itertools.product(*(starts for _, starts in axes)))
    size = _group_size(len(corners), windows_per_batch)
    filling = -len(corners) % size
    grouped = np.array(corners + corners[-1:] * filling, np.int32).reshape(-1, size, len(axes))
    counted = np.arange(grouped.size // len(axes)) < len(corners)
    return Plan(tuple(padded for padded, _ in axes), grouped, counted.reshape(-1, size))


def _plan_axis(length: int, size: int, overlap: float) -> tuple[int, list[int]]:
    """Length of the canvas and corners of the windows along one axis."""
    stride = max(int(size * (1 - overlap)), 1)
    held = max(length, size)
    room = held - size
    padded = size + -(-_round_up(2 * room, stride) // 2)
    starts = np.linspace(0, room, -(-room // stride) + 1).round().astype(int)
    # `pad_to_hold` centres the volume.
    return padded, (starts + (padded - held) // 2).tolist()


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _group_size(count: int, most: int) -> int:
    """Of the group sizes from half of `most` up, the one that leaves the fewest places to be filled up."""
    most = min(most, count)
    return min(range(-(-most // 2), most + 1), key=lambda size: (-count % size, -size))


def _sliding_window(
    network: Forward, weights: Any, image: Array, corners: Array, counted: Array, patch: tuple[int, ...]
) -> Array:
    """Probabilities of the windows, averaged with Gaussian weights."""
    if corners.shape[:2] == (1, 1):
        return network(weights, image[None])[0]
    sums_to_one = not getattr(network, "regions", ())

    def forward(patches: Array) -> Array:
        """Probabilities, with a last channel of ones where they do not sum to 1."""
        probs = network(weights, patches)
        return probs if sums_to_one else jnp.concatenate([probs, jnp.ones_like(probs[..., :1])], -1)

    weight = _gaussian_window(patch)

    def add_group(total: Array, group: tuple[Array, Array]) -> tuple[Array, None]:
        probs = forward(cut_windows(image, group[0], patch))
        for window, corner, counts in zip(probs, *group, strict=True):
            added = _cut(total, corner, patch) + jnp.where(counts, weight, 0) * window
            total = lax.dynamic_update_slice(total, added, (*corner, np.int32(0)))
        return total, None

    one = jax.ShapeDtypeStruct((1, *patch, image.shape[-1]), image.dtype)
    zeros = jnp.zeros((*image.shape[:-1], jax.eval_shape(forward, one).shape[-1]), jnp.float32)
    total, _ = lax.scan(add_group, zeros, (corners, counted))
    # Each window's probabilities sum to 1, so their weighted sum over classes is the sum of weights.
    norm = total.sum(-1, keepdims=True) if sums_to_one else total[..., -1:]
    probs = total / jnp.where(norm == 0, 1, norm)
    return probs if sums_to_one else jnp.minimum(probs[..., :-1], 1)  # a rounding above 1


def cut_windows(
    array: Shaped[Array, "*canvas channels"], corners: Int[Array, "windows axes"], patch: tuple[int, ...]
) -> Shaped[Array, "windows *patch channels"]:
    """The windows at `corners`; one by one, since a batch of slices would be a gather."""
    return jnp.stack([_cut(array, corner, patch) for corner in corners])


def _cut(array: Array, corner: Array, patch: tuple[int, ...]) -> Array:
    return lax.dynamic_slice(array, (*corner, np.int32(0)), (*patch, array.shape[-1]))


def _gaussian_window(patch: Sequence[int]) -> Float[Array, "*patch one"]:
    """exp(-r^2 / 2) with a standard deviation of an eighth of each side, and never zero."""
    weight = jnp.ones((1,) * (len(patch) + 1), jnp.float32)
    for axis, size in enumerate(patch):
        offset = (np.arange(size) - (size - 1) / 2) / (size / 8)
        profile = jnp.asarray(np.exp(-(offset**2) / 2), jnp.float32)
        weight = weight * jnp.expand_dims(profile, [i for i in range(len(patch) + 1) if i != axis])
    return jnp.maximum(weight, 1e-3)


def inside(shape: Int[Array, "axes"], canvas: tuple[int, ...]) -> Bool[Array, "*canvas"]:
    """Where on the canvas the volume lies that was centred on it."""
    inside = jnp.ones(canvas, bool)
    for axis, (size, padded) in enumerate(zip(shape, canvas, strict=True)):
        place = lax.broadcasted_iota(jnp.int32, canvas, axis)
        start = (padded - size) // 2
        inside &= (place >= start) & (place < start + size)
    return inside


def volume_predictor(
    graphdef: nnx.GraphDef, state: TrainState, window: tuple[int, ...], regions: tuple[str, ...] = ()
) -> VolumePredictor:
    """Prediction of whole volumes under the weights of `state`, through windows of so many voxels.

    With `regions` its probabilities are sigmoids, else a softmax.
    A volume is one device's work, so a copy of the weights on this process's first one is taken.
    """
    return VolumePredictor(
        Network(graphdef, regions),
        on_first_device((state.params, state.rest)),
        window,
        windows_per_batch=max(min(_VOXELS_AT_ONCE // math.prod(window), 4), 1),
    )
