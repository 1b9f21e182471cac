"""The audit log: whole lines of ids and codes, on the disk soon, never a flood, never text."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from contracts.settings import ROOT, Settings
from serving.gateway.audit_log import EACH_SECOND, AuditLog
from serving.gateway.envelope import ApiError
from serving.gateway.exchange import Exchange
from serving.gateway.guards.verdict import Finding, Verdict
from serving.gateway.metrics import Metrics
from tests.serving.conftest import until
from tests.serving.test_telemetry import exchange


def lines(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]


def value(metrics: Metrics, name: str) -> float:
    return metrics.registry.get_sample_value(f"ratchet_gateway_audit_{name}_total") or 0.0


def judged() -> Exchange:
    found = exchange()
    verdict = Verdict("input", action="redact", failures=["presidio: timeout, open"])
    verdict.findings.append(
        Finding("pii", "email", "messages.0.content", 10, 32, "pii-3", "redact", True)
    )
    found.judged(verdict)
    return found


def test_verdicts_refusals_and_events_are_lines(settings: Settings) -> None:
    folder, metrics = settings.state_dir / "audit", Metrics()
    audit = AuditLog(folder, metrics)
    audit.start()
    audit.event("config_taken", md5="0" * 32)
    found = judged()
    audit.ended(found)
    audit.ended(exchange())  # nothing to tell
    nobody = exchange(principal=None, error=ApiError("invalid_api_key", "Bearer sk-secret"))
    audit.ended(nobody)
    audit.ended(exchange(error=ApiError("engine_error", "x")))  # no refusal of ours
    until(lambda: value(metrics, "rows") == 3)  # readable while it runs
    assert len(lines(folder)) == 3
    audit.close()
    config, guard, refused = lines(folder)
    assert config["event"] == "config_taken" and config["time"].endswith("Z")
    assert guard == {
        "time": guard["time"], "event": "guard", "response_id": found.response_id,
        "tenant": "acme", "key_id": "0123456789ab", "side": "input", "action": "redact", "more": 0,
        "failures": ["presidio: timeout, open"],
        "findings": [{"guard": "pii", "kind": "email", "where": "messages.0.content", "start": 10,
                      "end": 32, "version": "pii-3", "action": "redact", "enforced": True}],
    }  # fmt: skip
    assert (refused["event"], refused["code"]) == ("refused", "invalid_api_key")
    assert refused["response_id"] == nobody.response_id and refused["key_id"] == ""
    (path,) = folder.iterdir()
    assert path.name == f"{config['time'][:10]}.jsonl"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    text = path.read_text()
    assert "jane.roe" not in text and "She said" not in text and "sk-secret" not in text


def test_a_flood_of_wrong_keys_is_counted_and_not_written(settings: Settings) -> None:
    folder, metrics = settings.state_dir / "audit", Metrics()
    audit = AuditLog(folder, metrics, limit=100_000)
    audit.start()
    total = 10 * EACH_SECOND
    for _ in range(total):
        audit.ended(exchange(principal=None, error=ApiError("invalid_api_key", "no")))
    audit.ended(exchange(error=ApiError("rate_limit_exceeded", "no")))  # not drowned by it
    audit.close()
    found = lines(folder)
    written = sum(line["event"] == "refused" for line in found if line.get("code") ==
                  "invalid_api_key")  # fmt: skip
    assert EACH_SECOND <= written <= 4 * EACH_SECOND  # the loop takes less than 3 seconds
    counted = sum(line["count"] for line in found if line["event"] == "more")
    assert written + counted == total
    assert sum(line.get("code") == "rate_limit_exceeded" for line in found) == 1


def test_what_does_not_fit_is_counted_and_the_file_stays_whole(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, metrics = settings.state_dir / "audit", Metrics()
    audit = AuditLog(folder, metrics, limit=2)
    for n in range(5):
        audit.event("started", n=n)
    assert value(metrics, "dropped") == 3
    audit.start()
    until(lambda: value(metrics, "rows") == 2)
    real = os.write
    monkeypatch.setattr(
        "serving.gateway.audit_log.os.write", lambda f, data: real(f, data[: len(data) // 2])
    )
    audit.event("started", n=7)
    until(lambda: value(metrics, "dropped") == 4)
    monkeypatch.undo()
    audit.event("started", n=8)
    audit.close()
    assert [line["n"] for line in lines(folder)] == [0, 1, 8]


def test_two_workers_append_to_one_file_without_tearing_lines(settings: Settings) -> None:
    folder = settings.state_dir / "audit"
    code = (
        "import sys; from pathlib import Path; from serving.gateway.audit_log import AuditLog;"
        "from serving.gateway.metrics import Metrics;"
        "a = AuditLog(Path(sys.argv[1]), Metrics(), limit=9999); a.start();"
        "[a.event('started', worker=sys.argv[2], n=n, pad='x' * 500) for n in range(2000)];"
        "a.close()"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(folder), name], cwd=ROOT) for name in "ab"
    ]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    found = lines(folder)
    for name in "ab":
        assert [line["n"] for line in found if line["worker"] == name] == list(range(2000))
