"""Files that hold documents: zip and tar archives, and JSON lines.

Nothing is ever unpacked to a path that an archive names. An archive whose directory promises more
than the limits is refused whole, before any member is read: one row, the reason, nothing lost.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from typing import IO

from stages.sources.files import File, Limits, Selection, leads_out, reason, shown
from stages.sources.jsonl import json_lines

ZIP = (".zip",)
TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
LINES = (".jsonl", ".ndjson")
#: Small archives may compress well: a megabyte of zeros harms nobody.
HARMLESS = 4 << 20


def is_container(name: str) -> bool:
    return name.lower().endswith((*ZIP, *TAR, *LINES))


def members(
    path: str, stream: IO[bytes], selection: Selection, limits: Limits, prefix: bool = False
) -> Iterator[File]:
    """The documents of a container, or one File that says why it cannot be used.

    Args:
        path: of the container, as `shown` writes it.
        stream: its bytes, seekable.
        prefix: whether members are called "<path>/<member>", because the source holds more.
    """
    lower = path.lower()
    if lower.endswith(LINES):
        found = json_lines(stream, limits)
    elif lower.endswith(ZIP):
        found = _zip(stream, limits)
    else:
        found = _tar(stream, limits, lower)
    try:
        for file in found:
            full = f"{path}/{file.path}" if prefix else file.path
            if selection.wants(full):
                yield replace(file, path=full)
    except Refused as error:
        yield File(path, problem=str(error))
    except Exception as error:  # archives come from anywhere, and so do their libraries' errors
        yield File(path, problem=f"cannot be read as {lower.rsplit('.', 1)[-1]}: {reason(error)}")


class Refused(Exception):
    """A container that must not be opened; the text says why."""


def refuse_bomb(unpacked: int, packed: int, limits: Limits, what: str = "the archive") -> None:
    """Raise Refused when that many bytes would come out of so few."""
    if unpacked > limits.total:
        raise Refused(
            f"{what} unpacks to {unpacked:,} bytes or more, over the limit of {limits.total:,}"
        )
    if unpacked > HARMLESS and unpacked > limits.ratio * max(packed, 1):
        raise Refused(
            f"{what} unpacks to {unpacked // max(packed, 1):,} times its bytes, over the limit of "
            f"{limits.ratio}: a bomb?"
        )


def _zip(stream: IO[bytes], limits: Limits) -> Iterator[File]:
    with zipfile.ZipFile(stream) as archive:
        entries = sorted(archive.infolist(), key=lambda item: item.filename)
        if len(entries) > limits.members:
            raise Refused(f"the archive has {len(entries):,} members, over {limits.members:,}")
        packed = stream.seek(0, 2)
        refuse_bomb(sum(item.file_size for item in entries), packed, limits)
        for item in entries:
            if item.is_dir():
                continue
            name = shown(item.filename.encode("utf-8", "surrogateescape"))
            problem = _member_problem(item.filename, item.file_size, limits)
            if problem is None and (item.external_attr >> 16) & 0o170000 == 0o120000:
                problem = "a link inside an archive"
            data = b""
            if problem is None:
                try:
                    # A directory may lie about the length: never more than it promises is read.
                    with archive.open(item) as member:
                        data = member.read(limits.max_bytes + 1)
                except Exception as error:  # a bad checksum, an unknown method, a password
                    problem = f"cannot be unpacked: {reason(error)}"
            yield File(name, data, problem)


def _tar(stream: IO[bytes], limits: Limits, name: str) -> Iterator[File]:
    with tempfile.TemporaryFile() as plain:
        _unpack(stream, plain, limits, name)
        with tarfile.open(fileobj=plain, mode="r:") as archive:
            for number, item in enumerate(archive):
                if number >= limits.members:
                    raise Refused(f"the archive has more than {limits.members:,} members")
                if item.isdir():
                    continue
                path = item.name.removeprefix("./")
                problem = _member_problem(path, item.size, limits)
                if problem is None and not item.isreg():
                    problem = "a link or a device inside an archive"
                member = archive.extractfile(item) if problem is None else None
                data = member.read(limits.max_bytes + 1) if member else b""
                yield File(shown(path.encode("utf-8", "surrogateescape")), data, problem)


def _unpack(stream: IO[bytes], plain: IO[bytes], limits: Limits, name: str) -> None:
    """Write the decompressed archive to ``plain``, stopping at the limits."""
    packed = stream.seek(0, 2)
    stream.seek(0)
    source: IO[bytes]
    if name.endswith("gz"):
        source = gzip.GzipFile(fileobj=stream)  # type: ignore[assignment]
    elif name.endswith("bz2"):
        source = bz2.BZ2File(stream)
    elif name.endswith("xz"):
        source = lzma.LZMAFile(stream)  # noqa: SIM115  # over a stream that the caller closes
    else:
        source = stream
    unpacked = 0
    while block := source.read(1 << 20):
        unpacked += len(block)
        refuse_bomb(unpacked, packed, limits)
        plain.write(block)
    plain.seek(0)


def _member_problem(name: str, count: int, limits: Limits) -> str | None:
    """Why a member must not be read, or None."""
    if leads_out(name):
        return "its name leads out of the archive"
    if name.lower().endswith((*ZIP, *TAR)):
        return "an archive inside an archive"
    return limits.too_large(count)
