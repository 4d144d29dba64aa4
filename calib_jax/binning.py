"""The one place where voxels become bins: edges, indices and sums, for losses, metrics and plots alike."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Num

from calib_jax import _segment_reduce
from calib_jax._bin_terms import single_or_double
from calib_jax._checks import (
    AnyArray,
    Labels,
    Mask,
    Probs,
    as_inputs,
    check_choice,
    check_size,
)
from calib_jax._devices import AxisName, check_not_split, whole_sum
from calib_jax._eager import compiled, nan_where_undefined
from calib_jax._labels import one_hot

Closed = Literal["right", "left"]
Binning = Literal["hard", "soft", "adaptive"]
BINNINGS = ("hard", "soft", "adaptive")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BinStatistics:
    """Sums per image, class and bin, from which every calibration error, curve and histogram follows.

    Sums add up: statistics of batches, devices, hosts or tiles merge with `a + b` into those of the whole.
    A pytree, so it passes through `jit`, `vmap`, `psum` and `jax.tree.map`.

    Attributes:
        count: voxels in each bin, `[..., classes, num_bins]`; integers, with soft bins sums of weights.
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
        """`count` as float32, to divide by; NumPy's 64-bit counts of a whole data set do not overflow in it."""
        return jnp.asarray(self.count, jnp.float32)

    @nan_where_undefined
    def _per_voxel(self, total: AnyArray) -> Array:
        filled = self.weight > 0
        return jnp.where(filled, jnp.asarray(total, jnp.float32) / jnp.where(filled, self.weight, 1), jnp.nan)

    def __add__(self, other: "BinStatistics") -> "BinStatistics":
        return jax.tree.map(lambda a, b: a + b, self, other)

    def sum(self, axis: int | tuple[int, ...] = 0) -> "BinStatistics":
        """Statistics of all images together: the sums over `axis` (default: the batch).

        Counts of a data set may outgrow int32, so those on a device come out as float32, rounded to its 24
        bits; NumPy's are summed as 64-bit integers.
        """
        return BinStatistics(_sum_counts(self.count, axis), self.prob_sum.sum(axis), self.label_sum.sum(axis))


def _sum_counts(count: AnyArray, axis: int | tuple[int, ...]) -> AnyArray:
    if isinstance(count, np.ndarray) or count.dtype != jnp.int32:
        return count.sum(axis)
    # The halves of a count, summed apart, stay within int32 for 2^15 images.
    low, high = (part.sum(axis, dtype=jnp.int32) for part in (count & 0xFFFF, count >> 16))
    return high.astype(jnp.float32) * 2**16 + low.astype(jnp.float32)


def bin_edges(num_bins: int) -> Float[np.ndarray, "edges"]:
    """Bin edges as the reference has them, to the last bit: float32 `linspace(0, 1 + eps, num_bins + 1)`.

    `torch.linspace` counts up from the start in its first half and down from the end in its second, with
    one rounding each; float64 gives that rounding exactly.

    Args:
        num_bins: number of bins.

    Returns:
        float32 edges `[num_bins + 1]`, from 0 to 1 + eps.

    Raises:
        TypeError, ValueError: if `num_bins` is no integer of at least 1.

    Example:
        >>> bin_edges(2).tolist()
        [0.0, 0.5000000596046448, 1.0000001192092896]
    """
    check_size("num_bins", num_bins)
    end = np.float32(1) + np.finfo(np.float32).eps
    step = np.float64(end / np.float32(num_bins))
    i = np.arange(num_bins + 1)
    edges = np.where(i < (num_bins + 1) // 2, step * i, np.float64(end) - step * (num_bins - i))
    return edges.astype(np.float32)


@compiled(keeps_shape=True)
def bin_index(
    probs: Float[AnyArray, "*shape"], *, num_bins: int = 20, closed: Closed = "right"
) -> Int[Array, "*shape"]:
    """Index of the bin that each probability falls in.

    Args:
        probs: probabilities of any shape. Values outside [0, 1] fall into the end bins, NaN into the last.
        num_bins: number of equal-width bins.
        closed: the side on which a bin holds its edge. `"right"`: (l, r], the first one [0, r], which is the
            reference's `torch.bucketize(..., right=False)`; `"left"`: [l, r), the last one [l, 1].

    Returns:
        int32 indices in `[0, num_bins)`, of the shape of `probs`.

    Raises:
        ValueError: if `num_bins` is below 1 or `closed` is neither of the two.

    Example:
        >>> edge = bin_edges(2)[1]  # 0.5000001
        >>> bin_index(jnp.array([0.0, 0.5, edge, 1.0]), num_bins=2).tolist()
        [0, 0, 0, 1]
        >>> bin_index(jnp.array([0.0, 0.5, edge, 1.0]), num_bins=2, closed="left").tolist()
        [0, 0, 1, 1]
    """
    check_size("num_bins", num_bins)
    check_choice("closed", closed, ("right", "left"))
    probs = single_or_double(jnp.asarray(probs))
    last = num_bins - 1
    # The right bin or the one below it, so that comparing with one edge puts it right. NaN: the last bin.
    guess = jnp.floor(probs.astype(jnp.float32) * np.float32(num_bins * (1 - 2.0**-20)))
    guess = jnp.maximum(jnp.where(guess < last, guess, last), 0)
    edge = _upper_edge(guess, num_bins).astype(probs.dtype)
    beyond = probs > edge if closed == "right" else probs >= edge
    return jnp.minimum(jnp.where(beyond, guess + 1, guess), last).astype(jnp.int32)


def _upper_edge(index: Float[Array, "*shape"], num_bins: int) -> Float[Array, "*shape"]:
    """Edge above each bin, with the bits of `bin_edges`, from arithmetic that vectorises where a look-up does not.

    The step is split in two so that both products and the first difference are exact (up to 4,096 bins):
    one rounding is left, as in `bin_edges`.
    """
    if num_bins > 4096:
        return jnp.asarray(bin_edges(num_bins))[index.astype(jnp.int32) + 1]
    end = np.float32(1) + np.finfo(np.float32).eps
    step = end / np.float32(num_bins)
    coarse = np.rint(step * np.float32(2**24)) / np.float32(2**24)
    above, below = index + 1, num_bins - 1 - index
    down = (end - coarse * below) - (step - coarse) * below
    return jnp.where(above < (num_bins + 1) // 2, step * above, down)


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

    For image b, class c and bin m: `count` is the number of voxels whose probability of c falls in m,
    `prob_sum` the sum of those probabilities and `label_sum` the number of those voxels that are of class c.
    Counts are exact integers and bin means are within 1e-6 relative of float64, up to 2^30 voxels an image.

    Args:
        probs: class probabilities `[batch, *spatial, classes]`, of any float type; float64 (under
            `jax_enable_x64`) is binned as it is.
        labels: class ids `[batch, *spatial]` (ids outside `[0, classes)` belong to no class), or one-hot,
            overlapping or soft labels of the shape of `probs`.
        num_bins: number of bins.
        binning: `"hard"`: bins of equal width on [0, 1], each voxel in one. `"soft"`: a voxel is shared by the
            two bins whose centres are its neighbours, in proportion to its nearness, :math:`w_m(p) = \max(0,
            1 - |p M - m - 1/2|)`; beyond the first and last centre it belongs to the end bin alone. Sums are
            then weighted by w and `count` is a float. `"adaptive"`: bins of equal mass, their edges the
            quantiles of each image's and class's probabilities, ties kept together.
        closed: the side on which a hard bin holds its edge, see `bin_index`.
        where: voxels to count, boolean, `[batch, *spatial]` or of the shape of `probs`; None counts all.
            Elsewhere neither values nor gradients are touched, not even by NaN.
        axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which each image's voxels are split; the
            statistics are then those of the whole images, on every device. Not for adaptive bins, whose edges
            are no sums.

    Returns:
        `BinStatistics` of shape `[batch, classes, num_bins]`. A NaN probability makes `prob_sum` NaN in the
        last bin of its image and class. Differentiable in `probs` and float `labels` (reverse mode): hard and
        adaptive bins take membership for constant, as the paper does; through soft ones the gradient of the
        weights flows too. Bins of adaptive statistics are each image's own: merge hard or soft ones.

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

        Under a trace values are not checked. `jax.experimental.checkify` does so where it is wanted:

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
    check_bin_options(num_bins, binning, closed, axis_name)
    probs, labels, where = as_inputs(probs, labels, where)
    batch, classes = probs.shape[0], probs.shape[-1]
    flat_probs = probs.reshape(batch, -1, classes)
    flat_labels = labels.reshape(batch, -1, *labels.shape[probs.ndim - 1 :])
    flat_where = None if where is None else where.reshape(batch, -1, *(where.shape[probs.ndim - 1 :] or (1,)))
    if binning == "soft":
        sums: Any = _soft_sums(flat_probs, flat_labels, flat_where, num_bins)
    else:
        edges = adaptive_edges(flat_probs, flat_where, num_bins) if binning == "adaptive" else None
        sums = _hard_sums(flat_probs, flat_labels, flat_where, edges, num_bins, closed)
    return BinStatistics(*whole_sum(sums, axis_name))


def check_bin_options(num_bins: Any, binning: Any, closed: Any, axis_name: AxisName | None) -> None:
    """Raises on options that `bin_statistics` does not take."""
    check_size("num_bins", num_bins)
    check_choice("binning", binning, BINNINGS)
    check_choice("closed", closed, ("right", "left"))
    if binning != "hard" and closed != "right":
        raise ValueError(f'closed="left" applies to binning="hard" only; got binning={binning!r}.')
    if binning == "adaptive":
        check_not_split('binning="adaptive"', axis_name)


# Hard and adaptive bins: a voxel belongs to one bin.


def adaptive_edges(
    probs: Float[Array, "batch voxels classes"], where: Array | None, num_bins: int
) -> Float[Array, "batch classes inner_edges"]:
    """Quantiles that part the counted probabilities of each image and class into bins of equal mass.

    Each edge is one of the probabilities and belongs to the bin below it.
    """
    values = single_or_double(lax.stop_gradient(probs))
    keep = jnp.ones((1, 1, 1), bool) if where is None else where
    counted = jnp.broadcast_to(keep & ~jnp.isnan(values), values.shape)
    size = counted.sum(1, dtype=jnp.int32)[..., None]
    k = jnp.arange(1, num_bins, dtype=jnp.int32)[None, None]
    # ceil(k * size / num_bins) - 1, in steps that int32 holds.
    rank = k * (size // num_bins) + (k * (size % num_bins) + num_bins - 1) // num_bins - 1
    ordered = jnp.moveaxis(jnp.sort(jnp.where(counted, values, jnp.inf), axis=1), 1, 2)
    return jnp.take_along_axis(ordered, jnp.maximum(rank, 0), axis=-1)


def _index(probs: Array, edges: Array | None, *, num_bins: int, closed: Closed) -> Array:
    """Bins of some probabilities of an image, in any shape but voxel by voxel: equal ones, or between its edges."""
    if edges is None:
        return bin_index(probs, num_bins=num_bins, closed=closed)
    values = single_or_double(probs).reshape(-1, edges.shape[0], 1)
    bins = jnp.where(jnp.isnan(values), True, values > edges[None]).sum(-1, dtype=jnp.int32)
    return bins.reshape(probs.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _hard_sums(
    probs: Float[Array, "batch voxels classes"],
    labels: Num[Array, "batch voxels"] | Num[Array, "batch voxels classes"],
    where: Array | None,
    edges: Float[Array, "batch classes inner_edges"] | None,
    num_bins: int,
    closed: Closed,
) -> Any:
    index = functools.partial(_index, num_bins=num_bins, closed=closed)
    return _segment_reduce.bin_sums(probs, labels, where, index, num_bins, edges=edges)


def _hard_sums_forward(
    probs: Array, labels: Array, where: Any, edges: Any, num_bins: int, closed: Closed
) -> Any:
    return _hard_sums(probs, labels, where, edges, num_bins, closed), (probs, labels, where, edges)


def _hard_sums_backward(num_bins: int, closed: Closed, residuals: Any, cotangents: Any) -> Any:
    # A sum's gradient is 1 for each voxel in it, so every voxel looks up the cotangent of its own bin. The
    # index is computed again: it costs less than keeping it.
    probs, labels, where, edges = residuals
    _, d_prob_sum, d_label_sum = cotangents
    index = functools.partial(_index, num_bins=num_bins, closed=closed)

    def look_up(table: Array) -> Array:
        return _segment_reduce.table_lookup(table, probs, lambda probs: jax.vmap(index)(probs, edges))

    d_probs = _counted(look_up(d_prob_sum), where, probs.dtype)
    d_labels = _counted(look_up(d_label_sum), where, labels.dtype) if _is_float(labels) else None
    return d_probs, d_labels, None, None


_hard_sums.defvjp(_hard_sums_forward, _hard_sums_backward)


def _is_float(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _counted(gradient: Array, where: Array | None, dtype: Any) -> Array:
    gradient = gradient.astype(dtype)
    return gradient if where is None else jnp.where(where, gradient, 0)


# Soft bins: a voxel is shared by two neighbours.


def _soft_place(probs: Array, num_bins: int) -> tuple[Array, Array]:
    """The lower of the two bins that share each probability, and the upper one's share. NaN: the last bin's."""
    position = jnp.clip(probs.astype(jnp.float32) * num_bins - 0.5, 0, num_bins - 1)
    position = jnp.where(jnp.isnan(position), num_bins - 1, position)
    lower = jnp.floor(position)
    return lower.astype(jnp.int32), position - lower


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _soft_sums(
    probs: Float[Array, "batch voxels classes"],
    labels: Num[Array, "batch voxels"] | Num[Array, "batch voxels classes"],
    where: Array | None,
    num_bins: int,
) -> Any:
    place = functools.partial(_soft_place, num_bins=num_bins)
    return _segment_reduce.soft_bin_sums(probs, labels, where, place, num_bins)


def _soft_sums_forward(probs: Array, labels: Array, where: Array | None, num_bins: int) -> Any:
    return _soft_sums(probs, labels, where, num_bins), (probs, labels, where)


def _soft_sums_backward(num_bins: int, residuals: Any, cotangents: Any) -> Any:
    # With lower bin j, share f, cotangents (c, P, Y) of the sums and D their step from bin j to bin j + 1:
    #   d_label = Y_j + f DY,    d_prob = P_j + f DP + f' (Dc + p DP + y DY),    f' = M between the end centres.
    probs, labels, where = residuals
    place = functools.partial(_soft_place, num_bins=num_bins)

    def look_up(table: Array) -> tuple[Array, Array]:
        step = jnp.diff(table, axis=-1, append=table[..., -1:])
        entries = (_segment_reduce.table_lookup(t, probs, lambda p: place(p)[0]) for t in (table, step))
        return next(entries), next(entries)

    (_, count_step), (prob, prob_step), (label, label_step) = (look_up(table) for table in cotangents)
    values = probs.astype(jnp.float32)
    target = one_hot(labels, probs)
    share = place(probs)[1]
    position = values * num_bins - 0.5
    slope = jnp.where((position > 0) & (position < num_bins - 1), float(num_bins), 0.0)
    through_weights = slope * (count_step + values * prob_step + target * label_step)
    d_probs = _counted(prob + share * prob_step + through_weights, where, probs.dtype)
    d_labels = _counted(label + share * label_step, where, labels.dtype) if _is_float(labels) else None
    return d_probs, d_labels, None


_soft_sums.defvjp(_soft_sums_forward, _soft_sums_backward)
