"""What is to be forgotten, and how a worker hears of it.

A purge is announced in a file of the state folder, at which every worker of this machine looks once
a second (a stat), and in Redis, where those of other machines look. Each forgets what it holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import orjson

from contracts.settings import Settings

#: Between two looks of a worker at what was announced.
LOOK_SECONDS = 1.0
#: Announcements that are kept. A worker that missed more forgets everything.
KEPT = 100


class Meant(Protocol):
    """An answer, or a request for one."""

    @property
    def tenant(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def model(self) -> str: ...


class Purge(NamedTuple):
    """Which answers: those that have all that is named. Without names, every answer."""

    release: str | None = None
    model: str | None = None
    tenant: str | None = None

    def means(self, one: Meant) -> bool:
        """A release is meant with whatever follows its id (what was hidden of its documents)."""
        return (
            (self.release is None or one.target.partition("+")[0] == self.release)
            and (self.model is None or one.model == self.model)
            and (self.tenant is None or one.tenant == self.tenant)
        )

    def announcement(self) -> bytes:
        """It as workers are told; each differs."""
        return orjson.dumps({"id": secrets.token_hex(8), **self._asdict()})


def announced(told: bytes) -> Purge:
    """What an announcement says; everything, where this version cannot read it."""
    try:
        value = orjson.loads(told)
        return Purge(value["release"], value["model"], value["tenant"])
    except (ValueError, KeyError, TypeError):
        return Purge()


class Heard:
    """The announcements that a worker knows. It reads them newest first, from one or two places."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def know(self, told: Iterable[bytes]) -> None:
        """They need not be acted upon: the worker has nothing from before them, or did it."""
        self._known.update(dict.fromkeys(told))
        while len(self._known) > 4 * KEPT:
            self._known.popitem(last=False)

    def fresh(self, told: Sequence[bytes]) -> list[Purge]:
        """Those that are new, oldest first; everything where some may have been missed."""
        new = [one for one in told if one not in self._known]
        self.know(told)
        if len(new) >= KEPT:
            return [Purge()]
        return [announced(one) for one in reversed(new)]


class PurgeFile:
    """Announcements of one state folder, newest first, one JSON object a line."""

    def __init__(self, settings: Settings) -> None:
        self.path = settings.state_dir / "cache" / "purges.jsonl"

    def read(self) -> list[bytes]:
        with contextlib.suppress(FileNotFoundError):
            return self.path.read_bytes().splitlines()
        return []

    def add(self, told: bytes) -> None:
        """The file appears whole or not at all. Blocks. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            part = self.path.with_suffix(".part")
            lines = [told, *self.read()[: KEPT - 1]]
            with part.open("wb") as file:
                file.write(b"".join(line + b"\n" for line in lines))
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path)

    def signature(self) -> tuple[int, int, int] | None:
        """Changes with the file. One stat."""
        with contextlib.suppress(OSError):
            stat = self.path.stat()
            return stat.st_ino, stat.st_mtime_ns, stat.st_size
        return None
