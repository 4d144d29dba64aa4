"""Calibration errors as training losses (mL1-ACE and its siblings), and one weighted segmentation loss."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from calib_jax._checks import (
    AnyArray,
    Labels,
    Mask,
    Probs,
    as_inputs,
    check_choice,
    check_flag,
    check_number,
)
from calib_jax._devices import AxisName, check_not_split, whole_sum
from calib_jax._eager import compiled
from calib_jax._labels import as_class_ids, one_hot, without_background
from calib_jax._softmax import softmax, softmax_and_cross_entropy, voxel_sums
from calib_jax._voxels import Inputs, voxel_inputs, voxel_mean
from calib_jax.alternatives import (
    dsc_plus_plus_loss,
    focal_loss,
    label_smoothing_loss,
    margin_label_smoothing_loss,
    neighbor_aware_loss,
    spatially_varying_label_smoothing_loss,
)
from calib_jax.binning import Binning, BinStatistics, Closed, bin_statistics, check_bin_options
from calib_jax.errors import (
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
    gap between mean probability and observed frequency, bins all alike. In a hard bin a voxel's gradient is
    :math:`\mathrm{sign}(\bar p_m - \bar y_m) / (n_m M)` over the number of images and classes, n_m being its
    bin's count; where it stands in the bin does not matter. Soft bins also pull voxels from bin to bin.

    Args:
        probs: class probabilities `[batch, *spatial, classes]`.
        labels: class ids `[batch, *spatial]`, or one-hot, overlapping or soft labels of the shape of `probs`.
        num_bins: number of bins on [0, 1].
        binning: `"hard"`, `"soft"` or `"adaptive"`, see `calib_jax.bin_statistics`.
        closed: the side on which a hard bin holds its edge, see `calib_jax.bin_index`.
        where: voxels to count, boolean, `[batch, *spatial]` or of the shape of `probs`; None counts all.
        include_background: False leaves class 0 out, before any work is spent on it.
        class_weights: weights `[classes]` of the mean over classes (after background is left out), at least 0.
        ignore_empty_classes: True lets a class without a voxel in an image contribute zero (it still counts
            in the mean), as the follow-up trains.
        pool_images: True fills one set of bins from the whole batch, instead of one for each image.
        reduction: `"mean"` over images and classes, `"sum"`, or `"none"` for `[batch, classes]`.
        axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which each image's voxels are split, see
            `segmentation_loss`. Not for adaptive bins.

    Returns:
        The loss, a scalar or `[batch, classes]` (`[1, classes]` of pooled images). An image and class of which
        `where` leaves nothing has no error: it is zero and left out of the mean. A NaN probability gives NaN.

    Raises:
        TypeError, ValueError: on dtypes, shapes or options that do not fit, and on probabilities or one-hot or soft
            labels that are counted, concrete (not traced) and outside [0, 1] by more than rounding.

    Example:
        >>> labels = jnp.array([[0, 0, 1, 1]])
        >>> logits = jnp.array([[[2.0, 0.0], [0.0, 0.5], [0.0, 2.0], [0.0, 2.0]]])
        >>> loss, grad = jax.value_and_grad(lambda x: mL1_ace(jax.nn.softmax(x), labels))(logits)
        >>> round(float(loss), 4), grad.shape
        (0.287, (1, 4, 2))
        >>> round(float(mL1_ace(jax.nn.softmax(logits), labels, num_bins=5, binning="soft")), 4)
        0.2851

        Under a trace values are not checked. `jax.experimental.checkify` does so where it is wanted:

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
    return _marginal_l1(
        average_calibration_error,
        probs,
        labels,
        where,
        include_background=include_background,
        pool_images=pool_images,
        num_bins=num_bins,
        binning=binning,
        closed=closed,
        class_weights=class_weights,
        ignore_empty_classes=ignore_empty_classes,
        reduction=reduction,
        axis_name=axis_name,
    )


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

    As `mL1_ace`, with each bin weighted by its share of the voxels: the many easy voxels far from a boundary
    weigh most. Arguments, results and errors are those of `mL1_ace`.

    Example:
        >>> probs = jnp.array([[[0.1], [0.8], [0.8], [0.8]]])
        >>> round(float(mL1_ece(probs, jnp.array([[[0], [1], [1], [1]]]), num_bins=2)), 4)
        0.175

    References:
        Naeini et al., AAAI 2015; as a loss, Barfoot et al., arXiv 2506.03942.
    """
    return _marginal_l1(
        expected_calibration_error,
        probs,
        labels,
        where,
        include_background=include_background,
        pool_images=pool_images,
        num_bins=num_bins,
        binning=binning,
        closed=closed,
        class_weights=class_weights,
        ignore_empty_classes=ignore_empty_classes,
        reduction=reduction,
        axis_name=axis_name,
    )


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

    As `mL1_ace`, with the largest gap in place of the mean gap: the gradient reaches the voxels of one bin of
    each image and class. Arguments, results and errors are those of `mL1_ace`.

    Example:
        >>> probs = jnp.array([[[0.1], [0.8], [0.8], [0.8]]])
        >>> round(float(mL1_mce(probs, jnp.array([[[0], [1], [1], [1]]]), num_bins=2)), 4)
        0.2

    References:
        Naeini et al., AAAI 2015; as a loss, Barfoot et al., arXiv 2506.03942.
    """
    return _marginal_l1(
        maximum_calibration_error,
        probs,
        labels,
        where,
        include_background=include_background,
        pool_images=pool_images,
        num_bins=num_bins,
        binning=binning,
        closed=closed,
        class_weights=class_weights,
        ignore_empty_classes=ignore_empty_classes,
        reduction=reduction,
        axis_name=axis_name,
    )


def _marginal_l1(
    error: Callable[[BinStatistics], Array],
    probs: Any,
    labels: Any,
    where: Any,
    *,
    include_background: bool,
    pool_images: bool,
    class_weights: Any,
    ignore_empty_classes: bool,
    reduction: Reduction,
    **bins: Any,
) -> Array:
    probs, labels, where = as_inputs(probs, labels, where)
    _check_ace_options(
        probs.shape,
        include_background=include_background,
        pool_images=pool_images,
        class_weights=class_weights,
        ignore_empty_classes=ignore_empty_classes,
        reduction=reduction,
        **bins,
    )
    probs, labels, where = _classes_of_interest(probs, labels, where, include_background, pool_images)
    stats = bin_statistics(probs, labels, where=where, **bins)
    return _reduce(error(stats), stats, class_weights, ignore_empty_classes, reduction)


def _check_ace_options(
    shape: tuple[int, ...],
    *,
    include_background: bool,
    pool_images: bool,
    class_weights: Any,
    ignore_empty_classes: bool,
    reduction: Reduction,
    **bins: Any,
) -> None:
    """Raises on options that `mL1_ace` does not take of probabilities of this shape."""
    check_bin_options(**bins)
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_flag("include_background", include_background)
    check_flag("pool_images", pool_images)
    check_flag("ignore_empty_classes", ignore_empty_classes)
    counted = shape[-1] - (not include_background)
    if counted == 0:
        raise ValueError(f"include_background=False leaves no class of probs of shape {shape}.")
    if class_weights is None:
        return
    if np.shape(class_weights) != (counted,):
        raise ValueError(
            f"class_weights must have shape ({counted},), one per class; got {np.shape(class_weights)}."
        )


@compiled(keeps_shape=lambda options: bool(options.get("svls") or options.get("nacl")))
def segmentation_loss(
    logits: Float[AnyArray, "batch *spatial classes"],
    labels: Labels,
    *,
    dice: float = 1.0,
    cross_entropy: float = 1.0,
    ace: float = 0.3,
    focal: float = 0.0,
    label_smoothing: float = 0.0,
    svls: float = 0.0,
    mbls: float = 0.0,
    nacl: float = 0.0,
    dsc_plus_plus: float = 0.0,
    where: Bool[AnyArray, "batch *spatial"] | None = None,
    dice_smooth: float = 5e-6,
    dice_include_background: bool = True,
    num_bins: int = 20,
    binning: Binning = "hard",
    closed: Closed = "right",
    include_background: bool = True,
    class_weights: Float[AnyArray, "counted_classes"] | None = None,
    ignore_empty_classes: bool = False,
    pool_images: bool = False,
    axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    """Weighted sum of soft Dice, cross-entropy, mL1-ACE and the field's other losses, straight from logits.

    By default dice * Dice(softmax) + cross_entropy * CE + ace * mL1-ACE(softmax). A part of weight 0 is not
    computed. Weights are Python numbers of at least 0, so that this is known when the program is traced.

    Args:
        logits: unnormalised scores `[batch, *spatial, classes]`, at least two classes.
        labels: class ids `[batch, *spatial]` (ids outside `[0, classes)` belong to no class and cost no
            cross-entropy), or one-hot or soft labels of the shape of `logits`.
        dice: weight of soft Dice, as `optax.losses.dice_loss`, averaged over images and classes.
        cross_entropy: weight of the cross-entropy, averaged over voxels.
        ace: weight of `mL1_ace`.
        focal: weight of `focal_loss`.
        label_smoothing: weight of `label_smoothing_loss`. It and the next three hold a cross-entropy already.
        svls: weight of `spatially_varying_label_smoothing_loss`.
        mbls: weight of `margin_label_smoothing_loss`.
        nacl: weight of `neighbor_aware_loss`.
        dsc_plus_plus: weight of `dsc_plus_plus_loss`, which takes the place of Dice.
        where: voxels to count in every part, boolean, `[batch, *spatial]`; None counts all. A NaN elsewhere
            touches nothing.
        dice_smooth: added to numerator and denominator of Dice; MONAI's `smooth_nr = smooth_dr` is twice it.
        dice_include_background: False leaves class 0 out of Dice and DSC++.
        num_bins, binning, closed, include_background, class_weights, ignore_empty_classes, pool_images: options of
            `mL1_ace`, checked whether or not `ace` is 0.
        axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which each image's voxels are split. Every
            device passes its part and gets the loss of the whole images; its gradient is its part of theirs.
            Under `check_vma=False` this holds of a gradient taken inside the `shard_map`, as by a trainer; one
            taken outside must be multiplied by the size of the axis. Not for svls and nacl, which look at
            neighbouring voxels.

    Returns:
        The scalar loss.

    Raises:
        TypeError, ValueError: on dtypes, shapes, weights or options that do not fit, those of a part of weight 0
            included, and on one-hot or soft labels that are counted, concrete and outside [0, 1].

    Example:
        >>> logits = jnp.zeros((1, 8, 8, 3))
        >>> labels = jnp.zeros((1, 8, 8), jnp.int32)
        >>> round(float(segmentation_loss(logits, labels, dice=0.0, ace=0.0)), 4)  # log 3
        1.0986
        >>> round(float(segmentation_loss(logits, labels, dice=0.0, cross_entropy=0.0, ace=0.0, nacl=1.0)), 4)
        1.1266

        Volumes split over all devices along their depth:

        >>> mesh = jax.make_mesh((len(jax.devices()),), ("space",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> depth = jax.sharding.PartitionSpec(None, "space")
        >>> def part(logits, labels):
        ...     return segmentation_loss(logits, labels, axis_name="space")
        >>> whole = jax.shard_map(part, mesh=mesh, in_specs=depth, out_specs=jax.sharding.PartitionSpec())
        >>> round(float(jax.jit(whole)(logits, labels)), 4) == round(float(segmentation_loss(logits, labels)), 4)
        True

    References:
        Milletari et al., "V-Net", 2016 (Dice); Barfoot et al., arXiv 2403.06759 (mL1-ACE); of the others, see
        `calib_jax.alternatives`.
    """
    weights = {
        "dice": dice,
        "cross_entropy": cross_entropy,
        "ace": ace,
        "focal": focal,
        "label_smoothing": label_smoothing,
        "svls": svls,
        "mbls": mbls,
        "nacl": nacl,
        "dsc_plus_plus": dsc_plus_plus,
    }
    for name, weight in weights.items():
        if isinstance(weight, Tracer):
            raise TypeError(
                f"{name} must be a Python number, known when the program is traced; got a traced one. "
                "Weigh the values of segmentation_loss_parts by traced numbers."
            )
        check_number(name, weight, 0.0)
    names = [name for name, weight in weights.items() if weight != 0]
    if not names:
        raise ValueError(
            "At least one of dice, cross_entropy, ace and the other parts must have a weight other than 0."
        )
    parts = segmentation_loss_parts(
        logits,
        labels,
        names,
        where=where,
        dice_smooth=dice_smooth,
        dice_include_background=dice_include_background,
        num_bins=num_bins,
        binning=binning,
        closed=closed,
        include_background=include_background,
        class_weights=class_weights,
        ignore_empty_classes=ignore_empty_classes,
        pool_images=pool_images,
        axis_name=axis_name,
    )
    weighted = [weights[name] * parts[name] for name in names]
    return sum(weighted[1:], start=weighted[0])


@compiled(keeps_shape=lambda options: bool({"svls", "nacl"} & set(options.get("parts", ()))))
def segmentation_loss_parts(
    logits: Float[AnyArray, "batch *spatial classes"],
    labels: Labels,
    parts: Sequence[str] = ("dice", "cross_entropy", "ace"),
    *,
    where: Bool[AnyArray, "batch *spatial"] | None = None,
    dice_smooth: float = 5e-6,
    dice_include_background: bool = True,
    num_bins: int = 20,
    binning: Binning = "hard",
    closed: Closed = "right",
    include_background: bool = True,
    class_weights: Float[AnyArray, "counted_classes"] | None = None,
    ignore_empty_classes: bool = False,
    pool_images: bool = False,
    axis_name: AxisName | None = None,
) -> dict[str, Float[Array, ""]]:
    """The parts of `segmentation_loss`, unweighted: to log them, or to weigh them by traced numbers.

    Dice, cross-entropy and mL1-ACE share one softmax, which is computed once, forward and backward.

    Args:
        parts: names of parts, as the weights of `segmentation_loss` are called.
        logits, labels, where, dice_smooth, dice_include_background, num_bins, binning, closed, include_background,
            class_weights, ignore_empty_classes, pool_images, axis_name: as for `segmentation_loss`.

    Returns:
        A scalar for each name.

    Raises:
        TypeError, ValueError: on dtypes, shapes, names or options that do not fit, those of parts that are not
            asked for included, and on one-hot or soft labels that are counted, concrete and outside [0, 1].

    Example:
        >>> parts = segmentation_loss_parts(jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 8, 8), jnp.int32))
        >>> {name: round(float(parts[name]), 4) for name in ("dice", "cross_entropy", "ace")}
        {'dice': 0.8333, 'cross_entropy': 1.0986, 'ace': 0.4444}

    References:
        See `segmentation_loss`.
    """
    for name in {"svls", "nacl"} & set(parts):
        check_not_split(name, axis_name)
    check_number("dice_smooth", dice_smooth, 0.0)
    check_flag("dice_include_background", dice_include_background)
    ace_options: Any = {
        "num_bins": num_bins,
        "binning": binning,
        "closed": closed,
        "include_background": include_background,
        "class_weights": class_weights,
        "ignore_empty_classes": ignore_empty_classes,
        "pool_images": pool_images,
        "axis_name": axis_name,
    }
    inputs = voxel_inputs(logits, labels, where, axis_name)
    _check_ace_options(inputs.logits.shape, reduction="mean", **ace_options)
    logits, labels = jnp.asarray(logits), jnp.asarray(as_class_ids(labels))
    where = None if where is None else jnp.asarray(where)
    probs, entropy = _shared(logits, where, inputs, parts)
    voxels: Any = {"where": where, "axis_name": axis_name}
    background: Any = {"include_background": dice_include_background}
    losses: dict[str, Callable[[], Any]] = {
        "dice": lambda: _soft_dice(probs, labels, where, dice_smooth, dice_include_background, axis_name),
        "cross_entropy": lambda: voxel_mean(entropy, inputs),
        "ace": lambda: mL1_ace(probs, labels, where=where, **ace_options),
        "focal": lambda: focal_loss(logits, labels, **voxels),
        "label_smoothing": lambda: label_smoothing_loss(logits, labels, **voxels),
        "svls": lambda: spatially_varying_label_smoothing_loss(logits, labels, where=where),
        "mbls": lambda: margin_label_smoothing_loss(logits, labels, **voxels),
        "nacl": lambda: neighbor_aware_loss(logits, labels, where=where),
        "dsc_plus_plus": lambda: dsc_plus_plus_loss(logits, labels, **voxels, **background),
    }
    for name in parts:
        check_choice("parts", name, losses)
    return {name: losses[name]() for name in parts}


def _shared(logits: Array, where: Array | None, inputs: Inputs, parts: Sequence[str]) -> tuple[Any, Any]:
    """Float32 probabilities for Dice and mL1-ACE, and the cross-entropy of each voxel: what of them is asked for.

    A masked NaN must be gone before them, or their gradient brings it back.
    """
    alone = not {"dice", "ace"} & set(parts)
    if not alone:
        logits = logits if where is None else jnp.where(where[..., None], logits, 0)
    if "cross_entropy" in parts:
        return softmax_and_cross_entropy(inputs.logits if alone else logits, inputs.labels)
    return None if alone else softmax(logits), None


def _soft_dice(
    probs: Any,
    labels: Array,
    where: Array | None,
    smooth: float,
    include_background: bool,
    axis_name: AxisName | None,
) -> Array:
    """`optax.losses.dice_loss` of probabilities that are there already, which it refuses under jit."""
    classes = probs.shape[-1]
    targets = one_hot(labels, probs)
    if where is not None:
        probs, targets = (jnp.where(where[..., None], x, 0) for x in (probs, targets))
    probs, targets = (x.reshape(x.shape[0], -1, classes) for x in (probs, targets))
    sums = voxel_sums(probs * targets), voxel_sums(probs) + voxel_sums(targets)
    overlap, sizes = whole_sum(sums, axis_name)
    size = sizes / 2
    losses = 1 - (overlap + smooth) / (size + smooth)
    return losses[:, 0 if include_background else 1 :].mean()


def _classes_of_interest(
    probs: Array, labels: Array, where: Array | None, include_background: bool, pool_images: bool
) -> tuple[Array, Array, Any]:
    """The arguments of `bin_statistics`: no class 0 unless `include_background`, one image if `pool_images`."""
    if pool_images:
        probs, labels, where = probs[None], labels[None], None if where is None else where[None]
    if include_background:
        return probs, labels, where
    labels = without_background(labels, probs)
    where = where[..., 1:] if where is not None and where.ndim == probs.ndim else where
    return probs[..., 1:], labels, where


def _reduce(
    errors: Float[Array, "batch classes"],
    stats: BinStatistics,
    class_weights: Any,
    ignore_empty_classes: bool,
    reduction: Reduction,
) -> Array:
    weights = (
        jnp.ones(errors.shape[1:], errors.dtype)
        if class_weights is None
        else jnp.asarray(class_weights, errors.dtype)
    )
    counted = jnp.asarray(stats.count).sum(-1) > 0
    errors = jnp.where(counted, errors, 0)
    if ignore_empty_classes:
        errors = jnp.where(jnp.asarray(stats.label_sum).sum(-1) > 0, errors, 0)
    weighted = weights[None, :] * errors
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    return weighted.sum() / _safe((weights[None, :] * counted.astype(errors.dtype)).sum())


def _safe(denominator: Array) -> Array:
    return jnp.where(denominator == 0, 1, denominator)
