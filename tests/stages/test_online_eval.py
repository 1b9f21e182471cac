"""stages.online_eval: a night of the request log in numbers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.judge_server import JudgeServer
from contracts.params import Params
from contracts.records import REFUSAL, Release, RequestRecord
from contracts.settings import Settings
from resources.judging import rubric
from resources.judging.agreement import Interval
from resources.judging.calibration import Calibration, write_store
from resources.requests import to_table
from stages import harness, online_eval, statistics
from tests.stages.evaluation_models import params

CHUNKS = {
    "docs:a#0-30": "The cache is content-addressed.",
    "docs:b#0-30": "Rollback flips one pointer.",
}

BY_RELEASE = {"rel-a": CHUNKS, "rel-b": CHUNKS}


def record(number: int, **changes: Any) -> dict[str, Any]:
    """One row as the request log keeps it."""
    row: dict[str, Any] = {
        "response_id": f"r{number:03d}",
        "time": f"2026-11-20T10:00:{number % 60:02d}Z",
        "channel": "stable",
        "release": "rel-a",
        "model": "m",
        "prompt_version": "v1",
        "question": "How?",
        "answer": "The cache is content-addressed. [1]",
        "refused": False,
        "stream": False,
        "status": 200,
        "error": None,
        "chunk_ids": list(CHUNKS),
        "cited": [1],
        "scores": [0.9, 0.8],
        "prompt_tokens": 100,
        "completion_tokens": 10,
        "ttft_ms": None,
        "latency_ms": float(number),
        "retrieval_ms": 1.0,
    }
    return RequestRecord.model_validate(row | changes).model_dump()


def test_a_night_in_numbers() -> None:
    rows = [record(n) for n in range(1, 7)]
    rows += [record(7, answer=REFUSAL, refused=True, cited=[])]
    rows += [record(8, answer="Rollback flips one pointer. [1]")]  # grounded, wrong passage
    rows += [record(9, answer="It is magic. [1]", release="rel-b")]
    rows += [record(10, status=503, error="engine gone", answer="", release="rel-b")]
    found = online_eval.evaluate(rows, BY_RELEASE, min_requests=5)
    assert found["requests"] == 10 and found["errors"] == 1 and found["error_rate"] == 0.1
    assert found["answered"] == 9
    assert found["refusal_rate"] == pytest.approx(1 / 9, abs=1e-6)
    assert found["citation_in_context"] == 0.75  # 6 of 8 answers that were no refusal
    assert found["grounded"] == 0.875
    assert found["invalid"] == 0
    assert [found[f"latency_{name}_ms"] for name in ("p50", "p95", "p99")] == [5.0, 9.0, 9.0]
    assert [found[f"ttft_{name}_ms"] for name in ("p50", "p95", "p99")] == [None] * 3
    assert (found["prompt_tokens"], found["completion_tokens"]) == (900, 90)
    assert found["verdict"] == "ok"
    assert found["releases"]["rel-b"]["citation_in_context"] == 0.0
    assert found["releases"]["rel-a"]["answered"] == 8


def test_an_unknown_chunk_is_invalid_and_enters_no_mean() -> None:
    rows = [record(1), record(2, chunk_ids=["docs:gone#0-1"])]
    found = online_eval.evaluate(rows, BY_RELEASE)
    assert found["invalid"] == 1
    assert found["citation_in_context"] == 1.0
    assert found["refusal_rate"] == 0.0


def test_a_night_of_nothing_has_no_rates() -> None:
    found = online_eval.evaluate([], BY_RELEASE, min_requests=1)
    assert found["verdict"] == "too_few"
    assert found["error_rate"] is None and found["refusal_rate"] is None
    assert found["citation_in_context"] is None and found["releases"] == {}


def test_rows_that_came_through_pandas_are_read() -> None:
    nan = float("nan")
    row = record(1) | {"ttft_ms": nan, "prompt_tokens": nan, "chunk_ids": tuple(CHUNKS)}
    found = online_eval.evaluate([row], BY_RELEASE)
    assert found["ttft_p50_ms"] is None and found["prompt_tokens"] == 0


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([1.0], 0.99, 1.0),
        ([2.0, 1.0], 0.5, 1.0),
        (list(map(float, range(1, 101))), 0.95, 95.0),
        ([], 0.5, None),
    ],
)
def test_percentile_is_nearest_rank(
    values: list[float], share: float, expected: float | None
) -> None:
    assert statistics.percentile(values, share) == expected


def install(settings: Settings) -> str:
    """An installed release with these chunks, as far as the evaluation reads it."""
    body: dict[str, Any] = {
        "members": {},
        "prompt": {},
        "model": {},
        "gate": {"verdict": "PASS"},
        "eval_set": "0",
        "params": {},
        "git_commit": "c" * 40,
    }
    name = Release.compute_id(body)
    folder = settings.releases_dir / name
    harness.write_json(folder / "release.json", body | {"id": name})
    rows = [{"chunk_id": chunk, "text": text} for chunk, text in CHUNKS.items()]
    pq.write_table(pa.Table.from_pylist(rows), folder / "chunks.parquet")
    return name


def test_the_process_reads_the_log_and_the_installed_release(
    tmp_path: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    name = install(settings)
    rows = [record(n, release=name) for n in range(3)] + [record(9, release="f" * 16)]
    pq.write_table(to_table(rows), tmp_path / "requests.parquet")
    given = SimpleNamespace(
        requests=tmp_path / "requests.parquet",
        judges=tmp_path / "judges.json",
        out=tmp_path / "online_eval.json",
    )
    metrics = online_eval.run(given, params())
    found = json.loads(given.out.read_text())
    assert found["citation_in_context"] == 1.0
    assert found["invalid"] == 1  # its release is gone; said so, and in no mean
    assert "ffffffffffffffff cannot be judged" in capsys.readouterr().out
    assert found["verdict"] == "too_few" and metrics["requests"] == 4.0


def test_the_process_asks_a_calibrated_judge_about_a_sample(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = install(settings)
    rows = [record(n, release=name, question=f"Question {n}?") for n in range(20)]
    pq.write_table(to_table(rows), tmp_path / "requests.parquet")
    values = params().model_dump()
    values["scorecard"]["judge"] = {"model": "m", "criteria": ["groundedness", "relevance"]}
    values["monitoring"]["judged"] = 6
    version = rubric.form("relevance").version("m")
    agreed = {"value": 0.8, "low": 0.6, "high": 0.9}
    known = Calibration(
        version=version,
        form="rubric_relevance",
        model="m",
        served=["recorded"],
        labels="0",
        n=100,
        right=Interval.model_validate(agreed),
        accuracy=0.8,
        kappa=Interval.model_validate(agreed),
        invalid={},
        confusion={},
    )
    write_store(tmp_path / "judges.json", {version: known})
    given = SimpleNamespace(
        requests=tmp_path / "requests.parquet",
        judges=tmp_path / "judges.json",
        out=tmp_path / "online_eval.json",
    )
    with JudgeServer(lambda _: {"evidence": "e", "score": 4}) as server:
        monkeypatch.setenv("JUDGE_URL", server.url)
        metrics = online_eval.run(given, Params.model_validate(values))
        asked = [json.loads(body["messages"][-1]["content"]) for body in server.bodies]
    assert len(asked) == 6 and all(set(item) == {"question", "answer"} for item in asked)
    assert {item["question"] for item in asked} <= {row["question"] for row in rows}
    found = json.loads(given.out.read_text())
    assert found["judge"]["sampled"] == 6
    assert metrics["judge_relevance"] == found["judge_relevance"] == 0.75
    assert "nobody has compared" in found["judge"]["skipped"]["judge_groundedness"]
    assert found["citation_in_context"] == 1.0
