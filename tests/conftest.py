"""What every test shares; read before jax is imported."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"


@pytest.fixture(scope="session")
def hippocampus() -> Path:
    """The folder of the MSD's Task04, from CALIB_JAX_DATA or beside the repository."""
    beside = Path(__file__).parents[2] / "shared" / "data" / "Task04_Hippocampus"
    folder = Path(os.environ.get("CALIB_JAX_DATA", beside))
    if not (folder / "dataset.json").is_file():
        pytest.skip(f"no Task04_Hippocampus in {folder}: set CALIB_JAX_DATA to its folder")
    return folder


@pytest.fixture(scope="module")
def strict_promotion() -> Iterator[None]:
    """No array is broadcast to another rank, and no dtype turned into another, without being asked to."""
    import jax

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
