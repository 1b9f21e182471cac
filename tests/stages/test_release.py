"""stages.release: every member by digest, an id that follows them, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from contracts.digests import path_md5
from contracts.errors import GateError, InputError
from contracts.records import Release
from contracts.settings import ROOT
from resources import prompts
from resources.releases import read_release
from stages import harness, release
from tests.stages.evaluation_models import params

FOLDERS = ("documents", "quality", "index", "retrieval", "base_model", "adapter", "scorecard")
VERDICT: dict[str, Any] = {
    "verdict": "PASS",
    "reasons": [],
    "policy_sha256": "9" * 64,
    "families": {"quality": "PASS"},
    "looks": [{"look": 1}],
    "checks": [
        {"name": "answer_overlap", "kind": "floor", "value": 0.7, "passed": True},
        {"name": "answer_overlap", "kind": "paired", "value": 0.4, "against": "base"},
    ],
    "baseline": None,
    "anchor": None,
}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with every member; relative paths start there. Git is the repository's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(release, "git_commit", lambda root: "c" * 40)
    for name in FOLDERS:
        harness.write_json(tmp_path / "data" / name / "part.json", {"name": name})
    for name in ("chunks", "vectors", "answers"):
        (tmp_path / "data" / f"{name}.parquet").write_bytes(name.encode())
    (tmp_path / "data" / "examples").mkdir()
    (tmp_path / "data" / "examples" / "test.jsonl").write_text("{}\n")
    (tmp_path / "data" / "questions.yaml").write_text("- id: q\n")
    (tmp_path / "data" / "safety.yaml").write_text("- id: s\n")
    (tmp_path / "data" / "policy.yaml").write_text("version: 1\n")
    harness.write_json(tmp_path / "data" / "gate" / "verdict.json", VERDICT)
    text = (
        "{% block system %}{% for p in passages %}{{ p.text }}{% endfor %}{% endblock %}"
        "{% block user %}{{ question }}{% endblock %}"
    )
    version = prompts.PromptVersion.of("answer", "v1", text)
    loaded = prompts.Prompts({"answer": {"v1": version}}, {"answer": {"stable": "v1"}})
    harness.write_json(tmp_path / "data" / "prompts.json", loaded.to_json())
    bundle = tmp_path / "data" / "bundle"
    config = {"architectures": ["LlamaForCausalLM"]}
    harness.write_json(bundle / "checkpoint" / "config.json", config)
    launch = {"engine": "vllm", "model": "checkpoint", "served_model_name": "ratchet-0123456789ab"}
    harness.write_json(bundle / "launch.json", launch)
    return tmp_path


def paths(**changes: Path) -> SimpleNamespace:
    files = {"chunks": "chunks.parquet", "vectors": "vectors.parquet", "answers": "answers.parquet"}
    files |= {"prompts": "prompts.json", "golden": "questions.yaml", "out": "release.json"}
    files |= {"gate": "gate/verdict.json", "policy": "policy.yaml", "safety": "safety.yaml"}
    found = {name: Path("data") / files.get(name, name) for name in (*release.MEMBERS, "out")}
    return SimpleNamespace(**found | changes)


def build() -> Release:
    given = paths()
    release.run(given, params())
    return read_release(given.out)  # checks the id against the content


def test_a_release_names_every_member_by_its_digest(checkout: Path) -> None:
    found = build()
    assert set(found.members) == set(release.MEMBERS)
    for name, member in found.members.items():
        assert member.md5 == path_md5(checkout / member.path), name
        assert member.size > 0
    assert found.members["index"].md5.endswith(".dir")
    assert found.eval_set == found.members["golden"].md5
    assert found.git_commit == "c" * 40
    assert found.prompt["name"] == "answer" and len(found.prompt["sha256"]) == 64
    assert found.model["name"] == "ratchet-0123456789ab"
    assert found.model["architecture"] == "LlamaForCausalLM"
    assert found.gate["verdict"] == "PASS" and found.gate["scores"] == {"answer_overlap": 0.7}
    assert set(found.params) == set(release.BLOCKS)


def test_the_id_follows_any_byte_of_any_member_and_nothing_else(checkout: Path) -> None:
    first = build()
    assert build() == first
    ids = {first.id}
    names = ("chunks.parquet", "questions.yaml", "adapter/part.json", "policy.yaml")
    for name in (*names, "safety.yaml", "gate/verdict.json"):
        file = checkout / "data" / name
        before = file.read_bytes()
        file.write_bytes(before + b" ")
        ids.add(build().id)
        file.write_bytes(before)
    assert len(ids) == 7
    harness.write_json(checkout / "data" / "profile" / "profile.json", {"seconds": 1.25})
    harness.write_json(checkout / "data" / "gate" / "measured.json", {"seconds": 1.25})
    assert build().id == first.id  # timings are evidence, not identity


def test_a_verdict_that_is_no_pass_makes_no_release(checkout: Path) -> None:
    verdict = VERDICT | {"verdict": "FAIL", "reasons": ["answer_overlap: too low"]}
    harness.write_json(checkout / "data" / "gate" / "verdict.json", verdict)
    with pytest.raises(GateError, match="FAIL"):
        build()
    assert not (checkout / "data" / "release.json").exists()


def test_every_missing_member_is_named_at_once(checkout: Path) -> None:
    (checkout / "data" / "chunks.parquet").unlink()
    (checkout / "data" / "answers.parquet").write_bytes(b"")
    with pytest.raises(InputError) as error:
        release.run(paths(adapter=checkout / "data" / "adapter"), params())
    assert error.value.offenders == [
        "chunks: data/chunks.parquet does not exist",
        f"adapter: {checkout}/data/adapter is not a path inside the checkout",
        "answers: data/answers.parquet is empty",
    ]


def test_a_release_needs_a_commit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="git commit"):
        release.git_commit(tmp_path)
    assert len(release.git_commit(ROOT)) == 40


def test_the_written_file_has_no_place_and_no_clock(checkout: Path) -> None:
    build()
    text = (checkout / "data" / "release.json").read_text()
    assert str(checkout) not in text
    assert json.loads(text)["id"] in text
