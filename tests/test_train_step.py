"""The training step: the same on one device and on eight, compiled once, and lowered for every platform."""

import dataclasses
import functools
import inspect
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

from calib_jax import bin_statistics
from train.config import DataInfo, ModelConfig, RunConfig, TrainingConfig
from train.data.augment_config import NO_AUGMENTATION, AugmentConfig
from train.data.ignore import IGNORE
from train.models.configs import UNetConfig
from train.sharding import batch_spec, device_mesh, put_batch, weight_shardings
from train.step import TrainState, TrainStep, init_state, make_optimizer, make_train_step
from train.task import make_model

INFO = DataInfo("toy", ("background", "organ", "core"), num_channels=1, spatial_dims=3)
CONFIG = RunConfig(
    "dice+ce+ace",
    model=ModelConfig(network=UNetConfig((4, 8), (2,))),
    training=TrainingConfig(steps=10, batch_size=8, warmup_steps=1),
)


DROPOUT = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, dropout=0.3))
FLAT = dataclasses.replace(INFO, spatial_dims=2)


PATCH = {3: (8, 8, 8), 2: (16, 8)}


def mesh_of(option: str) -> Mesh:
    """A mesh of all eight devices, or of one where no axis is named."""
    return device_mesh(option, jax.devices() if option else jax.devices()[:1])


def batch(seed: int, shape: tuple[int, ...] = (16, 8)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, (CONFIG.training.batch_size, *shape), dtype=np.int32)
    return {"image": rng.normal(label[..., None], 1.0).astype(np.float32), "label": label}


def start(
    config: RunConfig,
    option: str = "",
    info: DataInfo = FLAT,
    optimizer: optax.GradientTransformation | None = None,
    **memory: Any,
) -> tuple[TrainStep, TrainState, Mesh]:
    mesh = mesh_of(option)
    optimizer = optimizer or make_optimizer(config.training)
    graphdef, state = init_state(make_model(config, info), optimizer, ema=config.training.ema)
    state = jax.device_put(state, weight_shardings(state, mesh))
    return make_train_step(graphdef, optimizer, config, mesh, **memory), state, mesh


def train(config: RunConfig, steps: int = 3) -> tuple[list[dict], TrainState]:
    step, state, mesh = start(config)
    metrics = []
    for i in range(steps):
        state, values = step(state, put_batch(batch(i), mesh))
        metrics.append(jax.device_get(values))
    return metrics, state


SGD = optax.sgd(1.0)


@functools.cache
def on_one_device(config: RunConfig, info: DataInfo) -> tuple[dict, Any, Any]:
    return one_step(config, info, "")


def one_step(config: RunConfig, info: DataInfo, option: str, **memory: Any) -> tuple[dict, Any, Any]:
    """Metrics of a step of plain gradient descent, and the parameters before and after it.

    On every mesh the state stays where it is to be, takes the memory of the one before, and needs one program.
    """
    step, state, mesh = start(config, option, info, SGD, **memory)
    before = jax.device_get(jax.tree.map(jnp.copy, state.params))  # NumPy would hold on to what is donated
    examples = put_batch(batch(0, PATCH[info.spatial_dims]), mesh)
    after, metrics = step(state, examples)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    wanted = jax.tree.leaves(weight_shardings(after, mesh))
    for leaf, sharding in zip(jax.tree.leaves(after), wanted, strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    params = jax.device_get(after.params)
    step(after, examples)
    assert step._cache_size() == 1
    return jax.device_get(metrics), before, params


def assert_same_step(one: tuple[dict, Any, Any], other: tuple[dict, Any, Any]) -> None:
    """Losses within 1e-5, and every parameter's update within the rounding of sums over all voxels."""
    for name in one[0]:
        np.testing.assert_allclose(one[0][name], other[0][name], rtol=1e-5, atol=1e-5, err_msg=name)
    chex.assert_trees_all_equal(one[1], other[1])
    chex.assert_trees_all_close(one[2], other[2], rtol=0, atol=2e-6)
    largest = max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, one[1:]), strict=True))
    assert largest > 1e-2  # what is compared to so many digits


@pytest.mark.parametrize("option", ["data=8", "space=8,data=1", "data=2,space=4", "data=1,fsdp=8"])
def test_every_mesh_takes_the_step_of_one_device(option: str) -> None:
    assert_same_step(on_one_device(DROPOUT, FLAT), one_step(DROPOUT, FLAT, option))


def test_volumes_on_a_mesh_of_three_axes() -> None:
    assert_same_step(on_one_device(CONFIG, INFO), one_step(CONFIG, INFO, "data=2,space=2,fsdp=2"))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_zoom_rotation_and_smoothing_of_split_volumes(accumulate: int) -> None:
    """With a volume for each device, and with fewer volumes than devices."""
    augment = AugmentConfig(zoom_prob=1.0, rotation_prob=1.0, smooth_prob=1.0)
    config = dataclasses.replace(CONFIG, augment=augment)
    split = one_step(config, FLAT, "data=4,space=2", accumulate=accumulate)
    assert_same_step(on_one_device(config, FLAT), split)


def test_every_loss_term_on_split_volumes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One from outside too."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "docs" / "examples")
    loss = "dice+ce+softace(num_bins=15)+focal(gamma=3)+ls+mbls+dscpp+dampeddice+my_losses:tversky(alpha=0.3)"
    config = dataclasses.replace(CONFIG, loss=loss)
    assert_same_step(on_one_device(config, FLAT), one_step(config, FLAT, "data=2,space=2,fsdp=2"))


def test_sigmoids_on_split_volumes() -> None:
    """Overlapping regions, each a sigmoid."""
    model = dataclasses.replace(CONFIG.model, activation="sigmoid", regions=("organ", "core"))
    config = dataclasses.replace(CONFIG, model=model, augment=NO_AUGMENTATION)
    regions = ((1, 2), (2,))
    one = one_step(config, FLAT, "", regions=regions)
    assert_same_step(one, one_step(config, FLAT, "data=2,space=2,fsdp=2", regions=regions))


def test_accumulated_parts_take_the_step_of_the_whole_batch() -> None:
    assert_same_step(on_one_device(CONFIG, FLAT), one_step(CONFIG, FLAT, "data=2,space=2,fsdp", accumulate=2))


def test_ignored_voxels_are_left_out_alike_on_every_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of which all to none of the voxels are labelled: each counts alike, whichever device holds it."""
    sparse = batch(0)
    share = np.linspace(0, 1, len(sparse["label"]))[:, None, None]
    ignored = np.random.default_rng(1).random(sparse["label"].shape) < share
    sparse["label"][ignored] = IGNORE
    monkeypatch.setitem(globals(), "batch", lambda *_: sparse)
    alone = one_step(CONFIG, FLAT, "", has_ignore=True)
    assert_same_step(alone, one_step(CONFIG, FLAT, "data=2,space=2,fsdp", accumulate=2, has_ignore=True))


def test_recomputed_activations_take_the_same_step() -> None:
    assert_same_step(on_one_device(DROPOUT, FLAT), one_step(DROPOUT, FLAT, "", remat=True))


def test_accumulation_and_recomputation_take_less_memory() -> None:
    """Three levels at full size, where activations are most of it."""
    config = dataclasses.replace(
        CONFIG,
        model=ModelConfig(network=UNetConfig(channels=(2, 2, 2), strides=(1, 1))),
        augment=NO_AUGMENTATION,
    )

    def temporary_bytes(**memory: Any) -> int:
        step, state, mesh = start(config, **memory)
        sizes = step.lower(state, put_batch(batch(0, (64, 32)), mesh)).compile().memory_analysis()
        held = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
        assert sizes.alias_size_in_bytes >= held
        return sizes.temp_size_in_bytes

    whole = temporary_bytes()
    assert temporary_bytes(accumulate=4) < 0.35 * whole
    assert temporary_bytes(remat=True) < 0.75 * whole


def test_half_precision_keeps_the_state_in_float32() -> None:
    training = dataclasses.replace(CONFIG.training, precision="bfloat16")
    config = dataclasses.replace(CONFIG, training=training, augment=NO_AUGMENTATION)
    step, state, mesh = start(config, "", FLAT)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(state)]
    flat = put_batch(batch(0), mesh)
    text = step.lower(state, flat).as_text()
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert convolutions
    assert all("bf16" in line and "f32" not in line for line in convolutions)
    after, metrics = step(state, flat)
    assert [leaf.dtype for leaf in jax.tree.leaves(after)] == dtypes
    full = on_one_device(dataclasses.replace(CONFIG, augment=NO_AUGMENTATION), FLAT)[0]
    for name in ("loss", "dice", "ce", "ace", "grad_norm"):
        np.testing.assert_allclose(metrics[name], full[name], rtol=0.03, err_msg=name)


def test_bins_of_split_volumes_count_exactly() -> None:
    mesh = mesh_of("data=2,space=2,fsdp=2")
    rng = np.random.default_rng(0)
    probs = jax.nn.softmax(rng.normal(size=(8, 8, 8, 8, 3)).astype(np.float32))
    labels = batch(0, PATCH[3])["label"]
    split = jax.shard_map(
        functools.partial(bin_statistics, axis_name="space"),
        mesh=mesh,
        in_specs=batch_spec(2),
        out_specs=batch_spec(1),
    )
    whole, parts = bin_statistics(probs, labels), jax.jit(split)(probs, labels)
    np.testing.assert_array_equal(whole.count, parts.count)
    np.testing.assert_array_equal(whole.label_sum, parts.label_sum)


def test_dropout_draws_for_each_example_its_own() -> None:
    """On one device; the steps of the meshes above, equal to its step, then do so as well."""
    model = make_model(DROPOUT, FLAT)
    logits = nnx.jit(lambda model, x: model(x))(model, jnp.ones((2, 16, 8, 1)))
    assert float(abs(logits[0] - logits[1]).max()) > 0.01


def test_training_lowers_the_loss() -> None:
    step, state, mesh = start(CONFIG)
    same = put_batch(batch(0), mesh)
    losses = []
    for _ in range(8):
        state, metrics = step(state, same)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]


def test_voxels_stay_on_their_device() -> None:
    """Splitting the batch costs reductions of gradients and sums, never a copy of voxels to other devices."""
    step, state, mesh = start(dataclasses.replace(CONFIG, augment=NO_AUGMENTATION), "data=8")
    program = step.lower(state, put_batch(batch(0), mesh)).compile().as_text()
    assert "all-reduce" in program
    gathered = [line for line in program.splitlines() if "all-gather(" in line or "all-to-all(" in line]
    assert not gathered


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowers_for(platform: str) -> None:
    optimizer = make_optimizer(CONFIG.training)
    graphdef, state = init_state(make_model(CONFIG, INFO), optimizer)
    # Without its `jit`, which has compiler options: only a program of its own may have these.
    step: Any = inspect.unwrap(make_train_step(graphdef, optimizer, CONFIG, mesh_of("")))
    # Graph definitions cannot be exported, so the state travels as its leaves.
    leaves, tree = jax.tree.flatten(state)

    def on_leaves(leaves: list, images: jax.Array, labels: jax.Array) -> list:
        return jax.tree.leaves(step(jax.tree.unflatten(tree, leaves), {"image": images, "label": labels}))

    arrays = batch(0, PATCH[3])
    exported = jax.export.export(jax.jit(on_leaves), platforms=[platform])(
        leaves, arrays["image"], arrays["label"]
    )
    assert exported.platforms == (platform,)


def test_dropout_draws_anew_each_step() -> None:
    step, state, mesh = start(DROPOUT)
    before = draws(state)
    state, _ = step(state, put_batch(batch(0), mesh))
    assert all(after > n for n, after in zip(before, draws(state), strict=True))


def draws(state: TrainState) -> list[int]:
    """How many numbers each dropout layer has drawn."""
    counts = [int(n) for n in jax.tree.leaves(state.rest) if jnp.issubdtype(n.dtype, jnp.integer)]
    assert counts
    return counts


def test_same_seed_same_weights() -> None:
    chex.assert_trees_all_equal(train(CONFIG)[1].params, train(CONFIG)[1].params)


def test_ace_sets_in_late() -> None:
    late = dataclasses.replace(CONFIG.training, ace_delay=0.2, ace_ramp=0.2)
    metrics, _ = train(dataclasses.replace(CONFIG, training=late), steps=5)
    weights = [(m["loss"] - m["dice"] - m["ce"]) / m["ace"] for m in metrics]
    np.testing.assert_allclose(weights, [0.0, 0.0, 0.0, 0.5, 1.0], atol=1e-5)


def test_moving_average_of_the_weights() -> None:
    config = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, ema=0.15))
    step, state, mesh = start(config, "data=2,fsdp=4")
    expected = jax.device_get(state.params)
    for i in range(3):
        state, _ = step(state, put_batch(batch(i), mesh))
        decay = min(0.15, (1 + i) / (10 + i))
        expected = jax.tree.map(
            lambda a, p, d=decay: d * a + (1 - d) * p, expected, jax.device_get(state.params)
        )
    chex.assert_trees_all_close(jax.device_get(state.average), expected, rtol=1e-5, atol=1e-6)
    assert state.evaluated is state.average
    plain = train(CONFIG)[1]
    assert plain.average is None
    chex.assert_trees_all_close(
        jax.device_get(plain.params), jax.device_get(state.params), rtol=1e-3, atol=1e-4
    )
