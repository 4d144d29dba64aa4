"""Calibration losses and metrics for image segmentation, as pure functions of JAX arrays.

Arrays are batch first and channel last. None of these functions reads a file, holds state or looks at traced
values, so every function may be called inside `jit`, `vmap`, `grad` and `shard_map`, on CPU, GPU and TPU. Fitting a
calibrator (`fit_temperature` and the others) is the exception: it is a loop of its own.

    loss = calib_jax.mL1_ace(jax.nn.softmax(logits), labels)
"""

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calib_jax._public import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """A module, a public name or `__all__`. The package alone loads no JAX, so that `calib-jax --help` is quick."""
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    try:
        found = getattr(importlib.import_module(f"{__name__}._public"), name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    return globals().setdefault(name, found)  # found at once from now on


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
