"""Layouts of public data sets: each function lists the files in a folder as a `Layout`.

`LAYOUTS` holds the functions by their names on the command line, `--data brats:PATH`. To add a layout, write a
function and decorate it with `register_layout`. `VolumeDataset` then checks and reads the volumes.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from calib_jax.predictions.dataset_json import declared_labels
from train.data.images import IMAGE_ENDINGS, images_in
from train.data.names import name_cases
from train.data.volume_files import ENDINGS, as_input_error, ending_of, open_volume, stem, volumes_in
from train.data.volumes import Entry, Layout
from train.errors import InputError
from train.files import read_json, visible

# Soft tissue, in Hounsfield units.
CT_RANGE = (-200.0, 300.0)
_ANNOTATOR = re.compile(r"_annotator\d+$")
_ANNOTATOR_FOLDER = re.compile(r"annotator[-_ ]?(\d+)", re.IGNORECASE)
# The modalities of BraTS in the papers' order, in the file names of 2021 and of 2023 and later.
_BRATS_MODALITIES = (("flair", "t1", "t1ce", "t2"), ("t2f", "t1n", "t1c", "t2w"))
_BRATS_SCAN = re.compile(rf"_({'|'.join(_BRATS_MODALITIES[0])})$|-({'|'.join(_BRATS_MODALITIES[1])})$")
_BRATS_LABEL = re.compile(r"[-_](seg|Segm)$")
_BRATS_TREATED = re.compile(r"^BraTS-GLI-\d+-[1-9]\d\d$")


LAYOUTS: dict[str, Callable[[str | Path], Layout]] = {}
"""Functions from a folder to its `Layout`, by their names on the command line."""


def register_layout(name: str) -> Callable[[Callable[[str | Path], Layout]], Callable[[str | Path], Layout]]:
    """Adds the decorated function to `LAYOUTS`."""
    return lambda layout: LAYOUTS.setdefault(name, layout)


@register_layout("msd")
def msd(path: str | Path) -> Layout:
    """Medical Segmentation Decathlon: `dataset.json` lists an image (channels last) and a label for each case.

    `"label": [...]` lists the labels of several annotators, `"image": [...]` a file per channel. Cases with labels
    under "validation", "test" or "testing", as in MONAI's datalists, are held out. `name_cases` names the cases.
    """
    return _listed(_read_description(path))


@register_layout("nnunet")
def nnunet(path: str | Path) -> Layout:
    """nnU-Net: `imagesTr/CASE_0000.nii.gz`, one file per channel, and `labelsTr/CASE.nii.gz`.

    Natural images are 2-D: `"file_ending": ".png"`, with one file for each channel or with all colours in
    `imagesTr/CASE_0000.png`. Several annotators write `labelsTr/CASE_annotator1.nii.gz` and on. A "dataset" in
    dataset.json lists the files of each case: `{CASE: {"images": [...], "label": ...}}`.

    Region-based labels (`"whole tumour": [1, 2, 3]`) become evaluation regions; a single class beside them
    (`"enhancing tumour": 3`) becomes a region too. `"ignore"` marks voxels without a label.
    """
    description = _read_description(path)
    is_listed = "dataset" in description.content
    return _described(description, _listed_cases(description) if is_listed else _found_cases(description))


@register_layout("brats")
def brats(path: str | Path) -> Layout:
    """BraTS glioma, evaluated as enhancing tumour, tumour core and whole tumour.

    2021 has `BraTS2021_00000/BraTS2021_00000_flair.nii.gz` and labels 0 1 2 4; later years have
    `BraTS-GLI-00000-000/BraTS-GLI-00000-000-t2f.nii.gz` and labels 0 1 2 3. Scans after treatment, as in 2024, have
    visits from 100 (`BraTS-GLI-00000-100`). With such scans, 4 is the resection cavity, a class and region of its
    own (arXiv 2405.18368).
    """
    root = _folder(path)
    files = volumes_in(root, "*/*")
    labels = [file for file in files if _BRATS_LABEL.search(stem(file))]
    if not labels:
        raise InputError(
            f"{root} holds no CASE/CASE_seg.nii.gz or CASE/CASE-seg.nii.gz: give a folder of BraTS cases."
        )
    labelled = {label.parent for label in labels}
    scans = {file.parent: file for file in files if _BRATS_SCAN.search(stem(file))}
    labels += [_missing_label(scan) for folder, scan in scans.items() if folder not in labelled]
    by_stem = _by_stem(files)
    entries = tuple(_brats_entry(label, by_stem) for label in labels)
    later = stem(labels[0]).endswith("-seg")
    treated = any(_BRATS_TREATED.search(entry.name) for entry in entries)
    cavity = ("resection cavity",) if treated else ()
    regions = {"enhancing tumour": (3,), "tumour core": (1, 3), "whole tumour": (1, 2, 3)}
    return Layout(
        name="BraTS",
        source=root,
        class_names=("background", "necrotic core", "oedema", "enhancing tumour", *cavity),
        num_channels=len(_BRATS_MODALITIES[0]),
        entries=entries,
        label_values=tuple(range(4 + len(cavity))) if later else (0, 1, 2, 4),
        regions=regions | dict.fromkeys(cavity, (4,)),
    )


@register_layout("acdc")
def acdc(path: str | Path) -> Layout:
    """ACDC: `patient001/patient001_frame01.nii.gz` and `..._frame01_gt.nii.gz`; each frame is a case.

    The cases in `testing/` beside `training/` are held out.
    """
    whole = _folder(path)
    root = _subfolder(whole, "training")
    entries = _acdc_entries(root)
    if not entries:
        raise InputError(
            f"{root} holds no patient*/*_frame*_gt.nii.gz: give ACDC's folder, or its training/."
        )
    if root != whole:
        entries += _acdc_entries(whole / "testing", held_out=True)
    return Layout("ACDC", root, ("background", "right ventricle", "myocardium", "left ventricle"), 1, entries)


@register_layout("amos")
def amos(path: str | Path) -> Layout:
    """AMOS 2022: the Decathlon's layout. Cases in `imagesVa/` with a label in `labelsVa/` are held out.

    Case numbers up to 500 are CT, larger ones MRI.
    """
    layout = _amos(path)
    return dataclasses.replace(layout, intensity_range=CT_RANGE if all(map(_is_ct, layout.entries)) else None)


@register_layout("amos-ct")
def amos_ct(path: str | Path) -> Layout:
    """The CT scans of AMOS 2022."""
    layout = _amos(path)
    entries = tuple(filter(_is_ct, layout.entries))
    return dataclasses.replace(layout, entries=entries, intensity_range=CT_RANGE)


@register_layout("kits")
def kits(path: str | Path) -> Layout:
    """KiTS 2023: `case_00000/imaging.nii.gz`, `segmentation.nii.gz`; three nested regions are evaluated."""
    root = _subfolder(_folder(path), "dataset")
    files = volumes_in(root, "case_*/*")
    labels = [file for file in files if stem(file) == "segmentation"]
    if not labels:
        raise InputError(f"{root} holds no case_*/segmentation.nii.gz: give KiTS' folder, or its dataset/.")
    by_stem = _by_stem(files)
    return Layout(
        name="KiTS",
        source=root,
        class_names=("background", "kidney", "tumour", "cyst"),
        num_channels=1,
        entries=tuple(
            Entry(label.parent.name, (_beside(by_stem, label, "imaging"),), (label,)) for label in labels
        ),
        regions={"kidney and masses": (1, 2, 3), "masses": (2, 3), "tumour": (2,)},
        intensity_range=CT_RANGE,
    )


@register_layout("png")
def png(path: str | Path) -> Layout:
    """2-D images, `images/CASE.png` or in the folder itself, and their labels, `annotator1/CASE.png` and on.

    TIFF, BMP and JPEG are read too. The name of a label may have words around the case's, as in
    `annotator3/Seg_CASE.png`. An annotator need not have labelled every image. Labels are 255 in the foreground and
    0 elsewhere.
    """
    return _annotated_images(path)


@register_layout("bu-bil")
def bu_bil(path: str | Path) -> Layout:
    """BU-BIL, cells in microscopy outlined by five experts: as `png`, but with labels 0 inside and 255 outside.

    One pixel of a label lies between the two; the nearer value counts.
    """
    layout = _annotated_images(path)
    return dataclasses.replace(
        layout, class_names=("background", "cell"), label_values=(255, 0), nearest_value=True
    )


# Folders.


def _folder(path: str | Path, what: str = "the data set") -> Path:
    root = Path(path).expanduser()
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: give the folder that holds {what}.")
    return root


def _subfolder(root: Path, name: str) -> Path:
    return root / name if (root / name).is_dir() else root


def _amos(path: str | Path) -> Layout:
    """The listed cases, then the held-out cases."""
    description = _read_description(path)
    root, layout = description.root, _listed(description)
    listed = {entry.name for entry in layout.entries}
    images = _by_stem(volumes_in(root / "imagesVa"))
    held_out = tuple(
        Entry(
            stem(label),
            (_beside(images, root / "imagesVa" / label.name, stem(label)),),
            (label,),
            held_out=True,
        )
        for label in volumes_in(root / "labelsVa")
        if stem(label) not in listed
    )
    return dataclasses.replace(layout, entries=(*layout.entries, *held_out))


def _is_ct(entry: Entry) -> bool:
    number = re.search(r"\d+", entry.name)
    return number is not None and int(number[0]) <= 500


def _brats_entry(label: Path, files: Mapping[Path, Path]) -> Entry:
    later = stem(label).endswith("-seg")
    separator, modalities = ("-", _BRATS_MODALITIES[1]) if later else ("_", _BRATS_MODALITIES[0])
    case = _BRATS_LABEL.sub("", stem(label))
    if stem(label).endswith("_Segm"):  # one case of 2020 has a label of another name
        case = label.parent.name
    images = tuple(_beside(files, label, f"{case}{separator}{modality}") for modality in modalities)
    # From 2023 on a name ends in the number of the visit.
    return Entry(case, images, (label,), case.rpartition("-")[0])


def _missing_label(scan: Path) -> Path:
    """The name that the label of a scan would have. Opening the data set reports that the file is missing."""
    separator = "-" if stem(scan).endswith(tuple(f"-{name}" for name in _BRATS_MODALITIES[1])) else "_"
    return scan.with_name(f"{scan.parent.name}{separator}seg{ending_of(scan)}")


def _acdc_entries(root: Path, *, held_out: bool = False) -> tuple[Entry, ...]:
    files = volumes_in(root, "patient*/*_frame*")
    labels = [file for file in files if stem(file).endswith("_gt")]
    by_stem = _by_stem(files)
    return tuple(
        Entry(case, (_beside(by_stem, label, case),), (label,), label.parent.name, held_out)
        for label, case in ((label, stem(label).removesuffix("_gt")) for label in labels)
    )


def _annotated_images(path: str | Path) -> Layout:
    root = _folder(path, "images and a folder of labels for each annotator")
    found = [(_ANNOTATOR_FOLDER.fullmatch(path.name), path) for path in visible(root) if path.is_dir()]
    folders = [path for _, path in sorted((int(name[1]), path) for name, path in found if name)]
    if not folders:
        raise InputError(
            f"{root} holds no annotator1, annotator2, ...: give the folder of these and of the images."
        )
    images = images_in(root / "images") or images_in(root)
    if not images:
        raise InputError(f"{root} holds no images/CASE.png and no CASE.png: put the images into one of both.")
    of_annotators = [_labels_by_case(folder, list(map(stem, images))) for folder in folders]
    entries = []
    for image in images:
        labels = [labels[stem(image)] for labels in of_annotators if stem(image) in labels]
        # Opening the data set reports that a label is missing.
        entries.append(Entry(stem(image), (image,), tuple(labels) or (folders[0] / image.name,)))
    return Layout(
        name=root.name,
        source=root,
        class_names=("background", "foreground"),
        num_channels=open_volume(images[0]).channels,
        entries=tuple(entries),
        label_values=(0, 255),
    )


def _labels_by_case(folder: Path, cases: Sequence[str]) -> dict[str, Path]:
    """The label of each case in an annotator's folder. Words may surround the case's name."""
    known, labels = set(cases), {}
    for file in images_in(folder):
        name = stem(file)
        if name not in known:
            around = [case for case in cases if re.search(rf"(?<![^-_ ]){re.escape(case)}(?![^-_ ])", name)]
            name = max(around, key=len, default="")
        if not name:
            raise InputError(f"{file} is the label of no image: give it the name of one.")
        if name in labels:
            raise InputError(f"{file} and {labels[name].name} are labels of one image: remove one of them.")
        labels[name] = file
    return labels


def _by_stem(files: Iterable[Path]) -> dict[Path, Path]:
    """Volumes by their paths without the endings."""
    return {file.with_name(stem(file)): file for file in files}


def _beside(files: Mapping[Path, Path], file: Path, name: str) -> Path:
    """The volume of this name in the folder of `file`, preferably with the same ending."""
    same = file.with_name(f"{name}{ending_of(file)}")
    return same if same.is_file() else files.get(file.with_name(name), same)


# dataset.json.


class _Description(NamedTuple):
    """The dataset.json of a folder."""

    root: Path
    file: Path
    content: dict[str, Any]

    def filled(self, key: str, kind: type) -> Any:
        """The value of `key`, which must be of a kind and not empty."""
        value = self.content.get(key)
        if not isinstance(value, kind) or not value:
            found = "nothing" if value is None else f"{'a' if value else 'an empty'} {type(value).__name__}"
            raise InputError(f'{self.file} holds {found} under "{key}": give a filled {kind.__name__}.')
        return value

    @property
    def channels(self) -> list[str]:
        """Names of the channels, from {"0": "T1"} or ["T1"]."""
        keys = ("channel_names", "modality", "modalities")
        key = next((key for key in keys if key in self.content), "modality")
        value = self.content.get(key)
        if not (isinstance(value, list) and value):
            value = self.filled(key, dict).values()
        return list(map(str, value))


def _read_description(path: str | Path) -> _Description:
    root = _folder(path, "dataset.json")
    file = root / "dataset.json"
    if not file.is_file():
        raise InputError(f"{root} holds no dataset.json: give a folder in the layout of the MSD or nnU-Net.")
    try:
        description = read_json(file)
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON ({error}): mend or fetch it again.") from error
    if not isinstance(description, dict):
        raise InputError(f"{file} holds a {type(description).__name__}: it must be a JSON object.")
    return _Description(root, file, description)


def _listed(description: _Description) -> Layout:
    root, training = description.root, description.filled("training", list)
    incomplete = [str(index) for index, entry in enumerate(training, 1) if _files(root, entry) is None]
    if incomplete:
        raise InputError(
            f'{description.file} has an entry under "training" without an image or label (of {len(training)}, '
            f'number {", ".join(incomplete[:20])}): give {{"image": path, "label": path}} for every case.'
        )
    listed = [(_files(root, entry), False) for entry in training]
    for section in ("validation", "test", "testing"):
        listed_too = description.content.get(section)
        others = [_files(root, entry) for entry in (listed_too if isinstance(listed_too, list) else [])]
        # Lists also name images without labels, and labels that were never published.
        if any(files and files[1][0].is_file() for files in others):
            listed += [(files, True) for files in others if files]
    pairs = [(*files, held_out) for files, held_out in listed if files]
    names = name_cases([images for images, _, _ in pairs])
    entries = [
        Entry(name, images, labels, held_out=held_out)
        for name, (images, labels, held_out) in zip(names, pairs, strict=True)
    ]
    return _described(description, entries)


def _described(description: _Description, entries: Sequence[Entry]) -> Layout:
    """The layout of these cases, with what dataset.json declares."""
    channels = description.channels
    return Layout(
        name=str(description.content.get("name", description.root.name)),
        source=description.file,
        num_channels=len(channels),
        entries=tuple(entries),
        intensity_range=CT_RANGE if [name.upper() for name in channels] == ["CT"] else None,
        **_declared_labels(description),
    )


def _files(root: Path, entry: Any) -> tuple[tuple[Path, ...], tuple[Path, ...]] | None:
    """The images and labels of an entry in a list; None if the entry is incomplete."""
    try:
        return _paths(root, entry["image"]), _paths(root, entry["label"])
    except (TypeError, KeyError):
        return None


def _found_cases(description: _Description) -> list[Entry]:
    """The cases in nnU-Net's folders."""
    root, channels = description.root, len(description.channels)
    ending = str(description.content.get("file_ending", ".nii.gz"))
    if not ending.lower().endswith((*ENDINGS, *IMAGE_ENDINGS)):
        raise InputError(
            f'{description.file} has the "file_ending" {ending}: volumes of {", ".join(ENDINGS)} and images of '
            f"{', '.join(IMAGE_ENDINGS)} can be read."
        )
    files = [file for file in visible(root / "labelsTr") if file.name.lower().endswith(ending.lower())]
    if not files:
        raise InputError(f"{root / 'labelsTr'} holds no *{ending} file: give a folder in nnU-Net's layout.")
    labels: dict[str, tuple[Path, ...]] = {}
    for file in files:
        name = _ANNOTATOR.sub("", file.name[: -len(ending)])
        labels[name] = (*labels.get(name, ()), file)
    are_images = ending.lower().endswith(IMAGE_ENDINGS)
    found = _by_stem((images_in if are_images else volumes_in)(root / "imagesTr"))

    def images(name: str) -> tuple[Path, ...]:
        beside = [
            _beside(found, root / "imagesTr" / f"any{ending}", f"{name}_{channel:04d}")
            for channel in range(channels)
        ]
        has_all_colours = (
            are_images and beside[0].is_file() and not any(file.is_file() for file in beside[1:])
        )
        return tuple(beside[:1] if has_all_colours else beside)

    return [Entry(name, images(name), files) for name, files in labels.items()]


def _listed_cases(description: _Description) -> list[Entry]:
    """The cases that nnU-Net's dataset.json lists under "dataset"."""
    root, listed = description.root, description.filled("dataset", dict)
    try:
        return [
            Entry(name, _paths(root, entry["images"]), _paths(root, entry["label"]))
            for name, entry in listed.items()
        ]
    except (TypeError, KeyError) as error:
        raise InputError(
            f'{description.file} has an entry under "dataset" without images or label ({error}): '
            'give {"images": [path, ...], "label": path} for every case.'
        ) from error


def _paths(root: Path, listed: Any) -> tuple[Path, ...]:
    """One file, or one per annotator or channel. Paths may have backslashes or environment variables."""
    files: list[Any] = listed if isinstance(listed, list) and listed else [listed]
    paths = [root / file for file in files]
    return tuple(
        path if path.exists() else root / os.path.expandvars(file).replace("\\", "/")
        for path, file in zip(paths, files, strict=True)
    )


def _declared_labels(description: _Description) -> dict[str, Any]:
    """The fields of a `Layout` that "labels" declares."""
    with as_input_error():
        return vars(declared_labels(description.file, description.filled("labels", dict)))
