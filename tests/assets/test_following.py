"""data/stable.json follows the ledger: forward, back, and from DVC's cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from assets.following import follow_baseline
from contracts.digests import dir_md5, file_md5, path_md5
from contracts.errors import NotFoundError
from contracts.records import Channel, Member, Release, Score
from contracts.settings import Settings
from resources import promotion
from resources.ledger import Ledger
from stages.evidence import write_scores
from stages.gating.card import read_baseline, read_other

FIGURES = {"machine": {"cpu": "x"}, "figures": {"ttft": 1.0}}


def release(settings: Settings, value: float, against: str | None) -> Release:
    """An installed release whose scorecard and verdict lie in the workspace."""
    data = settings.root / "data"
    shutil.rmtree(data / "scorecard", ignore_errors=True)
    for folder in ("scorecard", "gate"):
        (data / folder).mkdir(parents=True, exist_ok=True)
    score = Score(question_id="q1", system="candidate", metric="exact_match", value=value)
    write_scores([score], data / "scorecard" / "scores.parquet")
    (data / "gate" / "verdict.json").write_text(json.dumps({"value": value}))
    (data / "gate" / "measured.json").write_text(json.dumps(FIGURES))
    members = {
        name: Member(path=path, md5=path_md5(settings.root / path), size=1)
        for name, path in (("scorecard", "data/scorecard"), ("gate", "data/gate/verdict.json"))
    }
    body: dict[str, Any] = {
        "members": {name: member.model_dump() for name, member in members.items()},
        "prompt": {}, "model": {}, "gate": {"verdict": "PASS", "baseline": against},
        "eval_set": "", "params": {}, "git_commit": "c",
    }  # fmt: skip
    made = Release(id=Release.compute_id(body), **body)
    home = settings.releases_dir / made.id
    home.mkdir(parents=True)
    (home / "release.json").write_text(made.model_dump_json())
    return made


def serve(ledger: Ledger, found: Release, kind: Any = "promoted") -> None:
    pointer = Channel(name="stable", release=found.id, engine_url="http://e", model="m")
    promotion.change(ledger, kind, pointer, ledger.last("stable"))


def cache(root: Path) -> None:
    """Keep the scorecard as DVC does: its files by digest, and its list of files."""
    card = root / "data/scorecard"
    home = root / ".dvc/cache/files/md5"
    scores, folder = file_md5(card / "scores.parquet"), dir_md5(card)
    listing = json.dumps([{"md5": scores, "relpath": "scores.parquet"}]).encode()
    for md5, content in ((scores, (card / "scores.parquet").read_bytes()), (folder, listing)):
        (home / md5[:2]).mkdir(parents=True, exist_ok=True)
        (home / md5[:2] / md5[2:]).write_bytes(content)


@pytest.fixture
def stable(settings: Settings) -> Path:
    path = settings.root / "data/stable.json"
    path.parent.mkdir()
    path.write_text('{"release": null}')
    return path


def test_the_baseline_follows_promotions_and_rollbacks(settings: Settings, stable: Path) -> None:
    ledger = Ledger.open(settings)
    assert follow_baseline(settings, ledger) is None  # nothing was ever promoted
    one = release(settings, 0.5, None)
    cache(settings.root)
    serve(ledger, one)
    assert follow_baseline(settings, ledger) == f"data/stable.json: none -> {one.id}"
    first = read_baseline(stable)
    assert first is not None and first["scores"] == {"q1": {"exact_match": 0.5}}
    assert first["measured"] == FIGURES and first["previous"] is None
    assert follow_baseline(settings, ledger) is None

    card = one.members["scorecard"].md5
    two = release(settings, 0.7, card)
    serve(ledger, two)
    follow_baseline(settings, ledger)
    now = read_baseline(stable)
    assert now is not None and now["release"] == two.id and now["previous"]["release"] == one.id
    same = read_other(stable, "live", two.members["scorecard"].md5)
    assert same is not None and same.release == one.id  # two is compared with what it was

    serve(ledger, one, "rolled_back")
    assert follow_baseline(settings, ledger) == f"data/stable.json: {two.id} -> {one.id}"
    back = read_baseline(stable)
    assert back is not None and (back["release"], back["scores"]) == (one.id, first["scores"])
    assert back["measured"] is None  # the verdict in the workspace is another release's
    assert back["previous"] is None  # and one was compared with nothing
    serve(ledger, two)
    shutil.rmtree(settings.root / "data/scorecard")
    with pytest.raises(NotFoundError, match="neither in the workspace nor in DVC's cache"):
        follow_baseline(settings, ledger)
    assert read_baseline(stable) == back


def test_the_same_answers_again_leave_the_file_as_it_is(settings: Settings, stable: Path) -> None:
    ledger = Ledger.open(settings)
    one = release(settings, 0.5, None)
    serve(ledger, one)
    follow_baseline(settings, ledger)
    before = stable.read_bytes()
    two = release(settings, 0.5, one.members["scorecard"].md5)
    assert two.id != one.id
    serve(ledger, two)
    assert follow_baseline(settings, ledger) is None and stable.read_bytes() == before
