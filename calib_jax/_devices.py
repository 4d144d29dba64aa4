"""Over which devices a traced program is split, and sums over images whose voxels are.

A program may be split by `shard_map`, by the compiler, or, on a mesh with explicit axes, as the types of its arrays
say. Then `by_parts` calls `shard_map`, and `left_to_compiler` leaves an operation to the compiler.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from calib_jax._compat import as_varying

AxisName = str | tuple[str, ...]
Result = TypeVar("Result")

_EXPLICIT = jax.sharding.AxisType.Explicit
_ONE = jax.sharding.AbstractMesh((1,), ("one",), axis_types=(jax.sharding.AxisType.Auto,))


def platform() -> str:
    """The platform that the traced program is for, as far as it is known: the mesh's, or JAX's default."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None) or jax.default_backend()


def is_whole() -> bool:
    """Whether the compiler splits no axis of the traced program over devices.

    There is one device, or `shard_map` has split the program already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names and set(mesh.manual_axes) == set(mesh.axis_names):
        return True
    devices = mesh.size if mesh.axis_names else jax.device_count()
    return devices == 1 and _EXPLICIT not in mesh.axis_types


def on_one_device(function: Callable[..., Result], *arguments: Any) -> Result:
    """`function(*arguments)` of arrays on one device, traced for one even if there are more: see `is_whole`."""
    if jax.device_count() == 1 or jax.sharding.get_abstract_mesh().axis_names:
        return function(*arguments)
    with jax.sharding.use_abstract_mesh(_ONE):
        found = function(*arguments)
    # The same arrays, with types that do not name this mesh: operations on another mesh would refuse them.
    return jax.tree.map(lambda x: x if isinstance(x, Tracer) else x.addressable_data(0), found)


def split_of(x: Array) -> NamedSharding | None:
    """Over which explicit mesh axes each axis of an array is split; None if its type does not say it."""
    sharding: Any = jax.typeof(x).sharding
    if _EXPLICIT not in sharding.mesh.axis_types:
        return None
    return sharding.update(spec=PartitionSpec(*sharding.spec, *(None,) * (x.ndim - len(sharding.spec))))


def by_parts(function: Callable[..., Any], images: Any, tables: Any = None, *, sums: bool = True) -> Any:
    """`function(images, tables)`, on each device for its part if the types of arrays say how they are split.

    Args:
        function: gives sums over the voxels of each image, or arrays of the shape of the first of `images`.
        images: arrays `[batch, *spatial, classes]` and arrays without the last axis, split alike as by
            `split_alike`; None among them.
        tables: arrays `[batch, classes, ...]`.
        sums: whether the results are sums, `[batch, ...]`.
    """
    split = split_of(images[0])
    if split is None:
        return function(images, tables)
    mesh, (batch, *space, _) = split.mesh, split.spec
    names = tuple(name for axis in space if axis for name in ((axis,) if isinstance(axis, str) else axis))

    def part(images: Any, tables: Any) -> Any:
        found = function(images, tables)
        return jax.tree.map(lambda x: lax.psum(x, names), found) if sums and names else found

    explicit = {n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == _EXPLICIT}
    of_images = jax.tree.map(lambda x: PartitionSpec(*split.spec[: x.ndim]), images)
    specs = of_images, jax.tree.map(lambda _: PartitionSpec(batch), tables)
    out_specs = PartitionSpec(batch) if sums else split.spec
    with _within(split):
        run = jax.shard_map(part, in_specs=specs, out_specs=out_specs, axis_names=explicit)
        # Arrays that were computed without a mesh get one here.
        return run(*jax.tree.map(jax.sharding.reshard, (images, tables), specs))


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


def whole_sum(parts: Any, axis_name: AxisName | None) -> Any:
    """Sums over whole images from the sums over each device's part. `axis_name=None`: the part is the whole.

    The gradient of a part is the gradient of the whole, so that each device gets its share of the true gradient.
    The transpose of `psum` does this only under `check_vma=True`. Otherwise it adds up the cotangents of all
    devices, which are equal already.
    """
    if axis_name is None:
        return parts
    return jax.tree.map(lambda x: (_psum if _is_float(x) else lax.psum)(x, axis_name), parts)


def whole_size(part: int, axis_name: AxisName | None) -> int:
    """Number of elements of the whole, of which each device has `part`."""
    return part if axis_name is None else part * lax.axis_size(axis_name)


def check_not_split(what: str, axis_name: AxisName | None) -> None:
    """Raises if images are split over devices: `what` cannot be computed from sums."""
    if axis_name is not None:
        raise ValueError(
            f"{what} needs voxels that lie on other devices and does not work with axis_name={axis_name!r}. "
            "Split the batch over devices instead of the voxels, or leave it out."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _psum(part: Array, axis_name: AxisName) -> Any:
    return lax.psum(part, axis_name)


def _psum_forward(part: Array, axis_name: AxisName) -> tuple[Any, None]:
    return _psum(part, axis_name), None


def _psum_backward(axis_name: AxisName, _: None, gradient: Any) -> tuple[Any]:
    return (as_varying(gradient, axis_name),)


_psum.defvjp(_psum_forward, _psum_backward)


def _is_float(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)
