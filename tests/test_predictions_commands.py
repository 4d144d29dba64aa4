"""`calib-jax calibrate`, `ensemble` and `convert`: what they write, and what they say of faults."""

import contextlib
import os
import shutil
import signal
import time

import jax
import nibabel as nib
import numpy as np
import pytest
from test_predictions import AFFINE, LPS, SHAPE, make_case, save_dataset_json, save_nifti, save_nnunet

import calib_jax
from calib_jax import _local_network as network
from calib_jax._kept import replacing
from calib_jax.calibrators import CALIBRATORS
from calib_jax.cli import main
from calib_jax.commands.calibrate import METHODS, Calibration
from calib_jax.predictions import Predictions, open_predictions
from calib_jax.predictions.volumes import VolumeFile


@pytest.fixture
def folders(tmp_path):
    """Three overconfident cases of nnU-Net and their labels."""
    (tmp_path / "labels").mkdir()
    for seed, name in enumerate(("a", "b", "c d")):
        probs, ids = make_case(seed, sharpness=1.0)
        sharp = probs**4 / (probs**4).sum(-1, keepdims=True)
        save_nnunet(tmp_path / "probs", name, sharp.astype(np.float32), LPS)
        save_nifti(tmp_path / "labels" / f"{name}.nii.gz", ids, LPS)
    return tmp_path / "probs", tmp_path / "labels"


def files(folder):
    """Files that are not hidden."""
    inside = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(path.as_posix() for path in inside if not any(part.startswith(".") for part in path.parts))


def likelihood(probs_folder, label_folder):
    """Mean negative log-likelihood."""
    cases = open_predictions(probs_folder, label_folder)
    return np.mean([-np.log(np.take_along_axis(case.probs, case.labels[..., None], -1)) for case in cases])


def test_the_methods_are_those_of_the_library():
    assert set(METHODS) == set(CALIBRATORS)


@pytest.mark.parametrize("method", ["temperature", "vector", "isotonic"])
def test_calibrated_files_have_the_same_format_and_label_maps(tmp_path, folders, method, capsys):
    probs_folder, label_folder = folders
    params, out = tmp_path / "fit.npz", tmp_path / "out"
    fit = [
        "calibrate",
        "fit",
        "--probs",
        str(probs_folder),
        "--labels",
        str(label_folder),
        "--out",
        str(params),
    ]
    assert main([*fit, "--method", method]) == 0
    assert "on 3 cases" in capsys.readouterr().out
    apply = ["calibrate", "apply", "--probs", str(probs_folder), "--params", str(params), "--out", str(out)]
    assert main([*apply, "--uncertainty"]) == 0
    assert files(out) == sorted(
        f"{name}{end}" for name in ("a", "b", "c d") for end in (".nii.gz", ".npz", "_uncertainty.nii.gz")
    )
    before, after = open_predictions(probs_folder, label_folder), open_predictions(out, label_folder)
    for name in before.case_names:
        old, new = (np.load(folder / f"{name}.npz")["probabilities"] for folder in (probs_folder, out))
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
        np.testing.assert_allclose(new.sum(0), 1, atol=1e-5)
        label = f"{name}.nii.gz"
        assert (probs_folder / label).read_bytes() == (out / label).read_bytes()
        uncertainty = nib.load(out / f"{name}_uncertainty.nii.gz")
        probs = after.read(name).probs.astype(np.float64)
        np.testing.assert_allclose(uncertainty.get_fdata(), -(probs * np.log(probs)).sum(-1), atol=1e-4)
        np.testing.assert_array_equal(uncertainty.affine, LPS)
    assert likelihood(out, label_folder) < likelihood(probs_folder, label_folder) - 0.1


def test_the_temperature_is_that_of_the_library(tmp_path, folders):
    probs_folder, label_folder = folders
    fit = ["calibrate", "fit", "--probs", str(probs_folder), "--labels", str(label_folder)]
    assert main([*fit, "--out", str(tmp_path / "fit.npz")]) == 0
    found = Calibration.load(tmp_path / "fit.npz")
    assert (found.method, found.regions) == ("temperature", False)
    assert found.class_names == ("background", "class 1", "class 2")
    batches = [
        (np.log(case.probs[None]), case.labels[None]) for case in open_predictions(probs_folder, label_folder)
    ]
    np.testing.assert_allclose(found.params[0], calib_jax.fit_temperature(batches), rtol=1e-4)


def test_each_region_has_parameters_of_its_own(tmp_path):
    rng = np.random.default_rng(0)
    probs, ids = make_case(sharpness=1.0)
    regions = np.stack([1 - probs[..., 0], probs[..., 2]], -1)
    regions = (regions**2 / (regions**2 + (1 - regions) ** 2)).astype(np.float32)
    save_dataset_json(
        tmp_path / "probs", {"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=[1, 2]
    )
    save_nnunet(tmp_path / "probs", "a", regions, segmentation=False)
    save_nifti(tmp_path / "probs" / "a.nii.gz", rng.integers(0, 3, SHAPE).astype(np.uint8))
    save_nifti(tmp_path / "labels" / "a.nii.gz", ids)
    segmentation = np.where(regions[..., 1] > 0.5, 2, (regions[..., 0] > 0.5).astype(int)).astype(np.uint8)
    save_nifti(tmp_path / "probs" / "a.nii.gz", segmentation)
    probs_folder, params, out = str(tmp_path / "probs"), str(tmp_path / "fit.npz"), tmp_path / "out"
    fit = ["calibrate", "fit", "--probs", probs_folder, "--labels", str(tmp_path / "labels"), "--out", params]
    assert main(fit) == 0
    assert len(Calibration.load(tmp_path / "fit.npz").params) == 2
    assert main(["calibrate", "apply", "--probs", probs_folder, "--params", params, "--out", str(out)]) == 0
    after = open_predictions(out, tmp_path / "labels")
    assert after.regions  # dataset.json went along
    temperatures = np.array([float(param) for param in Calibration.load(tmp_path / "fit.npz").params])
    odds = (regions / (1 - regions)) ** (1 / temperatures)
    np.testing.assert_allclose(after.read("a").probs, odds / (1 + odds), rtol=1e-3)


def test_label_maps_are_written_where_there_are_none(tmp_path, folders):
    probs_folder, label_folder = folders
    probs, _ = make_case(sharpness=1.0)
    save_nifti(tmp_path / "volumes" / "a_prob.nii.gz", probs, AFFINE)
    params = str(tmp_path / "fit.npz")
    fit = ["calibrate", "fit", "--probs", str(probs_folder), "--labels", str(label_folder), "--out", params]
    assert main([*fit, "--method", "vector"]) == 0
    apply = ["calibrate", "apply", "--probs", str(tmp_path / "volumes"), "--params", params]
    assert main([*apply, "--out", str(tmp_path / "out")]) == 0
    assert files(tmp_path / "out") == ["a_label.nii.gz", "a_prob.nii.gz"]
    label = nib.load(tmp_path / "out" / "a_label.nii.gz")
    np.testing.assert_array_equal(np.asarray(label.dataobj), probs.argmax(-1))
    assert label.get_data_dtype() == np.uint8


def test_a_fault_of_one_case_does_not_stop_the_others(tmp_path, folders, capsys):
    probs_folder, label_folder = folders
    (probs_folder / "a.npz").write_bytes(b"PK\3\4 and nothing else")
    fit = ["calibrate", "fit", "--probs", str(probs_folder), "--labels", str(label_folder)]
    assert main([*fit, "--out", str(tmp_path / "fit.npz")]) == 1
    err = capsys.readouterr().err
    assert f"fault: {probs_folder / 'a.npz'} is truncated or corrupt" in err
    assert err.count("fault:") == 1
    apply = ["calibrate", "apply", "--probs", str(probs_folder), "--params", str(tmp_path / "fit.npz")]
    assert main([*apply, "--out", str(tmp_path / "out")]) == 1
    assert files(tmp_path / "out") == ["b.nii.gz", "b.npz", "c d.nii.gz", "c d.npz"]


@pytest.mark.parametrize("content", [b"", b"PK\3\4", None])
def test_parameters_that_are_none_are_told(tmp_path, folders, content, capsys):
    params = tmp_path / "fit.npz"
    if content is not None:
        params.write_bytes(content)
    apply = ["calibrate", "apply", "--probs", str(folders[0]), "--params", str(params)]
    assert main([*apply, "--out", str(tmp_path / "out")]) == 2
    assert str(params) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_parameters_of_other_classes_are_told(tmp_path, folders, capsys):
    Calibration("temperature", ("background", "x"), False, (np.float32(2),)).save(tmp_path / "fit.npz")
    apply = ["calibrate", "apply", "--probs", str(folders[0]), "--params", str(tmp_path / "fit.npz")]
    assert main([*apply, "--out", str(tmp_path / "out")]) == 2
    assert "was fitted to 2 classes (background, x), and the predictions have 3" in capsys.readouterr().err


@pytest.mark.parametrize("inside", [".", "out", ".."])
def test_nothing_is_written_where_it_is_read(tmp_path, folders, inside, capsys):
    before = files(tmp_path)
    assert (
        main(["convert", "--probs", str(folders[0]), "--to", "npz", "--out", str(folders[0] / inside)]) == 2
    )
    assert "choose another output folder" in capsys.readouterr().err
    assert files(tmp_path) == before


def test_a_link_in_the_output_folder_leads_nowhere(tmp_path, capsys):
    save_nifti(tmp_path / "probs" / "a" / "a_trans.nii.gz", make_case()[0])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").symlink_to(tmp_path / "elsewhere")
    assert (
        main(["convert", "--probs", str(tmp_path / "probs"), "--to", "npz", "--out", str(tmp_path / "out")])
        == 2
    )
    assert "leads out of" in capsys.readouterr().err
    assert files(tmp_path / "elsewhere") == []


def test_conversion_to_nifti_and_back_gives_the_same_numbers(tmp_path, folders):
    probs_folder, label_folder = folders
    as_nifti, back = tmp_path / "nifti", tmp_path / "back"
    assert main(["convert", "--probs", str(probs_folder), "--to", "nii.gz", "--out", str(as_nifti)]) == 0
    assert main(["convert", "--probs", str(as_nifti), "--to", "npz", "--out", str(back)]) == 0
    for name in ("a", "b", "c d"):
        old, new = (np.load(folder / f"{name}.npz")["probabilities"] for folder in (probs_folder, back))
        np.testing.assert_array_equal(old, new)
        volume = nib.load(as_nifti / f"{name}_probs.nii.gz")
        np.testing.assert_array_equal(volume.affine, LPS)
        np.testing.assert_array_equal(np.asarray(volume.dataobj), old.T)
    assert len(open_predictions(as_nifti, label_folder)) == 3


def test_conversion_needs_to_know_where_voxels_lie(tmp_path, capsys):
    probs, ids = make_case()
    save_nnunet(tmp_path / "probs", "a", probs, segmentation=False)
    convert = [
        "convert",
        "--probs",
        str(tmp_path / "probs"),
        "--to",
        "nii.gz",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(convert) == 2
    assert "give --images, the folder of the scans" in capsys.readouterr().err
    save_nifti(tmp_path / "images" / "a_0000.nii.gz", ids.astype(np.float32), LPS)
    assert main([*convert, "--images", str(tmp_path / "images")]) == 0
    volume = nib.load(tmp_path / "out" / "a_probs.nii.gz")
    np.testing.assert_array_equal(volume.affine, LPS)
    np.testing.assert_array_equal(np.asarray(volume.dataobj), probs)


def test_an_ensemble_is_the_mean_whatever_the_formats(tmp_path):
    first, _ = make_case(0)
    second, _ = make_case(1)
    save_nnunet(tmp_path / "one", "a", first, LPS)
    turned = nib.as_closest_canonical(nib.Nifti1Image(second, LPS))
    save_nifti(tmp_path / "two" / "a_prob.nii.gz", np.asarray(turned.dataobj), turned.affine)
    shutil.copy(tmp_path / "one" / "a.nii.gz", tmp_path / "two" / "a.nii.gz")
    out = tmp_path / "mean"
    assert (
        main(
            [
                "ensemble",
                "--probs",
                str(tmp_path / "one"),
                "--probs",
                str(tmp_path / "two"),
                "--out",
                str(out),
            ]
        )
        == 0
    )
    mean = (first + second) / 2
    np.testing.assert_allclose(np.load(out / "a.npz")["probabilities"].T, mean, rtol=1e-6)
    label = nib.load(out / "a.nii.gz")
    np.testing.assert_array_equal(np.asarray(label.dataobj), mean.argmax(-1))
    np.testing.assert_array_equal(label.affine, LPS)


def test_an_ensemble_averages_the_same_voxels_without_label_maps(tmp_path, capsys):
    probs, _ = make_case()
    save_nifti(tmp_path / "one" / "a.nii.gz", probs, LPS)
    turned = nib.as_closest_canonical(nib.Nifti1Image(probs, LPS))
    save_nifti(tmp_path / "two" / "a.nii.gz", np.asarray(turned.dataobj), turned.affine)
    command = [
        "ensemble",
        *(f"--probs={tmp_path / name}" for name in ("one", "two")),
        f"--out={tmp_path / 'mean'}",
    ]
    assert main(command) == 0
    np.testing.assert_allclose(np.asarray(nib.load(tmp_path / "mean" / "a.nii.gz").dataobj), probs, rtol=1e-6)
    save_nifti(tmp_path / "two" / "a.nii.gz", probs, 2 * AFFINE)
    assert main([*command[:-1], f"--out={tmp_path / 'other'}"]) == 2
    assert "another grid" in capsys.readouterr().err


def test_a_label_map_in_two_files_goes_along_whole(tmp_path):
    probs, _ = make_case()
    save_nnunet(tmp_path / "probs", "a", probs, LPS, segmentation=False)
    pair = nib.Nifti1Pair(probs.argmax(-1).astype(np.uint8), LPS)
    nib.save(pair, tmp_path / "probs" / "a.hdr")
    predictions = open_predictions(tmp_path / "probs")
    assert {path.name for path in predictions.files("a")} == {"a.npz", "a.hdr", "a.img"}
    given = f"--probs={tmp_path / 'probs'}"
    assert main(["convert", given, "--to=nii.gz", f"--out={tmp_path / 'nifti'}"]) == 0
    assert files(tmp_path / "nifti") == ["a.hdr", "a.img", "a_probs.nii.gz"]
    for part in ("a.hdr", "a.img"):
        assert (tmp_path / "nifti" / part).read_bytes() == (tmp_path / "probs" / part).read_bytes()
    command = ["ensemble", given, f"--probs=again={tmp_path / 'probs'}", f"--out={tmp_path / 'mean'}"]
    assert main(command) == 0
    assert files(tmp_path / "mean") == ["a.npz", "a_label.nii.gz"]
    label = nib.load(tmp_path / "mean" / "a_label.nii.gz")
    np.testing.assert_array_equal(np.asarray(label.dataobj), probs.argmax(-1))
    np.testing.assert_array_equal(label.affine, LPS)


def test_voxels_are_read_once_and_only_where_they_are_used(tmp_path, folders, monkeypatch):
    for name in "ab":
        save_nifti(tmp_path / "images" / f"{name}.nii.gz", make_case()[1].astype(np.float32), LPS)
    read, original = [], VolumeFile.read_stored
    monkeypatch.setattr(
        VolumeFile, "read_stored", lambda file: (read.append(file.path.parent.name), original(file))[1]
    )
    models = {"A": folders[0], "B": folders[0]}
    predictions = open_predictions(models, folders[1], images=tmp_path / "images")
    cases = [predictions.read("a", model) for model in models]
    assert sorted(read) == ["images", "labels", "probs", "probs"]  # of each model the map beside its `.npz`
    assert all(x is not None for case in cases for x in (case.image, case.labels, case.predicted))
    read.clear()
    case = predictions.read("b", "A", parts=())
    assert (case.labels, case.where, case.image, case.predicted) == (None, None, None, None)
    assert read == ["probs"]  # it tells the order of axes
    read.clear()
    predictions.read("b", "A", parts=("labels",))
    assert read == ["probs", "labels"]
    with pytest.raises(ValueError, match="parts names label: choose from labels, image, predicted"):
        predictions.read("b", "A", parts=("label",))


def test_figures_are_those_of_monai(tmp_path, folders):
    metrics = pytest.importorskip("monai.metrics")
    torch = pytest.importorskip("torch")
    metric = metrics.CalibrationErrorMetric(num_bins=20, include_background=True)
    found = []
    for case in open_predictions(*folders):
        one_hot = np.eye(3, dtype=np.float32)[case.labels]
        to_torch = [torch.from_numpy(np.moveaxis(x, -1, 0)[None].copy()) for x in (case.probs, one_hot)]
        metric(y_pred=to_torch[0], y=to_torch[1])
        stats = calib_jax.bin_statistics(case.probs[None], case.labels[None])
        found.append(np.asarray(calib_jax.expected_calibration_error(stats)))
    np.testing.assert_allclose(np.concatenate(found), metric.get_buffer().numpy(), atol=1e-6)


def test_local_calibration_sees_regions_and_images(tmp_path, capsys, monkeypatch):
    """The network works on whole cases, of which those without an image are told. Here it is not trained."""
    fitted = []

    def fit(batches, *, regions, spacing):
        fitted.extend(batches())
        key = jax.random.key(0)
        weights = network._first_weights(key, fitted[0][0].shape[-1], 3)
        weights = weights._replace(factor=jax.random.normal(key, weights.factor.shape))
        return network.LocalCalibration(weights, True, regions, spacing)

    monkeypatch.setitem(CALIBRATORS, "local", CALIBRATORS["local"]._replace(fit=fit))
    probs, ids = make_case(shape=(8, 8), sharpness=1.0)
    regions = np.stack([1 - probs[..., 0], probs[..., 2]], -1)
    save_dataset_json(tmp_path, {"background": 0, "whole": [1, 2], "core": 2})
    for folder in ("probs", "labels", "images"):
        (tmp_path / folder).mkdir()
    for name in ("a", "b", "c"):
        np.save(tmp_path / "probs" / f"{name}.npy", regions)
        np.save(tmp_path / "labels" / f"{name}.npy", ids)
        if name != "c":
            np.save(tmp_path / "images" / f"{name}.npy", ids.astype(np.float32))
    given = ["--probs", str(tmp_path / "probs"), "--dataset-json", str(tmp_path / "dataset.json")]
    given += ["--images", str(tmp_path / "images")]
    fit = ["calibrate", "fit", *given, "--labels", str(tmp_path / "labels"), "--method", "local"]
    assert main([*fit, "--out", str(tmp_path / "fit.npz")]) == 1
    assert [[x if x is None else x.shape for x in batch] for batch in fitted] == 2 * [
        [(1, 8, 8, 2), (1, 8, 8, 2), None, (1, 8, 8, 1)]
    ]
    assert "c needs an image" in capsys.readouterr().err
    (params,) = Calibration.load(tmp_path / "fit.npz").params
    assert params.regions
    assert params.keeps_labels
    apply = [
        "calibrate",
        "apply",
        *given,
        "--params",
        str(tmp_path / "fit.npz"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(apply) == 1
    assert files(tmp_path / "out") == ["a.npy", "b.npy", "dataset.json"]
    log_odds = np.log(regions / (1 - regions))[None]
    image = ids.astype(np.float32)[None, ..., None]
    expected = np.asarray(CALIBRATORS["local"].apply(log_odds, params, image=image))[0]
    np.testing.assert_allclose(np.load(tmp_path / "out" / "a.npy"), 1 / (1 + np.exp(-expected)), atol=1e-5)


# Stopped and started again.


@pytest.fixture(params=["apply", "ensemble", "convert", "sweep"])
def restarted(request, tmp_path, folders, monkeypatch, undrawn):
    """A command over three cases, arguments that change its results, the cases that it reads, and what stops it."""
    read, stops, original = [], {}, Predictions.read

    def counted(predictions, name, *args, **kwargs):
        read.append(name)
        stops.pop(name, int)()
        return original(predictions, name, *args, **kwargs)

    monkeypatch.setattr(Predictions, "read", counted)
    calibration = Calibration("temperature", ("background", "x", "y"), False, (np.float32(2),))
    calibration.save(tmp_path / "fit.npz")
    calibration._replace(params=(np.float32(3),)).save(tmp_path / "other.npz")
    probs, out = ["--probs", str(folders[0])], ["--out", str(tmp_path / "out")]
    command, other = {
        "apply": (["calibrate", "apply", *probs, f"--params={tmp_path / 'fit.npz'}"], ["--uncertainty"]),
        "ensemble": (["ensemble", f"--probs=A={folders[0]}", f"--probs=B={folders[0]}"], ["--logits"]),
        "convert": (["convert", *probs, "--to", "npz"], ["--dtype", "float16"]),
        "sweep": (["sweep", *probs, f"--labels={folders[1]}"], ["--num-bins", "7"]),
    }[request.param]
    return [*command, *out], other, read, stops


def interrupt():
    raise KeyboardInterrupt


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)  # the signal reaches the main thread


@pytest.mark.parametrize("stop", [interrupt, terminate])
def test_a_command_that_was_stopped_goes_on_where_it_was(tmp_path, restarted, stop, capsys):
    command, other, read, stops = restarted
    word = "measured" if command[0] == "sweep" else "written"
    stops["c d"] = stop
    assert main(command) == 130
    error = capsys.readouterr().err
    assert f" of 3 cases are {word}. They are kept in {tmp_path / 'out'}" in error
    assert "the same command goes on from there." in error
    assert not list((tmp_path / "out").rglob(".partial-*"))
    stops.clear()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    done = 3 if stop is terminate else 2  # the case that had begun is finished
    read.clear()
    assert main(command) == 0
    assert f"{done} of 3 cases were {word} before." in capsys.readouterr().err
    assert read == ["c d"] * (3 - done) * (1 + (command[0] == "ensemble"))
    assert {path: path.stat().st_mtime_ns for path in kept if path.name != "dataset.json"} == kept
    read.clear()
    assert main([*command, *other]) == 0
    assert set(read) == {"a", "b", "c d"}


def test_what_has_changed_is_made_again(tmp_path, folders, restarted, capsys):
    command, _, read, _ = restarted
    assert main(command) == 0
    os.utime(folders[0] / "b.npz", ns=(1, 1))
    read.clear()
    assert main(command) == 0
    assert set(read) == {"b"}
    if command[0] == "sweep":
        return
    (tmp_path / "out" / "a.npz").write_bytes(b"edited")
    (tmp_path / "out" / "c d.npz").unlink()
    (tmp_path / "out" / ".calib-jax" / "b.npz").write_bytes(b"broken")
    read.clear()
    assert main(command) == 0
    assert set(read) == {"a", "b", "c d"}
    assert len(open_predictions(tmp_path / "out", folders[1])) == 3


def test_other_parameters_are_applied_to_all_cases(tmp_path, folders):
    probs, out = f"--probs={folders[0]}", tmp_path / "out"
    written = []
    for temperature in (2, 3):
        params = Calibration("temperature", ("background", "x", "y"), False, (np.float32(temperature),))
        params.save(tmp_path / "fit.npz")
        assert main(["calibrate", "apply", probs, f"--params={tmp_path / 'fit.npz'}", f"--out={out}"]) == 0
        written.append(np.load(out / "a.npz")["probabilities"])
    assert written[0].max() > written[1].max()


def test_nothing_half_written_stays_and_no_link_is_followed(tmp_path):
    file, elsewhere = tmp_path / "case 1.nii.gz", tmp_path / "elsewhere"
    elsewhere.write_bytes(b"mine")
    with contextlib.suppress(ZeroDivisionError), replacing(file) as partial:
        assert partial.name.endswith(".nii.gz")
        partial.write_bytes(b"half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == [elsewhere]
    partial.symlink_to(elsewhere)  # what a killed process may have left, or a trap
    file.symlink_to(elsewhere)
    with replacing(file) as again:
        assert again == partial
        again.write_bytes(b"whole")
    assert file.read_bytes() == b"whole"
    assert elsewhere.read_bytes() == b"mine"
