"""Copies of index directories, whose files are mostly holes."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Collection
from pathlib import Path

BLOCK = 1 << 16
_ZEROS = bytes(BLOCK)


def copy_tree(source: Path, target: Path, without: Collection[str] = ()) -> dict[str, int]:
    """Copy the files below ``source``, but those of these names; a checksum of each, by path.

    Linking instead was tried: the engine counts its data files by directory entry and does not see
    links, and a linked folder is written through to DVC's cache. The copy leaves holes where the
    engine only reserved space: 8 MB for 70 at 3,500 chunks, 0.1 s; 100,000 chunks are 250 MB.
    """
    sums = {}
    for folder, _, names in os.walk(source):
        inside = Path(folder).relative_to(source)
        (target / inside).mkdir(exist_ok=True)
        for name in names:
            if name not in without:
                part = inside / name
                sums[part.as_posix()] = copy_sparse(source / part, target / part)
    return sums


def copy_sparse(source: Path, target: Path, durable: bool = False) -> int:
    """Copy a file; holes and blocks of zeros become holes. ``durable``: on the disk on return.

    Returns a CRC-32 over its length and its blocks that are not all zeros: the same for equal
    files, wherever their holes are. (3.5 GB/s here, where MD5 makes 0.75.)
    """
    with source.open("rb") as reader, target.open("wb") as writer:
        length = os.fstat(reader.fileno()).st_size
        total = zlib.crc32(length.to_bytes(8, "little"))
        at = _next_block(reader.fileno(), 0, length)
        while at < length:
            data = os.pread(reader.fileno(), BLOCK, at)
            if data != (_ZEROS if len(data) == BLOCK else _ZEROS[: len(data)]):
                os.pwrite(writer.fileno(), data, at)
                total = zlib.crc32(data, zlib.crc32(at.to_bytes(8, "little"), total))
            at = _next_block(reader.fileno(), at + BLOCK, length)
        writer.truncate(length)
        if durable:
            os.fsync(writer.fileno())
    return total


def _next_block(file: int, at: int, length: int) -> int:
    """Where the first block from ``at`` on begins that is not all hole; else ``length``."""
    try:
        return os.lseek(file, at, os.SEEK_DATA) // BLOCK * BLOCK
    except OSError as error:
        if error.errno == errno.ENXIO:
            return length
        raise
