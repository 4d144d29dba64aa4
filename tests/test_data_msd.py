"""The Decathlon's layout: what is read, and one clear sentence for everything that may be wrong."""

import json
import re
from functools import partial

import nibabel as nib
import numpy as np
import pytest

from calib_jax.predictions import volumes
from train.data import Dataset
from train.data.io import read_scan
from train.data.layouts import LAYOUTS
from train.data.open import open_dataset
from train.data.preprocess import preprocess
from train.data.volumes import VolumeDataset, header_faults
from train.errors import InputError

SHAPE = (6, 5, 4)
AFFINE = np.diag([1.0, 1.5, 2.0, 1.0])


def open_msd(folder):
    return VolumeDataset(LAYOUTS["msd"](folder))


def _write(path, voxels, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)


@pytest.fixture
def folder(tmp_path):
    """Two good cases with two channels and three classes."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        _write(tmp_path / f"imagesTr/{name}.nii.gz", rng.gamma(2.0, 50.0, (*SHAPE, 2)).astype(np.float32))
        label = rng.integers(0, 3, SHAPE).astype(np.uint8)
        _write(tmp_path / f"labelsTr/{name}.nii.gz", label)
    _describe(tmp_path)
    return tmp_path


def _describe(folder, **changes):
    description = {
        "name": "Tiny",
        "modality": {"0": "T1", "1": "T2"},
        "labels": {"0": "background", "1": "left", "2": "right"},
        "training": [
            {"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in ("a", "b")
        ],
    } | changes
    kept = {key: value for key, value in description.items() if value is not None}
    (folder / "dataset.json").write_text(json.dumps(kept))


def _refuses(message, folder, *, load=False):
    """Opening (or, with `load`, only loading the first case) raises an InputError of one line."""
    action = partial(open_msd(folder).load, 0) if load else partial(open_msd, folder)
    with pytest.raises(InputError, match=message) as caught:
        action()
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_good_cases_are_read(folder):
    dataset = open_dataset(f"msd:{folder}")
    assert (dataset.name, dataset.num_channels, dataset.spatial_dims, len(dataset)) == ("Tiny", 2, 3, 2)
    assert dataset.class_names == ("background", "left", "right")
    assert dataset.case_names == ("a", "b")
    assert dataset.largest_shape == SHAPE
    assert isinstance(dataset, Dataset)
    case = dataset.load(1)
    assert case.name == "b"
    assert case.posterior is None
    assert case.image.shape == (*SHAPE, 2)
    np.testing.assert_allclose(case.image.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(case.image.std((0, 1, 2)), 1, atol=1e-5)
    np.testing.assert_array_equal(case.label, nib.load(folder / "labelsTr/b.nii.gz").dataobj)
    np.testing.assert_array_equal(case.affine, AFFINE)


def test_a_3d_image_has_one_channel_and_a_label_may_be_float(folder):
    _describe(folder, modality={"0": "MRI"}, labels={"background": 0, "left": 1, "right": 2})
    for name in ("a", "b"):
        _write(folder / f"imagesTr/{name}.nii.gz", np.ones(SHAPE, np.int16))
        _write(folder / f"labelsTr/{name}.nii.gz", np.full((*SHAPE, 1), 2.0, np.float32))
    dataset = open_msd(folder)
    assert dataset.class_names == ("background", "left", "right")
    assert dataset.load(0).image.shape == (*SHAPE, 1)
    assert (dataset.load(0).label == 2).all()


def test_an_image_alone_is_read_as_in_training(folder):
    voxels, grid = read_scan([folder / "imagesTr/a.nii.gz"])
    image, _ = preprocess(voxels, grid.affine)
    np.testing.assert_array_equal(image, open_msd(folder).load(0).image)
    np.testing.assert_array_equal(grid.affine, AFFINE)


def test_a_missing_folder_is_told(tmp_path):
    _refuses("nowhere is not a folder", tmp_path / "nowhere")


def test_a_missing_description_is_told(folder):
    (folder / "dataset.json").unlink()
    _refuses("holds no dataset.json", folder)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("[]", "holds a list"), ("\xff\xfe", "not valid JSON")]
)
def test_a_broken_description_is_told(folder, text, message):
    (folder / "dataset.json").write_bytes(text.encode("latin1"))
    _refuses(message, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": []}, 'holds an empty list under "training"'),
        ({"training": None}, 'holds nothing under "training"'),
        ({"training": ["a.nii.gz"]}, 'an entry under "training" without an image or label'),
        ({"training": [{"image": "a.nii.gz"}]}, 'an entry under "training" without an image or label'),
        ({"labels": None}, 'holds nothing under "labels"'),
        ({"labels": {"0": "background", "2": "gap"}}, "declares the labels .* without a gap"),
        ({"labels": {"whole": [1, 3], "background": 0}}, "declares the labels"),
        ({"labels": {"0": "background"}}, "declares the labels"),
        ({"modality": "MRI"}, 'holds a str under "modality"'),
        ({"modality": None}, 'holds nothing under "modality"'),
        ({"modality": {"0": "MRI"}}, 'a.nii.gz has 2 channels, but dataset.json declares 1 under "modality"'),
    ],
)
def test_a_wrong_description_is_told(folder, changes, message):
    _describe(folder, **changes)
    _refuses(message, folder)


def test_a_case_listed_twice_is_told(folder):
    entry = {"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}
    _describe(folder, training=[entry, entry])
    _refuses("lists a more than once", folder)


def test_missing_files_are_named_and_counted(folder):
    (folder / "labelsTr/a.nii.gz").unlink()
    (folder / "imagesTr/b.nii.gz").unlink()
    _refuses("labelsTr/a.nii.gz does not exist, the first of 2 files", folder)


def test_another_shape_is_told(folder):
    _write(folder / "labelsTr/a.nii.gz", np.zeros((6, 5, 3), np.uint8))
    _refuses(re.escape("labelsTr/a.nii.gz has shape (6, 5, 3), but its image has (6, 5, 4)"), folder)


def test_another_rank_is_told(folder):
    _write(folder / "imagesTr/a.nii.gz", np.zeros((6, 5), np.float32))
    _refuses(re.escape("imagesTr/a.nii.gz has shape (6, 5): give a 3-D volume"), folder)


def test_another_affine_is_told_beyond_the_tolerance(folder):
    label = np.zeros(SHAPE, np.uint8)
    _write(folder / "labelsTr/a.nii.gz", label, AFFINE + 5e-4)
    open_msd(folder)
    moved = AFFINE.copy()
    moved[0, 3] = 2.5
    _write(folder / "labelsTr/a.nii.gz", label, moved)
    _refuses("labelsTr/a.nii.gz has an affine that differs from its image's by up to 2.5 mm", folder)


@pytest.mark.parametrize("kind", ["imagesTr", "labelsTr"])
@pytest.mark.parametrize("content", [b"", b"not a gzip file", b"\x1f\x8b broken"])
def test_a_corrupt_file_is_told(folder, kind, content):
    (folder / kind / "a.nii.gz").write_bytes(content)
    _refuses(f"{kind}/a.nii.gz is truncated or corrupt", folder)


@pytest.mark.parametrize("kept", [0.9, -4])
def test_a_truncated_file_is_told_when_it_is_loaded(folder, kept):
    """The header is whole, the voxels are not (or the checksum at the end is missing)."""
    rng = np.random.default_rng(0)
    _write(folder / "imagesTr/a.nii.gz", rng.random((*SHAPE, 2)).astype(np.float32))
    file = folder / "imagesTr/a.nii.gz"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if kept > 0 else kept])
    _refuses("imagesTr/a.nii.gz is truncated or corrupt", folder, load=True)


def test_flipped_bits_are_told(folder):
    file = folder / "imagesTr/a.nii.gz"
    content = bytearray(file.read_bytes())
    content[-8] ^= 0xFF
    file.write_bytes(bytes(content))
    _refuses("imagesTr/a.nii.gz is truncated or corrupt", folder, load=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_voxels_that_are_not_finite_are_told(folder, bad):
    image = np.ones((*SHAPE, 2), np.float32)
    image[0, 0, :3] = bad
    _write(folder / "imagesTr/a.nii.gz", image)
    _refuses("imagesTr/a.nii.gz holds 6 voxels that are NaN or infinite", folder, load=True)


def test_undeclared_labels_are_told(folder):
    label = np.zeros(SHAPE, np.int16)
    label[0, 0] = [0, 1, 4, -1]
    _write(folder / "labelsTr/a.nii.gz", label)
    expected = re.escape(
        "labelsTr/a.nii.gz holds the label value -1 (found: -1, 0, 1, 4), but [0, 1, 2] are declared"
    )
    _refuses(expected, folder, load=True)


def test_an_image_in_place_of_a_label_is_told_in_one_line(folder):
    _write(folder / "labelsTr/a.nii.gz", np.arange(120, dtype=np.int16).reshape(SHAPE))
    _refuses(re.escape("value 3 (found: 0, 1, 2, 3, 4, 5, 6, 7, ...)"), folder, load=True)


def test_labels_that_are_not_whole_numbers_are_told(folder):
    _write(folder / "labelsTr/a.nii.gz", np.full(SHAPE, 0.5, np.float32))
    _refuses("labelsTr/a.nii.gz holds the label value 0.5: labels must be whole numbers", folder, load=True)


def test_voxels_of_a_strange_type_are_told(folder):
    _write(folder / "imagesTr/a.nii.gz", np.ones((*SHAPE, 2), np.complex64))
    _refuses("imagesTr/a.nii.gz has voxels of type complex64", folder)


def test_an_image_for_prediction_that_is_missing_or_no_volume_is_told(tmp_path):
    with pytest.raises(InputError, match=r"scan.nii.gz does not exist"):
        read_scan([tmp_path / "scan.nii.gz"])
    nib.save(nib.GiftiImage(), tmp_path / "scan.gii")
    with pytest.raises(InputError, match=r"scan.gii is a GiftiImage, not a volume"):
        read_scan([tmp_path / "scan.gii"])


# Lists of other tools.


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_description_may_be_in_any_encoding_of_unicode(folder, encoding):
    _describe(folder, name="Gehörgang")
    text = (folder / "dataset.json").read_text(encoding="utf-8")
    (folder / "dataset.json").write_text(text.replace("\\u00f6", "ö"), encoding=encoding)
    assert open_msd(folder).name == "Gehörgang"


def test_a_description_in_another_encoding_is_told(folder):
    (folder / "dataset.json").write_bytes('{"name": "Gehörgang"}'.encode("latin1"))
    _refuses("its text is no UTF-8 from byte 13 on, save it as UTF-8", folder)


@pytest.mark.parametrize(
    "channels",
    [{"modality": ["T1", "T2"]}, {"channel_names": {"0": "T1", "1": "T2"}}, {"channel_names": ["T1", "T2"]}],
)
def test_channels_are_named_in_several_ways(folder, channels):
    _describe(folder, **({"modality": None} | channels))
    assert open_msd(folder).num_channels == 2


def test_each_channel_may_have_a_file(folder):
    """As in MONAI's datalists of BraTS; cases with labels in other sections are held out."""
    for name in ("c", "d", "e"):
        for channel in range(2):
            _write(folder / name / f"{name}_t{channel}.nii.gz", np.full(SHAPE, channel + 1, np.int16))
        _write(folder / name / "seg.nii.gz", np.ones(SHAPE, np.uint8))

    def entry(name, root):
        images = [f"{root}{name}/{name}_t{channel}.nii.gz" for channel in range(2)]
        return {"image": images, "label": f"{root}{name}/seg.nii.gz", "fold": 0}

    _describe(
        folder,
        training=[entry("c", ""), entry("d", f"{folder}/")],
        validation=[entry("e", "")],
        test=["imagesTs/x.nii.gz", {"image": "imagesTs/y.nii.gz"}],
        testing=[entry("never published", "")],
    )
    dataset = open_msd(folder)
    assert dataset.case_names == ("c", "d", "e")
    assert dataset.held_out == ("e",)
    assert dataset.load(2).image.shape == (*SHAPE, 2)
    two = [entry("c", "")]
    two[0]["image"] *= 2
    _describe(folder, training=two)
    _refuses('c_t0.nii.gz is one of 4 images of a case, but dataset.json declares 2 under "modality"', folder)


def test_paths_of_windows_and_of_variables_are_followed(folder, monkeypatch):
    monkeypatch.setenv("HERE", str(folder))
    paths = [
        ("imagesTr\\a.nii.gz", "labelsTr\\a.nii.gz"),
        ("$HERE/imagesTr/b.nii.gz", "${HERE}/labelsTr/b.nii.gz"),
    ]
    _describe(folder, training=[{"image": image, "label": label} for image, label in paths])
    assert open_msd(folder).case_names == ("a", "b")


# Faults.


def test_all_faults_are_told_at_once_and_returned(folder):
    names = [f"case{i:02d}" for i in range(30)]
    for name in names:
        _write(folder / f"imagesTr/{name}.nii.gz", np.ones((*SHAPE, 2), np.float32))
        _write(folder / f"labelsTr/{name}.nii.gz", np.zeros(SHAPE, np.uint8))
    _describe(
        folder,
        training=[{"image": f"imagesTr/{n}.nii.gz", "label": f"labelsTr/{n}.nii.gz"} for n in names],
    )
    assert header_faults(LAYOUTS["msd"](folder)) == []
    (folder / "labelsTr/case00.nii.gz").unlink()
    (folder / "imagesTr/case03.nii.gz").write_bytes(b"broken")
    _write(folder / "labelsTr/case07.nii.gz", np.zeros((6, 5, 3), np.uint8))
    _write(folder / "imagesTr/case09.nii.gz", np.ones(SHAPE, np.float32))
    _write(folder / "labelsTr/case11.nii.gz", np.zeros(SHAPE, np.uint8), np.diag([1, 1.5, 2.5, 1]))
    found = header_faults(LAYOUTS["msd"](folder))
    assert [fault.case for fault in found] == ["case00", "case03", "case07", "case09", "case11"]
    with pytest.raises(InputError, match="the first of 5 files with faults") as caught:
        open_msd(folder)
    assert all(f"{fault.file} {fault.problem.partition(': ')[0]}" in str(caught.value) for fault in found)
    for name in names:
        (folder / f"labelsTr/{name}.nii.gz").unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"the first of 32 files with faults.*; and 12 more") as caught:
        open_msd(folder)
    assert str(caught.value).count("Tr/case") == 20


def test_each_header_is_read_once(folder, monkeypatch):
    opened, open_volume = [], volumes.open_volume
    monkeypatch.setattr(volumes, "open_volume", lambda path: opened.append(path) or open_volume(path))
    open_msd(folder)
    assert sorted(opened) == sorted([*folder.glob("imagesTr/*"), *folder.glob("labelsTr/*")])


def test_a_label_with_turned_axes_lies_on_its_image(folder):
    straight = open_msd(folder).load(0)
    file = folder / "labelsTr/a.nii.gz"
    turned = nib.load(file).as_reoriented(nib.orientations.axcodes2ornt(("P", "S", "R")))
    nib.save(nib.Nifti1Image(np.asarray(turned.dataobj), turned.affine), file)
    assert turned.shape != SHAPE
    case = open_msd(folder).load(0)
    np.testing.assert_array_equal(case.label, straight.label)
    np.testing.assert_array_equal(case.image, straight.image)


def test_a_case_is_read_anew_when_the_voxels_of_its_header_change(folder):
    for kind in ("imagesTr", "labelsTr"):
        volume = nib.load(folder / kind / "a.nii.gz")
        nib.save(nib.Nifti1Pair(np.asarray(volume.dataobj), AFFINE), folder / kind / "a.hdr")
    _describe(folder, training=[{"image": "imagesTr/a.hdr", "label": "labelsTr/a.hdr"}])
    first = open_dataset(f"msd:{folder}", cache_dir=str(folder / "cache")).load(0)
    assert first.name == "a"
    file = folder / "labelsTr/a.img"
    file.write_bytes(bytes(len(file.read_bytes())))
    again = open_dataset(f"msd:{folder}", cache_dir=str(folder / "cache")).load(0)
    assert first.label.any()
    assert not again.label.any()


def test_the_hippocampus_is_read(hippocampus):
    dataset = open_dataset(f"msd:{hippocampus}")
    assert dataset.class_names == ("background", "Anterior", "Posterior")
    assert dataset.num_channels == 1
    case = dataset.load(0)
    assert case.name == "hippocampus_001"
    assert np.all(np.array(dataset.largest_shape) >= case.label.shape)
    assert case.image.shape == (*case.label.shape, 1)
    assert set(np.unique(case.label)) == {0, 1, 2}
    assert abs(case.image[case.image != 0].mean()) < 1e-4
