"""Meshes, and which device or process holds what, from shapes alone."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from train.errors import InputError
from train.losses import parse_loss
from train.sharding import (
    AXES,
    batch_spec,
    check_split,
    device_mesh,
    mesh_shape,
    process_share,
    put_batch,
    weight_shardings,
    weight_spec,
)
from train.step import check_loss


def fake_mesh(devices_of_processes: list[int], **sizes: int) -> Any:
    """A mesh of devices that only know their process."""
    devices = np.array([SimpleNamespace(process_index=p) for p in devices_of_processes], object)
    shape = {axis: sizes.get(axis, 1) for axis in AXES}
    return SimpleNamespace(devices=devices.reshape(*shape.values()), shape=shape)


@pytest.mark.parametrize(
    ("option", "shape"),
    [
        ("", (8, 1, 1)),
        ("data=8", (8, 1, 1)),
        ("space=4", (2, 1, 4)),
        ("data=1,space", (1, 1, 8)),
        ("fsdp, data=2", (2, 4, 1)),
        ("data=2,space=2,fsdp=2", (2, 2, 2)),
        ("fsdp=8", (1, 8, 1)),
    ],
)
def test_mesh_shape(option: str, shape: tuple[int, ...]) -> None:
    assert mesh_shape(option, 8) == shape
    assert device_mesh(option).devices.shape == shape


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("model=2", "axis 'model': give each of data, fsdp, space"),
        ("data=2,data=4", "axis 'data'"),
        ("data=two", "size 'two'"),
        ("data=-1", "size '-1'"),
        ("data=0", "size '0'"),
        ("data=4", "asks for 4 devices, there are 8"),
        ("space=3", "asks for 3 devices, there are 8"),
        ("data=16", "asks for 16 devices"),
        ("space,fsdp", "without a size"),
    ],
)
def test_meshes_that_cannot_be(option: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        mesh_shape(option, 8)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((), P()),
        ((3,), P()),
        ((16,), P("fsdp")),
        ((3, 3, 3, 1, 8), P(None, None, None, None, "fsdp")),
        ((3, 3, 3, 64, 32), P(None, None, None, "fsdp")),
        ((8, 8), P(None, "fsdp")),
    ],
)
def test_weights_are_split_along_their_largest_divisible_axis(shape: tuple[int, ...], spec: P) -> None:
    assert weight_spec(shape, 8) == spec
    assert weight_spec(shape, 1) == P()


def test_most_of_a_state_is_split() -> None:
    mesh = device_mesh("fsdp=8")
    tree = {"kernel": np.ones((3, 3, 16, 32)), "bias": np.ones(32), "slope": np.ones(1)}
    placed = jax.device_put(tree, weight_shardings(tree, mesh))
    held = sum(leaf.addressable_data(0).size for leaf in jax.tree.leaves(placed))
    assert held == (3 * 3 * 16 * 32 + 32) // 8 + 1


@pytest.mark.parametrize(
    ("processes", "sizes", "shares"),
    [
        ([0, 0, 1, 1], {"data": 4}, [(0, 2), (1, 2)]),
        ([0, 0, 1, 1], {"data": 2, "space": 2}, [(0, 2), (1, 2)]),
        ([0, 0, 1, 1], {"space": 4}, [(0, 1), (0, 1)]),
        ([0, 0, 1, 1, 2, 2, 3, 3], {"fsdp": 2, "space": 4}, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ([1, 1, 0, 0], {"data": 4}, [(1, 2), (0, 2)]),
        ([0, 1, 0, 1], {"data": 4}, [(0, 2), (1, 2)]),
    ],
)
def test_share_of_a_process(processes: list[int], sizes: dict[str, int], shares: list[tuple]) -> None:
    mesh = fake_mesh(processes, **sizes)
    assert [process_share(mesh, process) for process in range(len(shares))] == shares


def test_processes_whose_shares_overlap() -> None:
    with pytest.raises(InputError, match="does not fall into equal parts for its 2 processes"):
        process_share(fake_mesh([0, 0, 0, 1, 1, 1], data=3, space=2), 0)


def test_batches_lie_where_their_specs_say() -> None:
    mesh = device_mesh("data=2,space=2,fsdp=2")
    image = np.arange(4 * 6 * 5).reshape(4, 6, 5)
    placed = put_batch({"image": image, "index": np.arange(4)}, mesh)
    for name, array in {"image": image, "index": np.arange(4)}.items():
        np.testing.assert_array_equal(placed[name], array)
        assert placed[name].sharding.spec == batch_spec(array.ndim)
    np.testing.assert_array_equal(placed["image"].addressable_data(3), image[1:2, 3:])


@pytest.mark.parametrize(
    ("option", "batch_size", "patch", "accumulate", "words"),
    [
        ("data=8", 6, (16,), 1, "batch_size is 6: give a multiple of the 8 devices"),
        ("data=2,fsdp=4", 12, (16,), 1, "of the 8 devices"),
        ("data=4,space=2", 12, (16,), 2, "of the 4 devices that it is split over times accumulate = 2"),
        ("data=4,space=2", 4, (12, 8), 1, "its first side be a multiple of 16"),
        ("data=8", 8, (16,), 0, "accumulate is 0"),
    ],
)
def test_uneven_splits(option: str, batch_size: int, patch: tuple, accumulate: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_split(batch_size, patch, 8, accumulate, device_mesh(option))


def test_even_splits() -> None:
    check_split(8, (16, 12), 8, 2, device_mesh("data=4,space=2"))
    check_split(8, (8,), 8, 1, device_mesh("fsdp=8"))


def test_losses_of_neighbours_refuse_split_volumes() -> None:
    def check(name: str, mesh: str) -> None:
        check_loss(parse_loss(name), device_mesh(mesh), (8, 16, 8), channels=3)

    with pytest.raises(InputError, match=r"nacl has no argument axis_name.*split over space=2"):
        check("dice+nacl", "space=2")
    check("dice+nacl", "fsdp=2")
    check("dice+ace", "space=2")
    with pytest.raises(InputError, match="adaptive"):
        check("dice+ace(binning=adaptive)", "space=2")
    check("dice+ace(binning=adaptive)", "fsdp=2")
