"""`calib-jax triage`: what probabilities say about cases without labels."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
from stand_in import noisy_case

import calib_jax
from calib_jax import cli


def write(folder, cases):
    folder.mkdir(parents=True)
    for name, probs in cases.items():
        np.save(folder / f"{name}.npy", probs)
    return folder


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def labelled(path, cases=19, models=("there",), ratios=None):
    """The `cases.csv` of a report whose true volumes are 0.1, 0.2, ... times the expected ones."""
    ratios = np.arange(1, cases + 1) / 10 if ratios is None else ratios
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["model", "case", "class", "expected_ml", "true_ml", "expected_voxels"])
        writer.writeheader()
        for model in models:
            for i, ratio in enumerate(ratios):
                volumes = {"expected_ml": 2.0, "true_ml": 2 * ratio, "expected_voxels": 2000.0}
                writer.writerow({"model": model, "case": str(i), "class": "class 1", **volumes})
                writer.writerow(
                    {"model": model, "case": str(i), "class": "class 2", **volumes, "expected_voxels": 0}
                )
    return path


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "probs", {f"case_{i}": noisy_case(seed=i).probs for i in range(3)})


def test_equals_the_library(folder, tmp_path, capsys):
    assert cli.main(["triage", "--probs", str(folder), "--out", str(tmp_path / "out")]) == 0
    rows = table(tmp_path / "out" / "triage.csv")
    assert [(row["case"], row["class"]) for row in rows] == [
        (f"case_{i}", f"class {k}") for i in range(3) for k in (1, 2)
    ]
    for row in rows:
        probs, k = np.load(folder / f"{row['case']}.npy"), int(row["class"][-1])
        expected = calib_jax.expected_dice(probs[None], probs[None].argmax(-1).astype(np.int32))
        np.testing.assert_allclose(float(row["expected_dice"]), expected[0, k], rtol=1e-6)
        stats = calib_jax.bin_statistics(
            probs[None], np.zeros((1, *probs.shape[:-1]), np.int32), num_bins=200
        )
        threshold = calib_jax.dice_thresholds(stats)[0, k]
        np.testing.assert_allclose(float(row["dice_threshold"]), threshold, rtol=1e-6)
        np.testing.assert_allclose(float(row["expected_ml"]), probs[..., k].sum() / 1000, rtol=1e-6)
        assert round(1000 * float(row["predicted_ml"])) == np.count_nonzero(probs.argmax(-1) == k)
        assert row["low_ml"] == row["high_ml"] == ""
    first = min(rows, key=lambda row: float(row["expected_dice"]))
    assert first["case"] in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "triage.json").read_text())["triage"][0]["case"] == "case_0"


def test_a_label_map_beside_the_probabilities_is_what_is_judged(tmp_path):
    probs = noisy_case().probs
    nothing = np.zeros(probs.shape[:-1], np.uint8)
    (tmp_path / "probs").mkdir()
    for name, voxels in (("case_probs", probs), ("case_label", nothing)):
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "probs" / f"{name}.nii.gz")
    assert cli.main(["triage", "--probs", str(tmp_path / "probs"), "--out", str(tmp_path / "out")]) == 0
    assert [row["predicted_ml"] for row in table(tmp_path / "out" / "triage.csv")] == ["0.0", "0.0"]


def test_intervals_come_from_cases_with_labels(folder, tmp_path, capsys):
    given = labelled(tmp_path / "cases.csv")
    options = ["triage", "--probs", str(folder), "--labelled", str(given), "--out", str(tmp_path / "out")]
    assert cli.main(options) == 0
    for row in table(tmp_path / "out" / "triage.csv"):
        if row["class"] == "class 2":  # which was expected nowhere
            assert row["low_ml"] == ""
            continue
        ends = np.array([float(row["low_ml"]), float(row["high_ml"])])
        np.testing.assert_allclose(ends, float(row["expected_ml"]) * np.array([0.1, 1.9]), rtol=1e-5)
    assert cli.main([*options, "--level", "0.8"]) == 0
    (row, *_) = table(tmp_path / "out" / "triage.csv")
    np.testing.assert_allclose(float(row["high_ml"]), float(row["expected_ml"]) * 1.8, rtol=1e-5)
    assert "3 of 3 cases were measured before" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--level", "0.9"], "give both"),
        (["--labelled", "{few}"], "needs 19 cases with labels; got 18"),
        (["--labelled", "{cases}", "--level", "1"], "between 0 and 1"),
        (["--labelled", "{other}"], "lacks the columns"),
        (["--labelled", "{two}"], "lacks model"),
        (["--labelled", "{absent}"], "absent"),
        (["--labelled", "{broken}"], "holds no volumes in line 2"),
        (
            ["--labelled", "{cases}", "--class-names", "background", "x", "y"],
            "is of the classes class 1, and",
        ),
        (["--jobs", "0"], "--jobs"),
    ],
)
def test_wrong_options(options, message, folder, tmp_path, capsys):
    (tmp_path / "other.csv").write_text("model,class\n")
    (tmp_path / "broken.csv").write_text("model,class,expected_ml,true_ml,expected_voxels\na,class 1,2\n")
    files = {
        "few": labelled(tmp_path / "few.csv", cases=18),
        "cases": labelled(tmp_path / "cases.csv"),
        "two": labelled(tmp_path / "two.csv", models=("a", "b")),
        "other": tmp_path / "other.csv",
        "absent": tmp_path / "absent.csv",
        "broken": tmp_path / "broken.csv",
    }
    given = [option.format(**files) for option in options]
    assert cli.main(["triage", "--probs", str(folder), "--out", str(tmp_path / "out"), *given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "triage.csv").exists()


def test_several_models_have_intervals_of_their_own(folder, tmp_path):
    given = labelled(tmp_path / "cases.csv", models=("a", "b"))
    probs = [f"--probs={name}={folder}" for name in "ab"]
    assert cli.main(["triage", *probs, "--labelled", str(given), "--out", str(tmp_path / "out")]) == 0
    rows = table(tmp_path / "out" / "triage.csv")
    assert {row["model"] for row in rows} == {"a", "b"}
    assert all(row["low_ml"] for row in rows if row["class"] == "class 1")
