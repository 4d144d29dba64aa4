"""`python -m benchmarks.expert_share` on figures made up for two folds."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import expert_share
from calib_jax import BinStatistics
from calib_jax.results import ModelResult

# Share of the experts in a bin of ten pixels whose mean probability is 0.9, of each image.
SHARES = {"majority": {"a": 0.5, "b": 0.5, "c": 0.7}, "average": {"a": 0.7, "b": 0.7, "c": 0.8}}


@pytest.fixture
def folds(tmp_path: Path) -> list[str]:
    """Two images in the first fold and one in the second, as `compare` writes them."""
    entries = []
    for label, shares in SHARES.items():
        for fold, names in enumerate(["ab", "c"]):
            count = np.full((len(names), 1, 1), 10)
            share = np.array([shares[name] for name in names])[:, None, None]
            stats = BinStatistics(count, 0.9 * count, share * count)
            folder = tmp_path / f"{label}-{fold}"
            (folder / "dice").mkdir(parents=True)
            ModelResult("dice", tuple(names), ("cell",), stats, np.full((len(names), 1), 0.8)).save(
                folder / "dice" / "test.npz"
            )
            entries.append(f"{label}={folder}")
    return entries


def test_folds_are_joined_and_changes_counted_from_the_baseline(
    folds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gaps.json"
    monkeypatch.setattr(sys, "argv", ["", *folds, "--baseline", "majority dice", "--out", str(out)])
    expert_share.main()
    rows = json.loads(out.read_text())
    assert rows["majority dice"]["images"] == 3
    assert rows["majority dice"]["gap_of_each_image"] == pytest.approx([0.4, 0.4, 0.2])
    assert rows["majority dice"]["gap_pooled"] == pytest.approx(1 / 3, abs=1e-6)
    assert "changes" not in rows["majority dice"]
    # Gaps of 0.2, 0.2 and 0.1: half of the baseline's in every sample of images.
    for change in rows["average dice"]["changes"].values():
        assert change == pytest.approx([-0.5] * 3, abs=1e-5)
    assert "gap_pooled -50% [-50%, -50%]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["majority"], "majority: give NAME=FOLDER"),
        (["majority={}/none"], "none: give NAME=FOLDER"),
        (["majority={}/majority-0", "--baseline", "average dice"], "Choose from 'majority dice'"),
    ],
)
def test_what_cannot_be_compared_is_named(
    arguments: list[str],
    message: str,
    folds: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [argument.format(tmp_path) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["", *filled, "--out", str(tmp_path / "gaps.json")])
    with pytest.raises(SystemExit):
        expert_share.main()
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_baseline_of_other_images_is_refused(folds: list[str]) -> None:
    first, second = (ModelResult.load(Path(folds[i].partition("=")[2]) / "dice" / "test.npz") for i in (0, 1))
    with pytest.raises(SystemExit, match="other images"):
        expert_share.changes(first, second)


def test_an_image_counts_once(folds: list[str]) -> None:
    fold = ModelResult.load(Path(folds[0].partition("=")[2]) / "dice" / "test.npz")
    with pytest.raises(ValueError, match="a"):
        expert_share.joined([fold, fold])
