"""Hundreds of broken inputs: each ends in one sentence that names the file and says what to do."""

import csv
import html
import io
import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_predictions import make_case, save_nifti

from calib_jax.cli import main
from calib_jax.commands.calibrate import Calibration
from calib_jax.predictions import PredictionError, open_predictions

SHAPE = (5, 4, 3)
FORMATS = (".npz", ".npy", ".nii", ".nii.gz", ".mha", ".nrrd", ".png", ".tif")
MUTANTS = 90  # of each format
GOOD = 9  # cases whose names come first tell the number of classes


def content_of(ending, seed=0):
    """A valid file of probabilities as bytes."""
    probs, _ = make_case(seed, SHAPE if ending not in (".png", ".tif") else SHAPE[:2], classes=2)
    stream = io.BytesIO()
    if ending == ".npz":
        np.savez_compressed(stream, probabilities=probs.transpose(3, 2, 1, 0))
    elif ending == ".npy":
        np.save(stream, probs)
    elif ending in (".png", ".tif"):
        scaled = np.rint(probs[..., 1] * 65535).astype(np.uint16) if ending == ".png" else probs[..., 1]
        Image.fromarray(scaled).save(stream, "PNG" if ending == ".png" else "TIFF")
    else:
        return None
    return stream.getvalue()


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """The bytes of a valid file by ending."""
    folder, found = tmp_path_factory.mktemp("valid"), {}
    for ending in FORMATS:
        found[ending] = content_of(ending)
        if found[ending] is None:
            probs, _ = make_case(0, SHAPE, classes=2)
            file = folder / f"a{ending}"
            if ending in (".mha", ".nrrd"):
                sitk = pytest.importorskip("SimpleITK")
                sitk.WriteImage(sitk.GetImageFromArray(probs.transpose(2, 1, 0, 3), isVector=True), str(file))
            else:
                save_nifti(file, probs, np.eye(4))
            found[ending] = file.read_bytes()
    return found


def mutated(content, rng):
    """The content with a few bytes changed, mostly in the header; or a piece of it; or with a piece put in."""
    kind = rng.random()
    if kind < 0.4:
        return content[: rng.integers(0, len(content))]
    changed = bytearray(content)
    if kind < 0.5:
        place = rng.integers(0, len(content))
        return bytes(changed[:place] + bytes(rng.integers(0, 256, 9, np.uint8)) + changed[place:])
    most = len(content) if kind < 0.6 else min(len(content), 400)
    for place in rng.integers(0, most, rng.integers(1, 9)):
        changed[place] = rng.choice([0, 255, 45, 57, rng.integers(0, 256)])
    return bytes(changed)


def check_sentence(text, *folders):
    """One line that names a file of these folders and ends with what to do."""
    assert "\n" not in text, text
    assert any(str(folder) in text for folder in folders), text
    assert re.search(r"[:;?] \S.*[.?]$", text), text


@pytest.mark.parametrize("ending", FORMATS)
def test_changed_bytes_end_in_one_sentence_or_in_probabilities(tmp_path, valid, ending):
    probs, labels = tmp_path / "probs", tmp_path / "labels"
    probs.mkdir()
    label = tmp_path / "label.nii"
    _, ids = make_case(0, SHAPE, classes=2)
    if ending in (".png", ".tif"):
        label = label.with_suffix(".npy")
        np.save(label, ids[..., 0])
    else:
        save_nifti(label, ids, np.eye(4))
    labels.mkdir()
    rng = np.random.default_rng(FORMATS.index(ending))
    for number in range(GOOD + MUTANTS):
        whole = valid[ending]
        name = f"case{number:03d}"
        (probs / f"{name}{ending}").write_bytes(whole if number < GOOD else mutated(whole, rng))
        os.link(label, labels / f"{name}{label.suffix}")
    predictions = open_predictions(probs, labels)
    faults = 0
    for number, name in enumerate(predictions.case_names):
        try:
            case = predictions.read(name)
        except PredictionError as error:
            assert number >= GOOD
            check_sentence(str(error), probs / name, labels / name)
            faults += 1
        else:
            assert case.probs.shape == (*case.labels.shape, 2)
            assert case.probs.min() >= 0
            np.testing.assert_allclose(case.probs.sum(-1), 1, atol=0.01)
    assert faults >= 0.5 * MUTANTS, faults
