"""Which device holds what: pure functions from shapes to partition specs.

A mesh has three axes. `data` and `fsdp` split the batch, `space` splits each volume along its first spatial axis,
and `fsdp` also splits the parameters and the optimiser's state. An axis of size 1 splits nothing, so one device,
many devices and many processes run the same program.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from train.errors import InputError

DATA, FSDP, SPACE = "data", "fsdp", "space"
BATCH = (DATA, FSDP)
# Neighbouring devices lie along the last axis. They communicate fastest, and halos are exchanged most often.
AXES = (*BATCH, SPACE)


def device_mesh(option: str = "", devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of an option (see `mesh_shape`), by default over all devices of all processes."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(option, len(devices))
    return jax.make_mesh(shape, AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(option: str, num_devices: int) -> tuple[int, ...]:
    """Sizes of the mesh's `AXES`.

    Args:
        option: axes with their sizes, as in `data=2,space=4`. An axis without a size takes all remaining devices,
            and so does `data` if it is missing. Other missing axes have size 1.
        num_devices: number of devices; the mesh must use all of them.

    Raises:
        InputError: if the option cannot be read, or if its sizes do not multiply to `num_devices`.

    Example:
        >>> mesh_shape("", 8), mesh_shape("space=2", 8), mesh_shape("data=2,fsdp", 8)
        ((8, 1, 1), (4, 1, 2), (2, 4, 1))
    """
    sizes: dict[str, int] = {}  # 0 for an axis without a size
    for part in filter(None, option.replace(" ", "").split(",")):
        axis, _, size = part.partition("=")
        if axis not in AXES or axis in sizes:
            raise InputError(
                f"mesh {option!r} has the axis {axis!r}: give each of {', '.join(AXES)} once at most."
            )
        if size and not (size.isdecimal() and int(size)):
            raise InputError(
                f"mesh {option!r} has the size {size!r}: give whole numbers, as in data=2,space=4."
            )
        sizes[axis] = int(size or 0)
    sizes = {DATA: 0, **sizes}
    unsized = [axis for axis, size in sizes.items() if size == 0]
    used = math.prod(size for size in sizes.values() if size)
    if len(unsized) > 1:
        raise InputError(
            f"mesh {option!r} leaves {' and '.join(unsized)} without a size: give all but one of them."
        )
    if num_devices % used or (not unsized and used != num_devices):
        raise InputError(
            f"mesh {option!r} asks for {used} devices, there are {num_devices}: use all of them."
        )
    sizes |= dict.fromkeys(unsized, num_devices // used)
    return tuple(sizes.get(axis, 1) for axis in AXES)


def batch_spec(ndim: int) -> PartitionSpec:
    """Splits `[batch, *spatial, ...]`: examples over `data` and `fsdp`, the first spatial axis over `space`."""
    return PartitionSpec(BATCH, SPACE) if ndim > 1 else PartitionSpec(BATCH)


def weight_spec(shape: Sequence[int], fsdp: int) -> PartitionSpec:
    """Splits parameters and moments: `fsdp` splits the largest axis that it divides, if there is one.

    Example:
        >>> tuple(weight_spec((3, 3, 16, 32), 4)), tuple(weight_spec((3,), 2))
        ((None, None, None, 'fsdp'), ())
    """
    fitting = [axis for axis, size in enumerate(shape) if size % fsdp == 0] if fsdp > 1 else []
    if not fitting:
        return PartitionSpec()
    largest = max(fitting, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*[None] * largest, FSDP)


def weight_shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of each array in a pytree of parameters or in a whole training state."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, weight_spec(leaf.shape, mesh.shape[FSDP])), tree)


def place_weights(tree: Any, mesh: Mesh) -> Any:
    """Places parameters or a training state on the mesh. Every process must hold the same values."""
    return jax.jit(lambda tree: tree, out_shardings=weight_shardings(tree, mesh))(tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_parts(mesh: Mesh) -> int:
    """The number of parts that a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def check_split(batch_size: int, patch: Sequence[int], divisor: int, accumulate: int, mesh: Mesh) -> None:
    """Raises `InputError` unless all devices get equal parts, on every level of the network too.

    Args:
        batch_size: examples per step.
        patch: voxels of an example along each axis.
        divisor: factor by which the network reduces the first side of the patch.
        accumulate: number of parts in which a batch is computed one after the other.
        mesh: the devices.
    """
    if accumulate < 1:
        raise InputError(
            f"accumulate is {accumulate}: give 1 or more, or 0 for one patch of each device at a time."
        )
    parts = batch_parts(mesh)
    if batch_size % (parts * accumulate):
        times = f" times accumulate = {accumulate}" if accumulate > 1 else ""
        raise InputError(
            f"batch_size is {batch_size}: give a multiple of the {parts} devices that it is split over{times}."
        )
    space = mesh.shape[SPACE]
    # The compiler pads uneven parts, but then computes wrong gradients of strided convolutions.
    if space > 1 and patch[0] % (space * divisor):
        raise InputError(
            f"patch {tuple(patch)} cannot be split over space={space} devices evenly on all levels of the network: "
            f"let its first side be a multiple of {space * divisor}, or split less."
        )


def parts_in_turn(accumulate: int, batch_size: int, mesh: Mesh) -> int:
    """The number of parts in which a batch is computed: `accumulate`, or for 0 one example per device and part."""
    return accumulate or max(batch_size // batch_parts(mesh), 1)


def process_share(mesh: Mesh, process: int) -> tuple[int, int]:
    """(i, n) if the process needs the i-th of n equal parts of every batch.

    Processes that hold pieces of the same volumes need the same part.

    Raises:
        InputError: if the parts of the processes have different sizes or overlap.
    """
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices).reshape(batch_parts(mesh), -1)
    rows = {p: tuple(np.flatnonzero((owners == p).any(1))) for p in np.unique(owners)}
    shares = sorted(set(rows.values()))
    if (
        sorted(row for share in shares for row in share) != list(range(len(owners)))
        or len(set(map(len, shares))) > 1
    ):
        raise InputError(
            f"mesh {dict(mesh.shape)} does not fall into equal parts for its {len(rows)} processes: let space be a "
            "divisor or a multiple of the devices of one."
        )
    return shares.index(rows[process]), len(shares)


def whole_on(mesh: Mesh, tree: Any) -> Any:
    """Copies arrays, which may lie on the devices of all processes, whole to each device of one process's mesh."""
    here = replicated(mesh)

    def whole(leaf: jax.Array) -> jax.Array:
        if not isinstance(leaf.sharding, NamedSharding) or leaf.is_fully_addressable:
            return jax.device_put(leaf, here)
        mesh_of_all = leaf.sharding.mesh
        assert isinstance(mesh_of_all, Mesh)
        leaf = jax.device_put(leaf, replicated(mesh_of_all))
        parts = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, here, parts)

    return jax.tree.map(whole, tree)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes arrays over the whole mesh from each process's share of a batch, see `process_share`."""
    _, count = process_share(mesh, jax.process_index())

    def put(part: np.ndarray) -> jax.Array:
        sharding = NamedSharding(mesh, batch_spec(part.ndim))
        shape = (len(part) * count, *part.shape[1:])
        return jax.make_array_from_process_local_data(sharding, part, shape)

    return {name: put(part) for name, part in batch.items()}
