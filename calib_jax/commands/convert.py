"""`calib-jax convert`: predictions in another file format."""

import argparse
from pathlib import Path

from calib_jax.commands import options as shared

_DESCRIPTION = """\
Writes predictions in another format: nnU-Net's .npz as NIfTI with the classes along the fourth axis, which
viewers open; NIfTI or anything else as nnU-Net's .npz. Axes and affine are those of the label map beside the
file, or of the image. Label maps are copied.

A case is written whole or not at all. The same command goes on where it was stopped.
"""
_EXAMPLE = """\
examples:
  calib-jax convert --probs fold_0/validation --to nii.gz --out for_viewer
  calib-jax convert --probs monai_out --to npz --out like_nnunet
  calib-jax convert --probs softmax_only --images imagesTs --to nii.gz --out for_viewer
"""
FORMATS = ("nii.gz", "nii", "npz")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLE
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the new files")
    parser.add_argument("--to", choices=FORMATS, required=True, help="format of the new files")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="type of numbers in .npz (default: float32)",
    )
    shared.add_folders(parser, labels=False, images=shared.FOR_THE_GRID)
    shared.add_jobs(parser)


def run(options: argparse.Namespace) -> int:
    """Writes each case in the other format."""
    import numpy as np

    from calib_jax.commands import _cases
    from calib_jax.predictions import PredictionError
    from calib_jax.predictions.arrays import NNUNET_KEYS
    from calib_jax.predictions.writing import write_volume, written_whole

    shared.check_jobs(options)
    _cases.check_out(options)
    predictions = shared.open_folders(options)
    if len(predictions.models) > 1:
        raise ValueError("--probs names several folders: convert one after the other.")
    shared.print_notices(predictions)

    def work(name: str) -> list[Path]:
        case, template = predictions.read(name, parts=()), predictions.template(name)
        grid = template.reference.grid
        path = _cases.path_in(options.out, template)
        if options.to == "npz":
            target = path.with_name(f"{name}.npz")
            spatial = range(case.probs.ndim - 1)
            order = reversed(spatial) if grid is not None else spatial
            stored = case.probs.transpose(case.probs.ndim - 1, *order).astype(options.dtype, copy=False)
            with written_whole(target) as partial, open(partial, "wb") as file:
                np.savez_compressed(file, **{NNUNET_KEYS[0]: stored})
        else:
            if grid is None:
                raise PredictionError(
                    f"{template.files[0]} does not say where its voxels lie: give --images, the folder of "
                    "the scans."
                )
            target = path.with_name(f"{name}_probs.{options.to}")
            write_volume(target, case.probs, template.reference)
        return [target, *_cases.copy_label(template, path)]

    settings = ["convert", options.to, options.dtype]
    return _cases.write_cases(options, predictions, work, settings=settings)
