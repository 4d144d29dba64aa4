"""Faults of a data set: all are listed, by `check` and before a run depends on them."""

import csv
import gzip
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.check import check_cases, check_data, inspect_case
from train.cli import main
from train.data.faults import Fault
from train.data.layouts import LAYOUTS
from train.data.open import open_dataset
from train.data.phantom import PhantomDataset
from train.data.volumes import VolumeDataset, header_faults
from train.errors import InputError
from train.inference import VolumePredictor

SHAPE = (8, 8, 8)
NAMES = ("a", "b", "c", "d")
TINY = ["--steps", "1", "--batch-size", "8", "--channels", "4", "8", "--strides", "2", "--warmup-steps", "0"]


def write(file: Path, voxels: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), file)


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def label(values: int = 2) -> np.ndarray:
    return (np.arange(512) % values).astype(np.uint8).reshape(SHAPE)


def describe(folder: Path, names: Sequence[str] = NAMES, **changes: object) -> None:
    listed = [{"image": f"imagesTr/{n}.nii.gz", "label": f"labelsTr/{n}.nii.gz"} for n in names]
    labels = {"0": "background", "1": "x"}
    text = json.dumps({"modality": {"0": "MRI"}, "labels": labels, "training": listed} | changes)
    (folder / "dataset.json").write_text(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four good cases of one channel and two classes."""
    root = tmp_path / "my data"
    for seed, name in enumerate(NAMES):
        write(root / f"imagesTr/{name}.nii.gz", image(seed))
        write(root / f"labelsTr/{name}.nii.gz", label())
    describe(root)
    return root


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def with_nan(file: Path) -> None:
    write(file, np.where(np.arange(512).reshape(SHAPE) == 7, np.nan, image()))


def as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def without_rights(file: Path) -> None:
    """As a file without rights is read by anyone but root."""
    file.unlink()
    file.symlink_to(file)


# What may happen to an image, and words of the fault that is then told.
BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "truncated or corrupt"),
    "empty": (lambda file: file.write_bytes(b""), "truncated or corrupt"),
    "text": (lambda file: file.write_text("no volume"), "truncated or corrupt"),
    "nan": (with_nan, "1 voxels that are NaN or infinite"),
    "huge": (lambda file: write(file, image().astype(np.float64) * 1e200), "NaN or infinite"),
    "shape": (lambda file: write(file, image()[:5]), "(5, 8, 8)"),
    "channels": (lambda file: write(file, np.stack([image()] * 2, -1)), "2 channels"),
    "folder": (as_folder, "does not exist"),
    "missing": (Path.unlink, "does not exist"),
    "loop": (without_rights, "does not exist"),
}


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def check(folder: Path, out: Path) -> tuple[int, list[dict[str, str]]]:
    return main(["check", f"msd:{folder}", "--out", str(out)]), rows(out)


def test_check_lists_nothing_of_good_data(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(folder, tmp_path / "out" / "faults.csv") == (0, [])
    printed = capsys.readouterr().out
    assert "0 faults in 4 cases, 2048 voxels labelled" in printed
    assert "x: 1024 voxels, 50.000%" in printed
    assert "warning" not in printed
    assert str(tmp_path / "out" / "faults.csv") in printed


@pytest.mark.parametrize("kind", BREAKS)
def test_check_names_every_fault_and_reads_the_others(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    broken, words = BREAKS[kind]
    broken(folder / "imagesTr/b.nii.gz")
    write(folder / "labelsTr/b.nii.gz", label(3))
    with_nan(folder / "imagesTr/d.nii.gz")
    status, found = check(folder, tmp_path / "faults.csv")
    assert status == 1
    by_file = {Path(row["file"]).relative_to(folder).as_posix(): row for row in found}
    assert {"imagesTr/d.nii.gz", "labelsTr/b.nii.gz"} < by_file.keys() | {"imagesTr/b.nii.gz"}
    assert words in " ".join(row["problem"] for row in found if row["case"] == "b")
    assert "label value 2" in " ".join(row["problem"] for row in found if row["case"] == "b")
    assert {row["case"] for row in found} == {"b", "d"}
    assert len({tuple(row.values()) for row in found}) == len(found)
    printed = capsys.readouterr().out
    assert all(f"{row['case']}: {row['file']} {row['problem']}" in printed for row in found)
    assert f"{len(found)} faults in 4 cases, 1536 voxels labelled" in printed


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(BREAKS)), min_size=4, max_size=4),
    st.sets(st.sampled_from(NAMES)),
)
def test_exactly_the_broken_cases_have_faults(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str], cases: set[str]
) -> None:
    root = tmp_path_factory.mktemp("any")
    for name, kind in zip(NAMES, kinds, strict=True):
        write(root / f"imagesTr/{name}.nii.gz", image())
        write(root / f"labelsTr/{name}.nii.gz", label())
        if name in cases:
            BREAKS[kind][0](root / f"imagesTr/{name}.nii.gz")
    describe(root)
    report = check_data(f"msd:{root}")
    assert {fault.case for fault in report.faults} == cases
    assert report.class_voxels == {"background": 1024, "x": 1024}


def test_any_exception_is_a_fault_of_its_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise MemoryError("no room\nat all")

    monkeypatch.setattr("train.check.read_scan", read)
    layout = LAYOUTS["msd"](folder)
    faults, class_voxels = inspect_case(layout, layout.entries[0])
    file = str(folder / "imagesTr/a.nii.gz")
    problem = "cannot be read (MemoryError: no room): mend or leave out this file."
    assert faults == [Fault("a", file, problem)]
    assert class_voxels.tolist() == [256, 256]


def test_header_faults_name_files_whose_paths_hold_spaces(folder: Path) -> None:
    write(folder / "labelsTr/c.nii.gz", label()[:4])
    (fault,) = header_faults(LAYOUTS["msd"](folder))
    assert (fault.case, fault.file) == ("c", str(folder / "labelsTr/c.nii.gz"))
    assert fault.problem.startswith("has shape (4, 8, 8)")


def test_classes_that_never_occur_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    describe(folder, labels={"0": "background", "1": "x", "2": "y", "3": "z"})
    assert main(["check", f"msd:{folder}", "--out", str(folder / "faults.csv")]) == 0
    assert "warning: no label holds y, z" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": []}, "empty list"),
        ({"labels": {"0": "background", "2": "gap"}}, "without a gap"),
        ({"labels": {"0": "background", "1": "x", "2": "x"}}, "names two classes 'x'"),
        ({"training": [{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}] * 2}, "more than once"),
    ],
)
def test_faults_of_the_description_are_faults(
    folder: Path, tmp_path: Path, changes: dict, words: str
) -> None:
    describe(folder, **changes)
    status, (row,) = check(folder, tmp_path / "faults.csv")
    assert status == 1
    assert row["file"] == str(folder / "dataset.json")
    assert words in row["problem"]


def test_check_of_no_data_set_is_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for data in ("msd:/nowhere", "phantom", "other:here"):
        assert main(["check", data, "--out", str(tmp_path / "faults.csv")]) == 2
        assert "error: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_earlier_list_is_replaced_and_nothing_else(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "faults.csv"
    with_nan(folder / "imagesTr/d.nii.gz")
    assert len(check(folder, out)[1]) == 1
    write(folder / "imagesTr/d.nii.gz", image())
    assert check(folder, out) == (0, [])
    out.write_text("patient,age\n1,50\n")
    assert main(["check", f"msd:{folder}", "--out", str(out)]) == 2
    assert "no list of faults" in capsys.readouterr().err
    assert out.read_text().startswith("patient")
    assert main(["check", f"msd:{folder}", "--out", str(tmp_path)]) == 2


def test_a_key_that_occurs_twice_is_a_fault(folder: Path, tmp_path: Path) -> None:
    file = folder / "dataset.json"
    file.write_text(file.read_text().replace('"1": "x"', '"1": "x", "1": "y"'))
    status, (row,) = check(folder, tmp_path / "faults.csv")
    assert status == 1
    assert "gives '1' twice" in row["problem"]


# Before a run.


def split(folder: Path) -> list[str]:
    """Options: a and b are trained on, c is for validation, d for the test."""
    file = folder.parent / "splits.json"
    file.write_text(json.dumps({"train": ["a", "b"], "val": ["c"], "test": ["d"]}))
    return ["--data", f"msd:{folder}", "--splits", str(file)]


@pytest.mark.parametrize("command", ["fit", "compare"])
def test_a_new_run_is_refused_before_its_first_step(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    with_nan(folder / "imagesTr/c.nii.gz")
    write(folder / "labelsTr/b.nii.gz", label(4))
    truncate(folder / "imagesTr/d.nii.gz")
    losses = ["--losses", "dice", "ce"] if command == "compare" else ["--loss", "ce"]
    options = [*TINY, *losses, *split(folder), "--out", str(tmp_path / "out")]
    assert main([command, *options]) == 2
    told = capsys.readouterr().err
    assert "the first of 3 files with faults" in told
    for words in ("c.nii.gz holds 1 voxels", "b.nii.gz holds the label value 2", "d.nii.gz is truncated"):
        assert words in told
    assert not (tmp_path / "out").exists()


def test_a_comparison_is_checked_once_and_not_when_resumed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked, fitted = [], []

    def fit(*_: object, **options: object) -> None:
        fitted.append(options)
        raise InputError("enough")

    monkeypatch.setattr("train.task.check_cases", lambda *arguments, **_: checked.append(arguments))
    monkeypatch.setattr("train.compare.fit", fit)
    command = ["compare", *TINY, *split(folder), "--losses", "dice", "ce", "--out", str(tmp_path / "out")]
    assert [main(command), main([*command, "--resume"])] == [2, 2]
    assert [names for _, names in checked] == [("c", "d")]
    assert [options["check"] for options in fitted] == [False, False]


def test_what_is_checked_fills_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(f"msd:{folder}", cache_dir=str(tmp_path / "cache"))
    check_cases(dataset, ["a", "b"], labels=["b", "c"])
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr("train.data.volumes.read_scan", None)
    assert dataset.load(0).name == "a"


def test_only_labels_of_training_cases_are_read(folder: Path) -> None:
    dataset = open_dataset(f"msd:{folder}")
    with_nan(folder / "imagesTr/a.nii.gz")
    check_cases(dataset, ["c"], labels=["a"])
    with pytest.raises(InputError, match=r"imagesTr/a.nii.gz holds 1 voxels"):
        check_cases(dataset, ["c", "a"], labels=["a"])


def test_only_the_labels_that_are_used_are_checked(folder: Path) -> None:
    """Of several annotators the first counts, unless all are asked for."""
    write(folder / "labelsTr/second.nii.gz", label(5))
    both = [{"image": "imagesTr/a.nii.gz", "label": ["labelsTr/a.nii.gz", "labelsTr/second.nii.gz"]}]
    describe(folder, training=both)
    layout = LAYOUTS["msd"](folder)
    check_cases(VolumeDataset(layout), ["a"])
    for whole, labels in ((["a"], []), ([], ["a"])):
        with pytest.raises(InputError, match=r"second.nii.gz holds the label value 2"):
            check_cases(VolumeDataset(layout, all_annotators=True), whole, labels)
    assert len(check_data(f"msd:{folder}").faults) == 1


def test_phantoms_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PhantomDataset, "load", None)
    dataset = PhantomDataset()
    check_cases(dataset, dataset.case_names)


# Prediction.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    names = ("p", "q", "r", "s")
    for seed, name in enumerate(names, 10):
        write(root / f"imagesTr/{name}.nii.gz", image(seed))
        write(root / f"labelsTr/{name}.nii.gz", label())
    describe(root, names)
    options = ["--data", f"msd:{root}", "--num-val", "0", "--num-test", "0"]
    for seed in ("0", "1"):
        assert main(["fit", *TINY, *options, "--seed", seed, "--out", str(root / f"run{seed}")]) == 0
    return root


def test_an_evaluation_is_checked_before_it_starts(
    trained: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder / "labelsTr/d.nii.gz", label(9))
    command = ["evaluate", str(trained / "run0"), "--data", f"msd:{folder}", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "label value 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    for seed, name in enumerate(NAMES):
        write(tmp_path / f"scans/{name}.nii.gz", image(seed))
    return tmp_path / "scans"


def predict(trained: Path, scans: Path, run: str = "run0") -> int:
    arguments = ["--images", str(scans), "--out", str(scans.parent / "out")]
    return main(["predict", str(trained / run), *arguments])


def outputs(scans: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (scans.parent / "out").iterdir()}


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "nan", "channels"])
def test_predict_goes_on_after_a_broken_scan_and_later_with_it(
    trained: Path, scans: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    broken, words = BREAKS[kind]
    broken(scans / "b.nii.gz")
    assert predict(trained, scans) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "  b: "))]
    assert "1 of 4 cases could not be predicted" in told[0]
    assert "b.nii.gz" in told[1]
    assert words in told[1]
    first = outputs(scans)
    assert sorted(first) == [f"{name}_{kind}.nii.gz" for name in "acd" for kind in ("label", "probs")]
    times = {file: file.stat().st_mtime_ns for file in (scans.parent / "out").iterdir()}
    write(scans / "b.nii.gz", image())
    assert predict(trained, scans) == 0
    assert len(outputs(scans)) == 8
    assert {file: file.stat().st_mtime_ns for file in times} == times


def test_predict_again_does_nothing_and_takes_new_scans(trained: Path, scans: Path) -> None:
    assert predict(trained, scans) == 0
    first = outputs(scans)
    write(scans / "e.nii.gz", image(9))
    (scans / "a.nii.gz").unlink()
    assert predict(trained, scans) == 0
    assert outputs(scans).keys() - first.keys() == {"e_label.nii.gz", "e_probs.nii.gz"}


def test_predict_refuses_what_other_weights_or_images_gave(
    trained: Path, scans: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(trained, scans) == 0
    first = outputs(scans)
    assert predict(trained, scans, "run1") == 2
    assert "holds predictions of other weights or settings (a_label.nii.gz)" in capsys.readouterr().err
    write(scans / "b.nii.gz", image(7))
    assert predict(trained, scans) == 2
    assert "b_label.nii.gz was predicted from another image" in capsys.readouterr().err
    (scans.parent / "out" / "notes.txt").write_text("mine")
    assert predict(trained, scans) == 2
    assert outputs(scans) == first | {"notes.txt": b"mine"}


@pytest.mark.parametrize("cut", [0, 100, -9])
def test_predictions_that_were_cut_off_are_made_again(trained: Path, scans: Path, cut: int) -> None:
    assert predict(trained, scans) == 0
    first = outputs(scans)
    file = scans.parent / "out" / "c_probs.nii.gz"
    file.write_bytes(file.read_bytes()[:cut])
    (scans.parent / "out" / "d_label.nii.gz").unlink()
    (scans.parent / "out" / "d_label.nii.gz.partial").write_bytes(b"half")
    assert predict(trained, scans) == 0
    for name, content in outputs(scans).items():
        assert gzip.decompress(content) == gzip.decompress(first[name])


def test_a_full_disk_keeps_what_was_predicted(
    trained: Path, scans: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import train.predict as module

    write_whole = module.written_whole

    def full(file: Path) -> Any:
        if file.name == "c_probs.nii.gz":
            raise OSError(28, os.strerror(28))
        return write_whole(file)

    with monkeypatch.context() as patch:
        patch.setattr(module, "written_whole", full)
        assert predict(trained, scans) == 1
    told = capsys.readouterr().err
    assert "2 of 4 cases" in told
    assert "out could not be written (No space left on device)" in told
    assert {"a_label.nii.gz", "b_probs.nii.gz"} <= outputs(scans).keys()
    assert predict(trained, scans) == 0
    assert len(outputs(scans)) == 8


def test_scans_with_the_same_output_are_refused(
    trained: Path, scans: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(scans / "b.nii", image())
    assert predict(trained, scans) == 2
    told = capsys.readouterr().err
    assert "b.nii has the same name as b.nii.gz" in told or "b.nii.gz has the same name as b.nii" in told
    assert not (scans.parent / "out").exists()


def test_probabilities_that_are_not_finite_are_not_written(
    trained: Path, scans: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        VolumePredictor, "__call__", lambda _, image: np.full((*SHAPE, 2), np.nan, np.float32)
    )
    assert predict(trained, scans) == 1
    assert "4 of 4 cases could not be predicted" in (told := capsys.readouterr().err)
    assert "b: the network's probabilities of" in told
    assert outputs(scans) == {}


def test_an_interrupted_prediction_says_how_to_go_on(
    trained: Path, scans: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(VolumePredictor, "__call__", interrupted)
    assert predict(trained, scans) == 130
    assert "start the same command again" in capsys.readouterr().err
