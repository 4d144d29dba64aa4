"""One training step: augment, forward, loss, backward, update, in a single compiled program."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int

from train.config import RunConfig, TrainingConfig
from train.data import augment
from train.losses import Loss, parse_loss
from train.sharding import AXIS, replicated, split_batch


class TrainState(NamedTuple):
    """Everything a run needs to go on, but for its position in the data.

    Random numbers are a function of the run's seed and `step`, so they need no state of their own.

    Attributes:
        step: optimiser steps done.
        params: trainable arrays.
        rest: the model's other state (dropout's counters).
        opt_state: the optimiser's moments.
    """

    step: Int[Array, ""]
    params: Any
    rest: Any
    opt_state: Any


Batch = Mapping[str, Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """AdamW under a linear warm-up and a cosine (or no) decay."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, optax.adamw(learning_rate(config), weight_decay=config.weight_decay))


def learning_rate(config: TrainingConfig) -> optax.Schedule:
    """Learning rate by step."""
    warmup = min(config.warmup_steps, config.steps // 2)
    if config.schedule == "constant":
        return optax.warmup_constant_schedule(0.0, config.learning_rate, warmup)
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, config.steps)


def init_state(model: nnx.Module, optimizer: optax.GradientTransformation) -> tuple[nnx.GraphDef, TrainState]:
    """The model's static part, and the state of a run that has not taken a step."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return graphdef, TrainState(jnp.zeros((), jnp.int32), params, rest, optimizer.init(params))


def make_train_step(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, config: RunConfig, mesh: Mesh
) -> TrainStep:
    """The compiled step, data-parallel over `mesh`: (state, batch) -> (state, metrics).

    The state is donated: its memory is used again for the new one. Metrics are scalars: `loss`, each of its
    parts, `grad_norm` and `learning_rate`; means over the whole batch, whatever the number of devices.
    """
    schedule = learning_rate(config.training)
    gradients = _make_gradients(graphdef, parse_loss(config.loss), mesh)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(config.training.seed), state.step)
        images, labels = _augmented(key, batch, config)
        ace_scale = _ace_scale(config.training, state.step)
        grads, values, rest = gradients(state.params, state.rest, images, labels, ace_scale)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {
            **values,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step)),
        }
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, rest, opt_state), metrics

    whole, split = replicated(mesh), split_batch(mesh)
    return jax.jit(step, donate_argnums=0, in_shardings=(whole, split), out_shardings=whole)


def _make_gradients(graphdef: nnx.GraphDef, loss: Loss, mesh: Mesh) -> Callable[..., tuple[Any, Any, Any]]:
    """(params, rest, images, labels, ace_scale) -> gradients, loss with its parts, and the rest afterwards.

    Each device computes those of its own examples, and only their means travel: every part of the loss is
    a mean over images, so the mean over devices is that over the batch. Said in a `shard_map`, this does
    not hang on the compiler seeing that loops over images and scatters into bins need no other's voxels.
    """

    def local(params: Any, rest: Any, images: Array, labels: Array, ace_scale: Array) -> tuple[Any, Any, Any]:
        def objective(params: Any) -> tuple[Array, Any]:
            # Flax lets only variables made under this very trace change, as dropout's counters do: a copy is.
            model = nnx.merge(graphdef, params, jax.tree.map(lambda leaf: leaf, rest))
            parts = loss.parts(model(images), labels)
            return loss.total(parts, ace_scale), (parts, nnx.split(model, nnx.Param, ...)[2])

        (total, (parts, after)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return *jax.lax.pmean((grads, {"loss": total, **parts}), AXIS), after

    whole, split = PartitionSpec(), PartitionSpec(AXIS)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(whole, whole, split, split, whole), out_specs=whole, check_vma=False
    )


def _augmented(key: Array, batch: Batch, config: RunConfig) -> tuple[Array, Array]:
    keys = jax.random.split(key, batch["image"].shape[0])
    return jax.vmap(augment, in_axes=(0, 0, 0, None))(keys, batch["image"], batch["label"], config.augment)


def _ace_scale(config: TrainingConfig, step: Array) -> Array:
    """0 until mL1-ACE sets in, then rising to 1."""
    start, rise = config.ace_delay * config.steps, config.ace_ramp * config.steps
    return jnp.clip((step - start) / rise, 0.0, 1.0) if rise else jnp.where(step < start, 0.0, 1.0)
