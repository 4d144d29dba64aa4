"""Which files of a folder belong to which case, from their names alone."""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from calib_jax.predictions.arrays import ARRAY_ENDINGS, ending_of, stem
from calib_jax.predictions.case import PredictionError
from calib_jax.predictions.volumes import visible

UNCERTAINTY = "_uncertainty"
"""End of the names of uncertainty maps, which are no predictions."""
_PROBABILITY = ("probabilities", "probability", "probs", "prob", "softmax", "sigmoid", "logits")
_EITHER = ("trans", "pred", "prediction")  # MONAI's default says nothing of what a file holds
_LABEL = ("segmentation", "seg", "segm", "labels", "label", "mask", "gt")
_WORDS = (*_PROBABILITY, *_EITHER, *_LABEL)
_END = re.compile(rf"(?:(?:^|[-_ .])(?:{'|'.join(_WORDS)}))+$", re.IGNORECASE)
_CHANNEL = re.compile(r"_\d{4}$")
_CLASS = re.compile(r"(?:class|label|channel|region|prob|ch|c)?[-_ ]?0*(\d+)", re.IGNORECASE)
_OF_NNUNET = (
    "dataset.json",
    "plans.json",
    "predict_from_raw_data_args.json",
    "summary.json",
    "postprocessing.json",
)
_SHOWN = 5


@dataclass
class CaseFiles:
    """The files of one case in one folder.

    Attributes:
        files: one, or one for each class.
        classes: the class of each file, in rising order, if there is one for each class; else empty.
        segmentation: a label map beside them, or None.
        fault: why the case cannot be read; empty if it can.
    """

    files: tuple[Path, ...]
    classes: tuple[int, ...] = ()
    segmentation: Path | None = None
    fault: str = ""


@dataclass
class Folder:
    """The cases of a folder.

    Attributes:
        cases: by name.
        ignored: names of files of other kinds.
    """

    cases: dict[str, CaseFiles]
    ignored: list[str] = field(default_factory=list)


def case_name(path: Path) -> str:
    """The name of a file without its format and without words for what it holds.

    >>> case_name(Path("case 1_seg_trans.nii.gz")), case_name(Path("seg.nii"))
    ('case 1', '')
    """
    return _END.sub("", stem(path))


def find_labels(folder: Path) -> Folder:
    """The label maps in a folder and its subfolders: of several files of one name, the one whose name says "label".

    Raises:
        PredictionError: the folder holds none.
    """
    files, ignored = _files(folder)
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(_plain_name(folder, file), []).append(file)
    cases = {}
    for name, members in groups.items():
        chosen = [file for file in members if _rank(file) == 0] or members
        cases[name] = CaseFiles((chosen[0],), fault=_if_twice(chosen))
    return Folder(cases, ignored)


def find_images(folder: Path) -> dict[str, Path]:
    """The first channel of each image in a folder."""
    found: dict[str, Path] = {}
    for file in _files(folder)[0]:
        found.setdefault(_CHANNEL.sub("", stem(file)), file)
        found.setdefault(_plain_name(folder, file), file)
    return found


def find_predictions(folder: Path, known: Collection[str], class_names: Sequence[str] = ()) -> Folder:
    """The predictions in a folder and its subfolders.

    Args:
        folder: one file for each case, or one for each case and class, perhaps with a label map beside them.
        known: names of the cases; if there are none, names come from the files.
        class_names: that tell files of classes from files of cases.

    Raises:
        PredictionError: the folder holds no file of a known format.
    """
    files, ignored = _files(folder)
    groups: dict[str, list[tuple[Path, str]]] = {}
    for file in files:
        name, token = _name_and_token(folder, file, known, class_names)
        groups.setdefault(name, []).append((file, token))
    return Folder({name: _case(members, class_names) for name, members in groups.items()}, ignored)


def class_index(token: str, class_names: Sequence[str]) -> int | None:
    """The class that a part of a file's name says; None if it says none.

    >>> class_index("class_02", []), class_index("Left-Lung", ["background", "left lung"]), class_index("x", [])
    (2, 1, None)
    """
    if number := _CLASS.fullmatch(token):
        return int(number[1])
    names = [_letters(name) for name in class_names]
    return names.index(_letters(token)) if _letters(token) in names else None


def some(names: Iterable[str]) -> str:
    """The first few names."""
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def _files(folder: Path) -> tuple[list[Path], list[str]]:
    """Files that can be read, and the names of others."""
    if folder.is_file():
        return [folder], []
    if not folder.is_dir():
        raise PredictionError(f"{folder} is not a folder: check the path.")
    inside = [*visible(folder), *visible(folder, "*/*")]
    paths = [path for path in inside if path.is_file() and not stem(path).endswith(UNCERTAINTY)]
    files = [path for path in paths if ending_of(path)]
    if not files:
        raise PredictionError(
            f"{folder} holds no file that can be read: give a folder with .npz, .npy, .nii.gz, .mha, .nrrd, "
            ".png or .tif files."
        )
    voxels = (".img", ".raw", ".zraw")  # belong to headers
    others = [
        path.name
        for path in paths
        if not ending_of(path) and path.name not in _OF_NNUNET and path.suffix.lower() not in voxels
    ]
    return files, others


def _plain_name(folder: Path, file: Path) -> str:
    """The name of a case that has one file; that of its subfolder if the file's own says nothing."""
    return case_name(file) or (stem(file) if file.parent == folder else file.parent.name)


def _name_and_token(
    folder: Path, file: Path, known: Collection[str], class_names: Sequence[str]
) -> tuple[str, str]:
    """The case of a file, and what is left of its name if that says which class it holds."""
    own, parent = case_name(file), "" if file.parent == folder or folder == file else file.parent.name
    if stem(file) in known:
        return stem(file), ""
    if own in known or (not own and not parent):
        return own or stem(file), ""
    if not own:
        return parent, ""
    if known:
        starts = [name for name in known if own.startswith(name) and own[len(name)] in "-_ ."]
        if starts:
            name = max(starts, key=len)
            return name, own[len(name) + 1 :]
        return (parent, own) if parent in known else (own, "")
    if parent and class_index(own, class_names) is not None:
        return parent, own
    # Without a list of cases, a number at the end is a class only if its word or the classes' names say so.
    for cut in (match.start() for match in re.finditer(r"[-_ .]", own)):
        name, token = own[:cut], own[cut + 1 :]
        if name and not token.isdigit() and class_index(token, class_names) is not None:
            return name, token
    return own, ""


def _case(members: Sequence[tuple[Path, str]], class_names: Sequence[str]) -> CaseFiles:
    """The files of one case, which are told apart by what their names say they hold."""
    whole = [file for file, token in members if not token]
    classes = {file: class_index(token, class_names) for file, token in members if token}
    if any(_rank(file) == 3 for file in whole):
        classes = {}
    elif whole:  # a name with something else behind it is none of a class
        classes = {file: index for file, index in classes.items() if index is not None}
    if classes:
        indices = tuple(classes.values())
        if None in indices:
            unknown = next(file for file, index in classes.items() if index is None)
            fault = f"{unknown} is a file of which class? Give the classes' names in dataset.json or --class-names."
            return CaseFiles(tuple(classes), fault=fault)
        twice = [file for file, index in classes.items() if indices.count(index) > 1]
        order = sorted(classes, key=lambda file: classes[file] or 0)
        return CaseFiles(
            tuple(order),
            tuple(sorted(index for index in indices if index is not None)),
            whole[0] if whole else None,
            _if_twice(twice) or _if_twice(whole),
        )
    best = max(map(_rank, whole))
    probs = [file for file in whole if _rank(file) == best]
    beside = [file for file in whole if _rank(file) != best]
    labels = [file for file in beside if _rank(file) == min(map(_rank, beside))]
    return CaseFiles((probs[0],), (), labels[0] if labels else None, _if_twice(probs) or _if_twice(labels))


def _rank(file: Path) -> int:
    """How surely a name says that a file holds probabilities (3) rather than a label map (0)."""
    words = re.split(r"[-_ .]", stem(file).lower()[len(case_name(file)) :])
    if file.name.lower().endswith(ARRAY_ENDINGS) and not set(words) & set(_LABEL):
        return 3
    if set(words) & set(_PROBABILITY):
        return 3
    if set(words) & set(_EITHER):
        return 2
    return 0 if set(words) & set(_LABEL) else 1


def _if_twice(files: Sequence[Path]) -> str:
    """The fault of several files that claim one place."""
    if len(files) < 2:
        return ""
    return f"{files[0]} and {files[1]} are two files of one case: rename or remove one of them."


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", name.lower())
