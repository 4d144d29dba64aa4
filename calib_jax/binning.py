"""The one place where voxels become bins: edges, indices and sums, for losses, metrics and plots alike."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from calib_jax import _segment_reduce
from calib_jax._checks import AnyArray, Labels, Mask, Probs, as_inputs, check_choice, check_num_bins

Closed = Literal["right", "left"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BinStatistics:
    """Sums per image, class and bin, from which every calibration error, curve and histogram follows.

    Sums add up: statistics of batches, devices, hosts or tiles merge with `a + b` into those of the whole.
    A pytree, so it passes through `jit`, `vmap`, `psum` and `jax.tree.map`.

    Attributes:
        count: voxels in each bin, `[..., classes, num_bins]`, integers.
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

    def _per_voxel(self, total: AnyArray) -> Array:
        filled = self.weight > 0
        return jnp.where(filled, jnp.asarray(total, jnp.float32) / jnp.where(filled, self.weight, 1), jnp.nan)

    def __add__(self, other: "BinStatistics") -> "BinStatistics":
        return jax.tree.map(lambda a, b: a + b, self, other)

    def sum(self, axis: int | tuple[int, ...] = 0) -> "BinStatistics":
        """Statistics of all images together: the sums over `axis` (default: the batch)."""
        return jax.tree.map(lambda a: a.sum(axis), self)


def bin_edges(num_bins: int) -> Float[np.ndarray, "edges"]:
    """Bin edges as the reference has them, to the last bit: float32 `linspace(0, 1 + eps, num_bins + 1)`.

    `torch.linspace` counts up from the start in its first half and down from the end in its second, with
    one rounding each; float64 gives that rounding exactly.

    Example:
        >>> bin_edges(2).tolist()
        [0.0, 0.5000000596046448, 1.0000001192092896]
    """
    check_num_bins(num_bins)
    end = np.float32(1) + np.finfo(np.float32).eps
    step = np.float64(end / np.float32(num_bins))
    i = np.arange(num_bins + 1)
    edges = np.where(i < (num_bins + 1) // 2, step * i, np.float64(end) - step * (num_bins - i))
    return edges.astype(np.float32)


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
    check_num_bins(num_bins)
    check_choice("closed", closed, ("right", "left"))
    probs = jnp.asarray(probs).astype(jnp.float32)
    last = num_bins - 1
    # The right bin or the one below it, so that comparing with one edge puts it right. NaN: the last bin.
    guess = jnp.floor(probs * np.float32(num_bins * (1 - 2.0**-20)))
    guess = jnp.maximum(jnp.where(guess < last, guess, last), 0)
    edge = _upper_edge(guess, num_bins)
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


def bin_statistics(
    probs: Probs,
    labels: Labels,
    *,
    num_bins: int = 20,
    closed: Closed = "right",
    where: Mask | None = None,
) -> BinStatistics:
    """Count, probability sum and label sum of every bin, per image and class.

    For image b, class c and bin m: `count` is the number of voxels whose probability of c falls in m,
    `prob_sum` the sum of those probabilities and `label_sum` the number of those voxels that are of class c.
    Counts are exact integers and bin means are within 1e-6 relative of float64, up to 2^30 voxels an image.

    Args:
        probs: class probabilities `[batch, *spatial, classes]`, float32, bfloat16 or float16.
        labels: class ids `[batch, *spatial]` (ids outside `[0, classes)` belong to no class), or one-hot,
            overlapping or soft labels of the shape of `probs`.
        num_bins: number of equal-width bins on [0, 1].
        closed: the side on which a bin holds its edge, see `bin_index`.
        where: voxels to count, boolean, `[batch, *spatial]` or of the shape of `probs`; None counts all.
            Elsewhere neither values nor gradients are touched, not even by NaN.

    Returns:
        `BinStatistics` of shape `[batch, classes, num_bins]`. A NaN probability makes `prob_sum` NaN in the
        last bin of its image and class. Differentiable in `probs` and float `labels` (reverse mode): bin
        membership is constant, as in the paper.

    Raises:
        TypeError, ValueError: on dtypes, shapes or options that do not fit; never on values.

    Example:
        >>> probs = jnp.array([[[0.9, 0.1], [0.6, 0.4]]])  # one image of two voxels, two classes
        >>> stats = bin_statistics(probs, jnp.array([[0, 1]]), num_bins=2)
        >>> stats.count.tolist()
        [[[0, 2], [2, 0]]]
        >>> stats.mean_prob[0, 0, 1], stats.mean_label[0, 0, 1]
        (Array(0.75, dtype=float32), Array(0.5, dtype=float32))

    References:
        Barfoot et al., "Average Calibration Error: A Differentiable Loss for Improved Reliability in Image
        Segmentation", arXiv 2403.06759.
    """
    check_num_bins(num_bins)
    check_choice("closed", closed, ("right", "left"))
    probs, labels, where = as_inputs(probs, labels, where)
    batch, classes = probs.shape[0], probs.shape[-1]
    flat_probs = probs.reshape(batch, -1, classes)
    flat_labels = labels.reshape(batch, -1, *labels.shape[probs.ndim - 1 :])
    flat_where = None if where is None else where.reshape(batch, -1, *(where.shape[probs.ndim - 1 :] or (1,)))
    sums: Any = _hard_sums(flat_probs, flat_labels, flat_where, num_bins, closed)
    return BinStatistics(*sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _hard_sums(
    probs: Float[Array, "batch voxels classes"],
    labels: Num[Array, "batch voxels"] | Num[Array, "batch voxels classes"],
    where: Array | None,
    num_bins: int,
    closed: Closed,
) -> tuple[Array, Array, Array]:
    index = functools.partial(bin_index, num_bins=num_bins, closed=closed)
    return _segment_reduce.bin_sums(probs, labels, where, index, num_bins)


def _hard_sums_forward(
    probs: Array, labels: Array, where: Array | None, num_bins: int, closed: Closed
) -> tuple[Any, Any]:
    return _hard_sums(probs, labels, where, num_bins, closed), (probs, labels, where)


def _hard_sums_backward(num_bins: int, closed: Closed, residuals: Any, cotangents: Any) -> Any:
    # A sum's gradient is 1 for each voxel in it, so every voxel looks up the cotangent of its own bin. The
    # index is computed again: it costs less than keeping it.
    probs, labels, where = residuals
    _, d_prob_sum, d_label_sum = cotangents
    index = functools.partial(bin_index, num_bins=num_bins, closed=closed)

    def per_voxel(table: Array, dtype: Any) -> Array:
        gradient = _segment_reduce.table_lookup(table, probs, index).astype(dtype)
        return gradient if where is None else jnp.where(where, gradient, 0)

    d_probs = per_voxel(d_prob_sum, probs.dtype)
    d_labels = per_voxel(d_label_sum, labels.dtype) if jnp.issubdtype(labels.dtype, jnp.floating) else None
    return d_probs, d_labels, None


_hard_sums.defvjp(_hard_sums_forward, _hard_sums_backward)
