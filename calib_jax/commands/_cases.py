"""What commands that write files for each case share."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from calib_jax.commands import options as shared

_RECORDS = ".calib-jax"
"""Folder in the output folder that says from what each case was made. Readers pass hidden names over."""


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


def write_cases(
    options: argparse.Namespace,
    predictions: Any,
    work: Callable[[str], Sequence[Path]],
    *,
    settings: Sequence[Any],
    what: str = "",
) -> int:
    """Writes every case that an earlier start with the same files and settings has not written.

    Args:
        options: of the command; files go to `options.out`.
        predictions: whose cases are written.
        work: writes a case and returns its files. A fault ends its case only.
        settings: what the files depend on beside those of `predictions`; JSON.
        what: what is written of the cases.

    Returns:
        The exit status.

    Raises:
        ValueError: no case could be written.
        Stopped: on Ctrl-C, after the cases that were being written.
    """
    from calib_jax._case_loop import for_each_case
    from calib_jax._kept import Kept, load_arrays, save_arrays, versions_of
    from calib_jax.predictions.writing import copy_file

    out: Path = options.out
    kept = Kept(
        out / _RECORDS,
        [*settings, options.logits, list(predictions.class_names)],
        lambda name: [file for model in predictions.models for file in predictions.files(name, model)],
    )
    _check_inside(out, kept.folder)

    def state(files: Sequence[str]) -> str:
        return json.dumps([found[1:] for found in versions_of(out / file for file in files)])

    def find(name: str) -> list[str] | None:
        arrays = load_arrays(kept.path(name), kept.key(name))
        if arrays is None or state(arrays["files"].tolist()) != str(arrays["state"]):
            return None
        return arrays["files"].tolist()

    def write(name: str) -> list[str]:
        key = kept.key(name)  # before the files are read
        files = [path.relative_to(out).as_posix() for path in work(name)]
        save_arrays(kept.path(name), key, {"files": files, "state": state(files)})
        return files

    cases = [(name,) for name in predictions.case_names]
    outcome = for_each_case(cases, write, find=find, done="written", place=out, jobs=options.jobs)
    if predictions.dataset is not None:  # so that the folder is read like the one that it came from
        copy_file(predictions.dataset.file, out / "dataset.json")
    number = len(outcome.found) - outcome.reused
    print(f"Wrote {what}{number} {'case' if number == 1 else 'cases'} to {out}")
    return outcome.status


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
    _check_inside(out, path.parent)
    return path


def _check_inside(out: Path, folder: Path) -> None:
    if not folder.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{folder} leads out of {out}: remove this link.")


def copy_label(template: Any, path: Path) -> list[Path]:
    """Copies the label map beside a prediction, byte for byte, to the folder of `path`; returns its files."""
    from calib_jax.predictions.volumes import parts_of
    from calib_jax.predictions.writing import copy_file

    if template.segmentation is None:
        return []
    parts = parts_of(template.segmentation)
    return [copy_file(part, path.with_name(part.name)) for part in parts]


def write_label(template: Any, path: Path, probs: Any, predictions: Any) -> list[Path]:
    """Writes the label map of probabilities, with the name of the one beside them or as `CASE_label`.

    Returns:
        Its file; none for regions whose order in a label map is not known.
    """
    import numpy as np

    from calib_jax.predictions.arrays import ending_of
    from calib_jax.predictions.labels import predicted_ids
    from calib_jax.predictions.names import case_name
    from calib_jax.predictions.volumes import DETACHED
    from calib_jax.predictions.writing import write_volume

    order = predictions.dataset.class_order if predictions.dataset is not None else ()
    ids = predicted_ids(probs, regions=predictions.regions, class_order=order)
    if ids is None:
        return []
    beside = template.segmentation
    if beside is not None and not beside.name.lower().endswith(DETACHED):
        target = path.with_name(beside.name)
    else:
        ending = {"volume": ending_of(path), "image": ".png"}.get(template.kind)
        if ending is None:
            ending = ".nii.gz" if template.reference.grid is not None else ".npy"
        target = path.with_name(f"{case_name(path) or path.parent.name}_label{ending}")
    write_volume(target, ids.astype(np.min_scalar_type(int(ids.max(initial=0)))), template.reference)
    return [target]
