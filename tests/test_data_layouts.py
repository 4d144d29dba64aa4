"""Layouts of public data sets, written small, read back, and told apart from broken ones; axes turned to RAS."""

import json
import re
import struct

import nibabel as nib
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from train.config import DataInfo
from train.data.faults import refuse
from train.data.ignore import IGNORE
from train.data.io import Grid, read_label, read_scan
from train.data.layouts import LAYOUTS
from train.data.open import open_dataset
from train.data.volumes import Entry, Layout, VolumeDataset
from train.errors import InputError
from train.evaluate import regions_of
from train.predict import check_fits, find_cases

SHAPE = (6, 5, 4)
AFFINE = np.diag([1.0, 1.5, 2.0, 1.0])


def write(path, voxels, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)


def scan(seed, channels=()):
    return np.random.default_rng(seed).gamma(2.0, 50.0, (*SHAPE, *channels)).astype(np.float32)


def labels(seed, values):
    return np.random.default_rng(seed).choice(values, SHAPE).astype(np.uint8)


def write_brats(root, modalities, separator, values, names):
    for i, name in enumerate(names):
        for j, modality in enumerate(modalities):
            write(root / name / f"{name}{separator}{modality}.nii.gz", scan(10 * i + j))
        write(root / name / f"{name}{separator}seg.nii.gz", labels(i, values))


def write_brats_2021(root):
    names = ("BraTS2021_00000", "BraTS2021_00002")
    write_brats(root, ("flair", "t1", "t1ce", "t2"), "_", (0, 1, 2, 4), names)


def write_brats_2023(root):
    names = ("BraTS-GLI-00000-000", "BraTS-GLI-00002-000")
    write_brats(root, ("t2f", "t1n", "t1c", "t2w"), "-", (0, 1, 2, 3), names)


def write_nnunet(root, label_names=None):
    for name in ("liver_001", "liver_002"):
        for channel in range(2):
            write(root / "imagesTr" / f"{name}_{channel:04d}.nii.gz", scan(channel))
        write(root / "labelsTr" / f"{name}.nii.gz", labels(0, (0, 1, 2)))
    description = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": label_names or {"background": 0, "liver": 1, "lesion": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description))


def write_acdc(root):
    for patient in ("patient001", "patient002"):
        write(root / "training" / patient / f"{patient}_4d.nii.gz", scan(0, (3,)))
        for frame in ("01", "12"):
            write(root / "training" / patient / f"{patient}_frame{frame}.nii.gz", scan(1))
            write(root / "training" / patient / f"{patient}_frame{frame}_gt.nii.gz", labels(1, range(4)))


def write_amos(root, numbers=(1, 4)):
    names = [f"amos_{number:04d}" for number in numbers]
    for name in names:
        write(root / "imagesTr" / f"{name}.nii.gz", scan(2) - 500)
        write(root / "labelsTr" / f"{name}.nii.gz", labels(2, range(3)))
    description = {
        "name": "AMOS",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "spleen", "2": "right kidney"},
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
    }
    (root / "dataset.json").write_text(json.dumps(description))


def write_kits(root):
    for case in ("case_00000", "case_00001"):
        write(root / "dataset" / case / "imaging.nii.gz", scan(3) - 100)
        write(root / "dataset" / case / "segmentation.nii.gz", labels(3, range(4)))


# Layout: how to write it, number of cases, channels and classes, names of regions.
WRITTEN = {
    "brats 2021": ("brats", write_brats_2021, 2, 4, 4, ("enhancing tumour", "tumour core", "whole tumour")),
    "brats 2023": ("brats", write_brats_2023, 2, 4, 4, ("enhancing tumour", "tumour core", "whole tumour")),
    "nnunet": ("nnunet", write_nnunet, 2, 2, 3, ()),
    "acdc": ("acdc", write_acdc, 4, 1, 4, ()),
    "amos": ("amos", write_amos, 2, 1, 3, ()),
    "kits": ("kits", write_kits, 2, 1, 4, ("kidney and masses", "masses", "tumour")),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_every_layout_is_read(name, tmp_path):
    layout, write_folder, cases, channels, classes, regions = WRITTEN[name]
    write_folder(tmp_path)
    dataset = open_dataset(f"{layout}:{tmp_path}")
    assert (len(dataset), dataset.num_channels, len(dataset.class_names)) == (cases, channels, classes)
    assert tuple(dataset.regions) == regions
    assert len(set(dataset.case_names)) == cases
    for index in range(cases):
        case = dataset.load(index)
        assert case.image.shape == (*SHAPE, channels)
        assert case.label.shape == SHAPE
        assert set(np.unique(case.label)) == set(range(classes))
        np.testing.assert_allclose(case.image.mean((0, 1, 2)), 0, atol=1e-5)
        np.testing.assert_allclose(case.image.std((0, 1, 2)), 1, atol=1e-5)


def test_scans_of_one_subject_are_known_as_such(tmp_path):
    write_acdc(tmp_path / "acdc")
    assert open_dataset(f"acdc:{tmp_path / 'acdc'}").subjects == ("patient001",) * 2 + ("patient002",) * 2
    visits = ("BraTS-GLI-00000-000", "BraTS-GLI-00000-001")
    write_brats(tmp_path / "b", ("t2f", "t1n", "t1c", "t2w"), "-", (0, 1, 2, 3), visits)
    assert open_dataset(f"brats:{tmp_path / 'b'}").subjects == ("BraTS-GLI-00000",) * 2
    write_brats_2021(tmp_path / "c")
    dataset = open_dataset(f"brats:{tmp_path / 'c'}")
    assert dataset.subjects == dataset.case_names


def test_an_expression_finds_subjects_in_the_names(tmp_path):
    write_acdc(tmp_path)
    assert open_dataset(f"acdc:{tmp_path}", subjects="frame[0-9]+").subjects == ("frame01", "frame12") * 2
    for pattern, message in (
        ("x", r"--subjects 'x' finds no subject in the name of the case 'patient001_frame01'"),
        ("patient", r"--subjects 'patient' finds 'patient' in the names of all 4 cases: give an"),
        ("(", r"--subjects '\(' is no regular expression: missing \)"),
    ):
        with pytest.raises(InputError, match=message):
            open_dataset(f"acdc:{tmp_path}", subjects=pattern)


def test_the_four_of_brats_2021_is_enhancing_tumour(tmp_path):
    write_brats_2021(tmp_path)
    dataset = VolumeDataset(LAYOUTS["brats"](tmp_path))
    stored = nib.load(tmp_path / "BraTS2021_00000" / "BraTS2021_00000_seg.nii.gz").get_fdata()
    np.testing.assert_array_equal(dataset.load(0).label == 3, stored == 4)
    assert dataset.class_names[3] == "enhancing tumour"
    assert dataset.regions["whole tumour"] == (1, 2, 3)


def test_modalities_of_both_years_come_in_one_order(tmp_path):
    write_brats_2021(tmp_path / "a")
    write_brats_2023(tmp_path / "b")
    first, second = (open_dataset(f"brats:{tmp_path / year}").load(0).image for year in "ab")
    np.testing.assert_array_equal(first, second)


def test_regions_of_nnunet(tmp_path):
    write_nnunet(tmp_path, {"background": 0, "whole": [1, 2], "core": [2]})
    dataset = open_dataset(f"nnunet:{tmp_path}")
    assert dataset.class_names == ("background", "label 1", "label 2")
    assert dataset.regions == {"whole": (1, 2), "core": (2,)}


# What "labels" of dataset.json may say.


def declared(folder, label_names):
    description = {"channel_names": {"0": "T1"}, "labels": label_names, "file_ending": ".nii.gz"}
    text = label_names if isinstance(label_names, str) else json.dumps(description)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(text)
    write(folder / "imagesTr" / "a_0000.nii.gz", scan(0))
    write(folder / "labelsTr" / "a.nii.gz", labels(0, (0, 1)))
    return open_dataset(f"nnunet:{folder}")


def test_a_region_of_one_number_is_evaluated_beside_the_others(tmp_path):
    dataset = declared(tmp_path, {"background": [0], "whole": [1, 2, 3], "core": [3, 2], "enhancing": 3})
    assert regions_of(dataset)[1] == ("whole", "core", "enhancing")
    assert dataset.regions == {"whole": (1, 2, 3), "core": (3, 2), "enhancing": (3,)}
    assert dataset.class_names == ("background", "label 1", "label 2", "enhancing")


def written(number, form):
    """A whole number as JSON may hold it."""
    return {"int": number, "float": float(number), "text": str(number), "list": [number]}[form]


FORMS = st.sampled_from(["int", "float", "text", "list"])


@settings(max_examples=20, deadline=None)
@given(
    data=st.data(), classes=st.integers(2, 5), ignored=st.none() | st.integers(-3, 300), order=st.randoms()
)
def test_numbers_are_read_in_every_form(tmp_path_factory, data, classes, ignored, order):
    """Regions of random classes, single or nested, each number as an integer, a float, text or a list of one."""
    groups = st.lists(st.integers(1, classes), min_size=1, max_size=4)
    regions = {f"r{i}": numbers for i, numbers in enumerate(data.draw(st.lists(groups, max_size=3)))}
    regions["whole"] = list(range(1, classes + 1))
    said = {name: [written(n, data.draw(FORMS)) for n in numbers] for name, numbers in regions.items()}
    said["bg"] = written(0, data.draw(FORMS))
    if ignored is not None:
        said["ignore"] = written(ignored, data.draw(FORMS))
    items = list(said.items())
    order.shuffle(items)
    folder = tmp_path_factory.mktemp("data")
    if ignored is not None and 0 <= ignored <= classes:
        with pytest.raises(InputError, match="give each a number of its own"):
            declared(folder, dict(items))
        return
    dataset = declared(folder, dict(items))
    assert dataset.regions == {name: tuple(dict.fromkeys(numbers)) for name, numbers in regions.items()}
    assert dataset.class_names == ("bg", *(f"label {n}" for n in range(1, classes + 1)))
    assert dataset.layout.ignore_values == (() if ignored is None else (ignored,))


@pytest.mark.parametrize(
    ("label_names", "message"),
    [
        ({"background": 0, "x": True}, "declares the label 'x' as true: give a whole number"),
        ({"background": 0, "x": 1.5}, "declares the label 'x' as 1.5: give a whole number"),
        ({"background": 0, "x": float("nan")}, "declares the label 'x' as NaN: give a whole number"),
        ({"background": 0, "x": None}, "declares the label 'x' as null: give a whole number"),
        ({"background": 0, "x": []}, r"declares the label 'x' as \[\]: give a whole number"),
        ({"background": 0, "x": [1, []]}, "declares the label 'x' as"),
        ({"background": 0, "x": {"y": 1}}, "declares the label 'x' as"),
        ({"background": 0, "x": "one"}, "declares the label 'x' as \"one\": give a whole number"),
        ({"background": 0, "x": "9" * 5000}, "declares the label 'x' as"),
        ({"background": 0, "x": 1, "y": 1}, "give each a number of its own"),
        ({"background": 0, "x": 1, "ignore": 1}, "give each a number of its own"),
        ({"background": 0, "x": [1, 2], "ignore": 2}, "give each a number of its own"),
        ({"ignore": 0, "x": 1}, "give 0 for the background"),
        ({"background": 0, "x": 1, "ignore": 2, "y": 3}, "without a gap, and any other number for ignore"),
        ({"background": 0, "ignore": 1}, "give 0 for the background"),
        ({"background": 0, "x": [1, 3], "y": 3}, "without a gap"),
        (
            {"background": 0, "x": 1, "ignore": 70000},
            "label value 70000: give whole numbers from -32768 to 65535",
        ),
        ({"background": 0, **{f"c{i}": i for i in range(1, 256)}}, "declares 256 classes: at most 255"),
        ({"0": "background", "1": "x", "2": "x"}, "names two classes 'x'"),
        ('{"labels": {"background": 0, "x": 1, "x": 2}}', "gives 'x' twice, as 1 and as 2: keep one"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(label_names, message, tmp_path):
    with pytest.raises(InputError, match=message):
        declared(tmp_path, label_names)


def test_255_classes_are_told_apart_and_one_ignored(tmp_path):
    values = np.array([0, 1, 254, 300], np.uint16)[np.arange(120).reshape(SHAPE) % 4]
    names = {"background": 0, **{f"c{i}": i for i in range(1, 255)}, "ignore": 300}
    declared(tmp_path, names)
    write(tmp_path / "labelsTr" / "a.nii.gz", values)
    label = open_dataset(f"nnunet:{tmp_path}").load(0).label
    np.testing.assert_array_equal(label, np.where(values == 300, IGNORE, values))


@settings(max_examples=20, deadline=None)
@given(data=st.data(), slope=st.sampled_from([1, 0.1, 3]), order=st.sampled_from("<>"))
def test_label_values_are_exact_in_every_type(tmp_path_factory, data, slope, order):
    """Integers and floats of both byte orders, scaled by the header or not; what is not declared is named."""
    kind = np.dtype(data.draw(st.sampled_from(["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])))
    info = np.iinfo(kind if kind.kind in "iu" else "i4")
    raws = st.integers(int(max(info.min, -(2**15) / slope)), int(min(info.max, 2**16 / slope) - 1))
    step = 1 if slope > 0.5 else 10
    raw = np.array(data.draw(st.lists(raws.map(lambda x: x // step * step), min_size=3, unique=True)))
    raw = raw[(raw >= info.min) & (raw * slope >= -(2**15))]
    assume(raw.size >= 2)
    values = [round(value) for value in raw * slope]
    places = np.arange(120).reshape(SHAPE) % raw.size
    file = tmp_path_factory.mktemp("data") / "label.nii"
    header = nib.Nifti1Header(endianness=order)
    nib.save(nib.Nifti1Image(raw[places].astype(kind), AFFINE, header, dtype=kind), file)
    content = bytearray(file.read_bytes())
    content[112:116] = struct.pack(f"{order}f", slope)  # scl_slope
    file.write_bytes(content)
    np.testing.assert_array_equal(read_label(file, values), np.array(values)[places])
    found = re.escape(f"label.nii holds the label value {values[-1]} (found")
    with pytest.raises(InputError, match=found):
        read_label(file, values[:-1])


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (np.float32(1.01), "holds the label value 1.01: labels must be whole numbers"),
        (np.float64(0.5), "holds the label value 0.5: labels must be whole numbers"),
        (np.float64("nan"), "holds 120 voxels that are NaN or infinite"),
        (np.float64(1e300), "holds 120 voxels that are NaN or infinite"),
        (np.int64(2**62), r"holds the label value 46116860184\d+ .*declared"),
        (np.int64(2**32 + 1), r"holds the label value 4294967296 .*declared"),
        (np.uint16(257), "holds the label value 257 .*declared"),
        (np.int16(-255), "holds the label value -255 .*declared"),
    ],
)
def test_other_values_never_become_classes(stored, message, tmp_path):
    nib.save(nib.Nifti1Image(np.full(SHAPE, stored), AFFINE, dtype=stored.dtype), tmp_path / "label.nii.gz")
    with pytest.raises(InputError, match=f"label.nii.gz {message}"):
        read_label(tmp_path / "label.nii.gz", (0, 1, 2))


def test_labels_a_rounding_away_from_whole_numbers_are_those(tmp_path):
    near = np.resize(np.array([0.0, 0.9999999, 2.0000002, 0.9995, -1e-7]), SHAPE)
    for dtype in (np.float32, np.float64):
        write(tmp_path / "label.nii.gz", near.astype(dtype))
        np.testing.assert_array_equal(read_label(tmp_path / "label.nii.gz", (0, 1, 2)), np.rint(near))


def a_layout(folder, **changes):
    write(folder / "image.nii.gz", scan(0))
    write(folder / "label.nii.gz", np.resize(np.array([0, 1035, 2], np.int16), SHAPE))
    entry = Entry("a", (folder / "image.nii.gz",), (folder / "label.nii.gz",))
    return Layout("Tiny", folder, ("background", "x", "y"), 1, (entry,), **changes)


def test_label_values_of_a_layout_may_be_large(tmp_path):
    dataset = VolumeDataset(a_layout(tmp_path, label_values=(0, 2, 1035)))
    np.testing.assert_array_equal(dataset.load(0).label, np.resize([0, 2, 1], SHAPE))
    dataset = VolumeDataset(a_layout(tmp_path, label_values=(0, 2, 7), ignore_values=(1035, -1)))
    np.testing.assert_array_equal(dataset.load(0).label, np.resize([0, IGNORE, 1], SHAPE))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_values": (0, 1)}, "give each class a value of its own"),
        ({"label_values": (0, 1, 1)}, "give each class a value of its own"),
        ({"ignore_values": (2,)}, "give each class a value of its own"),
        ({"label_values": (0, 1, 2**16)}, "declares the label value 65536"),
        ({"regions": {"r": ()}}, r"makes the region 'r' of the classes \[\]"),
        (
            {"regions": {"r": (1, 3)}},
            r"makes the region 'r' of the classes \[1, 3\]: give different ones, 0 to 2",
        ),
        ({"regions": {"r": (1, 1)}}, r"makes the region 'r' of the classes \[1, 1\]"),
    ],
)
def test_a_layout_whose_labels_cannot_be_told_apart_is_refused(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        VolumeDataset(a_layout(tmp_path, **changes))


def test_ct_is_cut_off_to_soft_tissue_and_mri_of_amos_is_not(tmp_path):
    write_amos(tmp_path / "ct")
    write_amos(tmp_path / "mri", numbers=(507, 540))
    ct, mri = (open_dataset(f"amos:{tmp_path / kind}") for kind in ("ct", "mri"))
    assert ct.layout.intensity_range == (-200.0, 300.0)
    assert mri.layout.intensity_range is None
    assert (ct.load(0).image == ct.load(0).image.min()).sum() > (scan(2) < 250).sum()


def test_whatever_is_missing_is_told(tmp_path):
    for layout in LAYOUTS:
        with pytest.raises(InputError, match="is not a folder"):
            open_dataset(f"{layout}:{tmp_path / 'nowhere'}")
        (tmp_path / layout).mkdir()
        with pytest.raises(InputError, match="holds no"):
            open_dataset(f"{layout}:{tmp_path / layout}")
    with pytest.raises(
        InputError, match="LAYOUT:PATH with one of msd, nnunet, brats, acdc, amos, amos-ct, kits"
    ):
        open_dataset(f"bids:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("brats 2021", "BraTS2021_00002/BraTS2021_00002_t1ce.nii.gz", "t1ce.nii.gz does not exist"),
        ("brats 2023", "BraTS-GLI-00000-000/BraTS-GLI-00000-000-t2f.nii.gz", "t2f.nii.gz does not exist"),
        ("nnunet", "imagesTr/liver_002_0001.nii.gz", "liver_002_0001.nii.gz does not exist"),
        ("acdc", "training/patient001/patient001_frame01.nii.gz", "frame01.nii.gz does not exist"),
        ("kits", "dataset/case_00001/imaging.nii.gz", "imaging.nii.gz does not exist"),
    ],
)
def test_a_missing_file_of_a_case_is_told(name, file, message, tmp_path):
    layout, write_folder, *_ = WRITTEN[name]
    write_folder(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(InputError, match=message):
        open_dataset(f"{layout}:{tmp_path}")


def test_a_modality_on_another_grid_is_told(tmp_path):
    write_brats_2021(tmp_path)
    name = "BraTS2021_00000"
    write(tmp_path / name / f"{name}_t2.nii.gz", np.ones((6, 5, 5), np.float32))
    with pytest.raises(InputError, match=r"_t2.nii.gz has shape \(6, 5, 5\), but its image has \(6, 5, 4\)"):
        open_dataset(f"brats:{tmp_path}")


def test_a_label_that_the_layout_does_not_know_is_told(tmp_path):
    write_brats_2021(tmp_path)
    name = "BraTS2021_00000"
    write(tmp_path / name / f"{name}_seg.nii.gz", np.full(SHAPE, 3, np.uint8))
    with pytest.raises(
        InputError, match=r"_seg.nii.gz holds the label value 3 .* \[0, 1, 2, 4\] are declared"
    ):
        open_dataset(f"brats:{tmp_path}").load(0)


@pytest.mark.parametrize("name", WRITTEN)
def test_broken_files_are_named_in_every_layout(name, tmp_path):
    """A truncated image and a label value that no data set has."""
    layout, write_folder, *_ = WRITTEN[name]
    write_folder(tmp_path)
    dataset = open_dataset(f"{layout}:{tmp_path}")
    assert isinstance(dataset, VolumeDataset)
    first, second = dataset.layout.entries[:2]
    image, label = first.images[-1], second.labels[0]
    image.write_bytes(image.read_bytes()[:-40])
    with pytest.raises(InputError, match=re.escape(image.name)):
        dataset.load(0)
    write(label, np.full(SHAPE, 77, np.uint8))
    with pytest.raises(InputError, match=rf"{re.escape(label.name)} holds the label value 77"):
        dataset.load(1)


@pytest.mark.parametrize("ending", [".nii", ".NII.GZ", ".mgz", ".nrrd"])
@pytest.mark.parametrize("name", WRITTEN)
def test_files_of_every_layout_may_have_other_endings(name, ending, tmp_path):
    layout, write_folder, *_ = WRITTEN[name]
    write_folder(tmp_path)
    straight = open_dataset(f"{layout}:{tmp_path}")
    case = straight.load(0)
    for file in sorted(tmp_path.rglob("*.nii.gz")):
        volume = nib.load(file)
        other = str(file).replace(".nii.gz", ending)
        if ending == ".nrrd":
            sitk = pytest.importorskip("SimpleITK")
            sitk.WriteImage(sitk.ReadImage(file), other)
        else:
            kind = nib.MGHImage if ending == ".mgz" else nib.Nifti1Image
            nib.save(kind(np.asarray(volume.dataobj), volume.affine), other)
        file.unlink()
    if (tmp_path / "dataset.json").exists():
        text = (tmp_path / "dataset.json").read_text()
        (tmp_path / "dataset.json").write_text(text.replace(".nii.gz", ending))
    dataset = open_dataset(f"{layout}:{tmp_path}")
    assert dataset.case_names == straight.case_names
    np.testing.assert_array_equal(dataset.load(0).label, case.label)
    np.testing.assert_allclose(dataset.load(0).image, case.image, atol=1e-5)


@pytest.mark.parametrize("name", WRITTEN)
def test_hidden_files_change_no_layout(name, tmp_path):
    layout, write_folder, *_ = WRITTEN[name]
    write_folder(tmp_path)
    before = open_dataset(f"{layout}:{tmp_path}").case_names
    for file in list(tmp_path.rglob("*.nii.gz")):
        file.with_name(f"._{file.name}").write_bytes(b"\0\5\26\7\0\2\0\0")
        hidden = file.parent.with_name(f".{file.parent.name}")
        hidden.mkdir(exist_ok=True)
        (hidden / file.name).write_bytes(b"")
    assert open_dataset(f"{layout}:{tmp_path}").case_names == before


def test_image_and_label_may_have_different_endings(tmp_path):
    write_nnunet(tmp_path)
    for file in tmp_path.glob("imagesTr/*_0001.nii.gz"):
        nib.save(nib.load(file), str(file).removesuffix(".gz"))
        file.unlink()
    assert open_dataset(f"nnunet:{tmp_path}").load(0).image.shape == (*SHAPE, 2)


def test_the_cavity_of_treated_gliomas_is_a_class_where_there_are_some(tmp_path):
    modalities = ("t2f", "t1n", "t1c", "t2w")
    write_brats(tmp_path, modalities, "-", (0, 1, 2, 3), ("BraTS-GLI-00000-000", "BraTS-GLI-00000-001"))
    dataset = open_dataset(f"brats:{tmp_path}")
    assert len(dataset.class_names) == 4
    assert "resection cavity" not in dataset.regions
    write_brats(tmp_path, modalities, "-", (0, 1, 2, 3, 4), ("BraTS-GLI-00005-100", "BraTS-GLI-00005-101"))
    dataset = open_dataset(f"brats:{tmp_path}")
    assert dataset.class_names[3:] == ("enhancing tumour", "resection cavity")
    assert dataset.regions["resection cavity"] == (4,)
    assert dataset.regions["whole tumour"] == (1, 2, 3)
    assert dataset.subjects[-1] == "BraTS-GLI-00005"
    assert set(np.unique(dataset.load(3).label)) == set(range(5))


def test_scans_of_brats_without_a_label_are_told(tmp_path):
    write_brats_2021(tmp_path)
    (tmp_path / "BraTS2021_00002" / "BraTS2021_00002_seg.nii.gz").unlink()
    with pytest.raises(InputError, match=r"BraTS2021_00002/BraTS2021_00002_seg.nii.gz does not exist"):
        open_dataset(f"brats:{tmp_path}")
    segm = tmp_path / "BraTS2021_00002" / "W39_1998.09.19_Segm.nii"  # as one of 2020 is called
    write(segm, labels(0, (0, 1, 2, 4)))
    assert open_dataset(f"brats:{tmp_path}").case_names == ("BraTS2021_00000", "BraTS2021_00002")


def test_nnunet_lists_files_anywhere(tmp_path):
    write_nnunet(tmp_path)
    expected = open_dataset(f"nnunet:{tmp_path}").load(0)
    description = json.loads((tmp_path / "dataset.json").read_text())
    raw = tmp_path / "raw"
    (tmp_path / "imagesTr").rename(raw)
    images = [f"raw/liver_001_{channel:04d}.nii.gz" for channel in range(2)]
    listed = {
        "one": {"images": images, "label": "labelsTr/liver_001.nii.gz"},
        "two": {"images": [f"{tmp_path}/{image}" for image in images], "label": "labelsTr/liver_002.nii.gz"},
    }
    (tmp_path / "dataset.json").write_text(json.dumps({**description, "dataset": listed}))
    dataset = open_dataset(f"nnunet:{tmp_path}")
    assert dataset.case_names == ("one", "two")
    np.testing.assert_array_equal(dataset.load(0).image, expected.image)
    del listed["two"]["images"]
    (tmp_path / "dataset.json").write_text(json.dumps({**description, "dataset": listed}))
    with pytest.raises(InputError, match=r"an entry under \"dataset\" without images or label"):
        open_dataset(f"nnunet:{tmp_path}")


def test_a_file_ending_of_no_volume_is_told(tmp_path):
    write_nnunet(tmp_path)
    text = (tmp_path / "dataset.json").read_text()
    (tmp_path / "dataset.json").write_text(text.replace(".nii.gz", ".npy"))
    with pytest.raises(InputError, match=r'has the "file_ending" .npy: volumes of .nii.gz'):
        open_dataset(f"nnunet:{tmp_path}")


# Axes.

ORIENTATIONS = ["RAS", "LPS", "PIR", "SLA"]


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_a_volume_in_any_order_of_axes_is_the_same_case(codes, tmp_path):
    write_nnunet(tmp_path)
    straight = open_dataset(f"nnunet:{tmp_path}").load(0)
    turn = nib.orientations.axcodes2ornt(tuple(codes))
    for file in [*tmp_path.glob("imagesTr/liver_001*"), *tmp_path.glob("labelsTr/liver_001*")]:
        volume = nib.load(file)
        change = nib.orientations.ornt_transform(nib.io_orientation(volume.affine), turn)
        turned = volume.as_reoriented(change)
        nib.save(nib.Nifti1Image(np.asarray(turned.dataobj), turned.affine), file)
        assert "".join(nib.aff2axcodes(nib.load(file).affine)) == codes
    dataset = open_dataset(f"nnunet:{tmp_path}")
    case = dataset.load(0)
    assert dataset.largest_shape == SHAPE
    np.testing.assert_allclose(case.image, straight.image, atol=1e-6)
    np.testing.assert_array_equal(case.label, straight.label)
    np.testing.assert_allclose(case.affine, straight.affine, atol=1e-6)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_an_array_in_ras_order_goes_back_to_the_files_axes(codes, tmp_path):
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(tuple(codes))
    )
    volume = nib.Nifti1Image(scan(0), AFFINE).as_reoriented(turn)
    nib.save(nib.Nifti1Image(np.asarray(volume.dataobj), volume.affine), tmp_path / "scan.nii.gz")
    image, grid = read_scan([tmp_path / "scan.nii.gz"])
    assert image.shape == (*SHAPE, 1) == (*grid.shape, 1)
    stored = np.asarray(volume.dataobj)
    assert isinstance(grid, Grid)
    np.testing.assert_array_equal(grid.to_file(grid.to_ras(stored)), stored)
    np.testing.assert_allclose(grid.affine, AFFINE, atol=1e-6)


def test_cases_to_predict_may_have_a_file_for_each_channel(tmp_path):
    write_nnunet(tmp_path)
    info = DataInfo("Tiny", ("background", "liver"), 2, 3)
    cases, _ = find_cases(tmp_path / "imagesTr", info)
    assert list(cases) == ["liver_001", "liver_002"]
    assert [file.name for file in cases["liver_001"]] == ["liver_001_0000.nii.gz", "liver_001_0001.nii.gz"]
    write(tmp_path / "imagesTr" / "liver_002_0001.nii.gz", np.ones((6, 5, 5), np.float32))
    with pytest.raises(InputError, match=r"liver_002_0001.nii.gz has shape \(6, 5, 5\).*share a grid"):
        check_fits(cases["liver_002"], info)
    (tmp_path / "imagesTr" / "liver_002_0001.nii.gz").unlink()
    with pytest.raises(InputError, match="has 1 channels, the network was trained on 2"):
        refuse(find_cases(tmp_path / "imagesTr", info)[1])
