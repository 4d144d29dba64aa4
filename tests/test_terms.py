"""Loss terms with parameters, and loss terms from outside."""

import csv
import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import calib_jax
from train.cli import main
from train.compare import slug
from train.config import read_config
from train.data.pipeline import train_batches
from train.errors import InputError
from train.losses import Loss, parse_loss
from train.sharding import device_mesh
from train.step import check_loss
from train.task import make_model, open_task
from train.terms import TERMS, describe

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "my_losses.py"
TVERSKY = "my_losses:tversky"

MORE = """

def per_image(logits, labels):
    return logits.mean((1, 2, 3))


def misspelt(logits, labels, *, scale: int, where=None):
    return jnp.meen(logits) * scale


def bare(logits, labels, weight=1):
    return weight * (logits**2).mean()
"""


@pytest.fixture
def my_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of the documentation on the path, with more functions."""
    (tmp_path / "my_losses.py").write_text(EXAMPLE.read_text() + MORE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)


def sample(classes: int = 3) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 8, 6, classes)).astype(np.float32)
    return jnp.asarray(logits), jnp.asarray(rng.integers(0, classes, (2, 8, 6)), jnp.int32)


def value(loss: str | Loss, logits: Any, labels: Any, where: Any = None) -> float:
    loss = parse_loss(loss) if isinstance(loss, str) else loss
    return float(loss.total(jax.jit(loss.parts)(logits, labels, None, where)))


@pytest.mark.parametrize(
    ("loss", "function", "options"),
    [
        ("focal(gamma=3)", calib_jax.focal_loss, {"gamma": 3}),
        ("ls(alpha=0.3)", calib_jax.label_smoothing_loss, {"alpha": 0.3}),
        ("nacl(norm=l2, kernel_size=5)", calib_jax.neighbor_aware_loss, {"norm": "l2", "kernel_size": 5}),
    ],
)
def test_parameters_are_those_of_the_library(loss: str, function, options: dict) -> None:
    logits, labels = sample()
    np.testing.assert_allclose(value(loss, logits, labels), function(logits, labels, **options), rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("ace(binning='soft')", {"binning": "soft"}),
        ("softace(num_bins=5)", {"num_bins": 5, "binning": "soft"}),
        ("ace(class_weights=[1, 2e+1, 0.5])", {"class_weights": np.array([1, 20, 0.5])}),
        ("ace(include_background=False, closed=left)", {"include_background": False, "closed": "left"}),
    ],
)
def test_parameters_of_ace(loss: str, options: dict) -> None:
    """Beside Dice, whose parameters of the same name are its own."""
    logits, labels = sample()
    ace = calib_jax.mL1_ace(jax.nn.softmax(logits), labels, **options)
    dice = calib_jax.segmentation_loss(logits, labels, cross_entropy=0, ace=0, dice_smooth=1)
    np.testing.assert_allclose(value(f"dice(smooth=1)+2*{loss}", logits, labels), dice + 2 * ace, rtol=1e-6)


def test_a_term_says_more_than_the_option() -> None:
    logits, labels = sample()
    labels = jnp.where(labels == 2, 0, labels)  # so that a class has no voxel
    for call, option, expected in (("ace", True, True), ("ace(ignore_empty_classes=False)", True, False)):
        (term,) = parse_loss(call, option).parts(logits, labels).values()
        ace = calib_jax.mL1_ace(jax.nn.softmax(logits), labels, ignore_empty_classes=expected)
        np.testing.assert_allclose(term, ace, rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("dice+focal(gama=3)", "focal has no argument 'gama': it takes gamma"),
        ("ce(gamma=3)", "ce has no argument 'gamma': it takes none"),
        ("focal(gamma=three)", "focal takes gamma as a number, but gamma is 'three'"),
        ("ace(num_bins=2.5)", "ace takes num_bins as a whole number"),
        ("ace(binning=sofd)", "ace takes binning as one of 'hard', 'soft', 'adaptive'"),
        ("dice(include_background=1)", "dice takes include_background as True or False"),
        ("softace(binning=hard)", "softace has no argument 'binning'"),
        ("ace(binning=soft)+softace", "twice"),
        ("focal(gamma=2)+focal(gamma=3)", "twice"),
        ("focal(3)", "argument without a name"),
        ("focal(gamma=3", "check its parentheses"),
        ("dice+", "check its parentheses"),
        ("2*3*dice", "one positive number"),
        ("half*dice", "one positive number"),
        ("dise(smooth=1)", "Unknown loss term 'dise'; terms are dice, dampeddice, ce"),
        ("no_such_module:loss", "cannot be imported"),
        ("calib_jax:no_such_loss", "has no 'no_such_loss'"),
        ("calib_jax:__all__", "name a function"),
    ],
)
def test_mistakes_are_one_sentence(loss: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_loss(loss)


def test_the_name_is_the_users() -> None:
    assert parse_loss("dice + 0.5 * ace(num_bins=15)").name == "dice+0.5*ace(num_bins=15)"
    assert parse_loss("nacl(norm = 'l1')").name == "nacl(norm='l1')"


def test_help_lists_every_term_with_its_parameters() -> None:
    text = describe()
    assert all(f"{name}(" in text or f" {name}," in text for name in TERMS)
    assert "focal(gamma=2.0)" in text


@pytest.mark.usefixtures("my_losses")
def test_a_term_from_outside_is_used_like_any_other() -> None:
    """With dense labels, masks, deep supervision and sigmoids. For alpha 0.5 Tversky's loss is that of Dice."""
    logits, labels = sample()
    own, dice = (parse_loss(name) for name in (f"{TVERSKY}(alpha=0.5, smooth=5e-6)", "dice"))
    where = jnp.asarray(np.random.default_rng(1).random(labels.shape) < 0.7)
    deep = logits, logits[:, ::2, ::2]
    for levels, target, mask in (
        (logits, jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32), None),
        (deep, labels, where),
    ):
        expected = value(dice, levels, target, mask)
        np.testing.assert_allclose(value(own, levels, target, mask), expected, rtol=1e-5)
    broken = jnp.where(where[..., None], logits, jnp.nan)
    assert np.isfinite(value(own, broken, labels, where))
    # Of each region the outside counts too, since this function has no include_background.
    of_regions = dataclasses.replace(own, regions=((1,), (1, 2)))
    both = dataclasses.replace(
        parse_loss("dice(smooth=5e-6, include_background=True)"), regions=of_regions.regions
    )
    np.testing.assert_allclose(
        value(of_regions, logits[..., :2], labels), value(both, logits[..., :2], labels), rtol=1e-5
    )


@pytest.mark.usefixtures("my_losses")
@pytest.mark.parametrize(
    ("loss", "options", "words"),
    [
        ("my_losses:bare(weight=0.5)", {}, None),
        ("my_losses:bare", {"mesh": "space=2"}, "my_losses:bare has no argument axis_name.*space=2"),
        ("my_losses:bare", {"has_ignore": True}, "my_losses:bare has no argument where.*no label"),
        ("dice+my_losses:per_image", {}, r"my_losses:per_image returned float32 of shape \(1,\)"),
        ("my_losses:misspelt(scale=1)", {}, "misspelt failed: AttributeError: .*my_losses.py, line 42"),
        ("focal(gamma=-1)", {}, "focal failed: ValueError: gamma must be at least 0"),
        ("ace(class_weights=(1, 2))", {}, r"ace failed: ValueError: class_weights must have shape \(3,\)"),
    ],
)
def test_losses_are_tried_before_a_run_starts(loss: str, options: dict, words: str | None) -> None:
    mesh = device_mesh(options.pop("mesh", ""))

    def check() -> None:
        check_loss(parse_loss(loss), mesh, (8, 8, 8), channels=3, **options)

    if words is None:
        check()
        return
    with pytest.raises(InputError, match=words):
        check()


@pytest.mark.usefixtures("my_losses")
def test_arguments_of_a_term_from_outside() -> None:
    with pytest.raises(InputError, match="my_losses:misspelt needs the argument scale"):
        parse_loss("my_losses:misspelt")
    with pytest.raises(InputError, match=r"scale as a whole number, but scale is 0\.5"):
        parse_loss("my_losses:misspelt(scale=0.5)")
    with pytest.raises(InputError, match="has no argument 'beta': it takes alpha, smooth"):
        parse_loss(f"{TVERSKY}(beta=1)")


def test_a_run_with_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(EXAMPLE, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    loss = f"dice+0.5*{TVERSKY}(alpha=0.3)"
    out = tmp_path / slug(loss)
    options = (
        "--steps 2 --batch-size 8 --channels 4 8 --strides 2 --warmup-steps 1 --num-test 2 --num-val 0 "
        "--patch 16 16 --flip-prob 0 --gamma-prob 0 --intensity-prob 0 --noise-prob 0"
    )
    command = ["fit", "--data", "phantom2d", "--loss", loss, *options.split(), "--out", str(out)]
    assert main(command) == 0
    with (out / "log.csv").open() as file:
        first = {name: float(number) for name, number in next(csv.DictReader(file)).items()}
    np.testing.assert_allclose(first["loss"], first["dice"] + 0.5 * first[TVERSKY], rtol=1e-6)

    config, info = read_config(out)
    assert config.loss == loss
    task = open_task(config)
    batch = next(
        train_batches(task.dataset, task.splits.train, patch=task.config.data.patch, batch_size=8, seed=0)
    )
    model: Any = make_model(config, info)
    logits = model(jnp.asarray(batch["image"]))
    own = sys.modules["my_losses"].tversky(logits, jnp.asarray(batch["label"]), alpha=0.3)
    np.testing.assert_allclose(first[TVERSKY], own, rtol=1e-5)
