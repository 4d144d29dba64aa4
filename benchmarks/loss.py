"""mL1-ACE forward and backward beside PyTorch: data, programs and check, which other benchmarks use as well."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from benchmarks import timing
from benchmarks.options import Kind, Loss, parse_shape
from calib_jax import mL1_ace
from calib_jax.binning import bin_edges
from train.console import format_table

if TYPE_CHECKING:
    from benchmarks import reference

Program = Callable[[], tuple[Any, Any]]
OURS = "calib_jax"
TARGETS = {"monai": 0.20, "paper": 0.12}
"""Largest ratio of our time to the reference's that meets the target."""

# Ours is checked against float64. PyTorch's float32 running sums drift: MONAI's loss is off by 8e-4 for 7 million
# voxels of which most are in one bin.
_LOSS_TOLERANCE = 1e-5
_REFERENCE_TOLERANCE = 3e-3
_GRADIENT_TOLERANCE = 1e-3


def run(options: Loss) -> None:
    """Measures every shape and kind, prints the ratios and writes the results and their plot."""
    from benchmarks import plots, reference

    reference.at_its_fastest()
    cases = [_measure(options, shape, kind) for shape in options.shapes for kind in options.kinds]
    print(format_table([_row(case) for case in cases]))
    print("ratios: ours / the other within a round, median of the rounds (quartiles); lower = faster than it")
    device = str(reference.device())
    results = {"num_bins": options.num_bins, "targets": TARGETS, "reference_device": device, "cases": cases}
    timing.write_results(options.out, results)
    plots.save(plots.loss(cases), options.out)


def _measure(options: Loss, shape: str, kind: Kind) -> dict[str, Any]:
    from benchmarks import reference

    data = make_data(parse_shape(shape), kind)
    inputs = reference.ace_inputs(*data)
    programs = ace_programs(data, inputs, options.num_bins)
    errors = check_agreement(programs, exact_loss(data, options.num_bins))
    print(f"{shape} {kind}: same loss and gradient", flush=True)
    reasons: dict[str, str] = {}
    if options.compile:
        compiled, reasons = compiled_programs(programs, inputs, options.num_bins)
        programs |= compiled
    samples = timing.interleaved(
        programs | copies(data), warmup=options.warmup, rounds=options.rounds, title=f"{shape} {kind}"
    )
    print(timing.format_samples(samples))
    return {
        "shape": shape,
        "kind": kind,
        "ratio": {name: timing.ratio_spread(samples, OURS, name) for name in samples if name != OURS},
        "not_compiled": reasons,
        "loss_error": errors,
        "summary": {name: timing.spread(seconds) for name, seconds in samples.items()},
        "seconds": samples,
    }


def _row(case: Mapping[str, Any]) -> dict[str, str]:
    """A row of the table; a program that did not compile has `-` in its column."""
    row = {"": f"{case['shape']} {case['kind']}", "ours ms": f"{1000 * case['summary'][OURS]['median']:.1f}"}
    for name in [*TARGETS, *(f"{name} compiled" for name in TARGETS), *COPIES]:
        ratio = case["ratio"].get(name)
        title = f"/ {name}" + (f" (target {TARGETS[name]:.2f})" if name in TARGETS else "")
        row[title] = f"{ratio['median']:.2f} ({ratio['q1']:.2f}-{ratio['q3']:.2f})" if ratio else "-"
    return row


# Data.


class Data(NamedTuple):
    """Inputs in the layout of calib_jax."""

    probs: Float[np.ndarray, "batch *spatial classes"]
    labels: Int[np.ndarray, "batch *spatial"]


def make_data(shape: tuple[int, ...], kind: Kind, seed: int = 0) -> Data:
    """Miscalibrated probabilities and labels (no gap is near zero) for a shape of batch, classes and sizes."""
    batch, classes, *spatial = shape
    rng = np.random.default_rng(seed)
    if kind == "uniform":
        probs = rng.random((batch, *spatial, classes), dtype=np.float32)
        return Data(probs, _independent_labels(rng, (batch, *spatial), classes))
    if kind == "one-bin":
        labels = _independent_labels(rng, (batch, *spatial), classes)
        return Data(_one_bin(rng, (batch, *spatial, classes)), labels)
    probs, labels = _blobs(jax.random.key(seed), (batch, *spatial, classes))
    return Data(np.asarray(probs), np.asarray(labels))


def _independent_labels(rng: np.random.Generator, shape: tuple[int, ...], classes: int) -> np.ndarray:
    """Labels independent of the probabilities, with a different frequency per class; id `classes` is no class."""
    weights = 1 + np.arange(classes + 1) / classes
    ends = np.cumsum(weights / weights.sum())[:-1].astype(np.float32)
    return np.searchsorted(ends, rng.random(shape, dtype=np.float32)).astype(np.int32)


def _one_bin(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Probabilities of which nine in ten voxels are almost certain of class 0 and the others undecided."""
    probs = rng.standard_exponential(shape, dtype=np.float32)
    probs /= probs.sum(-1, keepdims=True)
    sure = rng.random(shape[:-1], dtype=np.float32) < 0.9
    certain = np.eye(1, shape[-1], dtype=np.float32)[0]
    return np.where(sure[..., None], np.float32(0.96) * certain + np.float32(0.04) * probs, probs)


@functools.partial(jax.jit, static_argnums=1)
def _blobs(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Steep softmax of smooth noise, undecided only at boundaries; the labels are half as confident."""
    coarse, fine, draw = jax.random.split(key, 3)
    batch, *spatial, classes = shape
    field = jax.random.normal(coarse, (batch, *(max(2, size // 12) for size in spatial), classes))
    logits = 10 * jax.image.resize(field, shape, "linear") + 0.5 * jax.random.normal(fine, shape)
    logits = logits.at[..., 0].add(10)
    bias = 0.3 * jnp.arange(classes, dtype=jnp.float32)
    labels = jnp.argmax(0.5 * logits + bias + jax.random.gumbel(draw, shape), axis=-1)
    return jax.nn.softmax(logits), labels.astype(jnp.int32)


# Programs.


def ace_programs(data: Data, inputs: "reference.AceInputs", num_bins: int) -> dict[str, Program]:
    """Programs for loss and gradient: ours first, then every reference."""
    from benchmarks import reference

    theirs = {
        name: reference.ace_program(loss, inputs, num_bins) for name, loss in reference.ACE_LOSSES.items()
    }
    return {OURS: our_program(data, num_bins), **theirs}


def our_program(data: Data, num_bins: int) -> Program:
    """Program for mL1-ACE and its gradient, from arrays that are already on the device."""
    probs, labels = jnp.asarray(data.probs), jnp.asarray(data.labels)
    value_and_grad = our_loss(num_bins)
    return lambda: jax.block_until_ready(value_and_grad(probs, labels))


def our_loss(num_bins: int) -> Any:
    """The compiled function from probabilities and labels to loss and gradient."""
    return jax.jit(jax.value_and_grad(functools.partial(mL1_ace, num_bins=num_bins)))


def compiled_programs(
    programs: Mapping[str, Program], inputs: "reference.AceInputs", num_bins: int
) -> tuple[dict[str, Program], dict[str, str]]:
    """The references under `torch.compile`, and for those that fail the reason."""
    import torch

    from benchmarks import reference

    torch.compiler.reset()  # shapes seen before would count towards its limit of recompilations
    compiled: dict[str, Program] = {}
    reasons: dict[str, str] = {}
    for name, loss in reference.ACE_LOSSES.items():
        try:
            program = reference.ace_program(torch.compile(loss, dynamic=False), inputs, num_bins)
            _check_same(f"{name} compiled", program(), name, programs[name]())
        except Exception as error:  # a compiler may raise anything
            reasons[name] = timing.first_line(error)
            print(f"torch.compile of {name} failed: {reasons[name]}")
        else:
            compiled[f"{name} compiled"] = program
    return compiled, reasons


COPIES = ("copy (JAX)", "copy (NumPy)")


def copies(data: Data) -> dict[str, Callable[[], Any]]:
    """Programs that copy the probabilities, to new memory (JAX) and to existing memory (NumPy)."""
    on_device, target = jnp.asarray(data.probs), np.empty_like(data.probs)
    copy = jax.jit(jnp.copy)
    both = (lambda: jax.block_until_ready(copy(on_device)), lambda: np.copyto(target, data.probs))
    return dict(zip(COPIES, both, strict=True))


# The check.


def exact_loss(data: Data, num_bins: int) -> float:
    """The loss in float64; it shares only the bin edges with the programs."""
    upper_edges = bin_edges(num_bins)[1:]
    batch, classes = data.probs.shape[0], data.probs.shape[-1]
    errors = []
    for image, label in np.ndindex(batch, classes):
        prob = data.probs[image, ..., label].ravel()
        index = np.searchsorted(upper_edges, prob, side="left")
        count = np.bincount(index, minlength=num_bins)
        prob_sum = np.bincount(index, prob, num_bins)
        label_sum = np.bincount(index[data.labels[image].ravel() == label], minlength=num_bins)
        errors.append(np.mean(np.abs(prob_sum - label_sum)[count > 0] / count[count > 0]))
    return float(np.mean(errors))


def check_agreement(programs: Mapping[str, Program], exact: float) -> dict[str, float]:
    """Asserts that all programs give the same loss and gradient, and that ours gives the loss of float64.

    Args:
        programs: programs by name, including ours.
        exact: the loss in float64.

    Returns:
        Relative error of each loss against `exact`.
    """
    ours = programs[OURS]()
    errors = {OURS: float(ours[0]) / exact - 1}
    assert abs(errors[OURS]) < _LOSS_TOLERANCE, f"loss {float(ours[0])} here, {exact} in float64"
    for name, program in programs.items():
        if name != OURS:
            theirs = program()
            _check_same(OURS, ours, name, theirs)
            errors[name] = float(theirs[0]) / exact - 1
    return errors


def _check_same(name_a: str, a: tuple[Any, Any], name_b: str, b: tuple[Any, Any]) -> None:
    losses = float(a[0]), float(b[0])
    same = math.isclose(*losses, rel_tol=_REFERENCE_TOLERANCE)
    assert same, f"loss {losses[0]} of {name_a}, {losses[1]} of {name_b}"
    # The gradients of each bin have the same sum, so bins with few voxels weigh as much as bins with many.
    first, second = _gradient(a), _gradient(b)
    difference = float(np.abs(first - second).sum() / np.abs(first).sum())
    assert difference < _GRADIENT_TOLERANCE, f"gradients of {name_a} and {name_b} differ by {difference:.1e}"


def _gradient(output: tuple[Any, Any]) -> np.ndarray:
    """The gradient, channel last."""
    gradient = output[1]
    return (
        np.asarray(gradient)
        if isinstance(gradient, jax.Array)
        else np.moveaxis(gradient.cpu().numpy(), 1, -1)
    )
