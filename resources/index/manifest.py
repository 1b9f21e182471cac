"""The manifest of an index directory: written last, so that a directory without one is no index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts.digests import file_md5
from contracts.errors import InputError
from contracts.params import Index

if TYPE_CHECKING:
    import numpy as np

FORMAT = 2
MANIFEST = "manifest.json"
DOCUMENTS = "documents.json"  # the sorted doc_ids of all chunks
ORDER = "order.bin"  # the engine's ids (uint32) by chunk id; absent where they are 0, 1, 2 …
REBUILD = "build it again: dvc repro index (or dvc pull index)"


def row_bytes(row: Mapping[str, Any]) -> bytes:
    """The values of a row as they go into its digests."""
    return json.dumps(list(row.values()), ensure_ascii=False).encode()


def content_id(lines: Iterable[bytes], vectors: np.ndarray, recipe: dict[str, Any]) -> str:
    """SHA-256 of what the index holds and how it was to be built, whatever the engine's files.

    ``lines`` are the :func:`row_bytes` of its rows, ``vectors`` theirs.
    """
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    for line in lines:
        digest.update(line)
    digest.update(vectors.astype("<f4", order="C", copy=False).data.cast("B"))
    return digest.hexdigest()


def recipe(params: Index, model: dict[str, Any], words: dict[str, Any]) -> dict[str, Any]:
    """All that shapes an index beside its rows and vectors."""
    names = {"hnsw_m", "ef_construct", "exact_below", "quantise_above", "search"}
    chosen = params.model_dump(mode="json", include=names)
    return {"format": FORMAT, "params": chosen, "model": model, "words": words}


def list_files(path: Path) -> dict[str, dict[str, Any]]:
    """Length and MD5 of every file of an index but the manifest."""
    return {
        item.relative_to(path).as_posix(): {"bytes": item.stat().st_size, "md5": file_md5(item)}
        for item in sorted(path.rglob("*"))
        if item.is_file() and item.name != MANIFEST
    }


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    part = path / (MANIFEST + ".part")
    part.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(path / MANIFEST)


def certify(path: Path, recall: dict[str, float]) -> dict[str, Any]:
    """Add the measured recall to the manifest of a just built index."""
    manifest = {**read_manifest(path), "recall": recall}
    write_manifest(path, manifest)
    return manifest


def read_manifest(path: Path, *, digests: bool = False) -> dict[str, Any]:
    """The manifest of a whole index directory; with ``digests`` every byte is compared.

    Raises InputError listing what is wrong.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        known, files = manifest["format"], manifest["files"]
        if known == FORMAT:
            _ = manifest["count"], manifest["exact"], manifest["search"], manifest["content"]
            _ = manifest["model"]["digest"]
    except FileNotFoundError:
        what = "There is no index here." if not path.is_dir() else "This index is unfinished."
        raise InputError(what, where=str(path / MANIFEST), next=REBUILD) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"The manifest of this index cannot be read: {error!r}.",
            where=str(path / MANIFEST),
            next=REBUILD,
        ) from None
    if known != FORMAT:
        raise InputError(
            f"This index has format {known}; this version reads format {FORMAT}.",
            where=str(path / MANIFEST),
            next=REBUILD,
        )
    wrong = list(_damage(path, files, digests))
    if wrong:
        raise InputError("This index is damaged.", offenders=wrong, where=str(path), next=REBUILD)
    return manifest


def documents(path: Path) -> list[str]:
    """The doc_ids of an index directory, sorted. Raises InputError."""
    try:
        value: list[str] = json.loads((path / DOCUMENTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"The list of documents of this index cannot be read: {error}",
            where=str(path / DOCUMENTS),
            next=REBUILD,
        ) from None
    return value


def _damage(path: Path, files: dict[str, dict[str, Any]], digests: bool) -> Iterable[str]:
    """Files of the manifest that are missing or not as they were written."""
    for name, known in files.items():
        item = path / name
        if not item.is_file():
            yield f"{name}: missing"
        elif item.stat().st_size != known["bytes"]:
            yield f"{name}: {item.stat().st_size} bytes, not {known['bytes']}"
        elif digests and file_md5(item) != known["md5"]:
            yield f"{name}: other bytes than were written"
