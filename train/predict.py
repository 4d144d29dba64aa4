"""A trained network on images without labels: label maps and class probabilities as NIfTI."""

from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from train.config import DataInfo
from train.data import read_image
from train.data.nifti import Grid, open_nifti, spatial_and_channels
from train.errors import InputError
from train.fit import load_run


def predict_folder(run: Path, images: Path, out: Path) -> list[Path]:
    """Predicts every NIfTI volume in `images` and writes two files for each into `out`.

    `NAME_label.nii.gz` holds the most probable class ids (uint8), `NAME_probs.nii.gz` the class probabilities
    (float32, classes along the fourth axis, background first), both on the grid and with the affine of
    the image.

    Returns:
        The files written.

    Raises:
        InputError: if there is no image, or one does not fit the network; all are checked before the first
            is predicted.
    """
    _, info, predict = load_run(run)
    if info.spatial_dims != 3:
        raise InputError(f"{run} was trained on {info.spatial_dims}-D images: NIfTI volumes need a 3-D run.")
    files = _list_images(images, info)
    _check_out(out)
    written = []
    for file in tqdm(files, "predicting", unit="volume"):
        image, grid = read_image(file, info.window)
        probs = predict(image)
        name = _stem(file)
        written += [
            _write(out / f"{name}_label.nii.gz", probs.argmax(-1).astype(np.uint8), grid),
            _write(out / f"{name}_probs.nii.gz", probs.astype(np.float32), grid),
        ]
    return written


def _list_images(folder: Path, info: DataInfo) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give one with .nii or .nii.gz volumes.")
    files = sorted(
        file
        for file in folder.iterdir()
        if file.name.endswith((".nii", ".nii.gz")) and not file.name.startswith(".")
    )
    if not files:
        raise InputError(f"{folder} holds no .nii or .nii.gz volume.")
    for file in files:
        _, channels = spatial_and_channels(file, open_nifti(file))
        if channels != info.num_channels:
            raise InputError(
                f"{file} has {channels} channels, the network was trained on {info.num_channels} ({info.name})."
            )
    return files


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
