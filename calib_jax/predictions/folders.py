"""Reads the cases of folders whose files have been matched, one at a time."""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from nibabel.affines import voxel_sizes

from calib_jax.predictions.arrays import NNUNET_KEYS, ArrayFile, open_array
from calib_jax.predictions.case import Case, PredictionError
from calib_jax.predictions.dataset_json import DatasetJson
from calib_jax.predictions.grids import Grid, affine_of
from calib_jax.predictions.labels import agreement, predicted_ids, read_ids, to_labels
from calib_jax.predictions.layout import Layout, Reference, find_layouts, read_stored, turn_to
from calib_jax.predictions.names import CaseFiles, Folder
from calib_jax.predictions.values import decode, sample
from calib_jax.predictions.volumes import parts_of
from calib_jax.predictions.writing import PredictionFile

_COUNTED = 9  # cases whose headers tell the number of classes
_LEAST_AGREEMENT = 0.5  # of probabilities with the label map beside them, among voxels of the foreground
_LEAST_VOXELS = 20  # sampled voxels of the foreground that such a verdict needs

Value = TypeVar("Value")

PARTS = ("labels", "image", "predicted")
"""Fields of a case that are read beside its probabilities."""


class Predictions:
    """Predictions of one or several models, and their labels. `open_predictions` makes it.

    Attributes:
        models: names of the models; `("model",)` if one folder without a name was given.
        case_names: cases that all models and the labels have, sorted.
        class_names: all classes, background first; for regions the names of the regions.
        regions: whether each channel is a region of its own, a sigmoid; regions overlap and have no background.
        dataset: what dataset.json says; None without one.
    """

    def __init__(
        self,
        folders: Mapping[str, tuple[Path, Folder]],
        labels: Folder | None,
        images: Mapping[str, Path],
        *,
        dataset: DatasetJson | None,
        logits: bool,
        class_names: Sequence[str] | None,
        notices: Sequence[str],
    ):
        self.models = tuple(folders)
        known = [set(folder.cases) for _, folder in folders.values()]
        known += [set(labels.cases)] if labels is not None else []
        self.case_names = tuple(sorted(set.intersection(*known)))
        self.dataset = dataset
        self._folders, self._labels, self._images, self._logits = folders, labels, images, logits
        self._notices: dict[str, Any] = dict.fromkeys(notices, None)  # in order; for each, what it is about
        self._layouts: dict[tuple[str, str], PredictionFile] = {}
        self._last_label, self._last_image = _Last(), _Last()
        self._channels, self.regions = self._find_channels(class_names)
        self.class_names = self._find_names(class_names)

    @property
    def notices(self) -> tuple[str, ...]:
        """Sentences about what has no partner, what was ignored, and what was taken for something else.

        Reading a case may add some.
        """
        return tuple(self._notices)

    def read(self, case_name: str, model: str | None = None, *, parts: Collection[str] = PARTS) -> Case:
        """Reads and checks one case.

        Args:
            case_name: one of `case_names`.
            model: one of `models`; None is the first.
            parts: fields of the case to read beside the probabilities; the others are None. Voxels of files that
                are not asked for are read only where they tell the order of axes.

        Raises:
            PredictionError: a file of the case is broken, does not fit the others, or holds no probabilities.
            KeyError: there is no such case or model.
            ValueError: there is no such part.
        """
        if unknown := set(parts) - set(PARTS):
            raise ValueError(f"parts names {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}.")
        return self._load(case_name, self.models[0] if model is None else model, parts)[0]

    def __iter__(self) -> Iterator[Case]:
        """Every case of every model; one case is held at a time."""
        for name in self.case_names:
            for model in self.models:
                yield self.read(name, model)

    def __len__(self) -> int:
        """Number of cases that iteration gives."""
        return len(self.case_names) * len(self.models)

    def template(self, case_name: str, model: str | None = None) -> PredictionFile:
        """What `write_probabilities` needs to write a case in the format that it came in.

        Reads the case unless it has been read before.
        """
        model = self.models[0] if model is None else model
        if (case_name, model) not in self._layouts:
            self._load(case_name, model, ())
        return self._layouts[case_name, model]

    def files(self, case_name: str, model: str | None = None) -> tuple[Path, ...]:
        """Every file that `read` opens for a case."""
        entry = self._folders[self.models[0] if model is None else model][1].cases[case_name]
        label = self._labels.cases[case_name].files if self._labels is not None else ()
        beside = (entry.segmentation, self._images.get(case_name))
        data = (*entry.files, *label, *(path for path in beside if path is not None))
        parts = (part for path in data for part in parts_of(path))
        return (*parts, *([self.dataset.file] if self.dataset is not None else []))

    # Reading.

    def _load(self, name: str, model: str, parts: Collection[str]) -> tuple[Case, PredictionFile]:
        folder, found = self._folders[model]
        try:
            return self._load_files(name, model, folder, found.cases[name], parts)
        except MemoryError as error:
            raise PredictionError(
                f"{found.cases[name].files[0]} needs more memory than there is: use a larger machine."
            ) from error

    def _load_files(
        self, name: str, model: str, folder: Path, entry: CaseFiles, parts: Collection[str]
    ) -> tuple[Case, PredictionFile]:
        if entry.fault:
            raise PredictionError(entry.fault)
        files = [open_array(path) for path in entry.files]
        file, label = files[0], self._open_label(name)
        beside = _Beside(entry.segmentation) if entry.segmentation is not None else None
        inner = self._inner_reference(name, file, beside and beside.file, label)
        layouts, notice = find_layouts(
            file, inner, 1 if entry.classes else self._channels, reorients=self._reorients
        )
        self._note(model, "affine", notice)
        values, layouts = read_stored(files, layouts)
        probs, encoding, notice = decode(
            values,
            path=file.path,
            is_integer=file.dtype.kind in "iub" and not file.is_scaled,
            dtype=file.dtype,
            channels=_channels_of(entry, regions=self.regions),
            logits=self._logits or file.key == "logits",
            may_be_logits=file.key in NNUNET_KEYS,
        )
        del values
        self._note(model, "values", notice)
        if probs.shape[-1] != self._channels:
            raise PredictionError(
                f"{file.path} gives {probs.shape[-1]} classes, but there are {self._channels}: export all of them."
            )
        in_order = beside is not None and (
            beside.file.volume is not None or inner is None or inner.grid is None
        )
        if beside is not None and file.volume is None and in_order:
            layouts = [self._most_alike(layouts, probs, file, beside)]
        layout, reference = layouts[0], inner
        if label is not None and inner is not None and inner is not label[1] and inner.grid is not None:
            layout, notice = turn_to(layout, inner.grid, label[1], inner.name)
            self._note(model, "affine", notice)
        probs = layout.to_grid(probs)
        if label is not None:
            reference = label[1]
        if reference is None:
            shape = probs.shape[:-1]
            reference = Reference(
                str(file.path), shape, Grid(file.volume.header, shape) if file.volume else None
            )
        template = PredictionFile(
            entry.files,
            folder,
            file.kind,
            file.key,
            file.dtype,
            layout,
            encoding,
            self.regions,
            reference,
            entry.segmentation,
        )
        self._layouts[name, model] = template
        labels, where = self._read_label(name, label) if "labels" in parts else (None, None)
        image = self._read_image(name, reference) if "image" in parts else None
        predicted = self._read_predicted(model, beside, reference) if "predicted" in parts else None
        case = Case(name, model, probs, labels, where, image, _spacing(reference), predicted)
        return case, template

    def _inner_reference(
        self,
        name: str,
        file: ArrayFile,
        beside: ArrayFile | None,
        label: tuple[ArrayFile, Reference] | None,
    ) -> Reference | None:
        """The grid of a prediction: that of the label map beside it, if this knows more than the label."""
        reference = label[1] if label is not None else None
        knows_more = file.volume is None and beside is not None and beside.volume is not None
        if beside is not None and (reference is None or knows_more):
            return Reference.of(beside)
        if reference is None and file.volume is None and name in self._images:
            return Reference.of(open_array(self._images[name]))
        return reference

    def _most_alike(
        self, layouts: Sequence[Layout], probs: np.ndarray, file: ArrayFile, beside: "_Beside"
    ) -> Layout:
        """The layout in which probabilities agree best with the label map beside them; the first one of a tie."""
        ids = beside.ids
        some_ids = sample(ids[..., None])[..., 0] if ids.ndim < 4 else sample(ids)
        order = self.dataset.class_order if self.dataset is not None else ()
        highest = max(order, default=0) if self.regions else self._channels - 1
        if some_ids.ndim > 3 or int(some_ids.min()) < 0 or int(some_ids.max()) > highest:
            return layouts[0]
        shares = []
        for layout in layouts:
            some_probs = sample(layout.to_grid(probs))
            predicted = predicted_ids(some_probs, regions=self.regions, class_order=order)
            if predicted is None or predicted.shape != some_ids.shape:
                return layouts[0]
            shares.append(agreement(predicted, some_ids))
        best = max(range(len(layouts)), key=lambda i: shares[i][0])
        share, voxels = shares[best]
        if share < _LEAST_AGREEMENT and voxels >= _LEAST_VOXELS:
            raise PredictionError(
                f"{file.path} agrees with {beside.file.path} on {share:.0%} of the foreground: its axes are "
                "in another order, or the two are of different cases; export both again, or remove the label map "
                "if it was changed afterwards."
            )
        return layouts[best]

    def _open_label(self, name: str) -> tuple[ArrayFile, Reference] | None:
        if self._labels is None:
            return None
        entry = self._labels.cases[name]
        if entry.fault:
            raise PredictionError(entry.fault)
        file = open_array(entry.files[0])
        return file, Reference.of(file)

    def _read_label(self, name: str, label: tuple[ArrayFile, Reference] | None) -> tuple[Any, Any]:
        """Labels of a case and where they count; those of the last case are kept for the next model."""
        if label is None:
            return None, None

        def read() -> tuple[Any, Any]:
            declared = self.dataset.labels if self.dataset is not None else None
            labels, where, notice = to_labels(
                read_ids(label[0]),
                path=label[0].path,
                num_classes=len(declared.class_names) if declared is not None else self._channels,
                regions=tuple(declared.regions.values()) if declared is not None and self.regions else (),
                ignore_values=declared.ignore_values if declared is not None else (),
            )
            self._note("", "label", notice)
            return labels, where

        return self._last_label(name, read)

    def _read_predicted(
        self, model: str, beside: "_Beside | None", reference: Reference
    ) -> np.ndarray | None:
        """The label map beside probabilities; None, with a notice, if it cannot be used."""
        if beside is None:
            return None
        declared = self.dataset.labels if self.dataset is not None else None
        path = beside.file.path
        try:
            if beside.file.volume is None and reference.grid is not None:
                raise PredictionError(
                    f"{path} has no affine, but {reference.name} has one: save it as .nii.gz."
                )
            labels, _, _ = to_labels(
                _on_grid(beside.file, beside.ids, reference),
                path=path,
                num_classes=len(declared.class_names) if declared is not None else self._channels,
                regions=tuple(declared.regions.values()) if declared is not None and self.regions else (),
                ignore_values=(),
            )
            return labels if self.regions else labels.astype(np.min_scalar_type(self._channels))
        except PredictionError as error:
            self._note(model, "predicted", f"The predicted label map is left out: {error}")
            return None

    def _read_image(self, name: str, reference: Reference) -> np.ndarray | None:
        """Intensities on the grid of a case; those of the last case are kept for the next model."""
        path = self._images.get(name)
        if path is None:
            return None

        def read() -> np.ndarray | None:
            try:
                file = open_array(path)
                if file.volume is not None:
                    return _on_grid(file, file.volume.read()[..., 0], reference)
                values = file.read().astype(np.float32)
                if file.kind == "image" and values.ndim == 3:
                    values = values[..., :3].mean(-1)
                return _on_grid(file, values, reference)
            except PredictionError as error:
                self._note("", "image", f"An image is left out: {error}")
                return None

        return self._last_image((name, reference.name), read)

    def _note(self, model: str, about: str, notice: str) -> None:
        """Keeps the first notice of its kind about a model; the same about a second case adds nothing."""
        if notice and (model, about) not in list(self._notices.values()):
            self._notices[notice] = (model, about)

    # Classes.

    @property
    def _reorients(self) -> bool:
        return self.dataset is not None and self.dataset.reorients

    def _find_channels(self, class_names: Sequence[str] | None) -> tuple[int, bool]:
        """The number of channels and whether they are regions: those of most of the first cases.

        One case with a class too few must not make the others look wrong.
        """
        problem = None
        found: list[tuple[int, bool]] = []
        entries = self._folders[self.models[0]][1].cases
        for name in self.case_names:
            try:
                if entries[name].fault:
                    raise PredictionError(entries[name].fault)
                found.append(self._count_channels(name, entries[name], class_names))
            except PredictionError as error:
                problem = problem or error
            if len(found) == _COUNTED:
                break
        if not found:
            assert problem is not None
            raise problem
        chosen = max(found, key=lambda one: (found.count(one), one))
        if self.dataset is not None and chosen not in self._declared(None):
            declared = len(self.dataset.labels.class_names)
            self._note(
                "",
                "dataset",
                f"{self.dataset.file} declares {declared} classes and predictions have {chosen[0]}: the file is "
                "ignored.",
            )
            self.dataset = None
        return chosen

    def _declared(self, class_names: Sequence[str] | None) -> list[tuple[int, bool]]:
        """Numbers of channels that dataset.json or the names allow, and whether channels are regions then."""
        labels = self.dataset.labels if self.dataset is not None else None
        expected = [(len(labels.regions), True)] if labels is not None and labels.regions else []
        expected += [(len(labels.class_names), False)] if labels is not None else []
        if class_names is None:
            return expected
        return [one for one in expected if one[0] == len(class_names)][:1] or [(len(class_names), False)]

    def _count_channels(
        self, name: str, entry: CaseFiles, class_names: Sequence[str] | None
    ) -> tuple[int, bool]:
        file, label = open_array(entry.files[0]), self._open_label(name)
        beside = open_array(entry.segmentation) if entry.segmentation is not None else None
        reference = self._inner_reference(name, file, beside, label)
        for channels, is_regions in self._declared(class_names):
            if entry.classes:
                if len(entry.classes) == channels - (0 if is_regions else entry.classes[0]):
                    return channels, is_regions
                continue
            try:
                find_layouts(file, reference, channels, reorients=self._reorients)
                return channels, is_regions
            except PredictionError:
                continue
        if entry.classes:
            found = len(entry.classes) + entry.classes[0]
        else:
            layout = find_layouts(file, reference, None, reorients=self._reorients)[0][0]
            found = 1 if layout.class_axis is None else file.shape[layout.class_axis]
            found = max(found, 2)  # the background of one foreground channel is what is left to 1
        if class_names is not None:
            raise PredictionError(
                f"{file.path} has {found} classes, but {len(class_names)} are named ({', '.join(class_names)}): "
                "name each class, the background first."
            )
        return found, False

    def _find_names(self, class_names: Sequence[str] | None) -> tuple[str, ...]:
        if class_names is not None:
            return tuple(class_names)
        if self.dataset is not None:
            return tuple(self.dataset.labels.regions if self.regions else self.dataset.labels.class_names)
        others = (f"class {index}" for index in range(1, self._channels))
        return ("background", "foreground") if self._channels == 2 else ("background", *others)


class _Beside:
    """A label map beside probabilities. Its voxels are read once, when they are needed."""

    def __init__(self, path: Path):
        self.file = open_array(path)

    @functools.cached_property
    def ids(self) -> np.ndarray:
        """The whole numbers of the map, see `read_ids`."""
        return read_ids(self.file)


class _Last:
    """Keeps the last value that was read, for the next call with the same key."""

    def __init__(self) -> None:
        self.kept: tuple[Any, Any] = (None, None)

    def __call__(self, key: Any, read: Callable[[], Value]) -> Value:
        kept_key, value = self.kept  # in one step: another thread may replace both
        if kept_key != key:
            value = read()
            self.kept = key, value
        return value


def _on_grid(file: ArrayFile, values: np.ndarray, reference: Reference) -> np.ndarray:
    """Values of a file `[*spatial]`, turned to the grid of the reference."""
    if file.volume is not None and values.ndim == 3:
        layout = Layout(values.shape, None, False, values.shape)
        layout, _ = turn_to(layout, Grid.of(file.volume), reference, str(file.path))
        values = layout.from_stored(values)[..., 0]
    if values.shape != reference.shape:
        raise PredictionError(
            f"{file.path} has shape {values.shape}, but {reference.name} has {reference.shape}."
        )
    return values


def _channels_of(entry: CaseFiles, *, regions: bool) -> Any:
    if regions:
        return "regions"
    return "foreground" if entry.classes and entry.classes[0] > 0 else "classes"


def _spacing(reference: Reference) -> tuple[float, ...]:
    if reference.grid is None:
        return (1.0,) * len(reference.shape)
    return tuple(voxel_sizes(affine_of(reference.grid.header)).tolist()[: len(reference.shape)])
