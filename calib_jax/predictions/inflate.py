"""Decompresses gzip files and members of zip files, by zlib-ng in half the time of zlib where it is installed."""

import copy
import zipfile
from typing import IO, Any, Final

import numpy as np
from jaxtyping import UInt8

try:
    from zlib_ng import zlib_ng as zlib
except ImportError:  # it has no wheels for some processors
    import zlib

GZIP: Final = b"\x1f\x8b"
"""The first bytes of a gzip file."""
MOST_INFLATED: Final = 1100
"""Bytes that one compressed byte stands for at most: a header that claims more is wrong."""
_CHUNK = 1 << 18  # bytes that are read or decompressed at a time


def is_gzip(file: IO[bytes]) -> bool:
    """Whether the content is compressed, whatever the name of the file."""
    start = file.read(len(GZIP))
    file.seek(0)
    return start == GZIP


def gunzip(file: IO[bytes], needed: int) -> UInt8[np.ndarray, "bytes"]:
    """The first bytes of all members of a gzip file, whose checksums are checked to the end.

    Bytes behind the last member are ignored. Memory holds little more than the result.

    Raises:
        EOFError: a member is cut off, or there are fewer bytes than needed.
        zlib.error: a member is corrupt.
    """
    content, filled = np.empty(needed, np.uint8), 0
    chunk = file.read(_CHUNK)
    while chunk.startswith(GZIP):
        member = zlib.decompressobj(16 + zlib.MAX_WBITS)
        filled = _inflate(member, file, chunk, content, filled)
        chunk = member.unused_data.lstrip(b"\0")
        while len(chunk) < len(GZIP) and (more := file.read(_CHUNK)):
            chunk = (chunk + more).lstrip(b"\0")
    if filled < needed:
        raise EOFError("the voxels are cut off")
    return content


def unzip(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> UInt8[np.ndarray, "bytes"]:
    """The content of a member of a zip file, stored or deflated.

    Raises:
        EOFError: the member is cut off.
        zlib.error: the member is corrupt.
        zipfile.BadZipFile: its header or its checksum is wrong.
    """
    if info.compress_type == zipfile.ZIP_STORED:
        return np.frombuffer(archive.read(info), np.uint8)
    content, member = np.empty(info.file_size, np.uint8), zlib.decompressobj(-zlib.MAX_WBITS)
    stored: Any = copy.copy(info)  # as if it were not compressed: `zipfile` would inflate it by zlib
    stored.compress_type, stored.file_size, stored.CRC = zipfile.ZIP_STORED, info.compress_size, None
    with archive.open(stored) as file:
        filled = _inflate(member, file, file.read(_CHUNK), content, 0)
    if filled < info.file_size or zlib.crc32(content.data) != info.CRC:
        raise zipfile.BadZipFile(f"the checksum of {info.filename} is wrong")
    return content


def _inflate(member: Any, file: IO[bytes], chunk: bytes, content: np.ndarray, filled: int) -> int:
    """Writes a whole member behind the `filled` bytes of `content`; what does not fit there is dropped.

    Args:
        member: decompressor.
        file: the compressed bytes behind `chunk`.

    Returns:
        The number of bytes of `content` that are filled.
    """
    view = content.data
    while not member.eof:
        if not chunk:
            raise EOFError("the end of the compressed data is missing")
        found = member.decompress(chunk, _CHUNK)[: len(content) - filled]
        view[filled : filled + len(found)] = found
        filled += len(found)
        chunk = member.unconsumed_tail or (b"" if member.eof else file.read(_CHUNK))
    return filled
