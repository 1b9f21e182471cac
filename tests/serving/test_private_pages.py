"""The operators' pages: what a person is shown before they let a release in, and their answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from contracts.digests import path_md5, path_size
from contracts.errors import ApprovalError
from contracts.records import Channel, Release
from contracts.settings import ROOT, Settings
from resources import approvals, promotion, releases
from resources.approvals import Request
from resources.ledger import Ledger
from serving.private.app import create_app
from tests.browser import need_browser, open_page
from tests.conftest import free_port
from tests.serving.factory import build

SLY = "<script>document.title = 'taken'</script>"


def judged(settings: Settings, mark: str) -> Release:
    """An installed release with answers and a gate report, whose bytes are in DVC's cache."""
    root = settings.root
    path = build(root, mark)
    body = json.loads(path.read_text())
    rows = [
        {"question_id": name, "system": system, "question": f"What is {name}? {SLY}",
         "answer": f"{name} as {mark} has it {SLY}" if name == "moved" else "the same"}
        for name in ("moved", "still") for system in ("candidate", "base")
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), root / "data/answers.parquet")
    gate = root / "data/gate"
    gate.mkdir(exist_ok=True)
    (gate / "verdict.json").write_text(
        json.dumps({"verdict": "PASS", "reasons": [f"overlap of {mark} is enough"]})
    )
    (gate / "report.html").write_text(f"<h1>The report of {mark}</h1>")
    for name, place in (("answers", "data/answers.parquet"), ("gate", "data/gate")):
        source = root / place
        md5 = path_md5(source)
        body["members"][name] = {"path": place, "md5": md5, "size": path_size(source)}
        _cache(root, source, md5)
    body["id"] = Release.compute_id(body)
    path.write_text(json.dumps(body))
    return releases.load(settings, releases.install(path, root, settings).name).release


def _cache(root: Path, source: Path, md5: str) -> None:
    def put(digest: str, data: bytes) -> None:
        target = root / ".dvc/cache/files/md5" / digest[:2] / digest[2:]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)

    files = sorted(source.iterdir()) if source.is_dir() else [source]
    for file in files:
        put(path_md5(file), file.read_bytes())
    if source.is_dir():
        listed = [{"md5": path_md5(file), "relpath": file.name} for file in files]
        put(md5, json.dumps(listed).encode())


@pytest.fixture
def waiting(settings: Settings) -> Iterator[tuple[Request, str, Ledger]]:
    """A release that waits against a live one, its token, and the ledger."""
    path = settings.root / "data/policies/approval.yaml"
    path.parent.mkdir(parents=True)
    text = (ROOT / "data/policies/approval.yaml").read_text()
    path.write_text(text.replace("approve_from: high", "approve_from: medium"))
    live, new = judged(settings, "one"), judged(settings, "two")
    with closing(Ledger.open(settings)) as ledger:
        pointer = Channel(name="stable", release=live.id, engine_url="http://x:1", model="nano")
        promotion.change(ledger, "promoted", pointer, None, "the first")
        with pytest.raises(ApprovalError):
            approvals.require(settings, ledger, new, "stable")
        (request,) = approvals.requests(ledger)
        yield request, approvals.token_of(settings, request), ledger


def client(settings: Settings) -> TestClient:
    return TestClient(create_app(settings), base_url="http://127.0.0.1", follow_redirects=False)


def test_a_person_sees_risk_gate_differences_and_answers(
    settings: Settings, waiting: tuple[Request, str, Ledger]
) -> None:
    request, token, _ = waiting
    web = client(settings)
    assert f'href="/approvals/{request.seq}"' in web.get("/approvals").text
    page = web.get(f"/approvals/{request.seq}")
    for shown in (
        "bundle was changed (medium)",
        "overlap of two is enough",
        "+Answer from the passages. (two)",
        "1 of 2 golden questions are answered in other words",
        "moved as one has it",
        "moved as two has it",
    ):
        assert shown in page.text, shown
    assert SLY not in page.text and token not in page.text
    policy = page.headers["content-security-policy"]
    nonce = re.search(r"script-src 'nonce-([^']+)'", policy)
    assert nonce and f'<script nonce="{nonce[1]}">' in page.text
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "The report of two" in web.get(f"/approvals/{request.seq}/gate").text


def test_an_answer_is_given_once_with_the_token(
    settings: Settings, waiting: tuple[Request, str, Ledger]
) -> None:
    request, token, ledger = waiting
    web, place = client(settings), f"/approvals/{request.seq}"
    form = {"decision": "approve", "name": "Ann Lee", "reason": "looks right", "token": token}
    for wrong, status in (
        ({"token": "x" * 32}, 400), ({"token": ""}, 400), ({"name": ""}, 400),
        ({"decision": "maybe"}, 400), ({"decision": "refuse", "reason": " "}, 400),
        ({"reason": "x" * 30_000}, 400),
    ):  # fmt: skip
        assert web.post(place, data=form | wrong).status_code == status
    assert web.post("/approvals/999", data=form).status_code == 404
    assert approvals.find(ledger, request.seq).state == "waiting"
    answered = web.post(place, data=form)
    assert (answered.status_code, answered.headers["location"]) == (303, place)
    again = web.post(place, data=form | {"name": "Bob"})
    assert again.status_code == 409 and "Ann Lee" in again.text
    page = web.get(place).text
    assert "approved by Ann Lee" in page and "looks right" in page and "<form" not in page


def test_the_pages_are_for_this_address_only(
    settings: Settings, waiting: tuple[Request, str, Ledger]
) -> None:
    rebound = TestClient(create_app(settings), base_url="http://evil.example")
    assert rebound.get("/approvals").status_code == 400
    assert client(settings).get("/approvals/12345").status_code == 404
    assert client(settings).get("/healthz").json() == {"status": "ok"}


@pytest.mark.slow
def test_a_release_is_approved_in_a_real_browser_after_a_restart(
    settings: Settings,
    waiting: tuple[Request, str, Ledger],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The link that the command prints, opened; the server was restarted since it was printed."""
    import sys

    from playwright.sync_api import expect
    from typer.testing import CliRunner

    from pipelines import cli
    from pipelines.processes import Service

    need_browser()
    request, _, ledger = waiting
    port = free_port()
    monkeypatch.setenv("RATCHET_PRIVATE_PORT", str(port))
    shown = CliRunner().invoke(cli.app, ["approvals", "link", str(request.seq)])
    link = shown.output.strip()

    def serve() -> Any:
        command = [sys.executable, "-m", "serving.private"]
        health = f"http://127.0.0.1:{port}/healthz"
        service = Service("private", command, health, tmp_path / "private.log", ROOT)
        service.start()
        service.wait_ready(60)
        return service

    service = serve()
    service.stop()
    service = serve()
    try:
        with open_page(1100, 1400) as page:
            page.goto(link)
            expect(page.get_by_text("moved as two has it")).to_be_visible()
            page.screenshot(path=str(tmp_path / "request.png"), full_page=True)
            page.get_by_label("Your name").fill("Ann Lee")
            page.get_by_label("Reason").fill("looks right")
            page.get_by_role("button", name="Approve").click()
            expect(page.get_by_text("approved by Ann Lee")).to_be_visible()
            assert page.title() != "taken"
            page.screenshot(path=str(tmp_path / "answered.png"), full_page=True)
    finally:
        service.stop()
    assert approvals.find(ledger, request.seq).state == "approved"
    new = releases.load(settings, request.entry.release).release
    assert approvals.require(settings, ledger, new, "stable")
