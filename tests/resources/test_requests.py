"""The request log: readable at once, whole after a kill, honest about what it lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from contracts.errors import InputError
from contracts.records import RequestRecord
from contracts.settings import ROOT, Settings
from resources import requests
from resources.request_writer import DayWriter, recover
from resources.requests import find, new_response_id, read_day
from serving.gateway.metrics import Metrics
from serving.gateway.request_log import RequestLog
from tests.serving.conftest import until

DAY = "2026-11-20"


def record(n: int, day: str = DAY, **changes: Any) -> RequestRecord:
    values: dict[str, Any] = {
        "response_id": f"resp-{day.replace('-', '')}-{n:024x}",
        "time": f"{day}T12:00:{n % 60:02d}Z",
        "channel": "stable", "release": "r", "model": "m", "prompt_version": "answer/v1",
        "question": f"Größe {n}?", "answer": "☃", "refused": False, "stream": n % 2 == 0,
        "status": 200, "error": None, "chunk_ids": ["a#1-2"], "cited": [1], "scores": [0.5],
        "prompt_tokens": 3, "completion_tokens": None, "ttft_ms": 1.5, "latency_ms": 2.5,
        "retrieval_ms": None, **changes,
    }  # fmt: skip
    return RequestRecord(**values)


def row(n: int, day: str = DAY, **changes: Any) -> dict[str, Any]:
    return record(n, day, **changes).model_dump()


def test_the_schema_is_the_records_fields() -> None:
    assert requests.SCHEMA.names == list(RequestRecord.model_fields)


def test_a_record_is_readable_at_once_and_after_it_was_rolled(settings: Settings) -> None:
    writer = DayWriter(settings.requests_dir)
    assert read_day(settings, DAY).num_rows == 0
    writer.append([row(2), row(1)])
    assert read_day(settings, DAY)["response_id"].to_pylist() == [
        record(1).response_id, record(2).response_id]  # fmt: skip
    assert find(settings, record(1).response_id) == record(1)
    writer.close()
    (path,) = (settings.requests_dir / DAY).iterdir()
    assert path.name.endswith(f"-{os.getpid()}-0.parquet")
    assert RequestRecord(**pq.read_table(path).to_pylist()[0]) == record(2)
    assert read_day(settings, date(2026, 11, 20)).num_rows == 2
    assert find(settings, record(2).response_id) == record(2)
    assert find(settings, new_response_id(datetime.now(UTC))) is None
    assert find(settings, "something else") is None


def test_files_are_rolled_by_idleness_age_count_and_day(settings: Settings) -> None:
    def files() -> list[str]:
        return sorted(p.parent.name for p in settings.requests_dir.glob("*/*.parquet")
                      if not p.name.startswith("."))  # fmt: skip

    idle = DayWriter(settings.requests_dir, idle_s=0.05)
    idle.append([row(1)])
    idle.tend()
    assert files() == []
    until(lambda: (idle.tend(), files())[1] == [DAY])
    old = DayWriter(settings.requests_dir, idle_s=60, age_s=0.0)
    old.append([row(2)])
    old.tend()
    assert len(files()) == 2
    many = DayWriter(settings.requests_dir, rows=2)
    many.append([row(n) for n in (3, 4, 5)])
    assert len(files()) == 3
    many.append([row(6, "2026-11-21")])
    assert len(files()) == 4
    many.close()
    assert files() == [DAY] * 4 + ["2026-11-21"]
    assert requests.days(settings) == [DAY, "2026-11-21"]
    assert read_day(settings, DAY).num_rows == 5 and read_day(settings, "2026-11-21").num_rows == 1


def test_a_killed_writer_loses_nothing_that_it_wrote(settings: Settings) -> None:
    code = (
        "import json, os, sys; from pathlib import Path;"
        "from resources.request_writer import DayWriter;"
        "w = DayWriter(Path(sys.argv[1]));"
        "w.append([json.loads(sys.stdin.readline())]);"
        "os.kill(os.getpid(), 9)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(settings.requests_dir)], cwd=ROOT, text=True,
        input=record(1).model_dump_json() + "\n", check=False,
    )  # fmt: skip
    assert result.returncode == -9
    (journal,) = (settings.requests_dir / DAY).iterdir()
    with journal.open("a") as stream:
        stream.write('{"response_id": "torn')  # the line that the kill cut
    assert find(settings, record(1).response_id) == record(1)
    living = DayWriter(settings.requests_dir)
    living.append([row(2)])
    assert recover(settings.requests_dir) == 1  # the living writer's journal is left alone
    assert not journal.exists()
    assert read_day(settings, DAY).num_rows == 2
    living.close()
    assert recover(settings.requests_dir) == 0


def test_reading_while_it_is_written_and_rolled_sees_each_record_once(settings: Settings) -> None:
    total, stop = 300, threading.Event()
    problems: list[str] = []

    def read() -> None:
        last = 0
        while not stop.is_set():
            ids = read_day(settings, DAY)["response_id"].to_pylist()
            if len(ids) != len(set(ids)) or len(ids) < last:
                problems.append(f"{last} then {len(ids)}, {len(set(ids))} distinct")
            last = len(ids)

    reader = threading.Thread(target=read)
    reader.start()
    writer = DayWriter(settings.requests_dir, rows=7)
    for n in range(total):
        writer.append([row(n)])
    writer.close()
    stop.set()
    reader.join()
    assert problems == []
    assert read_day(settings, DAY).num_rows == total


def test_a_damaged_file_is_named_and_does_not_hide_the_others(settings: Settings) -> None:
    writer = DayWriter(settings.requests_dir)
    writer.append([row(1)])
    writer.close()
    (settings.requests_dir / DAY / "000000-1-0.parquet").write_bytes(b"PAR1junk")
    with pytest.raises(InputError, match="cannot be read in full") as error:
        read_day(settings, DAY)
    assert error.value.offenders[0].startswith("000000-1-0.parquet")
    assert find(settings, record(1).response_id) == record(1)
    with pytest.raises(InputError, match="not a day"):
        read_day(settings, "../etc")


def test_a_full_disk_costs_the_record_and_not_the_file(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = DayWriter(settings.requests_dir)
    writer.append([row(1)])
    real = os.write

    def half(handle: int, data: bytes) -> int:
        return real(handle, data[: len(data) // 2])

    monkeypatch.setattr("resources.request_writer.os.write", half)
    with pytest.raises(OSError, match="No space"):
        writer.append([row(2)])
    monkeypatch.undo()
    writer.append([row(3)])
    writer.close()
    assert read_day(settings, DAY).num_rows == 2


def test_the_queue_never_blocks_and_counts_what_it_drops(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Metrics()

    def value(name: str) -> float:
        return metrics.registry.get_sample_value(f"ratchet_gateway_request_log_{name}") or 0.0

    log = RequestLog(settings.requests_dir, metrics, limit=3)
    begun = time.monotonic()
    assert [log.offer(row(n)) for n in range(5)] == [True, True, True, False, False]
    assert time.monotonic() - begun < 0.5
    assert value("queue") == 3 and value("dropped_total") == 2
    log.start()
    until(lambda: value("rows_total") == 3)
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(DayWriter, "append", lambda *_: (_ for _ in ()).throw(full))
    log.offer(row(9))
    until(lambda: value("dropped_total") == 3)
    monkeypatch.undo()
    log.offer(row(10))  # the disk has room again
    until(lambda: value("rows_total") == 4)
    log.close()
    assert read_day(settings, DAY).num_rows == 4


def test_a_row_that_cannot_be_written_costs_only_itself(
    settings: Settings,
) -> None:
    metrics = Metrics()
    log = RequestLog(settings.requests_dir, metrics)
    for one in (row(1), row(2, "2026-11-21"), row(3) | {"cost": object()}, row(4)):
        log.offer(one)
    log.start()
    log.close()
    value = metrics.registry.get_sample_value
    assert value("ratchet_gateway_request_log_rows_total") == 3
    assert value("ratchet_gateway_request_log_dropped_total") == 1
    assert read_day(settings, DAY)["response_id"].to_pylist() == [
        record(1).response_id, record(4).response_id]  # fmt: skip
    assert read_day(settings, "2026-11-21").num_rows == 1


OLD = [
    "response_id", "time", "channel", "release", "model", "prompt_version", "question", "answer",
    "refused", "stream", "status", "error", "chunk_ids", "cited", "scores", "prompt_tokens",
    "completion_tokens", "ttft_ms", "latency_ms", "retrieval_ms",
]  # fmt: skip


def test_files_and_journals_from_before_the_newer_columns_stay_readable(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = settings.requests_dir / DAY
    home.mkdir(parents=True)
    rows = [record(n).model_dump() for n in (1, 2)]
    pq.write_table(requests.to_table(rows[:1]).select(OLD), home / "120000000000-1-0.parquet")
    line = json.dumps({name: rows[1][name] for name in OLD})
    (home / ".120000000000-1-1.jsonl").write_text(line + "\n")
    writer = DayWriter(settings.requests_dir)
    writer.append([row(3, tenant="acme", cost=0.5, attempts=2, guard="redact")])
    for _ in range(2):
        assert find(settings, record(1).response_id) == record(1)
        assert find(settings, record(2).response_id) == record(2)
        table = read_day(settings, DAY)
        assert table.schema == requests.SCHEMA
        assert table["tenant"].to_pylist() == ["", "", "acme"]
        assert table["cost"].to_pylist() == [0.0, 0.0, 0.5]
        recover(settings.requests_dir)  # the old journal becomes Parquet of today's columns
        writer.roll()
    assert not list(home.glob(".*.jsonl"))
    # A file without a column that never had a default is no file of this log.
    pq.write_table(read_day(settings, DAY).drop(["question"]), home / "130000000000-1-0.parquet")
    with pytest.raises(InputError) as error:
        read_day(settings, DAY)
    assert "'question' is missing" in error.value.offenders[0]


def test_nothing_that_people_must_not_read_reaches_the_log(settings: Settings) -> None:
    secret = "sk-proj-" + "Qz7Wx2Lm9Kp4Rt8Vb3Nc6Yd1Hf5Jg0Sa"
    log = RequestLog(settings.requests_dir, Metrics())
    log.start()
    long = "The words of somebody. " * 900  # over one slice of the masking
    log.offer(row(1, question=f"Mail jane.roe@corp-mail.com: {secret}", answer=long + secret))
    log.offer(row(2, question="Größe?", feature="jane.roe@corp-mail.com"))
    log.offer(row(3, feature="search-2"))
    log.close()
    one, two, three = (find(settings, record(n).response_id) for n in (1, 2, 3))
    assert one and two and three
    assert one.question == "Mail XXXX.XXX@XXXX-XXXX.XXX: XX-XXXX-" + "X" * 32
    assert one.answer == long + "XX-XXXX-" + "X" * 32
    assert (two.question, two.feature, three.feature) == ("Größe?", "other", "search-2")


def test_a_day_as_one_table_with_its_numbers(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = DayWriter(settings.requests_dir)
    writer.append([
        row(1), row(2, refused=True), row(3, error="engine_error", status=502, release=""),
    ])  # fmt: skip
    out = tmp_path / "monitoring" / "requests.parquet"
    assert requests.main(["--day", DAY, "--out", str(out)]) == 0
    assert pq.read_table(out).num_rows == 3
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert numbers == {
        "day": DAY, "requests": 3, "answered": 2, "refused": 1, "errors": 1, "streamed": 1,
        "completion_tokens": 0, "releases": ["r"],
    }  # fmt: skip
    assert requests.main(["--day", "2026-01-01", "--out", str(out)]) == 0
    assert pq.read_table(out).num_rows == 0  # a day without traffic is a day
    assert requests.main(["--day", "yesterday", "--out", str(out)]) == 1
    assert "not a day" in capsys.readouterr().err
