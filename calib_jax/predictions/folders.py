"""Opens folders of predictions and labels, matches their files by name, and reads one case at a time."""

import os
from collections.abc import Iterator, Mapping, Sequence

from calib_jax.predictions.case import Case
from calib_jax.predictions.writing import PredictionFile

AnyPath = str | os.PathLike[str]


class Predictions:
    """Predictions of one or several models, and their labels.

    Attributes:
        models: names of the models; `("model",)` if one folder without a name was given.
        case_names: cases that all models and the labels have, sorted.
        class_names: all classes, background first; for regions the names of the regions.
        regions: whether each channel is a region of its own, a sigmoid; regions overlap and have no background.
        notices: sentences about what has no partner, what was ignored, and what was taken for something else.
    """

    models: tuple[str, ...]
    case_names: tuple[str, ...]
    class_names: tuple[str, ...]
    regions: bool
    notices: tuple[str, ...]

    def read(self, case_name: str, model: str | None = None) -> Case:
        """Reads and checks one case."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Case]:
        """Every case of every model; one case is held at a time."""
        for name in self.case_names:
            for model in self.models:
                yield self.read(name, model)

    def template(self, case_name: str, model: str | None = None) -> PredictionFile:
        """What `write_probabilities` needs to write a case in the format that it came in."""
        raise NotImplementedError


def open_predictions(
    probs: AnyPath | Mapping[str, AnyPath],
    labels: AnyPath | None = None,
    *,
    images: AnyPath | None = None,
    dataset_json: AnyPath | None = None,
    logits: bool = False,
    class_names: Sequence[str] | None = None,
) -> Predictions:
    """Opens folders of predictions and matches their files with labels by name."""
    raise NotImplementedError
