"""The training step: the same on one device and on eight, compiled once, and lowered for every platform."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from train.config import DataInfo, ModelConfig, RunConfig, TrainingConfig
from train.data import NO_AUGMENTATION
from train.errors import InputError
from train.fit import make_model
from train.sharding import AXIS, check_batch_size, put_batch, replicated
from train.step import TrainState, TrainStep, init_state, make_optimizer, make_train_step

INFO = DataInfo("toy", ("background", "organ", "core"), num_channels=1, spatial_dims=3)
CONFIG = RunConfig(
    "dice+ce+ace",
    model=ModelConfig(channels=(4, 8), strides=(2,)),
    training=TrainingConfig(steps=10, batch_size=8, warmup_steps=1),
)


def mesh_of(num_devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:num_devices]), (AXIS,))


def batch(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (CONFIG.training.batch_size, 8, 8, 8)
    label = rng.integers(0, 3, shape, dtype=np.int32)
    return {"image": rng.normal(label[..., None], 1.0).astype(np.float32), "label": label}


def start(config: RunConfig, num_devices: int) -> tuple[TrainStep, TrainState, Mesh]:
    mesh = mesh_of(num_devices)
    optimizer = make_optimizer(config.training)
    graphdef, state = init_state(make_model(config, INFO), optimizer)
    state = jax.device_put(state, replicated(mesh))
    return make_train_step(graphdef, optimizer, config, mesh), state, mesh


def train(config: RunConfig, num_devices: int, steps: int = 3) -> tuple[list[dict], TrainState]:
    step, state, mesh = start(config, num_devices)
    metrics = []
    for i in range(steps):
        state, values = step(state, put_batch(batch(i), mesh))
        metrics.append(jax.device_get(values))
    return metrics, state


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, augment=NO_AUGMENTATION)])
def test_eight_devices_train_as_one(config: RunConfig) -> None:
    one, state_of_one = train(config, 1)
    eight, state_of_eight = train(config, 8)
    for a, b in zip(one, eight, strict=True):
        for name in ("loss", "dice", "ce", "ace", "grad_norm"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=name)
    # Adam divides by the root of a squared gradient: where a gradient is rounding noise (the biases that the
    # instance norm takes away again), so is the direction of the step. The others must agree.
    mean_change = lambda a, b: np.mean(np.abs(np.asarray(a) - np.asarray(b)))  # noqa: E731
    changes = [
        mean_change(a, b)
        for a, b in zip(
            jax.tree.leaves(state_of_one.params), jax.tree.leaves(state_of_eight.params), strict=True
        )
        if np.ndim(a) > 1
    ]
    assert max(changes) < 1e-4


def test_training_lowers_the_loss() -> None:
    step, state, mesh = start(CONFIG, 1)
    same = put_batch(batch(0), mesh)
    losses = []
    for _ in range(8):
        state, metrics = step(state, same)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]


def test_compiles_once() -> None:
    step, state, mesh = start(CONFIG, 8)
    for i in range(3):
        state, _ = step(state, put_batch(batch(i), mesh))
    assert step._cache_size() == 1


def test_state_is_donated() -> None:
    step, state, mesh = start(CONFIG, 1)
    before = jax.tree.leaves(state.params)[0]
    step(state, put_batch(batch(0), mesh))
    assert before.is_deleted()


def test_voxels_stay_on_their_device() -> None:
    """Splitting the batch costs reductions of gradients and sums, never a copy of voxels to other devices."""
    step, state, mesh = start(dataclasses.replace(CONFIG, augment=NO_AUGMENTATION), 8)
    program = step.lower(state, put_batch(batch(0), mesh)).compile().as_text()
    assert "all-reduce" in program
    gathered = [line for line in program.splitlines() if "all-gather(" in line or "all-to-all(" in line]
    assert not gathered


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowers_for(platform: str) -> None:
    optimizer = make_optimizer(CONFIG.training)
    graphdef, state = init_state(make_model(CONFIG, INFO), optimizer)
    step = make_train_step(graphdef, optimizer, CONFIG, mesh_of(1))
    # Graph definitions cannot be exported, so the state travels as its leaves.
    leaves, tree = jax.tree.flatten(state)

    def on_leaves(leaves: list, images: jax.Array, labels: jax.Array) -> list:
        return jax.tree.leaves(step(jax.tree.unflatten(tree, leaves), {"image": images, "label": labels}))

    arrays = batch(0)
    exported = jax.export.export(jax.jit(on_leaves), platforms=[platform])(
        leaves, arrays["image"], arrays["label"]
    )
    assert exported.platforms == (platform,)


def test_dropout_draws_anew_each_step() -> None:
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, dropout=0.5))
    step, state, mesh = start(config, 1)
    before = draws(state)
    state, _ = step(state, put_batch(batch(0), mesh))
    assert all(after > n for n, after in zip(before, draws(state), strict=True))


def draws(state: TrainState) -> list[int]:
    """How many numbers each dropout layer has drawn."""
    counts = [int(n) for n in jax.tree.leaves(state.rest) if jnp.issubdtype(n.dtype, jnp.integer)]
    assert counts
    return counts


def test_same_seed_same_weights() -> None:
    chex.assert_trees_all_equal(train(CONFIG, 1)[1].params, train(CONFIG, 1)[1].params)


def test_ace_sets_in_late() -> None:
    late = dataclasses.replace(CONFIG.training, ace_delay=0.2, ace_ramp=0.2)
    metrics, _ = train(dataclasses.replace(CONFIG, training=late), 1, steps=5)
    weights = [(m["loss"] - m["dice"] - m["ce"]) / m["ace"] for m in metrics]
    np.testing.assert_allclose(weights, [0.0, 0.0, 0.0, 0.5, 1.0], atol=1e-5)


def test_batch_must_split_evenly() -> None:
    with pytest.raises(InputError, match="batch_size is 6: give a multiple of the 8 devices"):
        check_batch_size(6, mesh_of(8))
