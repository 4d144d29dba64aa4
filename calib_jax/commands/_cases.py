"""What commands that write a file for each case share."""

import argparse
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from calib_jax.commands import options as shared


def check_out(options: argparse.Namespace) -> None:
    """Raises ValueError if the output folder is one of the folders that are read, or lies in one or around one."""
    folders = shared.named_folders(options.probs)
    probs = list(folders.values()) if isinstance(folders, Mapping) else [folders]
    inside = options.out.expanduser().resolve()
    for source in (*probs, options.images):
        folder = source.expanduser().resolve() if source is not None else None
        if folder and (inside == folder or folder in inside.parents or inside in folder.parents):
            raise ValueError(
                f"--out {options.out} and {source} lie in each other: choose another output folder."
            )


def for_each_case(names: Sequence[str], work: Callable[[str], None]) -> tuple[int, int]:
    """Calls `work` with the name of each case; a fault is printed and ends its case only.

    Returns:
        Number of cases without a fault, and the exit status: 0, or 1 if there was a fault.

    Raises:
        ValueError: every case had a fault.
    """
    from calib_jax.report.study import Progress

    faults = 0
    with Progress() as progress:
        for done, name in enumerate(names, 1):
            try:
                work(name)
            except (ValueError, OSError, MemoryError) as error:
                progress.say(f"fault: {sentence(error, name)}")
                faults += 1
            progress(done, len(names))
    if faults == len(names):
        raise ValueError("no case could be used, see the sentences above.")
    return len(names) - faults, 1 if faults else 0


def sentence(error: Exception, name: str) -> str:
    """The message of an exception on one line, with the name of the case."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if name in text else f"{name}: {text}"


def image_of(case: Any, images: Path | None) -> Any:
    """The image of a case, `[1, *spatial, 1]`.

    Raises:
        ValueError: there is none.
    """
    if case.image is None:
        where = f"{images} has none that fits" if images is not None else "give --images"
        raise ValueError(f"{case.name} needs an image, which this calibration sees too: {where}.")
    return case.image[None, ..., None]


def path_in(out: Path, template: Any) -> Path:
    """Where a case goes in the output folder.

    Raises:
        ValueError: a link leads out of that folder.
    """
    path = template.path_in(out)
    if not path.parent.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{path.parent} leads out of {out}: remove this link.")
    return path


def copy_dataset_json(predictions: Any, out: Path) -> None:
    """Copies the `dataset.json` that was used, so that the output folder is read like the one that it came from."""
    if predictions.dataset is not None:
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(predictions.dataset.file, out / "dataset.json")


def copy_or_write_label(template: Any, path: Path, probs: Any, predictions: Any) -> None:
    """Copies the label map beside a prediction, byte for byte; without one, writes that of its probabilities.

    Args:
        template: of the prediction.
        path: of its copy in the output folder.
        probs: before they are changed.
        predictions: that `template` comes from.
    """
    if template.segmentation is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(template.segmentation, path.with_name(template.segmentation.name))
        return
    write_label(template, path, probs, predictions)


def write_label(template: Any, path: Path, probs: Any, predictions: Any) -> None:
    """Writes the label map of probabilities: over the copy of the one beside them, or as `CASE_label`."""
    import numpy as np

    from calib_jax.predictions.arrays import ending_of
    from calib_jax.predictions.labels import predicted_ids
    from calib_jax.predictions.names import case_name
    from calib_jax.predictions.writing import write_volume

    order = predictions.dataset.class_order if predictions.dataset is not None else ()
    ids = predicted_ids(probs, regions=predictions.regions, class_order=order)
    if ids is None:
        return
    if template.segmentation is not None:
        target = path.with_name(template.segmentation.name)
    else:
        ending = {"volume": ending_of(path), "image": ".png"}.get(template.kind)
        if ending is None:
            ending = ".nii.gz" if template.reference.grid is not None else ".npy"
        target = path.with_name(f"{case_name(path) or path.parent.name}_label{ending}")
    write_volume(target, ids.astype(np.min_scalar_type(int(ids.max(initial=0)))), template.reference)
