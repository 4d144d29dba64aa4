"""Opens folders of predictions and labels, matches their files by name, and reads one case at a time."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes

from calib_jax.predictions import names
from calib_jax.predictions.arrays import NNUNET_KEYS, ArrayFile, open_array
from calib_jax.predictions.case import Case, PredictionError
from calib_jax.predictions.dataset_json import DatasetJson, find_dataset_json, read_dataset_json
from calib_jax.predictions.grids import Grid, affine_of
from calib_jax.predictions.labels import agreement, predicted_ids, read_ids, to_labels
from calib_jax.predictions.layout import Layout, Reference, find_layouts, turn_to
from calib_jax.predictions.names import CaseFiles, Folder, some
from calib_jax.predictions.values import decode, sample
from calib_jax.predictions.writing import PredictionFile

AnyPath = str | os.PathLike[str]

_COUNTED = 9  # cases whose headers tell the number of classes
_LEAST_AGREEMENT = 0.5  # of probabilities with the label map beside them, among voxels of the foreground
_LEAST_VOXELS = 20  # sampled voxels of the foreground that such a verdict needs


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
        self._last_label: tuple[str, Any] = ("", None)
        self._channels, self.regions = self._find_channels(class_names)
        self.class_names = self._find_names(class_names)

    @property
    def notices(self) -> tuple[str, ...]:
        """Sentences about what has no partner, what was ignored, and what was taken for something else.

        Reading a case may add some.
        """
        return tuple(self._notices)

    def read(self, case_name: str, model: str | None = None) -> Case:
        """Reads and checks one case.

        Args:
            case_name: one of `case_names`.
            model: one of `models`; None is the first.

        Raises:
            PredictionError: a file of the case is broken, does not fit the others, or holds no probabilities.
            KeyError: there is no such case or model.
        """
        return self._load(case_name, self.models[0] if model is None else model)[0]

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
            self._load(case_name, model)
        return self._layouts[case_name, model]

    def files(self, case_name: str, model: str | None = None) -> tuple[Path, ...]:
        """Every file that `read` opens for a case."""
        entry = self._folders[self.models[0] if model is None else model][1].cases[case_name]
        label = self._labels.cases[case_name].files if self._labels is not None else ()
        others = (
            entry.segmentation,
            self._images.get(case_name),
            self.dataset.file if self.dataset else None,
        )
        return (*entry.files, *label, *(path for path in others if path is not None))

    # Reading.

    def _load(self, name: str, model: str) -> tuple[Case, PredictionFile]:
        folder, found = self._folders[model]
        try:
            return self._load_files(name, model, folder, found.cases[name])
        except MemoryError as error:
            raise PredictionError(
                f"{found.cases[name].files[0]} needs more memory than there is: use a larger machine."
            ) from error

    def _load_files(
        self, name: str, model: str, folder: Path, entry: CaseFiles
    ) -> tuple[Case, PredictionFile]:
        if entry.fault:
            raise PredictionError(entry.fault)
        files = [open_array(path) for path in entry.files]
        file, label = files[0], self._open_label(name)
        beside = open_array(entry.segmentation) if entry.segmentation is not None else None
        inner = self._inner_reference(name, file, beside, label)
        layouts, notice = find_layouts(
            file, inner, 1 if entry.classes else self._channels, reorients=self._reorients
        )
        self._note(model, "affine", notice)
        values, layouts = _read_values(files, layouts)
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
        in_order = beside is not None and (beside.volume is not None or inner is None or inner.grid is None)
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
        labels, where = self._read_label(name, label)
        case = Case(
            name,
            model,
            probs,
            labels,
            where,
            self._read_image(name, reference),
            _spacing(reference),
            self._read_predicted(model, entry.segmentation, reference),
        )
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
        self, layouts: Sequence[Layout], probs: np.ndarray, file: ArrayFile, beside: ArrayFile
    ) -> Layout:
        """The layout in which probabilities agree best with the label map beside them; the first one of a tie."""
        some_ids = read_ids(beside, sampled=True)
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
                f"{file.path} agrees with {beside.path} on {share:.0%} of the foreground: its axes are in another "
                "order, or the two are of different cases; export both again, or remove the label map if it was "
                "changed afterwards."
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
        kept_name, kept = self._last_label  # read once: another thread may replace it
        if kept_name != name:
            declared = self.dataset.labels if self.dataset is not None else None
            labels, where, notice = to_labels(
                read_ids(label[0]),
                path=label[0].path,
                num_classes=len(declared.class_names) if declared is not None else self._channels,
                regions=tuple(declared.regions.values()) if declared is not None and self.regions else (),
                ignore_values=declared.ignore_values if declared is not None else (),
            )
            self._note("", "label", notice)
            kept = labels, where
            self._last_label = name, kept
        return kept

    def _read_predicted(self, model: str, path: Path | None, reference: Reference) -> np.ndarray | None:
        """The label map beside probabilities; None, with a notice, if it cannot be used."""
        if path is None:
            return None
        declared = self.dataset.labels if self.dataset is not None else None
        try:
            beside = open_array(path)
            if beside.volume is None and reference.grid is not None:
                raise PredictionError(
                    f"{path} has no affine, but {reference.name} has one: save it as .nii.gz."
                )
            ids = self._on_grid(path, read_ids(beside), reference)
            labels, _, _ = to_labels(
                ids,
                path=path,
                num_classes=len(declared.class_names) if declared is not None else self._channels,
                regions=tuple(declared.regions.values()) if declared is not None and self.regions else (),
                ignore_values=(),
            )
            return labels if self.regions else labels.astype(np.min_scalar_type(self._channels))
        except PredictionError as error:
            self._note(model, "predicted", f"The predicted label map is left out: {error}")
            return None

    def _on_grid(self, path: Path, values: np.ndarray, reference: Reference) -> np.ndarray:
        """Values of a file `[*spatial]`, turned to the grid of the reference."""
        volume = open_array(path).volume
        if volume is not None and values.ndim == 3:
            layout = Layout(values.shape, None, False, values.shape)
            layout, _ = turn_to(layout, Grid.of(volume), reference, str(path))
            values = layout.from_stored(values)[..., 0]
        if values.shape != reference.shape:
            raise PredictionError(
                f"{path} has shape {values.shape}, but {reference.name} has {reference.shape}."
            )
        return values

    def _read_image(self, name: str, reference: Reference) -> np.ndarray | None:
        path = self._images.get(name)
        if path is None:
            return None
        try:
            file = open_array(path)
            if file.volume is not None:
                return self._on_grid(path, file.volume.read()[..., 0], reference)
            values = file.read().astype(np.float32)
            if file.kind == "image" and values.ndim == 3:
                values = values[..., :3].mean(-1)
            return self._on_grid(path, values, reference)
        except PredictionError as error:
            self._note("", "image", f"An image is left out: {error}")
            return None

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


def _channels_of(entry: CaseFiles, *, regions: bool) -> Any:
    if regions:
        return "regions"
    return "foreground" if entry.classes and entry.classes[0] > 0 else "classes"


def _read_values(files: Sequence[ArrayFile], layouts: Sequence[Layout]) -> tuple[np.ndarray, list[Layout]]:
    """Stored numbers with the classes last, and the layouts with this class axis."""
    first, *others = files
    array = first.read()
    layouts = _with_constant_sums(layouts, array)
    axis = layouts[0].class_axis
    for file in others:
        if file.shape != first.shape or file.dtype != first.dtype:
            raise PredictionError(
                f"{file.path} holds {file.dtype} of shape {file.shape}, but {first.path} {first.dtype} of shape "
                f"{first.shape}: export the classes of a case alike."
            )
        if file.volume is not None and first.volume is not None:
            own, one = affine_of(file.volume.header), affine_of(first.volume.header)
            if not np.allclose(own, one, atol=1e-3):
                raise PredictionError(
                    f"{file.path} has another affine than {first.path}: export both on one grid."
                )
    last = [array[..., None] if axis is None else np.moveaxis(array, axis, -1)]
    for file in others:
        array = file.read()
        last.append(array[..., None] if axis is None else np.moveaxis(array, axis, -1))
    values = last[0] if len(last) == 1 else np.concatenate(last, axis=-1)
    return values, [layout for layout in layouts if layout.class_axis == axis]


def _with_constant_sums(layouts: Sequence[Layout], array: np.ndarray) -> list[Layout]:
    """Of several possible class axes those along which numbers have one sum, as probabilities have; or all."""
    axes = {layout.class_axis for layout in layouts} - {None}
    if len(axes) < 2:
        return list(layouts)

    def is_constant(axis: int | None) -> bool:
        sums = (
            sample(np.moveaxis(array, axis, -1)).astype(np.float64).sum(-1)
            if axis is not None
            else np.zeros(1)
        )
        return bool(np.ptp(sums) <= 0.02 * abs(sums.max()))

    kept = [layout for layout in layouts if is_constant(layout.class_axis)]
    return kept or list(layouts)


def _spacing(reference: Reference) -> tuple[float, ...]:
    if reference.grid is None:
        return (1.0,) * len(reference.shape)
    return tuple(voxel_sizes(affine_of(reference.grid.header)).tolist()[: len(reference.shape)])
