"""The layout of the Medical Segmentation Decathlon: `dataset.json`, `imagesTr/`, `labelsTr/`."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from train.data.case import Case
from train.data.nifti import affine_of, open_nifti, read_image, read_label, spatial_and_channels
from train.errors import InputError

AFFINE_TOLERANCE = 1e-3


class MSDDataset:
    """The training cases that a folder's `dataset.json` lists.

    Opening reads every header (existence, shapes, channels, affines); voxels are checked as cases load.

    Args:
        path: the task's folder, such as `Task04_Hippocampus`.

    Raises:
        InputError: whatever is wrong, with the file it is wrong in.
    """

    spatial_dims = 3

    def __init__(self, path: str | Path):
        self.root = Path(path).expanduser()
        description = _read_description(self.root)
        self.name = str(description.get("name", self.root.name))
        self.class_names = _class_names(self.root, description)
        self.num_channels = len(_required(self.root, description, "modality", dict))
        self._pairs = _list_pairs(self.root, description)
        self.case_names = tuple(
            image.name.removesuffix(".gz").removesuffix(".nii") for image, _ in self._pairs
        )
        _check_unique(self.root, self.case_names)
        _check_existence(self.root, self._pairs)
        shapes = [_checked_shape(image, label, self.num_channels) for image, label in self._pairs]
        self.largest_shape = tuple(max(sides) for sides in zip(*shapes, strict=True))

    def __len__(self) -> int:
        return len(self._pairs)

    def load(self, index: int) -> Case:
        image_path, label_path = self._pairs[index]
        image, header = read_image(image_path)
        label = read_label(label_path, len(self.class_names)).reshape(image.shape[:-1])
        return Case(self.case_names[index], image, label, affine_of(header))


def _read_description(root: Path) -> dict[str, Any]:
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: give the folder that holds dataset.json.")
    file = root / "dataset.json"
    if not file.is_file():
        raise InputError(f"{root} holds no dataset.json: give a folder in the layout of the MSD.")
    try:
        description = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON ({error}): mend or fetch it again.") from error
    if not isinstance(description, dict):
        raise InputError(f"{file} holds a {type(description).__name__}: it must be a JSON object.")
    return description


def _required(root: Path, description: dict[str, Any], key: str, kind: type) -> Any:
    value = description.get(key)
    if not isinstance(value, kind) or not value:
        found = "nothing" if value is None else f"{'a' if value else 'an empty'} {type(value).__name__}"
        raise InputError(
            f'{root / "dataset.json"} holds {found} under "{key}": give a filled {kind.__name__}.'
        )
    return value


def _class_names(root: Path, description: dict[str, Any]) -> tuple[str, ...]:
    """Names by class id, from {"0": "background"} (MSD) or {"background": 0} (nnU-Net)."""
    labels = _required(root, description, "labels", dict)
    if all(isinstance(value, int) for value in labels.values()):
        labels = {value: name for name, value in labels.items()}
    try:
        names = {int(value): str(name) for value, name in labels.items()}
    except (TypeError, ValueError):
        names = {}
    if sorted(names) != list(range(len(labels))) or len(names) < 2:
        raise InputError(
            f"{root / 'dataset.json'} declares the labels {description['labels']}: "
            "give 0 for the background, then 1, 2, ... without a gap."
        )
    return tuple(names[value] for value in range(len(names)))


def _list_pairs(root: Path, description: dict[str, Any]) -> list[tuple[Path, Path]]:
    entries = _required(root, description, "training", list)
    try:
        return [(root / entry["image"], root / entry["label"]) for entry in entries]
    except (TypeError, KeyError) as error:
        raise InputError(
            f'{root / "dataset.json"} has an entry under "training" without an image or label: '
            'give {"image": path, "label": path} for every case.'
        ) from error


def _check_unique(root: Path, names: tuple[str, ...]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{root / 'dataset.json'} lists {twice[0]} more than once: list each case once.")


def _check_existence(root: Path, pairs: list[tuple[Path, Path]]) -> None:
    missing = [file for pair in pairs for file in pair if not file.is_file()]
    if missing:
        raise InputError(
            f"{missing[0]} does not exist, the first of {len(missing)} files that {root / 'dataset.json'} "
            "lists and that are not there: complete the folder or correct the list."
        )


def _checked_shape(image_path: Path, label_path: Path, num_channels: int) -> tuple[int, ...]:
    """Spatial shape of an image whose label lies on the same grid."""
    image, label = open_nifti(image_path), open_nifti(label_path)
    spatial, channels = spatial_and_channels(image_path, image)
    if channels != num_channels:
        raise InputError(
            f"{image_path} has {channels} channels, but dataset.json declares {num_channels} under "
            '"modality": correct one of the two.'
        )
    if spatial_and_channels(label_path, label) != (spatial, 1):
        raise InputError(
            f"{label_path} has shape {label.shape}, but its image has {spatial}: "
            "image and label must lie on the same grid."
        )
    difference = np.abs(affine_of(image.header) - affine_of(label.header)).max()
    if not difference <= AFFINE_TOLERANCE:
        raise InputError(
            f"{label_path} has an affine that differs from its image's by up to {difference:.3g} mm: "
            "image and label must lie on the same grid."
        )
    return spatial
