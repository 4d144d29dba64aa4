"""One training step: augment, forward, loss, backward, update, in a single compiled program."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from train import cpu
from train.config import RunConfig, TrainingConfig
from train.data import augment, mask_ignored
from train.losses import Loss, Regions, parse_loss
from train.models.remat import rematerialised
from train.sharding import BATCH, SPACE, batch_parts, batch_spec, replicated, weight_shardings


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
Examples = tuple[Array, Array, Array]  # keys, images, labels
Gradients = Callable[[Any, Any, Examples, Array], tuple[Any, Any, Any]]
LossAndGradient = Callable[[Any, Array, Array], tuple[dict[str, Array], Any]]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """AdamW under a linear warm-up and a cosine (or no) decay."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, optax.adamw(learning_rate(config), weight_decay=config.weight_decay))


def learning_rate(config: TrainingConfig) -> optax.Schedule:
    """Learning rate by step."""
    warmup, peak = min(config.warmup_steps, config.steps // 2), config.learning_rate
    start = config.warmup_from * peak
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(start, peak, warmup, config.steps)
    # Optax takes a rise over no steps for one that never sets out.
    return optax.warmup_constant_schedule(start if warmup else peak, peak, warmup)


def init_state(model: nnx.Module, optimizer: optax.GradientTransformation) -> tuple[nnx.GraphDef, TrainState]:
    """The model's static part, and the state of a run that has not taken a step."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return graphdef, TrainState(jnp.zeros((), jnp.int32), params, rest, optimizer.init(params))


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    config: RunConfig,
    mesh: Mesh,
    *,
    regions: Regions = (),
    accumulate: int = 1,
    remat: bool = False,
    has_ignore: bool = False,
) -> TrainStep:
    """The compiled step over `mesh`: (state, batch) -> (state, metrics).

    State and batch are to be placed as `train.sharding` says, and so is the new state. The state is donated: its
    memory is used again for the new one. Metrics are scalars: `loss`, each of its parts, `grad_norm` and
    `learning_rate`; means over the whole batch, whatever the mesh. With `accumulate` above 1 the batch is taken
    in so many parts, one after the other, which need so much less memory; with `remat` the model's units are
    computed again in the backward pass, and only what goes in and out of them is kept. `regions` are the class ids
    of each output channel of a network with sigmoids. With `has_ignore` the loss leaves out voxels without a label,
    see `train.data.mask_ignored`.
    """
    schedule = learning_rate(config.training)
    named = parse_loss(config.loss, config.training.ignore_empty_classes)
    loss = _make_loss(dataclasses.replace(named, regions=regions), mesh, has_ignore)
    gradients = _in_turn(_make_gradients(graphdef, config, loss, mesh, remat), accumulate, mesh)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(config.training.seed), state.step)
        keys = jax.random.split(key, batch["image"].shape[0])
        ace_scale = _ace_scale(config.training, state.step)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            grads, values, rest = gradients(
                state.params, state.rest, (keys, batch["image"], batch["label"]), ace_scale
            )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {
            **values,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step)),
        }
        params = optax.apply_updates(state.params, updates)
        after = TrainState(state.step + 1, params, rest, opt_state)
        return lax.with_sharding_constraint(after, weight_shardings(after, mesh)), metrics

    options = cpu.compiler_options(mesh.devices.flat[0].platform)
    return jax.jit(step, donate_argnums=0, compiler_options=options)


def _make_gradients(
    graphdef: nnx.GraphDef, config: RunConfig, loss: LossAndGradient, mesh: Mesh, remat: bool
) -> Gradients:
    """(params, rest, examples, ace_scale) -> gradients, loss with its parts, and the rest afterwards.

    The compiler splits the model as its inputs are split: it moves the rims of split volumes and, since the
    parameters are asked for whole, gathers these. The loss is no such plain arithmetic; it is split by hand.
    """
    dtype = jnp.dtype(config.training.precision)

    def gradients(params: Any, rest: Any, examples: Examples, ace_scale: Array) -> tuple[Any, Any, Any]:
        keys, images, labels = examples
        images, labels = jax.vmap(augment, in_axes=(0, 0, 0, None))(keys, images, labels, config.augment)

        def scores(weights: Any) -> tuple[Any, Any]:
            # Flax lets only variables made under this very trace change, as dropout's counters do: a copy is.
            model = nnx.merge(graphdef, weights, jax.tree.map(lambda leaf: leaf, rest))
            with rematerialised(remat):
                logits = model(images.astype(dtype))
            return logits, nnx.split(model, nnx.Param, ...)[2]

        weights = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        weights = lax.with_sharding_constraint(weights, replicated(mesh))
        logits, pull_back, after = jax.vjp(scores, weights, has_aux=True)
        values, d_logits = loss(logits, labels, ace_scale)
        (grads,) = pull_back(d_logits)
        grads = jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), grads, params)
        return lax.with_sharding_constraint(grads, weight_shardings(grads, mesh)), values, after

    return gradients


def _make_loss(loss: Loss, mesh: Mesh, has_ignore: bool) -> LossAndGradient:
    """(logits, labels, ace_scale) -> loss with its parts, and its gradient with respect to the logits.

    Every part of the loss is a mean over images of what sums over an image's voxels say. So each device
    computes that of its own examples, sharing sums with those that hold other voxels of the same ones; then
    only means travel. Said in a `shard_map`, this does not hang on the compiler seeing that loops over images
    and scatters into bins need no other's voxels.
    """

    def local(logits: Any, labels: Array, ace_scale: Array) -> tuple[dict[str, Array], Any]:
        labels, where = mask_ignored(labels) if has_ignore else (labels, None)

        def objective(logits: Any) -> tuple[Array, dict[str, Array]]:
            parts = loss.parts(logits, labels, SPACE if mesh.shape[SPACE] > 1 else None, where)
            return loss.total(parts, ace_scale), parts

        (total, parts), d_logits = jax.value_and_grad(objective, has_aux=True)(logits)
        d_logits = jax.tree.map(lambda level: level / batch_parts(mesh), d_logits)
        return lax.pmean({"loss": total, **parts}, BATCH), d_logits

    voxels, whole = batch_spec(2), PartitionSpec()
    return jax.shard_map(
        local, mesh=mesh, in_specs=(voxels, voxels, whole), out_specs=(whole, voxels), check_vma=False
    )


def _in_turn(gradients: Gradients, parts: int, mesh: Mesh) -> Gradients:
    """The same gradients, of the examples in so many parts one after the other: means of the parts' means."""
    if parts == 1:
        return gradients

    def split(examples: Array) -> Array:
        """[batch, ...] -> [parts, batch / parts, ...], each device's own examples in every part."""
        split = examples.reshape(-1, parts, *examples.shape[1:]).swapaxes(0, 1)
        spec = PartitionSpec(None, *batch_spec(examples.ndim))
        return lax.with_sharding_constraint(split, NamedSharding(mesh, spec))

    def all_parts(params: Any, rest: Any, examples: Examples, ace_scale: Array) -> tuple[Any, Any, Any]:
        def add(carry: tuple[Any, Any], part: Examples) -> tuple[tuple[Any, Any], None]:
            rest, total = carry
            grads, values, rest = gradients(params, rest, part, ace_scale)
            return (rest, jax.tree.map(jnp.add, total, (grads, values))), None

        examples = jax.tree.map(split, examples)
        first = jax.tree.map(lambda x: x[0], examples)
        shapes = jax.eval_shape(gradients, params, rest, first, ace_scale)[:2]
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (rest, total), _ = lax.scan(add, (rest, zeros), examples)
        return *jax.tree.map(lambda leaf: leaf / parts, total), rest

    return all_parts


def _ace_scale(config: TrainingConfig, step: Array) -> Array:
    """0 until mL1-ACE sets in, then rising to 1."""
    start, rise = config.ace_delay * config.steps, config.ace_ramp * config.steps
    return jnp.clip((step - start) / rise, 0.0, 1.0) if rise else jnp.where(step < start, 0.0, 1.0)
