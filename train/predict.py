"""A trained network on images without labels: label maps and class probabilities as NIfTI."""

import contextlib
import gzip
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np

from train.checkpoint import Which
from train.config import DataInfo
from train.data.nifti import Grid, open_nifti, read_channels, spatial_and_channels
from train.errors import CasesFailed, InputError, describe
from train.fit import load_run
from train.inference import VolumePredictor
from train.progress import progress
from train.runs import PARTIAL, locked, written_whole

_CHANNEL = re.compile(r"_\d{4}$")  # how nnU-Net ends the names of a case's files
_WRITER = "calib_jax predict"  # starts the description of every output file


def predict_folder(run: Path, images: Path, out: Path, which: Which = "last") -> list[Path]:
    """Predicts every case in `images` and writes two files for each into `out`.

    A case is a NIfTI volume, with its channels along the fourth axis if there are several, or as nnU-Net has it
    one volume for each channel, `NAME_0000.nii.gz` and on.

    `NAME_label.nii.gz` holds the most probable class ids (uint8, or uint16 of more than 256 classes),
    `NAME_probs.nii.gz` the class probabilities (float32, classes along the fourth axis, background first), both on
    the grid and with the affine of the image. Their header field `descrip` holds digests of the network and of the
    image.

    A case that cannot be predicted does not stop the others. The same call goes on in the same `out`: it skips the
    cases that are there already.

    Returns:
        The files of all cases, `[label, probs, label, probs, ...]`.

    Raises:
        InputError: if there is no image or none fits the network, or if `out` holds anything but predictions of
            this network and these images. Nothing is written then.
        CasesFailed: if some cases could not be predicted. All others are written.
    """
    config, info, predict = load_run(run, which)
    if info.spatial_dims != 3:
        raise InputError(f"{run} was trained on {info.spatial_dims}-D images: NIfTI volumes need a 3-D run.")
    cases = list_cases(images, info)
    _check_names(cases)
    failed = _misfits(cases, info)
    if len(failed) == len(cases):
        first, *others = failed.values()
        raise InputError(f"{first} None of the {len(others)} other cases fits either." if others else first)
    network = _digest([repr((config, info)).encode(), *map(_as_bytes, jax.tree.leaves(predict.weights))])
    with _opened(out):
        fitting = {name: files for name, files in cases.items() if name not in failed}
        left = _not_written(out, fitting, network)
        for done, name in enumerate(progress(left, desc="predicting")):
            try:
                volumes = _predict(predict, info, fitting[name], network)
            except Exception as error:  # whatever is wrong with this case, the others can go on
                failed[name] = describe(error)
                continue
            try:
                for file, volume in zip(_outputs(out, name), volumes, strict=True):
                    _save(file, volume)
            except OSError as error:
                reason = f"{out} could not be written ({error.strerror or error})"
                failed |= dict.fromkeys(left[done:], f"{reason}: make room, or make the folder writable.")
                break
    if failed:
        raise CasesFailed(
            f"{len(failed)} of {len(cases)} cases could not be predicted, any others are in {out}. Mend or remove "
            "these and start the same command again:",
            failed,
        )
    return [file for name in cases for file in _outputs(out, name)]


def list_cases(folder: Path, info: DataInfo) -> dict[str, list[Path]]:
    """The files of each case in a folder, by its name; `check_fits` looks into them.

    Raises:
        InputError: if there is none.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give one with .nii or .nii.gz volumes.")
    files = sorted(
        file
        for file in folder.iterdir()
        if file.name.endswith((".nii", ".nii.gz")) and not file.name.startswith(".")
    )
    if not files:
        raise InputError(f"{folder} holds no .nii or .nii.gz volume.")
    by_channel = all(_CHANNEL.search(_stem(file)) for file in files)
    cases: dict[str, list[Path]] = {}
    for file in files:
        cases.setdefault(_CHANNEL.sub("", _stem(file)) if by_channel else _stem(file), []).append(file)
    return cases


def check_fits(files: Sequence[Path], info: DataInfo) -> None:
    """Reads the headers of one case's files.

    Raises:
        InputError: if they do not share a grid, or have other channels than the network was trained on.
    """
    grids = [spatial_and_channels(file, open_nifti(file)) for file in files]
    if (channels := sum(count for _, count in grids)) != info.num_channels:
        raise InputError(
            f"{files[0]} has {channels} channels{' with its files' if len(files) > 1 else ''}, the network was "
            f"trained on {info.num_channels} ({info.name})."
        )
    for file, (shape, _) in zip(files, grids, strict=True):
        if shape != grids[0][0]:
            raise InputError(
                f"{file} has shape {shape}, {files[0].name} {grids[0][0]}: channels must share a grid."
            )


def _check_names(cases: Mapping[str, Sequence[Path]]) -> None:
    """Raises `InputError` if two scans, such as `a.nii` and `a.nii.gz`, would be written to the same files."""
    for files in cases.values():
        first_of = {_stem(file): file for file in reversed(files)}
        for file in files:
            if (first := first_of[_stem(file)]) != file:
                raise InputError(
                    f"{first} and {file.name} would be predicted into the same files: rename or remove one."
                )


def _misfits(cases: Mapping[str, Sequence[Path]], info: DataInfo) -> dict[str, str]:
    """What is wrong with each case whose headers do not fit the network."""
    found: dict[str, str] = {}
    for name, files in cases.items():
        try:
            check_fits(files, info)
        except Exception as error:  # a header may be broken in any way
            found[name] = describe(error)
    return found


def _predict(
    predict: VolumePredictor, info: DataInfo, files: Sequence[Path], network: str
) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """Label map and class probabilities of one case, ready to be written."""
    description = _description(files, network)
    image, grid = read_channels(files, info.window)
    placement = info.geometry.place(image, grid.affine, windowed=info.window is not None)
    probs = placement.back(predict(placement.image(image, info.geometry.interpolation)))
    if not np.isfinite(probs).all():
        raise InputError(f"the network's probabilities of {files[0]} are not finite: check its weights.")
    label = probs.argmax(-1).astype(np.min_scalar_type(len(info.class_names) - 1))
    return _volume(label, grid, description), _volume(probs.astype(np.float32), grid, description)


def _volume(voxels: np.ndarray, grid: Grid, description: str) -> nib.Nifti1Image:
    header = grid.header.copy()
    header.set_data_dtype(voxels.dtype)
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["cal_max"], header["cal_min"] = 0, 0
    volume = nib.Nifti1Image(grid.to_file(voxels), header.get_best_affine(), header)
    volume.header["descrip"] = description
    return volume


# The output folder.


@contextlib.contextmanager
def _opened(out: Path) -> Iterator[None]:
    """While in this context no other prediction writes to `out`, which is made if it is not there.

    Raises:
        InputError: if it cannot be made, or another process has it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Output folder {out} cannot be made ({error.strerror}): choose another.") from error
    with locked(out):
        for partial in out.glob(f"*{PARTIAL}"):
            partial.unlink(missing_ok=True)
        yield


def _not_written(out: Path, cases: Mapping[str, Sequence[Path]], network: str) -> list[str]:
    """The cases without whole predictions in `out`.

    Raises:
        InputError: if `out` holds anything else than predictions of this network and these images.
    """
    case_of = {file: name for name in cases for file in _outputs(out, name)}
    whole: set[Path] = set()
    for file in sorted(file for file in out.iterdir() if not file.name.startswith(".")):
        found = _read_description(file)
        if found is None and file in case_of:  # cut off, or corrupt
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
    return [name for name in cases if not whole.issuperset(_outputs(out, name))]


def _description(files: Sequence[Path], network: str) -> str:
    """What the outputs of these images say in their `descrip`, of 80 bytes."""
    try:
        return f"{_WRITER} {network} {_digest(file.read_bytes() for file in files)}"
    except OSError as error:
        raise InputError(f"{files[0]} cannot be read ({error.strerror}): check the file.") from error


def _read_description(file: Path) -> str | None:
    """The `descrip` of a NIfTI file; None if it is none, or cut off."""
    try:
        volume: Any = nib.load(file)
        length = volume.dataobj.offset + math.prod(volume.shape) * volume.get_data_dtype().itemsize
        with file.open("rb") as stream:
            stream.seek(-4, 2)  # gzip ends with the length of what it holds
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


def _outputs(out: Path, name: str) -> tuple[Path, Path]:
    return out / f"{name}_label.nii.gz", out / f"{name}_probs.nii.gz"


def _save(file: Path, volume: nib.Nifti1Image) -> None:
    with written_whole(file) as partial, gzip.open(partial, "wb", compresslevel=1) as stream:
        volume.to_stream(stream)


def _stem(file: Path) -> str:
    return file.name.removesuffix(".gz").removesuffix(".nii")
