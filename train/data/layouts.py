"""How public data sets lie in their folders: each function looks at one and says what is there.

`LAYOUTS` names them as the command line does, `--data brats:PATH`. Files are found and lists are read here;
`VolumeDataset` then checks and reads the volumes.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from train.data.volumes import Entry, Layout
from train.errors import InputError

# Soft tissue, in Hounsfield units.
CT_WINDOW = (-200.0, 300.0)
_NUMBER = re.compile(r"\s*[+-]?[0-9]+\s*")
_ANNOTATOR = re.compile(r"_annotator\d+$")
# The modalities of BraTS in the papers' order, in the file names of 2021 and of 2023 and later.
_BRATS_MODALITIES = (("flair", "t1", "t1ce", "t2"), ("t2f", "t1n", "t1c", "t2w"))


def msd(path: str | Path) -> Layout:
    """Medical Segmentation Decathlon: `dataset.json` lists an image (channels last) and a label for each case.

    Of several annotators it lists their labels, `"label": [...]`.
    """
    root, description = _read_description(path)
    return _listed(root, description)


def amos(path: str | Path) -> Layout:
    """AMOS 2022: the Decathlon's layout, and held out `imagesVa/` with `labelsVa/`, where they are there.

    Case numbers up to 500 are CT, those above MRI.
    """
    layout = _amos(path)
    return dataclasses.replace(layout, window=CT_WINDOW if all(map(_is_ct, layout.entries)) else None)


def amos_ct(path: str | Path) -> Layout:
    """The CT scans of AMOS 2022."""
    layout = _amos(path)
    entries = tuple(filter(_is_ct, layout.entries))
    return dataclasses.replace(layout, entries=entries, window=CT_WINDOW)


def nnunet(path: str | Path) -> Layout:
    """nnU-Net: `imagesTr/CASE_0000.nii.gz`, one file for each channel, and `labelsTr/CASE.nii.gz`.

    Of several annotators `labelsTr/CASE_annotator1.nii.gz` and on.

    Region-based labels (`"whole tumour": [1, 2, 3]`) become evaluation regions of the classes they are made of;
    beside them a single class (`"enhancing tumour": 3`) is a region too. `"ignore"` marks voxels without a label.
    """
    root, description = _read_description(path)
    channels = description.get("channel_names", description.get("modality"))
    if not isinstance(channels, dict) or not channels:
        raise InputError(f'{root / "dataset.json"} names no channels: give them under "channel_names".')
    ending = str(description.get("file_ending", ".nii.gz"))
    labels = sorted((root / "labelsTr").glob(f"*{ending}"))
    if not labels:
        raise InputError(f"{root / 'labelsTr'} holds no *{ending} file: give a folder in nnU-Net's layout.")
    cases: dict[str, tuple[Path, ...]] = {}
    for label in labels:
        name = _ANNOTATOR.sub("", label.name.removesuffix(ending))
        cases[name] = (*cases.get(name, ()), label)
    names = list(cases)
    files = [
        tuple(root / "imagesTr" / f"{name}_{channel:04d}{ending}" for channel in range(len(channels)))
        for name in names
    ]
    labels = _declared_labels(root / "dataset.json", description)
    entries = tuple(Entry(*parts) for parts in zip(names, files, cases.values(), strict=True))
    return Layout(
        name=str(description.get("name", root.name)),
        source=root / "dataset.json",
        num_channels=len(channels),
        entries=entries,
        window=_window(channels),
        **labels,
    )


def brats(path: str | Path) -> Layout:
    """BraTS glioma, evaluated as enhancing tumour, tumour core and whole tumour.

    2021 (`BraTS2021_00000/BraTS2021_00000_flair.nii.gz`, labels 0 1 2 4) or later
    (`BraTS-GLI-00000-000/BraTS-GLI-00000-000-t2f.nii.gz`, labels 0 1 2 3).
    """
    root = _folder(path)
    labels = sorted(root.glob("*/*seg.nii.gz"))
    if not labels:
        raise InputError(
            f"{root} holds no CASE/CASE_seg.nii.gz or CASE/CASE-seg.nii.gz: give a folder of BraTS cases."
        )
    later = labels[0].name.endswith("-seg.nii.gz")
    separator, modalities = ("-", _BRATS_MODALITIES[1]) if later else ("_", _BRATS_MODALITIES[0])
    return Layout(
        name="BraTS",
        source=root,
        class_names=("background", "necrotic core", "oedema", "enhancing tumour"),
        num_channels=len(modalities),
        entries=tuple(_brats_entry(label, separator, modalities) for label in labels),
        label_values=(0, 1, 2, 3) if later else (0, 1, 2, 4),
        regions={"enhancing tumour": (3,), "tumour core": (1, 3), "whole tumour": (1, 2, 3)},
    )


def acdc(path: str | Path) -> Layout:
    """ACDC: `patient001/patient001_frame01.nii.gz` and `..._frame01_gt.nii.gz`; each frame is a case.

    Held out are those in `testing/`, where it lies beside `training/`.
    """
    whole = _folder(path)
    root = _subfolder(whole, "training")
    labels = sorted(root.glob("patient*/*_frame*_gt.nii.gz"))
    testing = sorted((whole / "testing").glob("patient*/*_frame*_gt.nii.gz")) if root != whole else []
    if not labels:
        raise InputError(
            f"{root} holds no patient*/*_frame*_gt.nii.gz: give ACDC's folder, or its training/."
        )
    entries = tuple(
        Entry(
            name=label.name.removesuffix("_gt.nii.gz"),
            images=(label.with_name(label.name.replace("_gt.nii.gz", ".nii.gz")),),
            labels=(label,),
            subject=label.parent.name,
            held_out=label in testing,
        )
        for label in (*labels, *testing)
    )
    return Layout("ACDC", root, ("background", "right ventricle", "myocardium", "left ventricle"), 1, entries)


def kits(path: str | Path) -> Layout:
    """KiTS 2023: `case_00000/imaging.nii.gz`, `segmentation.nii.gz`; three nested regions are evaluated."""
    root = _subfolder(_folder(path), "dataset")
    labels = sorted(root.glob("case_*/segmentation.nii.gz"))
    if not labels:
        raise InputError(f"{root} holds no case_*/segmentation.nii.gz: give KiTS' folder, or its dataset/.")
    return Layout(
        name="KiTS",
        source=root,
        class_names=("background", "kidney", "tumour", "cyst"),
        num_channels=1,
        entries=tuple(
            Entry(label.parent.name, (label.parent / "imaging.nii.gz",), (label,)) for label in labels
        ),
        regions={"kidney and masses": (1, 2, 3), "masses": (2, 3), "tumour": (2,)},
        window=CT_WINDOW,
    )


LAYOUTS: Mapping[str, Callable[[str | Path], Layout]] = {
    "msd": msd,
    "nnunet": nnunet,
    "brats": brats,
    "acdc": acdc,
    "amos": amos,
    "amos-ct": amos_ct,
    "kits": kits,
}


# Folders.


def _folder(path: str | Path) -> Path:
    root = Path(path).expanduser()
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: give the folder that holds the data set.")
    return root


def _subfolder(root: Path, name: str) -> Path:
    return root / name if (root / name).is_dir() else root


def _amos(path: str | Path) -> Layout:
    """What the list names, then what is held out."""
    root, description = _read_description(path)
    layout = _listed(root, description)
    listed = {entry.name for entry in layout.entries}
    labels = [label for label in sorted((root / "labelsVa").glob("*.nii.gz")) if _stem(label) not in listed]
    held_out = tuple(
        Entry(_stem(label), (root / "imagesVa" / label.name,), (label,), held_out=True) for label in labels
    )
    return dataclasses.replace(layout, entries=(*layout.entries, *held_out))


def _is_ct(entry: Entry) -> bool:
    number = re.search(r"\d+", entry.name)
    return number is not None and int(number[0]) <= 500


def _brats_entry(label: Path, separator: str, modalities: tuple[str, ...]) -> Entry:
    case = label.name.removesuffix(f"{separator}seg.nii.gz")
    files = tuple(label.with_name(f"{case}{separator}{modality}.nii.gz") for modality in modalities)
    # From 2023 on a name ends in the number of the visit.
    return Entry(case, files, (label,), case.rpartition("-")[0])


# dataset.json.


def _read_description(path: str | Path) -> tuple[Path, dict[str, Any]]:
    root = Path(path).expanduser()
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: give the folder that holds dataset.json.")
    file = root / "dataset.json"
    if not file.is_file():
        raise InputError(f"{root} holds no dataset.json: give a folder in the layout of the MSD or nnU-Net.")
    try:
        description = json.loads(file.read_text(), object_pairs_hook=partial(_unique_keys, file))
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON ({error}): mend or fetch it again.") from error
    if not isinstance(description, dict):
        raise InputError(f"{file} holds a {type(description).__name__}: it must be a JSON object.")
    return root, description


def _listed(root: Path, description: dict[str, Any]) -> Layout:
    file = root / "dataset.json"
    listed = _required(file, description, "training", list)
    channels = _required(file, description, "modality", dict)
    try:
        pairs = [(root / entry["image"], _paths(root, entry["label"])) for entry in listed]
    except (TypeError, KeyError) as error:
        raise InputError(
            f'{file} has an entry under "training" without an image or label: '
            'give {"image": path, "label": path} for every case.'
        ) from error
    entries = tuple(Entry(_stem(image), (image,), labels) for image, labels in pairs)
    return Layout(
        name=str(description.get("name", root.name)),
        source=file,
        num_channels=len(channels),
        entries=entries,
        window=_window(channels),
        **_declared_labels(file, description),
    )


def _paths(root: Path, listed: Any) -> tuple[Path, ...]:
    """One file, or one of each annotator."""
    files: list[Any] = listed if isinstance(listed, list) and listed else [listed]
    return tuple(root / file for file in files)


def _window(channels: Mapping[str, Any]) -> tuple[float, float] | None:
    """Intensities of CT are cut off, if there is nothing else."""
    return CT_WINDOW if [str(name).upper() for name in channels.values()] == ["CT"] else None


def _required(file: Path, description: dict[str, Any], key: str, kind: type) -> Any:
    value = description.get(key)
    if not isinstance(value, kind) or not value:
        found = "nothing" if value is None else f"{'a' if value else 'an empty'} {type(value).__name__}"
        raise InputError(f'{file} holds {found} under "{key}": give a filled {kind.__name__}.')
    return value


def _unique_keys(file: Path, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the file; a key that it gives two values would lose one of them."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if found.setdefault(key, value) != value:
            raise InputError(
                f"{file} gives {key!r} twice, as {found[key]} and as {value}: keep one of the two."
            )
    return found


class _Label(NamedTuple):
    """An entry of "labels".

    Attributes:
        name: of a class, of a region, or ignore.
        numbers: that stand for it in the files, all different.
        is_region: whether it is a list, and not that of the background.
    """

    name: str
    numbers: tuple[int, ...]
    is_region: bool


def _declared_labels(file: Path, description: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `Layout` that "labels" declares: {"0": "background"} (MSD) or {"background": 0} (nnU-Net).

    One list makes the data set region-based, as in nnU-Net: every label but the background is then a region. The
    label "ignore" is no class, but the number of voxels without a label.
    """
    declared = _required(file, description, "labels", dict)
    by_number = all(isinstance(name, str) and _NUMBER.fullmatch(number) for number, name in declared.items())
    pairs = [(name, number) for number, name in declared.items()] if by_number else declared.items()
    labels = [_label(file, name, value) for name, value in pairs]
    ignored = [label for label in labels if label.name.strip().lower() == "ignore"]
    labels = [label for label in labels if label not in ignored]
    has_regions = any(label.is_region for label in labels)
    names = _names_by_number(labels)
    ignore_values = tuple(dict.fromkeys(number for label in ignored for number in label.numbers))
    singles = [label.numbers[0] for label in labels if not label.is_region]
    twice = len(set(singles)) < len(singles) and not has_regions
    if twice or not names.keys().isdisjoint(ignore_values):
        raise InputError(f"{file} declares the labels {declared}: give each a number of its own.")
    if sorted(names) != list(range(len(names))) or len(names) < 2:
        raise InputError(
            f"{file} declares the labels {declared}: give 0 for the background, then 1, 2, ... without a gap"
            f"{', and any other number for ignore' if ignored else ''}."
        )
    return {
        "class_names": tuple(names[number] for number in range(len(names))),
        "regions": {label.name: label.numbers for label in labels if label.numbers != (0,)}
        if has_regions
        else {},
        "ignore_values": ignore_values,
    }


def _label(file: Path, name: str, value: Any) -> _Label:
    try:
        numbers = _numbers(value)
    except ValueError as error:
        raise InputError(
            f"{file} declares the label {name!r} as {json.dumps(value)}: give a whole number, or for a region "
            "a list of them."
        ) from error
    return _Label(name, numbers, isinstance(value, list) and numbers != (0,))


def _numbers(value: Any) -> tuple[int, ...]:
    """One number, or the different ones of a list, which may hold lists."""
    if isinstance(value, list) and value:
        return tuple(dict.fromkeys(number for part in value for number in _numbers(part)))
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return (int(value),)
    if type(value) is int or (isinstance(value, float) and value.is_integer()):
        return (int(value),)
    raise ValueError(value)


def _names_by_number(labels: Sequence[_Label]) -> dict[int, str]:
    """The name of each class: that of its label or, where it is only part of regions, its number."""
    names: dict[int, str] = {}
    for label in labels:
        if not label.is_region:
            names.setdefault(label.numbers[0], label.name)
    for label in labels:
        for number in label.numbers:
            names.setdefault(number, f"label {number}")
    return names


def _stem(file: Path) -> str:
    return file.name.removesuffix(".gz").removesuffix(".nii")
