"""`calib-jax ensemble`: the mean of several predictions of the same cases."""

import argparse
from pathlib import Path

from calib_jax.commands import options as shared

_DESCRIPTION = """\
Averages the probabilities of several models or folds, case by case, and writes them in the format of the first.

All must have predicted the same cases. The files may differ in format and in the order of axes. Memory holds two
predictions of one case. A label map beside the first prediction is replaced by that of the mean.
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
    shared.add_folders(parser, labels=False)


def run(options: argparse.Namespace) -> int:
    """Writes the mean of each case."""
    from calib_jax.commands import _cases
    from calib_jax.predictions import PredictionError, write_probabilities

    _cases.check_out(options)
    predictions = shared.open_folders(options)
    models = predictions.models
    if len(models) < 2:
        raise ValueError("--probs names one folder: give it once for each model or fold, at least twice.")
    shared.print_notices(predictions)

    def work(name: str) -> None:
        total = None
        for model in models:
            case = predictions.read(name, model)
            if total is None:
                total = case.probs.copy(order="K")
            elif case.probs.shape != total.shape:
                raise PredictionError(
                    f"{predictions.template(name, model).files[0]} has shape {case.probs.shape} and that of "
                    f"{models[0]} has {total.shape}: predict all on one grid."
                )
            else:
                total += case.probs
        assert total is not None
        total /= len(models)
        template = predictions.template(name, models[0])
        path = _cases.path_in(options.out, template)
        write_probabilities(path, total, template)
        _cases.write_label(template, path, total, predictions)

    done, status = _cases.for_each_case(predictions.case_names, work)
    _cases.copy_dataset_json(predictions, options.out)
    print(f"Wrote the mean of {len(models)} predictions of {done} cases to {options.out}")
    return status
