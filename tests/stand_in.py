"""Predictions in memory, with the interface of `calib_jax.predictions.Predictions`."""

import dataclasses

import numpy as np

from calib_jax.predictions import Case, PredictionError


@dataclasses.dataclass
class InMemory:
    """Cases by model and name; a string in place of a case is the message of a fault."""

    cases: dict
    class_names: tuple = ("background", "anterior", "posterior")
    regions: bool = False
    notices: tuple = ()
    read_cases: list = dataclasses.field(default_factory=list)

    @property
    def models(self):
        return tuple(self.cases)

    @property
    def case_names(self):
        return tuple(sorted({name for cases in self.cases.values() for name in cases}))

    def files(self, case_name, model=None):
        return ()

    def read(self, case_name, model=None):
        self.read_cases.append((model, case_name))
        found = self.cases[model or self.models[0]][case_name]
        if isinstance(found, str):
            raise PredictionError(found)
        return found


def ball(shape, centre, radius):
    """A ball of voxels."""
    grid = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    return sum((x - c) ** 2 for x, c in zip(grid, centre, strict=True)) <= radius**2


def noisy_case(
    name="case", model="model", *, seed=0, shape=(12, 10, 8), sharpness=4.0, classes=3, image=False
):
    """Balls as labels; probabilities from smoothed noisy labels, over-confident if `sharpness` is large."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.int32)
    for c in range(1, classes):
        centre = [n * (0.3 + 0.4 * (c - 1) / max(classes - 2, 1)) for n in shape]
        labels[ball(shape, centre, 0.25 * min(shape))] = c
    logits = sharpness * (np.eye(classes)[labels] + rng.normal(0, 0.45, (*shape, classes)))
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs = (probs / probs.sum(-1, keepdims=True)).astype(np.float32)
    grey = rng.normal(0, 1, shape).astype(np.float32) + labels if image else None
    return Case(name, model, probs, labels, None, grey, (1.0,) * len(shape))
