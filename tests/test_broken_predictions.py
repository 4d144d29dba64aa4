"""Hundreds of broken inputs: each ends in one sentence that names the file and says what to do."""

import csv
import html
import io
import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_predictions import make_case, save_nifti

from calib_jax._terminal import printable
from calib_jax.cli import main
from calib_jax.commands.calibrate import Calibration
from calib_jax.predictions import PredictionError, open_predictions

SHAPE = (5, 4, 3)
FORMATS = (".npz", ".npy", ".nii", ".nii.gz", ".mha", ".nrrd", ".png", ".tif")
MUTANTS = 110  # of each format
GOOD = 9  # cases whose names come first tell the number of classes


def content_of(ending, seed=0):
    """A valid file of probabilities as bytes."""
    probs, _ = make_case(seed, SHAPE if ending not in (".png", ".tif") else SHAPE[:2], classes=2)
    stream = io.BytesIO()
    if ending == ".npz":
        np.savez_compressed(stream, probabilities=probs.transpose(3, 2, 1, 0))
    elif ending == ".npy":
        np.save(stream, probs)
    elif ending in (".png", ".tif"):
        scaled = np.rint(probs[..., 1] * 65535).astype(np.uint16) if ending == ".png" else probs[..., 1]
        Image.fromarray(scaled).save(stream, "PNG" if ending == ".png" else "TIFF")
    else:
        return None
    return stream.getvalue()


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """The bytes of a valid file by ending."""
    folder, found = tmp_path_factory.mktemp("valid"), {}
    for ending in FORMATS:
        found[ending] = content_of(ending)
        if found[ending] is None:
            probs, _ = make_case(0, SHAPE, classes=2)
            file = folder / f"a{ending}"
            if ending in (".mha", ".nrrd"):
                sitk = pytest.importorskip("SimpleITK")
                sitk.WriteImage(sitk.GetImageFromArray(probs.transpose(2, 1, 0, 3), isVector=True), str(file))
            else:
                save_nifti(file, probs, np.eye(4))
            found[ending] = file.read_bytes()
    return found


def mutated(content, rng):
    """The content with a few bytes changed, mostly in the header; or a piece of it; or with a piece put in."""
    kind = rng.random()
    if kind < 0.4:
        return content[: rng.integers(0, len(content))]
    changed = bytearray(content)
    if kind < 0.5:
        place = rng.integers(0, len(content))
        return bytes(changed[:place] + bytes(rng.integers(0, 256, 9, np.uint8)) + changed[place:])
    most = len(content) if kind < 0.6 else min(len(content), 400)
    for place in rng.integers(0, most, rng.integers(1, 9)):
        changed[place] = rng.choice([0, 255, 45, 57, rng.integers(0, 256)])
    return bytes(changed)


def check_sentence(text, *folders):
    """One line that names a file of these folders and ends with what to do."""
    assert "\n" not in text, text
    assert any(str(folder) in text for folder in folders), text
    assert re.search(r"[:;?] \S.*[.?]$", text), text


@pytest.mark.parametrize("ending", FORMATS)
def test_changed_bytes_end_in_one_sentence_or_in_probabilities(tmp_path, valid, ending):
    probs, labels = tmp_path / "probs", tmp_path / "labels"
    probs.mkdir()
    label = tmp_path / "label.nii"
    _, ids = make_case(0, SHAPE, classes=2)
    if ending in (".png", ".tif"):
        label = label.with_suffix(".npy")
        np.save(label, ids[..., 0])
    else:
        save_nifti(label, ids, np.eye(4))
    labels.mkdir()
    rng = np.random.default_rng(FORMATS.index(ending))
    for number in range(GOOD + MUTANTS):
        whole = valid[ending]
        name = f"case{number:03d}"
        (probs / f"{name}{ending}").write_bytes(whole if number < GOOD else mutated(whole, rng))
        os.link(label, labels / f"{name}{label.suffix}")
    predictions = open_predictions(probs, labels)
    faults = 0
    for number, name in enumerate(predictions.case_names):
        try:
            case = predictions.read(name)
        except PredictionError as error:
            assert number >= GOOD
            check_sentence(str(error), probs / name, labels / name)
            faults += 1
        else:
            assert case.probs.shape == (*case.labels.shape, 2)
            assert case.probs.min() >= 0
            np.testing.assert_allclose(case.probs.sum(-1), 1, atol=0.01)
    assert faults >= 0.6 * MUTANTS, faults


# Commands.


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def npy_header(shape, descr="<f4"):
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00v\x00" + text.encode()


def npz_of(members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def nifti_of(shape, *, extra=0, **fields):
    header = nib.Nifti1Header()
    header.set_data_dtype(np.float32)
    header["dim"][: len(shape) + 1] = len(shape), *shape
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + b"\0" * (4 + extra)


def broken_probs(probs, trap):
    """Contents of files of probabilities by a word for what is wrong: an array for `.npz`, or a name and bytes."""
    pickled, huge = pickle.dumps(trap), (3, 50000, 60000, 70000)
    ramp = np.linspace(0, 1, probs[..., 0].size, dtype=np.float32).reshape(SHAPE)
    as_bytes = {
        "empty": (".npz", b""),
        "no zip": (".npz", b"PK\3\4 and nothing else"),
        "pickle": (".npz", pickled),
        "objects": (".npz", npz_of({"probabilities.npy": npy_header((1,), "|O") + pickled})),
        "pickle member": (".npz", npz_of({"probabilities.npy": pickled})),
        "path member": (".npz", npz_of({"../../evil.npy": b"x", "/evil.npy": b"x"})),
        "no array": (".npz", npz_of({"probabilities.txt": b"hello"})),
        "huge": (".npz", npz_of({"probabilities.npy": npy_header(huge) + b"\0" * 9})),
        "bomb": (".npz", npz_of({"probabilities.npy": npy_header((3, 999, 999, 99)) + b"\0" * 10**6})),
        "negative": (".npz", npz_of({"probabilities.npy": npy_header((-3, 3, 4, 5)) + b"\0" * 9})),
        "header code": (".npy", b"\x93NUMPY\x01\x00v\x00" + b"__import__('os').abort()".ljust(117) + b"\n"),
        "deep header": (".npy", b"\x93NUMPY\x02\x00\xff\xff\x00\x00" + b"(" * 65535),
        "npy objects": (".npy", npy_header((1,), "|O") + pickled),
        "npy huge": (".npy", npy_header(huge)),
        "text": (".npy", b"0.1 0.9\n"),
        "strings": (".npy", npy_header((3, *SHAPE), "<U1") + b"\0" * 720),
        "complex": (".npy", npy_header((3, *SHAPE), "<c8") + b"\0" * 1440),
        "apple": (".nii.gz", b"\x00\x05\x16\x07" + b"\0" * 400),
        "nii huge": (".nii", nifti_of((30000, 30000, 30000, 3))),
        "nii flat": (".nii", nifti_of((0, 4, 3, 3), extra=99)),
        "nii type": (".nii", nifti_of((*SHAPE, 3), extra=720, datatype=128)),
        "nii rank": (".nii", nifti_of((5, 4, 3, 3, 2, 2), extra=2880)),
        "nii nan affine": (".nii", nifti_of((*SHAPE, 3), extra=720, sform_code=1, srow_x=np.nan, pixdim=0)),
        "no gzip": (".nii.gz", b"\x1f\x8b\x08" + b"\0" * 99),
        "mha text": (".mha", b"ObjectType = Image\nNDims = -3\n"),
        "mha elsewhere": (".mha", b"NDims = 3\nDimSize = 5 4 3\nElementDataFile = /etc/passwd\n"),
        "nrrd elsewhere": (".nrrd", b"NRRD0004\ntype: float\ndimension: 1\ndata file: ../a\nsizes: 9\n\n"),
        "png text": (".png", b"\x89PNG\r\n\x1a\n and nothing else"),
        "tif loop": (".tif", b"II*\0\x08\0\0\0\0\0\x08\0\0\0"),
    }
    as_arrays = {
        "nan": np.where(probs == probs[0, 0, 0, 0], np.nan, probs),
        "infinite": np.where(probs == probs[0, 0, 0, 0], np.inf, probs),
        "sums": probs / 2,
        "zeros": 0 * probs,
        "percent": 100 * probs,
        "negative values": probs - 0.01,
        "two classes": probs[..., :2] / probs[..., :2].sum(-1, keepdims=True),
        "four classes": np.concatenate([probs / 2, probs[..., :1] / 2, probs[..., :1] * 0], -1),
        "cut": probs[1:],
        "swapped": probs.transpose(1, 0, 2, 3),
        "rank 5": np.stack([probs, probs]),
        "rank 1": probs.reshape(-1),
        "labels": np.eye(3, dtype=np.uint8)[0] * np.ones((*SHAPE, 1), np.uint8) * 7,
        "ramp": np.stack([ramp, ramp, ramp], -1),
        "bytes that wrap": (probs * 300).astype(np.uint8),
    }
    return as_bytes, as_arrays


def broken_labels(ids):
    """Arrays of label maps by a word for what is wrong."""
    return {
        "class 9": np.where(ids == 2, 9, ids),
        "negative ids": ids.astype(np.int16) - 1,
        "not whole": ids + np.float32(0.3),
        "nan ids": np.where(ids == 2, np.nan, ids).astype(np.float32),
        "smaller": ids[1:],
        "flat": ids[..., 0],
        "large": ids.astype(np.float32) * 1e9,
        "several": np.stack([ids, ids, ids], -1),
    }


STRANGE = (
    '<script>alert("1")</script>'.replace("/", "\N{FRACTION SLASH}"),
    "a & b ' \" $x$ `id`",
    "up..",
    "up ..\\..\\trick",
    "line\nbreak",
    "--out",
    "spaces  and\ttabs",
    "%s%n{0}",
    "é\N{RIGHT-TO-LEFT OVERRIDE}x",
    "x" * 200,
    os.fsdecode(b"bytes \xff\xfe"),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Broken cases beside good ones: folders, the names of both, and the file that a pickle would leave."""
    root = tmp_path_factory.mktemp("mixed")
    probs_folder, labels_folder, sprung = root / "probs", root / "labels", root / "sprung"
    probs_folder.mkdir()
    labels_folder.mkdir()
    good, broken = [], []

    def save(name, voxels, folder=probs_folder):
        np.savez(folder / f"{name}.npz", probabilities=voxels.transpose(3, 2, 1, 0))

    def label(name, ids):
        save_nifti(labels_folder / f"{name}.nii.gz", ids, np.eye(4))

    for number in range(4):
        name = f"0 good {number}"
        case, ids = make_case(number, SHAPE)
        save(name, case)
        label(name, ids)
        good.append(name)
    for name in STRANGE:
        case, ids = make_case(0, SHAPE)
        save(name, case)
        label(name, ids)
        good.append(name)
        save(f"broken {name}", case / 2)
        label(f"broken {name}", ids)
        broken.append(f"broken {name}")
    case, ids = make_case(9, SHAPE)
    as_bytes, as_arrays = broken_probs(case, Trap(sprung))
    for name, (ending, content) in as_bytes.items():
        (probs_folder / f"{name}{ending}").write_bytes(content)
    for name, voxels in as_arrays.items():
        axes = voxels.transpose(*reversed(range(voxels.ndim)))
        np.savez(probs_folder / f"{name}.npz", probabilities=axes)
    for name in (*as_bytes, *as_arrays):
        label(name, ids)
        broken.append(name)
    for name, voxels in broken_labels(ids).items():
        save(name, case)
        label(name, voxels)
        broken.append(name)
    for name in ("twice", "truth twice"):
        save(name, case)
        label(name, ids)
        broken.append(name)
    save_nifti(probs_folder / "twice_prob.nii.gz", case, np.eye(4))
    save_nifti(labels_folder / "truth twice_seg.nii.gz", ids)
    save_nifti(labels_folder / "truth twice_gt.nii.gz", ids)
    save("folder", case)
    (labels_folder / "folder.nii.gz").mkdir()  # no file: the case has no label
    for folder in (probs_folder, labels_folder):
        for name in (*good, *broken):
            if len(name) < 200:
                (folder / f"._{name}.npz").write_bytes(b"\0\5\26\7")
    (probs_folder / "0 good 0.pkl").write_bytes(pickle.dumps(Trap(sprung)))
    return probs_folder, labels_folder, good, broken, sprung


def tree(folder):
    """Files and their contents."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def as_shown(name):
    """A name with escapes for bytes that are no characters."""
    return name.encode("utf-8", "backslashreplace").decode()


def flat(text):
    return " ".join(text.split())


def faults_of(text, broken, folder):
    """The lines of faults, one for each broken case."""
    lines = [line.removeprefix("fault: ") for line in text.splitlines() if line.startswith("fault: ")]
    for line in lines:
        check_sentence(line, flat(str(folder)))
    for name in broken:
        shown = printable(flat(as_shown(name)))
        found = [line for line in lines if re.search(rf"/{re.escape(shown)}[._]", line)]
        assert len(found) == 1, (name, found)
    assert len(lines) == len(broken)
    return lines


@pytest.fixture
def quick(monkeypatch, undrawn):
    """No figures and no cross-validation, which take seconds."""
    monkeypatch.setattr("calib_jax.report.figures.report_figures", lambda *_, **__: [])
    monkeypatch.setattr("calib_jax.report.gains.SHOWN", ())


@pytest.mark.usefixtures("quick")
def test_a_report_names_every_broken_case_and_is_of_all_others(folders, tmp_path, capsys):
    probs, labels, good, broken, sprung = folders
    before, out = tree(probs.parent), tmp_path / "deep" / "out"
    given = ["--probs", str(probs), "--labels", str(labels)]
    assert main(["report", *given, "--out", str(out), "--jobs", "2"]) == 1
    lines = faults_of(capsys.readouterr().err, broken, probs.parent)
    with open(out / "cases.csv", newline="", encoding="utf-8") as file:
        reported = {row["case"] for row in csv.DictReader(file)}
    assert reported == set(map(as_shown, good))
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count("<script") == 1
    shown = flat(html.unescape(page))
    for line in lines:
        assert flat(line) in shown
    assert json.loads((out / "report.json").read_text(encoding="utf-8"))["details"]["faults"]
    assert tree(probs.parent) == before
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert not sprung.exists()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("command", ["apply", "ensemble", "convert", "sweep", "triage"])
def test_other_commands_do_all_that_can_be_done(folders, tmp_path, capsys, command):
    probs, labels, good, broken, sprung = folders
    before, out = tree(probs.parent), tmp_path / "deep" / "out"
    names = ("background", "x", "y")
    Calibration("temperature", names, False, (np.float32(2),)).save(tmp_path / "fit.npz")
    given = {
        "apply": ["calibrate", "apply", "--probs", str(probs), "--params", str(tmp_path / "fit.npz")],
        "ensemble": ["ensemble", f"--probs=A={probs}", f"--probs=B={probs}"],
        "convert": ["convert", "--probs", str(probs), "--to", "npz"],
        "sweep": ["sweep", "--probs", str(probs), "--labels", str(labels), "--num-bins", "5"],
        "triage": ["triage", "--probs", str(probs)],
    }[command]
    assert main([*given, "--out", str(out)]) == 1
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("fault: ")]
    assert len(lines) > 40
    for line in lines:
        check_sentence(line, flat(str(probs.parent)))
    if command == "sweep":
        faults_of(error, broken, probs.parent)
    elif command == "triage":
        with (out / "triage.csv").open(newline="", encoding="utf-8") as file:
            found = {row["case"] for row in csv.DictReader(file)}
        escaped = {name.encode("utf-8", "backslashreplace").decode() for name in good}
        assert escaped <= found
    else:
        written = {path.name for path in out.rglob("*") if not path.name.startswith(".")}
        assert {f"{name}.npz" for name in good} <= written
    assert tree(probs.parent) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "fit.npz"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert not sprung.exists()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
    VALUES
    | st.fixed_dictionaries(
        {"labels": st.dictionaries(st.sampled_from(["background", "a", "ignore", "0", "1"]), VALUES)},
        optional={"regions_class_order": VALUES},
    )
)
def test_whatever_dataset_json_holds_ends_in_one_sentence(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("json")
    probs, ids = make_case(0, (4, 3), classes=2)
    np.save(folder / "a_probs.npy", probs)
    np.save(folder / "a_label.npy", ids)
    (folder / "dataset.json").write_text(json.dumps(content))
    try:
        read = open_predictions(folder / "a_probs.npy", folder / "a_label.npy").read("a")
    except PredictionError as error:
        check_sentence(str(error), folder)
    else:
        np.testing.assert_allclose(read.probs, probs)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMATS), st.binary(max_size=400), st.booleans())
def test_any_bytes_end_in_one_sentence(tmp_path_factory, valid, ending, content, keep_start):
    folder = tmp_path_factory.mktemp("bytes")
    start = valid[ending][:16] if keep_start else b""
    (folder / f"a{ending}").write_bytes(start + content)
    with pytest.raises(PredictionError) as caught:
        open_predictions(folder).read("a")
    check_sentence(str(caught.value), folder)


def test_parameters_with_changed_bytes_end_in_one_sentence(tmp_path):
    file, faults = tmp_path / "fit.npz", 0
    Calibration("temperature", ("background", "x"), False, (np.float32(2),)).save(file)
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        file.write_bytes(mutated(whole, rng))
        try:
            Calibration.load(file)
        except ValueError as error:
            check_sentence(str(error), file)
            faults += 1
    assert faults > 30
