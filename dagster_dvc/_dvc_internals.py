"""The one file that touches DVC's insides.

``_dvc_internals.py resolve ROOT`` prints a project's resolved ``dvc.yaml`` as one JSON document
(the *manifest*, see ``manifest.py``). ``_dvc_internals.py push-uncached ROOT STAGE`` uploads the
outputs of a stage that are not cached (metrics with ``cache: false``): ``dvc push --run-cache``
uploads the record of a run that names them, and not their bytes (DVC 3.67), so that another
checkout could not restore the run.

Why: interpolation, ``foreach``, ``matrix``, ``vars`` and the defaults of DVC's configuration are
DVC's business; asking DVC is the only way to agree with it. The price, about 1.3 CPU seconds of
imports, is paid by a process of its own and only when a file that the answer depends on has
changed. Run as a script (``python -P``): it imports nothing of this package, so
that Dagster (2 s) is not imported for it.

DVC offers no public API for this. The names used here exist in the versions of ``SUPPORTED``;
``tests/dagster_dvc/test_dvc_contract.py`` is the contract test that a new DVC version has to pass
before the bound moves.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

SUPPORTED = ((3, 60), (3, 68))  # [from, below)


class Unsupported(Exception):
    """The installed DVC is outside the tested range."""


def _check_version() -> str:
    from dvc import __version__

    parts = tuple(int(part) for part in __version__.split(".")[:2])
    if not SUPPORTED[0] <= parts < SUPPORTED[1]:
        low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
        raise Unsupported(
            f"DVC {__version__} is installed; dagster_dvc reads the insides of DVC "
            f">={low},<{high}. Install one of those, or run the contract test and move "
            f"SUPPORTED in {__file__}."
        )
    return str(__version__)


def _posix(path: str, root: str) -> str:
    return os.path.relpath(path, root).replace(os.sep, "/")


def _dependency(dep: Any, root: str) -> dict[str, Any]:
    """One dependency: ``path`` from the root where it is a file of this checkout."""
    local = dep.protocol == "local" and type(dep).__name__ == "Dependency"
    return {
        "path": _posix(dep.fs_path, root) if local else str(dep),
        "lock_path": dep.def_path,
        "local": local,
    }


def _params(dep: Any, root: str) -> dict[str, Any]:
    """The parameters of one file, with the values that DVC would lock now."""
    path = _posix(dep.fs_path, root)
    return {
        "path": path,
        "lock_path": dep.def_path,
        "keys": list(dep.params),  # empty: the whole file
        "values": dep.read_params() if dep.exists else {},
    }


def _output(out: Any, root: str) -> dict[str, Any]:
    local = out.protocol == "local"
    return {
        "path": _posix(out.fs_path, root) if local else str(out),
        "lock_path": out.def_path,
        "local": local,
        "cache": bool(out.use_cache),
        "metric": bool(out.metric),
        "plot": bool(out.plot),
        "persist": bool(out.persist),
    }


def _stage(name: str, stage: Any, definition: str, root: str) -> dict[str, Any]:
    from dvc.dependency import ParamsDependency

    key = name[len(definition) + 1 :] if name != definition else None
    return {
        "name": name,
        "asset": definition,
        "key": key,
        "cmd": stage.cmd,
        "wdir": _posix(stage.wdir, root),
        "desc": stage.desc,
        "meta": stage.meta or {},
        "frozen": bool(stage.frozen),
        "always_changed": bool(stage.always_changed or stage.is_callback),
        "deps": [_dependency(d, root) for d in stage.deps if not isinstance(d, ParamsDependency)],
        "params": [_params(d, root) for d in stage.deps if isinstance(d, ParamsDependency)],
        "outs": [_output(out, root) for out in stage.outs],
    }


def _context_files(resolver: Any, root: str) -> set[str]:
    """Every file that interpolation read: ``params.yaml`` and what ``vars`` name."""
    imports = set(resolver.context.imports)
    return {_posix(str(Path(root, str(path))), root) for path in imports}


def _stage_vars(contents: dict[str, Any], root: str) -> set[str]:
    """Files named in ``vars`` of single stages, without their ``:key`` suffixes."""
    found: set[str] = set()
    for entry in (contents.get("stages") or {}).values():
        body = entry.get("do", entry) if isinstance(entry, dict) else {}
        wdir = str(body.get("wdir") or ".")
        for item in body.get("vars") or ():
            if isinstance(item, str):
                path = item.partition(":")[0]
                found.add(_posix(str(Path(root, wdir, path)), root))
    return found


def _remote(repo: Any) -> dict[str, str] | None:
    """Name and address of the default remote, relative addresses made absolute."""
    name = repo.config["core"].get("remote")
    if not name:
        return None
    return {"name": name, "url": str(repo.config["remote"].get(name, {}).get("url", ""))}


def resolve(root: str) -> dict[str, Any]:
    """Resolve the ``dvc.yaml`` in ``root``.

    Returns:
        ``stages`` in file order, ``errors`` (stage → DVC's message), ``inputs`` (every file that
        the answer depends on, from the root), ``dvc``, ``cache`` (folder of file objects),
        ``dvc_dir``, ``remote``, and ``portable``: whether it holds for a copy elsewhere too.

    Raises:
        Unsupported: the installed DVC is outside the tested range.
        dvc.exceptions.DvcException: the file cannot be loaded at all.
    """
    version = _check_version()
    from dvc.dvcfile import load_file
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.repo.index import Index

    root = os.path.realpath(root)
    os.chdir(root)  # DVC words its messages relative to the current folder
    with Repo(root) as repo:
        loader = load_file(repo, str(Path(root, "dvc.yaml"))).stages
        resolver = loader.resolver
        stages: list[dict[str, Any]] = []
        loaded: list[Any] = []
        errors: dict[str, str] = {}
        inputs = {"dvc.yaml", "params.yaml"}
        inputs |= _context_files(resolver, root) | _stage_vars(loader.data, root)
        for definition_name, definition in resolver.definitions.items():
            generated = hasattr(definition, "get_generated_names")
            try:
                names = definition.get_generated_names() if generated else [definition_name]
                for name in names:
                    stage = loader[name]
                    stages.append(_stage(name, stage, definition_name, root))
                    loaded.append(stage)
            except (DvcException, ValueError, TypeError) as error:
                errors[definition_name] = str(error)
        for stage in stages:
            inputs |= {params["path"] for params in stage["params"]}
        if not errors:
            try:
                Index(repo, stages=loaded).check_graph()  # cycles, outputs that two stages claim
            except DvcException as error:
                errors[""] = str(error)
        dvc_dir = str(repo.dvc_dir)
        inputs |= {_posix(str(Path(dvc_dir, name)), root) for name in ("config", "config.local")}
        cache, remote = str(repo.cache.local.path), _remote(repo)
        return {
            "dvc": version,
            "dvc_dir": _posix(dvc_dir, root),
            "cache": _posix(cache, root) if cache.startswith(dvc_dir) else cache,
            "remote": remote,
            "portable": cache.startswith(dvc_dir) and "://" in (remote or {"url": "://"})["url"],
            "inputs": sorted(inputs),
            "stages": stages,
            "errors": errors,
        }


def push_uncached(root: str, stage: str) -> int:
    """Upload the uncached outputs of a stage, which its last run left in the cache.

    Returns:
        How many objects it asked the remote to have.
    """
    _check_version()
    from dvc.dvcfile import load_file
    from dvc.repo import Repo

    root = os.path.realpath(root)
    with Repo(root) as repo:
        loaded = load_file(repo, str(Path(root, "dvc.yaml"))).stages[stage]
        objects = {out.hash_info for out in loaded.outs if out.hash_info and not out.use_cache}
        failed = repo.cloud.push(objects).failed if objects else ()
        if failed:
            raise OSError(f"{len(failed)} of {len(objects)} objects could not be uploaded")
        return len(objects)


COMMANDS: dict[str, Any] = {"resolve": resolve, "push-uncached": push_uncached}


def main(arguments: list[str]) -> int:
    """Print a command's answer as JSON, or one line of explanation with exit code 1."""
    from contextlib import redirect_stdout

    try:
        with redirect_stdout(sys.stderr):  # DVC's loggers print to stdout
            answer = COMMANDS[arguments[0]](*arguments[1:])
    except Exception as error:  # the parent shows it; a traceback through DVC helps nobody
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    json.dump(answer, sys.stdout, default=str)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
