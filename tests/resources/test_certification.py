"""resources.certification: the matrix is the ledger's, and serving reads what passed."""

from __future__ import annotations

from contextlib import closing

from contracts.records import Release
from contracts.settings import Settings
from resources import certification, promotion, releases
from resources.ledger import Ledger
from tests.serving.factory import build


def release(settings: Settings, mark: str, **model: str) -> Release:
    found = releases.read_release(build(settings.root, mark))
    body = found.model_dump() | {"model": found.model | model}
    return Release.model_validate(body | {"id": Release.compute_id(body)})


def test_a_pair_passed_together_or_not_at_all(settings: Settings) -> None:
    with closing(Ledger.open(settings)) as ledger:
        assert certification.certified(settings, "old") == frozenset()
        one = release(settings, "one", checkpoint_md5="old")
        two = release(settings, "two", checkpoint_md5="old")
        new = release(settings, "two", checkpoint_md5="new")
        for item in (one, two, new):
            promotion.record_verdict(ledger, item, "ann")
        certification.follow(settings, ledger)
        texts = {item.prompt["sha256"] for item in (one, two)}
        assert certification.certified(settings, "old") == texts
        assert certification.certified(settings, "new") == {new.prompt["sha256"]}
        shown = certification.render(certification.matrix(ledger), {"old": "stable"})
    assert "old (stable)" in shown.splitlines()[0]
    assert new.id in shown and two.id in shown


def test_only_a_pass_certifies(settings: Settings) -> None:
    with closing(Ledger.open(settings)) as ledger:
        found = release(settings, "one", checkpoint_md5="m")
        body = found.model_dump() | {"gate": found.gate | {"verdict": "FAIL"}}
        failed = Release.model_validate(body | {"id": Release.compute_id(body)})
        promotion.record_verdict(ledger, failed, "ann")
        certification.follow(settings, ledger)
        assert certification.certified(settings, "m") == frozenset()
        assert "FAIL" in certification.render(certification.matrix(ledger))


def test_a_file_that_cannot_be_read_certifies_nothing(settings: Settings) -> None:
    certification.path(settings).parent.mkdir(parents=True, exist_ok=True)
    for text in ("", "{}", "[1]", '[{"model": "m"}]'):
        certification.path(settings).write_text(text)
        assert certification.certified(settings, "m") == frozenset()
