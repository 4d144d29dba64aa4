"""The one place where voxels become bins: edges, indices and sums, for losses, metrics and plots alike."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Num

from calib_jax._checks import AnyArray, Labels, Mask, Probs, as_inputs, check_choice, check_size
from calib_jax._devices import AxisName, check_not_split, whole_sum
from calib_jax._eager import compiled, nan_where_undefined
from calib_jax._labels import classes_from, one_hot
from calib_jax._parts import by_parts, left_to_compiler
from calib_jax._sums import cpu, gpu, gpu_kernel, tpu
from calib_jax._sums.bins import Binning, Bins, Closed, equal_edges, merge_space, single_or_double
from calib_jax._sums.cpu import hard_index, soft_neighbours
from calib_jax._sums.exact import mean_or_nan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BinStatistics:
    """Sums per image, class and bin. Calibration errors, curves and histograms are functions of them.

    `a + b` merges the statistics of batches, devices, hosts or tiles exactly. `BinStatistics` is a pytree: it
    passes through `jit`, `vmap`, `psum` and `jax.tree.map`.

    Attributes:
        count: voxels in each bin, `[..., classes, num_bins]`; integers, or sums of weights in soft bins.
        prob_sum: sum of their predicted probabilities, same shape.
        label_sum: sum of their labels (1 where the voxel has the class), same shape.
    """

    count: Num[AnyArray, "*batch classes bins"]
    prob_sum: Float[AnyArray, "*batch classes bins"]
    label_sum: Float[AnyArray, "*batch classes bins"]

    @property
    def num_bins(self) -> int:
        """Number of bins."""
        return self.count.shape[-1]

    @property
    def mean_prob(self) -> Float[Array, "*batch classes bins"]:
        """Mean predicted probability of each bin; NaN in empty ones."""
        return self._per_voxel(self.prob_sum)

    @property
    def mean_label(self) -> Float[Array, "*batch classes bins"]:
        """Observed frequency of the class in each bin; NaN in empty ones."""
        return self._per_voxel(self.label_sum)

    @property
    def weight(self) -> Float[Array, "*batch classes bins"]:
        """`count` as float32, in which the 64-bit counts of a whole data set do not overflow."""
        return jnp.asarray(self.count, jnp.float32)

    @nan_where_undefined
    def _per_voxel(self, total: AnyArray) -> Array:
        return mean_or_nan(jnp.asarray(total, jnp.float32), self.weight)

    def __add__(self, other: "BinStatistics") -> "BinStatistics":
        return jax.tree.map(lambda a, b: a + b, self, other)

    def sum(self, axis: int | tuple[int, ...] = 0) -> "BinStatistics":
        """Statistics of all images together: the sums over `axis` (default: the batch).

        Counts of a data set may outgrow int32. JAX counts therefore become float32, rounded to 24 bits. NumPy
        counts are summed as 64-bit integers.
        """
        return BinStatistics(_sum_counts(self.count, axis), self.prob_sum.sum(axis), self.label_sum.sum(axis))


def _sum_counts(count: AnyArray, axis: int | tuple[int, ...]) -> AnyArray:
    if isinstance(count, np.ndarray) or count.dtype != jnp.int32:
        return count.sum(axis)
    # The 16-bit halves of counts are summed separately: the sums of up to 2^15 images fit into int32.
    low, high = (part.sum(axis, dtype=jnp.int32) for part in (count & 0xFFFF, count >> 16))
    return high.astype(jnp.float32) * 2**16 + low.astype(jnp.float32)


def bin_edges(num_bins: int) -> Float[np.ndarray, "edges"]:
    """Bin edges, equal to the reference's to the last bit: float32 `linspace(0, 1 + eps, num_bins + 1)`.

    `torch.linspace` counts up from the start in its first half and down from the end in its second half, with one
    rounding each. Float64 arithmetic gives this rounding exactly.

    Args:
        num_bins: number of bins.

    Returns:
        float32 edges `[num_bins + 1]`, from 0 to 1 + eps.

    Raises:
        TypeError, ValueError: unless `num_bins` is an integer of at least 1.

    Example:
        >>> bin_edges(2).tolist()
        [0.0, 0.5000000596046448, 1.0000001192092896]
    """
    check_size("num_bins", num_bins)
    return equal_edges(num_bins)


@compiled(keeps_shape=True)
def bin_index(
    probs: Float[AnyArray, "*shape"], *, num_bins: int = 20, closed: Closed = "right"
) -> Int[Array, "*shape"]:
    """Index of the bin of each probability.

    Args:
        probs: probabilities of any shape. Values outside [0, 1] fall into the end bins, NaN into the last.
        num_bins: number of equal-width bins.
        closed: the side on which a bin includes its edge. `"right"`: (l, r], the first bin [0, r], as the
            reference's `torch.bucketize(..., right=False)`. `"left"`: [l, r), the last bin [l, 1].

    Returns:
        int32 indices in `[0, num_bins)`, of the shape of `probs`.

    Raises:
        ValueError: if `num_bins` is below 1 or `closed` is not one of the two.

    Example:
        >>> edge = bin_edges(2)[1]  # 0.5000001
        >>> bin_index(jnp.array([0.0, 0.5, edge, 1.0]), num_bins=2).tolist()
        [0, 0, 0, 1]
        >>> bin_index(jnp.array([0.0, 0.5, edge, 1.0]), num_bins=2, closed="left").tolist()
        [0, 0, 1, 1]
    """
    check_size("num_bins", num_bins)
    check_choice("closed", closed, ("right", "left"))
    return hard_index(jnp.asarray(probs), None, Bins("hard", num_bins, closed))


@compiled()
def bin_statistics(
    probs: Probs,
    labels: Labels,
    *,
    num_bins: int = 20,
    binning: Binning = "hard",
    closed: Closed = "right",
    where: Mask | None = None,
    axis_name: AxisName | None = None,
) -> BinStatistics:
    r"""Count, probability sum and label sum of every bin, per image and class.

    For image b, class c and bin m: `count` is the number of voxels whose probability of c falls in m, `prob_sum` is
    the sum of these probabilities, and `label_sum` is the number of these voxels that belong to class c.
    Counts are exact integers and bin means are within 1e-6 relative of float64, up to 2^30 voxels an image.

    Args:
        probs: class probabilities `[batch, *spatial, classes]`, of any float type; float64 (under
            `jax_enable_x64`) is binned as it is.
        labels: class ids `[batch, *spatial]` (ids outside `[0, classes)` belong to no class), or one-hot,
            overlapping or soft labels of the shape of `probs`.
        num_bins: number of bins.
        binning: `"hard"`: bins of equal width on [0, 1], each voxel in one. `"soft"`: a voxel is shared by the
            two bins with the nearest centres, in proportion to its nearness, :math:`w_m(p) = \max(0,
            1 - |p M - m - 1/2|)`; beyond the first and last centre it belongs to the end bin. Sums are weighted by
            w, and `count` is a float. `"adaptive"`: bins of equal mass; the edges are quantiles of the
            probabilities of each image and class, and equal probabilities stay together.
        closed: the side on which a hard bin includes its edge, see `bin_index`.
        where: voxels to count, boolean, `[batch, *spatial]` or of the shape of `probs`; None counts all. Values
            elsewhere, NaN included, change neither statistics nor gradients.
        axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which each image's voxels are split. Every
            device then gets the statistics of the whole images. Not for adaptive bins, whose edges are not sums.

    Returns:
        `BinStatistics` of shape `[batch, classes, num_bins]`. A NaN probability makes `prob_sum` NaN in the last
        bin of its image and class. Differentiable in `probs` and float `labels` (reverse mode). The gradient of
        hard and adaptive bins treats membership as constant, as the paper does; the gradient of soft bins includes
        the weights. Every image has adaptive bins of its own, so merge statistics of hard or soft bins only.

    Raises:
        TypeError, ValueError: on dtypes, shapes or options that do not fit, and on probabilities or one-hot or soft
            labels that are counted, concrete (not traced) and outside [0, 1] by more than rounding.

    Example:
        >>> probs = jnp.array([[[0.9, 0.1], [0.6, 0.4]]])  # one image of two voxels, two classes
        >>> stats = bin_statistics(probs, jnp.array([[0, 1]]), num_bins=2)
        >>> stats.count.tolist()
        [[[0, 2], [2, 0]]]
        >>> stats.mean_prob[0, 0, 1], stats.mean_label[0, 0, 1]
        (Array(0.75, dtype=float32), Array(0.5, dtype=float32))
        >>> soft = bin_statistics(probs, jnp.array([[0, 1]]), num_bins=2, binning="soft")
        >>> [round(float(weight), 4) for weight in soft.count[0, 0]]
        [0.3, 1.7]

        Traced values are not checked. `jax.experimental.checkify` checks them:

        >>> from jax.experimental import checkify
        >>> def checked(probs, labels):
        ...     checkify.check(((probs > -1e-3) & (probs < 1.001)).all(), "probs must lie in [0, 1]")
        ...     return bin_statistics(probs, labels)
        >>> error, stats = jax.jit(checkify.checkify(checked))(100 * probs, jnp.array([[0, 1]]))
        >>> error.get()  # error.throw() raises it
        'probs must lie in [0, 1] (`check` failed)'

    References:
        Barfoot et al., "Average Calibration Error: A Differentiable Loss for Improved Reliability in Image
        Segmentation", arXiv 2403.06759, and arXiv 2506.03942 (soft bins); Nixon et al., "Measuring Calibration
        in Deep Learning", 2019 (adaptive bins).
    """
    bins = Bins(binning, num_bins, closed)
    check_bins(bins, axis_name)
    return statistics_in_bins(*as_inputs(probs, labels, where), bins, axis_name)


def check_bins(bins: Bins, axis_name: AxisName | None) -> None:
    """Raises on options that `bin_statistics` does not take."""
    check_size("num_bins", bins.num_bins)
    check_choice("binning", bins.binning, ("hard", "soft", "adaptive"))
    check_choice("closed", bins.closed, ("right", "left"))
    if bins.binning != "hard" and bins.closed != "right":
        raise ValueError(f'closed="left" applies to binning="hard" only; got binning={bins.binning!r}.')
    if bins.binning == "adaptive":
        check_not_split('binning="adaptive"', axis_name)


def statistics_in_bins(
    probs: Array,
    labels: Array,
    where: Array | None,
    bins: Bins,
    axis_name: AxisName | None = None,
    *,
    first_class: int = 0,
) -> BinStatistics:
    """`bin_statistics` of the classes from `first_class` on, of arguments that have been checked."""
    if where is not None and where.ndim < probs.ndim:
        where = where[..., None]
    edges = None
    if bins.binning == "adaptive":
        quantiles = functools.partial(_adaptive_edges, num_bins=bins.num_bins, first=first_class)
        edges = left_to_compiler(quantiles, probs, where, axes=1)
    return BinStatistics(*whole_sum(_bin_sums(probs, labels, where, edges, bins, first_class), axis_name))


def _adaptive_edges(
    probs: Float[Array, "batch *spatial classes"], where: Array | None, num_bins: int, first: int = 0
) -> Float[Array, "batch counted_classes inner_edges"]:
    """Quantiles that divide the counted probabilities of each image and class into bins of equal mass.

    Each edge is one of the probabilities and belongs to the bin below it.
    """

    def by_class(x: Array) -> Array:
        return jnp.moveaxis(x, -1, 1)[:, first:].reshape(x.shape[0], x.shape[-1] - first, -1)

    values = by_class(single_or_double(lax.stop_gradient(probs)))
    counted = ~jnp.isnan(values)
    if where is not None:
        counted &= by_class(jnp.broadcast_to(where, probs.shape))
    size = counted.sum(-1, dtype=jnp.int32, keepdims=True)
    k = jnp.arange(1, num_bins, dtype=jnp.int32)[None, None]
    # ceil(k * size / num_bins) - 1, in steps that int32 holds.
    rank = k * (size // num_bins) + (k * (size % num_bins) + num_bins - 1) // num_bins - 1
    ordered = _sort(jnp.where(counted, values, jnp.inf))
    return jnp.take_along_axis(ordered, jnp.maximum(rank, 0), axis=-1)


def _sort(values: Float[Array, "*rows columns"]) -> Float[Array, "*rows columns"]:
    """`jnp.sort` of floats without NaN, as integers, which XLA's CPU code sorts six times as fast."""
    integers = jnp.int64 if values.dtype == jnp.float64 else jnp.int32

    def flip(bits: Array) -> Array:
        """Puts the bits of negative floats in the order of the floats, and back."""
        return jnp.where(bits < 0, bits ^ jnp.iinfo(integers).max, bits)

    ordered = flip(jnp.sort(flip(lax.bitcast_convert_type(values, integers))))
    return lax.bitcast_convert_type(ordered, values.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _bin_sums(
    probs: Float[Array, "batch *spatial classes"],
    labels: Num[Array, "batch *spatial_and_classes"],
    where: Array | None,
    edges: Float[Array, "batch counted_classes inner_edges"] | None,
    bins: Bins,
    first: int = 0,
) -> tuple[Array, Array, Array]:
    """Counts or weights, sums of probabilities and sums of labels, `[batch, counted_classes, bins]` each.

    Classes before `first` are not counted. On a CPU this saves their work. On a GPU or TPU it would copy the
    probabilities, so all classes are summed there.
    """

    def of_voxels(sums: Any) -> Any:
        return lambda *images: sums(*(merge_space(x, probs.ndim) for x in images[:3]), images[3], bins)

    def on_cpu(*images: Any) -> Any:
        return of_voxels(cpu.bin_sums)(*_without_first(first, *images[:3]), images[3])

    def elsewhere(sums: Any) -> Any:
        def counted(*images: Any) -> Any:
            found = sums(*images[:3], _with_first(first, images[3]))
            return tuple(x[:, first:] for x in found)

        return counted if first else sums

    def sums(images: Any, edges: Any) -> Any:
        platforms = {"cpu": on_cpu, "tpu": elsewhere(functools.partial(tpu.bin_sums, bins=bins))}
        if gpu_kernel.fits(images[0], bins):
            platforms["cuda"] = elsewhere(of_voxels(gpu_kernel.bin_sums))
        default = elsewhere(of_voxels(gpu.bin_sums))
        return lax.platform_dependent(*images, edges, **platforms, default=default)

    return by_parts(sums, (probs, labels, where), edges, opaque=True)


def _without_first(first: int, probs: Array, labels: Array, where: Array | None) -> tuple[Any, ...]:
    """The classes from `first` on, which become the classes from 0 on."""
    if not first:
        return probs, labels, where
    where = where if where is None or where.shape[-1] == 1 else where[..., first:]
    return probs[..., first:], classes_from(first, labels, probs), where


def _with_first(first: int, table: Array | None) -> Array | None:
    """`[batch, counted_classes, ...]` with zeros for the classes before `first`."""
    return jnp.pad(table, ((0, 0), (first, 0), (0, 0))) if first and table is not None else table


def _bin_sums_forward(probs: Array, labels: Array, where: Any, edges: Any, bins: Bins, first: int) -> Any:
    return _bin_sums(probs, labels, where, edges, bins, first), (probs, labels, where, edges)


def _bin_sums_backward(bins: Bins, first: int, residuals: Any, cotangents: Any) -> Any:
    probs, labels, where, _ = residuals

    def on_cpu(images: Any, cotangents: Any) -> Any:
        *images, edges = images
        shape = (*images[0].shape[:-1], -1)
        counted = (merge_space(x, len(shape)) for x in _without_first(first, *images))
        found = _gradients((*counted, edges), cotangents, bins, cpu.look_up)
        before = [(0, 0)] * (len(shape) - 1) + [(first, 0)]
        return jax.tree.map(lambda x: jnp.pad(x.reshape(shape), before) if first else x.reshape(shape), found)

    def elsewhere(look_up: Any) -> Any:
        def gradients(images: Any, cotangents: Any) -> Any:
            *images, edges = images
            tables = tuple(_with_first(first, x) for x in cotangents)
            return _gradients((*images, _with_first(first, edges)), tables, bins, look_up)

        return gradients

    def gradients_of_part(images: Any, tables: Any) -> Any:
        edges, cotangents = tables
        on_gpu, on_tpu = elsewhere(gpu.look_up), elsewhere(tpu.look_up)
        arguments = (*images, edges), cotangents
        return lax.platform_dependent(*arguments, cpu=on_cpu, tpu=on_tpu, default=on_gpu)

    found = by_parts(gradients_of_part, residuals[:3], (residuals[3], cotangents), sums=False)

    def masked(gradient: Array, dtype: Any) -> Array:
        gradient = gradient.astype(dtype)
        return gradient if where is None else jnp.where(where, gradient, 0)

    gradients = [masked(x, like.dtype) for x, like in zip(found, (probs, labels), strict=False)]
    return gradients[0], gradients[1] if len(gradients) > 1 else None, None, None


_bin_sums.defvjp(_bin_sums_forward, _bin_sums_backward)


def _gradients(residuals: Any, cotangents: Any, bins: Bins, look_up: Any) -> tuple[Array, ...]:
    """Gradients of probabilities, and of labels if these are floats. Bins are computed anew instead of stored."""
    probs, labels, _, edges = residuals
    labels_vary = jnp.issubdtype(labels.dtype, jnp.floating)
    if bins.binning == "soft":
        return _soft_gradients(probs, labels, cotangents, bins.num_bins, look_up)[: 1 + labels_vary]
    # A sum's gradient is 1 for each voxel in it: every voxel looks up the cotangent of its own bin.
    index = jax.vmap(functools.partial(hard_index, bins=bins))(probs, edges)
    return tuple(look_up(table, index) for table in cotangents[1 : 2 + labels_vary])


def _soft_gradients(
    probs: Array, labels: Array, cotangents: Any, num_bins: int, look_up: Any
) -> tuple[Array, Array]:
    # With lower bin j, share f, cotangents (c, P, Y) of the sums and D their step from bin j to bin j + 1:
    #   d_label = Y_j + f DY,    d_prob = P_j + f DP + f' (Dc + p DP + y DY),    f' = M between the end centres.
    lower, share = soft_neighbours(probs, num_bins)

    def both(table: Array) -> tuple[Array, Array]:
        return look_up(table, lower), look_up(jnp.diff(table, axis=-1, append=table[..., -1:]), lower)

    (_, count_step), (prob, prob_step), (label, label_step) = map(both, cotangents)
    values = probs.astype(jnp.float32)
    position = values * num_bins - 0.5
    slope = jnp.where((position > 0) & (position < num_bins - 1), float(num_bins), 0.0)
    through_weights = slope * (count_step + values * prob_step + one_hot(labels, probs) * label_step)
    return prob + share * prob_step + through_weights, label + share * label_step
