"""A trained network on images without labels: label maps and class probabilities as NIfTI."""

import re
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from train.checkpoint import Which
from train.config import DataInfo
from train.data.nifti import Grid, open_nifti, read_channels, spatial_and_channels
from train.errors import InputError
from train.fit import load_run

_CHANNEL = re.compile(r"_\d{4}$")  # how nnU-Net ends the names of a case's files


def predict_folder(run: Path, images: Path, out: Path, which: Which = "last") -> list[Path]:
    """Predicts every case in `images` and writes two files for each into `out`.

    A case is a NIfTI volume, with its channels along the fourth axis if there are several, or as nnU-Net has it
    one volume for each channel, `NAME_0000.nii.gz` and on.

    `NAME_label.nii.gz` holds the most probable class ids (uint8), `NAME_probs.nii.gz` the class probabilities
    (float32, classes along the fourth axis, background first), both on the grid and with the affine of
    the image. Under sigmoids the probabilities are those of the regions, without a background, and the label is 1
    where a region is more probable than not, else 0: one map, or along the fourth axis one for each of several
    regions, which may overlap.

    Returns:
        The files written.

    Raises:
        InputError: if there is no image, or one does not fit the network; all are checked before the first
            is predicted.
    """
    _, info, predict = load_run(run, which)
    if info.spatial_dims != 3:
        raise InputError(f"{run} was trained on {info.spatial_dims}-D images: NIfTI volumes need a 3-D run.")
    cases = list_cases(images, info)
    _check_out(out)
    written = []
    for name, files in tqdm(cases.items(), "predicting", unit="case"):
        image, grid = read_channels(files, info.window)
        placement = info.geometry.place(image, grid.affine, windowed=info.window is not None)
        probs = predict(placement.image(image, info.geometry.interpolation))
        probs = placement.back(probs, background=not predict.regions)
        written += [
            _write(out / f"{name}_label.nii.gz", _labels(probs, predict.regions), grid),
            _write(out / f"{name}_probs.nii.gz", probs.astype(np.float32), grid),
        ]
    return written


def _labels(probs: np.ndarray, regions: Sequence[str]) -> np.ndarray:
    """Class ids, or which voxels are of each region; the last axis goes unless there are several regions."""
    if not regions:
        return probs.argmax(-1).astype(np.uint8)
    members = (probs > 0.5).astype(np.uint8)
    return members[..., 0] if len(regions) == 1 else members


def list_cases(folder: Path, info: DataInfo) -> dict[str, list[Path]]:
    """The files of each case in a folder, by its name, checked against the network.

    Raises:
        InputError: if there is none, or one does not fit the network.
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
    for parts in cases.values():
        _check_fits(parts, info)
    return cases


def _check_fits(files: list[Path], info: DataInfo) -> None:
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


def _check_out(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"Output folder {folder} is not empty: choose another --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"Output folder {folder} cannot be made ({error.strerror}): choose another."
        ) from error


def _stem(file: Path) -> str:
    return file.name.removesuffix(".gz").removesuffix(".nii")


def _write(file: Path, voxels: np.ndarray, grid: Grid) -> Path:
    header = grid.header.copy()
    header.set_data_dtype(voxels.dtype)
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["cal_max"], header["cal_min"] = 0, 0
    nib.save(nib.Nifti1Image(grid.to_file(voxels), header.get_best_affine(), header), file)
    return file
