"""Asset checks: what the stages' reports become in the UI."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets import checks
from contracts.settings import ROOT


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RATCHET_ROOT", str(tmp_path))
    shutil.copy(ROOT / "params.yaml", tmp_path)
    return tmp_path


def write(root: Path, path: str, value: Any) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(json.dumps(value))


@pytest.mark.parametrize("name", ["quality", "acceptance"])
def test_one_expectation_that_does_not_hold_fails_the_check(root: Path, name: str) -> None:
    check = {"quality": checks.quality_suite, "acceptance": checks.acceptance_suite}[name]
    rows = [{"expectation": word, "success": True, "observed": 7} for word in "ab"]
    write(root, f"data/{name}/report.json", {"expectations": rows})
    assert check().passed
    rows[1]["success"] = False
    write(root, f"data/{name}/report.json", {"expectations": rows})
    result = check()
    assert not result.passed and result.metadata["failed"].value == "- b: 7"
    assert result.metadata["report"].value == f"/reports/{name}/report.html"


def test_unreadable_documents_are_counted_by_source(root: Path) -> None:
    write(root, "data/metrics/documents-good.json", {"unreadable": 0.0})
    assert checks.documents_readable().passed
    write(root, "data/metrics/documents-bad.json", {"unreadable": 2.0})
    result = checks.documents_readable()
    assert not result.passed and result.severity == dg.AssetCheckSeverity.WARN
    assert result.metadata["unreadable in bad"].value == 2


def test_recall_below_the_floor_or_missing_fails(root: Path) -> None:
    write(root, "data/metrics/retrieval.json", {"recall_at_10": 0.9, "agrees_with_choice": 1.0})
    assert checks.retrieval_floor().passed
    for metrics in ({"recall_at_10": 0.1}, {}):
        write(root, "data/metrics/retrieval.json", metrics)
        result = checks.retrieval_floor()
        assert not result.passed and "Warning" in str(result.metadata["search"].value)


def test_a_missing_report_says_what_to_do(root: Path) -> None:
    with pytest.raises(dg.Failure, match="materialize the asset"):
        checks.quality_suite()


@pytest.mark.parametrize("word", ["PASS", "FAIL", "UNDECIDED", "INVALID"])
def test_only_a_pass_of_the_gate_passes_and_its_families_stand_beside_it(
    root: Path, word: str
) -> None:
    verdict = {
        "verdict": word,
        "families": {"quality": word, "safety": "PASS"},
        "looks": [{}, {}],
        "policy_sha256": "9" * 64,
        "reasons": ["one", "note: two"],
    }
    write(root, "data/gate/verdict.json", verdict)
    result = checks.gate_verdict()
    assert result.passed == (word == "PASS")
    assert result.metadata["family quality"].value == word
    assert result.metadata["report"].value == "/reports/gate/report.html"
    assert result.metadata["looks"].value == 2
