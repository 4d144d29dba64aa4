"""Predicts images without labels: writes label maps and class probabilities as NIfTI."""

import contextlib
import gzip
import hashlib
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np

from calib_jax import LocalCalibration
from calib_jax._probabilities import entropy
from train.config import DataInfo, RunConfig, check_same_data
from train.data.faults import Fault, collected, refuse
from train.data.io import Grid, check_same_grid, read_scan
from train.data.names import CHANNEL
from train.data.preprocess import preprocess
from train.data.shapes import Shares
from train.data.splits import read_splits
from train.data.volume_files import ENDINGS, open_volume, parts_of, stem, volumes_in
from train.data.volumes import VolumeDataset
from train.errors import CasesFailed, InputError, describe
from train.files import make_folder, visible
from train.inference import VolumePredictor, ensemble
from train.local_calibration import calibrate, fit_local_calibration
from train.progress import progress
from train.run.checkpoint import Which
from train.run.folder import PARTIAL, locked, written_whole
from train.run.load import load_run
from train.task import open_cases_of

_KINDS = ("label", "probs", "entropy", "mutual_information")  # end the names of output files
_WRITER = "calib_jax predict"  # starts the description of every output file


def predict_folder(
    runs: Path | Sequence[Path],
    images: Path | None,
    out: Path,
    which: Which = "last",
    *,
    split: str | None = None,
    uncertainty: bool = False,
    labels_of: Path | None = None,
    local: bool = False,
) -> list[Path]:
    """Predicts every case in `images`, or of a split of the runs' own data.

    It writes two files per case into `out`, or more with `uncertainty`.

    A case is one volume (several channels lie along the fourth axis), or as in nnU-Net one volume per channel,
    `NAME_0000.nii.gz` and on, see `find_cases`.

    `NAME_label.nii.gz` holds the most probable class ids: uint8, or uint16 for more than 256 classes.
    `NAME_probs.nii.gz` holds the class probabilities: float32, classes along the fourth axis, background first.
    Both have the grid and affine of the image. Their header field `descrip` holds digests of the network and the
    image.

    A network with sigmoids gives the probabilities of its regions, without a background. The label is then 1 where
    a region is more probable than not, else 0. Several regions, which may overlap, lie along the fourth axis.

    Of several runs the probabilities are averaged. With `uncertainty`, `NAME_entropy.nii.gz` holds the entropy of
    each voxel in nats: of its classes, or the sum over its regions. Of several runs the part of it that is
    disagreement between the networks is in `NAME_mutual_information.nii.gz`.

    With `labels_of`, the folder of another run, the label map is that of its network.

    With `local`, the probabilities are locally calibrated, fitted to the validation cases of the first run. The
    label map stays.

    A case that cannot be predicted does not stop the others. The same call with the same `out` skips the cases that
    `out` holds already.

    Returns:
        The files of all cases, one case after the other.

    Raises:
        InputError: no image is there, no image fits the network, two images have one name, the runs were trained
            on different data or splits, or `out` holds anything but predictions of these networks and images.
            Nothing is written.
        CasesFailed: some cases could not be predicted. All others are written.
    """
    runs = [runs] if isinstance(runs, Path) else list(runs)
    if not runs:
        raise InputError("There is no run to predict with: give the folder of one.")
    if (images is None) == (split is None):
        raise InputError("What to predict: give either --images or --split.")
    all_runs = [*runs, *([labels_of] if labels_of else [])]
    config, info, networks, network = _load(all_runs, which)
    labels = networks.pop() if labels_of else None
    if labels:
        network = _digest([b"labels", network.encode()])
    if local:
        network = _digest([b"local", network.encode()])
    kinds = ("label", "probs", *(("entropy",) if uncertainty else ()))
    kinds += ("mutual_information",) if uncertainty and len(runs) > 1 else ()
    if split is not None:
        cases, faults = _cases_of_split(all_runs, config, info, split), []
    else:
        assert images is not None
        cases, faults = find_cases(images, info)
    names = [*cases, *(fault.case for fault in faults)]
    refuse([fault for fault in faults if names.count(fault.case) > 1 or not cases])
    failed = {fault.case: f"{fault.file} {fault.problem}" for fault in faults}
    with _opened(out):
        left = _not_written(out, cases, network, kinds)
        calibration = _calibration(runs[0], config, info, networks) if local and left else None
        for done, name in enumerate(progress(left, desc="predicting")):
            try:
                volumes = _predict(networks, labels, calibration, info, cases[name], network, kinds)
            except Exception as error:  # a fault of this case only
                failed[name] = describe(error)
                continue
            try:
                for file, volume in zip(_outputs(out, name, kinds), volumes, strict=True):
                    with written_whole(file) as partial, gzip.open(partial, "wb", compresslevel=1) as stream:
                        volume.to_stream(stream)
            except OSError as error:
                reason = f"{out} could not be written ({error.strerror or error})"
                failed |= dict.fromkeys(left[done:], f"{reason}: make room, or make the folder writable.")
                break
    if failed:
        raise CasesFailed(
            f"{len(failed)} of {len(names)} cases could not be predicted, any others are in {out}. Mend or remove "
            "these and start the same command again:",
            failed,
        )
    return [file for name in cases for file in _outputs(out, name, kinds)]


def _load(runs: Sequence[Path], which: Which) -> tuple[RunConfig, DataInfo, list[VolumePredictor], str]:
    """Configuration and data of the first run, the network of each, and a digest of all.

    Raises:
        InputError: the runs were trained on different data or regions, or on 2-D images.
    """
    loaded = [load_run(run, which) for run in runs]
    first, info, network = loaded[0]
    for run, (_, other, predict) in zip(runs, loaded, strict=True):
        check_same_data(str(runs[0]), info, run, other)
        if predict.regions != network.regions:
            raise InputError(f"{run} predicts other regions than {runs[0]}: give runs with the same ones.")
    if info.spatial_dims != 3:
        raise InputError(
            f"{runs[0]} was trained on {info.spatial_dims}-D images: NIfTI volumes need a 3-D run."
        )
    digest = _digest(
        part
        for config, data, predict in loaded
        for part in (repr((config, data)).encode(), *map(_as_bytes, jax.tree.leaves(predict.weights)))
    )
    return first, info, [predict for *_, predict in loaded], digest


def _calibration(
    run: Path, config: RunConfig, info: DataInfo, networks: Sequence[VolumePredictor]
) -> LocalCalibration:
    """The local calibration of the networks' mean probabilities, fitted to the validation cases of a run.

    Raises:
        InputError: there are no such cases, or the networks are of different kinds.
    """
    dataset, chosen = open_cases_of(run, config, info, "val")
    if not chosen.names:
        raise InputError(f"{run} has no validation cases to fit to: leave out --local-calibration.")
    predict = ensemble(networks) if len(networks) > 1 else networks[0]
    return fit_local_calibration(predict, dataset, chosen.names)


def find_cases(folder: Path, info: DataInfo) -> tuple[dict[str, list[Path]], list[Fault]]:
    """Finds the files of each case that fits the network, and the faults of the other volumes.

    Files are the channels of one case if nnU-Net's names say so: `NAME_0000` and on without a gap, one for each
    channel of the network. For a network with one channel all files of the folder must be called `NAME_0000`; else
    `NAME_0008` is the name of a case.

    Raises:
        InputError: the folder holds no volume.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give one with .nii or .nii.gz volumes.")
    files = volumes_in(folder)
    if not files:
        raise InputError(f"{folder} holds no {', '.join(ENDINGS)} volume.")
    used = {part for file in files for part in parts_of(file)}
    if ignored := [path.name for path in visible(folder) if path not in used]:
        more = f" and {len(ignored) - 5} others" if len(ignored) > 5 else ""
        print(
            f"{folder} holds what is no volume and is ignored: {', '.join(ignored[:5])}{more}",
            file=sys.stderr,
        )
    cases: dict[str, list[Path]] = {}
    faults: list[Fault] = []
    for name, parts in group_channels(files, info.num_channels):
        with collected(faults, name, parts[0]):
            if name in cases:
                raise InputError(
                    f"{parts[0]} has the same name as {cases[name][0].name}: rename one of them."
                )
            check_fits(parts, info)
            cases[name] = parts
    return cases, faults


def _cases_of_split(
    runs: Sequence[Path], config: RunConfig, info: DataInfo, split: str
) -> dict[str, list[Path]]:
    """The image files of each case in a split that all runs have.

    Args:
        runs: their folders.
        config: of the first run.
        info: of its data set.
        split: `train`, `val` or `test`.

    Raises:
        InputError: the runs have different splits, or the split has no case or no files.
    """
    first, *others = runs
    dataset, chosen = open_cases_of(first, config, info, split)
    if not isinstance(dataset, VolumeDataset):
        raise InputError(f"{first} was trained on {info.name}, which has no image files: give --images.")
    for note in chosen.notes:
        print(f"note: {note}", file=sys.stderr)
    for other in others:
        if set(getattr(read_splits(other / "splits.json"), split)) != set(chosen.names):
            raise InputError(f"{other} has another {split} split than {first}: give --images.")
    images = {entry.name: list(entry.images) for entry in dataset.layout.entries}
    return {name: images[name] for name in chosen.names}


def group_channels(files: Sequence[Path], channels: int) -> list[tuple[str, list[Path]]]:
    """Groups files into cases by their names alone, see `find_cases`.

    >>> files = [Path("a_0000.nii"), Path("a_0001.nii"), Path("b_0007.nii")]
    >>> [(name, len(parts)) for name, parts in group_channels(files, 2)]
    [('a', 2), ('b_0007', 1)]
    """
    groups: dict[str, list[Path]] = {}
    for file in sorted(files, key=stem):
        groups.setdefault(CHANNEL.sub("", stem(file)), []).append(file)
    wanted = [f"_{channel:04d}" for channel in range(channels)]
    whole = {name for name, parts in groups.items() if [stem(f)[len(name) :] for f in parts] == wanted}
    if channels == 1 and len(whole) < len(groups):
        whole = set()
    cases: list[tuple[str, list[Path]]] = []
    for name, parts in groups.items():
        cases += [(name, parts)] if name in whole else [(stem(file), [file]) for file in parts]
    return cases


def check_fits(files: Sequence[Path], info: DataInfo) -> None:
    """Checks the headers of one case's files.

    Raises:
        InputError: the files do not share a grid, or the network was trained on another number of channels.
    """
    image, *others = volumes = [open_volume(file) for file in files]
    if (channels := sum(volume.channels for volume in volumes)) != info.num_channels:
        raise InputError(
            f"{files[0]} has {channels} channels{' with its files' if others else ''}, the network was trained on "
            f"{info.num_channels} ({info.name}): give them as one file, or as {stem(files[0])}_0000 to "
            f"_{info.num_channels - 1:04d}."
        )
    for other in others:
        check_same_grid(image, other)


def _predict(
    networks: Sequence[VolumePredictor],
    labels: VolumePredictor | None,
    calibration: LocalCalibration | None,
    info: DataInfo,
    files: Sequence[Path],
    network: str,
    kinds: Sequence[str],
) -> list[nib.Nifti1Image]:
    """Label map, class probabilities and maps of uncertainty of one case as volumes."""
    description = _description(files, network)
    voxels, grid = read_scan(files)
    image, placement = preprocess(
        voxels, grid.affine, intensity_range=info.intensity_range, geometry=info.geometry
    )
    regions = networks[0].regions

    def predicted(predict: VolumePredictor) -> Shares:
        found = predict(image)
        if not np.isfinite(found).all():
            raise InputError(f"the network's probabilities of {files[0]} are not finite: check its weights.")
        return found

    def placed(found: Shares) -> Shares:
        return placement.back(found, background=not regions).astype(np.float32)

    mean: Any = np.float32(0)
    within: Any = np.float32(0)
    for predict in networks:
        found = predicted(predict)
        mean = mean + found / len(networks)
        if "mutual_information" in kinds:
            within = within + entropy(placed(found), regions=bool(regions)) / len(networks)
    own = placed(mean)
    decisive = own if labels is None else placed(predicted(labels))
    if regions:
        label = (decisive > 0.5).astype(np.uint8)
        label = label[..., 0] if len(regions) == 1 else label
    else:
        label = decisive.argmax(-1).astype(np.min_scalar_type(own.shape[-1] - 1))
    probs = own if calibration is None else placed(calibrate(mean, image, calibration))
    maps = [label, probs]
    if "entropy" in kinds:
        maps.append(entropy(probs, regions=bool(regions)))
    if "mutual_information" in kinds:
        maps.append(np.maximum(entropy(own, regions=bool(regions)) - within, 0))
    return [_volume(each, grid, description) for each in maps]


def _volume(voxels: np.ndarray, grid: Grid, description: str) -> nib.Nifti1Image:
    header = grid.header.copy()
    header.set_data_dtype(voxels.dtype)
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["cal_max"], header["cal_min"] = 0, 0
    header.set_intent("none")
    volume = nib.Nifti1Image(grid.to_file(voxels), header.get_best_affine(), header)
    volume.header["descrip"] = description
    return volume


# The output folder.


@contextlib.contextmanager
def _opened(out: Path) -> Iterator[None]:
    """Makes and locks the output folder, so that no other prediction writes to it.

    Raises:
        InputError: the folder cannot be made, or another process has locked it.
    """
    make_folder(out, "Output folder")
    with locked(out):
        for partial in out.glob(f"*{PARTIAL}"):
            partial.unlink(missing_ok=True)
        yield


def _not_written(
    out: Path, cases: Mapping[str, Sequence[Path]], network: str, kinds: Sequence[str]
) -> list[str]:
    """Names of the cases without complete predictions in `out`.

    Raises:
        InputError: `out` holds anything but predictions of this network and these images.
    """
    case_of = {file: name for name in cases for file in _outputs(out, name, _KINDS)}
    whole: set[Path] = set()
    for file in sorted(file for file in out.iterdir() if not file.name.startswith(".")):
        found = _read_description(file)
        if found is None and file in case_of:  # truncated or corrupt
            continue
        if found is None or not found.startswith(_WRITER):
            raise InputError(f"Output folder {out} is not empty, it holds {file.name}: choose another --out.")
        if not found.startswith(f"{_WRITER} {network}"):
            raise InputError(
                f"Output folder {out} holds predictions of other weights or settings ({file.name}): choose "
                "another --out."
            )
        if file in case_of and found != _description(images := cases[case_of[file]], network):
            raise InputError(
                f"{file} was predicted from another image than {images[0]}: remove it, or choose another --out."
            )
        whole.add(file)
    return [name for name in cases if not whole.issuperset(_outputs(out, name, kinds))]


def _description(files: Sequence[Path], network: str) -> str:
    """The header field `descrip` of the predictions of these images, at most 80 bytes."""
    try:
        image = _digest(part.read_bytes() for file in files for part in parts_of(file))
    except OSError as error:
        raise InputError(f"{files[0]} cannot be read ({error.strerror}): check the file.") from error
    return f"{_WRITER} {network} {image}"


def _read_description(file: Path) -> str | None:
    """The header field `descrip` of a NIfTI file; None if the file is none, or truncated."""
    try:
        volume: Any = nib.load(file)
        length = volume.dataobj.offset + math.prod(volume.shape) * volume.get_data_dtype().itemsize
        with file.open("rb") as stream:
            stream.seek(-4, 2)  # gzip ends with the length of its content
            whole = int.from_bytes(stream.read(), "little") == length % 2**32
        return volume.header["descrip"].item().decode("latin1") if whole else None
    except Exception:
        return None


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def _as_bytes(leaf: jax.Array) -> bytes:
    """The content of an array, or of a random key."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()


def _outputs(out: Path, name: str, kinds: Sequence[str]) -> list[Path]:
    return [out / f"{name}_{kind}.nii.gz" for kind in kinds]
