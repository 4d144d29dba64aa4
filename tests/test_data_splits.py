import json

import pytest

from train.data.splits import Splits, chosen_splits, read_splits, split_cases, write_splits
from train.errors import InputError

NAMES = [f"case_{i:02d}" for i in range(20)]
CASES = {name: name for name in NAMES}  # each of a subject of its own


def test_splits_partition_the_cases():
    splits = split_cases(CASES, num_test=5, num_val=3, seed=0)
    assert [len(splits.train), len(splits.val), len(splits.test)] == [12, 3, 5]
    assert sorted(splits.train + splits.val + splits.test) == NAMES


def test_splits_depend_on_the_seed_and_not_on_the_listing():
    splits = split_cases(CASES, num_test=5, num_val=3, seed=0)
    assert splits == split_cases(dict(reversed(CASES.items())), num_test=5, num_val=3, seed=0)
    assert splits != split_cases(CASES, num_test=5, num_val=3, seed=1)
    assert splits.test == split_cases(CASES, num_test=5, num_val=0, seed=0).test


def test_splits_survive_the_file(tmp_path):
    splits = split_cases(CASES, num_test=5, num_val=0, seed=0)
    write_splits(tmp_path / "splits.json", splits)
    assert read_splits(tmp_path / "splits.json") == splits


@pytest.mark.parametrize(
    ("num_test", "num_val", "message"),
    [
        (15, 5, r"num_test \+ num_val is 15 \+ 5, but there are 20 cases"),
        (30, 0, "there are 20 cases"),
        (-1, 0, "num_test is -1"),
        (0, 2.5, "num_val is 2.5: give 0 or more cases, or a share"),
        (0, float("nan"), "num_val is nan"),
        (0.7, 0.3, r"num_test \+ num_val is 0.7 \+ 0.3"),
    ],
)
def test_impossible_splits_are_told(num_test, num_val, message):
    with pytest.raises(InputError, match=message):
        split_cases(CASES, num_test=num_test, num_val=num_val, seed=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "FileNotFoundError"),
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"train": ["a"], "val": []}', "KeyError"),
        ('{"train": ["a"], "val": ["a"], "test": []}', "lists a more than once"),
    ],
)
def test_a_bad_splits_file_is_told(tmp_path, text, message):
    path = tmp_path / "splits.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_splits(path)
    assert str(path) in str(caught.value)


def test_shares_are_of_all_cases():
    assert split_cases(CASES, num_test=0.25, num_val=0.15, seed=3) == split_cases(
        CASES, num_test=5, num_val=3, seed=3
    )


def test_the_cases_of_a_subject_stay_together():
    cases = {name: name[:-1] for name in NAMES}  # two subjects with ten cases each
    splits = split_cases(cases, num_test=3, num_val=0, seed=0)
    assert len(splits.test) == len(splits.train) == 10
    assert len({name[:-1] for name in splits.test}) == 1
    with pytest.raises(InputError, match="leave at least one"):
        split_cases(cases, num_test=3, num_val=1, seed=0)


def _chosen(path, found, **options):
    path.write_text(json.dumps(found))
    return chosen_splits(path, CASES, **{"fold": None, "num_val": 2, "seed": 0, **options})


def test_splits_of_another_run_are_taken_as_they_are(tmp_path):
    splits = Splits(("case_03",), ("case_01",), ("case_07", "case_05"))
    write_splits(tmp_path / "splits.json", splits)
    assert chosen_splits(tmp_path / "splits.json", CASES, fold=None, num_val=9, seed=0) == splits


@pytest.mark.parametrize("kind", ["nnunet", "monai"])
def test_a_fold_holds_back_its_test_cases(tmp_path, kind):
    folds = [NAMES[fold::5] for fold in range(5)]
    nnunet = [{"train": sorted({*NAMES} - {*held}), "val": held} for held in folds]
    monai = {
        "training": [
            {"image": [f"imagesTr/{name}.nii.gz"], "label": "x", "fold": fold}
            for fold, held in enumerate(folds)
            for name in held
        ]
    }
    splits = _chosen(tmp_path / "folds.json", nnunet if kind == "nnunet" else monai, fold=3)
    assert list(splits.test) == folds[3]
    assert (len(splits.val), len(splits.train)) == (2, 14)
    assert sorted(splits.train + splits.val + splits.test) == NAMES


@pytest.mark.parametrize(
    ("found", "fold", "message"),
    [
        (
            {"train": ["case_00", "ghost"], "val": [], "test": []},
            None,
            "names ghost, the first of 1 that are no",
        ),
        ({"train": ["case_00"], "val": [], "test": ["case_00"]}, None, "lists case_00 more than once"),
        ({"train": [], "val": [], "test": ["case_00"]}, None, "leaves no case to train on"),
        ({"train": ["case_00"], "val": [], "test": []}, 1, "holds no folds, but fold is 1"),
        ({"train": "case_00", "val": [], "test": []}, None, "a str in place of a list"),
        (
            [{"train": ["case_00"], "val": ["case_01"]}],
            None,
            "holds 1 folds, fold is None: give --fold 0 to 0",
        ),
        ([{"train": ["case_00"], "val": ["case_01"]}], 1, "holds 1 folds, fold is 1"),
        ([{"train": ["case_00"], "val": ["case_00"]}], 0, "lists case_00 more than once"),
        ([{"train": ["case_00"], "val": ["ghost"]}], 0, "names ghost"),
        ([{"train": ["case_00"]}], 0, "KeyError"),
        ({"training": [{"image": "case_00.nii.gz"}]}, 0, "KeyError"),
    ],
)
def test_bad_chosen_splits_are_told(tmp_path, found, fold, message):
    with pytest.raises(InputError, match=message) as caught:
        _chosen(tmp_path / "splits.json", found, fold=fold, num_val=0)
    assert "splits.json" in str(caught.value)


BRATS = [f"BraTS2021_{i:05d}" for i in range(4)]


@pytest.mark.parametrize(
    "form",
    [
        "TrainingData/{case}/{case}_{modality}.nii.gz",
        "{case}\\{case}_{modality}.nii.gz",
        "/data/{case}/{modality}.nii",
    ],
)
@pytest.mark.parametrize("modalities", [("flair", "t1", "t1ce", "t2"), ("t1",)])
def test_a_datalist_finds_its_cases_by_their_paths(tmp_path, form, modalities):
    """Their names are those of the data set's layout, though the list has more or fewer cases."""
    listed = [
        {"fold": i % 2, "image": [form.format(case=case, modality=modality) for modality in modalities]}
        for i, case in enumerate(BRATS[:3])
    ]
    (tmp_path / "folds.json").write_text(json.dumps({"training": listed}), encoding="utf-8-sig")
    splits = chosen_splits(
        tmp_path / "folds.json", dict(zip(BRATS, BRATS, strict=True)), fold=0, num_val=0, seed=0
    )
    assert splits == Splits((BRATS[1],), (), (BRATS[0], BRATS[2]))


def test_a_datalist_of_sections_is_taken_as_it_is(tmp_path):
    def entry(name, **more):
        return {"image": f"imagesTr/{name}.nii.gz", "label": "x", **more}

    found = {
        "training": [entry(NAMES[0]), entry(NAMES[1])],
        "validation": [entry(NAMES[2])],
        "test": [entry(NAMES[3]), "imagesTs/without_label.nii.gz", {"image": "imagesTs/another.nii.gz"}],
    }
    assert _chosen(tmp_path / "list.json", found) == Splits(tuple(NAMES[:2]), (NAMES[2],), (NAMES[3],))
    with pytest.raises(InputError, match="holds no folds, but fold is 0"):
        _chosen(tmp_path / "list.json", found, fold=0)
    found["test"].append(entry(NAMES[0]))
    with pytest.raises(InputError, match="lists case_00 more than once"):
        _chosen(tmp_path / "list.json", found)


def test_a_datalist_that_has_a_case_in_two_folds_is_told(tmp_path):
    listed = [{"image": [f"{NAMES[0]}/t1.nii.gz"], "fold": fold} for fold in (0, 1)]
    with pytest.raises(InputError, match="lists case_00 more than once"):
        _chosen(tmp_path / "list.json", {"training": listed}, fold=0)
