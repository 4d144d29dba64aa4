"""Predictions of another project, mended on one fold and judged on the next: `python -m benchmarks.five_folds`.

    python -m benchmarks.five_folds Task04_Hippocampus work --out benchmarks/results/five-folds/five_folds.json

Five small U-Nets of MONAI are trained on PyTorch with Dice, each on four fifths of a data set in the Decathlon's
layout. Each predicts the fifth that it has not seen, and writes what nnU-Net writes with `--save_probabilities`:
`CASE.npz` with the axes reversed, and the label map `CASE.nii.gz`. `calib-jax calibrate fit` then sees one fold,
`calib-jax calibrate apply` mends the next one, and `calib-jax report` compares both. Needs the extra `reference`.
"""

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.losses.dice import DiceLoss

from benchmarks import reference
from train.progress import progress

_FOLDS = 5
_SIDES = (48, 64, 48)
_METRICS = ("dice", "ace", "mce", "ece")


def read(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray, Any]:
    """Image of mean 0 and standard deviation 1, class ids, and affine of a case."""
    image: Any = nib.load(folder / "imagesTr" / f"{name}.nii.gz")
    label: Any = nib.load(folder / "labelsTr" / f"{name}.nii.gz")
    voxels = image.get_fdata(dtype=np.float32)
    return (voxels - voxels.mean()) / voxels.std(), np.asarray(label.dataobj).astype(np.int64), image.affine


def padded(x: np.ndarray) -> torch.Tensor:
    """A volume with zeros behind its end, up to the size of all volumes, `[1, *sides]`."""
    return torch.tensor(np.pad(x, [(0, side - n) for side, n in zip(_SIDES, x.shape, strict=True)]))[None]


def train(cases: Sequence[tuple[np.ndarray, np.ndarray, Any]], steps: int, seed: int) -> torch.nn.Module:
    """MONAI's U-Net after `steps` steps of Adam with Dice, four volumes a step."""
    torch.manual_seed(seed)
    network, loss = reference.paper_unet(1, 3), DiceLoss(softmax=True, to_onehot_y=True)
    optimiser = torch.optim.Adam(network.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    images, labels = (torch.stack([padded(case[part]) for case in cases]) for part in (0, 1))
    for _ in progress(range(steps), desc=f"training fold {seed}"):
        chosen = torch.randint(len(images), (4,))
        optimiser.zero_grad()
        loss(network(images[chosen]), labels[chosen]).backward()
        optimiser.step()
        schedule.step()
    return network.eval()


def export(network: torch.nn.Module, case: tuple[np.ndarray, np.ndarray, Any], stem: Path) -> None:
    """Writes the probabilities and the label map of a case as nnU-Net does."""
    image, _, affine = case
    with torch.no_grad():
        logits = network(padded(image)[None])[0]
    probs = logits.softmax(0).numpy()[:, *map(slice, image.shape)]
    np.savez_compressed(stem.with_name(f"{stem.name}.npz"), probabilities=probs.transpose(0, 3, 2, 1))
    label = nib.Nifti1Image(probs.argmax(0).astype(np.uint8), affine)
    nib.save(label, stem.with_name(f"{stem.name}.nii.gz"))


def calib_jax(*arguments: str | Path) -> None:
    """Runs the command line."""
    subprocess.run([sys.executable, "-m", "calib_jax", *map(str, arguments)], check=True)


def compare(data: Path, work: Path, fitted: int, judged: int, method: str) -> dict[str, Any]:
    """Means over the cases of a fold, as predicted and after calibration on another fold."""
    mended, page = work / f"mended_{judged}", work / f"report_{judged}"
    params = work / f"calibration_{fitted}.npz"
    labels, images = data / "labelsTr", data / "imagesTr"
    fit = ("calibrate", "fit", "--probs", work / f"fold_{fitted}", "--labels", labels, "--images", images)
    calib_jax(*fit, "--method", method, "--out", params)
    apply = ("calibrate", "apply", "--probs", work / f"fold_{judged}", "--images", images)
    calib_jax(*apply, "--params", params, "--out", mended)
    models = ("--probs", f"raw={work / f'fold_{judged}'}", "--probs", f"mended={mended}")
    calib_jax("report", *models, "--labels", labels, "--out", page, "--jobs", "2")
    rows = list(csv.DictReader((page / "cases.csv").read_text().splitlines()))
    found: dict[str, Any] = {"fitted to fold": fitted, "judged on fold": judged}
    for model in ("raw", "mended"):
        own = [row for row in rows if row["model"] == model]
        found[model] = {metric: np.nanmean([float(row[metric]) for row in own]) for metric in _METRICS}
        found["cases"] = len({row["case"] for row in own})
    maps = sorted((work / f"fold_{judged}").glob("*.nii.gz"))
    found["equal label maps"] = sum(
        file.read_bytes() == (mended / file.name).read_bytes() for file in maps
    ) / len(maps)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "data", type=Path, help="folder in the Decathlon's layout, one channel, three classes"
    )
    parser.add_argument("work", type=Path, help="folder for predictions and pages; folds that are there stay")
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps of each fold (default: 400)")
    parser.add_argument("--method", default="local-free", help="calibrator (default: local-free)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    options = parser.parse_args()
    reference.at_its_fastest()
    names = sorted(file.name[: -len(".nii.gz")] for file in (options.data / "labelsTr").glob("[!.]*.nii.gz"))
    names = [names[i] for i in np.random.default_rng(0).permutation(len(names))]
    cases = {name: read(options.data, name) for name in names}
    for fold in range(_FOLDS):
        folder, own = options.work / f"fold_{fold}", names[fold::_FOLDS]
        if len(list(folder.glob("*.nii.gz"))) == len(own):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        network = train([cases[name] for name in names if name not in own], options.steps, fold)
        for name in own:
            export(network, cases[name], folder / name)
    pairs = [(fold, (fold + 1) % _FOLDS) for fold in range(_FOLDS)]
    rows = [compare(options.data, options.work, *pair, options.method) for pair in pairs]
    for row in rows:
        changes = [f"{m} {row['raw'][m]:.4f} -> {row['mended'][m]:.4f}" for m in _METRICS]
        print(f"fold {row['judged on fold']}: {', '.join(changes)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = {"steps": options.steps, "method": options.method, "folds": rows}
    options.out.write_text(json.dumps(results, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()
