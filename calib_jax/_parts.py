"""Functions of images, each device computing its part, whoever has split the images.

The types of arrays say how they are split on a mesh with explicit axes: `by_parts` calls `shard_map`. Otherwise the
compiler decides, after tracing: `by_parts` leaves a program that it is asked for then. `left_to_compiler` leaves an
operation to the compiler on any mesh. Within `shard_map` there are only parts.
"""

import contextlib
import hashlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from calib_jax._devices import for_a_part, is_whole, platform

_Function = Callable[[Any, Any], Any]

_EXPLICIT = jax.sharding.AxisType.Explicit


def split_of(x: Array) -> NamedSharding | None:
    """Over which explicit mesh axes each axis of an array is split; None if its type does not say it."""
    sharding: Any = jax.typeof(x).sharding
    if _EXPLICIT not in sharding.mesh.axis_types:
        return None
    return sharding.update(spec=PartitionSpec(*sharding.spec, *(None,) * (x.ndim - len(sharding.spec))))


def by_parts(
    function: _Function, images: Any, tables: Any = None, *, sums: bool = True, opaque: bool = False
) -> Any:
    """`function(images, tables)`, on each device for its part if the images are split.

    Args:
        function: gives sums over the voxels of each image, or arrays of the shape of the first of `images`.
        images: arrays `[batch, *spatial, classes]` and arrays without the last axis, split alike as by
            `split_alike`; None among them.
        tables: arrays `[batch, classes, ...]`.
        sums: whether the results are sums, `[batch, ...]`.
        opaque: whether the compiler cannot split the function on GPUs. Elsewhere, and without this, it does so.
    """
    split = split_of(images[0])
    if split is None:
        run = _split_by_compiler(function, images, tables) if opaque and _may_be_asked() else function
        return run(images, tables)
    mesh = split.mesh
    part, specs, out_specs = _part(function, images, tables, sums, split.spec)
    explicit = {n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == _EXPLICIT}
    with _within(split):
        run = jax.shard_map(part, in_specs=specs, out_specs=out_specs, axis_names=explicit)
        # Arrays that were computed without a mesh get one here.
        return run(*jax.tree.map(jax.sharding.reshard, (images, tables), specs))


def _part(
    function: _Function, images: Any, tables: Any, sums: bool, spec: PartitionSpec, before_space: int = 1
) -> tuple[_Function, Any, PartitionSpec]:
    """What each device computes if `spec` splits the first of `images`, and how arguments and results are split."""
    *voxels, _ = spec
    batch, space = PartitionSpec(*voxels[:before_space]), voxels[before_space:]
    names = tuple(name for axis in space if axis for name in ((axis,) if isinstance(axis, str) else axis))

    def part(images: Any, tables: Any) -> Any:
        found = function(images, tables)
        return jax.tree.map(lambda x: lax.psum(x, names), found) if sums and names else found

    specs = jax.tree.map(lambda _: PartitionSpec(*voxels), images), jax.tree.map(lambda _: batch, tables)
    return part, specs, batch if sums else PartitionSpec(*voxels)


def split_alike(probs: Array, *others: Any) -> tuple[Any, ...]:
    """`[batch, *spatial, classes]` and arrays beside it, or None.

    If the type of the first says how it is split, the others are split alike, and classes are gathered.
    """
    split = split_of(probs)
    if split is None:
        return (probs, *others)

    def place(x: Any) -> Any:
        return None if x is None else jax.sharding.reshard(x, PartitionSpec(*split.spec[:-1][: x.ndim]))

    with _within(split):
        return tuple(map(place, (probs, *others)))


def left_to_compiler(function: Callable[..., Array], *arrays: Any, axes: int) -> Array:
    """`function(*arrays)`. The compiler decides how it is split, even where types say how the arrays are.

    The first `axes` axes of the result are split as those of the first array.
    """
    split = split_of(arrays[0])
    if split is None:
        return function(*arrays)
    with _within(split):
        run: Any = jax.sharding.auto_axes(function, out_sharding=PartitionSpec(*split.spec[:axes]))
        return run(*arrays)


def _within(split: NamedSharding) -> contextlib.AbstractContextManager[Any]:
    """The mesh of arrays need not be the one that the caller has set."""
    mesh: Any = split.mesh
    return jax.sharding.use_abstract_mesh(mesh)


# Where the compiler splits images.


def _may_be_asked() -> bool:
    """Whether the compiler splits arrays and can ask: not where `shard_map` has split them along some mesh axes."""
    if platform() != "gpu" or is_whole() or jax.sharding.get_abstract_mesh().manual_axes:
        return False
    return getattr(jax.config, "jax_use_shardy_partitioner", True)


def _split_by_compiler(function: _Function, images: Any, tables: Any, before_space: int = 1) -> _Function:
    """`function` as the compiler takes it: it decides how images are split, and asks for a device's program.

    Each `vmap` adds an axis before that of images.
    """
    traced_for_part = for_a_part(platform())
    whole = jax.jit(traced_for_part(function))  # holds the constants, which may not be arguments

    def partition(mesh: Mesh, arguments: Any, results: Any) -> Any:
        images, tables = arguments
        split = _by_name(images[0].sharding, images[0].shape, mesh)
        part, *specs = _part(function, images, tables, True, split.spec, before_space)
        of_arguments, of_result = jax.tree.map(lambda spec: split.update(spec=spec), specs)
        return split.mesh, traced_for_part(part), jax.tree.map(lambda _: of_result, results), of_arguments

    program, result = jax.make_jaxpr(whole, return_shape=True)(images, tables)
    run = custom_partitioning(whole)
    rule = _sharding_rule(images, tables, result, before_space)
    run.def_partition(partition, decode_shardings=False, sharding_rule=rule)

    # The compiler is not given the function: the text of its program keeps it apart from others in JAX's cache.
    key = hashlib.sha256(str(program).encode()).hexdigest()

    @jax.custom_batching.custom_vmap
    def batched(images: Any, tables: Any) -> Any:
        with set_xla_metadata(program=key):
            return run(images, tables)

    @batched.def_vmap
    def _(size: int, is_batched: Any, *arguments: Any) -> Any:
        def with_axis(x: Array, has_axis: bool) -> Array:
            return x if has_axis else jnp.broadcast_to(x, (size, *x.shape))

        images, tables = jax.tree.map(with_axis, arguments, tuple(is_batched))
        found = _split_by_compiler(jax.vmap(function), images, tables, before_space + 1)(images, tables)
        return found, jax.tree.map(lambda _: True, found)

    return batched


def _sharding_rule(images: Any, tables: Any, sums: Any, before_space: int) -> str:
    """Which axes of arguments and results are split alike: those of images, and those of voxels."""
    voxels = [f"axis{i}" for i in range(images[0].ndim - 1)]
    batch = voxels[:before_space]
    number = itertools.count()

    def axes(array: Array, *first: str) -> str:
        return " ".join([*first, *(f"own{next(number)}" for _ in range(array.ndim - len(first)))])

    arguments = [axes(x, *voxels) for x in jax.tree.leaves(images)]
    arguments += [axes(x, *batch) for x in jax.tree.leaves(tables)]
    results = [axes(x, *batch) for x in jax.tree.leaves(sums)]
    return f"{', '.join(arguments)} -> {', '.join(results)}"


def _by_name(sharding: jax.sharding.Sharding, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The split of an array by names of mesh axes. Where there are none for it, the array is not split.

    After a reshape an axis of an array can be split over a part of a mesh axis: the mesh gets shorter axes.
    The compiler fills unequal parts up with anything: an axis of such parts is not split.
    """
    num_devices = len(sharding.device_set)
    of_any_size = (num_devices,) * len(shape)
    places = sharding.devices_indices_map(of_any_size)
    sizes = [factor for size in mesh.axis_sizes or [num_devices] for factor in _factors(size)]
    finer = Mesh(np.array(list(places)).reshape(sizes), [f"axis{i}" for i in range(len(sizes))])
    starts = np.array([[axis.start or 0 for axis in place] for place in places.values()])
    # How far along each axis of the array the next device along each axis of the mesh is.
    steps = starts[[math.prod(sizes[i + 1 :]) for i in range(len(sizes))]]
    orders = ([i for i in np.argsort(-along, stable=True) if along[i] > 0] for along in steps.T)
    found = NamedSharding(finer, PartitionSpec(*(tuple(f"axis{i}" for i in order) for order in orders)))
    if found.devices_indices_map(of_any_size) != places:
        return NamedSharding(finer, PartitionSpec(*(None,) * len(shape)))
    parts = (num_devices // size for size in found.shard_shape(of_any_size))
    whole = (name if size % n == 0 else None for name, size, n in zip(found.spec, shape, parts, strict=True))
    return found.update(spec=PartitionSpec(*whole))


def _factors(size: int) -> list[int]:
    twos = size & -size
    return [2] * (twos.bit_length() - 1) + [size // twos] * (size > twos)
