"""The guide's commands run: every block fenced as ``bash test`` is executed in a fresh checkout."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from contracts.settings import ROOT, Settings
from tests.e2e.workspace import Workspace, make_workspace

FENCE = re.compile(r"^```bash test\n(.*?)^```", re.M | re.S)
BLOCKS = [
    pytest.param(block, id=f"{path.stem}-{number}")
    for path in sorted((ROOT / "docs").rglob("*.md"))
    for number, block in enumerate(FENCE.findall(path.read_text(encoding="utf-8")))
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("docs") / "a checkout")


def test_there_are_commands_to_run() -> None:
    assert len(BLOCKS) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_command_of_the_guide(block: str, checkout: Workspace) -> None:
    script = f'ratchet() {{ python -m pipelines.cli "$@"; }}\n{block}'
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=checkout.root,
        env=checkout.env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_variable_that_the_settings_read_is_documented() -> None:
    source = (ROOT / "contracts" / "settings.py").read_text()
    names = set(re.findall(r'"([A-Z][A-Z_]+)"', source))
    assert names >= {"RATCHET_STATE_DIR", "MLFLOW_TRACKING_URI"}
    guide = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert not [name for name in sorted(names) if name not in guide]


def test_every_block_of_params_is_documented() -> None:
    from contracts.params import Params

    guide = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert not [name for name in Params.model_fields if f"`{name}`" not in guide]


def test_settings_are_what_the_readme_says() -> None:
    settings = Settings.from_env({})
    readme = Path(ROOT / "README.md").read_text(encoding="utf-8")
    for port in (settings.dagster_port, settings.mlflow_port, settings.gateway_port):
        assert f"http://127.0.0.1:{port}" in readme
