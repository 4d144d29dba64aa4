"""What belongs to one case, and what it is called, from the names of files alone."""

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import DataInfo
from train.data.faults import refuse
from train.data.names import name_cases
from train.errors import InputError
from train.predict import find_cases, group_channels

MODALITIES = ("flair", "t1", "t1ce", "t2")
PARTS = st.text("abA01.-_", min_size=1, max_size=4).filter(lambda text: text.strip("-_. ") != "")
PATHS = st.lists(PARTS, min_size=1, max_size=4).map(lambda parts: Path(*parts[:-1], f"{parts[-1]}.nii.gz"))


def save(path, shape=(4, 4, 4), affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.ones(shape, np.float32), np.eye(4) if affine is None else affine), path)


def info(channels):
    return DataInfo("Tiny", ("background", "a"), channels, 3)


# Names of cases that a list of files has.


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["imagesTr/a.nii.gz", "imagesTr/b.nii.gz"], ["a", "b"]),
        (["one/t1.nii.gz", "two/t1.nii.gz"], ["one", "two"]),
        (["one/mri/t1.nii.gz", "two/mri/t1.nii.gz"], ["one", "two"]),
        (["p1/day1/t1.nii", "p1/day2/t1.nii", "p2/day1/t1.nii"], ["p1_day1", "p1_day2", "p2_day1"]),
        (["tr/a/t1.nii", "va/a/t1.nii"], ["tr", "va"]),
        (["/data/x/a.mha", "/data/y/a.mha"], ["x", "y"]),
        (["a.nii"], ["a"]),
        ([], []),
    ],
)
def test_a_case_is_called_by_what_tells_it_apart(paths, names):
    assert name_cases([[Path(path)] for path in paths]) == names


@pytest.mark.parametrize(
    "form",
    [
        "{case}/{case}_{modality}.nii.gz",
        "{case}-{modality}.nii",
        "{case}/{modality}.nii.gz",
        "{modality}/{case}.nii",
    ],
)
@pytest.mark.parametrize("cases", [("BraTS2021_00000", "BraTS2021_00001"), ("BraTS-GLI-00005-100", "x")])
def test_a_case_of_several_images_is_called_by_what_they_share(form, cases):
    listed = [[Path(form.format(case=case, modality=modality)) for modality in MODALITIES] for case in cases]
    assert name_cases(listed) == list(cases)


def test_channels_of_nnunet_are_no_part_of_the_name():
    assert name_cases([[Path(f"{case}_{channel:04d}.nii.gz") for channel in range(2)] for case in "ab"]) == [
        "a",
        "b",
    ]


@settings(max_examples=100, deadline=None)
@given(st.lists(PATHS, min_size=1, max_size=6, unique_by=str), st.randoms())
def test_names_are_unique_and_do_not_depend_on_the_order(paths, random):
    cases = [[path] for path in paths]
    names = dict(zip(paths, name_cases(cases), strict=True))
    if not any("_" in part for path in paths for part in path.parts):  # by which parts are joined
        assert len(set(names.values())) == len(paths)
    shuffled = random.sample(paths, len(paths))
    assert dict(zip(shuffled, name_cases([[path] for path in shuffled]), strict=True)) == names
    assert all(name and "/" not in name for name in names.values())


def test_only_a_case_that_is_listed_twice_has_the_name_of_another():
    assert name_cases([[Path("x/t1.nii")], [Path("y/t1.nii")], [Path("x/t1.nii")]]) == ["x", "y", "x"]


# Cases in a folder.


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(st.text("ab_0", min_size=1, max_size=3), min_size=1, max_size=4, unique=True),
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4)), max_size=4, unique=True),
)
def test_files_are_channels_only_if_none_is_missing(channels, whole, loose):
    """Every file belongs to one case; a case has one file, or all channels from 0 on."""
    files = {f"{name}_{channel:04d}" for name in whole for channel in range(channels)}
    files |= {f"{name}_{number:04d}" for name, number in loose}
    groups = group_channels([Path(f"{name}.nii.gz") for name in files], channels)
    assert sorted(path.name for _, parts in groups for path in parts) == sorted(
        f"{name}.nii.gz" for name in files
    )
    for name, parts in groups:
        stems = [path.name.removesuffix(".nii.gz") for path in parts]
        assert stems in ([name], [f"{name}_{channel:04d}" for channel in range(channels)])
    if not loose:
        assert sorted(name for name, _ in groups) == sorted(whole)


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 40), min_size=1, max_size=5))
def test_numbered_scans_of_one_channel_are_cases(numbers):
    groups = group_channels([Path(f"amos_{number:04d}.nii.gz") for number in numbers], 1)
    expected = ["amos"] if numbers == {0} else [f"amos_{number:04d}" for number in sorted(numbers)]
    assert [name for name, _ in groups] == expected


def test_cases_of_all_kinds_of_files_lie_beside_each_other(tmp_path, capsys):
    for name in ("a_0000.nii.gz", "a_0001.NII.GZ", "._a_0000.nii.gz", ".DS_Store"):
        save(tmp_path / "x.nii.gz")
        (tmp_path / "x.nii.gz").rename(tmp_path / name)
    save(tmp_path / "b_0007.nii", (4, 4, 4, 2))
    save(tmp_path / "c.nii.gz", (4, 4, 4, 1, 2))
    nib.save(nib.MGHImage(np.ones((4, 4, 4, 2), np.float32), np.eye(4)), tmp_path / "d.mgz")
    nib.save(nib.Nifti1Pair(np.ones((4, 4, 4, 2), np.float32), np.eye(4)), tmp_path / "e.img")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "sub").mkdir()
    assert list(find_cases(tmp_path, info(2))[0]) == ["a", "b_0007", "c", "d", "e"]
    told = capsys.readouterr().err
    assert "is ignored: notes.txt, sub\n" in told


def test_all_files_that_fit_no_case_are_told_at_once(tmp_path):
    for number in (0, 1, 3):
        save(tmp_path / f"a_{number:04d}.nii.gz")
    save(tmp_path / "b_0001.nii.gz")
    save(tmp_path / "c.nii.gz", (4, 4, 4, 3))
    (tmp_path / "d.nii.gz").write_bytes(b"broken")
    save(tmp_path / "e.nii.gz", (4, 4, 4, 2))
    save(tmp_path / "e.nii", (4, 4, 4, 2))
    save(tmp_path / "f_0000.nii")
    save(tmp_path / "f_0001.nii", affine=np.diag([1, 1, 2, 1]))
    cases, faults = find_cases(tmp_path, info(2))
    assert list(cases) == ["e"]
    told = {fault.case: f"{Path(fault.file).name} {fault.problem}" for fault in faults}
    for name, message in {
        "a_0000": "a_0000.nii.gz has 1 channels",
        "a_0001": "a_0001.nii.gz has 1 channels",
        "a_0003": "a_0003.nii.gz has 1 channels",
        "b_0001": "b_0001.nii.gz has 1 channels",
        "c": "c.nii.gz has 3 channels, the network was trained on 2 (Tiny)",
        "d": "d.nii.gz is truncated or corrupt",
        "e": "e.nii.gz has the same name as e.nii: rename one",
    }.items():
        assert told[name].startswith(message)
    assert "f_0001.nii has an affine that differs" in told["f"]
    with pytest.raises(InputError, match="the first of 8 files with faults"):
        refuse(faults)


@pytest.mark.parametrize("channels", [1, 2])
def test_whatever_the_names_no_volume_is_lost(tmp_path, channels):
    """Each volume of a folder is in a case or told of."""
    names = ["a_0000", "a_0001", "b_0000", "b_0002", "c"]
    for name in names:
        save(tmp_path / f"{name}.nii")
    cases, faults = find_cases(tmp_path, info(channels))
    seen = [*itertools.chain(*cases.values()), *(Path(fault.file) for fault in faults)]
    assert sorted(path.name for path in seen) == [f"{name}.nii" for name in names]
