"""Child processes for parsers that may hang, crash or eat memory on hostile input.

A child (``python -m stages.sources.sandbox``) bounds its own memory and, file by file, its
processor time; the parent bounds the time on the clock. A file that breaks a bound costs one child
and becomes a problem; the files after it go to a new one. A child serves many files: starting one
costs 0.1 s, a request 0.2 ms.

The two speak over pipes: a request is the kind's length, the data's length, then both; a reply is a
length, then JSON. Nothing that a child says is unpickled or run.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]

MEMORY = 1 << 30  # bytes of address space of a child: 0.36 GB with every parser at work
CPU_SECONDS = 60  # of one file: HTML, the slowest, takes 1 s a megabyte, so 17 s at the size limit
WALL_SECONDS = 300  # of one file, for a parser that sleeps or a machine that swaps
REPLY = 256 << 20  # bytes of the longest reply
OUT_OF_MEMORY = 77  # exit code of a child

Parsed = dict[str, Any]


class Child:
    """One child process, started when first needed and again after every broken bound."""

    def __init__(self, cpu_seconds: float, memory: int) -> None:
        self._limits = (cpu_seconds, memory)
        self._process: subprocess.Popen[bytes] | None = None

    def parse(self, kind: str, data: bytes) -> Parsed:
        """What :func:`stages.sources.parse.parse_here` says, or a problem marked ``limit``."""
        process = self._process or self._start()
        late = threading.Event()

        def give_up() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(WALL_SECONDS, give_up)
        timer.daemon = True
        timer.start()
        try:
            reply = _ask(process, kind, data)
        except (OSError, ValueError, struct.error):
            process.kill()
            reply = {"problem": self._why(process.wait(), late.is_set(), kind), "limit": True}
        finally:
            timer.cancel()
        if reply.get("limit"):
            self.close()
        return reply

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "stages.sources.sandbox", *map(str, self._limits)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        return self._process

    def _why(self, code: int, late: bool, kind: str) -> str:
        """The reason, from how the child ended."""
        if late:
            return f"its {kind} parser took more than {WALL_SECONDS} s"
        if code == OUT_OF_MEMORY:
            return f"its {kind} parser needs more than {self._limits[1] >> 20:,} MiB of memory"
        if code == -signal.SIGXCPU:
            return f"its {kind} parser took more than {self._limits[0]:g} s of processor time"
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"its {kind} parser crashed ({name})"

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):  # what a dead child did not take
                        pipe.close()


def _ask(process: subprocess.Popen[bytes], kind: str, data: bytes) -> Parsed:
    """Send one request and read its reply. Raises OSError when the child is gone."""
    assert process.stdin is not None and process.stdout is not None
    name = kind.encode()
    process.stdin.write(struct.pack("<II", len(name), len(data)) + name)
    process.stdin.write(data)
    process.stdin.flush()
    (length,) = struct.unpack("<I", _read(process.stdout, 4))
    if length > REPLY:
        raise ValueError(length)
    reply: Parsed = json.loads(_read(process.stdout, length))
    return reply


def _read(pipe: IO[bytes], count: int) -> bytes:
    data = pipe.read(count)
    if len(data) != count:
        raise OSError("the child is gone")
    return data


def parse_apart(
    items: Sequence[tuple[str, bytes]],
    *,
    children: int | None = None,
    cpu_seconds: float = CPU_SECONDS,
    memory: int = MEMORY,
) -> list[Parsed]:
    """(kind, data) parsed in child processes, in order; nothing that a file holds can raise.

    Args:
        children: processes at once; by default one a core, and never more than 16 files need.
    """
    if not items:
        return []
    wanted = children or len(os.sched_getaffinity(0))
    count = max(1, min(wanted, (len(items) + 15) // 16))
    free = [Child(cpu_seconds, memory) for _ in range(count)]
    lock = threading.Lock()

    def work(item: tuple[str, bytes]) -> Parsed:
        with lock:
            child = free.pop()
        try:
            return child.parse(*item)
        finally:
            with lock:
                free.append(child)

    try:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(work, items))
    finally:
        for child in free:
            child.close()


def serve(cpu_seconds: float, memory: int) -> None:
    """The child: answer requests until the pipe closes. Raises MemoryError at the bound."""
    from stages.sources.parse import parse_here

    _bound(resource.RLIMIT_CORE, 0)
    _bound(resource.RLIMIT_AS, memory)
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not look like a reply
    while header := requests.read(8):
        name, length = struct.unpack("<II", header)
        kind, data = requests.read(name).decode(), requests.read(length)
        used = resource.getrusage(resource.RUSAGE_SELF)
        _bound(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + cpu_seconds) + 1)
        body = json.dumps(parse_here(kind, data)).encode()
        replies.write(struct.pack("<I", len(body)) + body)
        replies.flush()


def _bound(what: int, value: int) -> None:
    """Set a soft limit, within the hard one that this machine may have."""
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    try:
        serve(float(sys.argv[1]), int(sys.argv[2]))
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
