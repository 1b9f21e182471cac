"""Publishing the knowledge: what is asked first, and what is kept for the next time."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from assets.publishing import publish_knowledge, read_baseline
from contracts.errors import InputError, QualityError
from contracts.settings import ROOT, Settings
from resources import published
from stages.acceptance_profile import profile
from stages.acceptance_report import page
from tests.resources.indexes import make_index


def prepare(settings: Settings, names: list[str], sound: bool = True) -> None:
    """data/ as the stages leave it: an index, its golden report, the acceptance of its chunks."""
    data = settings.root / "data"
    if not (settings.root / "params.yaml").exists():
        shutil.copy(ROOT / "params.yaml", settings.root)
    index = make_index(data / "index", names)
    manifest = json.loads((index / "manifest.json").read_text())
    report = {"index": manifest["content"], "metrics": {"recall_at_10": 1.0}}
    (data / "retrieval").mkdir(parents=True, exist_ok=True)
    (data / "retrieval" / "report.json").write_text(json.dumps(report))
    rows = [
        {"source": "docs", "text": "word " * 50, "language": "en", "format": "markdown"}
        for _ in names
    ]
    now = profile(rows, [{"source": "docs", "tokens": 50} for _ in names], 128, "structure")
    (data / "acceptance").mkdir(parents=True, exist_ok=True)
    (data / "acceptance" / "profile.json").write_text(json.dumps(now))
    (data / "acceptance" / "report.json").write_text(json.dumps({"success": sound}))


def named(count: int) -> list[str]:
    return [f"{number}.md" for number in range(count)]


def test_what_was_published_is_what_the_next_version_is_compared_with(settings: Settings) -> None:
    prepare(settings, named(20))
    assert read_baseline(settings) is None
    first = publish_knowledge(settings)
    baseline = read_baseline(settings)
    assert baseline is not None and baseline["sources"]["docs"]["documents"] == 20
    assert publish_knowledge(settings)["version"] == first["version"]
    prepare(settings, named(19))
    second = publish_knowledge(settings)
    assert (second["previous"], len(second["tombstones"])) == (first["version"], 1)
    shown = Path(second["change"]).read_text()
    assert "published last" in shown and "https://" not in shown


def test_a_source_that_shrinks_is_refused_until_somebody_means_it(settings: Settings) -> None:
    prepare(settings, named(20))
    first = publish_knowledge(settings)
    prepare(settings, named(9))
    with pytest.raises(QualityError, match="moved further") as caught:
        publish_knowledge(settings)
    assert any("20 before, 9 now" in offender for offender in caught.value.offenders)
    live = published.published(settings)
    assert live is not None and live["version"] == first["version"]
    assert "FAIL" in (settings.state_dir / "change.html").read_text()
    assert publish_knowledge(settings, accept_change=True)["version"] != first["version"]
    assert publish_knowledge(settings)["documents"] == 9  # and that is the new normal


def test_chunks_that_were_not_accepted_are_not_published(settings: Settings) -> None:
    prepare(settings, named(4), sound=False)
    with pytest.raises(QualityError, match="not accepted"):
        publish_knowledge(settings)
    (settings.root / "data" / "acceptance" / "report.json").unlink()
    with pytest.raises(QualityError, match="not accepted"):
        publish_knowledge(settings)
    assert published.published(settings) is None


def test_a_source_that_is_too_old_is_not_published(settings: Settings) -> None:
    prepare(settings, named(4))
    path = settings.root / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params["documents"]["sources"] = {"docs": {"uri": "docs", "path": "docs"}}
    params["acceptance"]["max_age_days"] = {"docs": 30}
    path.write_text(yaml.safe_dump(params))
    (settings.root / "docs").mkdir()
    (settings.root / "docs" / "a.md").write_text("old")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost"]
    long_ago = {"GIT_COMMITTER_DATE": "2020-01-01T00:00:00Z", "PATH": "/usr/bin:/bin"}
    for command in (["init", "-q"], ["add", "docs"], ["commit", "-qm", "old"]):
        subprocess.run([*git, *command], cwd=settings.root, check=True, env=long_ago)
    with pytest.raises(QualityError, match="older than their policy") as caught:
        publish_knowledge(settings)
    assert caught.value.offenders[0].startswith("docs: its newest commit is ")


@pytest.mark.parametrize("content", ["{", "7", '{"a": 1}'])
def test_a_damaged_baseline_is_named(settings: Settings, content: str) -> None:
    prepare(settings, named(4))
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    (settings.state_dir / "accepted.json").write_text(content)
    with pytest.raises(InputError, match="profile of the published version"):
        publish_knowledge(settings)


def test_the_page_needs_no_earlier_version() -> None:
    now = profile([], [], 128, "structure")
    assert "PASS" in page({"success": True, "expectations": []}, None, now)
