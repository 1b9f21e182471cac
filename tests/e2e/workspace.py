"""A checkout of this repository to run the real pipeline in: smaller, a space in its name.

What stands in the working tree is copied (tracked and new files), so that the tests see uncommitted
work too; in CI that is the commit itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from contracts.settings import ROOT, Settings
from tests.conftest import free_port

#: What the small run changes. One more source of a few dozen documents, a shorter training, fewer
#: measurements; every component stays the real one.
SMALL: dict[str, dict[str, Any]] = {
    "documents": {
        "sources": {
            "docs": {
                "uri": "docs",
                "path": "docs",
                "include": ["**/*.md"],
                "exclude": ["decisions/**"],
            },
            "typer": {"uri": "python:typer", "path": "requirements/cpu.lock"},
        }
    },
    "quality": {"min_documents": 20},
    "adapter": {"steps": 8},
    "examples": {"train": 120, "reserve": 20},
    "profile": {"prompts": 6, "concurrency": 3, "max_tokens": 16},
}
#: Eight steps make no good adapter; what the gate's bounds do is tests/stages/test_gate.py's.
POLICY: dict[str, Any] = {
    "quality": {
        "blocking": [{"metric": "answer_overlap", "scale": "graded", "margin": 0.5}],
        "floors": [{"metric": "answer_overlap", "min": 0.01}],
    },
    "safety": {"suites": {suite: {"min": 0.1} for suite in ("injection", "leakage", "refusal")}},
}


class Workspace:
    """One checkout with its own state, ports and environment."""

    def __init__(self, root: Path) -> None:
        self.root = root
        ports = {
            f"RATCHET_{name}_PORT": str(free_port())
            for name in ("GATEWAY", "PRIVATE", "DAGSTER", "MLFLOW")
        }
        self.variables = ports | {
            "RATCHET_ROOT": str(root),
            "RATCHET_STATE_DIR": str(root / ".ratchet"),
            "RATCHET_TRACKING": "on",
            "DAGSTER_HOME": str(root / ".dagster"),
        }
        self.settings = Settings.from_env(self.variables)

    @property
    def env(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        dropped = ("POSTGRES_URL", "REDIS_URL", "PYTHONPATH")
        kept = {key: value for key, value in os.environ.items() if key not in dropped}
        return kept | self.variables | {"PATH": path}

    def run(
        self, *arguments: str, check: bool = True, timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """``python -m …`` in the checkout; its output is shown when it fails."""
        result = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=self.root, env=self.env, timeout=timeout, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if check and result.returncode:
            raise AssertionError(
                f"python -m {' '.join(arguments)} exited with {result.returncode}\n"
                f"{result.stdout[-6000:]}\n{result.stderr[-6000:]}"
            )
        return result

    def git(self, *arguments: str) -> None:
        """git in the checkout, as somebody."""
        command = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments]
        subprocess.run(command, cwd=self.root, check=True, capture_output=True)

    def job(self, name: str, partition: str | None = None) -> None:
        """`ratchet run`, as a person would."""
        chosen = ["--partition", partition] if partition else []
        self.run("pipelines.cli", "run", name, *chosen, timeout=900)


def make_workspace(root: Path, changes: dict[str, dict[str, Any]] | None = None) -> Workspace:
    """Copy the working tree to ``root``, apply ``changes`` to params.yaml and, with them, POLICY to
    the gate's policy; commit it there."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    params = yaml.safe_load((root / "params.yaml").read_text())
    for block, values in (changes or {}).items():
        params[block] |= values
    if "dagster" not in params["documents"]["sources"]:  # nor are there questions about it
        (root / "data" / "golden" / "dagster.yaml").unlink()
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    if changes:
        policy = root / "data" / "policies" / "gate.yaml"
        policy.write_text(yaml.safe_dump(yaml.safe_load(policy.read_text()) | POLICY))
    workspace = Workspace(root)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "workspace"]):
        workspace.git(*command)
    return workspace
