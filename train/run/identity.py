"""What a case is, wherever its files lie and whatever they are called."""

import functools
import gzip
import os
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from train.data import Dataset
from train.data.phantom import PhantomDataset
from train.data.volumes import VolumeDataset
from train.processes import is_first
from train.progress import progress


@dataclass(frozen=True)
class CaseId:
    """The identity of a case.

    Attributes:
        name: in its data set.
        images: a fingerprint of each image's content; empty if the images are not known.
    """

    name: str
    images: frozenset[str] = frozenset()

    def is_same(self, other: "CaseId") -> bool:
        """Compares the images, of which either case may lack some, or the names if images are not known."""
        if not (self.images and other.images):
            return self.name == other.name
        return self.images <= other.images or other.images <= self.images


class CaseIndex:
    """Finds cases by their identity."""

    def __init__(self, cases: Iterable[CaseId]):
        self._by_name: dict[str, list[CaseId]] = defaultdict(list)
        self._by_image: dict[str, list[CaseId]] = defaultdict(list)
        for case in cases:
            self._by_name[case.name].append(case)
            for image in case.images:
                self._by_image[image].append(case)

    def find(self, case: CaseId) -> set[CaseId]:
        """The cases that are the same as `case`; if one of them has its name, only that one."""
        named = [known for known in self._by_name[case.name] if known.is_same(case)]
        imaged = [known for image in case.images for known in self._by_image[image] if known.is_same(case)]
        return set(named or imaged)


@functools.lru_cache(maxsize=4)
def identify(dataset: Dataset) -> tuple[CaseId, ...]:
    """Identifies each case of a data set.

    Volumes on disk are identified by the CRC-32 and size of their image files' uncompressed content. A copy is
    recognised under any name and in any layout, compressed or not; a file whose header or voxels were rewritten is
    another image. Cases of data sets from outside this project are loaded and identified by their image arrays.
    """
    if isinstance(dataset, PhantomDataset):
        kind = repr(replace(dataset, num_cases=0))
        return tuple(CaseId(name, frozenset([f"{kind} {name}"])) for name in dataset.case_names)
    cases = progress(dataset.case_names, desc="identifying cases", leave=False, disable=not is_first())
    return tuple(CaseId(name, _images(dataset, index)) for index, name in enumerate(cases))


def _images(dataset: Dataset, index: int) -> frozenset[str]:
    """The fingerprints of a case's images."""
    if isinstance(dataset, VolumeDataset):
        return frozenset(map(fingerprint, dataset.layout.entries[index].images))
    image = dataset.load(index).image
    shape = "x".join(map(str, image.shape))
    return frozenset([f"{zlib.crc32(np.ascontiguousarray(image).tobytes()):08x}-{image.dtype}-{shape}"])


def fingerprint(file: Path) -> str:
    """CRC-32 and size of a file's uncompressed content.

    Example:
        >>> fingerprint(Path("/dev/null"))
        '00000000-0'
    """
    try:
        with file.open("rb") as raw:
            compressed = raw.read(2) == b"\x1f\x8b"
            if compressed and (expected := _nifti_size(file)):
                raw.seek(-8, os.SEEK_END)  # gzip ends with both
                crc, size = struct.unpack("<II", raw.read())
                if size == expected % 2**32:  # otherwise the file has several gzip streams, or trailing bytes
                    return f"{crc:08x}-{expected:x}"
        with gzip.open(file) if compressed else file.open("rb") as content:
            return _checksum(content)
    except (OSError, EOFError, zlib.error):
        with file.open("rb") as raw:  # as it is
            return _checksum(raw)


def _checksum(content: Any) -> str:
    crc = size = 0
    while chunk := content.read(2**20):
        crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return f"{crc:08x}-{size:x}"


def _nifti_size(file: Path) -> int:
    """Bytes of an uncompressed volume according to its header; 0 if it has none."""
    import nibabel as nib  # here, since most commands identify no file

    try:
        volume: Any = nib.load(file)
        return int(np.prod(volume.shape) * volume.get_data_dtype().itemsize + volume.dataobj.offset)
    except Exception:  # whatever a broken header raises
        return 0
