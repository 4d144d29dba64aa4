"""One training step of the paper's U-Net, with and without mL1-ACE, beside the reference's."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import timing
from train.config import DataInfo, RunConfig, TrainingConfig
from train.data import NO_AUGMENTATION
from train.fit import make_model
from train.losses import parse_loss
from train.models import load_monai_weights
from train.sharding import device_mesh, put_batch, replicated
from train.step import init_state, make_optimizer, make_train_step

if TYPE_CHECKING:
    from benchmarks import reference

LOSSES = ("dice", "dice+ace")


@dataclass(frozen=True)
class Step:
    """Time of one training step (forward, loss, backward, Adam) beside MONAI's on PyTorch, as a ratio."""

    patch: tuple[int, int, int] = (48, 64, 48)
    """Voxels along each axis."""
    batch_size: int = 4
    """Patches in a step."""
    classes: int = 3
    """Classes, background included."""
    rounds: int = 15
    """Timed rounds; each takes one step of every program."""
    warmup: int = 3
    """Rounds before these."""
    out: Path = Path("benchmarks/results/step.json")
    """Where the results go, as JSON."""

    def run(self) -> None:
        from benchmarks import reference

        reference.use_all_cores()
        batch = self._batch()
        programs: dict[str, Callable[[], Any]] = {}
        for loss in LOSSES:
            network = reference.paper_unet(1, self.classes)
            model = make_model(self._config(loss), self._data())
            load_monai_weights(model, reference.parameters(network))
            torch_step = _reference_step(reference.Loss(self.classes, ace="ace" in loss), network, batch)
            difference = _check_agreement(loss, model, network, torch_step, batch)
            print(f"{loss}: same loss, gradients differ by {difference:.1e} of the largest at most")
            programs[f"calib_jax {loss}"] = self._our_step(loss, model, batch)
            programs[f"reference {loss}"] = torch_step
        samples = timing.interleaved(programs, warmup=self.warmup, rounds=self.rounds)
        self._report(samples)

    def _report(self, samples: dict[str, list[float]]) -> None:
        ratios = {loss: timing.ratio(samples, f"calib_jax {loss}", f"reference {loss}") for loss in LOSSES}
        cost = {
            who: timing.ratio(samples, f"{who} dice+ace", f"{who} dice") - 1
            for who in ("calib_jax", "reference")
        }
        print(timing.format_samples(samples))
        for loss, value in ratios.items():
            print(f"step with {loss}: {value:.2f} of the reference's time (1 = equal, lower = faster)")
        for who, value in cost.items():
            print(f"mL1-ACE adds {100 * value:+.1f}% to the step of {who}")
        shape = {"patch": self.patch, "batch_size": self.batch_size, "classes": self.classes}
        timing.write_results(self.out, {**shape, "ratio": ratios, "ace_cost": cost, "seconds": samples})
        print(f"written to {self.out}")

    def _batch(self) -> dict[str, np.ndarray]:
        """A noisy image of the labels it goes with, so that probabilities spread over the bins."""
        rng = np.random.default_rng(0)
        label = rng.integers(0, self.classes, (self.batch_size, *self.patch), dtype=np.int32)
        return {"image": rng.normal(label[..., None], 1.0).astype(np.float32), "label": label}

    def _data(self) -> DataInfo:
        return DataInfo("random", tuple(map(str, range(self.classes))), num_channels=1, spatial_dims=3)

    def _config(self, loss: str) -> RunConfig:
        training = TrainingConfig(
            batch_size=self.batch_size, learning_rate=1e-3, schedule="constant", ace_delay=0.0, ace_ramp=0.0
        )
        return RunConfig(loss, training=training, augment=NO_AUGMENTATION)

    def _our_step(self, loss: str, model: nnx.Module, batch: dict[str, np.ndarray]) -> Callable[[], Any]:
        """The trainer's own step, on a batch that is already on the device, as the reference's is."""
        config, mesh = self._config(loss), device_mesh()
        optimizer = make_optimizer(config.training)
        graphdef, state = init_state(model, optimizer)
        step = make_train_step(graphdef, optimizer, config, mesh)
        held = {"state": jax.device_put(state, replicated(mesh))}
        on_device = put_batch(batch, mesh)

        def program() -> None:
            held["state"], _ = step(held["state"], on_device)
            jax.block_until_ready(held["state"])

        return program


def _reference_step(
    loss: "reference.Loss", network: Any, batch: dict[str, np.ndarray]
) -> Callable[[], float]:
    """The reference's step, which returns the loss before it."""
    import torch

    from benchmarks import reference

    images = reference.channel_first(batch["image"])
    labels = torch.tensor(batch["label"], dtype=torch.int64)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)

    def program() -> float:
        optimizer.zero_grad()
        value = loss(network(images), labels)
        value.backward()
        optimizer.step()
        return value.item()

    return program


def _check_agreement(
    name: str, model: nnx.Module, network: Any, torch_step: Callable[[], float], batch: dict[str, np.ndarray]
) -> float:
    """Asserts that both give the same loss and gradients; returns the largest difference of a gradient."""
    from benchmarks import reference

    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    loss = parse_loss(name)
    images, labels = jnp.asarray(batch["image"]), jnp.asarray(batch["label"])

    def objective(params: Any) -> jax.Array:
        return loss.total(loss.parts(nnx.merge(graphdef, params, rest)(images), labels))

    ours, grads = jax.jit(jax.value_and_grad(objective))(params)
    theirs = torch_step()
    assert abs(float(ours) - theirs) < 1e-4, f"{name}: loss {float(ours)} here, {theirs} in the reference"
    expected = nnx.clone(model)
    load_monai_weights(expected, reference.gradients(network))
    pairs = list(zip(jax.tree.leaves(grads), jax.tree.leaves(nnx.state(expected, nnx.Param)), strict=True))
    largest = max(float(abs(b).max()) for _, b in pairs)
    difference = max(float(abs(a - b).max()) for a, b in pairs) / largest
    assert difference < 1e-3, f"{name}: gradients differ by {difference:.1e} of the largest"
    return difference
