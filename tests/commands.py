"""What the tests of commands share: running them, and a small data set."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from train.cli import main


def run(*arguments: object) -> int:
    """Runs a command; returns its exit status."""
    return main([str(argument) for argument in arguments])


def refuses(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs a command that must fail; returns its one line on stderr."""
    assert run(*arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def write_msd(
    folder: Path, count: int, shape: tuple[int, ...], box: tuple[slice, ...], affine: np.ndarray
) -> Path:
    """Cases of one channel and two classes in the Decathlon's layout; the second class is a box."""
    rng = np.random.default_rng(0)
    names = [f"case_{i}" for i in range(count)]
    for name in names:
        label = np.zeros(shape, np.uint8)
        label[box] = 1
        image = rng.normal(100 + 50 * label, 10).astype(np.float32)
        for part, voxels in (("imagesTr", image), ("labelsTr", label)):
            (folder / part).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(voxels, affine), folder / part / f"{name}.nii.gz")
    description = {
        "name": "Tiny",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "box"},
        "training": [{"image": f"imagesTr/{n}.nii.gz", "label": f"labelsTr/{n}.nii.gz"} for n in names],
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder
