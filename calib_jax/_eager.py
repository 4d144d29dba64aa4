"""Public functions outside `jit`: a few compiled programs each, for images of all sizes.

Outside `jit`, JAX compiles a loop anew at every call, and every operation for every new shape. `compiled` keeps
one program for each set of options. If all arguments are concrete, it also pads images with masked voxels to a few
sizes, so that a data set of many sizes needs few programs.
"""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.core import Tracer

from calib_jax._checks import check_values, check_weights
from calib_jax._devices import on_one_device
from calib_jax._labels import as_class_ids

P = ParamSpec("P")
R = TypeVar("R")

_LEAST_VOXELS = 1 << 12
_COARSE_UP_TO = 1 << 20  # voxels of an image up to which the next power of two costs no noticeable time
# Arguments with an axis for each axis of voxels.
_IMAGES = ("probs", "logits", "predictions", "labels", "where")
_IDS = ("predictions", "labels", "case")
_config: Any = jax.config


def compiled(
    *, keeps_shape: bool | Callable[[Mapping[str, Any]], bool] = False
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a public function of images, which then runs as one compiled program wherever it is called.

    Under `jit` the program is inlined. Positional arguments are arrays or pytrees of arrays. Keyword-only
    arguments are static unless they are arrays. Values of concrete arrays are checked here, outside the program.

    Args:
        keeps_shape: True if the function needs the shape of images, for instance the neighbours of a voxel, so that
            images are not padded; or a function of the static options that says so.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        call: Callable[..., R] = function

        def run(arrays: dict[str, Any], options: tuple[tuple[str, type, Any], ...]) -> R:
            return call(**arrays, **{name: value for name, _, value in options})

        program = jax.jit(run, static_argnums=1, inline=True)

        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            arrays, options = _split(signature, signature.bind(*args, **kwargs).arguments)
            if (weights := arrays.get("class_weights")) is not None:
                check_weights("class_weights", weights)
            # The type is part of the key: 20.0 and True must not pass for 20 and 1.
            static = tuple((name, type(value), value) for name, value in options.items())
            if not _are_concrete(arrays):
                return program(arrays, static)
            if shape := _shape_of_images(arrays):
                if "labels" in arrays:
                    check_values(arrays)
                keep = keeps_shape(options) if callable(keeps_shape) else keeps_shape
                if not (keep or _config.jax_disable_jit):
                    # What the function refuses is refused below, where messages name the caller's shapes.
                    with contextlib.suppress(TypeError, ValueError):
                        return on_one_device(program, _filled_up(arrays, shape), static)
            return on_one_device(program, arrays, static)

        return wrapped

    return decorate


def nan_where_undefined(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function whose results are NaN where nothing was counted. `jax_debug_nans` lets these pass."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.debug_nans(False), jax.debug_infs(False):
            return function(*args, **kwargs)

    return wrapped


def filled_size(voxels: int) -> int:
    """Voxels of a padded image: the next power of two, above a million the next eighth of a power of two.

    Example:
        >>> filled_size(50_000), filled_size(1_100_000)
        (65536, 1310720)
    """
    power = 1 << (max(voxels, _LEAST_VOXELS) - 1).bit_length()
    step = power if power <= _COARSE_UP_TO else power // 8
    return -(-voxels // step) * step


def fill_up(x: Any, axes: int, size: int) -> np.ndarray:
    """`[batch, *voxels, ...]` with `axes` axes of voxels as `[batch, size, ...]`, padded with zeros."""
    x = np.asarray(x)
    voxels, rest = math.prod(x.shape[1 : 1 + axes]), x.shape[1 + axes :]
    filled = np.zeros((x.shape[0], size, *rest), x.dtype)
    filled[:, :voxels] = x.reshape(x.shape[0], voxels, *rest)
    return filled


def _split(
    signature: inspect.Signature, arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and static options. Lists of numbers become arrays, lists of names tuples, known scalars numbers."""
    arrays: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, value in arguments.items():
        is_option = signature.parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        if isinstance(value, list) and not _are_names(value):
            value = np.asarray(value)
        if isinstance(value, jax.Array | np.ndarray):
            if is_option and value.ndim == 0 and not isinstance(value, Tracer):
                options[name] = value.item()
            else:
                arrays[name] = as_class_ids(value) if name in _IDS else value
        elif _are_names(value):
            options[name] = tuple(value)
        elif is_option and value is not None:
            options[name] = value
        else:
            arrays[name] = value
    return arrays, options


def _are_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(entry, str) for entry in value)


def _are_concrete(arrays: Mapping[str, Any]) -> bool:
    """Whether all arrays are concrete and each is on one device."""
    return all(
        not isinstance(leaf, Tracer)
        and (not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1)
        for leaf in jax.tree.leaves(dict(arrays))
    )


def _shape_of_images(arrays: Mapping[str, Any]) -> tuple[int, ...]:
    """`[batch, *spatial]`. Empty if arrays disagree on it; the decorated function refuses these."""
    images = {name: arrays[name] for name in _IMAGES if arrays.get(name) is not None}
    first = next(iter(images.values()))
    is_map = "predictions" in images
    # Where label maps may come, floats tell that the last axis is one of classes.
    floats = [
        x for x in images.values() if is_map and jax.numpy.issubdtype(jax.numpy.result_type(x), np.floating)
    ]
    like = np.shape(floats[0] if floats else first)
    shape = like if is_map and not floats else like[:-1]
    agree = all(np.shape(x) in (shape, like) for x in images.values())
    typed = is_map or jax.numpy.issubdtype(first.dtype, np.floating)
    masked = "where" not in images or images["where"].dtype == np.bool_
    return shape if agree and typed and masked and 0 not in like else ()


def _filled_up(arrays: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    """Arrays whose images, of shape `shape`, are padded with masked voxels."""
    images = {name: arrays[name] for name in _IMAGES if arrays.get(name) is not None}
    first = next(iter(images.values()))
    images.setdefault("where", np.ones(shape, bool))
    axes, size = len(shape) - 1, filled_size(math.prod(shape[1:]))
    device = first.sharding if isinstance(first, jax.Array) and first.committed else None
    return arrays | {name: jax.device_put(fill_up(x, axes, size), device) for name, x in images.items()}
