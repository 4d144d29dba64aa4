"""One training step of the paper's U-Net, with and without mL1-ACE, beside the reference's."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import timing
from train.config import DataInfo, RunConfig, TrainingConfig
from train.data import NO_AUGMENTATION
from train.losses import parse_loss
from train.monai.mapping import load_monai_weights
from train.sharding import device_mesh, put_batch, replicated
from train.step import init_state, make_optimizer, make_train_step
from train.task import make_model

if TYPE_CHECKING:
    from benchmarks import reference

LOSSES = ("dice", "dice+ace")
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Step:
    """Time of one training step (forward, loss, backward, Adam) beside MONAI's on PyTorch, as a ratio."""

    patch: tuple[int, ...] = (48, 64, 48)
    """Voxels along each of two or three axes."""
    batch_size: int = 4
    """Patches in a step."""
    channels: int = 1
    """Channels of the image."""
    classes: int = 3
    """Classes, background included."""
    precision: Precision = "float32"
    """Of convolutions and activations in both; with bfloat16 the reference runs under `torch.autocast`."""
    compile: bool = True
    """Time the reference under `torch.compile` as well."""
    rounds: int = 31
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
        for name in LOSSES:
            network = reference.paper_unet(self.channels, self.classes, len(self.patch))
            model = make_model(self._config(name), self._data())
            load_monai_weights(model, reference.parameters(network))
            loss = reference.Loss(self.classes, ace="ace" in name)
            difference = _check_agreement(name, model, network, _reference_step(loss, network, batch), batch)
            print(f"{name}: same loss, gradients differ by {difference:.1e} of the largest at most")
            programs[f"calib_jax {name}"] = self._our_step(name, model, batch)
            programs[f"reference {name}"] = _reference_step(loss, network, batch, self.precision)
            if self.compile:
                programs |= _compiled_step(name, loss, network, batch, self.precision)
        samples = timing.interleaved(programs, warmup=self.warmup, rounds=self.rounds)
        self._report(samples)

    def _report(self, samples: dict[str, list[float]]) -> None:
        others = [who for who in ("reference", "compiled") if f"{who} {LOSSES[-1]}" in samples]
        ratios = {
            who: {loss: timing.ratio(samples, f"calib_jax {loss}", f"{who} {loss}") for loss in LOSSES}
            for who in others
        }
        spreads = {name: timing.spread(seconds) for name, seconds in samples.items()}
        cost = {
            who: {
                which: spreads[f"{who} dice+ace"][which] / spreads[f"{who} dice"][which] - 1
                for which in ("median", "q1")
            }
            for who in ("calib_jax", *others)
        }
        print(timing.format_samples(samples))
        for who, by_loss in ratios.items():
            for loss, value in by_loss.items():
                print(f"step with {loss}: {value:.2f} of the time of {who} (1 = equal, lower = faster)")
        for who, value in cost.items():
            figures = f"{100 * value['median']:+.1f}%, at the lower quartiles {100 * value['q1']:+.1f}%"
            print(f"mL1-ACE adds {figures} to the step of {who}")
        names = ("patch", "batch_size", "channels", "classes", "precision")
        settings = {name: getattr(self, name) for name in names}
        timing.write_results(self.out, {**settings, "ratio": ratios, "ace_cost": cost, "seconds": samples})
        print(f"written to {self.out}")

    def _batch(self) -> dict[str, np.ndarray]:
        """A noisy image of the labels it goes with, so that probabilities spread over the bins."""
        rng = np.random.default_rng(0)
        label = rng.integers(0, self.classes, (self.batch_size, *self.patch), dtype=np.int32)
        noise = rng.standard_normal((*label.shape, self.channels), np.float32)
        return {"image": noise + label[..., None].astype(np.float32), "label": label}

    def _data(self) -> DataInfo:
        names = tuple(map(str, range(self.classes)))
        return DataInfo("random", names, self.channels, spatial_dims=len(self.patch))

    def _config(self, loss: str) -> RunConfig:
        training = TrainingConfig(
            batch_size=self.batch_size,
            learning_rate=1e-3,
            schedule="constant",
            ace_delay=0.0,
            ace_ramp=0.0,
            precision=self.precision,
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


@dataclass(frozen=True)
class Step2D(Step):
    """The same as `step` for slices instead of volumes."""

    patch: tuple[int, ...] = (192, 192)
    """Pixels along each axis."""
    batch_size: int = 16
    """Patches in a step."""
    out: Path = Path("benchmarks/results/step-2d.json")
    """Where the results go, as JSON."""


def _reference_step(
    loss: "reference.Loss", network: Any, batch: dict[str, np.ndarray], precision: Precision = "float32"
) -> Callable[[], float]:
    """The reference's step, which returns the loss before it."""
    import torch

    from benchmarks import reference

    images = reference.channel_first(batch["image"])
    labels = reference.class_ids(batch["label"])
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)

    def program() -> float:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = network(images)
        value = loss(logits.float(), labels)
        value.backward()
        optimizer.step()
        reference.wait()
        return value.item()

    return program


def _compiled_step(
    name: str, loss: "reference.Loss", network: Any, batch: dict[str, np.ndarray], precision: Precision
) -> dict[str, Callable[[], float]]:
    """The reference's step with its network under `torch.compile`; nothing where that fails."""
    import torch

    program = _reference_step(loss, torch.compile(copy.deepcopy(network), dynamic=False), batch, precision)
    try:
        program()
    except Exception as error:  # a compiler may fail in any way, and the others are still to be timed
        print(f"torch.compile failed: {timing.first_line(error)}")
        return {}
    return {f"compiled {name}": program}


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
