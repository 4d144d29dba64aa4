"""Several processes, on one machine or many, that train as one: each runs the same program on its own devices."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from train.config import DeviceConfig
from train.errors import InputError


def join_processes(devices: DeviceConfig) -> None:
    """Joins the other processes that `devices` names, if any. Call it before JAX is used.

    Raises:
        InputError: the options do not fit together, or the other processes cannot be reached.
    """
    numbers = (devices.num_processes, devices.process_id)
    if devices.coordinator in ("", "auto"):
        if numbers != (None, None):
            raise InputError("num_processes and process_id need --coordinator HOST:PORT: give it too.")
    elif None in numbers:
        raise InputError(
            f"coordinator {devices.coordinator} needs --num-processes and --process-id, or use --coordinator auto."
        )
    if not devices.coordinator:
        return
    address = None if devices.coordinator == "auto" else devices.coordinator
    try:
        jax.distributed.initialize(address, *numbers)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"coordinator {devices.coordinator} could not be joined ({reason}): check that all processes run and "
            "can reach it."
        ) from error


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def on_first(action: Callable[[], None]) -> None:
    """Runs `action` in the first process while the others wait.

    Raises:
        InputError: in every process, if `action` raised it in the first.
    """
    on_all(action if is_first() else lambda: None)


def on_all(action: Callable[[], None]) -> None:
    """Runs `action` in every process.

    Raises:
        InputError: in every process, if `action` raised it in one.
    """
    failure: InputError | None = None
    try:
        action()
    except InputError as error:
        failure = error
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.asarray(failure is not None))
        if failed.any() and failure is None:
            failure = InputError(f"Process {failed.argmax()} could not go on: see its message.")
    if failure is not None:
        raise failure


def first_says(value: bool) -> bool:
    """The first process's `value`, in every process."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def own_share(items: Any) -> Any:
    """Every n-th item of a sequence, for this one of n processes.

    All shares have the same length: the last item is repeated where needed, and `join_shares` drops it.
    """
    count = jax.process_count()
    filled = [*items, *[items[-1]] * (-len(items) % count)]
    return filled[jax.process_index() :: count]


def join_shares(tree: Any, size: int) -> Any:
    """Joins what the processes computed of their shares of `size` items, in order; leading axes count items."""
    if jax.process_count() == 1:
        return tree
    gathered = multihost_utils.process_allgather(tree)  # [processes, items of each, ...]
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:size], gathered)
