"""Over which devices a traced program is split, and sums over images whose voxels are."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array

from calib_jax._compat import as_varying

AxisName = str | tuple[str, ...]
Result = TypeVar("Result")

_ONE = jax.sharding.AbstractMesh((1,), ("one",), axis_types=(jax.sharding.AxisType.Auto,))
_platform_of_part: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def platform() -> str:
    """The platform that the traced program is for, as far as it is known: the mesh's, or JAX's default."""
    if known := _platform_of_part.get():
        return known
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None) or jax.default_backend()


def is_whole() -> bool:
    """Whether the compiler splits no axis of the traced program over devices.

    There is one device, or the program is for the part of one: `shard_map` or `by_parts` has split it already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if _platform_of_part.get() or (mesh.axis_names and set(mesh.manual_axes) == set(mesh.axis_names)):
        return True
    devices = mesh.size if mesh.axis_names else jax.device_count()
    return devices == 1 and jax.sharding.AxisType.Explicit not in mesh.axis_types


@contextlib.contextmanager
def for_a_part(platform: str) -> Iterator[None]:
    """What is traced within is for the part of one device of the platform; also a decorator."""
    token = _platform_of_part.set(platform)
    try:
        yield
    finally:
        _platform_of_part.reset(token)


def on_one_device(function: Callable[..., Result], *arguments: Any) -> Result:
    """`function(*arguments)` of arrays on one device, traced for one even if there are more: see `is_whole`."""
    if jax.device_count() == 1 or jax.sharding.get_abstract_mesh().axis_names:
        return function(*arguments)
    with jax.sharding.use_abstract_mesh(_ONE):
        found = function(*arguments)
    # The same arrays, with types that do not name this mesh: operations on another mesh would refuse them.
    return jax.tree.map(lambda x: x if isinstance(x, Tracer) else x.addressable_data(0), found)


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
