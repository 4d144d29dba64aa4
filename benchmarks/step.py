"""One training step of the paper's U-Net, with and without mL1-ACE, beside the reference's."""

import copy
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from benchmarks import reference, timing
from benchmarks.options import Precision, Step
from train.config import DataInfo, RunConfig, TrainingConfig
from train.data.augment_config import NO_AUGMENTATION
from train.losses import parse_loss
from train.monai.mapping import load_monai_weights
from train.sharding import device_mesh, put_batch, replicated
from train.step import init_state, make_optimizer, make_train_step
from train.task import make_model

LOSSES = ("dice", "dice+ace")


def run(options: Step) -> None:
    """Checks that the steps agree, times them, prints the ratios and writes the results."""
    reference.at_its_fastest()
    batch = _batch(options)
    programs: dict[str, Callable[[], Any]] = {}
    for name in LOSSES:
        network = reference.paper_unet(options.channels, options.classes, len(options.patch))
        names = tuple(map(str, range(options.classes)))
        data = DataInfo("random", names, options.channels, spatial_dims=len(options.patch))
        config = _config(options, name)
        model = make_model(config, data)
        load_monai_weights(model, reference.parameters(network))
        loss = reference.Loss(options.classes, ace="ace" in name)
        with reference.full_precision():
            difference = _check_agreement(name, model, network, _reference_step(loss, network, batch), batch)
        print(f"{name}: same loss, gradients differ by {difference:.1e} of the largest at most")
        programs[f"calib_jax {name}"] = _our_step(config, model, batch)
        programs[f"reference {name}"] = _reference_step(loss, network, batch, options.precision)
        if options.compile:
            programs |= _compiled_step(name, loss, network, batch, options.precision)
    samples = timing.interleaved(programs, warmup=options.warmup, rounds=options.rounds)
    _report(options, samples)


def _report(options: Step, samples: dict[str, list[float]]) -> None:
    others = [other for other in ("reference", "compiled") if f"{other} {LOSSES[-1]}" in samples]
    ratios = {
        other: {loss: timing.ratio(samples, f"calib_jax {loss}", f"{other} {loss}") for loss in LOSSES}
        for other in others
    }
    spreads = {name: timing.spread(seconds) for name, seconds in samples.items()}
    cost = {
        side: {
            which: spreads[f"{side} dice+ace"][which] / spreads[f"{side} dice"][which] - 1
            for which in ("median", "q1")
        }
        for side in ("calib_jax", *others)
    }
    print(timing.format_samples(samples))
    for other, by_loss in ratios.items():
        for loss, value in by_loss.items():
            print(f"step with {loss}: {value:.2f} of the time of {other} (1 = equal, lower = faster)")
    for side, value in cost.items():
        figures = f"{100 * value['median']:+.1f}%, at the lower quartiles {100 * value['q1']:+.1f}%"
        print(f"mL1-ACE adds {figures} to the step of {side}")
    settings = timing.settings(options, "patch", "batch_size", "channels", "classes", "precision")
    results = {**settings, "ratio": ratios, "ace_cost": cost, "seconds": samples}
    timing.write_results(options.out, results)


def _batch(options: Step) -> dict[str, np.ndarray]:
    """A noisy image of its own labels, so that probabilities spread over the bins."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, options.classes, (options.batch_size, *options.patch), dtype=np.int32)
    noise = rng.standard_normal((*label.shape, options.channels), np.float32)
    return {"image": noise + label[..., None].astype(np.float32), "label": label}


def _config(options: Step, loss: str) -> RunConfig:
    training = TrainingConfig(
        batch_size=options.batch_size,
        learning_rate=1e-3,
        schedule="constant",
        ace_delay=0.0,
        ace_ramp=0.0,
        precision=options.precision,
    )
    return RunConfig(loss, training=training, augment=NO_AUGMENTATION)


def _our_step(config: RunConfig, model: nnx.Module, batch: dict[str, np.ndarray]) -> Callable[[], Any]:
    """The trainer's step, on a batch that is already on the device, as the reference's is."""
    mesh = device_mesh()
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
    loss: reference.Loss, network: Any, batch: dict[str, np.ndarray], precision: Precision = "float32"
) -> Callable[[], float]:
    """The reference's step, which returns the loss before the step."""
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
    name: str, loss: reference.Loss, network: Any, batch: dict[str, np.ndarray], precision: Precision
) -> dict[str, Callable[[], float]]:
    """The reference's step with its network under `torch.compile`; empty if compilation fails."""
    program = _reference_step(loss, torch.compile(copy.deepcopy(network), dynamic=False), batch, precision)
    try:
        program()
    except Exception as error:  # a compiler may raise anything
        print(f"torch.compile failed: {timing.first_line(error)}")
        return {}
    return {f"compiled {name}": program}


def _check_agreement(
    name: str, model: nnx.Module, network: Any, torch_step: Callable[[], float], batch: dict[str, np.ndarray]
) -> float:
    """Asserts that both sides give the same loss and gradients; returns the largest difference of a gradient."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    loss = parse_loss(name)

    def objective(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        return loss.total(loss.parts(nnx.merge(graphdef, params, rest)(images), labels))

    ours, grads = jax.jit(jax.value_and_grad(objective))(params, batch["image"], batch["label"])
    theirs = torch_step()
    assert abs(float(ours) - theirs) < 1e-4, f"{name}: loss {float(ours)} here, {theirs} in the reference"
    expected = nnx.clone(model)
    load_monai_weights(expected, reference.gradients(network))
    pairs = list(zip(jax.tree.leaves(grads), jax.tree.leaves(nnx.state(expected, nnx.Param)), strict=True))
    largest = max(float(abs(b).max()) for _, b in pairs)
    difference = max(float(abs(a - b).max()) for a, b in pairs) / largest
    assert difference < 1e-3, f"{name}: gradients differ by {difference:.1e} of the largest"
    return difference
