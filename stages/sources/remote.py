"""Any address that fsspec understands: s3://, gs://, https://, memory://, …

An object store's package (s3fs, gcsfs, adlfs) is installed by whoever uses one; credentials are
those that the package finds by itself. ``file://`` is read as the folder that it names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

from contracts.errors import ConfigError, ServiceError
from stages.sources import containers
from stages.sources.files import File, Limits, Selection, reason, shown, split_glob
from stages.sources.folder import local_files

#: Bytes that are fetched at once: fsspec fetches the files of one call concurrently.
FETCH = 32 << 20


def remote_files(uri: str, key: str, selection: Selection, limits: Limits) -> Iterator[File]:
    """Files below the address. Raises ConfigError (no such protocol), ServiceError (no answer)."""
    address = urlsplit(uri)
    if address.scheme == "file":
        yield from local_files(unquote(address.path), key, selection, limits)
        return
    base, glob = split_glob(uri) if address.scheme not in ("http", "https") else (uri, None)
    system, root = _connect(base)
    wanted = Selection([glob], selection.exclude) if glob else selection
    found = _list(system, root, uri)
    if list(found) == [root]:
        name = root.rstrip("/").rsplit("/", 1)[-1]
        yield from _single(system, root, shown(name), found[root], selection, limits)
        return
    ready: list[tuple[str, str]] = []
    waiting = 0
    for path, count in found.items():
        name = shown(path.removeprefix(root).lstrip("/"))
        if not wanted.wants(name) or (glob and selection.include and not selection.wants(name)):
            continue
        if containers.is_container(name):
            yield from _container(system, path, name, selection.members(), limits, prefix=True)
        elif problem := limits.too_large(count):
            yield File(name, problem=problem)
        else:
            ready.append((path, name))
            waiting += count
        if waiting > FETCH:
            yield from _fetch(system, ready)
            ready, waiting = [], 0
    yield from _fetch(system, ready)


def _connect(uri: str) -> tuple[Any, str]:
    """The file system of an address and the path inside it."""
    from fsspec.core import url_to_fs

    try:
        system, root = url_to_fs(uri)
    except ImportError as error:  # fsspec's words: "Install s3fs to access S3"
        raise ConfigError(
            f"The package that reads {uri.split('://')[0]}:// addresses is missing: {error}.",
            where=f"params.yaml: documents.sources, {uri}",
            next="install that package, or take the source out of params.yaml",
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"An address that cannot be read: {reason(error)}.",
            where=f"params.yaml: documents.sources, {uri}",
            next="use a protocol of fsspec, such as s3://, gs://, https://",
        ) from None
    return system, str(root).rstrip("/")


def _list(system: Any, root: str, uri: str) -> dict[str, int]:
    """Path and bytes (0 where unknown) of every file at or below ``root``, in order."""
    try:
        info = system.info(root)
        if info["type"] == "file":
            return {root: int(info.get("size") or 0)}
        found = system.find(root, detail=True)
    except Exception as error:  # every protocol raises its own
        raise ServiceError(
            f"The address cannot be listed: {type(error).__name__}: {reason(error)}",
            where=uri,
            next="check documents.sources in params.yaml, the network and the credentials",
        ) from None
    return {path: int(found[path].get("size") or 0) for path in sorted(found)}


def _single(
    system: Any, path: str, name: str, count: int, selection: Selection, limits: Limits
) -> Iterator[File]:
    if containers.is_container(name):
        yield from _container(system, path, name, selection, limits, prefix=False)
    elif problem := limits.too_large(count):
        yield File(name, problem=problem)
    else:
        yield from _fetch(system, [(path, name)])


def _fetch(system: Any, ready: list[tuple[str, str]]) -> Iterator[File]:
    """The bytes of those (path, name); one that cannot be had is yielded with its problem."""
    if not ready:
        return
    try:
        found = system.cat([path for path, _ in ready], on_error="return")
    except Exception as error:
        found = dict.fromkeys((path for path, _ in ready), error)
    for path, name in ready:
        value = found.get(path, FileNotFoundError("it vanished"))
        if isinstance(value, bytes):
            yield File(name, value)
        else:
            yield File(name, problem=f"cannot be read: {type(value).__name__}: {reason(value)}")


def _container(
    system: Any, path: str, name: str, selection: Selection, limits: Limits, *, prefix: bool
) -> Iterator[File]:
    try:
        stream = system.open(path, "rb")
    except Exception as error:
        yield File(name, problem=f"cannot be read: {type(error).__name__}: {reason(error)}")
        return
    with stream:
        yield from containers.members(name, stream, selection, limits, prefix=prefix)
