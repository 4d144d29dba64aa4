"""The evaluation of a run with its findings: the figures of `evaluate`, and what they show."""

import csv
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.data.case import Case, Source
from train.data.geometry import Geometry
from train.data.ignore import IGNORE
from train.data.phantom import PhantomDataset
from train.errors import InputError
from train.evaluate import evaluate
from train.findings import Row, can_measure, details_of_rows, measure_rows, results_of_rows
from train.inference import VolumePredictor


class Softmax:
    """Four classes by intensity."""

    def __call__(self, scale: Any, images: jax.Array) -> jax.Array:
        return jax.nn.softmax(scale * images[..., :1] * jnp.arange(4.0), -1)


class Sigmoids:
    regions = ("inside", "organ")

    def __call__(self, scale: Any, images: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(scale * images[..., :1] + jnp.array([-1.0, 0.5]))


class WithRegions(PhantomDataset):
    regions = {"organ": (1, 2, 3), "inside": (2, 3)}  # noqa: RUF012
    subjects = ("left", "left", "right")


class Resampled(PhantomDataset):
    """The network sees another grid than that of the label."""

    def load(self, index: int) -> Case:
        case = super().load(index)
        placement = Geometry((1.5, 1.5, 1.5), crop_margin=1).place(case.image, case.affine)
        return dataclasses.replace(
            case,
            image=placement.image(case.image, "linear"),
            label=placement.label(case.label),
            affine=placement.affine,
            source=Source(placement, case.label),
        )


class PartlyLabelled(PhantomDataset):
    """The first rows have no label; the last case has none at all."""

    has_ignore = True

    def load(self, index: int) -> Case:
        case = super().load(index)
        label = case.label.copy()
        label[: 5 if index < len(self) - 1 else None] = IGNORE
        return dataclasses.replace(case, label=label)


CASES: list[Any] = [
    (PhantomDataset, Softmax()),
    (WithRegions, Softmax()),
    (WithRegions, Sigmoids()),
    (Resampled, Softmax()),
    (PartlyLabelled, Softmax()),
]


@pytest.mark.parametrize(("kind", "forward"), CASES)
@pytest.mark.parametrize("shape", [(24, 20), (12, 16, 10)])
def test_figures_are_those_of_evaluate(
    tmp_path: Path, kind: type[PhantomDataset], forward: Any, shape: tuple[int, ...]
) -> None:
    dataset = kind(spatial_shape=shape, num_cases=3)
    names = dataset.case_names
    rows = [Row(str(scale), VolumePredictor(forward, scale, (8,) * len(shape))) for scale in (2.0, 5.0)]
    assert can_measure(dataset, names)
    study = measure_rows(rows, dataset, names)
    regions = getattr(forward, "regions", ())
    results = results_of_rows(study, dataset, regions)
    details = details_of_rows(study, results, dataset, regions, tmp_path)
    labelled = names[:2] if kind is PartlyLabelled else names
    assert [fault.split()[0] for fault in study.faults] == list(names[len(labelled) :])
    for row, result in zip(rows, results, strict=True):
        expected = evaluate(row.name, row.predict, dataset, labelled)
        assert (result.case_names, result.class_names) == (expected.case_names, expected.class_names)
        subjects = dict(zip(names, dataset.subjects, strict=True))
        assert result.subjects == expected.subjects == tuple(subjects[name] for name in labelled)
        for name, values in expected.metrics().items():
            np.testing.assert_allclose(result.metrics()[name], values, atol=1e-6)
        np.testing.assert_array_equal(result.stats.count, expected.stats.count)
    assert set(details.summary) == {"2.0", "5.0"}
    titles = {section.title for section in details.sections}
    assert {"Volumes", "Thresholds for a larger Dice", "Cases to look at first"} <= titles
    with open(tmp_path / "cases.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * len(labelled) * len(results[0].class_names)
    shown = details.picture_files(tmp_path)
    assert shown
    assert all(path.is_file() for path in shown.values())


def test_data_without_any_label() -> None:
    dataset = PartlyLabelled(spatial_shape=(24, 20), num_cases=1)
    with pytest.raises(InputError, match="no labelled voxel"):
        measure_rows([Row("a", VolumePredictor(Softmax(), 1.0, (8, 8)))], dataset, dataset.case_names)


def test_several_annotators_are_left_to_evaluate() -> None:
    class Annotated(PhantomDataset):
        def load(self, index: int) -> Case:
            case = super().load(index)
            return dataclasses.replace(case, annotations=np.stack([case.label] * 2, -1))

    dataset = Annotated(spatial_shape=(24, 20), num_cases=2)
    assert not can_measure(dataset, dataset.case_names)
