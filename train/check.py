"""Reads all voxels of a data set and lists the faults: `python -m train check`, and before each run."""

import contextlib
import csv
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from train.data import Dataset
from train.data.arrays import check_case
from train.data.faults import Fault, collected, refuse
from train.data.io import read_scan
from train.data.layouts import LAYOUTS
from train.data.open import open_layout
from train.data.phantom import PhantomDataset
from train.data.volumes import (
    Entry,
    Layout,
    VolumeDataset,
    header_faults,
    layout_faults,
    read_class_ids,
    replace_label_values,
)
from train.errors import InputError
from train.processes import is_first, own_share
from train.progress import progress
from train.run.folder import written_whole

Item = TypeVar("Item")
Result = TypeVar("Result")

_COLUMNS = ("case", "file", "problem")
_THREADS = min(4, os.cpu_count() or 1)  # each thread holds one case at a time


@dataclass(frozen=True)
class DataReport:
    """The result of reading a data set.

    Attributes:
        faults: of all its files.
        num_cases: number of cases that it lists.
        class_voxels: number of voxels of each class in all readable labels, by class name.
    """

    faults: tuple[Fault, ...]
    num_cases: int = 0
    class_voxels: dict[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        """Lines for the terminal: faults, number of cases, frequency of each class."""
        total = sum(self.class_voxels.values())
        lines = [f"{fault.case or 'data set'}: {fault.file} {fault.problem}" for fault in self.faults]
        lines.append(f"{len(self.faults)} faults in {self.num_cases} cases, {total} voxels labelled:")
        lines += [
            f"  {name}: {voxels} voxels, {voxels / total if total else 0:.3%}"
            for name, voxels in self.class_voxels.items()
        ]
        absent = [name for name, voxels in self.class_voxels.items() if not voxels]
        if absent:
            lines.append(f"warning: no label holds {', '.join(absent)}")
        return "\n".join(lines)


def check_data(spec: str, label_values: Sequence[int] = ()) -> DataReport:
    """Reads every voxel of every image and label of a data set.

    Args:
        spec: LAYOUT:PATH.
        label_values: value of each class in the label files, in place of the layout's.

    Raises:
        InputError: `spec` names no folder of volumes. The report lists the faults inside of that folder.
    """
    kind, _, path = spec.partition(":")
    root = Path(path).expanduser()
    is_folder = kind in LAYOUTS and bool(path) and root.is_dir()
    try:
        layout = replace_label_values(open_layout(spec), label_values)
    except Exception as error:
        if not is_folder:
            raise
        description = root / "dataset.json"
        return DataReport((Fault.of("", description if description.exists() else root, error),))
    inspected = _in_threads(lambda entry: inspect_case(layout, entry), layout.entries, "checking")
    faults = [*layout_faults(layout), *(fault for found, _ in inspected for fault in found)]
    counts = np.sum([counts for _, counts in inspected], axis=0).tolist()
    voxels = dict(zip(layout.class_names, counts, strict=True)) if inspected else {}
    return DataReport(tuple(dict.fromkeys(faults)), len(layout.entries), voxels)


@contextlib.contextmanager
def faults_file(file: Path) -> Iterator[Callable[[Sequence[Fault]], None]]:
    """Opens the CSV of faults and yields a function that writes one row per fault: case, file, problem.

    Raises:
        InputError: the file cannot be written, or exists and is no list of faults.
    """
    header = ",".join(_COLUMNS)
    try:
        if file.exists() and not file.read_bytes().startswith(header.encode()):
            raise InputError(f"{file} is there already and no list of faults: choose another --out.")
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as partial, partial.open("w", newline="", encoding="utf-8") as stream:
            yield lambda faults: csv.writer(stream).writerows([_COLUMNS, *map(dataclasses.astuple, faults)])
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror}): choose another --out.") from error


def check_cases(dataset: Dataset, whole: Sequence[str], labels: Sequence[str] = ()) -> None:
    """Reads cases before a run depends on them. Phantoms are not read.

    Processes share the cases. The data set's `cache_dir`, if it has one, keeps the cases that are read whole.

    Args:
        dataset: where the cases come from.
        whole: cases whose images and labels are read.
        labels: cases whose labels only are read, where volumes on disk hold them.

    Raises:
        InputError: lists the faults that were found.
    """
    if isinstance(dataset, PhantomDataset):
        return
    index_of = {name: index for index, name in enumerate(dataset.case_names)}
    labels = labels if isinstance(dataset, VolumeDataset) else ()
    is_whole = dict.fromkeys(labels, False) | dict.fromkeys(whole, True)
    cases = [(index_of[name], read_whole) for name, read_whole in is_whole.items()]
    found = _in_threads(
        lambda case: _load_faults(dataset, *case), own_share(cases) if cases else [], "reading cases"
    )
    refuse(list(dict.fromkeys(fault for faults in found for fault in faults)))


def inspect_case(layout: Layout, entry: Entry) -> tuple[list[Fault], np.ndarray]:
    """Reads every file of a case. A fault of one file does not stop the others.

    Returns:
        The faults, and the number of voxels of each class in the labels that can be read.
    """
    faults: list[Fault] = []
    class_voxels = np.zeros(len(layout.class_names), int)
    with collected(faults, entry.name, entry.images[0]):
        faults += header_faults(replace(layout, entries=(entry,)))
    for file in entry.images:
        with collected(faults, entry.name, file):
            read_scan([file])
    for file in entry.labels:
        with collected(faults, entry.name, file):
            counts = np.bincount(read_class_ids(file, layout).ravel(), minlength=len(class_voxels))
            class_voxels += counts[: len(class_voxels)]
    return list(dict.fromkeys(faults)), class_voxels  # faults of headers are found twice


def _load_faults(dataset: Dataset, index: int, whole: bool) -> Sequence[Fault]:
    """Faults of the files that `dataset.load` reads of a case, or of its label files only."""
    if not isinstance(dataset, VolumeDataset):
        check_case(dataset, index)
        return ()
    entry = dataset.layout.entries[index]
    entry = replace(entry, labels=dataset.label_files(entry))
    try:
        if whole:
            dataset.load(index)
        else:
            for file in entry.labels:
                read_class_ids(file, dataset.layout)
    except Exception as error:
        found, _ = inspect_case(dataset.layout, entry if whole else replace(entry, images=entry.images[:1]))
        return found or [Fault.of(entry.name, entry.images[0], error)]
    return []


def _in_threads(function: Callable[[Item], Result], items: Sequence[Item], desc: str) -> list[Result]:
    """The results in order. Ctrl-C waits only for the cases that are being read."""
    pool = ThreadPoolExecutor(_THREADS)
    try:
        found = pool.map(function, items)
        return list(progress(found, desc=desc, total=len(items), leave=False, disable=not is_first()))
    finally:
        pool.shutdown(cancel_futures=True)
