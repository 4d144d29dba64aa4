"""Files in the safetensors format, read strictly: everything that a header can get wrong is looked at.

Eight bytes say how long the header is (little-endian), the header is JSON and says of each tensor its dtype, shape
and bytes, and the rest of the file is those bytes, without a gap or an overlap.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from train.errors import InputError

_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_LONGEST_HEADER = 100_000_000  # as in the reference implementation


def read_safetensors(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a file by name.

    Raises:
        InputError: if the file cannot be read or is not exactly what its header says.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): give a file of weights.") from error
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > min(len(content) - 8, _LONGEST_HEADER):
        raise InputError(
            f"{file} is no safetensors file, or cut off: it has {len(content)} bytes and its header is said to "
            f"have {length}. Fetch it again."
        )
    header = _header(file, content[8 : 8 + length])
    data = memoryview(content)[8 + length :]
    _check_bytes(file, header, len(data))
    return {name: _tensor(entry, data) for name, entry in header.items()}


def _header(file: Path, text: bytes) -> dict[str, Mapping[str, Any]]:
    try:
        header = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} has a header that is not valid JSON ({error}): fetch it again.") from error
    if not isinstance(header, dict):
        raise InputError(f"{file} has a header that is no JSON object: fetch it again.")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise InputError(f"{file} has a __metadata__ that is no mapping of text to text: fetch it again.")
    for name, entry in header.items():
        _check_entry(file, name, entry)
    return header


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError("a name stands twice")
    return dict(pairs)


def _check_entry(file: Path, name: str, entry: Any) -> None:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputError(
            f"{file} does not give {name} exactly a dtype, a shape and data_offsets: fetch it again."
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise InputError(f"{file} has {name} as {dtype}: convert it to one of {', '.join(_DTYPES)}.")
    if not _are_sizes(shape) or 0 in shape or not _are_sizes(offsets) or len(offsets) != 2:
        raise InputError(f"{file} gives {name} the shape {shape} and the offsets {offsets}: fetch it again.")
    needed, given = prod(shape) * _DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    if needed != given:
        raise InputError(f"{file} gives {name}, which needs {needed} bytes, {given}: fetch it again.")


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_bytes(file: Path, header: Mapping[str, Mapping[str, Any]], size: int) -> None:
    """Every byte belongs to exactly one tensor."""
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start = entry["data_offsets"][0]
        if start != end:
            what = (
                "overlaps another tensor" if start < end else f"leaves a gap of {start - end} bytes before it"
            )
            raise InputError(f"{file} is damaged: {name} {what}. Fetch it again.")
        end = entry["data_offsets"][1]
    if end != size:
        raise InputError(f"{file} is cut off or damaged: its tensors take {end} bytes, {size} are there.")


def _tensor(entry: Mapping[str, Any], data: memoryview) -> np.ndarray:
    start, end = entry["data_offsets"]
    return np.frombuffer(data[start:end], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
