"""What DVC's files say, at one moment: versions, and which stage is stale because of what.

In: the manifest, the parsed lock, a hash function for the workspace. Out: ``State``. Why: Dagster
asks for versions in processes that should not pay for DVC, and the sync sensor has to know DVC's
verdict on every stage without taking DVC's locks. Pure: reads files only through the functions it
is given. ``tests/dagster_dvc/test_dvc_staleness.py`` compares its verdicts with ``dvc status``.

A stage's *code version* hashes its command, the parameters it uses, its code dependencies and the
paths of its outputs. Its *data version* is the md5 of its artifact in the lock. Where another stage
reads one of its metrics or plots, a digest of those is appended, or a change of them would go
unseen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .hashing import directory_entries
from .lockfile import LockedStage
from .manifest import Dep, Manifest, Out, ResolvedStage, Stage

Hash = Callable[[str], "str | None"]


def _canonical(value: Any) -> Any:
    """A JSON value, equal exactly where DVC finds parameters equal (1 == 1.0 == True)."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, (int, float, str, type(None))) else str(value)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of plain values, 16 hex digits."""
    text = json.dumps(_canonical(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Upstream:
    """One thing that a stage reads: the outputs of other stages, or a source.

    Exactly one of ``asset`` (with ``key``) and ``source`` (a path) is set.
    """

    asset: str | None = None
    key: str | None = None
    source: str | None = None

    def __str__(self) -> str:
        if self.source is not None:
            return self.source
        return f"{self.asset}@{self.key}" if self.key is not None else str(self.asset)


@dataclass(frozen=True)
class Verdict:
    """DVC's opinion of one resolved stage, from its files.

    Args:
        recorded: the lock has an entry for it.
        data_version: of its artifact, None where it never ran.
        code_fresh: command, parameters and code are those of the lock.
        inputs: each upstream → whether the stage consumed what is there now.
    """

    recorded: bool
    data_version: str | None
    code_fresh: bool
    inputs: Mapping[Upstream, bool]

    @property
    def fresh(self) -> bool:
        return self.recorded and self.code_fresh and all(self.inputs.values())

    def reasons(self) -> list[str]:
        """Why it is stale, for people; [] when it is fresh."""
        if not self.recorded:
            return ["never ran"]
        found = [] if self.code_fresh else ["command, parameters or code changed"]
        return found + [f"{up} changed" for up, fresh in self.inputs.items() if not fresh]


def _overlap(dep: str, out: str) -> bool:
    return dep == out or dep.startswith(out + "/") or out.startswith(dep + "/") or dep == "."


class State:
    """The project at one moment. Cheap to make: everything is computed when asked for.

    Args:
        manifest: the resolved stages.
        lock: the parsed ``dvc.lock``.
        md5: hash of a path of the workspace (from the root), None where there is nothing.
        is_code: whether an external dependency is code: part of the code version, not a source.
    """

    def __init__(
        self,
        manifest: Manifest,
        lock: Mapping[str, LockedStage],
        md5: Hash,
        is_code: Callable[[str], bool],
    ) -> None:
        self.manifest = manifest
        self.lock = lock
        self._is_code = is_code
        self._md5 = md5
        self._hashes: dict[str, str | None] = {}

    # -- the graph -----------------------------------------------------------------------------

    def producers(self, dep: Dep) -> list[tuple[ResolvedStage, Out]]:
        """The stages (and outputs) that a dependency overlaps with."""
        if not dep.local:
            return []
        makers = self.manifest.makers
        if dep.path in makers:  # the ordinary case, without a scan
            return [makers[dep.path]]
        return [maker for path, maker in makers.items() if _overlap(dep.path, path)]

    def code_deps(self, node: ResolvedStage) -> list[Dep]:
        """The dependencies that count as code."""
        return [
            dep
            for dep in node.deps
            if dep.local and not self.producers(dep) and self._is_code(dep.path)
        ]

    def upstreams(self, node: ResolvedStage) -> dict[Upstream, list[Dep]]:
        """What a stage reads besides code, with the dependencies that say so."""
        if node.frozen:  # DVC cuts a frozen stage off from what it reads
            return {}
        code = {dep.path for dep in self.code_deps(node)}
        found: dict[Upstream, list[Dep]] = {}
        for dep in node.deps:
            if dep.path in code:
                continue
            makers = {(one.asset, one.key): None for one, _ in self.producers(dep)}
            for asset, key in makers:
                found.setdefault(Upstream(asset=asset, key=key), []).append(dep)
            if not makers:
                found.setdefault(Upstream(source=dep.path), []).append(dep)
        return found

    def unread(self, node: ResolvedStage) -> list[Upstream]:
        """What other keys of the same ``foreach`` read, and this one does not.

        Dagster knows dependencies of assets, not of partitions, and expects them all of each.
        """
        own = set(self.upstreams(node))
        others = self.manifest.stages[node.asset].resolved.values()
        return list(
            dict.fromkeys(up for one in others for up in self.upstreams(one) if up not in own)
        )

    @cached_property
    def sources(self) -> dict[str, Dep]:
        """Everything that is read, not made by a stage and not code: path → dependency."""
        found: dict[str, Dep] = {}
        for stage in self.manifest.stages.values():
            for node in stage.resolved.values():
                for upstream, deps in self.upstreams(node).items():
                    if upstream.source is not None:
                        found.setdefault(upstream.source, deps[0])
        return dict(sorted(found.items()))

    @cached_property
    def _read_outs(self) -> set[str]:
        """Outputs that some other stage reads."""
        return {
            out.path
            for stage in self.manifest.stages.values()
            for node in stage.resolved.values()
            for dep in node.deps
            for _, out in self.producers(dep)
        }

    # -- versions ------------------------------------------------------------------------------

    def md5(self, path: str) -> str | None:
        """The workspace's hash of a path, computed once per State."""
        if path not in self._hashes:
            self._hashes[path] = self._md5(path)
        return self._hashes[path]

    def source_version(self, path: str) -> str | None:
        """The version of a source: its md5, or for an address what the lock last saw."""
        dep = self.sources[path]
        if dep.local:
            return self.md5(path)
        seen = (entry.deps.get(dep.lock_path) for entry in self.lock.values())
        return next((one.md5 for one in seen if one is not None), None)

    def workspace_code(self, node: ResolvedStage) -> str:
        """The code version of what the files say now."""
        if node.frozen and node.name in self.lock:
            return self.locked_code(node) or ""
        params = {params.lock_path: dict(params.values) for params in node.params}
        code = {dep.lock_path: self.md5(dep.path) for dep in self.code_deps(node)}
        outs = sorted(out.lock_path for out in node.outs)
        return digest({"cmd": node.cmd, "params": params, "code": code, "outs": outs})

    def locked_code(self, node: ResolvedStage) -> str | None:
        """The code version of what DVC recorded, seen through today's definition of the stage.

        What the definition no longer names is left out, as DVC leaves it out.
        """
        locked = self.lock.get(node.name)
        if locked is None:
            return None
        params = {}
        for one in node.params:
            seen = locked.params.get(one.lock_path, {})
            params[one.lock_path] = {
                key: value for key, value in seen.items() if not one.keys or key in one.keys
            }
        files = {dep.lock_path: locked.deps.get(dep.lock_path) for dep in self.code_deps(node)}
        code = {path: seen.md5 if seen else None for path, seen in files.items()}
        outs = sorted(out.lock_path for out in node.outs if out.lock_path in locked.outs)
        return digest({"cmd": locked.cmd, "params": params, "code": code, "outs": outs})

    def code_version(self, stage: Stage) -> str:
        """The code version of an asset: that of its stage, or a digest of all its partitions'."""
        if not stage.partitioned:
            return self.workspace_code(stage.first)
        return digest({str(k): self.workspace_code(one) for k, one in stage.resolved.items()})

    def recorded_code_version(self, node: ResolvedStage) -> str:
        """The code version to record for a materialization of ``node``.

        The asset's own where the lock agrees with the files; otherwise one that differs from it,
        so that Dagster shows the asset as stale.
        """
        if self.code_fresh(node):
            return self.code_version(self.manifest.stages[node.asset])
        return f"other-{self.locked_code(node)}"

    def code_fresh(self, node: ResolvedStage) -> bool:
        """Whether command, parameters and code are those that DVC recorded."""
        locked = self.locked_code(node)
        if node.always_changed or locked is None:
            return False
        return locked == self.workspace_code(node)

    def data_version(self, node: ResolvedStage) -> str | None:
        """The md5 of the artifact in the lock; None where the stage never ran."""
        locked = self.lock.get(node.name)
        if locked is None:
            return None
        md5s = {
            out.path: locked.outs[out.lock_path].md5
            for out in node.outs
            if out.lock_path in locked.outs
        }
        main = node.main
        if main is None:  # only metrics and plots (or nothing): one stands for itself
            if len(md5s) == 1:
                return next(iter(md5s.values()))
            return digest(md5s or [locked.cmd, {k: v.md5 for k, v in locked.deps.items()}])
        if main.path not in md5s:
            return None
        extra = {p: v for p, v in md5s.items() if p != main.path and p in self._read_outs}
        return md5s[main.path] + (f"+{digest(extra)[:8]}" if extra else "")

    # -- verdicts ------------------------------------------------------------------------------

    def _current(self, dep: Dep) -> str | None:
        """The hash that the dependency has now, by the lock of whoever makes it."""
        makers = self.producers(dep)
        if not makers:
            return self.source_version(dep.path)
        one, out = makers[0]
        locked = self.lock.get(one.name)
        made = locked.outs.get(out.lock_path) if locked else None
        if len(makers) == 1 and out.path == dep.path:
            return made.md5 if made else None
        if len(makers) == 1 and dep.path.startswith(out.path + "/"):
            inside = directory_entries(self.manifest.cache, made.md5) if made else None
            relative = dep.path[len(out.path) + 1 :]
            if inside is not None and relative in inside:
                return inside[relative]
        return self.md5(dep.path)  # a folder around outputs, or one within an output

    def verdict(self, node: ResolvedStage) -> Verdict:
        """DVC's opinion of one resolved stage."""
        locked = self.lock.get(node.name)
        inputs: dict[Upstream, bool] = {}
        for upstream, deps in self.upstreams(node).items():
            inputs[upstream] = locked is not None and all(
                (seen := locked.deps.get(dep.lock_path)) is not None
                and seen.md5 == self._current(dep)
                for dep in deps
            )
        return Verdict(
            recorded=locked is not None,
            data_version=self.data_version(node),
            code_fresh=self.code_fresh(node),
            inputs=inputs,
        )

    def nodes(self) -> Iterable[ResolvedStage]:
        """Every resolved stage, upstream before downstream."""
        done: dict[str, ResolvedStage] = {}

        def visit(node: ResolvedStage) -> None:
            if node.name in done:
                return
            for upstream in self.upstreams(node):
                if upstream.asset is not None and upstream.asset != node.asset:
                    visit(self.manifest.node(upstream.asset, upstream.key))
            done[node.name] = node

        for stage in self.manifest.stages.values():
            for node in stage.resolved.values():
                visit(node)
        return list(done.values())

    def ancestors(self, node: ResolvedStage) -> list[ResolvedStage]:
        """Everything upstream of a stage, upstream before downstream, without itself."""
        wanted: set[str] = set()
        todo = [node]
        while todo:
            for upstream in self.upstreams(todo.pop()):
                if upstream.asset is not None:
                    above = self.manifest.node(upstream.asset, upstream.key)
                    if above.name not in wanted and above.name != node.name:
                        wanted.add(above.name)
                        todo.append(above)
        return [one for one in self.nodes() if one.name in wanted]

    def stale_ancestors(self, node: ResolvedStage) -> dict[str, list[str]]:
        """Upstream stages that are stale: name → reasons. {} when the stage may run."""
        verdicts = {one.name: self.verdict(one) for one in self.ancestors(node)}
        return {name: v.reasons() for name, v in verdicts.items() if not v.fresh}
