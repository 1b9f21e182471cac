"""Reading what is published, while it changes: a reader that follows the pointer.

Each search takes one version and one list of tombstones, and keeps them to its end: nothing is ever
mixed. A look at the pointer is one ``stat``. A new version that cannot be opened leaves the old one
serving and ``problem`` saying why; the tombstones are honoured all the same.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import weakref
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from contracts.errors import NotFoundError, RatchetError
from contracts.records import Chunk, Filter
from contracts.settings import Settings
from resources.index import MANIFEST, Asked, Hit, VectorIndex, documents, hide, open_index, server
from resources.versions import Store

if TYPE_CHECKING:
    import numpy as np

TRIES = 5  # a version may be removed between reading the pointer and opening it


class Tombstones:
    """Which chunks of one index may be shown right now: for ``Rag(only=...)``.

    Args:
        settings: whose pointer.
        index: the directory that is read; only deleted documents that it holds are looked for.
    """

    def __init__(self, settings: Settings, index: Path) -> None:
        self._store, self._documents = Store(settings), frozenset(documents(index))
        self._pointer = self._store.pointer
        # One reference, so that threads never see the halves of two states.
        self._state: tuple[Any, Filter | None, str] = (object(), None, "")

    def __call__(self) -> Filter | None:
        """A filter, or None when nothing is hidden. Costs one stat while nothing changes."""
        return self._look()[1]

    def digest(self) -> str:
        """A name for what is hidden, for keys of caches; "" when nothing is."""
        return self._look()[2]

    def known_digest(self) -> str | None:
        """The same; None when the pointer has to be read for it. One stat."""
        state = self._state
        return state[2] if signature(self._pointer) == state[0] else None

    def _look(self) -> tuple[Any, Filter | None, str]:
        state, seen = self._state, signature(self._pointer)
        if seen != state[0]:
            pointer = self._store.read()
            hidden = self._documents.intersection(pointer["tombstones"] if pointer else ())
            text = json.dumps(sorted(hidden)).encode() if hidden else b""
            digest = blake2b(text, digest_size=8).hexdigest() if hidden else ""
            state = self._state = (seen, hide(None, hidden), digest)
        return state


@dataclass(frozen=True)
class View:
    """One version with what it must not show."""

    key: Any  # which version
    index: VectorIndex
    hidden: frozenset[str]
    only: Filter | None  # ``hidden`` as a filter, made once


class PublishedIndex:
    """A :class:`VectorIndex` that is always the published one. Open with :func:`open_published`."""

    def __init__(self, settings: Settings) -> None:
        self.problem: str | None = None
        self._settings, self._store = settings, Store(settings)
        self._client = server.connect(settings) if settings.qdrant_url else None
        self._seen: Any = None
        self._view: View | None = None
        self._lock = threading.Lock()
        self._look()

    @property
    def manifest(self) -> dict[str, Any]:
        return self._look().index.manifest

    @property
    def count(self) -> int:
        """Chunks of the published version, those of deleted documents included."""
        return self._look().index.count

    def search(self, vector: np.ndarray, k: int, **asked: Unpack[Asked]) -> list[Hit]:
        view = self._look()
        only = asked.get("only")
        asked["only"] = view.only if only is None else hide(only, view.hidden)
        return view.index.search(vector, k, **asked)

    def chunks(self, documents: Collection[str] | None = None) -> Iterator[Chunk]:
        view = self._look()
        found = view.index.chunks(documents)
        return (chunk for chunk in found if chunk.doc_id not in view.hidden)

    def close(self) -> None:
        """A search that is under way ends in peace."""
        with self._lock:
            self._view = None

    def _look(self) -> View:
        """The view of now."""
        with self._lock:
            if self._client is not None:
                self._view = self._look_at_server(self._view)
                return self._view
            for _ in range(TRIES):
                seen = signature(self._store.pointer)
                if self._view is not None and seen == self._seen:
                    return self._view
                try:
                    self._view = self._look_at_files(self._view)
                    self._seen, self.problem = seen, None
                except (RatchetError, OSError) as error:
                    if seen != signature(self._store.pointer):
                        continue  # removed while it was opened: there is a newer one
                    if self._view is None:
                        raise
                    self._seen, self.problem = seen, str(error)
            assert self._view is not None
            return self._view

    def _look_at_files(self, now: View | None) -> View:
        pointer = self._store.current()
        hidden = frozenset(pointer["tombstones"])
        if now is not None:  # at once, for the new version may not open
            now = self._view = _view(now.key, now.index, hidden)
            if now.key == pointer["version"]:
                return now
        folder = self._settings.state_dir / pointer["path"]
        return _view(pointer["version"], _open_held(folder), hidden)

    def _look_at_server(self, now: View | None) -> View:
        held = server.describe(self._client, server.ALIAS)
        if held is None:
            raise NotFoundError(
                "No index has been published on this server yet.",
                where=f"QDRANT_URL, alias {server.ALIAS}",
                next="materialize `published_index`, or run `ratchet index publish`",
            )
        name = server.collection_of(held["manifest"]["content"])
        hidden = frozenset(held.get("tombstones", ()))
        if now is None or now.key != name:
            return _view(name, server.ServerIndex(self._client, name), hidden)
        return now if now.hidden == hidden else _view(name, now.index, hidden)


def open_published(settings: Settings) -> PublishedIndex:
    """The published index: of the server with QDRANT_URL, else of this checkout.

    Raises NotFoundError before the first publish, InputError when it is damaged.
    """
    return PublishedIndex(settings)


def signature(path: Path) -> tuple[int, int, int] | None:
    """Changes whenever the file is replaced; None while there is none."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _view(key: Any, index: VectorIndex, hidden: frozenset[str]) -> View:
    return View(key, index, hidden, hide(None, hidden))


def _open_held(folder: Path) -> VectorIndex:
    """Open a version and hold it: while the index lives, its folder is not collected."""
    hold = os.open(folder / MANIFEST, os.O_RDONLY)
    try:
        fcntl.flock(hold, fcntl.LOCK_SH)
        index = open_index(folder)
    except BaseException:
        os.close(hold)
        raise
    weakref.finalize(index, os.close, hold)
    return index
