"""`calib-jax ensemble`: the mean of several predictions of the same cases."""

import argparse
from pathlib import Path

from calib_jax.commands import options as shared

_DESCRIPTION = """\
Averages the probabilities of several models or folds, case by case, and writes them in the format of the first.

All must have predicted the same cases. The files may differ in format and in the order of axes. Memory holds two
predictions of one case. A label map beside the first prediction is replaced by that of the mean.

A case is written whole or not at all. The same command goes on where it was stopped.
"""
_EXAMPLE = """\
examples:
  calib-jax ensemble --probs fold_0 --probs fold_1 --probs fold_2 --out mean
  calib-jax ensemble --probs nnunet --probs monai --images imagesTs --out mean
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLE
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the mean")
    shared.add_folders(parser, labels=False, images=shared.FOR_THE_GRID)
    shared.add_jobs(parser)


def run(options: argparse.Namespace) -> int:
    """Writes the mean of each case."""
    from calib_jax.commands import _cases
    from calib_jax.predictions import PredictionError, write_probabilities
    from calib_jax.predictions.grids import GRID_TOLERANCE

    shared.check_jobs(options)
    _cases.check_out(options)
    predictions = shared.open_folders(options)
    models = predictions.models
    if len(models) < 2:
        raise ValueError("--probs names one folder: give it once for each model or fold, at least twice.")
    shared.print_notices(predictions)

    def work(name: str) -> list[Path]:
        total, grid = None, None
        for model in models:
            case = predictions.read(name, model, parts=())
            template = predictions.template(name, model)
            if total is None:
                total, grid = case.probs.copy(order="K"), template.reference.grid
                continue
            probs, own = case.probs, template.reference.grid
            if grid is not None and own is not None:
                if grid.distance(own)[1] > GRID_TOLERANCE:
                    raise PredictionError(
                        f"{template.files[0]} lies on another grid than that of {models[0]}: predict all on one "
                        "grid."
                    )
                probs = grid.from_turned(probs, own)
            if probs.shape != total.shape:
                raise PredictionError(
                    f"{template.files[0]} has shape {probs.shape} and that of {models[0]} has {total.shape}: "
                    "predict all on one grid."
                )
            total += probs
        assert total is not None
        total /= len(models)
        template = predictions.template(name, models[0])
        path = _cases.path_in(options.out, template)
        written = write_probabilities(path, total, template)
        return [*written, *_cases.write_label(template, path, total, predictions)]

    what = f"the mean of {len(models)} predictions of "
    return _cases.write_cases(options, predictions, work, settings=["ensemble"], what=what)
