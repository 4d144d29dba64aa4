"""Cases kept on disk: found again, made again when anything changed or broke, and never the reason to stop."""

import errno
import json
import os
from itertools import islice

import nibabel as nib
import numpy as np
import pytest

from train.data.cache import CaseStore
from train.data.geometry import Geometry
from train.data.open import open_dataset
from train.data.pipeline import CachedCases, train_batches
from train.errors import InputError

SHAPE = (6, 5, 4)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    for i, name in enumerate(("a", "b")):
        rng = np.random.default_rng(i)
        for kind, voxels in (("image", rng.gamma(2.0, 50.0, SHAPE)), ("label", rng.integers(0, 3, SHAPE))):
            (root / f"{kind}sTr").mkdir(parents=True, exist_ok=True)
            volume = nib.Nifti1Image(voxels.astype(np.float32), np.eye(4))
            nib.save(volume, root / f"{kind}sTr" / f"{name}.nii.gz")
    listed = [{"image": f"imagesTr/{n}.nii.gz", "label": [f"labelsTr/{n}.nii.gz"] * 2} for n in ("a", "b")]
    labels = {"0": "background", "1": "x", "2": "y"}
    (root / "dataset.json").write_text(
        json.dumps({"modality": {"0": "T"}, "labels": labels, "training": listed})
    )
    return root


def _open(folder, **options):
    return open_dataset(f"msd:{folder}", cache_dir=str(folder.parent / "cache"), **options)


def _entries(folder):
    return sorted((folder.parent / "cache").iterdir())


def _assert_same(one, other):
    assert (one.name, one.source is None) == (other.name, other.source is None)
    for array in ("image", "label", "affine", "annotations"):
        np.testing.assert_array_equal(getattr(one, array), getattr(other, array))
    if one.source is not None:
        np.testing.assert_array_equal(one.truth(3), other.truth(3))
        probs = np.eye(3, dtype=np.float32)[one.label]
        np.testing.assert_array_equal(one.source.placement.back(probs), other.source.placement.back(probs))


def _break_reading(monkeypatch):
    def read(*_):
        raise AssertionError("read from its files")

    monkeypatch.setattr("train.data.volumes.read_scan", read)


@pytest.mark.parametrize(
    "options", [{}, {"geometry": Geometry((1.0, 0.7, 2.0), crop_margin=0), "all_annotators": True}]
)
def test_a_case_is_read_from_its_files_once(folder, options, monkeypatch):
    case = _open(folder, **options).load(1)
    _assert_same(case, open_dataset(f"msd:{folder}", **options).load(1))
    _break_reading(monkeypatch)
    again = _open(folder, **options).load(1)
    _assert_same(again, case)
    assert isinstance(again.image, np.memmap)
    assert len(_entries(folder)) == 1


def test_other_files_and_other_preprocessing_are_other_cases(folder):
    first = _open(folder).load(0)
    for options in ({"geometry": Geometry(crop_margin=0)}, {"all_annotators": True}):
        _open(folder, **options).load(0)
    assert len(_entries(folder)) == 3
    nib.save(nib.Nifti1Image(np.ones(SHAPE, np.float32), np.eye(4)), folder / "imagesTr/a.nii.gz")
    assert not np.array_equal(_open(folder).load(0).image, first.image)


@pytest.mark.parametrize("damage", ["truncated", "missing", "names"])
def test_a_broken_case_is_made_again(folder, damage, monkeypatch):
    case = _open(folder).load(0)
    expected = np.array(case.image)
    del case
    (entry,) = _entries(folder)
    image = entry / "image.npy"
    if damage == "truncated":
        image.write_bytes(image.read_bytes()[:-8])
    elif damage == "missing":
        image.unlink()
    else:
        (entry / "arrays.json").write_text('["lab')
    np.testing.assert_array_equal(_open(folder).load(0).image, expected)
    assert _entries(folder) == [entry]
    _break_reading(monkeypatch)
    np.testing.assert_array_equal(_open(folder).load(0).image, expected)


def test_a_full_disk_is_a_warning(folder, monkeypatch):
    def save(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("train.data.cache.np.save", save)
    with pytest.warns(UserWarning, match=r"cache_dir .*/cache does not take a \(No space left on device\)"):
        case = _open(folder).load(0)
    _assert_same(case, open_dataset(f"msd:{folder}").load(0))
    assert _entries(folder) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache_dir .* cannot be made"):
        CaseStore(tmp_path / "file" / "cache")


def test_batches_are_the_same_with_and_without(folder):
    options = {"patch": (4, 6, 3), "batch_size": 2, "seed": 0, "num_threads": 2}
    plain = train_batches(open_dataset(f"msd:{folder}"), ["a", "b"], **options)
    kept = train_batches(_open(folder), ["a", "b"], **options)
    for one, other in islice(zip(plain, kept, strict=True), 4):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def test_mapped_cases_take_no_memory(folder):
    _open(folder).load(0)
    dataset = _open(folder)
    cases = CachedCases(dataset, ["a"], max_bytes=0)
    assert cases[0][1] is cases[0][1]
