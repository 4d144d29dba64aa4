"""Scans on another grid: cropped, resampled and back; trained, evaluated and predicted alike."""

import dataclasses
import json

import nibabel as nib
import numpy as np
import pytest
import scipy.ndimage

from train.config import DataConfig, DataInfo, from_json, to_json
from train.data.geometry import Geometry
from train.data.open import open_dataset
from train.errors import InputError
from train.evaluate import evaluate
from train.predict import predict_folder

SHAPE = (12, 10, 8)
AFFINE = np.array([[-1.0, 0, 0, 9], [0, 1.5, 0, -20], [0, 0, 3.0, 7], [0, 0, 0, 1]])
NUMBERS = {"0": "background", "1": "left", "2": "right"}


def blobs(seed, shape=SHAPE):
    """A smooth image with a rim of zeros, and a label of two smooth regions inside."""
    field = scipy.ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2)
    label = (field > np.quantile(field, 0.5)).astype(np.uint8) + (field > np.quantile(field, 0.8))
    image = (field * 100 + 50).astype(np.float32)
    inner = np.zeros(shape, bool)
    inner[2:-1, 1:-2, 1:-1] = True
    return np.where(inner, image, 0), np.where(inner, label, 0).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    names = ("a", "b", "c")
    for i, (name, shape) in enumerate(zip(names, (SHAPE, (13, 10, 9), SHAPE), strict=True)):
        for kind, voxels in zip(("images", "labels"), blobs(i, shape), strict=True):
            (root / f"{kind}Tr").mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(voxels, AFFINE), root / f"{kind}Tr" / f"{name}.nii.gz")
    listed = [{"image": f"imagesTr/{n}.nii.gz", "label": f"labelsTr/{n}.nii.gz"} for n in names]
    description = {"name": "Tiny", "modality": {"0": "MRI"}, "labels": NUMBERS, "training": listed}
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def open_at(folder, *spacing, **options):
    return open_dataset(f"msd:{folder}", geometry=Geometry(tuple(spacing), **options))


def test_nothing_is_done_unless_asked_for(folder):
    plain, same = open_dataset(f"msd:{folder}").load(0), open_at(folder, 1.0, 1.5, 3.0).load(0)
    assert plain.source is None
    assert not Geometry()
    np.testing.assert_array_equal(same.image, plain.image)
    np.testing.assert_array_equal(same.label, plain.label)
    np.testing.assert_allclose(same.affine, plain.affine)


def test_a_scan_is_resampled_to_the_spacing_and_covers_the_same_box(folder):
    dataset = open_at(folder, 1.5, 1.5, 1.5)
    case = dataset.load(0)
    assert case.image.shape == (8, 10, 16, 1)
    assert case.label.shape == (8, 10, 16)
    assert dataset.largest_shape == (9, 10, 18)
    np.testing.assert_allclose(nib.affines.voxel_sizes(case.affine), 1.5)
    plain = open_dataset(f"msd:{folder}").load(0)
    for corner in (np.zeros(3), np.ones(3)):
        edges = [nib.affines.apply_affine(c.affine, corner * c.label.shape - 0.5) for c in (plain, case)]
        np.testing.assert_allclose(*edges, atol=1e-9)


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_what_is_linear_in_space_stays_so(interpolation):
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    grid = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in SHAPE), indexing="ij"), -1)
    millimetres = nib.affines.apply_affine(affine, grid).astype(np.float32)
    geometry = Geometry((1.6, 1.1, 2.0), interpolation)
    placement = geometry.place(millimetres, affine)
    resampled = placement.image(millimetres, interpolation)
    places = np.stack(np.meshgrid(*(np.arange(n) for n in placement.shape), indexing="ij"), -1)
    expected = nib.affines.apply_affine(placement.affine, places)
    inner = (slice(3, -3), slice(4, -4), slice(3, -3))
    np.testing.assert_allclose(resampled[inner], expected[inner], atol=0.05)


def test_labels_there_and_back_are_nearly_the_same(folder):
    case = open_at(folder, 0.7, 0.9, 1.1).load(0)
    back = case.source.placement.back(np.eye(3, dtype=np.float32)[case.label])
    assert back.shape == (*SHAPE, 3)
    np.testing.assert_allclose(back.sum(-1), 1, atol=1e-5)
    np.testing.assert_array_equal(case.truth(3), open_dataset(f"msd:{folder}").load(0).label)
    assert (back.argmax(-1) == case.truth(3)).mean() > 0.97
    assert set(np.unique(case.label)) == {0, 1, 2}


@pytest.mark.parametrize(("margin", "shape"), [(0, (9, 7, 6)), (1, (11, 9, 8)), (9, SHAPE)])
def test_a_crop_keeps_the_foreground_and_its_margin(folder, margin, shape):
    dataset = open_at(folder, crop_margin=margin)
    case, plain = dataset.load(0), open_dataset(f"msd:{folder}").load(0)
    assert case.label.shape == shape
    assert np.count_nonzero(case.image) == np.count_nonzero(plain.image)
    back = case.source.placement.back(np.eye(3, dtype=np.float32)[case.label])
    np.testing.assert_array_equal(back.argmax(-1), plain.label)
    start = np.argwhere(plain.image[..., 0]).min(0)
    inside = np.argwhere(case.image[..., 0]).min(0)
    np.testing.assert_allclose(case.affine @ [*inside, 1], plain.affine @ [*start, 1])


def test_an_empty_scan_is_not_cropped_and_a_clipped_one_has_its_own_background():
    empty = np.zeros((4, 5, 6, 1), np.float32)
    assert Geometry(crop_margin=0).place(empty, np.eye(4)).shape == (4, 5, 6)
    scan = np.full((4, 5, 6, 1), -1.0, np.float32)
    scan[1:3, 2, 3:] = [[0.0], [1.0], [2.0]]
    assert Geometry(crop_margin=0).place(scan, np.eye(4), clipped=True).shape == (2, 1, 3)


def test_the_median_spacing_is_found_and_kept(folder):
    dataset = open_dataset(f"msd:{folder}", geometry=Geometry("median", crop_margin=1))
    np.testing.assert_allclose(dataset.geometry.spacing, (1.0, 1.5, 3.0))
    info = DataInfo.of(dataset)
    assert from_json(DataInfo, to_json(info)) == info
    config = DataConfig(spacing="median", crop_margin=1)
    assert from_json(DataConfig, to_json(config)) == config
    assert config.geometry == Geometry("median", crop_margin=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spacing": (1.0, 1.0)}, r"spacing is \(1.0, 1.0\): give three positive lengths"),
        ({"spacing": (1.0, 1.0, 0.0)}, "give three positive lengths"),
        ({"spacing": (1.0, 1.0, float("nan"))}, "give three positive lengths"),
        ({"crop_margin": -1}, "crop_margin is -1"),
    ],
)
def test_impossible_geometries_are_told(options, message):
    with pytest.raises(InputError, match=message):
        Geometry(**options)


def test_phantoms_have_no_grid_to_change():
    with pytest.raises(InputError, match="data is phantom2d: spacing, crop_margin, annotators, cache_dir"):
        open_dataset("phantom2d", geometry=Geometry((1.0, 1.0, 1.0)))


class Oracle:
    """Stands for a trained network: certain of what the image says on the grid that it is given."""

    weights = ()
    regions = ()

    def __call__(self, image):
        low, high = np.quantile(image, [0.6, 0.85])
        return np.eye(3, dtype=np.float32)[((image > low).astype(int) + (image > high))[..., 0]]


class Last(Oracle):
    """Certain of the last class everywhere."""

    def __init__(self, classes):
        self.classes = classes

    def __call__(self, image):
        certain = np.eye(self.classes, dtype=np.float32)[-1]
        return np.broadcast_to(certain, (*image.shape[:-1], self.classes))


def test_evaluation_is_on_the_files_grid(folder):
    dataset = open_at(folder, 0.5, 0.75, 1.5, crop_margin=1)
    result = evaluate("oracle", Oracle(), dataset, dataset.case_names[:2])
    voxels = [np.prod(SHAPE), 13 * 10 * 9]
    np.testing.assert_array_equal(result.stats.count.sum(-1), np.repeat(voxels, 2).reshape(2, 2))


def test_predictions_are_on_the_files_grid(folder, tmp_path, monkeypatch):
    info = DataInfo.of(open_at(folder, 0.5, 0.75, 1.5, crop_margin=1))
    plain = dataclasses.replace(info, geometry=Geometry())
    labels = {}
    for name, kept in (("fine", info), ("plain", plain)):
        monkeypatch.setattr("train.predict.load_run", lambda *_, kept=kept: (None, kept, Oracle()))
        written = predict_folder(tmp_path, folder / "imagesTr", tmp_path / name)
        volume = nib.load(written[0])
        assert volume.shape == SHAPE
        np.testing.assert_allclose(volume.affine, AFFINE)
        labels[name] = np.asarray(volume.dataobj)
    assert (labels["fine"] == labels["plain"]).mean() > 0.8


def test_ids_of_many_classes_are_written_whole(folder, tmp_path, monkeypatch):
    """Id 299 does not fit into 8 bits."""
    info = DataInfo("many", tuple(map(str, range(300))), 1, 3)
    monkeypatch.setattr("train.predict.load_run", lambda *_: (None, info, Last(300)))
    volume = nib.load(predict_folder(tmp_path, folder / "imagesTr", tmp_path / "out")[0])
    assert (np.asarray(volume.dataobj) == 299).all()


@pytest.mark.parametrize("name", ["scan.nrrd", "scan.mgz", "scan.hdr", "big.nii", "vector.nii.gz"])
def test_predictions_for_other_kinds_of_files_are_nifti_on_their_grid(folder, tmp_path, monkeypatch, name):
    info = DataInfo.of(open_dataset(f"msd:{folder}"))
    monkeypatch.setattr("train.predict.load_run", lambda *_: (None, info, Oracle()))
    voxels, images = np.asarray(nib.load(folder / "imagesTr/a.nii.gz").dataobj), tmp_path / "images"
    images.mkdir()
    match name:
        case "scan.nrrd":
            sitk = pytest.importorskip("SimpleITK")
            sitk.WriteImage(sitk.ReadImage(folder / "imagesTr/a.nii.gz"), images / name)
        case "scan.mgz":
            nib.save(nib.MGHImage(voxels, AFFINE), images / name)
        case "scan.hdr":
            nib.save(nib.Nifti1Pair(voxels, AFFINE), images / name)
        case "big.nii":
            header = nib.Nifti1Header(endianness=">")
            header.set_data_dtype(">f4")
            nib.save(nib.Nifti1Image(voxels, AFFINE, header), images / name)
        case _:
            volume = nib.Nifti1Image(voxels[..., None, None], AFFINE)
            volume.header.set_intent("vector")
            nib.save(volume, images / name)
    plain, other = (
        [nib.load(file) for file in predict_folder(tmp_path, folder, tmp_path / out)]
        for folder, out in ((folder / "imagesTr", "plain"), (images, "other"))
    )
    for expected, found in zip(plain[:2], other, strict=True):
        np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(expected.dataobj))
        np.testing.assert_allclose(found.affine, AFFINE, atol=1e-4)
        assert found.header.get_intent()[0] == "none"


def test_the_hippocampus_goes_there_and_back(hippocampus):
    dataset = open_at(hippocampus, 0.8, 1.3, 1.1)
    for index in range(3):
        case = dataset.load(index)
        back = case.source.placement.back(np.eye(3, dtype=np.float32)[case.label]).argmax(-1)
        truth = case.truth(3)
        for value in (1, 2):
            mine, true = back == value, truth == value
            assert 2 * (mine & true).sum() / (mine.sum() + true.sum()) > 0.93
