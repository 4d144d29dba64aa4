"""What every test shares; read before jax is imported."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# The same examples in every run, so that a change is judged by what it changes; and no hurry on a busy machine.
# Dtypes, which jax_enable_x64 changes, fail at the first example or never.
hypothesis.settings.register_profile(
    "repeatable",
    max_examples=10 if os.environ.get("JAX_ENABLE_X64") else 100,
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")

# Eight devices, so that what is sharded is sharded in earnest; and no effort on fast code for tiny arrays,
# which takes two thirds off the time to compile, where these tests spend theirs.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"


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

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages lack their figures, which take seconds: other tests look at those."""
    monkeypatch.setattr("calib_jax.report.figures.draw", lambda *_, **__: None)


@pytest.fixture(autouse=True, scope="module")
def _programs_of_a_module_go_with_it() -> Iterator[None]:
    """Compiled programs are memory mappings, of which Linux allows a process 65,530: the whole suite makes more."""
    import jax

    yield
    jax.clear_caches()
