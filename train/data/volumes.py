"""Cases in volume files, in any layout: existence, shapes, grids and labels are checked here."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from calib_jax._subjects import find_subjects
from train.data.annotators import majority
from train.data.cache import CaseStore
from train.data.case import Case, Source
from train.data.faults import Fault, collected, refuse
from train.data.geometry import Geometry
from train.data.ignore import IGNORE
from train.data.images import is_image
from train.data.io import Grid, check_same_grid, open_label, read_label, read_scan
from train.data.preprocess import preprocess
from train.data.shapes import Annotations, Ids
from train.data.volume_files import VolumeFile, open_volume, parts_of
from train.errors import InputError

# Values of int16 and uint16 label files. float32 represents them exactly.
_LABEL_RANGE = range(-(2**15), 2**16)


@dataclass(frozen=True)
class Entry:
    """Files of one case.

    Attributes:
        name: unique.
        images: one file with all channels, or one file per channel.
        labels: one file, or one file per annotator.
        subject: of the scan, where a subject has several scans; empty for the name of the case.
        held_out: whether the data set reserves the case for testing.
    """

    name: str
    images: tuple[Path, ...]
    labels: tuple[Path, ...]
    subject: str = ""
    held_out: bool = False


@dataclass(frozen=True)
class Layout:
    """The files of a data set and what their values mean. No voxel has been read.

    Attributes:
        name: of the data set.
        source: file or folder that declares the data set, for error messages.
        class_names: by class id, background first.
        num_channels: of each image.
        entries: the cases.
        label_values: value of each class in the files, -32768 to 65535; BraTS 2021 has 4 in place of 3. Empty where
            the values are the class ids.
        regions: class ids of each evaluation region by its name; empty to evaluate the foreground classes.
        intensity_range: range that intensities are clipped to before they are normalised, as is usual for CT; None
            normalises over the non-zero voxels.
        ignore_values: values of unlabelled voxels in the files.
        nearest_value: whether a value that is not declared stands for the nearest one that is.
    """

    name: str
    source: Path
    class_names: tuple[str, ...]
    num_channels: int
    entries: tuple[Entry, ...]
    label_values: tuple[int, ...] = ()
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    intensity_range: tuple[float, float] | None = None
    ignore_values: tuple[int, ...] = ()
    nearest_value: bool = False

    @property
    def class_values(self) -> tuple[int, ...]:
        """Value of each class in the files."""
        return self.label_values or tuple(range(len(self.class_names)))

    @property
    def spatial_dims(self) -> int:
        """2 if all scans are 2-D images, such as PNG, else 3."""
        files = [file for entry in self.entries for file in entry.images]
        return 2 if files and all(map(is_image, files)) else 3


def reorder_channels(layout: Layout, channels: Sequence[int]) -> Layout:
    """The layout with these channels only, in this order. An empty order keeps all.

    Raises:
        InputError: a channel does not exist or is listed twice, or a case has all channels in one file.
    """
    if not channels:
        return layout
    if any(len(entry.images) != layout.num_channels for entry in layout.entries):
        raise InputError(
            f"channel_order is {tuple(channels)}, but {layout.source} has all channels of a case in one file: "
            "leave it out."
        )
    if len(set(channels)) < len(channels) or not set(channels) <= set(range(layout.num_channels)):
        raise InputError(
            f"channel_order is {tuple(channels)}: give different channels of 0 to {layout.num_channels - 1}."
        )
    entries = tuple(
        replace(entry, images=tuple(entry.images[channel] for channel in channels))
        for entry in layout.entries
    )
    return replace(layout, entries=entries, num_channels=len(channels))


def replace_label_values(layout: Layout, values: Sequence[int]) -> Layout:
    """The layout with other values of its classes in the files. No values keep the layout's own.

    Raises:
        InputError: there are more or fewer values than classes.
    """
    if not values:
        return layout
    if len(values) != len(layout.class_names):
        raise InputError(
            f"label_values is {tuple(values)}, but {layout.source} has the classes "
            f"{', '.join(layout.class_names)}: give one value for each, in this order."
        )
    return replace(layout, label_values=tuple(values))


def replace_subjects(layout: Layout, pattern: str) -> Layout:
    """The layout with the subjects that a regular expression finds in the names of its cases.

    An empty expression keeps the layout's own.

    Raises:
        InputError: the expression does not fit the names.
    """
    if not pattern:
        return layout
    try:
        found = find_subjects(pattern, [entry.name for entry in layout.entries])
    except ValueError as error:
        raise InputError(str(error)) from error
    return replace(layout, entries=tuple(replace(x, subject=found[x.name]) for x in layout.entries))


def replace_range(layout: Layout, intensity_range: tuple[float, float] | None) -> Layout:
    """The layout with another intensity range. None keeps the layout's own.

    Raises:
        InputError: the range is empty.
    """
    if intensity_range is None:
        return layout
    if not intensity_range[0] < intensity_range[1]:
        raise InputError(f"intensities is {intensity_range}: give the lowest, then the highest.")
    return replace(layout, intensity_range=intensity_range)


class VolumeDataset:
    """The cases of a `Layout` in RAS order, preprocessed by `train.data.preprocess.preprocess`.

    2-D images are arrays `[x, y]`, x along the rows of pixels.

    Opening checks every header: existence, shapes, channels and affines. Loading checks the voxels.

    Args:
        layout: the files.
        geometry: how scans are cropped and resampled.
        all_annotators: keep the labels of all annotators; else the first annotator's label is the truth.
        store: where loaded cases are kept.

    Raises:
        InputError: names each faulty file and its fault.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        geometry: Geometry | None = None,
        all_annotators: bool = False,
        store: CaseStore | None = None,
    ):
        self.layout = layout
        self.name = layout.name
        self.class_names = layout.class_names
        self.num_channels = layout.num_channels
        self.spatial_dims = layout.spatial_dims
        self.regions = layout.regions
        self.has_ignore = bool(layout.ignore_values)
        self.intensity_range = layout.intensity_range
        self.case_names = tuple(entry.name for entry in layout.entries)
        self.held_out = tuple(entry.name for entry in layout.entries if entry.held_out)
        self.subjects = tuple(entry.subject or entry.name for entry in layout.entries)
        grids, faults = _inspect(layout)
        refuse(faults)
        affines = [grid.affine for grid in grids]
        self.geometry = (geometry or Geometry()).resolved(affines)
        shapes = [
            self.geometry.shape_of(grid.shape[: self.spatial_dims], affine)
            for grid, affine in zip(grids, affines, strict=True)
        ]
        self.largest_shape = tuple(max(sides) for sides in zip(*shapes, strict=True))
        self.all_annotators = all_annotators
        self._store = store
        if all_annotators and all(len(entry.labels) == 1 for entry in layout.entries):
            raise InputError(f"{layout.source} has one label for each case: leave out --annotators.")

    def __len__(self) -> int:
        return len(self.layout.entries)

    def load(self, index: int) -> Case:
        """Reads case `index`, from the store if the store has it."""
        entry = self.layout.entries[index]
        if self._store is None:
            return self._read(entry)
        key = self._key(entry)
        case = self._store.read(key, entry.name)
        if case is None:
            case = self._read(entry)
            self._store.write(key, case)
        return case

    def label_files(self, entry: Entry) -> tuple[Path, ...]:
        """The label files of a case that `load` reads."""
        return entry.labels if self.all_annotators else entry.labels[:1]

    def _key(self, entry: Entry) -> str:
        """The key of a case in the store: its files, their sizes and times, and the preprocessing."""
        listed = (*entry.images, *self.label_files(entry))
        files = [part.resolve() for file in listed for part in parts_of(file)]
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        layout = self.layout
        labels = layout.label_values, layout.class_names
        chain = layout.intensity_range, self.geometry, self.all_annotators
        return repr((stats, (*labels, *chain, *layout.ignore_values)))

    def _read(self, entry: Entry) -> Case:
        layout = self.layout
        voxels, grid = read_scan(entry.images)
        labels = [
            self._flat(
                grid.to_ras(grid.from_turned(read_class_ids(file, layout), Grid.of(open_volume(file))))
            )
            for file in self.label_files(entry)
        ]
        own = self._combined(labels)
        image, placement = preprocess(
            self._flat(voxels), grid.affine, intensity_range=layout.intensity_range, geometry=self.geometry
        )
        if not self.geometry:
            return Case(entry.name, image, own[0], grid.affine, annotations=own[1])
        label, annotations = self._combined([placement.label(label) for label in labels])
        source = Source(placement, *own)
        return Case(entry.name, image, label, placement.affine, annotations=annotations, source=source)

    def _flat(self, array: np.ndarray) -> np.ndarray:
        """Without the third axis, which has one voxel, if the data set has 2-D images."""
        return array[:, :, 0] if self.spatial_dims == 2 else array

    def _combined(self, labels: Sequence[Ids]) -> tuple[Ids, Annotations | None]:
        """The label to train on; and the labels of all annotators, if the data set keeps them."""
        if not self.all_annotators:
            return labels[0], None
        annotations = np.stack(labels, axis=-1)
        return majority(annotations, len(self.class_names)), annotations


def read_class_ids(file: Path, layout: Layout) -> Ids:
    """Reads a label map as class ids, in the file's own order of axes.

    Raises:
        InputError: the file is missing or corrupt, or holds a value that the layout does not declare.
    """
    classes, ignored = layout.class_values, layout.ignore_values
    values = np.array((*classes, *ignored))
    if layout.nearest_value:
        order = np.argsort(values)
        edges = (values[order][1:] + values[order][:-1]) / 2
        ids = np.array((*range(len(classes)), *(IGNORE for _ in ignored)), np.uint8)
        return ids[order][np.digitize(open_label(file).read()[..., 0], edges)]
    ids = np.zeros(np.ptp(values) + 1, np.uint8)
    ids[values - values.min()] = (*range(len(classes)), *(IGNORE for _ in ignored))
    return ids[read_label(file, values.tolist()) - values.min()]


def header_faults(layout: Layout) -> list[Fault]:
    """All faults of names, files and headers. Reads no voxels."""
    return _inspect(layout)[1]


def layout_faults(layout: Layout) -> list[Fault]:
    """Faults of the data set as a whole, such as a case or a class that is named twice. Opens no file."""
    counts = Counter(entry.name for entry in layout.entries)
    faults = [
        Fault(name, str(layout.source), f"lists {name} more than once: list each case once.")
        for name, count in counts.items()
        if count > 1
    ]
    with collected(faults, "", layout.source):
        if not layout.entries:
            raise InputError(f"{layout.source} holds no case: check the path.")
        _check_labels(layout)
    return faults


def _inspect(layout: Layout) -> tuple[list[Grid], list[Fault]]:
    """The grids of all cases whose image can be opened; and all faults."""
    faults = layout_faults(layout)
    grids = [_checked_grid(entry, layout, faults) for entry in layout.entries]
    return [grid for grid in grids if grid is not None], faults


def _check_labels(layout: Layout) -> None:
    """Checks that classes have unique names and values and ids below `IGNORE`, and that regions use those ids."""
    names, values = layout.class_names, (*layout.class_values, *layout.ignore_values)
    if len(names) > IGNORE:
        raise InputError(
            f"{layout.source} declares {len(names)} classes: at most {IGNORE}, background included, can be told "
            "apart; leave out or join some."
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            f"{layout.source} names two classes {twice[0]!r}: give each class a name of its own."
        )
    if len(layout.class_values) != len(names) or len(set(values)) < len(values):
        raise InputError(
            f"{layout.source} gives its {len(names)} classes the label values {list(layout.class_values)} and "
            f"ignores {list(layout.ignore_values)}: give each class a value of its own."
        )
    if beyond := [value for value in values if value not in _LABEL_RANGE]:
        raise InputError(
            f"{layout.source} declares the label value {beyond[0]}: give whole numbers from {_LABEL_RANGE[0]} to "
            f"{_LABEL_RANGE[-1]}."
        )
    for region, ids in layout.regions.items():
        if not ids or len(set(ids)) < len(ids) or not set(ids) <= set(range(len(names))):
            raise InputError(
                f"{layout.source} makes the region {region!r} of the classes {list(ids)}: give different ones, "
                f"0 to {len(names) - 1}."
            )


def _checked_grid(entry: Entry, layout: Layout, faults: list[Fault]) -> Grid | None:
    """The grid of a case's image; None if the image is faulty. Adds the faults of all files to `faults`."""
    volumes: dict[Path, VolumeFile] = {}
    for file in entry.images:
        with collected(faults, entry.name, file):
            volumes[file] = open_volume(file)
    for file in entry.labels:
        with collected(faults, entry.name, file):
            volumes[file] = open_label(file)
    first = entry.images[0]
    image = volumes.pop(first, None)
    if image is None:
        return None
    known = len(faults)
    with collected(faults, entry.name, first):
        _check_channels(image, entry, layout)
    if len(faults) > known:
        return None
    for file, volume in volumes.items():
        with collected(faults, entry.name, file):
            check_same_grid(image, volume)
    return Grid.of(image)


def _check_channels(image: VolumeFile, entry: Entry, layout: Layout) -> None:
    declared = f'{layout.source.name} declares {layout.num_channels} under "modality" or "channel_names"'
    files = len(entry.images)
    if files not in (1, layout.num_channels):
        raise InputError(
            f"{image.path} is one of {files} images of a case, but {declared}: list one file for each."
        )
    if image.channels * files == layout.num_channels:
        return
    if len(image.stored_shape) < 3:
        raise InputError(
            f"{image.path} has shape {image.stored_shape}: give a 3-D volume for each channel, or a 4-D one with "
            f"{layout.num_channels} channels last."
        )
    raise InputError(f"{image.path} has {image.channels} channels, but {declared}: correct one of the two.")
