"""The cases of a run: kept with it, recognised in other data, and which of them it may be measured on."""

import gzip
import json
import os
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from train.config import IMPORTED, RunConfig, from_json, read_config
from train.data import LAYOUTS, Dataset, PhantomDataset, Splits, VolumeDataset, read_splits
from train.errors import InputError
from train.processes import is_first
from train.progress import progress
from train.run.folder import write_json

_FILE = "cases.json"
KINDS = {"train": "training", "val": "validation", "test": "held-out"}


@dataclass(frozen=True)
class CaseId:
    """What a case is, wherever its files lie.

    Attributes:
        name: in its data set.
        images: a fingerprint of each image's content; none where they are not known.
    """

    name: str
    images: frozenset[str] = frozenset()

    def is_same(self, other: "CaseId") -> bool:
        """Compares the images, of which one of the two may have some only; names where images are not known."""
        if not (self.images and other.images):
            return self.name == other.name
        return self.images <= other.images or other.images <= self.images


@dataclass(frozen=True)
class RunCases:
    """The cases that the weights of a run may have seen, and those that it holds out.

    Attributes:
        own: all cases of the run's data set.
        initial: training and validation cases of the runs that its weights come from.
        complete: whether these are all; not so where imported weights are among them.
        trained: whether the run was trained on its own split; an imported one was not.
    """

    own: tuple[CaseId, ...]
    initial: tuple[CaseId, ...] = ()
    complete: bool = True
    trained: bool = True

    def write(self, run: Path) -> None:
        """Keeps the cases with a run, unless they are kept: a run that goes on may not find those it came from."""
        if (run / _FILE).exists():
            return
        flags = {"complete": self.complete, "trained": self.trained}
        write_json(run / _FILE, {"own": _to_json(self.own), "initial": _to_json(self.initial), **flags})


def read_cases(run: Path) -> RunCases:
    """The cases of the run in `run`; of runs that kept none, the names in its split.

    Raises:
        InputError: if they cannot be read.
    """
    file = run / _FILE
    if not file.exists():
        splits = run / "splits.json"
        names = _names(read_splits(splits)) if splits.exists() else ()
        trained = read_config(run)[0].loss != IMPORTED
        return RunCases(tuple(map(CaseId, names)), complete=trained, trained=trained)
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        own, initial = (
            tuple(CaseId(name, frozenset(images)) for name, images in kept[key]) for key in ("own", "initial")
        )
        return RunCases(own, initial, bool(kept["complete"]), bool(kept["trained"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file} is no list of a run's cases ({type(error).__name__}: {error}): remove it to tell cases by "
            "their names."
        ) from error


@lru_cache(maxsize=4)
def identify(dataset: Dataset) -> tuple[CaseId, ...]:
    """What each case of a data set is.

    Volumes on disk are told apart by the CRC-32 and the size of what is in their image files, which gzip keeps at
    a file's end: a copy is recognised under any name and in any layout, compressed or not. A file whose header or
    voxels were written anew is another.
    """
    if isinstance(dataset, PhantomDataset):
        kind = repr(replace(dataset, num_cases=0))
        return tuple(CaseId(name, frozenset([f"{kind} {name}"])) for name in dataset.case_names)
    if not isinstance(dataset, VolumeDataset):
        return tuple(map(CaseId, dataset.case_names))
    entries = progress(dataset.layout.entries, desc="identifying cases", leave=False, disable=not is_first())
    return tuple(
        CaseId(entry.name, frozenset(fingerprint(file) for file in entry.images)) for entry in entries
    )


def fingerprint(file: Path) -> str:
    """CRC-32 and size of a file's content, uncompressed.

    Example:
        >>> fingerprint(Path("/dev/null"))
        '00000000-0'
    """
    try:
        with file.open("rb") as raw:
            compressed = raw.read(2) == b"\x1f\x8b"
            if compressed and (expected := _nifti_size(file)):
                raw.seek(-8, os.SEEK_END)
                crc, size = struct.unpack("<II", raw.read())
                if size == expected % 2**32:  # else the file has several parts, or something behind the last
                    return f"{crc:08x}-{expected:x}"
        with gzip.open(file) if compressed else file.open("rb") as content:
            return _checksum(content)
    except (OSError, EOFError, zlib.error):
        with file.open("rb") as raw:  # as it is
            return _checksum(raw)


def _checksum(content: Any) -> str:
    crc = size = 0
    while chunk := content.read(2**20):
        crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return f"{crc:08x}-{size:x}"


def _nifti_size(file: Path) -> int:
    """Bytes of an uncompressed volume by its header; 0 if it has none."""
    try:
        volume: Any = nib.load(file)
        return int(np.prod(volume.shape) * volume.get_data_dtype().itemsize + volume.dataobj.offset)
    except Exception:  # whatever a broken header raises
        return 0


class _Index:
    """Cases by what they are."""

    def __init__(self, cases: Iterable[CaseId]):
        self._by_name: dict[str, list[CaseId]] = defaultdict(list)
        self._by_image: dict[str, list[CaseId]] = defaultdict(list)
        for case in cases:
            self._by_name[case.name].append(case)
            for image in case.images:
                self._by_image[image].append(case)

    def find(self, case: CaseId) -> set[CaseId]:
        """Those that are the same as `case`: the one of its name alone, if there is one."""
        named = [known for known in self._by_name[case.name] if known.is_same(case)]
        imaged = [known for image in case.images for known in self._by_image[image] if known.is_same(case)]
        return set(named or imaged)

    def has_name(self, case: CaseId) -> bool:
        """Whether a case is called like this one."""
        return bool(self._by_name[case.name])


@dataclass(frozen=True)
class Choice:
    """The cases that a run is evaluated on.

    Attributes:
        names: in the data set.
        kind: what they are to the run, an adjective.
        own: whether they are of the run's own data set.
        val: the run's validation cases in the data set.
        notes: what a reader has to know of the choice.
    """

    names: tuple[str, ...]
    kind: str
    own: bool
    val: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def choose_cases(run: Path, cases: RunCases, dataset: Dataset, split: str, *, given: str | None) -> Choice:
    """The cases of `dataset` to evaluate the run on.

    Of the run's own data set, or a part of it, those are the cases of `split`, whatever the folder and the cases
    are called. Of other data all cases count but those that the run was trained or validated on.

    Args:
        run: its folder.
        cases: the run's.
        dataset: what it is evaluated on.
        split: `train`, `val` or `test`.
        given: how the data set was called; None for the run's own.

    Raises:
        InputError: if no case is left, or the split is not that of the data.
    """
    splits = read_splits(run / "splits.json") if given is None or cases.own else Splits((), (), ())
    if given is None:
        return _own_choice(run, cases, dataset, splits, split)
    ids, own, initial = identify(dataset), _Index(cases.own), _Index(cases.initial)
    split_of = {name: part for part in KINDS for name in getattr(splits, part)}
    parts = {case.name: {split_of.get(known.name, "") for known in own.find(case)} for case in ids}
    namesakes = [case.name for case in ids if not parts[case.name] and own.has_name(case)]
    if any(parts.values()):  # some are the run's, so that these are as well, written anew
        parts |= {name: {split_of.get(name, "")} for name in namesakes}
        namesakes = []
    trained = {name for name, found in parts.items() if found & {"train", "val"} and cases.trained}
    seen = trained | {case.name for case in ids if initial.find(case)}
    if all(parts.values()) and any(found - {""} for found in parts.values()):
        return _part_of_own(run, splits, parts, seen, split, given)
    if split != "test":
        raise InputError(
            f"--split {split} is of the run's own data set, and {given} is other data: leave it out."
        )
    return _unseen(run, [case.name for case in ids], seen, namesakes, given)


def _part_of_own(
    run: Path, splits: Splits, parts: Mapping[str, set[str]], seen: set[str], split: str, given: str
) -> Choice:
    """The cases of a split among those of the run's data set that are there; `parts` are the splits of each."""
    names = [
        name for name, found in parts.items() if split in found and not (split == "test" and name in seen)
    ]
    if not names:
        raise InputError(
            f"{given} holds {_count(list(parts))} of {run}'s own data set ({_some(list(parts))}), but none of its "
            f"{split} split: choose another --split, or leave out --data."
        )
    absent = len(getattr(splits, split)) - len(names)
    notes = (f"{given} lacks {absent} of the {len(names) + absent} cases of {run}'s {split} split",)
    val = tuple(name for name, found in parts.items() if "val" in found)
    all_val = val if len(val) == len(splits.val) else ()
    return Choice(tuple(names), KINDS[split], True, all_val, notes if absent > 0 else ())


def _unseen(run: Path, names: Sequence[str], seen: set[str], namesakes: Sequence[str], given: str) -> Choice:
    """The cases of other data that the run has not seen."""
    left_out = [name for name in names if name in seen]
    if len(left_out) == len(names):
        raise InputError(
            f"{run} was trained or validated on every case of {given} ({_some(left_out)}): give data that it has "
            "not seen."
        )
    notes = []
    if left_out:
        notes.append(
            f"{_count(left_out)} of {given} left out, since the run was trained or validated on them: "
            f"{_some(left_out)}"
        )
    if namesakes:
        notes.append(
            f"{_count(namesakes)} of {given} called as cases of {run} are, but with other images, taken for other "
            f"cases: {_some(namesakes)}"
        )
    return Choice(tuple(name for name in names if name not in seen), KINDS["test"], False, (), tuple(notes))


def _own_choice(run: Path, cases: RunCases, dataset: Dataset, splits: Splits, split: str) -> Choice:
    """The cases of the run's split, by their names."""
    names = getattr(splits, split)
    known, found = {case.name: case for case in cases.own}, {case.name: case for case in identify(dataset)}
    if not names:
        raise InputError(f"The {split} split of {run} holds no case: choose another --split.")
    if missing := [name for name in names if name not in found]:
        raise InputError(
            f"{_count(missing)} of {run}'s {split} split not in {dataset.name} ({_some(missing)}): give the folder "
            "that holds them as --data."
        )
    changed = [name for name in names if name in known and not known[name].is_same(found[name])]
    notes = (f"{_count(changed)} with other images than when {run} was trained: {_some(changed)}",)
    return Choice(names, KINDS[split], True, splits.val, notes if changed else ())


def cases_for(dataset: Dataset, initial: tuple[Path, RunCases] | None = None) -> RunCases:
    """What is to be kept of a run on `dataset` whose weights come from the run `initial`."""
    if initial is None:
        return RunCases(identify(dataset))
    run, cases = initial
    return RunCases(identify(dataset), (*cases.initial, *_seen(run, cases, "train", "val")), cases.complete)


def check_initial(run: Path, cases: RunCases, dataset: Dataset, splits: Splits) -> None:
    """Checks that the run whose weights training starts from has not seen the test cases.

    Raises:
        InputError: if it was trained or validated on one of them.
    """
    ids = {case.name: case for case in identify(dataset)}

    def seen(names: Sequence[str], *parts: str) -> list[str]:
        known = _Index((*cases.initial, *_seen(run, cases, *parts)))
        return [name for name in names if known.find(ids[name])]

    if test := seen(splits.test, "train", "val"):
        raise InputError(
            f"--init {run} was trained or validated on {_count(test)} of this command's test split "
            f"({_some(test)}): split the data as it did, with --splits {run / 'splits.json'} or its options."
        )
    val = seen(splits.val, "train")
    if val and is_first():
        print(
            f"note: --init {run} was trained on {_count(val)} of this command's validation split ({_some(val)}), "
            "whose figures will look better than those of the test split."
        )


def note_duplicates(dataset: Dataset, splits: Splits) -> None:
    """Says which test cases have the images of a case that trains or validates under another name."""
    ids = {case.name: case for case in identify(dataset)}
    seen = _Index(replace(ids[name], name="") for name in (*splits.train, *splits.val) if ids[name].images)
    twice = [name for name in splits.test if seen.find(ids[name])]
    if twice and is_first():
        print(
            f"note: {_count(twice)} of the test split with the same images as training or validation cases under "
            f"other names, so that they are not held out: {_some(twice)}"
        )


def as_kept(config: RunConfig, folder: Path, dataset: Dataset, splits: Splits) -> RunConfig:
    """`config` in the words of the run or comparison that is to be resumed in `folder`, where both mean the same.

    Paths may be spelt otherwise, data may lie elsewhere, and what only makes training faster may differ.

    Raises:
        InputError: if the cases are no longer split as they were.
    """
    file = folder / "config.json"
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        directory = Path(kept.get("directory", ""))
        before: RunConfig = from_json(RunConfig, kept["config"].get("run", kept["config"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return config  # `open_run` says what is wrong
    same = {name: getattr(before.data, name) for name in ("cache_dir", "loader_threads", "prefetch")}
    if (folder / "splits.json").exists():
        if read_splits(folder / "splits.json") != splits:
            raise InputError(
                f"{folder / 'splits.json'} splits the cases otherwise than this command does: give the data and "
                "the options that the run was started with."
            )
        same["splits"] = before.data.splits
    known = {case.name: case for case in read_cases(folder).own if case.images}
    ids = identify(dataset)
    if resolved(before.data.data, directory) == resolved(config.data.data) or (
        len(known) == len(ids) and all(id.name in known and known[id.name].is_same(id) for id in ids)
    ):
        same["data"] = before.data.data
    init = config.init
    if config.init and before.init and (directory / before.init).resolve() == Path(config.init).resolve():
        init = before.init
    return replace(config, data=replace(config.data, **same), init=init)


def resolved(data: str, directory: Path = Path()) -> str:
    """A data set's name with the one path that leads to it."""
    kind, colon, path = data.partition(":")
    if kind not in LAYOUTS:  # phantoms, and functions of the user
        return data
    return kind + colon + (str((directory / Path(path).expanduser()).resolve()) if path else "")


def own_data(run: Path, data: str) -> str:
    """The data set that `run` calls `data`, from the folder that it was started in if that is still there."""
    try:
        directory = json.loads((run / "config.json").read_text(encoding="utf-8")).get("directory", "")
        found = resolved(data, Path(directory))
    except (OSError, ValueError, AttributeError, TypeError):
        return resolved(data)
    return found if Path(found.partition(":")[2]).exists() else resolved(data)


def _seen(run: Path, cases: RunCases, *parts: str) -> list[CaseId]:
    """The cases of these parts of a run's split, if it was trained on that."""
    if not (cases.own and cases.trained):
        return []
    splits = read_splits(run / "splits.json")
    names = {name for part in parts for name in getattr(splits, part)}
    return [case for case in cases.own if case.name in names]


def _names(splits: Splits) -> tuple[str, ...]:
    return (*splits.train, *splits.val, *splits.test)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} case{'s' if len(names) != 1 else ''}"


def _to_json(cases: Iterable[CaseId]) -> list[list[Any]]:
    return [[case.name, sorted(case.images)] for case in cases]
