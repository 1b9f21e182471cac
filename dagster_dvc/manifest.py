"""The manifest: a project's resolved stages, cached so that loading the graph costs milliseconds.

In: the project's root. Out: ``Manifest`` (typed, frozen). Why: resolving ``dvc.yaml`` takes DVC
itself (about 1 CPU second), and Dagster loads its definitions again in every process that it
starts. So the answer is kept under ``.dvc/tmp/dagster_dvc/`` together with the hash of every file
that it depends on (``dvc.yaml``, ``params.yaml``, files named in ``vars`` and ``params``, DVC's
configuration) and DVC's version; it is used while all of them match, and rebuilt by a process of
its own otherwise. DVC is never imported here.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import InvalidProject, Offence, ProjectNotFound, ResolveFailed
from .yaml12 import stage_lines

FORMAT = 1
INTERNALS = Path(__file__).with_name("_dvc_internals.py")
_RESOLVE_TIMEOUT_S = 120.0  # 1 s when quiet; a box with a load of 20 needed 25


@dataclass(frozen=True)
class Dep:
    """A file or folder that a stage reads. ``path`` is from the project's root, with slashes."""

    path: str
    lock_path: str  # as dvc.lock spells it (from the stage's wdir)
    local: bool  # False: an address (s3://…); its version is what dvc.lock says


@dataclass(frozen=True)
class Params:
    """The parameters that a stage reads from one file, with their current values."""

    path: str
    lock_path: str
    keys: tuple[str, ...]  # empty: the whole file
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Out:
    """A file or folder that a stage writes."""

    path: str
    lock_path: str
    local: bool
    cache: bool
    metric: bool
    plot: bool
    persist: bool

    @property
    def artifact(self) -> bool:
        """Whether this is what the stage is *for*: cached, neither a metric nor a plot."""
        return self.cache and not self.metric and not self.plot


@dataclass(frozen=True)
class ResolvedStage:
    """One stage as DVC runs it: a plain stage, or one key of a ``foreach``/``matrix``.

    ``name`` is DVC's own (``documents@docs``), ``asset`` the entry in ``dvc.yaml``
    (``documents``), ``key`` what follows the ``@`` or None.
    """

    name: str
    asset: str
    key: str | None
    cmd: str | Sequence[str]
    wdir: str
    desc: str | None
    meta: Mapping[str, Any]
    frozen: bool
    always_changed: bool
    deps: tuple[Dep, ...]
    params: tuple[Params, ...]
    outs: tuple[Out, ...]

    @property
    def main(self) -> Out | None:
        """The artifact: the one cached output that is neither metric nor plot, if there is one."""
        found = [out for out in self.outs if out.artifact]
        return found[0] if len(found) == 1 else None

    @property
    def metrics(self) -> tuple[Out, ...]:
        return tuple(out for out in self.outs if out.metric)


@dataclass(frozen=True)
class Stage:
    """One entry under ``stages:`` in ``dvc.yaml``, which becomes one asset.

    ``keys`` are the ``foreach``/``matrix`` keys in file order, empty for a plain stage;
    ``resolved`` has one ``ResolvedStage`` per key, or one under None.
    """

    name: str
    keys: tuple[str, ...]
    resolved: Mapping[str | None, ResolvedStage]
    line: int | None = None

    @property
    def first(self) -> ResolvedStage:
        """Any of the resolved stages: they share ``desc`` and ``meta``."""
        return next(iter(self.resolved.values()))

    @property
    def partitioned(self) -> bool:
        return None not in self.resolved

    @property
    def cmd(self) -> str | Sequence[str]:
        return self.first.cmd

    @property
    def deps(self) -> tuple[Dep, ...]:
        return tuple({dep.path: dep for one in self.resolved.values() for dep in one.deps}.values())

    @property
    def outs(self) -> tuple[Out, ...]:
        return tuple({out.path: out for one in self.resolved.values() for out in one.outs}.values())

    @property
    def params(self) -> tuple[Params, ...]:
        return self.first.params

    @property
    def desc(self) -> str | None:
        return self.first.desc

    @property
    def dagster_meta(self) -> Mapping[str, Any]:
        """The block ``meta.dagster`` of the stage."""
        block = (self.first.meta or {}).get("dagster") or {}
        return block if isinstance(block, Mapping) else {"": block}


@dataclass(frozen=True)
class Manifest:
    """Everything that DVC had to be asked about a project."""

    root: Path
    dvc_dir: Path
    cache: Path
    remote: Mapping[str, str] | None
    inputs: tuple[str, ...]
    stages: Mapping[str, Stage]
    identity: str  # changes whenever the answer may have changed
    makers: Mapping[str, tuple[ResolvedStage, Out]] = field(default_factory=dict)  # by path

    def node(self, stage: str, key: str | None = None) -> ResolvedStage:
        """The resolved stage of an asset (and partition).

        Raises:
            KeyError: there is no such stage or key; the message names those that exist.
        """
        if stage not in self.stages:
            raise KeyError(f"no stage {stage!r}; there are {', '.join(self.stages)}")
        resolved = self.stages[stage].resolved
        if key not in resolved:
            keys = ", ".join(map(str, resolved))
            raise KeyError(f"stage {stage!r} has no key {key!r}; it has {keys}")
        return resolved[key]


def find_dvc_dir(root: Path) -> Path:
    """The nearest ``.dvc`` folder in or above ``root``.

    Raises:
        ProjectNotFound: there is none, or ``root`` has no ``dvc.yaml``.
    """
    if not (root / "dvc.yaml").is_file():
        raise ProjectNotFound(f"{root} has no dvc.yaml: pass the folder that has one.")
    for folder in (root, *root.parents):
        if (folder / ".dvc").is_dir():
            return folder / ".dvc"
    raise ProjectNotFound(f"no .dvc folder in or above {root}: run `dvc init` there first.")


def _file_hash(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None


def _environment() -> dict[str, str]:
    """What the answer depends on besides the project's files."""
    return {
        "format": str(FORMAT),
        "dvc": metadata.version("dvc"),
        "resolver": str(_file_hash(INTERNALS)),
    }


def _cache_file(root: Path, dvc_dir: Path) -> Path:
    where = hashlib.sha256(os.path.relpath(root, dvc_dir.parent).encode()).hexdigest()[:12]
    return dvc_dir / "tmp" / "dagster_dvc" / f"manifest-{where}.json"


def _read_cache(path: Path, root: Path) -> dict[str, Any] | None:
    """The kept answer, if every file that it depends on is still the same."""
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if kept.get("environment") != _environment():
        return None
    if kept["root"] != str(root) and not kept["answer"]["portable"]:
        return None
    if any(_file_hash(root / name) != seen for name, seen in kept["hashes"].items()):
        return None
    return dict(kept)


def internals_command(*arguments: str) -> list[str]:
    """The command line of ``_dvc_internals.py`` in a process of its own."""
    return [sys.executable, "-P", str(INTERNALS), *arguments]


def _ask_dvc(root: Path) -> dict[str, Any]:
    """Run the resolver in a process of its own.

    Raises:
        ResolveFailed: DVC could not load the project; carries DVC's words.
    """
    env = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    command = internals_command("resolve", str(root))
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=_RESOLVE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise ResolveFailed(
            f"DVC took more than {_RESOLVE_TIMEOUT_S:.0f} s to load {root / 'dvc.yaml'}. "
            "Look at `dvc stage list` there."
        ) from error
    if done.returncode != 0:
        raise ResolveFailed(
            f"DVC cannot load {root / 'dvc.yaml'}: {done.stderr.strip()[-2000:]}\n"
            "Next: `dvc stage list` in that folder shows the same error."
        )
    return dict(json.loads(done.stdout))


def _write_cache(path: Path, kept: Mapping[str, Any]) -> None:
    """Replace the kept answer atomically; a read-only checkout simply pays each time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as draft:
            json.dump(kept, draft)
        Path(draft.name).replace(path)
    except OSError:
        return


def _resolved(raw: Mapping[str, Any]) -> ResolvedStage:
    known = {**raw}
    known["deps"] = tuple(Dep(**dep) for dep in raw["deps"])
    known["params"] = tuple(
        Params(p["path"], p["lock_path"], tuple(p["keys"]), p["values"]) for p in raw["params"]
    )
    known["outs"] = tuple(Out(**out) for out in raw["outs"])
    return ResolvedStage(**known)


def _group(raw: Sequence[Mapping[str, Any]], lines: Mapping[str, int]) -> dict[str, Stage]:
    grouped: dict[str, dict[str | None, ResolvedStage]] = {}
    for one in raw:
        grouped.setdefault(one["asset"], {})[one["key"]] = _resolved(one)
    return {
        name: Stage(
            name=name,
            keys=tuple(key for key in resolved if key is not None),
            resolved=resolved,
            line=lines.get(name),
        )
        for name, resolved in grouped.items()
    }


def _refuse(errors: Mapping[str, str], lines: Mapping[str, int]) -> None:
    offences = [
        Offence(
            where=f"dvc.yaml:{lines[name]}" if name in lines else "dvc.yaml",
            what=f"stage {name!r}: {message}" if name else message,
            advice="DVC refuses it as well: `dvc stage list` shows the same.",
        )
        for name, message in errors.items()
    ]
    if offences:
        raise InvalidProject(offences)


def load(root: Path) -> Manifest:
    """The project's manifest, from the cache where nothing has changed.

    Raises:
        ProjectNotFound: no ``dvc.yaml`` or no ``.dvc``.
        ResolveFailed: DVC cannot read the file at all.
        InvalidProject: DVC refuses some stages; all of them are listed.
    """
    root = root.resolve()
    dvc_dir = find_dvc_dir(root)
    path = _cache_file(root, dvc_dir)
    kept = _read_cache(path, root)
    if kept is None:
        before = {name: _file_hash(root / name) for name in ("dvc.yaml", "params.yaml")}
        answer = _ask_dvc(root)
        hashes = {name: _file_hash(root / name) for name in answer["inputs"]} | before
        kept = {
            "environment": _environment(),
            "root": str(root),
            "hashes": hashes,
            "answer": answer,
        }
        _write_cache(path, kept)
    answer = kept["answer"]
    lines = stage_lines((root / "dvc.yaml").read_text())
    _refuse(answer["errors"], lines)
    stages = _group(answer["stages"], lines)
    canonical = json.dumps([kept["environment"], kept["hashes"]], sort_keys=True)
    return Manifest(
        root=root,
        dvc_dir=(root / answer["dvc_dir"]).resolve(),
        cache=(root / answer["cache"]).resolve(),
        remote=answer["remote"],
        inputs=tuple(answer["inputs"]),
        stages=stages,
        identity=hashlib.sha256(canonical.encode()).hexdigest()[:16],
        makers={
            out.path: (one, out)
            for stage in stages.values()
            for one in stage.resolved.values()
            for out in one.outs
        },
    )
