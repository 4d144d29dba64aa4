"""Published experiments: each builds, its command parses, and it runs on small volumes in its data's layout."""

import dataclasses
import json
import shlex
import tomllib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from flax import nnx

from calib_jax.report import METRICS
from train import recipes
from train.cli import main, parse
from train.config import DataInfo, to_json
from train.data.protocols import PROTOCOLS, partition
from train.errors import InputError
from train.losses import parse_loss
from train.published import Row, rows_of, to_markdown
from train.recipes import DEVICES, RECIPES, find_recipe
from train.step import learning_rate, make_optimizer
from train.task import make_model, open_data, open_task

SHAPE = (16, 16, 16)


def write(path, voxels):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 1.0, 1.0])), path)


def case(seed, values):
    """A scan that shows its label: nested cubes."""
    label = np.zeros(SHAPE, np.uint8)
    for depth, value in enumerate(values):
        label[2 + depth : 13 - depth, 2 + depth : 13 - depth, 2 + depth : 13 - depth] = value
    image = np.random.default_rng(seed).normal(100 + 40.0 * label, 5).astype(np.float32)
    return image, label


def write_brats(root):
    for i in range(8):
        name = f"BraTS2021_{9000 + i:05d}"
        image, label = case(i, (2, 1, 4))
        for j, modality in enumerate(("flair", "t1", "t1ce", "t2")):
            write(root / name / f"{name}_{modality}.nii.gz", image * (j + 1) + 1)
        write(root / name / f"{name}_seg.nii.gz", label)


def write_acdc(root):
    for folder, patients in (("training", range(1, 6)), ("testing", (101, 102))):
        for patient in (f"patient{number:03d}" for number in patients):
            for frame in ("01", "12"):
                image, label = case(len(patient), (1, 2, 3))
                write(root / folder / patient / f"{patient}_frame{frame}.nii.gz", image)
                write(root / folder / patient / f"{patient}_frame{frame}_gt.nii.gz", label)


def write_amos(root):
    listed = []
    for part, numbers in (("Tr", (1, 2, 3, 4, 5, 507)), ("Va", (8, 9, 508))):
        for number in numbers:
            image, label = case(number, (1, 2))
            write(root / f"images{part}" / f"amos_{number:04d}.nii.gz", image)
            write(root / f"labels{part}" / f"amos_{number:04d}.nii.gz", label)
            if part == "Tr":
                file = f"amos_{number:04d}.nii.gz"
                listed.append({"image": f"./imagesTr/{file}", "label": f"./labelsTr/{file}"})
    description = {
        "name": "AMOS",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "spleen", "2": "right kidney"},
        "training": listed,
    }
    (root / "dataset.json").write_text(json.dumps(description))


def write_kits(root):
    for i in range(10):
        image, label = case(i, (1, 2, 3))
        write(root / f"case_{i:05d}" / "imaging.nii.gz", image)
        write(root / f"case_{i:05d}" / "segmentation.nii.gz", label)


WRITERS = {"brats": write_brats, "acdc": write_acdc, "amos-ct": write_amos, "kits": write_kits}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipes")
    for layout, writer in WRITERS.items():
        (root / layout).mkdir()
        writer(root / layout)
    return root


def in_layout(recipe, folders):
    """The small data set in the layout of the recipe's."""
    layout = recipe.config.data.data.partition(":")[0]
    return f"{layout}:{folders / layout}"


def test_all_that_was_published_is_there():
    data_sets = {"acdc": 100, "amos": 100, "kits": 98, "brats": 200}
    paper = [
        f"paper_brats_{losses}" for losses in ("ce", "ce_ace", "dice", "dice_ace", "dice_ce", "dice_ce_ace")
    ]
    followup = {
        f"followup_{data}_{losses}": cases
        for data, cases in data_sets.items()
        for losses in ("dice_ce", "dice_ce_ace", "dice_ce_softace")
    }
    assert set(RECIPES) == {*paper, *followup}
    assert [len(RECIPES[name].published) for name in paper] == [2] * 6
    assert {name: RECIPES[name].published[0].cases for name in followup} == followup
    plain, scaled = RECIPES["paper_brats_dice_ace"].published
    assert plain.figures == ((0.8658, 0.1345), (0.1367, 0.0694), (0.0006, 0.0007), (0.2708, 0.1327))
    assert scaled.figures[1] == (0.1213, 0.0626)
    with pytest.raises(InputError, match=r"no recipe 'dice'.*paper_brats_dice_ace"):
        find_recipe("dice")


@pytest.mark.parametrize("name", RECIPES)
def test_each_builds_its_network_and_its_command_parses(name):
    recipe = RECIPES[name]
    classes = ("background", *"abc")
    channels = len(recipe.config.data.channel_order) or 1
    info = DataInfo(name, classes, channels, 3)
    nnx.eval_shape(lambda: make_model(recipe.config, info))
    assert parse_loss(recipe.config.loss).terms
    window = recipe.config.data.sliding_window
    divisors = recipe.config.model.network.divisors(len(window))
    assert all(side % divisor == 0 for side, divisor in zip(window, divisors, strict=True))
    program, *command = shlex.split(recipe.command)
    assert (program, command[:2]) == ("python", ["-m", "train"])
    fit = parse(command[2:])
    assert fit.config(fit.loss) == recipe.config
    assert fit.devices == DEVICES


def test_every_setting_is_an_option_of_a_run():
    """A misspelt one would leave a default in its place."""
    file = tomllib.loads((Path(recipes.__file__).parent / "recipes.toml").read_text())
    options = [part.get("options", {}) for part in (*file["parts"].values(), *file["experiments"].values())]
    known = to_json(RECIPES["followup_acdc_dice_ce"].config)
    for section, values in (pair for part in options for pair in part.items()):
        assert values.keys() <= known[section].keys()
        assert values.get("network", {}).keys() <= known["model"]["network"].keys()


def test_what_is_given_stands_before_the_recipe():
    fit = parse(["fit", "--recipe", "followup_acdc_dice_ce", "--steps", "3", "--loss", "ce"])
    assert (fit.training.steps, fit.training.batch_size, fit.loss) == (3, 2, "ce")
    assert parse(["fit"]).recipe == ""
    pair = ["paper_brats_dice", "paper_brats_dice_ace"]
    compare = parse(["compare", "--recipe", *pair])
    assert (compare.losses, compare.recipe) == (("dice", "0.5*dice+0.5*ace"), tuple(pair))
    with pytest.raises(InputError, match="differ in more than their losses"):
        parse(["compare", "--recipe", "paper_brats_dice", "followup_brats_dice_ce"])


@pytest.mark.parametrize("name", ["followup_acdc_dice_ce", "paper_brats_dice"])
def test_learning_rates_are_the_published_ones(name):
    training = RECIPES[name].config.training
    schedule = learning_rate(training)
    np.testing.assert_allclose(schedule(training.warmup_steps), training.learning_rate, rtol=1e-6)
    np.testing.assert_allclose(schedule(0), training.learning_rate * (training.warmup_from or 1), rtol=1e-6)
    make_optimizer(training)


def test_partition_is_that_of_monai():
    data = pytest.importorskip("monai.data")
    names = [f"case_{i}" for i in range(103)]
    for ratios, seed in (((19, 1), 0), ((9, 1), 12345), ((0.8, 0.2), 42)):
        assert partition(names, ratios, seed) == data.partition_dataset(
            names, ratios, shuffle=True, seed=seed
        )


def test_the_papers_split_has_its_sizes_and_only_its_own_cases():
    test = PROTOCOLS["paper-brats"].test((), ())
    names = [*test, *(f"BraTS2021_{90000 + i}" for i in range(1051))]
    splits = PROTOCOLS["paper-brats"].splits(names, ())
    assert splits is not None
    assert [len(splits.train), len(splits.val), len(splits.test)] == [998, 53, 200]
    assert splits.test == tuple(sorted(test))
    assert PROTOCOLS["paper-brats"].splits(names[1:], ()) is None


@pytest.mark.parametrize(
    ("name", "test"),
    [
        ("followup_acdc_dice_ce", [f"patient{n}_frame{f}" for n in (101, 102) for f in ("01", "12")]),
        ("followup_amos_dice_ce", ["amos_0008", "amos_0009"]),
        ("followup_kits_dice_ce", sorted(partition([f"case_{i:05d}" for i in range(10)], (0.8, 0.2), 42)[1])),
    ],
)
def test_test_cases_are_those_set_apart(folders, name, test):
    recipe = RECIPES[name]
    data = dataclasses.replace(recipe.config.data, data=in_layout(recipe, folders))
    dataset, splits = open_data(data)
    assert list(splits.test) == test
    assert not set(test) & {*splits.train, *splits.val}
    assert dataset.intensity_range == data.intensities
    without = open_data(dataclasses.replace(data, protocol=""))[1]
    assert not set(dataset.held_out) & {*without.train, *without.val, *without.test}


def test_channels_come_in_the_order_asked_for(folders):
    data = dataclasses.replace(RECIPES["paper_brats_dice"].config.data, data=f"brats:{folders / 'brats'}")
    layout = getattr(open_data(data)[0], "layout")  # noqa: B009, of volumes only
    ends = [file.name.split("_")[-1] for file in layout.entries[0].images]
    assert ends == [f"{modality}.nii.gz" for modality in ("t1", "t1ce", "t2", "flair")]
    with pytest.raises(InputError, match="different channels of 0 to 3"):
        open_data(dataclasses.replace(data, channel_order=(0, 4)))


def test_parts_of_a_batch_follow_from_the_devices(folders):
    recipe = RECIPES["paper_brats_dice"]
    data = dataclasses.replace(recipe.config.data, data=f"brats:{folders / 'brats'}")
    task = open_task(dataclasses.replace(recipe.config, data=data), DEVICES)
    assert task.devices.accumulate == 1  # of 8 devices, each has one of 8 patches
    assert task.config.data.sliding_window == (240, 240, 160)


@pytest.mark.usefixtures("undrawn")
def test_fit_ends_with_the_published_table(folders, tmp_path, capsys):
    out = tmp_path / "run"
    small = "--patch 8 8 8 --eval-patch 16 16 16 --channels 4 8 --strides 2 --steps 2 --smooth-prob 0 --zoom-prob 0"
    command = ["fit", "--recipe", "paper_brats_dice_ace", "--data", f"brats:{folders / 'brats'}"]
    command += [*small.split(), "--rotation-prob", "0", "--temperature", "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "lacks the test cases of paper-brats" in printed
    table = out / "evaluate-test-best"
    names = [row["name"] for row in json.loads((table / "published.json").read_text())]
    regions = ["enhancing tumour", "tumour core", "whole tumour"]
    loss = "0.5*dice+0.5*ace"
    published = ["Barfoot et al. 2024, dice_ace", "Barfoot et al. 2024, dice_ace+T"]
    assert names == [loss, *regions, f"{loss}+T", *regions, *published]
    for text in ((table / "published.md").read_text(), (table / "index.html").read_text(), printed):
        assert "0.1367 ± 0.0694" in text
        assert "0.2308 ± 0.1163" in text
    assert len((table / "published.csv").read_text().splitlines()) == 11
    assert main([*command, "--resume"]) == 0


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("data", ["acdc", "amos", "kits"])
def test_the_followups_train_in_their_layouts(folders, tmp_path, data):
    """Everything of the recipe but its sizes: SegResNet with deep supervision, AdamW, affine augmentation."""
    recipe = RECIPES[f"followup_{data}_dice_ce_softace"]
    out = tmp_path / "run"
    small = "--patch 8 8 8 --eval-patch 16 16 16 --spacing 1 1 1 --steps 2 --init-filters 8 "
    small += "--blocks-down 1 1 1 --deep-supervision 2 --batch-size 8"
    command = ["fit", "--recipe", recipe.name, "--data", in_layout(recipe, folders)]
    command += [*small.split(), "--out", str(out)]
    assert main(command) == 0
    (table,) = out.glob("evaluate-test*/published.json")
    assert any("dice_ce_softace" in row["name"] for row in json.loads(table.read_text()))
    assert len((out / "log.csv").read_text().splitlines()) == 3


def test_figures_are_means_and_spreads_of_the_cases_means():
    class Result:
        name, case_names, class_names = "m", ("a", "b", "c"), ("x", "y")

        def metrics(self):
            return dict.fromkeys(METRICS, np.array([[0.2, 0.4], [0.5, np.nan], [np.nan, np.nan]]))

    own, x, y = rows_of(Result())  # type: ignore[arg-type]
    np.testing.assert_allclose(own.figures, [(0.4, 0.1)] * 4)
    np.testing.assert_allclose([x.figures[0], y.figures[0]], [(0.35, 0.15), (0.4, 0.0)])
    assert "| m | 3 | 0.4000 ± 0.1000 |" in to_markdown([own])
    assert Row("m", 3, own.figures) == own
