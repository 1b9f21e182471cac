"""What a stage's last run left behind, as metadata of an event.

In: the project, its state, a node. Out: command, md5, bytes, number of files, and the numbers of
its metrics files as ``metric/<name>``. Metrics files that are no JSON or YAML are left alone: DVC
allows them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import yaml

from .manifest import ResolvedStage
from .project import DvcProject
from .runner import command_text
from .state import State
from .yaml12 import loads

MOST = 100  # more than this is a table and belongs into a file


def _load(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else loads(text)


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, float | int]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        yield prefix, value


def read_metrics(root: Path, node: ResolvedStage) -> dict[str, float | int]:
    """Numeric leaves of the stage's metrics files, nested names joined by dots, at most 100.

    A name that two files share is prefixed by the file's stem in both.
    """
    files: dict[str, dict[str, float | int]] = {}
    for out in node.metrics:
        try:
            files[Path(out.path).stem] = dict(_leaves(_load(root / out.path)))
        except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError):
            continue
    names = [name for leaves in files.values() for name in leaves]
    found = {
        f"{stem}.{name}" if names.count(name) > 1 or not name else name: value
        for stem, leaves in files.items()
        for name, value in leaves.items()
    }
    return dict(list(found.items())[:MOST])


def result_metadata(project: DvcProject, state: State, node: ResolvedStage) -> dict[str, Any]:
    """The recorded result of a stage: ``dvc/…`` from the lock, ``metric/…`` from its files."""
    found: dict[str, Any] = {
        "dvc/cmd": dg.MetadataValue.text(command_text(node.cmd)),
        "dvc/stage": node.name,
    }
    locked = state.lock.get(node.name)
    main = node.main or (node.outs[0] if node.outs else None)
    file = locked.outs.get(main.lock_path) if locked and main else None
    if main and file:
        found["dvc/path"] = dg.MetadataValue.path(main.path)
        found["dvc/md5"] = file.md5
        found["dvc/bytes"] = file.size or 0
        found["dvc/nfiles"] = file.nfiles if file.nfiles is not None else 1
    metrics = read_metrics(project.root, node)
    return found | {f"metric/{name}": value for name, value in metrics.items()}
