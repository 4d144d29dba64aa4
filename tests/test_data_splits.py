import pytest

from train.data import read_splits, split_cases, write_splits
from train.errors import InputError

NAMES = [f"case_{i:02d}" for i in range(20)]


def test_splits_partition_the_cases():
    splits = split_cases(NAMES, num_test=5, num_val=3, seed=0)
    assert [len(splits.train), len(splits.val), len(splits.test)] == [12, 3, 5]
    assert sorted(splits.train + splits.val + splits.test) == NAMES


def test_splits_depend_on_the_seed_and_not_on_the_listing():
    splits = split_cases(NAMES, num_test=5, num_val=3, seed=0)
    assert splits == split_cases(NAMES[::-1], num_test=5, num_val=3, seed=0)
    assert splits != split_cases(NAMES, num_test=5, num_val=3, seed=1)
    assert splits.test == split_cases(NAMES, num_test=5, num_val=0, seed=0).test


def test_splits_survive_the_file(tmp_path):
    splits = split_cases(NAMES, num_test=5, num_val=0, seed=0)
    write_splits(tmp_path / "splits.json", splits)
    assert read_splits(tmp_path / "splits.json") == splits


@pytest.mark.parametrize(
    ("num_test", "num_val", "message"),
    [
        (15, 5, r"num_test \+ num_val is 15 \+ 5, but there are 20 cases"),
        (30, 0, "there are 20 cases"),
        (-1, 0, "num_test is -1"),
    ],
)
def test_impossible_splits_are_told(num_test, num_val, message):
    with pytest.raises(InputError, match=message):
        split_cases(NAMES, num_test=num_test, num_val=num_val, seed=0)


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
