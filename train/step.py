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
from train.data.augment_config import AugmentConfig
from train.data.augmentation import augment
from train.data.ignore import mask_ignored
from train.errors import InputError
from train.losses import Loss, Regions, parse_loss
from train.models.remat import rematerialised
from train.plugins import is_external
from train.sharding import AXES, BATCH, SPACE, batch_parts, batch_spec, replicated, weight_shardings


class TrainState(NamedTuple):
    """Everything a run needs to go on, except its position in the data.

    Random numbers are a function of the run's seed and `step`, so they have no state.

    Attributes:
        step: optimiser steps done.
        params: trainable arrays.
        rest: the model's other state, such as the counters of dropout.
        opt_state: the optimiser's moments.
        average: exponential moving average of `params`, which is what a run with `ema` evaluates; else None.
    """

    step: Int[Array, ""]
    params: Any
    rest: Any
    opt_state: Any
    average: Any = None

    @property
    def evaluated(self) -> Any:
        """The trainable arrays that predict: the average if there is one."""
        return self.params if self.average is None else self.average


Batch = Mapping[str, Array]
Examples = tuple[Array, Array, Array]  # keys, images, labels
Gradients = Callable[[Any, Any, Examples, Array], tuple[Any, Any, Any]]
LossAndGradient = Callable[[Any, Array, Array], tuple[dict[str, Array], Any]]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """AdamW with a linear warm-up, a cosine decay or none, and optional gradient clipping."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, optax.adamw(learning_rate(config), weight_decay=config.weight_decay))


def learning_rate(config: TrainingConfig) -> optax.Schedule:
    """The learning rate as a function of the step."""
    warmup, peak = min(config.warmup_steps, config.steps // 2), config.learning_rate
    start = config.warmup_from * peak
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(start, peak, warmup, config.steps)
    # Optax stays at the first value for ever if the warm-up has no steps.
    return optax.warmup_constant_schedule(start if warmup else peak, peak, warmup)


def init_state(
    model: nnx.Module, optimizer: optax.GradientTransformation, *, ema: float = 0.0
) -> tuple[nnx.GraphDef, TrainState]:
    """The model's static part, and the state of a run before its first step."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    average = jax.tree.map(jnp.copy, params) if ema else None  # a step donates both
    return graphdef, TrainState(jnp.zeros((), jnp.int32), params, rest, optimizer.init(params), average)


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
    """Makes the compiled step over `mesh`: (state, batch) -> (state, metrics).

    The state and the batch must be placed as `train.sharding` says; the new state is placed alike. The step donates
    the state: the new state reuses its memory. The metrics are scalars: `loss`, each of its terms, `grad_norm` and
    `learning_rate`. They are means over the whole batch on every mesh.

    Args:
        graphdef: the model's static part.
        optimizer: see `make_optimizer`.
        config: names the loss and how to train.
        mesh: the devices.
        regions: class ids of each output channel of a network with sigmoids.
        accumulate: number of parts in which a batch is computed one after the other, to save memory.
        remat: whether the backward pass computes the model's units again instead of keeping their activations.
        has_ignore: whether the loss leaves out voxels without a label, see `train.data.mask_ignored`.
    """
    schedule = learning_rate(config.training)
    loss = parse_loss(config.loss, config.training.ignore_empty_classes)
    loss = dataclasses.replace(loss, regions=regions)

    def gradients_of(rest: Any) -> Gradients:
        if _splits_by_hand(mesh, rest):
            gradients = _make_gradients(graphdef, config, _local_loss(loss, has_ignore), remat)
            return _over_batch(_accumulated(gradients, accumulate), mesh)
        gradients = _make_gradients(graphdef, config, _make_loss(loss, mesh, has_ignore), remat, mesh)
        return _accumulated(gradients, accumulate, mesh)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(config.training.seed), state.step)
        keys = jax.random.split(key, batch["image"].shape[0])
        ace_scale = _ace_scale(config.training, state.step)
        weights = jax.tree.map(lambda leaf: leaf.astype(config.training.precision), state.params)
        weights = lax.with_sharding_constraint(weights, replicated(mesh))
        examples = keys, batch["image"], batch["label"]
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            grads, values, rest = gradients_of(state.rest)(weights, state.rest, examples, ace_scale)
        grads = jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), grads, state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {
            **values,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step)),
        }
        params = optax.apply_updates(state.params, updates)
        average = _moved(state.average, params, config.training.ema, state.step)
        after = TrainState(state.step + 1, params, rest, opt_state, average)
        return lax.with_sharding_constraint(after, weight_shardings(after, mesh)), metrics

    options = cpu.compiler_options(mesh.devices.flat[0].platform)
    return jax.jit(step, donate_argnums=0, compiler_options=options)


def check_loss(
    loss: Loss,
    mesh: Mesh,
    images: tuple[int, ...],
    *,
    channels: int,
    soft_classes: int = 0,
    has_ignore: bool = False,
) -> None:
    """Checks that every term of a loss can be computed in the step of a run, before the run starts.

    Args:
        loss: with its regions, if the network has sigmoids.
        mesh: the devices.
        images: shape `[batch, *patch]`.
        channels: output channels of the network.
        soft_classes: classes of soft labels; 0 for class ids.
        has_ignore: whether voxels may have no label.

    Raises:
        InputError: names the first term that cannot be computed, and says why.
    """
    needs = {}
    if (space := mesh.shape[SPACE]) > 1:
        needs["axis_name"] = f"volumes split over space={space} devices: split the batch instead (data, fsdp)"
    if has_ignore:
        needs["where"] = "data in which voxels have no label: choose another term"
    for term in loss.terms:
        for argument, reason in needs.items():
            if argument not in term.term.accepted:
                raise InputError(
                    f"Loss term {term.name} has no argument {argument}, so it cannot be computed on {reason}, or "
                    f"add {argument}=None to a function of your own."
                )
    if any(term.call.arguments or is_external(term.call.name) for term in loss.terms):
        logits = jax.ShapeDtypeStruct((*images, channels), jnp.float32)
        soft = jax.ShapeDtypeStruct((*images, soft_classes), jnp.float32)
        labels = soft if soft_classes else jax.ShapeDtypeStruct(images, jnp.int32)
        jax.eval_shape(_make_loss(loss, mesh, has_ignore), logits, labels, jnp.float32(1))


def _splits_by_hand(mesh: Mesh, rest: Any) -> bool:
    """Whether each device computes the gradients of its part of a batch by itself.

    Split volumes need rims of others. Random numbers of dropout are drawn for the whole batch.
    """
    return batch_parts(mesh) == mesh.size > 1 and not jax.tree.leaves(rest)


def _make_gradients(
    graphdef: nnx.GraphDef, config: RunConfig, loss: LossAndGradient, remat: bool, mesh: Mesh | None = None
) -> Gradients:
    """Makes (weights, rest, examples, ace_scale) -> (gradients, loss with its terms, new rest).

    Weights have the precision of the network, gradients at least float32.

    Args:
        graphdef: the model's static part.
        config: of the run.
        loss: see `_make_loss` and `_local_loss`.
        remat: see `make_train_step`.
        mesh: devices over which the compiler splits the model as its inputs are split. It exchanges the rims of
            split volumes. None on each device by itself.
    """
    dtype = jnp.dtype(config.training.precision)
    augmented = _make_augmentation(config.augment, mesh)

    def gradients(weights: Any, rest: Any, examples: Examples, ace_scale: Array) -> tuple[Any, Any, Any]:
        images, labels = augmented(*examples)

        def scores(weights: Any) -> tuple[Any, Any]:
            # Dropout's counters change. Flax changes only variables made under this very trace, so copy them.
            model = nnx.merge(graphdef, weights, jax.tree.map(lambda leaf: leaf, rest))
            with rematerialised(remat):
                logits = model(images.astype(dtype))
            return logits, nnx.split(model, nnx.Param, ...)[2]

        logits, pull_back, after = jax.vjp(scores, weights, has_aux=True)
        values, d_logits = loss(logits, labels, ace_scale)
        (grads,) = pull_back(d_logits)
        grads = jax.tree.map(lambda grad: grad.astype(jnp.promote_types(grad.dtype, jnp.float32)), grads)
        if mesh is not None:
            grads = lax.with_sharding_constraint(grads, weight_shardings(grads, mesh))
        return grads, values, after

    return gradients


def _make_augmentation(config: AugmentConfig, mesh: Mesh | None) -> Callable[..., tuple[Array, Array]]:
    """Makes (keys, images, labels) -> augmented (images, labels).

    Split volumes of which any voxel may be needed anywhere are put together first, and split again after it. Each
    device augments whole volumes of its own or, if there are fewer volumes than devices, those that it holds a part
    of. The compiler would put them together at every step of the augmentation.

    Args:
        config: of the augmentation.
        mesh: as for `_make_gradients`.
    """

    def each(keys: Array, images: Array, labels: Array) -> tuple[Array, Array]:
        return jax.vmap(augment, in_axes=(0, 0, 0, None))(keys, images, labels, config)

    if mesh is None or mesh.shape[SPACE] == 1 or not config.mixes_voxels:
        return each

    def whole(keys: Array, images: Array, labels: Array) -> tuple[Array, Array]:
        spec = PartitionSpec(AXES if len(images) % mesh.size == 0 else BATCH)
        over_devices = jax.shard_map(each, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        images, labels = over_devices(keys, images, labels)
        split = [NamedSharding(mesh, batch_spec(x.ndim)) for x in (images, labels)]
        return lax.with_sharding_constraint((images, labels), tuple(split))

    return whole


def _over_batch(gradients: Gradients, mesh: Mesh) -> Gradients:
    """Each device computes `gradients` of its part of the batch. One reduction averages them and the loss.

    The compiler could split the program too. But convolutions have their fast forms only on whole arrays, and the
    compiler reduces the gradients of accumulated parts one by one.
    """
    whole, examples = PartitionSpec(), PartitionSpec(BATCH)

    def local(*arguments: Any) -> tuple[Any, Any, Any]:
        grads, values, rest = gradients(*arguments)
        return *lax.pmean((grads, values), BATCH), rest

    split = jax.shard_map(
        local, mesh=mesh, in_specs=(whole, whole, examples, whole), out_specs=whole, check_vma=False
    )

    def averaged(*arguments: Any) -> tuple[Any, Any, Any]:
        grads, values, rest = split(*arguments)
        return lax.with_sharding_constraint(grads, weight_shardings(grads, mesh)), values, rest

    return averaged


def _make_loss(loss: Loss, mesh: Mesh, has_ignore: bool) -> LossAndGradient:
    """Makes (logits, labels, ace_scale) -> (loss with its terms, its gradient with respect to the logits).

    Each loss term is a function of per-image sums. Devices `psum` these over SPACE and average the terms over
    BATCH. A `shard_map` says so explicitly: the compiler need not find out that loops over images and scatters into
    bins need no voxels of other devices.
    """
    of_part = _local_loss(loss, has_ignore, SPACE if mesh.shape[SPACE] > 1 else None)

    def local(logits: Any, labels: Array, ace_scale: Array) -> tuple[dict[str, Array], Any]:
        values, d_logits = of_part(logits, labels, ace_scale)
        d_logits = jax.tree.map(lambda level: level / batch_parts(mesh), d_logits)
        return lax.pmean(values, BATCH), d_logits

    voxels, whole = batch_spec(2), PartitionSpec()
    return jax.shard_map(
        local, mesh=mesh, in_specs=(voxels, voxels, whole), out_specs=(whole, voxels), check_vma=False
    )


def _local_loss(loss: Loss, has_ignore: bool, axis_name: str | None = None) -> LossAndGradient:
    """As `_make_loss`, of the images of one device.

    Args:
        loss: a sum of terms.
        has_ignore: see `make_train_step`.
        axis_name: the mesh axis over which these images are split.
    """

    def local(logits: Any, labels: Array, ace_scale: Array) -> tuple[dict[str, Array], Any]:
        labels, where = mask_ignored(labels) if has_ignore else (labels, None)

        def objective(logits: Any) -> tuple[Array, dict[str, Array]]:
            parts = loss.parts(logits, labels, axis_name, where)
            return loss.total(parts, ace_scale), parts

        (total, parts), d_logits = jax.value_and_grad(objective, has_aux=True)(logits)
        return {"loss": total, **parts}, d_logits

    return local


def _accumulated(gradients: Gradients, parts: int, mesh: Mesh | None = None) -> Gradients:
    """Averages `gradients` over the parts of a batch, computed one after the other. For `mesh` see these."""
    if parts == 1:
        return gradients

    def split(examples: Array) -> Array:
        """[batch, ...] -> [parts, batch / parts, ...]; every part holds examples of each device."""
        split = examples.reshape(-1, parts, *examples.shape[1:]).swapaxes(0, 1)
        if mesh is None:
            return split
        spec = PartitionSpec(None, *batch_spec(examples.ndim))
        return lax.with_sharding_constraint(split, NamedSharding(mesh, spec))

    def all_parts(weights: Any, rest: Any, examples: Examples, ace_scale: Array) -> tuple[Any, Any, Any]:
        def add(carry: tuple[Any, Any], part: Examples) -> tuple[tuple[Any, Any], None]:
            rest, total = carry
            grads, values, rest = gradients(weights, rest, part, ace_scale)
            return (rest, jax.tree.map(jnp.add, total, (grads, values))), None

        examples = jax.tree.map(split, examples)
        first = jax.tree.map(lambda x: x[0], examples)
        shapes = jax.eval_shape(gradients, weights, rest, first, ace_scale)[:2]
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (rest, total), _ = lax.scan(add, (rest, zeros), examples)
        return *jax.tree.map(lambda leaf: leaf / parts, total), rest

    return all_parts


def _moved(average: Any, params: Any, decay: float, step: Array) -> Any:
    """The moving average after a step. Early steps count more, so that the first weights are soon forgotten."""
    if not decay:
        return None
    done = step.astype(jnp.float32)
    return optax.incremental_update(params, average, 1 - jnp.minimum(decay, (1 + done) / (10 + done)))


def _ace_scale(config: TrainingConfig, step: Array) -> Array:
    """The scale of calibration terms: 0 until they set in, then a rise to 1."""
    start, rise = config.ace_delay * config.steps, config.ace_ramp * config.steps
    return jnp.clip((step - start) / rise, 0.0, 1.0) if rise else jnp.where(step < start, 0.0, 1.0)
