"""Data sets of users: the docs' example from fit to evaluation, and one sentence for each fault of others."""

import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from train.cli import main
from train.data import ArrayDataset, Case, Dataset
from train.data.arrays import check_case, check_dataset
from train.data.ignore import IGNORE
from train.data.open import open_dataset
from train.data.phantom import PhantomDataset
from train.errors import InputError

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "my_data.py"
NETWORK = ["--channels", "4", "8", "--strides", "2", "--num-res-units", "0", "--patch", "8", "8"]
PLAIN = [word for what in ("flip", "gamma", "intensity", "noise") for word in (f"--{what}-prob", "0")]
TINY = [*NETWORK, *PLAIN, "--batch-size", "8", "--steps", "2", "--warmup-steps", "0"]


@pytest.fixture
def scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five images in a folder with a space, and the example where a user would have it."""
    shutil.copy(EXAMPLE, tmp_path / "my_data.py")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_data", raising=False)
    folder = tmp_path / "my scans"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        image = rng.gamma(2.0, 50.0, (8 + i, 9, 2))
        np.savez(folder / f"cell{i}.npz", image=image, label=image[..., 0] > 80)
    return folder


def test_the_example_is_fitted_and_evaluated(scans: Path, tmp_path: Path) -> None:
    data = f"my_data:cells(folder='{scans}')"
    run = str(tmp_path / "run")
    split = ["--num-test", "2", "--num-val", "0"]
    assert main(["fit", "--data", data, "--loss", "dice", *split, *TINY, "--out", run]) == 0
    assert main(["evaluate", run]) == 0
    table = (tmp_path / "run" / "evaluate-test" / "table.csv").read_text(encoding="utf-8")
    assert "ACE" in table


def test_images_are_normalised_and_cases_of_the_example_come_in_order(scans: Path) -> None:
    dataset = open_dataset(f"my_data:cells(folder='{scans}')")
    assert isinstance(dataset, Dataset)
    assert dataset.case_names == dataset.subjects == tuple(f"cell{i}" for i in range(5))
    assert (dataset.spatial_dims, dataset.num_channels, dataset.largest_shape) == (2, 2, (12, 9))
    case = dataset.load(3)
    np.testing.assert_allclose(case.image.mean((0, 1)), 0, atol=1e-5)
    np.testing.assert_allclose(case.image.std((0, 1)), 1, atol=1e-5)
    assert (case.label.dtype, case.label.shape) == (np.uint8, (11, 9))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "no_such_module:cells",
            "module 'no_such_module' cannot be imported.* Or give LAYOUT:PATH with one of msd",
        ),
        ("my_data:nothing", "module 'my_data' has no 'nothing'"),
        ("my_data:cells(place='x')", "got an unexpected keyword argument 'place'"),
        ("my_data:cells('x')", "has an argument without a name"),
        ("my_data:cells(folder='nowhere')", "my_data:cells has no case"),
        ("my_data:Path", "my_data:Path gave a .*Path without class_names, num_channels"),
    ],
)
def test_what_cannot_be_opened_is_told(scans: Path, spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_dataset(spec)


def test_a_name_of_a_layout_is_the_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "msd", ModuleType("msd"))
    with pytest.raises(InputError, match="cells is not a folder"):
        open_dataset("msd:cells")


def test_options_of_volumes_are_refused(scans: Path) -> None:
    options: list[dict[str, Any]] = [
        {"cache_dir": "x"},
        {"channel_order": (1,)},
        {"intensities": (0.0, 1.0)},
        {"subjects": "a"},
    ]
    for option in options:
        with pytest.raises(InputError, match=r"are for volumes on disk"):
            open_dataset("my_data:cells", **option)


def dataset(image: np.ndarray, label: np.ndarray, **options: Any) -> ArrayDataset:
    return ArrayDataset("toy", ("background", "x"), ("a", "b"), lambda _: (image, label), **options)


SQUARE = np.arange(12.0).reshape(3, 4)


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (SQUARE, np.full((3, 4), 2), "Case a of toy has the class id 2, but class_names gives ids 0 to 1"),
        (SQUARE, np.full((3, 4), IGNORE), "class id 255, .*has_ignore is False"),
        (SQUARE, np.full((3, 4), -1), "has labels that are no class ids"),
        (SQUARE, np.full((3, 4), 0.5), "has labels that are no class ids"),
        (SQUARE, np.full((3, 4), np.nan), "has labels that are no class ids"),
        (SQUARE[..., None], np.zeros((4, 3)), re.escape("a label of uint8 (4, 3): give uint8 (3, 4)")),
        (np.full((3, 4), np.nan), np.zeros((3, 4)), "voxels that are NaN or infinite"),
        (SQUARE[0], np.zeros(4), "has spatial_dims 1: give 2 or 3"),
    ],
)
def test_a_first_case_that_cannot_be_is_told(image: np.ndarray, label: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_dataset(dataset(image, label), "my_data:toy")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subjects": ("s",)}, "has 2 cases, 2 case_names and 1 subjects: give equally many"),
        ({"held_out": ("c",)}, "holds out cases that are not in case_names"),
    ],
)
def test_names_that_do_not_fit_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_dataset(dataset(SQUARE, np.zeros((3, 4)), **options), "my_data:toy")


def test_ignored_voxels_and_ranges_are_those_of_volumes() -> None:
    given = dataset(SQUARE, np.full((3, 4), IGNORE), has_ignore=True, intensity_range=(2.0, 8.0))
    assert check_dataset(given, "toy") is given
    clipped = np.clip(SQUARE, 2, 8)
    np.testing.assert_allclose(
        given.load(0).image[..., 0], (clipped - clipped.mean()) / clipped.std(), rtol=1e-6
    )


def test_a_class_of_its_own_inherits_what_is_optional() -> None:
    class Halves(Dataset):
        name: Any = "halves"
        class_names: Any = ("background", "x")
        case_names: Any = ("a", "b")
        num_channels: Any = 1
        spatial_dims: Any = 2
        largest_shape: Any = (4, 4)

        def load(self, index: int) -> Case:
            image = np.full((4, 4, 1), index, np.float64 if index else np.float32)
            return Case(self.case_names[index], image, np.zeros((4, 4), np.uint8), np.eye(4))

    halves = Halves()
    assert check_dataset(halves, "halves") is halves
    assert (len(halves), halves.subjects, dict(halves.regions)) == (2, ("a", "b"), {})
    with pytest.raises(
        InputError, match=re.escape("Case b of halves has an image of float64 (4, 4, 1): give")
    ):
        check_case(halves, 1)


def test_the_embedded_data_keeps_to_the_protocol() -> None:
    check_dataset(PhantomDataset(spatial_shape=(16, 12), num_cases=2), "phantom")
