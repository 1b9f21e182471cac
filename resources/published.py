"""Publishing: the newest knowledge that passed its checks, behind one pointer.

In: an index directory that a stage built, and the policy. Out: an immutable copy of it, the pointer
moved, a line in the ledger (``resources.versions``); with QDRANT_URL also a collection on that
server and its alias moved. In this order, so that a crash at any point leaves the old or the new
state, and publishing again finishes the work:

    checks, copy, upload, pointer, ledger line, alias, removal of old versions

*Tombstones.* Documents that an older version held and the newest does not must not be shown by
anybody from the moment the pointer moves, not even by a reader of an older version or after a
rollback. Their ids stand in the pointer itself, so there is no moment in between; a document that
comes back in a later publish leaves the list. ``rollback(restore=True)`` shows them again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.digests import file_md5, tree_md5
from contracts.errors import InputError, NotFoundError, QualityError
from contracts.params import Params
from contracts.settings import Settings
from resources.index import MANIFEST, documents, open_index, read_manifest, server
from resources.index.files import copy_sparse
from resources.versions import Store, summary, sync_folder

RECALL = "recall_at_10"  # against exact search, in the manifest


@dataclass(frozen=True)
class Policy:
    """What an index must show before it is published, and how many stay for rollback."""

    min_recall: float  # against exact search
    report: Path  # of the stage retrieval
    metric: str  # of that report
    min_golden: float
    keep: int

    @classmethod
    def of(cls, params: Params, data: Path) -> Policy:
        """The policy in params.yaml; ``data`` is the folder of the stages' outputs."""
        return cls(
            min_recall=params.index.min_recall,
            report=data / "retrieval" / "report.json",
            metric=f"recall_at_{params.retrieval.top_k[-1]}",
            min_golden=params.retrieval.min_recall,
            keep=params.index.keep,
        )


def publish(index: Path, settings: Settings, policy: Policy) -> dict[str, Any]:
    """Publish ``index``; returns the pointer. Publishing what is published changes nothing.

    Raises:
        InputError: the index is unfinished or damaged.
        QualityError: it is below the policy, or its golden report is missing or of another index.
        ServiceError: the server does not answer; the pointer has not moved.
    """
    manifest = read_manifest(index)
    golden = check(index, manifest, policy)
    store = Store(settings)
    with store.locked():
        version = manifest["content"][:32]
        folder = _keep_copy(index, store, version, manifest)
        before = store.read()
        there = set(documents(folder))
        hidden = sorted(_ever_shown(store, before) - there)
        _mirror(settings, folder)
        if before is None or (before["version"], before["tombstones"]) != (version, hidden):
            before = store.move(
                {
                    "event": "publish",
                    "version": version,
                    "md5": _md5(folder, manifest),
                    "path": str(folder.relative_to(settings.state_dir)),
                    "previous": _other(before, version),
                    "chunks": manifest["count"],
                    "documents": manifest["documents"],
                    "recall": manifest["recall"][RECALL],
                    "golden": {policy.metric: golden},
                    "tombstones": hidden,
                }
            )
        _promote(settings, store, before)
        _collect(store, policy.keep)
    return before


def check(index: Path, manifest: dict[str, Any], policy: Policy) -> float:
    """Refuse an index below the policy; returns its golden metric."""
    recall = manifest.get("recall", {}).get(RECALL)
    if recall is None or recall < policy.min_recall:
        raise QualityError(
            f"This index finds {'an unknown share' if recall is None else f'{recall:.4f}'} of the "
            f"true nearest neighbours; {policy.min_recall} is the least that is published.",
            where=str(index / MANIFEST),
            next="run `dvc repro index`; params.yaml: index.min_recall",
        )
    again = "run `dvc repro retrieval`"
    try:
        report = json.loads(policy.report.read_text(encoding="utf-8"))
        judged, value = report["index"], float(report["metrics"][policy.metric])
    except FileNotFoundError:
        raise QualityError(
            "This index was not tried on the golden questions.",
            where=str(policy.report),
            next=again,
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QualityError(
            f"The report of the golden questions cannot be used: {error!r}.",
            where=str(policy.report),
            next=again,
        ) from None
    if judged != manifest["content"]:
        raise QualityError(
            f"The golden questions were tried on another index ({str(judged)[:16]}) than this one "
            f"({manifest['content'][:16]}).",
            where=str(policy.report),
            next=again,
        )
    if not value >= policy.min_golden:  # NaN is refused too
        raise QualityError(
            f"{policy.metric} on the golden questions is {value:.4f}; {policy.min_golden} is the "
            "least that is published.",
            where=str(policy.report),
            next="read the missed questions in the report; params.yaml: retrieval.min_recall",
        )
    return value


def rollback(settings: Settings, to: str | None = None, restore: bool = False) -> dict[str, Any]:
    """Point at an older version that is still here; returns the pointer. Nothing is copied.

    Args:
        settings: whose pointer.
        to: the version, or the beginning of its name; None is the one published before this one.
        restore: show the documents of that version again which were deleted since.

    Raises:
        NotFoundError: there is no such version (any more).
    """
    store = Store(settings)
    with store.locked():
        before = store.current()
        version = _choose(store, before, to)
        folder = store.home / version
        manifest = read_manifest(folder)
        hidden = set(before["tombstones"])
        if restore:
            hidden -= set(documents(folder))
        entry = _published_line(store, version)
        _mirror(settings, folder)
        if (version, sorted(hidden)) != (before["version"], before["tombstones"]):
            before = store.move(
                {
                    **{key: entry[key] for key in ("md5", "path", "recall", "golden")},
                    "event": "rollback",
                    "version": version,
                    "previous": _other(before, version),
                    "chunks": manifest["count"],
                    "documents": manifest["documents"],
                    "tombstones": sorted(hidden),
                }
            )
        _promote(settings, store, before)
    return before


def collect(settings: Settings, keep: int) -> list[str]:
    """Remove versions beyond the newest ``keep``; never what is published or held by a reader."""
    store = Store(settings)
    with store.locked():
        return _collect(store, keep)


def published(settings: Settings) -> dict[str, Any] | None:
    """What is published: a line of the ledger, or None before the first publish."""
    pointer = Store(settings).read()
    return summary(pointer) if pointer else None


def published_path(settings: Settings) -> Path:
    """The folder of the published index. Raises NotFoundError before the first publish."""
    return settings.state_dir / str(Store(settings).current()["path"])


def versions(settings: Settings) -> list[dict[str, Any]]:
    """The ledger, oldest first, each line with ``stored`` (its version is here) and ``live``."""
    store = Store(settings)
    here, pointer = set(store.stored()), store.read()
    live = pointer["seq"] if pointer else None
    return [
        line | {"stored": line["version"] in here, "live": line["seq"] == live}
        for line in store.lines()
    ]


def tombstones(settings: Settings) -> frozenset[str]:
    """Ids of the documents that must not be shown, whichever version is read."""
    pointer = Store(settings).read()
    return frozenset(pointer["tombstones"] if pointer else ())


def _keep_copy(index: Path, store: Store, version: str, manifest: dict[str, Any]) -> Path:
    """The version's folder under ``home``; copied there, and compared, unless it is whole."""
    folder = store.home / version
    if folder.exists():
        try:
            read_manifest(folder)
            return folder
        except InputError:  # damaged after it was published: this publish heals it
            folder.rename(folder.with_suffix(".gone"))
    part = folder.with_suffix(".part")

    def copy(source: str, target: str) -> str:
        copy_sparse(Path(source), Path(target), durable=True)
        return target

    shutil.copytree(index, part, copy_function=copy)
    try:
        same = read_manifest(part, digests=True) == manifest
        wrong = []
    except InputError as error:
        same, wrong = False, error.offenders
    if not same:
        shutil.rmtree(part)
        raise InputError(
            "This index is damaged, or it changed while it was copied.",
            offenders=wrong,
            where=str(index),
            next="run `dvc repro index`, and publish when no `dvc repro` is running",
        )
    os.replace(part, folder)
    sync_folder(store.home)
    return folder


def _md5(folder: Path, manifest: dict[str, Any]) -> str:
    """The folder's digest as DVC has it, from the digests that were just compared."""
    files = {name: known["md5"] for name, known in manifest["files"].items()}
    return tree_md5({**files, MANIFEST: file_md5(folder / MANIFEST)})


def _ever_shown(store: Store, before: dict[str, Any] | None) -> set[str]:
    """Documents that somebody may still hold: of every stored version, and the hidden ones."""
    held: set[str] = set(before["tombstones"]) if before else set()
    for version in store.stored():
        with contextlib.suppress(InputError):  # damaged: nobody can read it
            held.update(documents(store.home / version))
    return held


def _other(before: dict[str, Any] | None, version: str) -> str | None:
    """The version left, or the one before it where only the tombstones change."""
    if before is None:
        return None
    value: str | None = before["version"] if before["version"] != version else before["previous"]
    return value


def _order(store: Store) -> list[str]:
    """Stored versions in the order of their (last) publish, oldest first."""
    names = [line["version"] for line in store.lines() if line["event"] == "publish"]
    here = set(store.stored())
    newest_first = dict.fromkeys(name for name in reversed(names) if name in here)
    return list(reversed(newest_first))


def _choose(store: Store, before: dict[str, Any], to: str | None) -> str:
    known = _order(store)
    if to is None:
        at = known.index(before["version"]) if before["version"] in known else 0
        found = known[at - 1 : at]
    else:
        found = [name for name in known if to and name.startswith(to)]
    if len(found) == 1:
        return found[0]
    what = "There is no earlier version" if to is None else f"'{to}' names {len(found)} versions"
    raise NotFoundError(
        f"{what} to go back to.",
        where=str(store.ledger),
        offenders=known,
        next="choose one of these with --to; `ratchet index versions` lists them",
    )


def _published_line(store: Store, version: str) -> dict[str, Any]:
    lines = [line for line in store.lines() if line["version"] == version]
    return next(line for line in reversed(lines) if line["event"] == "publish")


def _collect(store: Store, keep: int) -> list[str]:
    pointer = store.read()
    safe = {pointer["version"], pointer["previous"]} if pointer else set()
    old = [name for name in _order(store)[:-keep] if name not in safe]
    gone = []
    for name in old:
        if _held(store.home / name):
            continue
        if store.settings.qdrant_url:
            server.drop(server.connect(store.settings), f"ratchet-{name}")
        away = store.home / f"{name}.gone"
        (store.home / name).rename(away)
        store.note({"event": "collect", "version": name})
        shutil.rmtree(away, ignore_errors=True)
        gone.append(name)
    return gone


def _held(folder: Path) -> bool:
    """Whether a reader on this machine has this version open: it holds a lock on the manifest."""
    with (folder / MANIFEST).open("rb") as manifest:
        try:
            fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _mirror(settings: Settings, folder: Path) -> None:
    """With QDRANT_URL: the version as a collection, whole and checked."""
    if settings.qdrant_url:
        client, manifest = server.connect(settings), read_manifest(folder)
        if not server.is_whole(client, server.collection_of(manifest["content"])):
            with open_index(folder) as index:
                server.upload(client, index)


def _promote(settings: Settings, store: Store, pointer: dict[str, Any]) -> None:
    """With QDRANT_URL: the alias follows the pointer. Does nothing where it already does."""
    if not settings.qdrant_url:
        return
    folder = store.home / pointer["version"]
    manifest, there = read_manifest(folder), set(documents(folder))
    client, name = server.connect(settings), server.collection_of(manifest["content"])
    server.promote(client, name, sorted(there.intersection(pointer["tombstones"])))
