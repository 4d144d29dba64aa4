"""One weighted segmentation loss: Dice, cross-entropy, mL1-ACE and the field's other losses, from logits."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from calib_jax._checks import AnyArray, Labels, as_inputs, check_choice, check_flag, check_number
from calib_jax._devices import AxisName, check_not_split, whole_sum
from calib_jax._eager import compiled
from calib_jax._labels import are_dense
from calib_jax._softmax import damped, dice_sums, softmax, softmax_and_cross_entropy
from calib_jax._sums.bins import Binning, Bins, Closed
from calib_jax._voxels import Inputs, voxel_inputs
from calib_jax.alternatives import (
    dsc_plus_plus_loss,
    focal_loss,
    label_smoothing_loss,
    margin_label_smoothing_loss,
    neighbor_aware_loss,
    spatially_varying_label_smoothing_loss,
)
from calib_jax.errors import average_calibration_error
from calib_jax.losses import MarginalOptions, marginal_l1


class _DiceOptions(NamedTuple):
    smooth: float
    include_background: bool


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
    damped_dice: float = 0.0,
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
    r"""Weighted sum of Dice, cross-entropy, mL1-ACE and the field's other losses, from logits.

    With p = softmax(logits) and default weights,
    :math:`L = \mathrm{Dice}(p, y) + \mathrm{CE}(p, y) + 0.3\,\mathrm{mL1\text{-}ACE}(p, y)`. Parts of weight 0 are
    not computed. Weights are Python numbers, so that they are known when the program is traced.

    Dice is the Dice semimetric loss, per image and class

    .. math:: 1 - \frac{\sum p + \sum y - \sum |p - y|}{\sum p + \sum y}
              = 1 - \frac{2 \sum \min(p, y)}{\sum p + \sum y},

    with sums over voxels. For labels 0 and 1 it is the usual soft Dice, :math:`1 - 2 \sum p y / (\sum p + \sum y)`.
    For soft labels, such as the share of experts who saw a class, its optimum is p = y. The optimum of the usual
    formula is p = 1 where y = 1/2.

    No compiler option is needed: the loss alone is as fast without the trainer's. On CPUs under Linux, the
    environment variable `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`, set before Python starts, puts large arrays into
    huge pages; see `mL1_ace`.

    Args:
        logits: unnormalised scores `[batch, *spatial, classes]`, at least two classes.
        labels: class ids `[batch, *spatial]` (ids outside `[0, classes)` belong to no class and cost no
            cross-entropy), or one-hot or soft labels of the shape of `logits`.
        dice: weight of Dice, averaged over images and classes; on hard labels `optax.losses.dice_loss`. Weights are
            at least 0.
        cross_entropy: weight of the cross-entropy, averaged over voxels.
        ace: weight of `mL1_ace`.
        focal: weight of `focal_loss`.
        label_smoothing: weight of `label_smoothing_loss`. This part and the next three already include a
            cross-entropy.
        svls: weight of `spatially_varying_label_smoothing_loss`.
        mbls: weight of `margin_label_smoothing_loss`.
        nacl: weight of `neighbor_aware_loss`.
        dsc_plus_plus: weight of `dsc_plus_plus_loss`, which replaces Dice.
        damped_dice: weight of Dice whose gradient by each p is multiplied by :math:`|p - y|`, which replaces Dice.
            Its value is that of Dice. Where a prediction is nearly right, Dice no longer pushes p to 0 or 1.
        where: voxels to count in every part, boolean, `[batch, *spatial]`; None counts all. Values elsewhere, NaN
            included, change neither loss nor gradient.
        dice_smooth: number added to numerator and denominator of Dice; MONAI's `smooth_nr = smooth_dr` is twice it.
        dice_include_background: False leaves class 0 out of Dice, damped Dice and DSC++.
        num_bins, binning, closed, include_background, class_weights, ignore_empty_classes, pool_images: options of
            `mL1_ace`, checked whether or not `ace` is 0.
        axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which each image's voxels are split. Every
            device passes its part of the images and gets the loss of the whole images; its gradient is its part of
            the whole gradient. Under `check_vma=False` this holds for a gradient taken inside the `shard_map`, as
            a trainer does; multiply a gradient taken outside by the size of the axis. `svls` and `nacl` need
            neighbouring voxels and cannot be split.

    Returns:
        The scalar loss.

    Raises:
        TypeError, ValueError: on dtypes, shapes, weights or options that do not fit, those of parts of weight 0
            included, and on one-hot or soft labels that are counted, concrete and outside [0, 1].

    Example:
        >>> logits = jnp.zeros((1, 8, 8, 3))
        >>> labels = jnp.zeros((1, 8, 8), jnp.int32)
        >>> round(float(segmentation_loss(logits, labels, dice=0.0, ace=0.0)), 4)  # log 3
        1.0986
        >>> round(float(segmentation_loss(logits, labels, dice=0.0, cross_entropy=0.0, ace=0.0, nacl=1.0)), 4)
        1.1266

        Volumes split over all devices along their depth:

        >>> import jax
        >>> mesh = jax.make_mesh((len(jax.devices()),), ("space",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> depth = jax.sharding.PartitionSpec(None, "space")
        >>> def part(logits, labels):
        ...     return segmentation_loss(logits, labels, axis_name="space")
        >>> whole = jax.shard_map(part, mesh=mesh, in_specs=depth, out_specs=jax.sharding.PartitionSpec())
        >>> round(float(jax.jit(whole)(logits, labels)), 4) == round(float(segmentation_loss(logits, labels)), 4)
        True

    References:
        Milletari et al., "V-Net", 2016 (Dice); Wang et al., "Dice Semimetric Losses: Optimizing the Dice Score with
        Soft Labels", MICCAI 2023, arXiv 2303.16296 (Dice of soft labels); Barfoot et al., arXiv 2403.06759
        (mL1-ACE); Lux et al., "Beyond Scalar Losses: Calibrating Segmentation Models via Gradient Vector Field
        Surgery", MIDL 2026 (damped Dice); for the others see `calib_jax.alternatives`.
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
        "damped_dice": damped_dice,
    }
    for name, weight in weights.items():
        if isinstance(weight, Tracer):
            raise TypeError(
                f"{name} must be a Python number, known when the program is traced; got a traced one. "
                "Multiply the values of segmentation_loss_parts by traced numbers."
            )
        check_number(name, weight, 0.0)
    names = [name for name, weight in weights.items() if weight != 0]
    if not names:
        raise ValueError(
            "At least one of dice, cross_entropy, ace and the other parts must have a weight other than 0."
        )
    bins, dice_options = Bins(binning, num_bins, closed), _DiceOptions(dice_smooth, dice_include_background)
    ace_options = MarginalOptions(
        bins, include_background, class_weights, ignore_empty_classes, pool_images, "mean", axis_name
    )
    parts = _parts(logits, labels, where, names, dice_options, ace_options)
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
    """The parts of `segmentation_loss`, unweighted: to log them, or to multiply them by traced numbers.

    Dice, damped Dice, cross-entropy and mL1-ACE share one softmax, which is computed once, forward and backward.

    Args:
        logits: as for `segmentation_loss`.
        labels: as for `segmentation_loss`.
        parts: names of parts, which are the names of the weights of `segmentation_loss`.
        where: as for `segmentation_loss`, and so are the arguments that follow: `dice_smooth`,
            `dice_include_background`, the options of `mL1_ace`, and `axis_name`.

    Returns:
        A scalar for each name.

    Raises:
        TypeError, ValueError: on dtypes, shapes, names or options that do not fit, those of parts that are not
            computed included, and on one-hot or soft labels that are counted, concrete and outside [0, 1].

    Example:
        >>> parts = segmentation_loss_parts(jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 8, 8), jnp.int32))
        >>> {name: round(float(parts[name]), 4) for name in ("dice", "cross_entropy", "ace")}
        {'dice': 0.8333, 'cross_entropy': 1.0986, 'ace': 0.4444}

    References:
        See `segmentation_loss`.
    """
    bins, dice_options = Bins(binning, num_bins, closed), _DiceOptions(dice_smooth, dice_include_background)
    ace_options = MarginalOptions(
        bins, include_background, class_weights, ignore_empty_classes, pool_images, "mean", axis_name
    )
    return _parts(logits, labels, where, parts, dice_options, ace_options)


def _parts(
    logits: Any,
    labels: Any,
    where: Any,
    parts: Sequence[str],
    dice_options: _DiceOptions,
    ace_options: MarginalOptions,
) -> dict[str, Array]:
    axis_name = ace_options.axis_name
    for name in {"svls", "nacl"} & set(parts):
        check_not_split(name, axis_name)
    check_number("dice_smooth", dice_options.smooth, 0.0)
    check_flag("dice_include_background", dice_options.include_background)
    logits, labels, where = as_inputs(logits, labels, where, probs_name="logits", per_voxel=True)
    inputs = voxel_inputs(logits, labels, where, axis_name)
    ace_options.check(logits.shape)
    # Ids as they are, if all count: a copy of them without foreign ids would be stored for the backward pass.
    targets = inputs.labels if where is not None or are_dense(labels, logits) else labels
    probs, entropy = _softmax_and_entropy(logits, targets, where, inputs, parts)
    voxels: Any = {"where": where, "axis_name": axis_name}
    background: Any = {"include_background": dice_options.include_background}
    losses: dict[str, Callable[[], Any]] = {
        "dice": lambda: _soft_dice(probs, labels, where, dice_options, axis_name),
        "cross_entropy": lambda: whole_sum(entropy, axis_name) / inputs.voxels,
        "ace": lambda: marginal_l1(average_calibration_error, probs, labels, where, ace_options),
        "focal": lambda: focal_loss(logits, labels, **voxels),
        "label_smoothing": lambda: label_smoothing_loss(logits, labels, **voxels),
        "svls": lambda: spatially_varying_label_smoothing_loss(logits, labels, where=where),
        "mbls": lambda: margin_label_smoothing_loss(logits, labels, **voxels),
        "nacl": lambda: neighbor_aware_loss(logits, labels, where=where),
        "dsc_plus_plus": lambda: dsc_plus_plus_loss(logits, labels, **voxels, **background),
        "damped_dice": lambda: _soft_dice(damped(probs, targets), labels, where, dice_options, axis_name),
    }
    for name in parts:
        check_choice("parts", name, losses)
    return {name: losses[name]() for name in parts}


def _softmax_and_entropy(
    logits: Array, labels: Array, where: Array | None, inputs: Inputs, parts: Sequence[str]
) -> tuple[Any, Any]:
    """Float32 probabilities for Dice and mL1-ACE, and the summed cross-entropy. None if no part needs them.

    A masked NaN must be gone before the softmax, or the gradient of the softmax brings it back.
    """
    needs_probs = bool({"dice", "damped_dice", "ace"} & set(parts))
    if needs_probs:
        logits = logits if where is None else jnp.where(where[..., None], logits, 0)
    if "cross_entropy" in parts:
        return softmax_and_cross_entropy(logits if needs_probs else inputs.logits, labels)
    return softmax(logits) if needs_probs else None, None


def _soft_dice(
    probs: Array, labels: Array, where: Array | None, options: _DiceOptions, axis_name: AxisName | None
) -> Array:
    """The Dice semimetric loss, on hard labels `optax.losses.dice_loss`, which takes no probabilities under jit."""
    overlap, sizes = whole_sum(dice_sums(probs, labels, where), axis_name)
    size = sizes / 2
    losses = 1 - (overlap + options.smooth) / (size + options.smooth)
    return losses[:, 0 if options.include_background else 1 :].mean()
