"""Cases are recognised by their images, whatever the folder, the files and the cases are called."""

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data import Dataset
from train.data.open import open_dataset
from train.data.phantom import PhantomDataset
from train.data.splits import Splits, write_splits
from train.errors import InputError
from train.run.cases import RunCases, check_initial, choose_cases, note_duplicates, resolved
from train.run.identity import CaseId, fingerprint, identify

NAMES = [f"c{i}" for i in range(6)]
SPLITS = Splits(("c0", "c1", "c2"), ("c3",), ("c4", "c5"))


def describe(folder: Path, names: list[str], ending: str = ".nii.gz") -> None:
    listed = [{"image": f"imagesTr/{n}{ending}", "label": f"labelsTr/{n}{ending}"} for n in names]
    labels = {"0": "background", "1": "organ"}
    text = json.dumps({"name": "d", "modality": {"0": "MRI"}, "labels": labels, "training": listed})
    (folder / "dataset.json").write_text(text)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cases") / "data"
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for seed, name in enumerate(NAMES):
        save(folder, name, seed)
    describe(folder, NAMES)
    return folder


def save(folder: Path, name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for part, voxels in (("imagesTr", rng.normal(size=(6, 6, 6))), ("labelsTr", np.ones((6, 6, 6)))):
        nib.save(nib.Nifti1Image(voxels.astype(np.float32), np.eye(4)), folder / part / f"{name}.nii.gz")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run on `data` keeps of its cases."""
    folder = tmp_path_factory.mktemp("run")
    write_splits(folder / "splits.json", SPLITS)
    return folder


@pytest.fixture(scope="module")
def cases(data: Path) -> RunCases:
    return RunCases(identify(open_dataset(f"msd:{data}")))


def recompressed(folder: Path) -> Path:
    for file in folder.rglob("*.nii.gz"):
        file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()), 1, mtime=7))
    return folder


def in_parts(folder: Path) -> Path:
    """Files of two gzip streams, the last of them empty, as bgzip writes them."""
    for file in folder.rglob("*.nii.gz"):
        file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())) + gzip.compress(b""))
    return folder


def uncompressed(folder: Path) -> Path:
    for file in folder.rglob("*.nii.gz"):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    describe(folder, NAMES, ".nii")
    return folder


def renamed(folder: Path) -> Path:
    """Every case under another's name."""
    for file in folder.rglob("*.nii.gz"):
        file.rename(file.with_name(f"new-{file.name}"))
    for part in ("imagesTr", "labelsTr"):
        for name, other in zip(NAMES, NAMES[1:] + NAMES[:1], strict=True):
            (folder / part / f"new-{name}.nii.gz").rename(folder / part / f"{other}.nii.gz")
    return folder


def relabelled(folder: Path) -> Path:
    for file in (folder / "labelsTr").iterdir():
        nib.save(nib.Nifti1Image(np.zeros((6, 6, 6), np.uint8), np.eye(4)), file)
    return folder


CHANGES = [recompressed, in_parts, uncompressed, renamed, relabelled]


def dataset_of(folder: Path) -> Dataset:
    return open_dataset(f"msd:{folder}")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_copy_is_the_same_data(
    change: Callable[[Path], Path], split: str, data: Path, run: Path, cases: RunCases, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "copy")
    copy = dataset_of(change(tmp_path / "copy"))
    chosen = choose_cases(run, cases, copy, split, given="copy")
    own = {case.name for case in cases.own if case.name in getattr(SPLITS, split)}
    images = {case.images for case in cases.own if case.name in own}
    assert {case.images for case in identify(copy) if case.name in chosen.names} == images
    assert len(chosen.names) == len(own)
    assert chosen.own
    assert not chosen.notes


@settings(max_examples=20, deadline=None)
@given(
    kept=st.sets(st.sampled_from(NAMES)),
    new=st.integers(0, 2),
    initial=st.sets(st.sampled_from(["new0", "new1"])),
)
def test_no_case_that_was_seen_is_measured(kept: set[str], new: int, initial: set[str]) -> None:
    """Whatever part of its own and other cases a run is evaluated on."""
    import tempfile

    own = tuple(CaseId(name, frozenset([f"image of {name}"])) for name in NAMES)
    others = tuple(CaseId(f"new{i}", frozenset([f"image of new{i}"])) for i in range(2))
    seen = {*SPLITS.train, *SPLITS.val, *initial}
    there = [case for case in own if case.name in kept] + list(others[:new])
    cases = RunCases(own, tuple(case for case in others if case.name in initial))
    expected = [case.name for case in there if case.name not in seen]
    with tempfile.TemporaryDirectory() as folder:
        write_splits(Path(folder, "splits.json"), SPLITS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("train.run.cases.identify", lambda _: tuple(there))
            if expected:
                chosen = choose_cases(Path(folder), cases, None, "test", given="there")  # pyright: ignore
                assert list(chosen.names) == expected
                left = [case.name for case in there if case.name in seen]
                assert chosen.own or bool(left) == bool(chosen.notes)
            elif there:
                with pytest.raises(InputError, match=r"none of its test split|every case of"):
                    choose_cases(Path(folder), cases, None, "test", given="there")  # pyright: ignore


def test_names_decide_where_a_run_kept_no_images(data: Path, run: Path) -> None:
    cases = RunCases(tuple(map(CaseId, NAMES)))
    assert choose_cases(run, cases, dataset_of(data), "test", given="data").names == SPLITS.test


def test_other_images_under_the_same_names(run: Path, cases: RunCases, tmp_path: Path, data: Path) -> None:
    shutil.copytree(data, tmp_path / "other")
    for seed, name in enumerate(NAMES):
        save(tmp_path / "other", name, seed + 100)
    chosen = choose_cases(run, cases, dataset_of(tmp_path / "other"), "test", given="other")
    assert not chosen.own
    assert list(chosen.names) == NAMES
    assert "with the name of a case of" in chosen.notes[0]
    # Where one of them is the run's, the others are written anew.
    shutil.copy(data / "imagesTr" / "c0.nii.gz", tmp_path / "other" / "imagesTr" / "c0.nii.gz")
    chosen = choose_cases(run, cases, dataset_of(tmp_path / "other"), "test", given="other")
    assert chosen.names == SPLITS.test


def test_split_of_other_data(run: Path, cases: RunCases, tmp_path: Path, data: Path) -> None:
    shutil.copytree(data, tmp_path / "other")
    for seed, name in enumerate(NAMES):
        save(tmp_path / "other", name, seed + 100)
    with pytest.raises(InputError, match="--split train is a split of the run's own data set"):
        choose_cases(run, cases, dataset_of(tmp_path / "other"), "train", given="other")


def test_own_cases_that_are_gone_or_changed(run: Path, cases: RunCases, tmp_path: Path, data: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    save(tmp_path / "data", "c4", 200)
    chosen = choose_cases(run, cases, dataset_of(tmp_path / "data"), "test", given=None)
    assert chosen.names == SPLITS.test
    assert "1 case with other images than when" in chosen.notes[0]
    describe(tmp_path / "data", NAMES[:-1])
    with pytest.raises(InputError, match=r"1 case of .* test split not in d \(c5\)"):
        choose_cases(run, cases, dataset_of(tmp_path / "data"), "test", given=None)


def test_weights_that_have_seen_the_test_cases(
    run: Path, cases: RunCases, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = dataset_of(data)
    check_initial(run, cases, dataset, SPLITS)
    assert not capsys.readouterr().out
    with pytest.raises(InputError, match=r"on 1 case of this command's test split \(c0\)"):
        check_initial(run, cases, dataset, Splits(("c5",), (), ("c0", "c4")))
    check_initial(run, cases, dataset, Splits(("c5",), ("c0",), ("c4",)))
    assert "note: --init" in capsys.readouterr().out


def test_a_test_case_that_trains_under_another_name(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data, tmp_path / "data")
    for part in ("imagesTr", "labelsTr"):
        shutil.copy(data / part / "c0.nii.gz", tmp_path / "data" / part / "c5.nii.gz")
    note_duplicates(dataset_of(data), SPLITS)
    assert not capsys.readouterr().out
    note_duplicates(dataset_of(tmp_path / "data"), SPLITS)
    assert "note: 1 case of the test split with the same images" in capsys.readouterr().out


def test_phantoms_are_told_by_their_seed() -> None:
    ids = [identify(PhantomDataset(seed=seed)) for seed in (0, 1)]
    assert identify(open_dataset("phantom")) == ids[0]
    assert not {case.images for case in ids[0]} & {case.images for case in ids[1]}


@dataclass(eq=False)
class Outside:
    """A data set from outside the project."""

    case_names: tuple[str, ...]
    images: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Any:
        return SimpleNamespace(image=self.images[index])


def test_data_from_outside_is_told_by_its_arrays() -> None:
    images = [np.full((2, 3, 1), value, np.float32) for value in range(3)]
    first, second = Outside(("a", "b", "c"), images), Outside(("x", "y"), images[1:])
    ids: Any = [identify(cast(Any, dataset)) for dataset in (first, second)]
    assert [case.name for case in ids[0]] == ["a", "b", "c"]
    assert [a.is_same(b) for a in ids[0] for b in ids[1]] == [False, False, True, False, False, True]
    first.images = []
    assert identify(cast(Any, first)) is ids[0]  # loaded once


def test_only_the_path_of_a_layout_is_resolved(tmp_path: Path) -> None:
    assert resolved("msd:data", tmp_path) == f"msd:{tmp_path}/data"
    for data in ("phantom", "package.module:cells(folder='data')"):
        assert resolved(data, tmp_path) == data


def test_fingerprints_of_broken_files(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(b"\x1f\x8b and no more")
    (tmp_path / "b.nii.gz").write_bytes(b"")
    assert fingerprint(tmp_path / "a.nii.gz") != fingerprint(tmp_path / "b.nii.gz")
