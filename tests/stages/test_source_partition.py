"""Adding a source is an entry in params.yaml: a new partition, and nothing else is stale.

In a copy of the working tree, by DVC itself and by what Dagster shows of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from contracts.settings import ROOT
from dagster_dvc import DvcProject
from tests.stages.test_source_places import git

SOURCES = """documents:
  sources:
    guide: { uri: guide, path: guide, include: ["**/*.md"] }
"""
ADDED = """    notes: { uri: "git+upstream", path: data/sources/notes.rev, licence: MIT }
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A DVC project of the stage documents alone, with the code of this working tree."""
    root = tmp_path / "checkout"
    root.mkdir()
    for folder in ("contracts", "resources", "stages"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, root / folder, ignore=ignore)
    text = (ROOT / "dvc.yaml").read_text()
    (root / "dvc.yaml").write_text(text[: text.index("\n  quality:\n")] + "\n")
    base = (ROOT / "params.yaml").read_text()
    after = base[base.index("  max_bytes:") :]
    (root / "params.yaml").write_text(SOURCES + after)
    (root / ".dvcignore").write_text("__pycache__/\n*.pyc\n")
    (root / "guide").mkdir()
    (root / "guide" / "a.md").write_text("# A\n")
    git(root, "init", "-q")
    dvc(root, "init", "-q")
    return root


def dvc(root: Path, *arguments: str) -> str:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RATCHET_ROOT": str(root),
        "RATCHET_STATE_DIR": str(root / ".ratchet"),
        "RATCHET_TRACKING": "off",
        "DVC_NO_ANALYTICS": "1",
    }
    result = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=root, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_a_new_source_is_a_new_partition_and_only_it_runs(checkout: Path) -> None:
    upstream = checkout / "upstream"
    upstream.mkdir()
    (upstream / "n.md").write_text("# Notes of a neighbour\n")
    git(upstream, "init", "-q")
    git(upstream, "add", "-A")
    git(upstream, "commit", "-qm", "notes")

    assert list(DvcProject(checkout).stages["documents"].keys) == ["guide"]
    assert "documents@guide" in dvc(checkout, "repro")
    params = (checkout / "params.yaml").read_text()
    (checkout / "params.yaml").write_text(params.replace(SOURCES, SOURCES + ADDED))
    pin = checkout / "data" / "sources" / "notes.rev"
    pin.parent.mkdir()
    pin.write_text(git(upstream, "rev-parse", "HEAD") + "\n")

    stage = DvcProject(checkout).manifest().stages["documents"]
    assert list(stage.keys) == ["guide", "notes"]
    before = (checkout / "data/documents/guide.parquet").stat().st_mtime_ns
    said = dvc(checkout, "repro")
    assert "Stage 'documents@guide' didn't change, skipping" in said
    assert "Running stage 'documents@notes'" in said
    assert (checkout / "data/documents/guide.parquet").stat().st_mtime_ns == before
    (row,) = pq.read_table(checkout / "data/documents/notes.parquet").to_pylist()
    assert (row["doc_id"], row["licence"]) == ("notes:n.md", "MIT")
    assert "skipping" in dvc(checkout, "repro") and "Running" not in dvc(checkout, "repro")
    (checkout / "guide" / "b.md").write_text("# B\n")
    said = dvc(checkout, "repro")
    assert "Running stage 'documents@guide'" in said
    assert "Stage 'documents@notes' didn't change, skipping" in said
