"""A trained network on images without labels: label maps and class probabilities as NIfTI."""

import sys
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from train.checkpoint import Which
from train.config import DataInfo
from train.data.faults import Fault, collected, refuse
from train.data.names import CHANNEL
from train.data.nifti import Grid, check_same_grid, read_channels
from train.data.volume_files import ENDINGS, open_volume, parts_of, stem, volumes_in
from train.errors import InputError
from train.files import visible
from train.fit import load_run


def predict_folder(run: Path, images: Path, out: Path, which: Which = "last") -> list[Path]:
    """Predicts every case in `images` and writes two files for each into `out`.

    A case is one volume, with its channels along the fourth axis if there are several, or as nnU-Net has it one
    volume for each channel, `NAME_0000.nii.gz` and on, see `find_cases`.

    `NAME_label.nii.gz` holds the most probable class ids (uint8), `NAME_probs.nii.gz` the class probabilities
    (float32, classes along the fourth axis, background first), both on the grid and with the affine of
    the image.

    Returns:
        The files written.

    Raises:
        InputError: if there is no image, or one does not fit the network; all are checked before the first
            is predicted.
    """
    _, info, predict = load_run(run, which)
    if info.spatial_dims != 3:
        raise InputError(f"{run} was trained on {info.spatial_dims}-D images: NIfTI volumes need a 3-D run.")
    cases, faults = find_cases(images, info)
    refuse(faults)
    _check_out(out)
    written = []
    for name, files in tqdm(cases.items(), "predicting", unit="case"):
        image, grid = read_channels(files, info.window)
        placement = info.geometry.place(image, grid.affine, windowed=info.window is not None)
        probs = placement.back(predict(placement.image(image, info.geometry.interpolation)))
        written += [
            _write(out / f"{name}_label.nii.gz", probs.argmax(-1).astype(np.uint8), grid),
            _write(out / f"{name}_probs.nii.gz", probs.astype(np.float32), grid),
        ]
    return written


def list_cases(folder: Path, info: DataInfo) -> dict[str, list[Path]]:
    """The files of each case in a folder, by its name; none where no file is a case.

    Raises:
        InputError: there is no volume, or some of them are cases and others are not.
    """
    cases, faults = find_cases(folder, info)
    if cases:
        refuse(faults)
    return cases


def find_cases(folder: Path, info: DataInfo) -> tuple[dict[str, list[Path]], list[Fault]]:
    """The files of each case that fits the network, by its name, and what is wrong with the other volumes.

    Files are channels of a case where they are called as by nnU-Net, `NAME_0000` and on without a gap, one for each
    channel of the network. A network of one channel takes them so only if all files of the folder are called
    `NAME_0000`: else `NAME_0008` is the name of a case.

    Raises:
        InputError: there is no volume.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give one with .nii or .nii.gz volumes.")
    files = volumes_in(folder)
    if not files:
        raise InputError(f"{folder} holds no {', '.join(ENDINGS)} volume.")
    _tell_ignored(folder, files)
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


def group_channels(files: Sequence[Path], channels: int) -> list[tuple[str, list[Path]]]:
    """Names of cases with their files, from the names of the files alone, see `find_cases`.

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
    """Reads the headers of one case's files.

    Raises:
        InputError: they do not share a grid, or have other channels than the network was trained on.
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


def _tell_ignored(folder: Path, files: Sequence[Path]) -> None:
    """Names what else lies in the folder, but for the voxels of detached headers."""
    used = {part for file in files for part in parts_of(file)}
    ignored = [path.name for path in visible(folder) if path not in used]
    if ignored:
        more = f" and {len(ignored) - 5} others" if len(ignored) > 5 else ""
        print(
            f"{folder} holds what is no volume and is ignored: {', '.join(ignored[:5])}{more}",
            file=sys.stderr,
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


def _write(file: Path, voxels: np.ndarray, grid: Grid) -> Path:
    header = grid.header.copy()
    header.set_data_dtype(voxels.dtype)
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["cal_max"], header["cal_min"] = 0, 0
    header.set_intent("none")
    nib.save(nib.Nifti1Image(grid.to_file(voxels), header.get_best_affine(), header), file)
    return file
