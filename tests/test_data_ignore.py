"""Voxels without a label: no loss, no gradient and no metric sees them, whatever is done to a case."""

import dataclasses
import functools
import json
from itertools import islice
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import optax
import pytest
import twin
from flax import nnx

import calib_jax
from train.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from train.data.annotators import majority, soft_label
from train.data.augment_config import NO_AUGMENTATION, AugmentConfig
from train.data.augmentation import augment
from train.data.cache import CaseStore
from train.data.geometry import Geometry
from train.data.ignore import IGNORE, mask_ignored
from train.data.open import open_dataset
from train.data.phantom import PhantomDataset
from train.data.pipeline import train_batches
from train.data.transforms import draw_crop
from train.errors import InputError
from train.evaluate import evaluate, evaluate_posterior
from train.fit import fit
from train.inference import volume_predictor
from train.losses import parse_loss
from train.models.configs import UNetConfig
from train.run.logs import read_log
from train.step import init_state
from train.task import open_task
from train.temperature import fit_temperature
from train.terms import TERMS

SHAPE = (6, 5, 4)
LABELS = {"background": 0, "organ": 1, "core": 2, "ignore": 3}


def truth(seed):
    """Labels of which one slice is annotated; of case 2 nothing is."""
    full = np.random.default_rng(seed).integers(0, 3, SHAPE).astype(np.uint8)
    annotated = np.zeros(SHAPE, bool)
    annotated[:, :, 2] = seed != 2
    return full, annotated


def write(path, voxels):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)


@pytest.fixture
def folder(tmp_path):
    """Cases c0 and c1 are sparsely annotated, c2 not at all."""
    for seed in range(3):
        full, annotated = truth(seed)
        image = full + np.random.default_rng(10 + seed).normal(size=SHAPE)
        write(tmp_path / f"imagesTr/c{seed}_0000.nii.gz", image.astype(np.float32))
        write(tmp_path / f"labelsTr/c{seed}.nii.gz", np.where(annotated, full, 3).astype(np.uint8))
    declare(tmp_path, LABELS)
    return tmp_path


def declare(folder, labels):
    description = {"channel_names": {"0": "MRI"}, "labels": labels, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    "labels",
    [
        LABELS,
        {**LABELS, "ignore": [3]},
        {"background": 0, "organ": 1, "core": 2, " Ignore": "3"},
        {"0": "background", "1": "organ", "2": "core", "3": "IGNORE"},
    ],
)
def test_ignore_is_no_class(folder, labels):
    declare(folder, labels)
    dataset = open_dataset(f"nnunet:{folder}")
    assert (dataset.class_names, dict(dataset.regions)) == (("background", "organ", "core"), {})
    assert dataset.has_ignore
    for index in range(3):
        full, annotated = truth(index)
        np.testing.assert_array_equal(dataset.load(index).label, np.where(annotated, full, IGNORE))


def test_data_without_ignore_have_none():
    assert not PhantomDataset().has_ignore


# The loss.

PARTS = ("+".join(term for term in TERMS if term not in ("softace", "svls", "nacl")), "softace")


def sample(classes=3, spatial=(8, 8)):
    """Logits, ids with `IGNORE` and where they are known: 20 voxels of two images, none of the third."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, *spatial, classes)).astype(np.float32)
    known = rng.permuted(np.arange(64) < np.array([[20], [20], [0]]), axis=1).reshape(3, *spatial)
    ids = np.where(known, rng.integers(0, classes, known.shape), IGNORE).astype(np.int32)
    return logits, ids, known


@functools.partial(jax.jit, static_argnums=0)
def parts_of(loss, logits, labels):
    labels, where = mask_ignored(labels)
    return loss.parts(logits, labels, None, where)


@pytest.mark.parametrize("name", PARTS)
def test_a_loss_is_that_of_the_annotated_voxels_of_each_image(name):
    logits, ids, known = sample()
    loss = parse_loss(name)
    of_known = jax.jit(loss.parts)
    images = [of_known(logits[i][known[i]][None], ids[i][known[i]][None]) for i in range(2)]
    expected = jax.tree.map(lambda a, b: (a + b) / 3, *images)
    shares = np.eye(3, dtype=np.float32)[np.where(known, ids, 0)] * known[..., None]
    for labels in (ids, shares):
        chex.assert_trees_all_close(parts_of(loss, logits, labels), expected, rtol=1e-5)


def test_ace_is_that_of_the_twin():
    logits, ids, known = sample()
    probs = np.asarray(jax.nn.softmax(logits))
    # The mean over all three images, of which one costs nothing, where the twin leaves that one out.
    value = 2 / 3 * twin.loss(probs, ids, where=known)[0]
    np.testing.assert_allclose(parts_of(parse_loss("ace"), logits, ids)["ace"], value, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "levels"), [("+".join(TERMS).replace("+softace", ""), 1), ("dice+ce+softace", 2)]
)
def test_ignored_voxels_get_no_gradient_and_may_be_anything(name, levels):
    logits, ids, known = sample()
    loss = parse_loss(name)

    @jax.jit
    @jax.value_and_grad
    def objective(logits, ids):
        deep = (logits, logits[:, 1::2, 1::2]) if levels > 1 else logits
        return loss.total(parts_of(loss, deep, ids))

    value, gradient = objective(logits, ids)
    assert np.isfinite(value)
    assert value > 0
    np.testing.assert_array_equal(gradient[~known], 0)
    assert np.abs(gradient[known]).min() > 0
    broken = np.where(known[..., None], logits, np.nan)
    other_value, other_gradient = objective(broken, ids)
    np.testing.assert_array_equal(other_value, value)
    np.testing.assert_array_equal(other_gradient, gradient)
    nothing, no_gradient = objective(logits, np.full_like(ids, IGNORE))
    np.testing.assert_allclose(nothing, 0, atol=1e-6)
    np.testing.assert_array_equal(no_gradient, 0)


# What is done to cases on the way.


def test_a_voxel_counts_by_those_who_labelled_it():
    votes = np.array([[0, 1, IGNORE], [IGNORE, 2, IGNORE], [IGNORE, IGNORE, IGNORE], [0, 2, 2]], np.uint8)
    shares = [[0.5, 0.5, 0], [0, 0, 1], [0, 0, 0], [1 / 3, 0, 2 / 3]]
    np.testing.assert_allclose(soft_label(votes, 3), shares, rtol=1e-6)
    weighted = soft_label(votes, 3, np.array([0.6, 0.2, 0.2]))
    np.testing.assert_allclose(weighted[:2], [[0.75, 0.25, 0], [0, 0, 1]], rtol=1e-6)
    np.testing.assert_array_equal(majority(votes, 3), [0, 2, IGNORE, 2])


def test_interpolated_shares_count_where_half_of_a_voxel_is_labelled():
    shares = jnp.array([[0.0, 0.0], [0.1, 0.3], [0.2, 0.4], [0.25, 0.75]])
    label, where = mask_ignored(shares)
    np.testing.assert_array_equal(where, [False, False, True, True])
    np.testing.assert_allclose(label[2:], [[1 / 3, 2 / 3], [0.25, 0.75]], rtol=1e-6)


def test_turned_and_zoomed_labels_hold_no_other_id():
    config = AugmentConfig(zoom_prob=1.0, rotation_prob=1.0)
    full, annotated = truth(0)
    ids = jnp.where(annotated, full, IGNORE).astype(jnp.int32)
    moved = jax.jit(lambda key, label: augment(key, jnp.zeros((*SHAPE, 1)), label, config)[1])
    for key in jax.random.split(jax.random.key(0), 2):
        assert set(np.unique(moved(key, ids))) <= {0, 1, 2, IGNORE}
        soft, where = mask_ignored(moved(key, jax.nn.one_hot(ids, 3)))
        np.testing.assert_allclose(soft.sum(-1)[where], 1, rtol=1e-5)
        assert 0 < where.mean() < 1


@pytest.mark.parametrize(
    "geometry", [Geometry((0.5, 1.0, 1.0)), Geometry((1.0, 1.0, 0.5)), Geometry(crop_margin=0)]
)
def test_resampled_and_kept_labels_stay_ignored(folder, geometry, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    dataset, again = (
        open_dataset(f"nnunet:{folder}", geometry=geometry, cache_dir=str(cache)) for _ in range(2)
    )
    case, kept = dataset.load(0), again.load(0)
    full, annotated = truth(0)
    np.testing.assert_array_equal(case.truth(3), np.where(annotated, full, IGNORE))
    np.testing.assert_array_equal(kept.label, case.label)
    assert set(np.unique(case.label)) == {0, 1, 2, IGNORE}
    assert (dataset.load(2).label == IGNORE).all()
    # Undeclared it is a class, and another case to the store.
    declare(folder, {"background": 0, "organ": 1, "core": 2, "other": 3})
    classes = open_dataset(f"nnunet:{folder}", geometry=geometry, cache_dir=str(cache))
    assert set(np.unique(classes.load(0).label)) == {0, 1, 2, 3}
    assert isinstance(classes._store, CaseStore)


def test_a_resampled_voxel_is_ignored_where_more_than_half_of_it_is():
    """At the middle of four voxels: of two classes and two ignored, and of one class and three ignored."""
    few = np.array([[0, 1], [IGNORE, IGNORE]], np.uint8)[..., None]
    fewer = np.where(few == 0, IGNORE, few)
    for label, expected in ((few, 0), (fewer, IGNORE)):
        placement = Geometry((2.0, 2.0, 1.0)).place(np.ones((*label.shape, 1), np.float32), np.eye(4))
        np.testing.assert_array_equal(placement.label(label), expected)


def test_crops_are_centred_on_what_is_annotated():
    label = np.full((40, 30), IGNORE, np.uint8)
    label[20] = 0
    label[20, 3] = 1
    for seed in range(20):
        rng = np.random.default_rng(seed)
        anywhere = label[draw_crop(label, (5, 4), rng, has_ignore=True)]
        assert (anywhere != IGNORE).any()
        assert 1 in label[draw_crop(label, (5, 4), rng, foreground_share=1.0, has_ignore=True)]
    line = draw_crop(np.array([IGNORE] * 9 + [0], np.uint8), (2,), np.random.default_rng(0), has_ignore=True)
    assert line == (slice(8, 10),)


@pytest.mark.parametrize("value", [0, IGNORE])
def test_crops_lie_anywhere_where_all_voxels_are_annotated_or_none_is(value):
    label = np.full((30,), value, np.uint8)
    crops = [
        draw_crop(label, (3,), np.random.default_rng(i), foreground_share=0.5, has_ignore=True)
        for i in range(9)
    ]
    assert crops == [
        draw_crop(0 * label, (3,), np.random.default_rng(i), foreground_share=0.5) for i in range(9)
    ]


def test_padding_is_ignored_too(folder):
    batches = train_batches(open_dataset(f"nnunet:{folder}"), ["c0"], patch=(8, 6, 4), batch_size=1, seed=0)
    label = next(batches)["label"][0]
    assert label.dtype == np.int32
    full, annotated = truth(0)
    np.testing.assert_array_equal(label[1:7, :5], np.where(annotated, full, IGNORE))
    assert (label[0] == IGNORE).all()
    assert (label[:, 5] == IGNORE).all()


# Metrics.


def random_probs():
    return np.asarray(jax.nn.softmax(jax.random.normal(jax.random.key(0), (*SHAPE, 3))))


class Predictor(SimpleNamespace):
    """Predicts the same of every image."""

    regions = ()

    def __call__(self, image):
        return random_probs()

    def summary(self, summary, image, label):
        return summary(jnp.asarray(random_probs()), jnp.asarray(label), jnp.ones(SHAPE, bool))


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("geometry", [None, Geometry(crop_margin=0)])
def test_metrics_are_those_of_the_annotated_voxels(folder, regions, geometry):
    if regions:
        declare(folder, {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3})
    dataset = open_dataset(f"nnunet:{folder}", geometry=geometry)
    result = evaluate("random", Predictor(), dataset, ["c0", "c1", "c2"])
    groups = {"whole": (1, 2), "core": (2,)} if regions else {"organ": (1,), "core": (2,)}
    assert result.class_names == tuple(groups)
    for i in range(2):
        full, annotated = truth(i)
        for j, ids in enumerate(groups.values()):
            probs = random_probs()[annotated][:, list(ids)].sum(-1)
            true, predicted = (
                np.isin(x, ids) for x in (full[annotated], random_probs()[annotated].argmax(-1))
            )
            stats = twin.bin_statistics(probs[None, :, None], true[None, :, None].astype(float))
            np.testing.assert_array_equal(result.stats.count[i, j], stats.count[0, 0])
            np.testing.assert_allclose(result.stats.label_sum[i, j], stats.label_sum[0, 0])
            np.testing.assert_allclose(
                result.metrics()["ACE"][i, j], twin.errors(stats, "ace")[0, 0], rtol=1e-5
            )
            dice = 2 * (true & predicted).sum() / (true.sum() + predicted.sum())
            np.testing.assert_allclose(result.dice[i, j], dice, rtol=1e-6)
    for values in result.metrics().values():
        assert np.isnan(values[2]).all()


def test_several_annotators_may_leave_out_voxels(folder):
    full, annotated = truth(0)
    second = np.where(np.arange(SHAPE[0])[:, None, None] < 2, 1, 3) * np.ones(SHAPE, int)
    (folder / "labelsTr/c0.nii.gz").rename(folder / "labelsTr/c0_annotator1.nii.gz")
    write(folder / "labelsTr/c0_annotator2.nii.gz", second.astype(np.uint8))
    dataset = open_dataset(f"nnunet:{folder}", all_annotators=True)
    known = annotated | (second != 3)
    result = evaluate("random", Predictor(), dataset, ["c0"])
    np.testing.assert_array_equal(result.stats.count.sum(-1), known.sum())
    votes = np.stack([np.where(annotated, full, IGNORE), np.where(second == 3, IGNORE, second)], -1)
    shares = np.stack([(votes == k).sum(-1) / np.maximum((votes != IGNORE).sum(-1), 1) for k in range(3)], -1)
    np.testing.assert_allclose(result.stats.label_sum.sum(-1)[0], shares[..., 1:].sum((0, 1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(dataset.load(0).label == IGNORE, ~known)
    for batch in islice(
        train_batches(dataset, ["c0"], patch=SHAPE, batch_size=1, seed=0, random_annotators=True), 3
    ):
        np.testing.assert_allclose(batch["label"][0].sum(-1), known, atol=1e-6)


class Voxelwise(nnx.Module):
    """Logits that depend on no neighbour."""

    def __init__(self):
        self.scale = nnx.Param(jnp.array([0.0, 1.0, 2.0]))

    def __call__(self, images):
        return images * self.scale[...]


def test_temperature_is_that_of_the_annotated_voxels(folder):
    dataset = open_dataset(f"nnunet:{folder}")
    predict = volume_predictor(*init_state(Voxelwise(), optax.sgd(0.1)), (8, 8, 8))
    found = fit_temperature(predict, dataset, ["c0", "c1", "c2"])
    images = np.concatenate([dataset.load(i).image[truth(i)[1]] for i in range(2)])
    ids = np.concatenate([truth(i)[0][truth(i)[1]] for i in range(2)]).astype(np.int32)
    expected = calib_jax.fit_temperature(images[None] * np.array([0, 1, 2], np.float32), ids[None])
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    with pytest.raises(InputError, match="No temperature can be fitted on c2"):
        fit_temperature(predict, dataset, ["c2"])


def test_the_true_posterior_is_measured_without_ignored_voxels():
    class Sparse(PhantomDataset):
        has_ignore = True

        def load(self, index):
            case = super().load(index)
            label = np.where(np.arange(16)[:, None] < 5, case.label, IGNORE).astype(np.uint8)
            return dataclasses.replace(case, label=label)

    dataset = Sparse(spatial_shape=(16, 12), num_cases=2)
    result = evaluate_posterior(dataset, dataset.case_names)
    np.testing.assert_array_equal(result.stats.count.sum(-1), 5 * 12)


def test_training_on_nothing_costs_nothing(folder, tmp_path_factory):
    """All voxels of all cases are ignored: the loss of a run is 0, and its validation has no figure."""
    for file in (folder / "labelsTr").iterdir():
        write(file, np.full(SHAPE, 3, np.uint8))
    config = RunConfig(
        "dice",
        data=DataConfig(f"nnunet:{folder}", num_test=1, num_val=1),
        model=ModelConfig(network=UNetConfig((2, 4), (2,), num_res_units=0)),
        training=TrainingConfig(steps=1, batch_size=8),
        augment=NO_AUGMENTATION,
    )
    run = tmp_path_factory.mktemp("runs") / "run"
    fit(open_task(config), run)
    (row,) = read_log(run / "log.csv")
    assert (row["loss"], row["grad_norm"]) == (0, 0)
    (validated,) = read_log(run / "validation.csv")
    assert np.isnan([validated[name] for name in ("Dice", "ACE")]).all()
