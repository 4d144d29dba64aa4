"""A store of decoded and preprocessed cases: arrays on disk that are mapped into memory."""

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from train.data.case import Case, Source
from train.data.geometry import Placement
from train.files import make_folder

# Part of every key. Raise it when the same files give other stored arrays.
_VERSION = 1
_NAMES = "arrays.json"
# Of a `Case`; phantoms, which have posteriors, are not stored.
_ARRAYS = ("image", "label", "affine", "annotations")


class CaseStore:
    """A folder of cases by key. A case is a folder with an uncompressed `.npy` per array.

    `write` renames a complete folder into place, so several processes may share the store and none sees half a
    case. A case that cannot be read counts as missing.

    Raises:
        InputError: the folder cannot be made.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        make_folder(folder, "cache_dir")

    def read(self, key: str, name: str) -> Case | None:
        """The case of `key`, its arrays mapped into memory; None if it is missing or cannot be read."""
        entry = self._entry(key)
        try:
            names = json.loads((entry / _NAMES).read_text(encoding="utf-8"))
            return _case(name, {array: np.load(entry / f"{array}.npy", mmap_mode="r") for array in names})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, key: str, case: Case) -> None:
        """Stores a case. If that fails, as on a full disk, it warns and stores nothing."""
        entry, arrays = self._entry(key), _arrays(case)
        partial = None
        try:
            partial = Path(tempfile.mkdtemp(prefix="partial-", dir=self._folder))
            for array, values in arrays.items():
                np.save(partial / f"{array}.npy", values)
            (partial / _NAMES).write_text(json.dumps(list(arrays)), encoding="utf-8")
            if self.read(key, case.name) is None:
                shutil.rmtree(entry, ignore_errors=True)
                partial.rename(entry)
        except OSError as error:
            # Another process may have been faster.
            if self.read(key, case.name) is None:
                warnings.warn(
                    f"cache_dir {self._folder} does not take {case.name} ({error.strerror}), which is read from "
                    "its files again each time.",
                    stacklevel=2,
                )
        finally:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)

    def _entry(self, key: str) -> Path:
        return self._folder / hashlib.sha256(f"{_VERSION} {key}".encode()).hexdigest()[:32]


def _arrays(case: Case) -> dict[str, np.ndarray]:
    arrays = {name: getattr(case, name) for name in _ARRAYS}
    if case.source is not None:
        placement = case.source.placement
        arrays |= {
            "source_label": case.source.label,
            "source_annotations": case.source.annotations,
            "source_shape": np.array(placement.source_shape),
            "box": np.array([(side.start, side.stop) for side in placement.box]),
            "shape": np.array(placement.shape),
            "box_affine": placement.box_affine,
        }
    return {name: array for name, array in arrays.items() if array is not None}


def _case(name: str, arrays: Mapping[str, np.ndarray]) -> Case:
    source = None
    if "box" in arrays:
        placement = Placement(
            source_shape=tuple(arrays["source_shape"].tolist()),
            box=tuple(slice(*side) for side in arrays["box"].tolist()),
            shape=tuple(arrays["shape"].tolist()),
            box_affine=arrays["box_affine"],
        )
        source = Source(placement, arrays["source_label"], arrays.get("source_annotations"))
    return Case(name, source=source, **{array: arrays[array] for array in _ARRAYS if array in arrays})
