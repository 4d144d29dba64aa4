"""`segmentation_loss` beside its parts, each computed on its own, and beside the reference's."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from monai.losses.dice import DiceCELoss

import calib_jax
from benchmarks import reference, timing
from benchmarks.options import Parts, parse_shape

OURS, REFERENCE = "segmentation_loss", "reference"
_TOLERANCE = 1e-4


def run(options: Parts) -> None:
    """Checks that the whole equals the sum of its parts, times them, prints the ratios and writes the results."""
    reference.at_its_fastest()
    logits, labels = _data(options.shape)
    arguments = jnp.asarray(logits), jnp.asarray(labels)
    programs = {name: _program(loss, *arguments) for name, loss in OUR_LOSSES.items()}
    programs[REFERENCE] = _reference_program(logits, labels)
    check_agreement({name: float(program()[0]) for name, program in programs.items()})
    samples = timing.interleaved(programs, warmup=options.warmup, rounds=options.rounds)
    apart = [seconds for name, seconds in samples.items() if name not in (OURS, REFERENCE)]
    together = {**samples, "parts": [sum(x) for x in zip(*apart, strict=True)]}
    ratios = {other: timing.ratio(together, OURS, other) for other in ("parts", REFERENCE)}
    print(timing.format_samples(samples))
    print(f"one loss: {ratios['parts']:.2f} of the time of its parts, {ratios[REFERENCE]:.2f} of MONAI's")
    timing.write_results(options.out, {"shape": options.shape, "ratio": ratios, "seconds": samples})


def _data(shape: str) -> tuple[np.ndarray, np.ndarray]:
    batch, classes, *spatial = parse_shape(shape)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, (batch, *spatial), dtype=np.int32)
    noise = rng.standard_normal((*labels.shape, classes), np.float32)
    return noise + 3 * np.eye(classes, dtype=np.float32)[labels], labels


def _dice(logits: jax.Array, labels: jax.Array) -> jax.Array:
    one_hot = jax.nn.one_hot(labels, logits.shape[-1])
    return optax.losses.dice_loss(logits, one_hot, smooth=5e-6).mean()


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# The whole and its parts, all with weight 1.
OUR_LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    OURS: lambda logits, labels: calib_jax.segmentation_loss(logits, labels, ace=1.0),
    "dice": _dice,
    "cross-entropy": _cross_entropy,
    "mL1-ACE": lambda logits, labels: calib_jax.mL1_ace(jax.nn.softmax(logits), labels),
}


def check_agreement(values: dict[str, float]) -> None:
    """Asserts that the whole equals the sum of its parts and the reference."""
    apart = sum(value for name, value in values.items() if name not in (OURS, REFERENCE))
    for name, other in (("the sum of its parts", apart), ("the reference", values[REFERENCE])):
        assert abs(values[OURS] - other) < _TOLERANCE, f"segmentation_loss is {values[OURS]}, {name} {other}"


def _program(loss: Callable[..., jax.Array], logits: jax.Array, labels: jax.Array) -> Callable[[], Any]:
    run = jax.jit(jax.value_and_grad(loss))
    return lambda: jax.block_until_ready(run(logits, labels))


def _reference_program(logits: np.ndarray, labels: np.ndarray) -> Callable[[], Any]:
    scores = reference.channel_first(logits).requires_grad_()
    ids = reference.class_ids(labels)
    one_hot = torch.nn.functional.one_hot(ids, logits.shape[-1]).movedim(-1, 1).float()
    dice_and_ce = DiceCELoss(softmax=True, to_onehot_y=True)

    def program() -> Any:
        value = dice_and_ce(scores, ids[:, None]) + reference.mean_l1_ace(torch.softmax(scores, 1), one_hot)
        (gradient,) = torch.autograd.grad(value, scores)
        reference.wait()
        return value.detach(), gradient

    return program
