"""The three journeys of CONTRIBUTING.md: its code blocks, written into modules of a user, train together."""

import csv
import importlib
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np

from train.cli import main
from train.data.layouts import LAYOUTS
from train.models.registry import NETWORKS
from train.terms import TERMS

BLOCKS = re.findall(
    r"^```python\n(.*?)^```",
    (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(),
    flags=re.MULTILINE | re.DOTALL,
)


def write_pairs(folder):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for case in ("a", "b", "c"):
        mask = (rng.random((8, 8, 8)) < 0.3).astype(np.uint8)
        image = (100 + 50 * mask + rng.normal(size=mask.shape)).astype(np.float32)
        nib.save(nib.Nifti1Image(image, np.eye(4)), folder / f"{case}.nii.gz")
        nib.save(nib.Nifti1Image(mask, np.eye(4)), folder / f"{case}_mask.nii.gz")


def test_a_term_a_network_and_a_layout_of_the_guide_train_together(tmp_path, monkeypatch, capsys):
    for registry, name in ((TERMS, "confidence"), (NETWORKS, "voxel"), (LAYOUTS, "pairs")):
        monkeypatch.setitem(registry, name, None)  # removed after the test
        del registry[name]
    monkeypatch.syspath_prepend(tmp_path)
    for module, block in zip(("my_term", "my_network", "my_layout"), BLOCKS, strict=True):
        (tmp_path / f"{module}.py").write_text(block)
        importlib.import_module(module)
    write_pairs(tmp_path / "scans")

    run = tmp_path / "run"
    split = ["--num-test", "1", "--num-val", "0", "--patch", "8", "8", "8"]
    steps = ["--steps", "2", "--batch-size", "8", "--ace-delay", "0", "--ace-ramp", "0"]
    network = ["--architecture", "voxel", "--voxel-width", "4"]
    loss = ["--loss", "dice+0.1*confidence(beta=2.0)+ace"]
    data = ["--data", f"pairs:{tmp_path / 'scans'}"]
    assert main(["fit", *data, *network, *loss, *split, *steps, "--out", str(run)]) == 0
    with (run / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        parts = float(row["dice"]) + 0.1 * float(row["confidence"]) + float(row["ace"])
        np.testing.assert_allclose(float(row["loss"]), parts, rtol=1e-4)
        assert -2 * np.log(2) <= float(row["confidence"]) < 0
    assert json.loads((run / "config.json").read_text())["config"]["model"]["network"] == {"voxel_width": 4}

    assert main(["fit", "--data", "phantom", "--architecture", "voxel", "--channels", "4", "8"]) == 2
    assert "channels" in capsys.readouterr().err
