"""The whole graph in one file: an accidental change of a key or an edge shows in review.

`python -m pytest tests/pipelines/test_graph.py --snapshot-update` writes it anew.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

SNAPSHOT = Path(__file__).with_name("graph.snapshot.json")

#: Modules that shape no output, so no stage depends on them (see the head of dvc.yaml).
WITHOUT_CONTENT = {
    "contracts",
    "resources/__init__.py",
    "resources/report.py",
    "resources/spool.py",
    "stages/__init__.py",
    "stages/harness.py",
}


@pytest.fixture(scope="module")
def stages(request: pytest.FixtureRequest) -> dict[str, Any]:
    root = Path(__file__).resolve().parents[2]
    value: dict[str, Any] = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    return {name: stage.get("do", stage) for name, stage in value.items()}


def describe() -> dict[str, Any]:
    """Keys, edges, groups, partitions, checks, jobs, schedules and sensors of the code location."""
    from pipelines.definitions import defs

    graph = defs.resolve_asset_graph()
    repository = defs.get_repository_def()
    assets = {}
    for key in sorted(graph.get_all_asset_keys(), key=str):
        node = graph.get(key)
        assets[key.to_user_string()] = {
            "group": node.group_name,
            "deps": sorted(parent.to_user_string() for parent in node.parent_keys),
            "partitions": type(node.partitions_def).__name__ if node.partitions_def else None,
            "keys": sorted(node.partitions_def.get_partition_keys())
            if type(node.partitions_def).__name__ == "StaticPartitionsDefinition"
            else None,
            "kinds": sorted(node.kinds),
            "materializable": node.is_materializable,
            "observable": node.is_observable,
            "pools": sorted(node.pools) if node.is_materializable else [],
        }
    return {
        "assets": assets,
        "checks": sorted(
            f"{key.asset_key.to_user_string()}: {key.name}" for key in graph.asset_check_keys
        ),
        "jobs": {
            job.name: sorted(key.to_user_string() for key in job.asset_layer.executable_asset_keys)
            for job in repository.get_all_jobs()
            if not job.name.startswith("__")
        },
        "schedules": {
            item.name: {
                "cron": item.cron_schedule,
                "job": item.job_name,
                "status": item.default_status.value,
            }
            for item in repository.schedule_defs
        },
        "sensors": {
            item.name: {
                "jobs": sorted(job.name for job in item.jobs) if item.has_jobs else [],
                "status": item.default_status.value,
            }
            for item in repository.sensor_defs
        },
    }


def test_graph_is_the_one_that_was_reviewed(request: pytest.FixtureRequest) -> None:
    text = json.dumps(describe(), indent=1, sort_keys=True) + "\n"
    if request.config.getoption("--snapshot-update"):
        SNAPSHOT.write_text(text)
    assert text == SNAPSHOT.read_text(), "the graph changed; see this file's docstring"


def test_every_stage_module_exists_under_the_stages_name(
    stages: dict[str, Any], repository: Path
) -> None:
    from contracts.params import Params

    for name, stage in stages.items():
        assert f"python -m stages.{name} " in stage["cmd"]
        assert (repository / "stages" / f"{name}.py").is_file()
        assert len(stage["outs"]) == 1
        blocks = [str(item).split(".")[0] for item in stage.get("params", [])]
        assert set(blocks) <= set(Params.model_fields)


def test_code_deps_are_the_modules_that_the_stage_imports(
    stages: dict[str, Any], repository: Path
) -> None:
    """DVC sees only listed files: a helper that is not listed would change answers unseen."""
    wrong = []
    for name, stage in stages.items():
        needed = {path for path in closure(f"stages/{name}.py", repository) if not ignored(path)}
        listed: set[str] = set()
        for dep in stage["deps"]:
            path = repository / dep
            if dep.startswith(("stages", "resources")):
                found = path.rglob("*.py") if path.is_dir() else [path]
                listed |= {item.relative_to(repository).as_posix() for item in found}
        listed = {path for path in listed if not path.endswith("__init__.py") or path in needed}
        if needed != listed:
            wrong.append(
                f"{name}: missing {sorted(needed - listed)}, too many {sorted(listed - needed)}"
            )
    assert not wrong, "\n".join(wrong)


def test_params_are_the_blocks_that_the_stage_reads(
    stages: dict[str, Any], repository: Path
) -> None:
    """DVC sees only listed parameters: a block that is read but not listed would change unseen."""
    from contracts.params import Params

    wrong = []
    for name, stage in stages.items():
        tree = ast.parse((repository / "stages" / f"{name}.py").read_text())
        read = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "params"
            and node.attr in Params.model_fields
        }
        listed = {str(item).split(".")[0] for item in stage.get("params", [])}
        if not read <= listed:
            wrong.append(f"{name}: reads {sorted(read - listed)} and does not list it")
    assert not wrong, "\n".join(wrong)


def ignored(path: str) -> bool:
    return path in WITHOUT_CONTENT or path.split("/")[0] in WITHOUT_CONTENT


def closure(start: str, root: Path) -> set[str]:
    """Our own modules that ``start`` imports, directly or not, also inside functions."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        path = todo.pop()
        if path in seen or ignored(path):
            continue
        seen.add(path)
        for node in ast.walk(ast.parse((root / path).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            todo += [found for name in names if (found := module_path(name, root))]
    return seen


def module_path(name: str, root: Path) -> str | None:
    path = name.replace(".", "/")
    if name.split(".")[0] not in ("stages", "resources"):
        return None
    for candidate in (f"{path}.py", f"{path}/__init__.py"):
        if (root / candidate).is_file():
            return candidate
    return None


def test_definitions_import_nothing_heavy(repository: Path) -> None:
    """Every process that loads the graph pays for its imports: 4.6 s light, 44.7 s with all."""
    import subprocess
    import sys

    heavy = [
        *("torch", "transformers", "mlflow", "evidently", "great_expectations", "ragas", "peft"),
        *("sentence_transformers", "datasets", "pandas", "pyarrow", "qdrant_edge", "sklearn"),
        *("qdrant_client", "matplotlib", "vllm", "dvc"),
    ]
    code = (
        "import sys, pipelines.definitions;"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
