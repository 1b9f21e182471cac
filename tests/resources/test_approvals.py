"""resources.approvals: who waits, one question one request, one answer, one use."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import closing

import pytest

from contracts.errors import ApprovalError, ConfigError, ConflictError, InputError, NotFoundError
from contracts.records import Channel, Release
from contracts.settings import ROOT, Settings
from resources import approvals, releases
from resources.approvals import ApprovalPolicy
from resources.ledger import Entry, Ledger
from tests.serving.factory import build

POLICY = ROOT / "data/policies/approval.yaml"


@pytest.fixture
def ledger(settings: Settings) -> Iterator[Ledger]:
    with closing(Ledger.open(settings)) as found:
        yield found


def policy(settings: Settings, approve_from: str = "low") -> None:
    path = settings.root / "data/policies/approval.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        POLICY.read_text().replace("approve_from: high", f"approve_from: {approve_from}")
    )


def installed(settings: Settings, mark: str) -> Release:
    path = releases.install(build(settings.root, mark), settings.root, settings)
    return releases.load(settings, path.name).release


def promote(ledger: Ledger, release: Release, approval: int | None = None) -> Entry:
    last = ledger.last("stable")
    channel = Channel(name="stable", release=release.id, engine_url="http://x:1", model="nano")
    return ledger.append(
        "promoted",
        channel="stable",
        release=release.id,
        actor="ann",
        body={"channel": channel.model_dump(), "approval": approval},
        after=last.seq if last else None,
    )


def test_the_policy_of_the_checkout_is_read_whole(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="no approval policy"):
        approvals.load(settings)
    policy(settings)
    assert approvals.load(settings).members["base_model"] == "high"
    path = settings.root / "data/policies/approval.yaml"
    path.write_text(path.read_text() + "oter: low\n")
    with pytest.raises(ConfigError, match="oter"):
        approvals.load(settings)


def test_risk_is_the_gravest_difference(settings: Settings) -> None:
    rules = ApprovalPolicy(
        approve_from="high",
        first="low",
        members={"index": "low", "prompts": "medium", "bundle": "high"},
        policy="high",
        other="high",
    )
    one, two = installed(settings, "one"), installed(settings, "two")
    assert approvals.assess(rules, None, one).level == "low"
    assert approvals.assess(rules, one, one).level == "low"
    risk = approvals.assess(rules, one, two)
    assert risk.level == "high" and risk.reasons[0] == "bundle was changed (high)"
    alike = two.model_copy(update={"members": {**one.members, "index": two.members["index"]}})
    assert approvals.assess(rules, one, alike.model_copy(update={"prompt": one.prompt})) == (
        approvals.Risk("low", ["index was changed (low)"])
    )
    assert approvals.assess(rules, one, alike).level == "medium"  # another prompt text
    gate = one.gate | {"policy_sha256": "another"}
    assert approvals.assess(rules, one, one.model_copy(update={"gate": gate})).level == "high"
    assert not rules.waits("medium") and rules.waits("high")
    assert not rules.model_copy(update={"approve_from": "never"}).waits("high")


def test_a_release_waits_is_approved_and_goes_in_once(settings: Settings, ledger: Ledger) -> None:
    policy(settings)
    one = installed(settings, "one")
    for _ in range(2):  # whoever tries again finds the same request
        with pytest.raises(ApprovalError, match="waits for a person"):
            approvals.require(settings, ledger, one, "stable")
    (request,) = approvals.requests(ledger)
    assert (request.state, request.against, request.risk.level) == ("waiting", "", "low")
    token = approvals.token_of(settings, request)
    (file,) = (settings.state_dir / "approvals").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert token not in str(ledger.entries())

    def answer(**changes: object) -> Entry:
        given = {"token": token, "approve": True, "name": "Ann Lee", "reason": ""} | changes
        return approvals.answer(settings, ledger, request.seq, **given)  # type: ignore[arg-type]

    for wrong in ({"token": "x"}, {"name": " "}, {"approve": False}):
        with pytest.raises(InputError):
            answer(**wrong)
    row = answer()
    assert (row.actor, row.kind, row.release) == ("Ann Lee", "approved", one.id)
    with pytest.raises(ConflictError, match="answer already"):
        answer(name="Bob")
    with pytest.raises(NotFoundError):
        approvals.token_of(settings, request)
    approval = approvals.require(settings, ledger, one, "stable")
    assert approval == row.seq
    promote(ledger, one, approval)
    assert approvals.require(settings, ledger, one, "stable") is None  # it is live
    assert [item.state for item in approvals.requests(ledger)] == ["used"]
    two = installed(settings, "two")
    promote(ledger, two)
    with pytest.raises(ApprovalError):  # the token approved one release once
        approvals.require(settings, ledger, one, "stable")


def test_what_changed_meanwhile_is_asked_anew(settings: Settings, ledger: Ledger) -> None:
    policy(settings)
    one, two, three = (installed(settings, mark) for mark in ("one", "two", "three"))
    promote(ledger, one)
    with pytest.raises(ApprovalError):
        approvals.require(settings, ledger, two, "stable")
    (request,) = approvals.requests(ledger)
    token = approvals.token_of(settings, request)
    promote(ledger, three)
    assert approvals.find(ledger, request.seq).state == "outdated"
    with pytest.raises(ConflictError, match="outdated"):
        approvals.answer(
            settings, ledger, request.seq, token=token, approve=True, name="Ann", reason=""
        )
    with pytest.raises(ApprovalError):
        approvals.require(settings, ledger, two, "stable")
    assert [item.state for item in approvals.requests(ledger)] == ["outdated", "waiting"]


def test_a_refusal_stands_until_somebody_asks_anew(settings: Settings, ledger: Ledger) -> None:
    policy(settings)
    one = installed(settings, "one")
    request = approvals.ask(settings, ledger, one, "stable")
    token = approvals.token_of(settings, request)
    approvals.answer(
        settings, ledger, request.seq, token=token, approve=False, name="Ann", reason="too slow"
    )
    with pytest.raises(ApprovalError, match="too slow"):
        approvals.require(settings, ledger, one, "stable")
    again = approvals.ask(settings, ledger, one, "stable")
    assert again.seq != request.seq
    with pytest.raises(ApprovalError, match="waits"):
        approvals.require(settings, ledger, one, "stable")
    with pytest.raises(NotFoundError, match=f"waiting: {again.seq}"):
        approvals.find(ledger, 10_000)


def test_below_the_level_nobody_waits(settings: Settings, ledger: Ledger) -> None:
    policy(settings, "never")
    one = installed(settings, "one")
    assert approvals.require(settings, ledger, one, "stable") is None
    policy(settings, "high")
    promote(ledger, one)
    assert approvals.require(settings, ledger, installed(settings, "two"), "stable") is None
    assert not approvals.requests(ledger)
