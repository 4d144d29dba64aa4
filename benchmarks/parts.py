"""`segmentation_loss` beside its parts, each computed on its own, and beside the reference's."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import calib_jax
from benchmarks import timing
from benchmarks.loss import parse_shape

OURS, REFERENCE = "segmentation_loss", "reference"
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Parts:
    """Time of Dice + cross-entropy + mL1-ACE with their gradient from logits, as one loss and part by part.

    The parts are optax's Dice and cross-entropy and `mL1_ace` of a softmax, a program each. The reference is
    MONAI's DiceCELoss plus mL1-ACE on its `calibration_binning`.
    """

    shape: str = "4x3x48x64x48"
    """Batch, classes, then voxels along each axis."""
    rounds: int = 15
    """Timed rounds; each calls every program once."""
    warmup: int = 3
    """Rounds before these."""
    out: Path = Path("benchmarks/results/parts.json")
    """Where the results go, as JSON."""

    def run(self) -> None:
        from benchmarks import reference

        reference.use_all_cores()
        logits, labels = self._data()
        arguments = jnp.asarray(logits), jnp.asarray(labels)
        programs = {name: _program(loss, *arguments) for name, loss in OUR_LOSSES.items()}
        programs[REFERENCE] = _reference_program(logits, labels)
        values = {name: float(program()[0]) for name, program in programs.items()}
        check_agreement(values)
        samples = timing.interleaved(programs, warmup=self.warmup, rounds=self.rounds)
        self._report(samples)

    def _report(self, samples: dict[str, list[float]]) -> None:
        apart = [name for name in samples if name not in (OURS, REFERENCE)]
        together = {
            **samples,
            "parts": [sum(x) for x in zip(*(samples[name] for name in apart), strict=True)],
        }
        ratios = {other: timing.ratio(together, OURS, other) for other in ("parts", REFERENCE)}
        print(timing.format_samples(samples))
        print(f"one loss: {ratios['parts']:.2f} of the time of its parts, {ratios[REFERENCE]:.2f} of MONAI's")
        timing.write_results(self.out, {"shape": self.shape, "ratio": ratios, "seconds": samples})
        print(f"written to {self.out}")

    def _data(self) -> tuple[np.ndarray, np.ndarray]:
        batch, classes, *spatial = parse_shape(self.shape)
        rng = np.random.default_rng(0)
        labels = rng.integers(0, classes, (batch, *spatial), dtype=np.int32)
        noise = rng.standard_normal((*labels.shape, classes), np.float32)
        return noise + 3 * np.eye(classes, dtype=np.float32)[labels], labels


def _dice(logits: jax.Array, labels: jax.Array) -> jax.Array:
    one_hot = jax.nn.one_hot(labels, logits.shape[-1])
    return optax.losses.dice_loss(logits, one_hot, smooth=5e-6).mean()


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# The whole and its parts, with equal weights of 1.
OUR_LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    OURS: lambda logits, labels: calib_jax.segmentation_loss(logits, labels, ace=1.0),
    "dice": _dice,
    "cross-entropy": _cross_entropy,
    "mL1-ACE": lambda logits, labels: calib_jax.mL1_ace(jax.nn.softmax(logits), labels),
}


def check_agreement(values: dict[str, float]) -> None:
    """Asserts that the whole is the sum of its parts, here and in the reference."""
    apart = sum(value for name, value in values.items() if name not in (OURS, REFERENCE))
    for name, other in (("the sum of its parts", apart), ("the reference", values[REFERENCE])):
        assert abs(values[OURS] - other) < _TOLERANCE, f"segmentation_loss is {values[OURS]}, {name} {other}"


def _program(loss: Callable[..., jax.Array], logits: jax.Array, labels: jax.Array) -> Callable[[], Any]:
    run = jax.jit(jax.value_and_grad(loss))
    return lambda: jax.block_until_ready(run(logits, labels))


def _reference_program(logits: np.ndarray, labels: np.ndarray) -> Callable[[], Any]:
    import torch
    from monai.losses.dice import DiceCELoss

    from benchmarks import reference

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
