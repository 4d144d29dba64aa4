"""Other published losses against overconfidence, to compare and combine with mL1-ACE. All take logits.

A voxel that `where` masks, or that has no class (an id outside `[0, classes)`, a row of zeros), costs nothing and
gets no gradient, even if its logits are NaN. Means are over the voxels that `where` keeps, with or without a class.
They are zero if it keeps none.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from calib_jax._checks import AnyArray, Labels, check_choice, check_flag, check_number, check_size
from calib_jax._devices import AxisName, whole_sum
from calib_jax._eager import compiled
from calib_jax._labels import are_dense, one_hot
from calib_jax._parts import left_to_compiler
from calib_jax._voxels import Inputs, voxel_cross_entropy, voxel_inputs, voxel_mean

Logits = Float[AnyArray, "batch *spatial classes"]
VoxelMask = Bool[AnyArray, "batch *spatial"]


@compiled()
def focal_loss(
    logits: Logits,
    labels: Labels,
    *,
    gamma: float = 2.0,
    where: VoxelMask | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    r"""Multi-class focal loss: cross-entropy with small weights for voxels that are right already.

    :math:`-\sum_c y_c (1 - p_c)^\gamma \log p_c` with p = softmax(logits), averaged over voxels. The factor
    limits the reward for ever larger logits, which improves calibration. Gamma 0 gives cross-entropy.

    Args:
        logits: unnormalised scores `[batch, *spatial, classes]`, at least two classes.
        labels: class ids `[batch, *spatial]`, or one-hot or soft labels of the shape of `logits`.
        gamma: how fast the weight of a voxel falls with its probability, at least 0.
        where: voxels to count, boolean, `[batch, *spatial]`; None counts all.
        axis_name: the mesh axis over which each image's voxels are split, see `calib_jax.segmentation_loss`.

    Returns:
        The scalar loss. MONAI's `FocalLoss(use_softmax=True)` also averages over classes: it equals this loss
        divided by the number of classes.

    Raises:
        TypeError, ValueError: on dtypes, shapes or options that do not fit, and on one-hot or soft labels that are
            counted, concrete and outside [0, 1]; never on traced values.

    Example:
        >>> logits = jnp.zeros((1, 8, 8, 2))
        >>> labels = jnp.zeros((1, 8, 8), jnp.int32)
        >>> round(float(focal_loss(logits, labels)), 4)  # (1 - 1/2)^2 log 2
        0.1733

    References:
        Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017; for calibration, Mukhoti et al.,
        "Calibrating Deep Neural Networks using Focal Loss", NeurIPS 2020.
    """
    check_number("gamma", gamma, 0.0)
    inputs = voxel_inputs(logits, labels, where, axis_name)
    if are_dense(inputs.labels, inputs.logits):
        surprise = -jax.nn.log_softmax(inputs.logits)
        return voxel_mean((inputs.labels * _focal(surprise, gamma)).sum(-1), inputs)
    return voxel_mean(_focal(voxel_cross_entropy(inputs), gamma), inputs)


@compiled()
def label_smoothing_loss(
    logits: Logits,
    labels: Labels,
    *,
    alpha: float = 0.1,
    where: VoxelMask | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    r"""Cross-entropy with labels that are mixed with the uniform distribution.

    :math:`-\sum_c ((1 - \alpha) y_c + \alpha / K) \log p_c` with p = softmax(logits) of K classes, averaged over
    voxels: PyTorch's `CrossEntropyLoss(label_smoothing=alpha)`.

    Args:
        logits: unnormalised scores `[batch, *spatial, classes]`, at least two classes.
        labels: class ids `[batch, *spatial]`, or one-hot or soft labels of the shape of `logits`.
        alpha: share of the uniform distribution, in [0, 1]; 0 is cross-entropy.
        where: voxels to count, boolean, `[batch, *spatial]`; None counts all.
        axis_name: the mesh axis over which each image's voxels are split, see `calib_jax.segmentation_loss`.

    Returns:
        The scalar loss.

    Raises:
        TypeError, ValueError: on dtypes, shapes or options that do not fit, and on one-hot or soft labels that are
            counted, concrete and outside [0, 1]; never on traced values.

    Example:
        >>> logits = jnp.array([[[2.0, 0.0], [0.0, 3.0]]])
        >>> labels = jnp.array([[0, 1]])
        >>> round(float(label_smoothing_loss(logits, labels)), 4)
        0.2128

    References:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016; for calibration,
        Mueller et al., "When Does Label Smoothing Help?", NeurIPS 2019.
    """
    import optax

    check_number("alpha", alpha, 0.0, 1.0)
    inputs = voxel_inputs(logits, labels, where, axis_name)
    targets = optax.losses.smooth_labels(one_hot(inputs.labels, inputs.logits), alpha)
    return voxel_mean(voxel_cross_entropy(inputs._replace(labels=targets)), inputs)


@compiled(keeps_shape=True)
def spatially_varying_label_smoothing_loss(
    logits: Logits,
    labels: Labels,
    *,
    sigma: float = 1.0,
    kernel_size: int = 3,
    where: VoxelMask | None = None,
) -> Float[Array, ""]:
    r"""SVLS: cross-entropy with labels that are soft at the borders between classes and hard inside.

    The target of voxel i is :math:`\tfrac{1}{2} y_i + \tfrac{1}{2} \sum_j w_j y_j / \sum_j w_j` over its neighbours
    j in a cube of `kernel_size` voxels along every spatial axis. The weights are a Gaussian kernel,
    :math:`w_j = \exp(-|i - j|^2 / (2 \sigma^2))`, whose centre weighs as much as all its neighbours together.
    Beyond its border, an image repeats its outermost voxels. Neighbours that `where` masks or that have no class
    are left out, and the remaining weights, centre included, are scaled to a sum of 1.

    Args:
        logits: unnormalised scores `[batch, *spatial, classes]`, at least two classes and one spatial axis.
        labels: class ids `[batch, *spatial]`, or one-hot or soft labels of the shape of `logits`.
        sigma: standard deviation of the Gaussian in voxels, at least 0.1.
        kernel_size: side of the kernel in voxels, odd and at least 3.
        where: voxels to count, boolean, `[batch, *spatial]`; None counts all.

    Returns:
        The scalar loss.

    Raises:
        TypeError, ValueError: on dtypes, shapes or options that do not fit, and on one-hot or soft labels that are
            counted, concrete and outside [0, 1]; never on traced values.

    Example:
        >>> logits = jnp.array([[[2.0, 0.0], [0.0, 3.0], [0.0, 3.0]]])
        >>> labels = jnp.array([[0, 1, 1]])  # targets of class 1: 0.25, 0.75, 1
        >>> round(float(spatially_varying_label_smoothing_loss(logits, labels)), 4)
        0.4914

    References:
        Islam and Glocker, "Spatially Varying Label Smoothing: Capturing Uncertainty from Expert Annotations",
        IPMI 2021, arXiv 2104.05788.
    """
    check_number("sigma", sigma, 0.1)
    inputs = _spatial_inputs(logits, labels, where, kernel_size)
    targets = _spatially_smoothed(one_hot(inputs.labels, inputs.logits), inputs.has_class, sigma, kernel_size)
    return voxel_mean(voxel_cross_entropy(inputs._replace(labels=targets)), inputs)


@compiled()
def margin_label_smoothing_loss(
    logits: Logits,
    labels: Labels,
    *,
    margin: float = 10.0,
    weight: float = 0.1,
    where: VoxelMask | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    r"""MbLS: cross-entropy plus a penalty on logits that lie more than a margin below the largest.

    :math:`\mathrm{CE} + \lambda \frac{1}{K} \sum_c \max(0, \max_k l_k - l_c - m)` for the K logits l of a voxel,
    averaged over voxels. Label smoothing penalises every distance between logits, MbLS only excessive ones.

    Args:
        logits: unnormalised scores `[batch, *spatial, classes]`, at least two classes.
        labels: class ids `[batch, *spatial]`, or one-hot or soft labels of the shape of `logits`.
        margin: distance m between logits that costs nothing, at least 0.
        weight: weight lambda of the penalty, at least 0. The paper sums the penalty over classes. This function
            averages it, as the authors' code does, so that their 0.1 means the same.
        where: voxels to count, boolean, `[batch, *spatial]`; None counts all.
        axis_name: the mesh axis over which each image's voxels are split, see `calib_jax.segmentation_loss`.

    Returns:
        The scalar loss.

    Raises:
        TypeError, ValueError: on dtypes, shapes or options that do not fit, and on one-hot or soft labels that are
            counted, concrete and outside [0, 1]; never on traced values.

    Example:
        >>> logits = jnp.array([[[2.0, 0.0], [0.0, 30.0]]])
        >>> labels = jnp.array([[0, 1]])  # the penalty is 20 / 2 in the second voxel
        >>> round(float(margin_label_smoothing_loss(logits, labels)), 4)
        0.5635

    References:
        Liu et al., "The Devil is in the Margin: Margin-based Label Smoothing for Network Calibration", CVPR
        2022, arXiv 2111.15430; for medical images, Murugesan et al., arXiv 2209.09641.
    """
    check_number("margin", margin, 0.0)
    check_number("weight", weight, 0.0)
    inputs = voxel_inputs(logits, labels, where, axis_name)
    distances = inputs.logits.max(-1, keepdims=True) - inputs.logits
    penalty = jax.nn.relu(distances - margin).mean(-1)
    return voxel_mean(voxel_cross_entropy(inputs) + weight * penalty, inputs)


@compiled(keeps_shape=True)
def neighbor_aware_loss(
    logits: Logits,
    labels: Labels,
    *,
    kernel_size: int = 3,
    weight: float = 0.1,
    norm: Literal["l1", "l2"] = "l1",
    where: VoxelMask | None = None,
) -> Float[Array, ""]:
    r"""NACL: cross-entropy plus a penalty on logits that differ from the share of each class nearby.

    :math:`\mathrm{CE} + \lambda \frac{1}{K} \sum_c |\tau_c - l_c|` for the K logits l of a voxel, averaged over
    voxels; tau_c is the share of class c in the cube of `kernel_size` voxels along every spatial axis around the
    voxel, itself included. Voxels that lie beyond the image, are masked or have no class count for no class, but
    for the size of the cube, as in MONAI's `NACLLoss`. The penalty keeps the logits themselves near [0, 1].

    Args:
        logits: unnormalised scores `[batch, *spatial, classes]`, at least two classes and one spatial axis.
        labels: class ids `[batch, *spatial]`, or one-hot or soft labels of the shape of `logits`.
        kernel_size: side of the cube in voxels, odd and at least 3.
        weight: weight lambda of the penalty, at least 0. The paper sums the penalty over classes. This function
            averages it, as the authors' code and MONAI's do, so that their 0.1 means the same.
        norm: `"l1"` for the absolute difference, `"l2"` for the squared one.
        where: voxels to count, boolean, `[batch, *spatial]`; None counts all.

    Returns:
        The scalar loss.

    Raises:
        TypeError, ValueError: on dtypes, shapes or options that do not fit, and on one-hot or soft labels that are
            counted, concrete and outside [0, 1]; never on traced values.

    Example:
        >>> logits = jnp.array([[[2.0, 0.0], [0.0, 3.0], [0.0, 3.0]]])
        >>> labels = jnp.array([[0, 1, 1]])  # shares of class 1: 1/3, 2/3, 2/3
        >>> round(float(neighbor_aware_loss(logits, labels)), 4)
        0.1914

    References:
        Murugesan et al., "Trust your neighbours: Penalty-based constraints for model calibration", MICCAI 2023,
        arXiv 2303.06268; "Neighbor-Aware Calibration of Segmentation Networks", arXiv 2401.14487.
    """
    check_number("weight", weight, 0.0)
    check_choice("norm", norm, ("l1", "l2"))
    inputs = _spatial_inputs(logits, labels, where, kernel_size)
    shares = one_hot(inputs.labels, inputs.logits)
    for axis in _spatial_axes(shares):
        shares = _kernel_sum(shares, axis, [1 / kernel_size] * kernel_size, "constant")
    difference = inputs.logits - shares
    # Not abs: its gradient at 0 is 1 in JAX, which would move logits that are right.
    distance = jnp.sign(difference) * difference if norm == "l1" else difference**2
    return voxel_mean(voxel_cross_entropy(inputs) + weight * distance.mean(-1), inputs)


@compiled()
def dsc_plus_plus_loss(
    logits: Logits,
    labels: Labels,
    *,
    gamma: float = 2.0,
    smooth: float = 5e-6,
    include_background: bool = True,
    where: VoxelMask | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    r"""DSC++: soft Dice in which small errors weigh less than confident ones.

    :math:`1 - 2\,TP / (2\,TP + FP + FN)` per image and class, with :math:`TP = \sum \min(p, y)`,
    :math:`FP = \sum \max(p - y, 0)^\gamma` and :math:`FN = \sum \max(y - p, 0)^\gamma` over voxels, averaged over
    images and classes. Plain Dice (gamma 1) rewards pushing every probability to 0 or 1. Here a remaining small
    doubt costs next to nothing. For labels 0 and 1 these are the paper's terms :math:`p y`, :math:`p (1 - y)` and
    :math:`(1 - p) y`; unlike those, they have their optimum at p = y for soft labels too.

    Args:
        logits: unnormalised scores `[batch, *spatial, classes]`, at least two classes.
        labels: class ids `[batch, *spatial]`, or one-hot or soft labels of the shape of `logits`. Voxels without
            a class are left out: they are not false positives of any class.
        gamma: power of each voxel's error, at least 0; 1 is the Dice of `calib_jax.segmentation_loss`.
        smooth: added to TP, and to TP + (FP + FN) / 2, as in `optax.losses.dice_loss`.
        include_background: False leaves class 0 out of the mean.
        where: voxels to count, boolean, `[batch, *spatial]`; None counts all.
        axis_name: the mesh axis over which each image's voxels are split, see `calib_jax.segmentation_loss`.

    Returns:
        The scalar loss. An image in which no voxel is counted is left out of the mean.

    Raises:
        TypeError, ValueError: on dtypes, shapes or options that do not fit, and on one-hot or soft labels that are
            counted, concrete and outside [0, 1]; never on traced values.

    Example:
        >>> logits = jnp.log(jnp.array([[[0.9, 0.1], [0.2, 0.8]]]))
        >>> labels = jnp.array([[0, 1]])  # class 0: TP 0.9, FP 0.04, FN 0.01
        >>> round(float(dsc_plus_plus_loss(logits, labels)), 4)
        0.0287

    References:
        Yeung et al., "Calibrating the Dice Loss to Handle Neural Network Overconfidence for Biomedical Image
        Segmentation", Journal of Digital Imaging 2023, arXiv 2111.00528.
    """
    check_number("gamma", gamma, 0.0)
    check_number("smooth", smooth, 0.0)
    check_flag("include_background", include_background)
    inputs = voxel_inputs(logits, labels, where, axis_name)
    first = 0 if include_background else 1
    probs = jax.nn.softmax(inputs.logits)[..., first:]
    targets = one_hot(inputs.labels, inputs.logits)[..., first:]
    if are_dense(inputs.labels, inputs.logits):
        hit, false, missed = jnp.minimum(probs, targets), probs - targets, targets - probs
    else:
        hit, false, missed = probs * targets, probs * (1 - targets), (1 - probs) * targets
    wrong = _power(false, gamma) + _power(missed, gamma)
    wrong = jnp.where(inputs.has_class[..., None], wrong, 0)
    axes = _spatial_axes(probs)
    hits, errors = whole_sum((hit.sum(axes), wrong.sum(axes)), axis_name)
    total = hits + errors / 2 + smooth
    losses = (errors / 2 / jnp.where(total == 0, 1, total)).mean(-1)  # 1 - (hits + smooth) / total
    images = whole_sum(inputs.has_class.sum(axes, dtype=jnp.int32), axis_name) > 0
    return losses.sum() / jnp.maximum(images.sum(), 1).astype(losses.dtype)


def _focal(surprise: Array, gamma: float) -> Array:
    """(1 - p)^gamma * -log p, from -log p, which differs from 0 even where p rounds to 1."""
    return _power(-jnp.expm1(-surprise), gamma) * surprise


def _power(base: Array, exponent: float) -> Array:
    """Power of the positive part. Its gradient at 0 is 0, where that of an exponent below 1 would be infinite."""
    zero = base <= 0  # False for NaN, which must reach the result
    return jnp.where(zero, 0, jnp.where(zero, 1, base) ** exponent)


def _spatially_smoothed(targets: Array, has_class: Array, sigma: float, kernel_size: int) -> Array:
    reach = kernel_size // 2
    gaussian = [math.exp(-((i - reach) ** 2) / (2 * sigma**2)) for i in range(kernel_size)]
    gaussian[reach] = 0.0
    spread = _neighbor_sum(targets, gaussian)
    present = _neighbor_sum(has_class[..., None].astype(jnp.float32), gaussian)
    # The weights of all neighbours sum to (1 + sum along one axis)^axes - 1, which SVLS gives the centre too.
    centre = math.expm1(len(_spatial_axes(targets)) * math.log1p(sum(gaussian)))
    return (centre * targets + spread) / (centre + present)


def _neighbor_sum(x: Array, off_centre: list[float]) -> Array:
    """Sum of each voxel's neighbours, weighted by a separable kernel of centre 1, without the voxel itself.

    Along each axis, neighbours are added together with their neighbours along the axes before. This is exact where
    a full convolution minus its centre would cancel, and needs no 3-D convolution, which XLA:CPU computes slowly.
    """
    total = jnp.zeros_like(x)
    for axis in _spatial_axes(x):
        total = total + _kernel_sum(x + total, axis, off_centre, "edge")
    return total


def _kernel_sum(x: Array, axis: int, weights: list[float], padding: Literal["edge", "constant"]) -> Array:
    """Weighted sum of the voxels around each voxel along one axis. Padding repeats the edge or is zero."""
    reach = len(weights) // 2
    widths = [(reach, reach) if i == axis else (0, 0) for i in range(x.ndim)]

    def weighted(x: Array) -> Array:
        padded = jnp.pad(x, widths, mode=padding)
        shifted = (jax.lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis) for i in range(len(weights)))
        terms = [weight * part for weight, part in zip(weights, shifted, strict=True) if weight]
        return sum(terms[1:], start=terms[0])

    return left_to_compiler(weighted, x, axes=x.ndim)


def _spatial_axes(x: Array) -> tuple[int, ...]:
    return tuple(range(1, x.ndim - 1))


def _spatial_inputs(logits: Any, labels: Any, where: Any, kernel_size: Any) -> Inputs:
    """Inputs of a loss that looks at the voxels around each voxel."""
    check_size("kernel_size", kernel_size)
    if kernel_size < 3 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and at least 3, to have a centre; got {kernel_size}.")
    inputs = voxel_inputs(logits, labels, where)
    if inputs.logits.ndim < 3:
        raise ValueError(
            f"logits must have at least one spatial axis, [batch, *spatial, classes]; got {inputs.logits.shape}."
        )
    return inputs
