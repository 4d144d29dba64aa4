"""Predicts whole volumes with a network that sees patches. Probabilities stay on the device.

A volume is padded to a canvas, a size that similar volumes share, and covered by overlapping windows of the
patch's size. The network sees groups of windows, which the devices of a process share. A summary sees a row of
voxels that is filled up to one of few lengths; on a TPU, which would copy it, the canvas. So a few compiled
programs of both serve volumes of all sizes, and only programs that compile in seconds depend on the canvas.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Shaped

from calib_jax._devices import on_one_device
from calib_jax._eager import filled_size
from train import cpu
from train.data.shapes import Ids, Image, Shares
from train.data.transforms import crop_back, pad_to_hold
from train.errors import InputError
from train.sharding import batch_spec, device_mesh, whole_on
from train.step import TrainState

Patches = Float[Array, "batch *patch channels"]
Probs = Float[Array, "batch *patch classes"]  # or logits

_VOXELS_AT_ONCE = 4 * 128**3  # voxels of the windows that the devices of a process see at a time

# (weights, patches [batch, *patch, channels]) -> probabilities [batch, *patch, classes]. They sum to 1 over classes
# unless the function has `regions`, see `Network`.
Forward = Callable[[Any, Array], Array]
# (probabilities [*voxels, classes], labels [*voxels] or None, where [*voxels]) -> any pytree of arrays. `where` is
# False in the padding.
Summary = Callable[[Array, Any, Array], Any]


@dataclass(frozen=True)
class Network:
    """The `Forward` of a Flax model without dropout. Its weights are (params, rest).

    Two of the same model are equal, so that they share compiled programs.

    Attributes:
        graphdef: the static part of the model.
        regions: name of the region of each output channel, for sigmoids; empty for a softmax over classes.
    """

    graphdef: nnx.GraphDef
    regions: tuple[str, ...] = ()

    def __call__(self, weights: Any, images: Patches) -> Probs:
        return self.probabilities(self.logits(weights, images))

    def probabilities(self, logits: Probs) -> Probs:
        """Softmax or sigmoids of the logits."""
        return jax.nn.sigmoid(logits) if self.regions else jax.nn.softmax(logits)

    def logits(self, weights: Any, images: Patches) -> Float32[Array, "batch *patch classes"]:
        """The output of the model, before the softmax or the sigmoids."""
        model = nnx.merge(self.graphdef, *weights)
        model.eval()
        return model(images).astype(jnp.float32)


@dataclass(frozen=True)
class Ensemble(Network):
    """Averages the probabilities of networks of one architecture. Its weights are a tuple with those of each."""

    def logits(
        self, weights: Any, images: Float[Array, "batch *patch channels"]
    ) -> Float32[Array, "batch *patch classes"]:
        """Logarithms of the mean probabilities or, for sigmoids, logits of them."""
        members = jnp.stack([super(Ensemble, self).logits(each, images) for each in weights])
        if not self.regions:
            return jax.nn.logsumexp(jax.nn.log_softmax(members), 0) - math.log(len(weights))
        inside, outside = (jax.nn.logsumexp(jax.nn.log_sigmoid(x), 0) for x in (members, -members))
        return inside - outside


def ensemble(members: Sequence["VolumePredictor"]) -> "VolumePredictor":
    """Makes the predictor that averages the probabilities of others.

    Raises:
        InputError: the members have different networks, regions or patches.
    """
    first = members[0]
    assert isinstance(first.forward, Network)
    if any((each.forward, each.patch) != (first.forward, first.patch) for each in members):
        raise InputError(
            "The runs of an ensemble have different networks, regions or patches: give runs that differ in their "
            "weights only, or average their predictions with `calib-jax ensemble`."
        )
    forward = Ensemble(first.forward.graphdef, first.forward.regions)
    return replace(first, forward=forward, weights=tuple(each.weights for each in members))


@dataclass(frozen=True)
class VolumePredictor:
    """A trained network that predicts volumes of any size.

    A volume that fits into the patch is padded to it. A larger volume is covered by overlapping windows. Their
    probabilities are averaged with Gaussian weights, so that the centre of a window counts more than its rim.

    Attributes:
        forward: patches to probabilities; hashable, as a key of the compiled programs.
        weights: first argument of `forward`, any pytree of arrays.
        patch: size of a window, in voxels.
        overlap: smallest share of a window that the next one covers too.
        windows_per_batch: largest number of windows that a device sees at a time.
        mesh: devices with the whole weights, which share the windows; None for the device of the weights. The
            first device of this process holds the volume.
    """

    forward: Forward
    weights: Any
    patch: tuple[int, ...]
    overlap: float = 0.5
    windows_per_batch: int = 4
    mesh: Mesh | None = None

    def __call__(self, image: Image) -> Shares:
        """Class probabilities on the grid of `image`, on the host. They sum to 1 unless there are `regions`."""
        probs = self._on_canvas(image, self.plan(image.shape[:-1]))
        return crop_back(np.asarray(probs), image.shape[:-1])

    @property
    def regions(self) -> tuple[str, ...]:
        """Name of the region of each channel, for sigmoids; empty for a softmax over classes."""
        return getattr(self.forward, "regions", ())

    def summary(self, summary: Summary, image: Image, label: Ids | None = None) -> Any:
        """Computes `summary` of the probabilities and labels. The probabilities stay on the device.

        Args:
            summary: pure and hashable, as a key of the compiled programs.
            image: preprocessed volume.
            label: class ids on the same grid, if `summary` needs them.
        """
        plan, shape = self.plan(image.shape[:-1]), np.array(image.shape[:-1], np.int32)
        labels = None if label is None else pad_to_hold(label[..., None], plan.canvas)[..., 0]
        voxels = self._on_canvas(image, plan), labels, inside(shape, plan.canvas)
        size = row_size(plan.canvas, jax.default_backend())
        return on_one_device(jitted(summary), *(voxels if size is None else in_a_row(voxels, size)))

    def plan(self, shape: Sequence[int]) -> "Plan":
        """The windows that cover a volume of this shape."""
        devices = 1 if self.mesh is None else self.mesh.size
        return plan_windows(shape, self.patch, self.overlap, self.windows_per_batch, devices)

    def on_windows(self, forward: Forward, padded: Array, corners: Array | np.ndarray) -> Array:
        """`forward` of the windows at `corners` of a padded volume. Each device computes its share of them."""
        windows = cut_windows(padded, corners, self.patch)
        if self.mesh is None:
            return jitted(forward)(self.weights, windows)
        if len(windows) == 1:
            return jitted(forward)(jax.tree.map(_on_first_device, self.weights), windows)
        windows = jax.device_put(windows, NamedSharding(self.mesh, batch_spec(1)))
        return jax.device_put(jitted(forward, mesh=self.mesh)(self.weights, windows), jax.local_devices()[0])

    def _on_canvas(self, image: Image, plan: "Plan") -> Float[Array, "*canvas classes"]:
        """The probabilities on the device. They are zero where no window reaches."""
        padded = jax.device_put(pad_to_hold(image, plan.canvas))
        if plan.counted.size == 1:
            return self.on_windows(self.forward, padded, plan.corners[0])[0]
        # Probabilities that sum to 1 over classes give the sum of weights as their weighted sum. Otherwise a last
        # channel collects the weights.
        sums_to_one = not self.regions
        total: Array | None = None
        for corners, counted in zip(plan.corners, plan.counted, strict=True):
            windows = self.on_windows(self.forward, padded, corners)
            if total is None:
                channels = windows.shape[-1] + (not sums_to_one)
                # Placed like the sums that follow, which `add_windows` would else be compiled for again.
                total = jnp.zeros((*plan.canvas, channels), jnp.float32, device=windows.sharding)
            total = add_windows(total, windows, corners, counted)
        assert total is not None
        return weighted_mean(total, sums_to_one)


def _on_first_device(leaf: Any) -> Any:
    return leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf


@functools.cache
def jitted(function: Callable[..., Any], platform: str | None = None, mesh: Mesh | None = None) -> Any:
    """`jax.jit` with the compiler options of `train.cpu`. Equal functions share their programs.

    Args:
        function: hashable.
        platform: that it is compiled for; None for JAX's default.
        mesh: the devices that share the batch of a `Forward`; None for one.
    """
    if mesh is not None and mesh.size > 1:
        split, specs = batch_spec(1), (PartitionSpec(), batch_spec(1))
        function = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
    return jax.jit(function, compiler_options=cpu.compiler_options(platform))


class Plan(NamedTuple):
    """The windows that cover a volume.

    Attributes:
        canvas: shape of the padded volume, which holds the volume in its centre.
        corners: first voxel of each window on the canvas, in groups that the network sees at a time.
        counted: False for the windows that only fill up the last group.
    """

    canvas: tuple[int, ...]
    corners: Int32[np.ndarray, "groups windows axes"]
    counted: Bool[np.ndarray, "groups windows"]


def plan_windows(
    shape: Sequence[int], patch: Sequence[int], overlap: float, windows_per_batch: int, devices: int = 1
) -> Plan:
    """Spreads windows evenly over a volume. The first and the last window end with the volume.

    The canvas is longer than the patch by a whole number of half strides. All volumes on one canvas need the same
    number of windows.

    Example:
        >>> plan = plan_windows((20, 5), (8, 8), 0.5, 4)
        >>> plan.canvas, plan.corners.tolist()
        ((20, 8), [[[0, 0], [4, 0], [8, 0], [12, 0]]])
        >>> plan_windows((19, 8), (8, 8), 0.5, 4).canvas
        (20, 8)
    """
    axes = [_plan_axis(length, size, overlap) for length, size in zip(shape, patch, strict=True)]
    corners = list(itertools.product(*(starts for _, starts in axes)))
    # The group size between half of the largest and the largest that leaves the fewest places to fill up.
    devices = devices if len(corners) > 1 else 1
    most = min(windows_per_batch, -(-len(corners) // devices))
    sizes = range(-(-most // 2) * devices, (most + 1) * devices, devices)
    size = min(sizes, key=lambda size: (-len(corners) % size, -size))
    filling = -len(corners) % size
    grouped = np.array(corners + corners[-1:] * filling, np.int32).reshape(-1, size, len(axes))
    counted = np.arange(grouped.size // len(axes)) < len(corners)
    return Plan(tuple(padded for padded, _ in axes), grouped, counted.reshape(-1, size))


def _plan_axis(length: int, size: int, overlap: float) -> tuple[int, list[int]]:
    """Length of the canvas, and first voxels of the windows, along one axis."""
    stride = max(int(size * (1 - overlap)), 1)
    held = max(length, size)
    room = held - size
    half_strides = -(-2 * room // stride) * stride
    padded = size + -(-half_strides // 2)
    starts = np.linspace(0, room, -(-room // stride) + 1).round().astype(int)
    # `pad_to_hold` puts the volume into the centre.
    return padded, (starts + (padded - held) // 2).tolist()


@functools.partial(jax.jit, static_argnames="patch")
def cut_windows(
    array: Shaped[Array, "*canvas channels"], corners: Int[Array, "windows axes"], patch: tuple[int, ...]
) -> Shaped[Array, "windows *patch channels"]:
    """Cuts the windows at `corners` one by one; a batch of slices would become a gather."""
    return jnp.stack([_cut(array, corner, patch) for corner in corners])


def _cut(array: Array, corner: Array, patch: tuple[int, ...]) -> Array:
    return lax.dynamic_slice(array, (*corner, np.int32(0)), (*patch, array.shape[-1]))


@functools.partial(jax.jit, donate_argnames="total")
def add_windows(
    total: Float[Array, "*canvas channels"],
    windows: Float[Array, "windows *patch classes"],
    corners: Int[Array, "windows axes"],
    counted: Bool[Array, "windows"],
) -> Float[Array, "*canvas channels"]:
    """Adds the windows that count, with Gaussian weights. A channel more than the classes collects the weights."""
    patch = windows.shape[1:-1]
    weight = _gaussian_window(patch)
    if total.shape[-1] > windows.shape[-1]:
        windows = jnp.concatenate([windows, jnp.ones_like(windows[..., :1])], -1)
    for window, corner, counts in zip(windows, corners, counted, strict=True):
        added = _cut(total, corner, patch) + jnp.where(counts, weight, 0) * window
        total = lax.dynamic_update_slice(total, added, (*corner, np.int32(0)))
    return total


@functools.partial(jax.jit, static_argnames="sums_to_one")
def weighted_mean(
    total: Float[Array, "*canvas channels"], sums_to_one: bool
) -> Float[Array, "*canvas classes"]:
    """The mean of the windows from their weighted sum."""
    norm = total.sum(-1, keepdims=True) if sums_to_one else total[..., -1:]
    probs = total / jnp.where(norm == 0, 1, norm)
    return probs if sums_to_one else jnp.minimum(probs[..., :-1], 1)  # rounding may exceed 1


def row_size(canvas: tuple[int, ...], platform: str) -> int | None:
    """Voxels of the row that the voxels of a canvas fill; None on TPUs, where merging axes would copy them."""
    return None if platform == "tpu" else filled_size(math.prod(canvas))


@functools.partial(jax.jit, static_argnames="size")
def in_a_row(voxels: tuple[Array, Array | None, Array], size: int) -> tuple[Array, Array | None, Array]:
    """Probabilities, labels and mask of a canvas as `[size, ...]`. The voxels that fill them up are masked."""
    axes = voxels[-1].ndim

    def filled(x: Array) -> Array:
        row = x.reshape(-1, *x.shape[axes:])
        return jnp.pad(row, ((0, size - len(row)), *((0, 0),) * (row.ndim - 1)))

    return jax.tree.map(filled, voxels)


def _gaussian_window(patch: Sequence[int]) -> Float[Array, "*patch one"]:
    """exp(-r^2 / 2), r in units of an eighth of each side from the centre; at least 0.001."""
    weight = jnp.ones((1,) * (len(patch) + 1), jnp.float32)
    for axis, size in enumerate(patch):
        offset = (np.arange(size) - (size - 1) / 2) / (size / 8)
        profile = jnp.asarray(np.exp(-(offset**2) / 2), jnp.float32)
        weight = weight * jnp.expand_dims(profile, [i for i in range(len(patch) + 1) if i != axis])
    return jnp.maximum(weight, 1e-3)


@functools.partial(jax.jit, static_argnames="canvas")
def inside(shape: Int[Array, "axes"], canvas: tuple[int, ...]) -> Bool[Array, "*canvas"]:
    """True on the voxels of a volume in the centre of a canvas, False in the padding."""
    inside = jnp.ones(canvas, bool)
    for axis, (size, padded) in enumerate(zip(shape, canvas, strict=True)):
        place = lax.broadcasted_iota(jnp.int32, canvas, axis)
        start = (padded - size) // 2
        inside &= (place >= start) & (place < start + size)
    return inside


def volume_predictor(
    graphdef: nnx.GraphDef, state: TrainState, patch: tuple[int, ...], regions: tuple[str, ...] = ()
) -> VolumePredictor:
    """Makes the predictor of a trained state.

    The devices of this process predict a volume together, so the predictor copies the weights to each of them.

    Args:
        graphdef: the static part of the model.
        state: its weights.
        patch: size of a sliding window, in voxels.
        regions: name of the region of each output channel, for sigmoids; empty for a softmax over classes.
    """
    mesh = device_mesh(devices=jax.local_devices())
    weights = whole_on(mesh, (state.evaluated, state.rest))
    windows = windows_at_once(patch, mesh.size)
    return VolumePredictor(Network(graphdef, regions), weights, patch, windows_per_batch=windows, mesh=mesh)


def windows_at_once(patch: Sequence[int], devices: int = 1) -> int:
    """Number of windows of this size that each device of a process sees at a time. The first one holds them all."""
    return max(min(_VOXELS_AT_ONCE // (math.prod(patch) * devices), 4), 1)
