"""Which device holds what: batches are split over all devices, everything else is on each of them."""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.errors import InputError

AXIS = "data"


def device_mesh() -> Mesh:
    """One axis, `data`, over every device of every process."""
    return jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on each device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The leading axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises `InputError` unless each device gets the same number of examples."""
    if batch_size % mesh.size:
        raise InputError(f"batch_size is {batch_size}: give a multiple of the {mesh.size} devices.")


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of a batch, as arrays over the whole mesh."""
    sharding = split_batch(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, part) for name, part in batch.items()}
