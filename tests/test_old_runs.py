"""A run made by version 0.1 of the project is evaluated, resumed and trained on."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from killed import logged

from train.config import DataInfo, DeviceConfig, read_config
from train.evaluate import evaluate
from train.fit import fit, initial_state, mean_metrics
from train.run.cases import read_cases
from train.run.load import load_network, load_run
from train.task import open_data, open_task, write_split

OLD = Path(__file__).parent / "old_runs" / "unet-0.1"
DEVICES = DeviceConfig(mesh="data=2,space=4")  # a batch of the run has two patches


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "old"))


def assert_close(expected: dict[str, str], found: dict[str, float]) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(float(found[name]), float(value), rtol=1e-3, err_msg=name)


def test_it_is_evaluated() -> None:
    """Its best network measures on the validation cases what the run logged."""
    config, _, predict = load_run(OLD, "best")
    dataset, splits = open_data(config.data)
    found = mean_metrics(evaluate("old", predict, dataset, splits.val))
    rows = logged(OLD, "validation.csv")
    best = min(rows, key=lambda row: float(row["ACE"]))
    assert_close({name: value for name, value in best.items() if name != "step"}, found)


def test_it_is_resumed(old: Path) -> None:
    """From its first checkpoint it ends as it did, up to the rounding of other devices."""
    shutil.rmtree(old / "checkpoints" / "4")
    config, _ = read_config(old)
    fit(open_task(config, DEVICES), old, resume=True)
    for name in ("log.csv", "validation.csv"):
        for expected, found in zip(logged(OLD, name), logged(old, name), strict=True):
            assert_close(expected, {metric: float(value) for metric, value in found.items()})


def test_another_run_starts_from_its_network(tmp_path: Path) -> None:
    config, info = read_config(OLD)
    task = open_task(dataclasses.replace(config, init=str(OLD)), DEVICES)
    assert DataInfo.of(task.dataset) == info
    _, state = initial_state(task, info)
    old = load_network(OLD)[1]
    assert int(state.step) == 0
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(old.params), strict=True):
        np.testing.assert_array_equal(a, b)
    write_split(task, tmp_path)
    assert len(read_cases(tmp_path).initial) == len(task.splits.train) + len(task.splits.val)
