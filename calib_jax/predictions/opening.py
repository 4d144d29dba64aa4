"""Opens folders of predictions and labels, and matches their files by name."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from calib_jax.predictions import names
from calib_jax.predictions.case import PredictionError
from calib_jax.predictions.dataset_json import find_dataset_json, read_dataset_json
from calib_jax.predictions.folders import Predictions
from calib_jax.predictions.names import Folder, some

AnyPath = str | os.PathLike[str]


def open_predictions(
    probs: AnyPath | Mapping[str, AnyPath],
    labels: AnyPath | None = None,
    *,
    images: AnyPath | None = None,
    dataset_json: AnyPath | None = None,
    logits: bool = False,
    class_names: Sequence[str] | None = None,
) -> Predictions:
    """Opens folders of predictions and matches their files with labels by name. Reads headers only.

    Files may be `.npz` of nnU-Net (v2, or v1 without cropping), `.npy`, `.npz`, NIfTI, `.mha`, `.nrrd` (these with
    the extra `itk`), PNG or TIFF. The class axis is the first or the last; or each class has a file of its own; or
    there is one foreground channel. Names match without words such as `_seg`, `_trans`, `_prob`. Pickles are never
    opened.

    Args:
        probs: folder with the files of one model; or several by the models' names. Also a single file.
        labels: folder with label maps, or a single one. Without it, cases have no labels.
        images: folder with the scans, of which the first channel is read. Without labels, they tell the grid of
            files that do not say where they lie, such as `.npz`.
        dataset_json: names the classes, regions and the ignore label, as in nnU-Net. By default `dataset.json` in
            one of these folders, or in the folder that it lies in.
        logits: whether the files hold logits: softmax, or for regions sigmoids, makes probabilities of them.
        class_names: one for each class, the background first; or for each region.

    Returns:
        `Predictions`, an iterator of `Case`.

    Raises:
        PredictionError: a folder does not exist or holds nothing that can be read, no case has all its files, or no
            file of a case can be opened. Faults of single cases are raised when these are read.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> folder = Path(tempfile.mkdtemp())
        >>> np.save(folder / "a_probs.npy", np.full((4, 5, 2), 0.5, np.float32))
        >>> np.save(folder / "a_label.npy", np.eye(4, 5, dtype=np.uint8))
        >>> predictions = open_predictions(folder / "a_probs.npy", folder / "a_label.npy")
        >>> [(case.name, case.probs.shape, int(case.labels.sum())) for case in predictions]
        [('a', (4, 5, 2), 4)]
    """
    given = {"model": probs} if isinstance(probs, str | os.PathLike) else dict(probs)
    paths = {str(name): Path(path).expanduser() for name, path in given.items()}
    if not paths:
        raise PredictionError("probs names no folder: give at least one.")
    label_path = Path(labels).expanduser() if labels is not None else None
    found_labels = names.find_labels(label_path) if label_path is not None else None
    file = Path(dataset_json).expanduser() if dataset_json is not None else None
    if file is None:
        searched = [*paths.values(), *([label_path] if label_path is not None else [])]
        file = find_dataset_json(path if path.is_dir() else path.parent for path in searched)
    dataset = (
        read_dataset_json(file / "dataset.json" if file.is_dir() else file) if file is not None else None
    )
    declared = tuple(class_names or ())
    if not declared and dataset is not None:
        declared = tuple(dataset.labels.regions or dataset.labels.class_names)
    known = set(found_labels.cases) if found_labels is not None else set()
    folders = {name: names.find_predictions(path, known, declared) for name, path in paths.items()}
    if found_labels is not None and label_path is not None and label_path.is_file():
        (only,) = found_labels.cases
        for name, path in paths.items():
            if path.is_file():
                folders[name].cases = {only: next(iter(folders[name].cases.values()))}
    notices = _without_partner(paths, folders, label_path, found_labels)
    shared = set.intersection(*map(set, (folder.cases for folder in folders.values())))
    if found_labels is not None:
        shared &= set(found_labels.cases)
    if not shared:
        raise PredictionError(_no_case(paths, folders, label_path, found_labels))
    image_path = Path(images).expanduser() if images is not None else None
    found_images = names.find_images(image_path) if image_path is not None else {}
    if image_path is not None and (missing := sorted(shared - set(found_images))):
        notices.append(f"{image_path} has no image of {some(missing)}.")
    located = {name: (path if path.is_dir() else path.parent, folders[name]) for name, path in paths.items()}
    return Predictions(
        located,
        found_labels,
        found_images,
        dataset=dataset,
        logits=logits,
        class_names=class_names,
        notices=notices,
    )


def _without_partner(
    paths: Mapping[str, Path], folders: Mapping[str, Folder], label_path: Path | None, labels: Folder | None
) -> list[str]:
    """Sentences about cases that one folder has and another has not, and about files of other kinds."""
    notices = []
    everything = set.union(*(set(folder.cases) for folder in folders.values()))
    for name, folder in folders.items():
        others = (set(labels.cases) if labels is not None else set()) | everything
        if missing := sorted(others - set(folder.cases)):
            notices.append(f"{paths[name]} has no prediction of {some(missing)}.")
        if folder.ignored:
            notices.append(f"{paths[name]} holds other files, which are not opened: {some(folder.ignored)}.")
    if labels is not None and (missing := sorted(everything - set(labels.cases))):
        notices.append(f"{label_path} has no label of {some(missing)}.")
    return notices


def _no_case(
    paths: Mapping[str, Path], folders: Mapping[str, Folder], label_path: Path | None, labels: Folder | None
) -> str:
    path, folder = next(iter(paths.values())), next(iter(folders.values()))
    remedy = "give all files of a case one name"
    first = f"{path} has predictions of {some(sorted(folder.cases))}"
    if labels is not None and not set(labels.cases) & set(folder.cases):
        return f"{first}, but {label_path} has labels of {some(sorted(labels.cases))}: {remedy}."
    other = next(
        (name for name in folders if not set(folders[name].cases) & set(folder.cases)), list(folders)[-1]
    )
    return f"{first}, but {paths[other]} of {some(sorted(folders[other].cases))}: {remedy}."
