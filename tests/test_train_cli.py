"""The command line: every command on a tiny run, resuming, and one clear sentence after bad input."""

import csv
import errno
import gzip
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from commands import refuses, run, write_msd
from killed import logged, weights

import calib_jax
from calib_jax import BinStatistics
from calib_jax.results import ModelResult, RepeatedResult
from train.compare import Plan, _pairs
from train.config import RunConfig, read_config
from train.data.open import open_dataset
from train.run.folder import claimed
from train.run.logs import RunLog
from train.task import _finds_subjects, open_cases_of

TINY = ["--steps", "4", "--batch-size", "8", "--channels", "4", "8", "--strides", "2", "--warmup-steps", "1"]
PHANTOM = [*TINY, "--data", "phantom2d", "--num-test", "3", "--num-val", "2"]
SPLIT = ["--num-test", 2, "--num-val", 1, "--subjects", "[0-9]"]


def rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


@pytest.fixture(scope="module")
def msd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six small cases of one channel and two classes in the Decathlon's layout."""
    return write_msd(tmp_path_factory.mktemp("msd"), 6, (11, 14, 9), np.s_[3:8, 4:10, 2:7], AFFINE)


AFFINE = np.array([[0.0, -1.5, 0.0, 7.0], [1.0, 0.0, 0.0, -3.0], [0.0, 0.0, 2.0, 5.0], [0.0, 0.0, 0.0, 1.0]])


@pytest.fixture(scope="module")
def trained(msd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on `msd`."""
    out = tmp_path_factory.mktemp("runs") / "fit"
    data = ["--data", f"msd:{msd}", *SPLIT]
    assert run("fit", *TINY, *data, "--loss", "dice+0.5*ace", "--out", out) == 0
    return out


@pytest.mark.usefixtures("undrawn")
def test_compare_with_seeds_temperature_and_ensembles_goes_on_at_each_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import train.compare as compare_module

    out = tmp_path / "compare"
    command = ["compare", *PHANTOM, "--losses", "dice", "--seeds", 0, 3, "--temperature", "--ensembles"]
    command += ["--out", out]
    assert run(*command, "--no-local-calibration") == 0
    table = json.loads((out / "table.json").read_text())
    names = [row["name"] for row in table["models"]]
    assert names == ["dice", "dice+T", "dice~2", "dice~2+T", "true posterior"]
    for row in table["models"][:2]:
        ace = row["metrics"]["ACE"]
        assert list(ace["per_repeat"]) == ["seed 0", "seed 3"]
        assert ace["cases"] == 3
        assert ace["mean"] == pytest.approx(np.mean(list(ace["per_repeat"].values())))
        assert ace["spread"] == pytest.approx(np.std(list(ace["per_repeat"].values()), ddof=1))
    plain, tempered, averaged, _ = (row["metrics"] for row in table["models"][:4])
    assert averaged["ACE"]["cases"] == 3
    assert averaged["ACE"]["mean"] not in plain["ACE"]["per_repeat"].values()
    assert plain["Dice"]["per_repeat"] == pytest.approx(tempered["Dice"]["per_repeat"])  # no label changes
    assert plain["ACE"]["mean"] != tempered["ACE"]["mean"]
    kept = {
        name: json.loads((out / name / "config.json").read_text()) for name in ("dice-seed0", "dice-seed3")
    }
    assert [run["config"]["training"]["seed"] for run in kept.values()] == [0, 3]
    page = (out / "index.html").read_text()
    assert "dice+T" in page
    assert "2 repeats" in page
    assert "temperatures (+T)" in page
    assert "±" in capsys.readouterr().out

    trained, evaluated = [], []
    monkeypatch.setattr(compare_module, "fit", counted(trained, compare_module.fit))
    monkeypatch.setattr(compare_module, "evaluate", counted(evaluated, compare_module.evaluate))
    (out / "dice-seed3" / "test-temperature.npz").unlink()
    assert run(*command, "--no-local-calibration", "--resume") == 0
    assert json.loads((out / "table.json").read_text()) == table
    assert [arguments[1].name for arguments in trained] == ["dice-seed3"]
    assert [arguments[0] for arguments in evaluated] == ["dice+T seed 3"]

    fit, fits = calib_jax.fit_local_calibration, []

    def fit_once(*arguments, **options):
        fits.append(fits[0] if fits else fit(*arguments, max_steps=50, **options))
        return fits[-1]

    monkeypatch.setattr(calib_jax, "fit_local_calibration", fit_once)
    assert run(*command, "--resume") == 0  # with the rows that come without an option
    more = json.loads((out / "table.json").read_text())["models"]
    kinds = [f"{name}{ending}" for name in ("dice", "dice~2") for ending in ("", "+T", "+L")]
    assert [row["name"] for row in more] == [*kinds, "true posterior"]
    assert [row for row in more if "+L" not in row["name"]] == table["models"]
    assert [arguments[0] for arguments in evaluated[1:]] == ["dice+L seed 0", "dice+L seed 3", "dice~2+L"]
    assert len(fits) == 3


def test_pairs_of_seeds_and_ensembles_have_the_labels_of_the_first_loss() -> None:
    def model(name: str, value: float) -> ModelResult:
        count = np.full((1, 1, 1), 8)
        return ModelResult(name, ("case",), ("class",), BinStatistics(count, value * count, count), [[value]])

    def seeds(name: str, *values: float) -> RepeatedResult:
        return RepeatedResult(name, {f"seed {i}": model(f"{name} seed {i}", x) for i, x in enumerate(values)})

    plan = Plan(("dice", "ce"), RunConfig("dice"), (0, 1), temperature=True, ensembles=True)
    results = [
        seeds("dice", 0.1, 0.2),
        seeds("dice+T", 0.3, 0.3),
        seeds("ce", 0.4, 0.5),
        seeds("ce+T", 0.6, 0.7),
    ]
    results += [model("dice~2", 0.15), model("dice~2+T", 0.3), model("ce~2", 0.45), model("ce~2+T", 0.65)]
    pairs = _pairs(plan, {result.name: result for result in results})
    found = {pair.name: [pair.metrics()[metric].item() for metric in ("Dice", "ACE")] for pair in pairs}
    assert found == {
        "dice|ce": pytest.approx([0.15, 0.55]),
        "dice|ce+T": pytest.approx([0.15, 0.35]),
        "dice~2|ce~2": pytest.approx([0.15, 0.55]),
        "dice~2|ce~2+T": pytest.approx([0.15, 0.35]),
    }
    assert [one.name for one in pairs[0].repeats.values()] == ["dice|ce seed 0", "dice|ce seed 1"]


def counted(calls: list[tuple], function: Callable) -> Callable:
    """`function`, whose calls are kept."""

    def call(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        return function(*arguments, **options)

    return call


def test_options_alone_are_those_of_compare(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown" in refuses(capsys, "--losses", "dice+unknown")


def test_an_evaluation_goes_on_after_a_full_disk_and_is_done_once(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("train.compare.write_report", full)
        assert run("evaluate", trained, "--out", tmp_path / "out") == 2
    told = capsys.readouterr()
    assert "dice+0.5*ace" in told.out
    assert "ACE" in told.out
    (line,) = [line for line in told.err.splitlines() if line.startswith("error: ")]
    assert f"{tmp_path / 'out'} could not be written (No space left on device)" in line
    assert run("evaluate", trained, "--out", tmp_path / "out") == 0
    assert "over-confident" in capsys.readouterr().out
    files = {"index.html", "table.csv", "table.json", "metrics.csv", "cases.csv", "report.json"}
    assert files <= {path.name for path in (tmp_path / "out").iterdir()}
    for finished in (tmp_path / "out", trained):
        assert "already holds another run" in refuses(capsys, "evaluate", trained, "--out", finished)


def test_best_weights_of_a_run_that_kept_none(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = ["--checkpoint", "best", "--out", tmp_path / "out"]
    assert "--keep-best" in refuses(capsys, "evaluate", trained, *best)
    assert "--keep-best" in refuses(capsys, "predict", trained, "--images", tmp_path, *best)
    assert "--keep-best" in refuses(capsys, "compare", *PHANTOM, *best)
    assert not (tmp_path / "out").exists()


def test_evaluate_the_same_data_elsewhere(
    trained: Path, msd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(msd, copy)
    splits = json.loads((trained / "splits.json").read_text())
    assert run("evaluate", trained, "--data", f"msd:{copy}", "--out", out) == 0
    assert cases_of(out) == set(splits["test"])
    assert "Tiny: 2 held-out cases" in (out / "index.html").read_text()
    assert run("evaluate", trained, "--split", "train") == 0
    assert "Tiny: 3 training cases" in (trained / "evaluate-train" / "index.html").read_text()
    assert "dice+0.5*ace" in capsys.readouterr().out
    # New cases among those of the run: these and its test cases are measured, and the page says so.
    (copy / "imagesTr" / "new.nii.gz").write_bytes(altered(copy / "imagesTr" / "case_0.nii.gz"))
    shutil.copy(copy / "labelsTr" / "case_0.nii.gz", copy / "labelsTr" / "new.nii.gz")
    description = json.loads((copy / "dataset.json").read_text())
    description["training"].append({"image": "imagesTr/new.nii.gz", "label": "labelsTr/new.nii.gz"})
    (copy / "dataset.json").write_text(json.dumps(description))
    assert run("evaluate", trained, "--data", f"msd:{copy}", "--out", tmp_path / "more") == 0
    assert cases_of(tmp_path / "more") == {"new", *splits["test"]}
    given = {None: tuple("012345"), f"msd:{copy}": (*(f"case_{i}" for i in range(6)), "new")}
    for data, subjects in given.items():  # the run's expression finds nothing in the name of the new case
        dataset, _ = open_cases_of(trained, *read_config(trained), "test", data)
        assert dataset.subjects == subjects
    for text in (capsys.readouterr().out, (tmp_path / "more" / "index.html").read_text()):
        assert "4 cases of" in text
        assert "left out, since the run was trained or validated on them" in text


def cases_of(folder: Path) -> set[str]:
    """The cases that an evaluation measured."""
    return {row["case"] for row in rows(next((folder / "cases").glob("*.csv")))}


def altered(file: Path) -> bytes:
    """The volume in `file` with one voxel changed."""
    volume = nib.load(file)
    voxels = volume.get_fdata(dtype=np.float32)
    voxels[0, 0, 0] += 1
    return gzip.compress(nib.Nifti1Image(voxels, volume.affine).to_bytes())


@pytest.mark.parametrize(("pattern", "fits"), [("[0-9]", True), ("x", False), ("case", False)])
def test_an_expression_of_a_run_is_left_out_where_other_data_do_not_fit(
    msd: Path, pattern: str, fits: bool
) -> None:
    assert _finds_subjects(pattern, f"msd:{msd}") is fits
    assert not _finds_subjects(pattern, "phantom")


def test_resume_with_paths_spelt_otherwise(
    trained: Path, msd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "moved"
    shutil.copytree(msd, copy)
    options = [*TINY, *SPLIT, "--loss", "dice+0.5*ace", "--resume", "--out", trained]
    before = (trained / "config.json").read_text()
    for data in (f"msd:{msd}/", f"msd:{os.path.relpath(msd)}", f"msd:{copy}"):
        assert run("fit", *options, "--data", data, "--cache-dir", tmp_path / "cache") == 0
    assert (trained / "config.json").read_text() == before
    (copy / "imagesTr" / "case_0.nii.gz").write_bytes(altered(copy / "imagesTr" / "case_0.nii.gz"))
    assert "data.data" in refuses(capsys, "fit", *options, "--data", f"msd:{copy}")
    message = refuses(capsys, "fit", *options, "--data", f"msd:{msd}", "--split-seed", 1)
    assert "splits the cases differently" in message


def test_init_from_a_run_that_has_seen_the_test_cases(
    trained: Path, msd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--steps", 1, "--batch-size", 8, "--loss", "dice", "--init", trained, "--data", f"msd:{msd}"]
    message = refuses(capsys, "fit", *options, "--num-test", 5, "--num-val", 0, "--out", tmp_path / "refused")
    assert "of this command's test split" in message
    assert "--splits" in message
    assert not (tmp_path / "refused").exists()
    splits = ["--splits", trained / "splits.json"]
    assert run("fit", *options, *splits, "--out", tmp_path / "out") == 0
    kept = json.loads((tmp_path / "out" / "cases.json").read_text())
    assert len(kept["initial"]) == 4


def test_predict_keeps_the_affine(trained: Path, msd: Path, tmp_path: Path) -> None:
    out = tmp_path / "predictions"
    assert run("predict", trained, "--images", msd / "imagesTr", "--out", out) == 0
    label = nib.load(out / "case_0_label.nii.gz")
    probs = nib.load(out / "case_0_probs.nii.gz")
    assert label.shape == (11, 14, 9)
    assert probs.shape == (11, 14, 9, 2)
    assert label.get_data_dtype() == np.uint8
    for volume in (label, probs):
        np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6)
    np.testing.assert_allclose(probs.get_fdata().sum(-1), 1.0, atol=1e-5)
    np.testing.assert_array_equal(probs.get_fdata().argmax(-1), label.get_fdata())
    assert len(list(out.iterdir())) == 12


def test_predict_of_a_split_is_that_of_the_same_scans_in_a_folder(
    trained: Path,
    msd: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, split = tmp_path / "folder", tmp_path / "split"
    assert run("predict", trained, "--images", msd / "imagesTr", "--out", folder) == 0
    assert run("predict", trained, "--split", "test", "--out", split) == 0
    test = json.loads((trained / "splits.json").read_text())["test"]
    assert {file.name for file in split.iterdir()} == {
        f"{x}_{y}.nii.gz" for x in test for y in ("label", "probs")
    }
    for file in split.iterdir():
        np.testing.assert_array_equal(*(nib.load(at / file.name).get_fdata() for at in (folder, split)))
    both = ["--images", msd / "imagesTr", "--split", "val"]
    for arguments in ([trained], [trained, *both]):
        assert "either --images or --split" in refuses(capsys, "predict", *arguments, "--out", tmp_path / "x")
    other = shutil.copytree(trained, tmp_path / "other")
    (other / "splits.json").write_text(json.dumps({"train": [], "val": [], "test": ["case_9"]}))
    words = ["predict", trained, other, "--split", "test", "--out", tmp_path / "x"]
    assert "has another test split than" in refuses(capsys, *words)
    monkeypatch.setattr("train.predict.open_cases_of", lambda *_: (open_dataset("phantom2d"), None))
    words = ["predict", trained, "--split", "test", "--out", tmp_path / "x"]
    assert "no image files: give --images" in refuses(capsys, *words)


def test_predict_with_local_calibration_is_what_evaluate_judges(
    trained: Path,
    msd: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import train.predict

    assert run("evaluate", trained, "--local-calibration", "--out", tmp_path / "evaluated") == 0
    plain, out = tmp_path / "plain", tmp_path / "calibrated"
    command = ["predict", trained, "--split", "test", "--local-calibration", "--out", out]
    assert run("predict", trained, "--split", "test", "--out", plain) == 0
    assert run(*command) == 0
    test = json.loads((trained / "splits.json").read_text())["test"]
    kept = ModelResult.load(tmp_path / "evaluated" / "results" / "01-dice-0-5-ace-l.npz")
    for name in test:
        labels = [nib.load(folder / f"{name}_label.nii.gz").get_fdata() for folder in (plain, out)]
        np.testing.assert_array_equal(*labels)
        probs, calibrated = (
            nib.load(folder / f"{name}_probs.nii.gz").get_fdata(dtype=np.float32) for folder in (plain, out)
        )
        assert np.abs(probs - calibrated).max() > 1e-3
        count = np.histogram(calibrated[..., 1], np.linspace(0, 1, 21))[0]
        np.testing.assert_array_equal(count, kept.stats.count[kept.case_names.index(name), 0])
    with monkeypatch.context() as patch:  # nothing is left to predict, so nothing is fitted
        patch.setattr(train.predict, "fit_local_calibration", None)
        assert run(*command) == 0
    assert "other weights or settings" in refuses(capsys, *[w for w in command if w != "--local-calibration"])
    none = shutil.copytree(trained, tmp_path / "none")
    (none / "splits.json").write_text(json.dumps({"train": [], "val": [], "test": test}))
    words = ["predict", none, "--images", msd / "imagesTr", "--local-calibration", "--out", tmp_path / "x"]
    assert "val" in refuses(capsys, *words)


def test_predict_with_several_runs_and_uncertainty(
    trained: Path, msd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, images = tmp_path / "other", ["--images", msd / "imagesTr"]
    data = ["--data", f"msd:{msd}", "--num-test", 2, "--num-val", 1]
    assert run("fit", *TINY, *data, "--loss", "dice", "--seed", 1, "--out", other) == 0
    alone = []
    for number, folder in enumerate((trained, other)):
        assert run("predict", folder, *images, "--out", tmp_path / str(number), "--uncertainty") == 0
        alone.append(nib.load(tmp_path / str(number) / "case_0_probs.nii.gz").get_fdata())
    assert len(list((tmp_path / "0").iterdir())) == 18
    out = tmp_path / "both"
    assert run("predict", trained, other, *images, "--out", out, "--uncertainty") == 0
    assert len(list(out.iterdir())) == 24
    found = {
        kind: nib.load(out / f"case_0_{kind}.nii.gz").get_fdata()
        for kind in ("probs", "entropy", "mutual_information")
    }
    mean, *members = (-(p * np.log(p)).sum(-1) for p in (np.mean(alone, 0), *alone))
    np.testing.assert_allclose(found["probs"], np.mean(alone, 0), atol=1e-6)
    np.testing.assert_allclose(found["entropy"], mean, atol=1e-5)
    np.testing.assert_allclose(found["mutual_information"], mean - np.mean(members, 0), atol=1e-5)
    assert found["mutual_information"].max() > 1e-4
    assert run("predict", trained, *images, "--out", tmp_path / "pair", "--labels-of", other) == 0
    for kind, number in (("label", 1), ("probs", 0)):
        files = (tmp_path / folder / f"case_0_{kind}.nii.gz" for folder in ("pair", str(number)))
        np.testing.assert_array_equal(*(nib.load(file).get_fdata() for file in files))
    assert "There is no run" in refuses(capsys, "predict", *images, "--out", tmp_path / "none")


STOPPABLE = ["--ema", "0.9", *PHANTOM, "--dropout", 0.2, "--checkpoint-every", 2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of these options that is never stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run("fit", *STOPPABLE, "--loss", "dice+ace", "--out", out) == 0
    return out


def test_resumed_run_equals_one_that_never_stopped(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train.fit as fit_module

    options = [*STOPPABLE, "--loss", "dice+ace"]
    put_batch, calls = fit_module.put_batch, []

    def killed_in_the_fourth_step(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return put_batch(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(fit_module, "put_batch", killed_in_the_fourth_step)
        assert run("fit", *options, "--out", tmp_path / "cut") == 130
    assert run("fit", *options, "--out", tmp_path / "cut", "--resume") == 0
    assert logged(tmp_path / "cut", "log.csv") == logged(whole, "log.csv")
    for a, b in zip(weights(whole), weights(tmp_path / "cut"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("compare", "fit", "plan", "evaluate", "predict"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--losses", "dice", "dise"], ["dise", "dice, ce, ace"]),
        (["--losses", "dice", "dice"], ["twice"]),
        (["--losses", "dice+focal(gama=3)", "--data", "msd:/nowhere"], ["no argument 'gama'", "gamma"]),
        (["--seeds", "1", "1"], ["--seeds 1 1", "twice"]),
        (["--ensembles"], ["--ensembles", "two or more --seeds"]),
        (["--losses", "dice", "--pairs"], ["--pairs", "two or more --losses"]),
        (["--temperature", "--num-val", "0", "--batch-size", "8"], ["--temperature", "num_val"]),
        (["--losses", "dice", "dice+-1*ace"], ["Weight", "positive"]),
        (["--data", "brain"], ["brain", "phantom", "LAYOUT:PATH", "msd"]),
        (["--data", "msd:/nowhere"], ["/nowhere", "not a folder"]),
        (["--data", "phantom2d", "--patch", "20", "30"], ["(20, 30)", "strides", "8", "(16, 32)"]),
        (["--data", "phantom2d", "--patch", "32"], ["patch", "axes"]),
        (["--num-test", "90", "--num-val", "20"], ["num_test", "num_val"]),
        (["--batch-size", "7"], ["batch_size is 7", "multiple"]),
        (["--batch-size", "0"], ["batch_size is 0"]),
        (["--steps", "0"], ["steps is 0"]),
        (["--strides", "2"], ["strides", "channels"]),
        (["--ace-delay", "2"], ["ace_delay is 2.0", "from 0 to 1"]),
        (["--ace-delay", "0.9", "--ace-ramp", "0.5"], ["ace_delay is 0.9", "full weight"]),
        (["--ace-delay", "nan"], ["ace_delay is nan", "finite"]),
        (["--learning-rate", "inf"], ["learning_rate is inf", "finite"]),
        (["--dropout", "1.5"], ["dropout is 1.5", "below 1"]),
        (["--warmup-steps", "-5"], ["warmup_steps is -5", "0 or more"]),
        (["--warmup-steps", "50", "--steps", "20"], ["warmup_steps is 50", "20 steps"]),
        (["--warmup-steps", "0", "--warmup-from", "0.5"], ["warmup_from", "warmup_steps is 0"]),
        (["--validate-every", "-1"], ["validate_every is -1"]),
        (["--checkpoint-every", "-1"], ["checkpoint_every is -1"]),
        (["--weight-decay", "-1"], ["weight_decay is -1"]),
        (["--clip-norm", "-1"], ["clip_norm is -1"]),
        (["--seed", "-1"], ["seed is -1"]),
        (["--seeds", "-1", "0"], ["seed is -1"]),
        (["--seeds", "1", "2", "--seed", "3"], ["seed does nothing", "--seeds"]),
        (["--loader-threads", "0"], ["loader_threads is 0"]),
        (["--prefetch", "0"], ["prefetch is 0"]),
        (["--fold", "-1"], ["fold is -1"]),
        (["--foreground-crops", "1.5"], ["foreground_crops is 1.5"]),
        (["--accumulate", "-1"], ["accumulate is -1"]),
        (["--channels", "0", "8", "--strides", "2"], ["channels is (0, 8)"]),
        (
            ["--keep-best", "dice", "--num-val", "0", "--batch-size", "8"],
            ["keep_best is dice", "validation cases"],
        ),
        (["--losses", "dice", "ce", "--ace-ramp", "0.1"], ["ace_ramp is an option of the loss terms ace"]),
        (["--losses", "dice", "--ignore-empty-classes"], ["ignore_empty_classes", "none of them"]),
        (
            ["--architecture", "segresnet", "--channels", "8", "16", "32", "64"],
            ["channels is an option of unet"],
        ),
        (["--num-res-units=2", "--architecture", "unetr"], ["num_res_units is an option of unet"]),
        (["--zoom", "0.8", "1.2"], ["zoom does nothing", "zoom_prob is 0"]),
        (["--zoom", "1.2", "0.8", "--zoom-prob", "1"], ["zoom is (1.2, 0.8)"]),
        (["--gamma", "-1", "1"], ["gamma is (-1.0, 1.0)"]),
        (["--noise-prob", "2"], ["noise_prob is 2"]),
        (["--flip-axes", "3", "--batch-size", "8"], ["flip_axes is (3,)", "axes 0 to 2"]),
        (["--flip-axes", "0", "0"], ["flip_axes is (0, 0)", "different"]),
        (["--interpolation", "linear"], ["interpolation does nothing", "--spacing"]),
        (["--splits", "splits.json", "--num-test", "40"], ["num_test does nothing", "--splits"]),
    ],
)
def test_bad_options(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refuses(capsys, "compare", *arguments, "--out", tmp_path / "out")
    for word in words:
        assert word in message


def test_options_that_do_nothing(
    trained: Path, msd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--init", trained, "--data", f"msd:{msd}", "--num-test", 2, "--num-val", 1]
    message = refuses(capsys, "fit", *given, "--num-res-units", 1, "--out", tmp_path / "out")
    assert "num_res_units" in message
    assert "come from --init" in message
    assert "--out" in refuses(capsys, "fit", *PHANTOM, "--resume")
    imported = ["import-monai", tmp_path / "model.pt", "--out", tmp_path / "out"]
    message = refuses(capsys, *imported, "--data", "phantom", "--num-channels", 1)
    assert "num_channels is for networks without --data" in message
    message = refuses(capsys, *imported, "--class-names", "background", "box", "--num-val", 2)
    assert "num_val is about the cases of --data" in message
    assert "prefetch is for training" in refuses(capsys, *imported, "--data", "phantom", "--prefetch", 2)
    assert not (tmp_path / "out").exists()


def test_output_folder_of_another_run_is_left_alone(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path for path in trained.rglob("*") if path.is_file())
    message = refuses(capsys, "compare", *PHANTOM, "--out", trained)
    assert str(trained) in message
    assert "another run" in message
    assert before == sorted(path for path in trained.rglob("*") if path.is_file())


def test_resume_with_other_options(trained: Path, msd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", f"msd:{msd}", "--num-test", 2, "--num-val", 1]
    message = refuses(capsys, "fit", *TINY, *data, "--loss", "ce", "--out", trained, "--resume")
    assert "loss = dice+0.5*ace" in message


def test_commands_on_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no run" in refuses(capsys, "evaluate", tmp_path)
    assert "holds no run" in refuses(
        capsys, "predict", tmp_path, "--images", tmp_path, "--out", tmp_path / "o"
    )


def test_predict_refuses_wrong_images(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    assert "not a folder" in refuses(capsys, "predict", trained, "--images", images, "--out", out)
    images.mkdir()
    assert "no .nii" in refuses(capsys, "predict", trained, "--images", images, "--out", out)
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8, 2), np.float32), np.eye(4)), images / "two.nii.gz")
    message = refuses(capsys, "predict", trained, "--images", images, "--out", out)
    assert "two.nii.gz has 2 channels" in message
    assert not out.exists()


def test_loss_that_is_not_a_number_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refuses(
        capsys, "fit", *PHANTOM, "--learning-rate", "1e30", "--loss", "ce", "--out", tmp_path / "nan"
    )
    assert "not finite from step" in message
    assert "phantom_0" in message  # whose batch it was
    found = re.search(r"goes on from step (\d+), whose checkpoint is (\S+);", message)
    assert found is not None
    assert found[2] == str(tmp_path / "nan" / "checkpoints" / found[1])
    assert all(np.isfinite(leaf).all() for leaf in weights(tmp_path / "nan"))  # of that checkpoint
    assert (tmp_path / "nan" / "log.csv").exists()
    assert run("status", tmp_path / "nan") == 0
    assert "failed: The loss is not finite" in capsys.readouterr().out


def test_status_of_a_run_and_of_a_comparison(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("status", trained) == 0
    told = capsys.readouterr().out
    for words in (
        "dice+0.5*ace on msd:",
        "step 4 of 4",
        "finished",
        "training loss",
        "validation at step 4: Dice",
        "steps 3, 4",
    ):
        assert words in told
    assert "min left" not in told
    (tmp_path / "half").mkdir()
    for name in ("config.json", "log.csv"):
        text = (trained / name).read_text()
        (tmp_path / "half" / name).write_text(
            text if name == "config.json" else "".join(text.splitlines(keepends=True)[:4])[:-9]
        )
    assert run("status", tmp_path / "half") == 0
    told = capsys.readouterr().out
    assert "step 2 of 4, " in told  # the third line, which a kill cut short, is no row
    assert "min left" in told
    assert "checkpoints at steps none" in told
    assert "no process known" in told
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "config.json").write_text(json.dumps({"config": {"losses": ["dice"]}}))
    assert run("status", tmp_path / "both") == 0
    assert "nothing trained yet" in capsys.readouterr().out
    shutil.copytree(trained, tmp_path / "both" / "dice", ignore=shutil.ignore_patterns("checkpoints"))
    gone = {"name": "process 1 on host", "state": "running"}
    (tmp_path / "both" / "dice" / "process.json").write_text(json.dumps(gone))
    with claimed(tmp_path / "both"):
        assert run("status", tmp_path / "both") == 0
    told = capsys.readouterr().out
    assert "comparison, running: process" in told
    assert "killed: process 1 on host no longer runs; --resume goes on" in told
    (tmp_path / "both" / "dice" / "config.json").write_text("{")
    assert "config.json is not a run's configuration" in refuses(capsys, "status", tmp_path / "both")
    assert "holds no run" in refuses(capsys, "status", tmp_path)


def test_tensorboard_has_the_scalars_of_the_csv(trained: Path) -> None:
    events = list((trained / "tensorboard").glob("events.*"))
    assert events
    content = b"".join(file.read_bytes() for file in events)
    for name in (
        b"train/loss",
        b"train/learning_rate",
        b"train/data_wait",
        b"train/patches_per_second",
        b"validation/ACE",
        b"validation/reliability",
    ):
        assert name in content


def test_sigterm_saves_and_resuming_ends_as_if_never_stopped(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, command = tmp_path / "stopped", ["fit", *STOPPABLE, "--loss", "dice+ace"]
    take = RunLog.add_step

    def add_step_and_terminate(log: RunLog, row: dict, cases: list[str]) -> None:
        take(log, row, cases)
        if row["step"] == 2:  # after which no checkpoint is due
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "add_step", add_step_and_terminate)
        assert run(*command, "--out", stopped) == 143
    assert "Stopped after step 3 of 4; --resume goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert run(*command, "--out", stopped, "--resume") == 0
    for name in ("log.csv", "validation.csv"):
        assert logged(whole, name) == logged(stopped, name)


def test_a_comparison_stopped_and_resumed_goes_on_with_its_loss_and_leaves_a_page_and_tables(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "both"
    command = ["compare", *STOPPABLE, "--losses", "dice", "dice+ace", "--no-local-calibration", "--out", out]
    take = RunLog.add_step

    def add_step_and_terminate(log: RunLog, row: dict, cases: list[str]) -> None:
        take(log, row, cases)
        if row["step"] == 1 and "ace" in row:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "add_step", add_step_and_terminate)
        assert run(*command) == 143
    assert not (out / "index.html").exists()
    assert run("status", out) == 0
    assert "comparison, stopped; --resume goes on" in capsys.readouterr().out
    first = (out / "dice" / "log.csv").stat().st_mtime_ns
    assert run(*command, "--resume", "--pairs") == 0  # a row of what is there
    assert (out / "dice" / "log.csv").stat().st_mtime_ns == first
    for name in ("log.csv", "validation.csv"):
        assert logged(out / "dice+ace", name) == logged(whole, name)
    printed = capsys.readouterr().out
    for name in ("dice+ace", "true posterior", "ACE", "Wilcoxon"):
        assert name in printed
    assert "dice+ace" in (out / "index.html").read_text()
    assert len(list((out / "figures").glob("*.png"))) >= 4
    models = {row["name"]: row["metrics"] for row in json.loads((out / "table.json").read_text())["models"]}
    assert list(models) == ["dice", "dice+ace", "dice|dice+ace", "true posterior"]
    labels, probs, pair = list(models.values())[:3]
    assert pair["Dice"]["mean"] == labels["Dice"]["mean"]
    assert pair["ACE"]["mean"] == probs["ACE"]["mean"]
    cases = rows(out / "cases" / "01-dice-ace.csv")
    assert len(cases) == 3 * 3  # cases by foreground classes
    splits = json.loads((out / "splits.json").read_text())
    assert {row["case"] for row in cases} == set(splits["test"])
    logs = [rows(out / loss / "log.csv") for loss in ("dice", "dice+ace")]
    # Same weights, same batches: the first step's Dice is the same under both losses.
    assert logs[0][0]["dice"] == logs[1][0]["dice"]
    assert [row["step"] for row in logs[0]] == ["0", "1", "2", "3"]


def test_sigterm_during_a_validation_stops_after_the_next_step_with_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train.fit as fit_module

    evaluate = fit_module.evaluate

    def terminated(*arguments: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "evaluate", terminated)
        options = ["--validate-every", "1", "--checkpoint-every", "4"]
        assert run("fit", *PHANTOM, *options, "--out", out) == 143
    assert [row["step"] for row in rows(out / "log.csv")] == ["0", "1"]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["2"]
