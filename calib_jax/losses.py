"""Calibration errors as training losses: mL1-ACE, mL1-ECE and mL1-MCE."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from calib_jax._checks import AnyArray, Labels, Mask, Probs, as_inputs, check_choice, check_flag
from calib_jax._devices import AxisName
from calib_jax._eager import compiled
from calib_jax._sums.bins import Binning, Bins, Closed
from calib_jax.binning import BinStatistics, check_bins, statistics_in_bins
from calib_jax.errors import (
    are_counted,
    average_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
)

Reduction = Literal["mean", "sum", "none"]


@compiled()
def mL1_ace(
    probs: Probs,
    labels: Labels,
    *,
    num_bins: int = 20,
    binning: Binning = "hard",
    closed: Closed = "right",
    where: Mask | None = None,
    include_background: bool = True,
    class_weights: Float[AnyArray, "counted_classes"] | None = None,
    ignore_empty_classes: bool = False,
    pool_images: bool = False,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> Float[Array, "*reduced"]:
    r"""Marginal L1 average calibration error: the mean over images and classes of their ACE.

    For image b and class c with M non-empty bins, :math:`e_{bc} = \frac{1}{M} \sum_m |\bar p_m - \bar y_m|`, the
    mean gap between mean probability and observed frequency. The gradient of a voxel in a hard bin m of n_m voxels
    is :math:`\mathrm{sign}(\bar p_m - \bar y_m) / (n_m M)`, divided by the number of images and classes. It is the
    same for all voxels of a bin. Soft bins also move voxels from bin to bin.

    No compiler option is needed. On CPUs under Linux, the environment variable
    `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`, set before Python starts, puts large arrays into huge pages. This helps
    images of more than a million voxels most: the gradient of each call is new memory.

    Args:
        probs: class probabilities `[batch, *spatial, classes]`.
        labels: class ids `[batch, *spatial]`, or one-hot, overlapping or soft labels of the shape of `probs`.
        num_bins: number of bins on [0, 1].
        binning: `"hard"`, `"soft"` or `"adaptive"`, see `calib_jax.bin_statistics`.
        closed: the side on which a hard bin includes its edge, see `calib_jax.bin_index`.
        where: voxels to count, boolean, `[batch, *spatial]` or of the shape of `probs`; None counts all.
        include_background: False leaves class 0 out, which saves its work.
        class_weights: weights `[classes]` of the mean over classes (after background is left out), at least 0.
        ignore_empty_classes: True sets the error of a class without a voxel in an image to zero, as the follow-up
            does in training. The zero still counts in the mean.
        pool_images: True fills one set of bins from the whole batch instead of one set for each image.
        reduction: `"mean"` over images and classes, `"sum"`, or `"none"` for `[batch, classes]`.
        axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which each image's voxels are split, see
            `segmentation_loss`. Not for adaptive bins.

    Returns:
        The loss, a scalar or `[batch, classes]` (`[1, classes]` of pooled images). The error of an image and class
        in which `where` counts nothing is zero and left out of the mean. A NaN probability gives NaN.

    Raises:
        TypeError, ValueError: on dtypes, shapes or options that do not fit, and on probabilities or one-hot or soft
            labels that are counted, concrete (not traced) and outside [0, 1] by more than rounding.

    Example:
        >>> import jax
        >>> labels = jnp.array([[0, 0, 1, 1]])
        >>> logits = jnp.array([[[2.0, 0.0], [0.0, 0.5], [0.0, 2.0], [0.0, 2.0]]])
        >>> loss, grad = jax.value_and_grad(lambda x: mL1_ace(jax.nn.softmax(x), labels))(logits)
        >>> round(float(loss), 4), grad.shape
        (0.287, (1, 4, 2))
        >>> round(float(mL1_ace(jax.nn.softmax(logits), labels, num_bins=5, binning="soft")), 4)
        0.2851

        Traced values are not checked. `jax.experimental.checkify` checks them:

        >>> from jax.experimental import checkify
        >>> def checked(probs):
        ...     checkify.check(((probs > -1e-3) & (probs < 1.001)).all(), "probs must lie in [0, 1]")
        ...     return mL1_ace(probs, labels)
        >>> error, loss = jax.jit(checkify.checkify(checked))(logits)  # without a softmax
        >>> error.get()  # error.throw() raises it
        'probs must lie in [0, 1] (`check` failed)'

    References:
        Barfoot et al., arXiv 2403.06759 and 2506.03942.
    """
    bins = Bins(binning, num_bins, closed)
    options = MarginalOptions(
        bins, include_background, class_weights, ignore_empty_classes, pool_images, reduction, axis_name
    )
    return _checked_loss(average_calibration_error, probs, labels, where, options)


@compiled()
def mL1_ece(
    probs: Probs,
    labels: Labels,
    *,
    num_bins: int = 20,
    binning: Binning = "hard",
    closed: Closed = "right",
    where: Mask | None = None,
    include_background: bool = True,
    class_weights: Float[AnyArray, "counted_classes"] | None = None,
    ignore_empty_classes: bool = False,
    pool_images: bool = False,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> Float[Array, "*reduced"]:
    """Marginal L1 expected calibration error: the mean over images and classes of their ECE.

    Unlike in `mL1_ace`, the weight of a bin is its share of the voxels, so that the many easy voxels far from a
    boundary dominate. Arguments, results and errors are those of `mL1_ace`.

    Example:
        >>> probs = jnp.array([[[0.1], [0.8], [0.8], [0.8]]])
        >>> round(float(mL1_ece(probs, jnp.array([[[0], [1], [1], [1]]]), num_bins=2)), 4)
        0.175

    References:
        Naeini et al., AAAI 2015; as a loss, Barfoot et al., arXiv 2506.03942.
    """
    bins = Bins(binning, num_bins, closed)
    options = MarginalOptions(
        bins, include_background, class_weights, ignore_empty_classes, pool_images, reduction, axis_name
    )
    return _checked_loss(expected_calibration_error, probs, labels, where, options)


@compiled()
def mL1_mce(
    probs: Probs,
    labels: Labels,
    *,
    num_bins: int = 20,
    binning: Binning = "hard",
    closed: Closed = "right",
    where: Mask | None = None,
    include_background: bool = True,
    class_weights: Float[AnyArray, "counted_classes"] | None = None,
    ignore_empty_classes: bool = False,
    pool_images: bool = False,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> Float[Array, "*reduced"]:
    """Marginal L1 maximum calibration error: the mean over images and classes of their MCE.

    The largest gap replaces the mean gap of `mL1_ace`, so that the gradient reaches the voxels of one bin of each
    image and class. Arguments, results and errors are those of `mL1_ace`.

    Example:
        >>> probs = jnp.array([[[0.1], [0.8], [0.8], [0.8]]])
        >>> round(float(mL1_mce(probs, jnp.array([[[0], [1], [1], [1]]]), num_bins=2)), 4)
        0.2

    References:
        Naeini et al., AAAI 2015; as a loss, Barfoot et al., arXiv 2506.03942.
    """
    bins = Bins(binning, num_bins, closed)
    options = MarginalOptions(
        bins, include_background, class_weights, ignore_empty_classes, pool_images, reduction, axis_name
    )
    return _checked_loss(maximum_calibration_error, probs, labels, where, options)


class MarginalOptions(NamedTuple):
    """Options of `mL1_ace`, `mL1_ece` and `mL1_mce`."""

    bins: Bins
    include_background: bool
    class_weights: Any
    ignore_empty_classes: bool
    pool_images: bool
    reduction: Reduction
    axis_name: AxisName | None

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises on options that do not fit probabilities of this shape."""
        check_bins(self.bins, self.axis_name)
        check_choice("reduction", self.reduction, ("mean", "sum", "none"))
        for name in ("include_background", "pool_images", "ignore_empty_classes"):
            check_flag(name, getattr(self, name))
        counted = shape[-1] - (not self.include_background)
        if counted == 0:
            raise ValueError(f"include_background=False leaves no class of probs of shape {shape}.")
        if self.class_weights is not None and np.shape(self.class_weights) != (counted,):
            raise ValueError(
                f"class_weights must have shape ({counted},), one per class; got {np.shape(self.class_weights)}."
            )


Error = Callable[[BinStatistics], Array]


def _checked_loss(error: Error, probs: Any, labels: Any, where: Any, options: MarginalOptions) -> Array:
    probs, labels, where = as_inputs(probs, labels, where)
    options.check(probs.shape)
    return marginal_l1(error, probs, labels, where, options)


def marginal_l1(
    error: Error, probs: Array, labels: Array, where: Array | None, options: MarginalOptions
) -> Float[Array, "*reduced"]:
    """The mean (or sum) over images and classes of their `error`, from arguments that have been checked."""
    if options.pool_images:
        probs, labels, where = probs[None], labels[None], None if where is None else where[None]
    first = 0 if options.include_background else 1
    stats = statistics_in_bins(probs, labels, where, options.bins, options.axis_name, first_class=first)
    errors, counted = error(stats), are_counted(stats)
    if options.ignore_empty_classes:
        errors = jnp.where(stats.label_sum.sum(-1) > 0, errors, 0)
    weights = jnp.ones(errors.shape[1:]) if options.class_weights is None else options.class_weights
    weights = jnp.asarray(weights, errors.dtype)[None, :]
    weighted = weights * jnp.where(counted, errors, 0)
    if options.reduction == "none":
        return weighted
    if options.reduction == "sum":
        return weighted.sum()
    total_weight = (weights * counted.astype(errors.dtype)).sum()
    return weighted.sum() / jnp.where(total_weight == 0, 1, total_weight)
