"""Several annotators: how their files are found, what is trained on and what is measured."""

import json
from itertools import islice

import jax
import nibabel as nib
import numpy as np
import pytest

import calib_jax
from train.data.annotators import majority, soft_label
from train.data.geometry import Geometry
from train.data.open import open_dataset
from train.data.pipeline import train_batches
from train.errors import InputError
from train.evaluate import SumsOfClasses, case_statistics, evaluate
from train.losses import parse_loss
from train.terms import TERMS

SHAPE = (6, 5, 4)


def write(path, voxels):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)


def ids(seed):
    return np.random.default_rng(seed).integers(0, 3, SHAPE).astype(np.uint8)


@pytest.fixture(params=["msd", "nnunet"])
def spec(request, tmp_path):
    """Case a has three annotators, case b one."""
    names = {"a": ("a_annotator1", "a_annotator2", "a_annotator3"), "b": ("b",)}
    channel = "_0000" if request.param == "nnunet" else ""
    for case, labels in names.items():
        image = np.random.default_rng(0).gamma(2.0, 50.0, SHAPE).astype(np.float32)
        write(tmp_path / f"imagesTr/{case}{channel}.nii.gz", image)
        for seed, label in enumerate(labels):
            write(tmp_path / f"labelsTr/{label}.nii.gz", ids(seed))
    listed = [
        {"image": f"imagesTr/{case}.nii.gz", "label": [f"labelsTr/{label}.nii.gz" for label in labels]}
        for case, labels in names.items()
    ]
    description = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "x", "2": "y"}}
    (tmp_path / "dataset.json").write_text(json.dumps({**description, "training": listed}))
    return f"{request.param}:{tmp_path}"


def test_the_first_annotator_is_the_truth_unless_all_are_asked_for(spec):
    case = open_dataset(spec).load(0)
    assert case.annotations is None
    np.testing.assert_array_equal(case.label, ids(0))


def test_all_annotators_are_kept_and_the_majority_is_the_label(spec):
    dataset = open_dataset(spec, all_annotators=True)
    assert dataset.case_names == ("a", "b")
    case = dataset.load(0)
    stack = np.stack([ids(seed) for seed in range(3)], -1)
    np.testing.assert_array_equal(case.annotations, stack)
    counts = np.stack([(stack == value).sum(-1) for value in range(3)], -1)
    np.testing.assert_array_equal(case.label, counts.argmax(-1))
    np.testing.assert_allclose(case.truth(3), counts / 3, atol=1e-6)
    alone = dataset.load(1)
    np.testing.assert_array_equal(alone.truth(3), np.eye(3)[ids(0)])
    resampled = open_dataset(spec, all_annotators=True, geometry=Geometry((0.5, 1.0, 2.0))).load(0)
    assert resampled.annotations.shape == (12, 5, 2, 3)
    np.testing.assert_array_equal(resampled.truth(3), case.truth(3))


def test_shares_and_majority():
    votes = np.array([[0, 1, 1], [2, 2, 0]], np.uint8)
    np.testing.assert_allclose(
        soft_label(votes, 3, np.array([0.5, 0.25, 0.25])), [[0.5, 0.5, 0], [0.25, 0, 0.75]]
    )
    np.testing.assert_array_equal(majority(votes, 3), [1, 2])


def _labels(spec, **options):
    dataset = open_dataset(spec, all_annotators=True)
    return [
        batch["label"][0]
        for batch in islice(
            train_batches(dataset, ["a"], patch=(8, 4, 4), batch_size=1, seed=0, **options), 4
        )
    ]


def test_batches_hold_shares_that_may_be_drawn(spec):
    plain, drawn = _labels(spec), _labels(spec, random_annotators=True)
    assert plain[0].shape == (8, 4, 4, 3)
    assert plain[0].dtype == np.float32
    assert set(np.unique(np.rint(plain[0] * 3))) <= {0, 1, 2, 3}
    np.testing.assert_array_equal(plain[0][0, ..., 0], 1)  # padding is background
    for label in (*plain, *drawn):
        np.testing.assert_allclose(label.sum(-1), 1, atol=1e-6)
    assert len({np.unique(label).tobytes() for label in drawn}) == 4
    np.testing.assert_array_equal(drawn, _labels(spec, random_annotators=True))


def test_one_label_for_each_case_is_told(tmp_path):
    write(tmp_path / "imagesTr/b_0000.nii.gz", np.ones(SHAPE, np.float32))
    write(tmp_path / "labelsTr/b.nii.gz", ids(0))
    description = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "x": 1, "y": 2}}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match=r"dataset.json has one label for each case: leave out --annotators"):
        open_dataset(f"nnunet:{tmp_path}", all_annotators=True)


class _Random:
    """Predicts the same of every image."""

    regions = ()

    def __call__(self, image):
        return _random_probs()


def _random_probs():
    return np.asarray(jax.nn.softmax(jax.random.normal(jax.random.key(0), (*SHAPE, 3))))


def test_annotated_cases_are_measured_by_shares_and_dice_by_the_majority(spec):
    dataset = open_dataset(spec, all_annotators=True)
    result = evaluate("random", _Random(), dataset, ["a"])
    case = dataset.load(0)
    stats = calib_jax.bin_statistics(_random_probs()[None, ..., 1:], case.truth(3)[None, ..., 1:])
    np.testing.assert_allclose(result.stats.label_sum, stats.label_sum, rtol=1e-5)
    np.testing.assert_array_equal(result.stats.count, stats.count)
    predicted = _random_probs().argmax(-1)
    overlap = [((predicted == c) & (case.label == c)).sum() for c in (1, 2)]
    sizes = [(predicted == c).sum() + (case.label == c).sum() for c in (1, 2)]
    np.testing.assert_allclose(result.dice[0], 2 * np.array(overlap) / sizes, rtol=1e-6)


def test_regions_of_certain_annotators_are_those_of_the_ids():
    regions = SumsOfClasses(((2,), (1, 2)))
    by_ids = case_statistics(_random_probs(), ids(0), regions=regions)
    by_shares = case_statistics(_random_probs(), np.eye(3, dtype=np.float32)[ids(0)], regions=regions)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), by_ids, by_shares)


def test_every_term_of_a_loss_takes_shares():
    logits = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    labels = jax.random.randint(jax.random.key(1), (2, 4, 4), 0, 3)
    for name in ("+".join(term for term in TERMS if term != "softace"), "softace"):
        loss = parse_loss(name)
        hard = loss.parts(logits, labels)
        soft = loss.parts(logits, jax.nn.one_hot(labels, 3))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), hard, soft)
