"""Stage prompts: the folder becomes one deterministic file, or every offender is named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from contracts.errors import ConfigError, InputError
from contracts.params import Params, load_params
from contracts.settings import ROOT
from resources import prompts
from stages.prompts import run

TEMPLATE = (
    "{% block system %}{% for p in passages %}{{ p.text }}{% endfor %}{% endblock %}"
    "{% block user %}{{ question }}{% endblock %}"
)


@pytest.fixture
def params() -> Params:
    return load_params(ROOT / "params.yaml")


def write(root: Path, name: str, tags: str = "stable: v1\n") -> Path:
    home = root / "prompts" / name
    home.mkdir(parents=True)
    (home / "v1.jinja2").write_text(TEMPLATE)
    (home / "tags.yaml").write_text(tags)
    return root / "prompts"


def test_the_file_is_self_contained_and_deterministic(tmp_path: Path, params: Params) -> None:
    paths = SimpleNamespace(prompts=write(tmp_path, "answer"), out=tmp_path / "out.json")
    assert run(paths, params) == {"prompts": 1.0, "versions": 1.0}
    first = paths.out.read_bytes()
    assert prompts.read(paths.out).get("answer").text == TEMPLATE
    run(paths, params)
    assert paths.out.read_bytes() == first and str(tmp_path).encode() not in first


def test_params_must_name_a_prompt(tmp_path: Path, params: Params) -> None:
    paths = SimpleNamespace(prompts=write(tmp_path, "other"), out=tmp_path / "out.json")
    with pytest.raises(ConfigError, match="no prompt 'answer'"):
        run(paths, params)
    assert not paths.out.exists()


def test_a_wrong_prompt_writes_nothing(tmp_path: Path, params: Params) -> None:
    home = write(tmp_path, "answer", "stable: v2\n")
    paths = SimpleNamespace(prompts=home, out=tmp_path / "out.json")
    with pytest.raises(InputError, match="stable points at v2"):
        run(paths, params)
    assert not paths.out.exists()


@pytest.mark.skipif(
    not (ROOT / "prompts/answer/v1.jinja2").exists(), reason="the project's prompt is not there"
)
def test_the_projects_own_prompts_are_sound(tmp_path: Path, params: Params) -> None:
    run(SimpleNamespace(prompts=ROOT / "prompts", out=tmp_path / "out.json"), params)
