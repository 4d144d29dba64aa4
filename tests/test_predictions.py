"""Predictions as other programs write them: read alike, or refused in one sentence that names the file."""

import json
import pickle
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_jax.predictions import PredictionError, inflate, open_predictions, write_probabilities
from calib_jax.predictions.arrays import open_array
from calib_jax.predictions.names import find_predictions

SHAPE = (7, 6, 5)
AFFINE = np.array([[1.0, 0, 0, -20], [0, 1.5, 0, 7], [0, 0, 3.0, 30], [0, 0, 0, 1]])
LPS = np.diag([-1.0, -1.0, 1.0, 1.0]) @ AFFINE
TURNED = np.array([[0, 0, 2.0, 5], [-1.0, 0, 0, 3], [0, -1.5, 0, 2], [0, 0, 0, 1]])  # axes in another order


def make_case(seed=0, shape=SHAPE, classes=3, sharpness=3.0):
    """Probabilities `[*shape, classes]` and ids of which they are nearly certain."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, classes, shape)
    logits = rng.normal(size=(*shape, classes)) + sharpness * (ids[..., None] == np.arange(classes))
    odds = np.exp(logits)
    return (odds / odds.sum(-1, keepdims=True)).astype(np.float32), ids.astype(np.uint8)


def save_nifti(path, voxels, affine=AFFINE, dtype=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels if dtype is None else voxels.astype(dtype), affine), path)


def save_nnunet(folder, name, probs, affine=AFFINE, *, key="probabilities", segmentation=True, reader="sitk"):
    """What nnU-Net's `export_prediction_from_logits` leaves: the test beside it compares with nnU-Net's own."""
    folder.mkdir(parents=True, exist_ok=True)
    voxels = np.moveaxis(probs, -1, 0)
    if reader == "ras":  # NibabelIOWithReorient
        volume = nib.as_closest_canonical(nib.Nifti1Image(probs.astype(np.float32), affine))
        voxels = np.moveaxis(np.asarray(volume.dataobj, probs.dtype), -1, 0)
    np.savez_compressed(folder / f"{name}.npz", **{key: voxels.transpose(0, 3, 2, 1)})
    (folder / f"{name}.pkl").write_bytes(pickle.dumps({"spacing": [1, 1, 1]}))
    if segmentation:
        save_nifti(folder / f"{name}.nii.gz", probs.argmax(-1).astype(np.uint8), affine)


def save_dataset_json(folder, labels, **others):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, **others}))


def read_one(*args, **kwargs):
    predictions = open_predictions(*args, **kwargs)
    return predictions.read(predictions.case_names[0])


def refuses(message, *args, **kwargs):
    """Opening or reading the first case raises one sentence."""
    with pytest.raises(PredictionError, match=message) as caught:
        read_one(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folders(tmp_path):
    """Two cases of nnU-Net and their labels."""
    for seed, name in enumerate("ab"):
        probs, ids = make_case(seed)
        save_nnunet(tmp_path / "probs", name, probs)
        save_nifti(tmp_path / "labels" / f"{name}.nii.gz", ids)
    return tmp_path / "probs", tmp_path / "labels"


# nnU-Net.


def test_predictions_of_nnunet_are_cases(folders):
    predictions = open_predictions(*folders)
    assert (predictions.models, predictions.case_names) == (("model",), ("a", "b"))
    assert predictions.class_names == ("background", "class 1", "class 2")
    assert not predictions.regions
    cases = list(predictions)
    assert len(cases) == len(predictions) == 2
    for seed, case in enumerate(cases):
        probs, ids = make_case(seed)
        np.testing.assert_array_equal(case.probs, probs)
        np.testing.assert_array_equal(case.labels, ids)
        assert case.probs.dtype == np.float32
        assert case.labels.dtype == np.int32
        assert (case.where, case.image) == (None, None)
        np.testing.assert_allclose(case.spacing, (1, 1.5, 3))


@pytest.mark.parametrize("affine", [AFFINE, LPS, TURNED])
@pytest.mark.parametrize("shape", [SHAPE, (6, 6, 6)])
@pytest.mark.parametrize("reader", ["sitk", "ras"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_axes_of_nnunet_are_found(tmp_path, shape, affine, reader, dtype):
    """Also in a cube, and where the reader turned scans to RAS order: the label map beside the file tells."""
    probs, ids = make_case(shape=shape)
    save_nnunet(tmp_path / "probs", "a", probs.astype(dtype), affine, reader=reader)
    save_nifti(tmp_path / "labels" / "a.nii.gz", ids, affine)
    case = read_one(tmp_path / "probs", tmp_path / "labels")
    np.testing.assert_array_equal(case.probs, probs.astype(dtype).astype(np.float32))


def test_a_label_in_another_orientation_is_on_the_grid_of_the_case(tmp_path):
    probs, ids = make_case()
    save_nnunet(tmp_path / "probs", "a", probs, LPS)
    turned = nib.as_closest_canonical(nib.Nifti1Image(ids, LPS))
    (tmp_path / "labels").mkdir()
    nib.save(turned, tmp_path / "labels" / "a.nii.gz")
    case = read_one(tmp_path / "probs", tmp_path / "labels")
    np.testing.assert_array_equal(case.probs, probs[::-1, ::-1])
    np.testing.assert_array_equal(case.labels, ids[::-1, ::-1])


def test_a_map_without_a_grid_beside_a_prediction_does_not_replace_the_label_s_grid(tmp_path):
    probs, ids = make_case(shape=(6, 6, 6))
    save_nnunet(tmp_path / "probs", "a", probs, segmentation=False)
    np.save(tmp_path / "probs" / "a_seg.npy", ids.transpose())
    save_nifti(tmp_path / "labels" / "a.nii.gz", ids)
    np.testing.assert_array_equal(read_one(tmp_path / "probs", tmp_path / "labels").probs, probs)


def test_classes_of_a_volume_are_counted_by_the_label_map_beside_it(tmp_path):
    probs, ids = make_case(shape=(6, 20, 20), classes=9)
    save_nifti(tmp_path / "probs" / "a_prob.nii.gz", probs)
    save_nifti(tmp_path / "probs" / "a_seg.nii.gz", ids)
    np.testing.assert_array_equal(read_one(tmp_path / "probs").probs, probs)


def test_a_negative_ignore_label_of_regions(tmp_path):
    probs, ids = make_case()
    regions = np.stack([1 - probs[..., 0], probs[..., 2]], -1)
    np.savez(tmp_path / "a.npz", probabilities=regions.transpose(3, 2, 1, 0))
    labels = ids.astype(np.int16)
    labels[0] = -100
    save_nifti(tmp_path / "labels" / "a.nii.gz", labels)
    save_dataset_json(tmp_path, {"background": 0, "whole": [1, 2], "core": 2, "ignore": -100})
    case = read_one(tmp_path / "a.npz", tmp_path / "labels")
    np.testing.assert_array_equal(case.where, labels >= 0)
    np.testing.assert_array_equal(case.labels[1:, ..., 1], ids[1:] == 2)


def test_a_tiff_in_colours_is_written_as_it_was_read(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    probs, _ = make_case(shape=(10, 12))
    stored = np.rint(255 * probs).astype(np.uint8)
    stored[..., 0] = 255 - stored[..., 1:].sum(-1)
    (tmp_path / "probs").mkdir()
    Image.fromarray(stored).save(tmp_path / "probs" / "a.tif")
    predictions = open_predictions(tmp_path / "probs")
    case = predictions.read("a")
    assert case.probs.shape == (10, 12, 3)
    template = predictions.template("a")
    write_probabilities(tmp_path / "out" / "a.tif", case.probs, template)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "a.tif")), stored)


@pytest.mark.parametrize("affine", [AFFINE, LPS])
def test_the_label_map_beside_a_prediction_is_read_on_the_grid_of_the_label(tmp_path, affine):
    """Calibrated probabilities may contradict the label map, which stays the prediction."""
    probs, ids = make_case()
    save_nnunet(tmp_path / "probs", "a", probs, affine)
    nib.save(nib.as_closest_canonical(nib.Nifti1Image(ids, affine)), tmp_path / "a.nii.gz")
    case = read_one(tmp_path / "probs", tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(case.predicted, case.probs.argmax(-1))
    save_nifti(tmp_path / "probs" / "a.nii.gz", np.full(ids.shape, 7, np.uint8), affine)
    predictions = open_predictions(tmp_path / "probs", tmp_path / "a.nii.gz")
    assert predictions.read("a").predicted is None
    assert any("predicted label map is left out" in notice for notice in predictions.notices)


def test_the_reader_in_dataset_json_decides_without_a_label_map(tmp_path):
    probs, ids = make_case()
    save_nnunet(tmp_path / "probs", "a", probs, LPS, reader="ras", segmentation=False)
    save_nifti(tmp_path / "labels" / "a.nii.gz", ids, LPS)
    labels = {"background": 0, "x": 1, "y": 2}
    save_dataset_json(tmp_path / "probs", labels, overwrite_image_reader_writer="NibabelIOWithReorient")
    np.testing.assert_array_equal(read_one(tmp_path / "probs", tmp_path / "labels").probs, probs)


def test_version_1_is_read_unless_it_is_cropped(tmp_path):
    probs, ids = make_case()
    save_nnunet(tmp_path / "probs", "a", probs, key="softmax")
    save_nifti(tmp_path / "labels" / "a.nii.gz", ids)
    np.testing.assert_array_equal(read_one(tmp_path / "probs", tmp_path / "labels").probs, probs)
    save_nnunet(tmp_path / "probs", "a", probs[1:], key="softmax", segmentation=False)
    refuses(r"a\.npz has shape .* v1 crops", tmp_path / "probs", tmp_path / "labels")


def test_logits_under_the_name_of_probabilities_are_told(tmp_path):
    probs, ids = make_case(sharpness=8.0)
    save_nnunet(tmp_path / "probs", "a", np.log(probs) + 5)
    save_nifti(tmp_path / "labels" / "a.nii.gz", ids)
    predictions = open_predictions(tmp_path / "probs", tmp_path / "labels")
    np.testing.assert_allclose(predictions.read("a").probs, probs, rtol=1e-4, atol=1e-6)
    assert any("a.npz" in notice and "taken for logits" in notice for notice in predictions.notices)
    case = read_one(tmp_path / "probs", tmp_path / "labels", logits=True)
    np.testing.assert_allclose(case.probs, probs, rtol=1e-4, atol=1e-6)


def test_dataset_json_names_classes_and_the_ignore_label(tmp_path, folders):
    probs_folder, label_folder = folders
    save_dataset_json(tmp_path, {"background": 0, "x": 1, "y": 2, "ignore": 3})  # beside the folders
    _, ids = make_case()
    ids[:2] = 3
    save_nifti(label_folder / "a.nii.gz", ids)
    predictions = open_predictions(probs_folder, label_folder)
    assert predictions.class_names == ("background", "x", "y")
    case = predictions.read("a")
    np.testing.assert_array_equal(case.where, ids != 3)
    np.testing.assert_array_equal(case.labels, np.where(ids == 3, -1, ids.astype(int)))
    assert predictions.read("b").where is None


def test_regions_are_read_as_regions(tmp_path):
    rng = np.random.default_rng(0)
    inner = rng.random(SHAPE).astype(np.float32)
    probs = np.stack([np.maximum(inner, rng.random(SHAPE).astype(np.float32)), inner], -1)
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    save_dataset_json(tmp_path / "probs", labels, regions_class_order=[1, 2])
    save_nnunet(tmp_path / "probs", "a", probs, segmentation=False)
    segmentation = np.where(probs[..., 1] > 0.5, 2, (probs[..., 0] > 0.5).astype(int))
    save_nifti(tmp_path / "probs" / "a.nii.gz", segmentation.astype(np.uint8))
    ids = rng.integers(0, 4, SHAPE).astype(np.uint8)
    save_nifti(tmp_path / "labels" / "a.nii.gz", ids)
    predictions = open_predictions(tmp_path / "probs", tmp_path / "labels")
    assert predictions.regions
    assert predictions.class_names == ("whole", "core")
    case = predictions.read("a")
    np.testing.assert_array_equal(case.probs, probs)
    np.testing.assert_array_equal(case.labels, np.stack([(ids == 1) | (ids == 2), ids == 2], -1))
    assert case.labels.dtype == bool
    np.testing.assert_array_equal(case.where, ids != 3)


def test_a_dataset_json_of_other_classes_is_ignored_and_told(tmp_path, folders):
    save_dataset_json(folders[0], {"background": 0, "x": 1})
    predictions = open_predictions(*folders)
    assert predictions.class_names == ("background", "class 1", "class 2")
    assert any("declares 2 classes and predictions have 3" in notice for notice in predictions.notices)


def test_pickles_are_never_loaded(tmp_path, folders):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    probs_folder, label_folder = folders
    (probs_folder / "a.pkl").write_bytes(pickle.dumps(Trap()))
    np.savez(probs_folder / "a.npz", probabilities=np.array([Trap()], object))
    refuses(r"a\.npz holds pickled objects", probs_folder, label_folder)
    (probs_folder / "a.npz").write_bytes(pickle.dumps(Trap()))
    refuses(r"a\.npz is truncated or corrupt", probs_folder, label_folder)
    (probs_folder / "a.npz").unlink()
    np.save(probs_folder / "a.npy", np.array([Trap()], object))
    refuses(r"a\.npy holds pickled objects", probs_folder, label_folder)
    assert not (tmp_path / "sprung").exists()


# Other programs.


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("module", ["zlib", "zlib_ng.zlib_ng"])
def test_a_changed_bit_in_npz_is_found_by_the_checksum(tmp_path, monkeypatch, save, module):
    monkeypatch.setattr(inflate, "zlib", pytest.importorskip(module))
    file = tmp_path / "a.npz"
    probs = np.random.default_rng(0).random((2, 32, 32, 32), np.float32)
    save(file, probabilities=probs)
    np.testing.assert_array_equal(open_array(file).read(), probs)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(PredictionError, match=r"a\.npz is truncated or corrupt"):
        open_array(file).read()


def test_an_array_in_npz_may_have_its_axes_reversed(tmp_path):
    probs = np.asfortranarray(np.random.default_rng(0).random((2, 3, 4, 5), np.float32))
    np.savez_compressed(tmp_path / "a.npz", probabilities=probs)
    np.testing.assert_array_equal(open_array(tmp_path / "a.npz").read(), probs)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".nrrd", ".npy", ".npz"])
@pytest.mark.parametrize("first", [True, False])
def test_the_class_axis_is_found_in_every_format(tmp_path, ending, first):
    probs, ids = make_case(classes=3)
    stored = np.moveaxis(probs, -1, 0) if first else probs
    (tmp_path / "probs").mkdir()
    file = tmp_path / "probs" / f"a_probs{ending}"
    if ending == ".npy":
        np.save(file, stored)
    elif ending == ".npz":
        np.savez(file, anything=stored)
    elif ending in (".mha", ".nrrd"):
        sitk = pytest.importorskip("SimpleITK")
        volume = sitk.GetImageFromArray(
            stored.T if first else stored.transpose(2, 1, 0, 3), isVector=not first
        )
        if not first:
            volume.SetSpacing((1.0, 1.5, 3.0))
            volume.SetOrigin((20.0, -7.0, 30.0))
            volume.SetDirection((-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0))
        sitk.WriteImage(volume, str(file))
    else:
        save_nifti(file, stored)
    save_nifti(tmp_path / "labels" / "a.nii.gz", ids)
    predictions = open_predictions(tmp_path / "probs", tmp_path / "labels")
    case = predictions.read("a")
    np.testing.assert_array_equal(case.probs, probs)
    template = predictions.template("a")
    write_probabilities(template.path_in(tmp_path / "out"), case.probs[..., ::-1], template)
    again = read_one(tmp_path / "out", tmp_path / "labels")
    np.testing.assert_array_equal(again.probs, probs[..., ::-1])
    if ending in (".nii.gz", ".nii"):
        old, new = nib.load(file), nib.load(tmp_path / "out" / file.name)
        assert (old.shape, old.get_data_dtype()) == (new.shape, new.get_data_dtype())
        np.testing.assert_array_equal(old.affine, new.affine)


@pytest.mark.parametrize("affine", [AFFINE, TURNED])
def test_a_volume_in_another_orientation_is_turned_and_written_back(tmp_path, affine):
    """MONAI writes what it resampled in RAS order with an affine that says so."""
    probs, ids = make_case()
    save_nifti(tmp_path / "labels" / "a.nii.gz", ids, affine)
    turned = nib.as_closest_canonical(nib.Nifti1Image(probs, affine))
    (tmp_path / "probs").mkdir()
    nib.save(turned, tmp_path / "probs" / "a.nii.gz")
    predictions = open_predictions(tmp_path / "probs", tmp_path / "labels")
    case = predictions.read("a")
    np.testing.assert_array_equal(case.probs, probs)
    template = predictions.template("a")
    write_probabilities(template.path_in(tmp_path / "out"), case.probs, template)
    np.testing.assert_array_equal(
        np.asarray(nib.load(tmp_path / "out" / "a.nii.gz").dataobj), np.asarray(turned.dataobj)
    )


def test_affines_that_contradict_each_other(tmp_path):
    probs, ids = make_case()
    save_nifti(tmp_path / "labels" / "a.nii.gz", ids, LPS)
    save_nifti(tmp_path / "probs" / "a.nii.gz", probs, np.eye(4))  # an affine that got lost
    predictions = open_predictions(tmp_path / "probs", tmp_path / "labels")
    np.testing.assert_array_equal(predictions.read("a").probs, probs)
    assert any("compared index by index" in notice for notice in predictions.notices)
    save_nifti(tmp_path / "probs" / "a.nii.gz", probs, AFFINE)  # flipped, and not where a flip would be
    refuses(
        r"a\.nii\.gz has an affine that differs from that of .* mm", tmp_path / "probs", tmp_path / "labels"
    )


@pytest.mark.parametrize(
    "form", ["{case}_{index}.nii.gz", "{case}_class{index}_prob.nii.gz", "{case}/{name}.nii"]
)
@pytest.mark.parametrize("background", [True, False])
def test_a_file_for_each_class(tmp_path, form, background):
    probs, ids = make_case()
    names = ("background", "Left lung", "heart")
    for index, name in list(enumerate(names))[0 if background else 1 :]:
        path = (
            tmp_path / "probs" / form.format(case="case_01", index=index, name=name.lower().replace(" ", "_"))
        )
        save_nifti(path, probs[..., index])
    save_nifti(tmp_path / "labels" / "case_01.nii.gz", ids)
    predictions = open_predictions(tmp_path / "probs", tmp_path / "labels", class_names=names)
    case = predictions.read("case_01")
    np.testing.assert_allclose(case.probs, probs, atol=0 if background else 1e-6)
    template = predictions.template("case_01")
    write_probabilities(template.path_in(tmp_path / "out"), case.probs, template)
    written = sorted(path.name for path in (tmp_path / "out").rglob("*.nii*"))
    assert written == sorted(path.name for path in (tmp_path / "probs").rglob("*.nii*"))
    again = read_one(tmp_path / "out", tmp_path / "labels", class_names=names)
    np.testing.assert_array_equal(again.probs, case.probs)


@pytest.mark.parametrize("dtype", [np.float64, np.uint8, np.uint16])
@pytest.mark.parametrize("ending", [".nii.gz", ".npy", ".png", ".tif"])
def test_one_foreground_channel(tmp_path, dtype, ending):
    is_image = ending in (".png", ".tif")
    if is_image and dtype == np.float64:
        dtype = np.float32
    if ending == ".png" and dtype == np.float32:
        pytest.skip("PNG holds integers")
    shape = SHAPE[:2] if is_image else SHAPE
    probs, ids = make_case(shape=shape, classes=2)
    scale = np.iinfo(dtype).max if np.dtype(dtype).kind == "u" else 1
    stored = np.rint(probs[..., 1] * scale).astype(dtype) if scale > 1 else probs[..., 1].astype(dtype)
    (tmp_path / "probs").mkdir()
    (tmp_path / "labels").mkdir()
    file = tmp_path / "probs" / f"a b_prob{ending}"
    if is_image:
        image = pytest.importorskip("PIL.Image")
        image.fromarray(stored).save(file)
        image.fromarray(ids * 255).save(tmp_path / "labels" / "a b.png")
    elif ending == ".npy":
        np.save(file, stored)
        np.save(tmp_path / "labels" / "a b.npy", ids)
    else:
        save_nifti(file, stored)
        save_nifti(tmp_path / "labels" / "a b_seg.nii.gz", ids)
    predictions = open_predictions(tmp_path / "probs", tmp_path / "labels")
    assert predictions.class_names == ("background", "foreground")
    case = predictions.read("a b")
    np.testing.assert_allclose(case.probs, probs, atol=0.51 / scale if scale > 1 else 1e-6)
    np.testing.assert_array_equal(case.labels, ids)
    template = predictions.template("a b")
    write_probabilities(template.path_in(tmp_path / "out"), case.probs, template)
    np.testing.assert_array_equal(read_one(tmp_path / "out", tmp_path / "labels").probs, case.probs)


@pytest.mark.parametrize("scale", [255, 100, 65535])
def test_integers_of_several_classes_have_the_scale_that_they_sum_to(tmp_path, scale):
    probs, ids = make_case()
    stored = np.rint(probs * scale).astype(np.uint16 if scale > 255 else np.uint8)
    save_nifti(tmp_path / "probs" / "a.nii.gz", stored)
    save_nifti(tmp_path / "labels" / "a.nii.gz", ids)
    case = read_one(tmp_path / "probs", tmp_path / "labels")
    np.testing.assert_allclose(case.probs, probs, atol=0.51 / scale)


def test_values_that_a_header_scales(tmp_path):
    probs, ids = make_case()
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    (tmp_path / "probs").mkdir()
    nib.save(nib.Nifti1Image(probs, AFFINE, header), tmp_path / "probs" / "a.nii.gz")
    save_nifti(tmp_path / "labels" / "a.nii.gz", ids)
    predictions = open_predictions(tmp_path / "probs", tmp_path / "labels")
    case = predictions.read("a")
    np.testing.assert_allclose(case.probs, probs, atol=1e-4)
    template = predictions.template("a")
    write_probabilities(template.path_in(tmp_path / "out"), case.probs, template)
    assert nib.load(tmp_path / "out" / "a.nii.gz").get_data_dtype() == np.int16
    np.testing.assert_allclose(read_one(tmp_path / "out", tmp_path / "labels").probs, probs, atol=1e-4)


def test_rounding_is_accepted_and_clipped(tmp_path):
    probs, ids = make_case(classes=2)
    stored = probs[..., 1].astype(np.float64)
    stored[0, 0, :2] = -2e-15, 1.0000001
    save_nifti(tmp_path / "probs" / "a.nii.gz", stored)
    save_nifti(tmp_path / "labels" / "a.nii.gz", ids)
    case = read_one(tmp_path / "probs", tmp_path / "labels")
    assert case.probs.min() >= 0
    assert case.probs.max() <= 1


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("postfix", ["trans", "seg", "prob"])
def test_what_monai_writes_is_read(tmp_path, separate, postfix):
    monai = pytest.importorskip("monai.transforms")
    data = pytest.importorskip("monai.data")
    torch = pytest.importorskip("torch")
    probs, ids = make_case()
    save_nifti(tmp_path / "labels" / "case 1.nii.gz", ids, LPS)
    tensor = data.MetaTensor(
        torch.from_numpy(np.moveaxis(probs, -1, 0).copy()),
        affine=torch.from_numpy(LPS),
        meta={"filename_or_obj": str(tmp_path / "images" / "case 1.nii.gz")},
    )
    save = monai.SaveImage(
        output_dir=tmp_path / "probs",
        output_postfix=postfix,
        separate_folder=separate,
        resample=False,
        print_log=False,
    )
    save(tensor)
    case = read_one(tmp_path / "probs", tmp_path / "labels")
    assert case.name == "case 1"
    np.testing.assert_array_equal(case.probs, probs)


def test_images_are_read_on_the_grid_of_the_label(tmp_path, folders):
    scan = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    turned = nib.as_closest_canonical(nib.Nifti1Image(scan, AFFINE)).as_reoriented(
        np.array([[1, 1], [0, -1], [2, 1]])
    )
    (tmp_path / "images").mkdir()
    nib.save(turned, tmp_path / "images" / "a_0000.nii.gz")
    predictions = open_predictions(*folders, images=tmp_path / "images")
    np.testing.assert_array_equal(predictions.read("a").image, scan)
    assert predictions.read("b").image is None
    assert any(notice.endswith("has no image of b.") for notice in predictions.notices)


def test_without_labels_the_files_themselves_say_where_they_lie(tmp_path):
    probs, _ = make_case()
    save_nnunet(tmp_path / "probs", "a", probs)
    save_nnunet(tmp_path / "probs", "b", probs, segmentation=False)
    save_nifti(tmp_path / "probs" / "c.nii.gz", probs)
    predictions = open_predictions(tmp_path / "probs")
    for name in "abc":
        case = predictions.read(name)
        np.testing.assert_array_equal(case.probs, probs)
        assert case.labels is None
    np.testing.assert_allclose(predictions.read("a").spacing, (1, 1.5, 3))


def test_logits_are_written_as_logits(tmp_path):
    probs, ids = make_case()
    save_nifti(tmp_path / "probs" / "a.nii.gz", np.log(probs) + 3)
    save_nifti(tmp_path / "labels" / "a.nii.gz", ids)
    predictions = open_predictions(tmp_path / "probs", tmp_path / "labels", logits=True)
    case, template = predictions.read("a"), predictions.template("a")
    np.testing.assert_allclose(case.probs, probs, rtol=1e-4)
    write_probabilities(template.path_in(tmp_path / "out"), case.probs, template)
    again = read_one(tmp_path / "out", tmp_path / "labels", logits=True)
    np.testing.assert_allclose(again.probs, probs, rtol=1e-4)


# Names.


@pytest.mark.parametrize(
    ("files", "cases"),
    [
        (["a.npz", "a.nii.gz", "a.pkl", "._a.npz", "dataset.json"], {"a": ("a.npz", "a.nii.gz")}),
        (["a_prob.nii.gz", "a_seg.nii.gz"], {"a": ("a_prob.nii.gz", "a_seg.nii.gz")}),
        (["a_probs.nii.gz", "a_label.nii.gz"], {"a": ("a_probs.nii.gz", "a_label.nii.gz")}),
        (["a_seg.nii.gz", "b_seg.nii.gz"], {"a": ("a_seg.nii.gz", None), "b": ("b_seg.nii.gz", None)}),
        (["a/a_trans.nii.gz", "b/probs.nii"], {"a": ("a_trans.nii.gz", None), "b": ("probs.nii", None)}),
        (["my case.softmax.npy"], {"my case": ("my case.softmax.npy", None)}),
        (
            ["case_01.npz", "case_02.npz"],
            {"case_01": ("case_01.npz", None), "case_02": ("case_02.npz", None)},
        ),
        (["a.npz", "a_uncertainty.nii.gz"], {"a": ("a.npz", None)}),
        (["a.NII.GZ", "a_Seg.nii"], {"a": ("a.NII.GZ", "a_Seg.nii")}),
    ],
)
def test_files_and_cases(tmp_path, files, cases):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    found = find_predictions(tmp_path, ()).cases
    assert {
        name: (entry.files[0].name, entry.segmentation and entry.segmentation.name)
        for name, entry in found.items()
    } == cases
    assert not any(entry.fault for entry in found.values())


def test_two_files_of_one_case_are_a_fault_of_this_case(folders):
    probs_folder, label_folder = folders
    save_nifti(probs_folder / "a_prob.nii.gz", make_case()[0])
    save_nifti(label_folder / "b_seg.nii.gz", make_case()[1])
    save_nifti(label_folder / "b_gt.nii.gz", make_case()[1])
    save_nnunet(probs_folder, "c", make_case()[0])
    save_nifti(label_folder / "c.nii.gz", make_case()[1])
    predictions = open_predictions(*folders)
    assert predictions.read("c").name == "c"
    with pytest.raises(PredictionError, match=r"a\.npz and .*a_prob\.nii\.gz are two files of one case"):
        predictions.read("a")
    with pytest.raises(
        PredictionError, match=r"b_gt\.nii\.gz and .*b_seg\.nii\.gz are two files of one case"
    ):
        predictions.read("b")


def test_what_has_no_partner_is_listed(folders):
    probs_folder, label_folder = folders
    save_nnunet(probs_folder, "alone", make_case()[0])
    save_nifti(label_folder / "other.nii.gz", make_case()[1])
    (probs_folder / "notes.txt").touch()
    (probs_folder / "._a.npz").write_bytes(b"\0\5\26\7")
    predictions = open_predictions({"A": probs_folder, "B": probs_folder}, label_folder)
    assert predictions.models == ("A", "B")
    assert predictions.case_names == ("a", "b")
    text = "\n".join(predictions.notices)
    assert f"{probs_folder} has no prediction of other." in text
    assert f"{label_folder} has no label of alone." in text
    assert "notes.txt" in text
    assert "._a" not in text


def test_folders_without_a_common_case_are_told(tmp_path, folders):
    probs_folder, _ = folders
    save_nifti(tmp_path / "others" / "z.nii.gz", make_case()[1])
    refuses(
        "has predictions of a, b, but .*others has labels of z: give all", probs_folder, tmp_path / "others"
    )
    (tmp_path / "empty").mkdir()
    refuses("empty holds no file that can be read", tmp_path / "empty")
    refuses("absent is not a folder", tmp_path / "absent")


# Faults.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda probs: np.where(probs == probs[0, 0, 0, 0], np.nan, probs), "holds 1 numbers that are NaN"),
        (lambda probs: 1.5 * probs, r"holds numbers from 0\.\d+ to 1\.\d+, but probabilities lie in"),
        (lambda probs: 100 * probs, r"holds numbers from .* divide by their largest value"),
        (lambda probs: probs - 0.01, r"holds numbers from -0\.00"),
        (lambda probs: probs / 2, r"holds classes that sum to between 0\.5 and 0\.5"),
        (lambda probs: probs[..., :2], r"has shape \(2, 5, 6, 7\), but .*: export 3 classes"),
        (lambda probs: probs[1:], r"has shape \(3, 5, 6, 6\), but .* has \(7, 6, 5\)"),
        (lambda probs: np.zeros_like(probs), "holds classes that sum to between 0 and 0"),
        (lambda probs: probs[..., None], r"has shape \(1, 3"),
    ],
)
def test_values_that_are_no_probabilities_are_told(folders, change, message):
    """The other case is read all the same."""
    broken = change(make_case()[0]).astype(np.float32)
    np.savez(folders[0] / "a.npz", probabilities=broken.T)
    predictions = open_predictions(*folders)
    with pytest.raises(PredictionError, match=rf"a\.npz {message}") as caught:
        predictions.read("a")
    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(predictions.read("b").probs, make_case(1)[0])


def test_label_maps_that_fit_nothing_are_told(folders):
    probs_folder, label_folder = folders
    _, ids = make_case()
    for voxels, message in (
        (np.where(ids == 2, 9, ids), r"a\.nii\.gz holds the label value 9 .* 3 classes"),
        (ids.astype(np.int16) - 1, r"a\.nii\.gz holds the label value -1"),
        (ids + np.float32(0.3), r"a\.nii\.gz holds the label value .*whole"),
        (ids[1:], r"a\.nii\.gz has shape \(7, 6, 5\), but .*a\.nii\.gz has \(6, 6, 5\)"),
    ):
        save_nifti(label_folder / "a.nii.gz", voxels)
        refuses(message, probs_folder, label_folder)


def test_a_label_map_is_no_probability(tmp_path):
    _, ids = make_case()
    save_nifti(tmp_path / "probs" / "a.nii.gz", ids)
    save_nifti(tmp_path / "labels" / "a.nii.gz", ids)
    refuses("as a label map does: give probabilities", tmp_path / "probs", tmp_path / "labels")
    save_nifti(tmp_path / "probs" / "a.nii.gz", (ids > 0).astype(np.float32))
    predictions = open_predictions(tmp_path / "probs", tmp_path / "labels")
    with pytest.raises(PredictionError, match="label value 2"):
        predictions.read("a")


def test_swapped_axes_contradict_the_label_map_beside_them(tmp_path):
    probs, ids = make_case(shape=(6, 6, 6))
    save_nnunet(tmp_path / "probs", "a", probs.transpose(1, 2, 0, 3), segmentation=False)
    save_nifti(tmp_path / "probs" / "a.nii.gz", probs.argmax(-1).astype(np.uint8))
    save_nifti(tmp_path / "labels" / "a.nii.gz", ids)
    refuses(
        r"a\.npz agrees with .*a\.nii\.gz on \d+% of the foreground", tmp_path / "probs", tmp_path / "labels"
    )


def test_headers_that_claim_more_than_the_file_holds(tmp_path, folders):
    """Refused before anything is allocated."""
    probs_folder, label_folder = folders
    header = b"\x93NUMPY\x01\x00v\x00" + (
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (3, 50000, 60000, 70000), }".ljust(117) + b"\n"
    )
    with zipfile.ZipFile(probs_folder / "a.npz", "w") as archive:
        archive.writestr("probabilities.npy", header + b"\0" * 100)
    refuses(r"a\.npz is truncated or corrupt, its header claims", probs_folder, label_folder)
    (probs_folder / "a.npz").unlink()
    (probs_folder / "a.npy").write_bytes(header)
    refuses(r"a\.npy is truncated or corrupt, its header claims", probs_folder, label_folder)
    (probs_folder / "a.npy").unlink()
    for ending in (".nii", ".nii.gz"):
        save_nifti(probs_folder / f"a_prob{ending}", make_case()[0])
        nifti = nib.Nifti1Header()
        nifti.set_data_dtype(np.float32)
        nifti.set_data_shape((30000, 30000, 30000, 3))
        content = nifti.binaryblock + b"\0" * 400
        import gzip

        (probs_folder / f"a_prob{ending}").write_bytes(
            gzip.compress(content) if ending.endswith("gz") else content
        )
        refuses(rf"a_prob{ending} is truncated or corrupt", probs_folder, label_folder)
        (probs_folder / f"a_prob{ending}").unlink()


@pytest.mark.parametrize(
    "name", ["a.npz", "a_prob.npy", "a_prob.nii.gz", "a_prob.nii", "a_prob.mha", "a_prob.tif"]
)
def test_whatever_happens_to_a_file_ends_in_one_sentence(tmp_path, name):
    """Bytes are flipped or cut off: the case is read, or one sentence names a file of it."""
    probs, ids = make_case(shape=(4, 3) if name.endswith("tif") else (4, 3, 2), classes=2)
    file = tmp_path / "probs" / name
    file.parent.mkdir()
    if name.endswith(("npz", "npy")):
        stored = np.moveaxis(probs, -1, 0).transpose(0, 3, 2, 1)
        np.savez_compressed(file, probabilities=stored) if name.endswith("npz") else np.save(file, stored)
    elif name.endswith("mha"):
        sitk = pytest.importorskip("SimpleITK")
        sitk.WriteImage(sitk.GetImageFromArray(probs.transpose(2, 1, 0, 3), isVector=True), str(file))
    elif name.endswith("tif"):
        pytest.importorskip("PIL.Image").fromarray(probs[..., 1]).save(file)
    else:
        save_nifti(file, probs, np.eye(4))
    if name.endswith("tif"):
        (tmp_path / "labels").mkdir()
        np.save(tmp_path / "labels" / "a.npy", ids)
    else:
        save_nifti(tmp_path / "labels" / "a.nii.gz", ids, np.eye(4))
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    faults = []
    for _ in range(60):
        content = bytearray(whole)
        if rng.random() < 0.2:
            content = content[: rng.integers(0, len(content))]
        else:
            for place in rng.integers(0, min(len(content), 500), rng.integers(1, 4)):
                content[place] = rng.integers(0, 256)
        file.write_bytes(bytes(content))
        try:
            case = read_one(tmp_path / "probs", tmp_path / "labels")
        except PredictionError as error:
            faults.append(str(error))
        else:
            assert case.probs.shape == probs.shape
            assert np.isfinite(case.probs).all()
    assert len(faults) > 5
    assert all(str(tmp_path) in fault and "\n" not in fault for fault in faults)


@settings(max_examples=40, deadline=None)
@given(st.text(min_size=1, max_size=12).filter(lambda name: "/" not in name and "\0" not in name))
def test_no_name_leads_out_of_the_output_folder(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("names")
    try:
        (folder / "probs").mkdir()
        np.save(folder / "probs" / f"{name}.npy", np.full((4, 5, 2), 0.5, np.float32))
    except (OSError, ValueError):  # no name of a file
        return
    try:
        predictions = open_predictions(folder / "probs")
    except PredictionError:
        assert name.startswith(".")  # hidden
        return
    (case,) = predictions.case_names
    template = predictions.template(case)
    path = template.path_in(folder / "out")
    assert path.parent == folder / "out"
    write_probabilities(path, predictions.read(case).probs, template)
    assert sorted(p.name for p in folder.iterdir()) == ["out", "probs"]
