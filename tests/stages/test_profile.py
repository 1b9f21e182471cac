"""stages.profile: the load, the figures, a stand-in engine that streams, and once the real one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from contracts.errors import InputError, ServiceError
from contracts.params import Params
from contracts.settings import Settings
from stages import answers, bundle, harness, profile, profile_engine
from stages.profile_engine import Server
from tests.stages.evaluation_models import example, params, save_adapter, save_base


class Engine(BaseHTTPRequestHandler):
    """Streams as vLLM does: a role first, then tokens, then usage. ``mode`` breaks it."""

    mode = "good"
    seen: list[dict[str, Any]] = []  # noqa: RUF012 - emptied by the fixture

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        Engine.seen.append(body)
        if self.mode == "refuse":
            self.send_response(400)
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(b'{"error": "too long"}')
            return
        self.send_response(200)
        self.end_headers()
        count = body["max_tokens"] - (self.mode == "short")
        events = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
        events += [{"choices": [{"delta": {"content": f"w{n} "}}]} for n in range(count)]
        if self.mode == "break":
            events = [*events[:2], {"error": {"message": "engine died"}}]
        usage = {"completion_tokens": count, "prompt_tokens": 7}
        events.append({"choices": [], "usage": usage})
        with contextlib.suppress(ConnectionError):  # a client that gave up, as it should
            for event in events:
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(Engine, "mode", "good")
    Engine.seen.clear()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield Server(f"http://127.0.0.1:{httpd.server_port}", "m", 0, 1.0)
    httpd.shutdown()
    httpd.server_close()
    thread.join(5)


CHATS = [[{"role": "user", "content": f"Question {n}?"}] for n in range(6)]


def test_a_run_is_measured_token_by_token(server: Server) -> None:
    found = profile_engine.measure(server, CHATS, [4, 2, 8, 4, 2, 8], 3, salt="mixed")
    assert found["tokens"] == 28
    assert 0 < found["ttft_ms"]["p50"] <= found["ttft_ms"]["p95"]
    assert found["tokens_per_s"] == pytest.approx(28 / found["seconds"], rel=0.05)
    sent = {body["messages"][0]["content"]: body for body in Engine.seen}
    assert sent["Question 2?"]["max_tokens"] == sent["Question 2?"]["min_tokens"] == 8
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in Engine.seen)
    assert {body["cache_salt"] for body in Engine.seen} == {"mixed"}  # nothing cached by other runs


def test_answers_come_back_in_order(server: Server) -> None:
    rows = [
        {"question_id": str(n), "messages": json.dumps(chat), "prompt_tokens": 7}
        for n, chat in enumerate(CHATS)
    ]
    assert profile_engine.ask(server, rows, 3, 2) == ["w0 w1 w2"] * 6
    rows[4]["prompt_tokens"] = 8
    with pytest.raises(ServiceError, match="reads 1 of 6 prompts") as error:
        profile_engine.ask(server, rows, 3, 2)
    assert error.value.offenders == ["4: 7 tokens, the gate's model read 8"]
    timings = asyncio.run(
        profile_engine.drive(
            server, [{"messages": c, "max_tokens": n + 1} for n, c in enumerate(CHATS)], 4
        )
    )
    assert [item.tokens for item in timings] == [1, 2, 3, 4, 5, 6]
    assert all(item.first <= item.total for item in timings)


@pytest.mark.parametrize(
    ("mode", "says"),
    [("refuse", "answered 400"), ("break", "broke off"), ("short", "do not have the length")],
)
def test_an_engine_that_does_otherwise_is_an_error(
    server: Server, monkeypatch: pytest.MonkeyPatch, mode: str, says: str
) -> None:
    monkeypatch.setattr(Engine, "mode", mode)
    with pytest.raises(ServiceError, match=says):
        profile_engine.measure(server, CHATS, [4] * 6, 2, salt="equal")


def test_an_engine_that_cannot_start_says_why(tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(ServiceError, match=r"launch\.json"), profile_engine.engine(tmp_path):
        pass


def test_peak_memory_is_that_of_the_session() -> None:
    code = "x = bytearray(60_000_000); print(1, flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        assert 60e6 < profile_engine.peak_bytes(child.pid) < 200e6
        assert profile_engine.peak_bytes(os.getpid() + 10**7) == 0
    finally:
        child.communicate(b"\n", timeout=10)


def test_mixed_lengths_differ_sixteenfold_and_batches_are_mixed() -> None:
    lengths = profile.mixed_lengths(20, 64)
    assert sorted(set(lengths)) == [8, 16, 32, 64, 128]
    assert all(len(set(lengths[start : start + 5])) == 5 for start in range(0, 20, 5))


def test_prompts_are_spread_and_leave_room() -> None:
    rows = [{"question_id": str(n), "prompt_tokens": 100 * n} for n in range(10)]
    assert [row["question_id"] for row in profile.spread(rows, 3, 599)] == ["0", "2", "4"]
    assert len(profile.spread(rows, 99, 599)) == 6  # none twice
    with pytest.raises(InputError, match="a profile needs two"):
        profile.spread(rows, 3, 50)


def test_agreement_counts_equal_answers_and_shows_the_others() -> None:
    rows = [{"question": f"{n}?", "answer": text} for n, text in enumerate(["a b", "c d", "", "e"])]
    found = profile.agreement(rows, ["a b", "c x", "", "f"])
    assert found["equal"] == 0.5 and found["answers"] == 4
    assert found["word_overlap"] == pytest.approx((1 + 0.5 + 1 + 0) / 4)
    assert found["differing"][0] == {"question": "1?", "certified": "c d", "served": "c x"}


def test_a_busy_machine_is_named() -> None:
    machine = {"cpus": 2, "load_average": {"vllm": 1.5, "transformers": 1.9}}
    assert "quiet" in profile.busy(machine)
    machine["load_average"] = {"vllm": 1.5, "transformers": 7.1}
    assert "trust no ratio" in profile.busy(machine)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny bundle and the answers of its candidate to eight prompts."""
    folder = tmp_path_factory.mktemp("profile")
    save_base(folder / "base", positions=1024)
    save_adapter(folder / "base", folder / "adapter")
    harness.write_json(folder / "gate" / "verdict.json", {"verdict": "PASS"})
    given = {"base_model": folder / "base", "adapter": folder / "adapter", "gate": folder / "gate"}
    bundle.run(SimpleNamespace(**given, out=folder / "bundle"), small())
    systems = answers.Systems(folder / "base", folder / "adapter")
    chats = [[{"role": "user", "content": f"Rollback {n}?"}] for n in range(8)]
    found = systems.answer("candidate", chats, max_tokens=8)
    rows = [
        answers.row(example(n), "candidate", [], chat, item)
        for n, (chat, item) in enumerate(zip(chats, found, strict=True))
    ]
    answers.write(rows, folder / "answers.parquet")
    return SimpleNamespace(
        bundle=folder / "bundle", answers=folder / "answers.parquet", out=folder / "profile"
    )


def small() -> Params:
    values = params().model_dump()
    values["profile"] = {"prompts": 6, "concurrency": 2, "max_tokens": 8}
    values["answers"]["max_tokens"] = 8
    values["bundle"]["kv_cache_memory_bytes"] = 1 << 26
    return Params.model_validate(values)


@pytest.mark.slow
def test_the_peer_generates_what_was_asked(inputs: SimpleNamespace) -> None:
    chats = [json.loads(row["messages"]) for row in profile.read_rows(inputs.answers)]
    runs = {"equal": [8] * 8, "mixed": profile.mixed_lengths(8, 8)}
    found = profile.run_peer(inputs.bundle / "checkpoint", "bfloat16", chats, runs, 4)
    assert found["peak_bytes"] > 100e6 and found["threads"] >= 1
    assert found["runs"]["equal"]["tokens"] == 64
    assert len(found["runs"]["mixed"]["ttft"]) == 2  # one a batch
    with pytest.raises(ServiceError, match="transformers failed"):
        profile.run_peer(inputs.bundle / "nowhere", "bfloat16", chats, runs, 4)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_whole_stage_with_a_real_engine(inputs: SimpleNamespace, settings: Settings) -> None:
    metrics = profile.run(inputs, small())
    result = json.loads((inputs.out / "profile.json").read_text())
    assert result["vllm"]["equal"]["tokens"] == result["transformers"]["equal"]["tokens"] == 48
    assert result["vllm"]["peak_bytes"] > 5e8  # three processes, each with torch
    assert metrics["ratio_mixed"] == result["ratio"]["mixed"] > 0
    assert 0 <= result["agreement"]["equal"] <= 1 and result["agreement"]["answers"] == 8
    assert (inputs.out / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert "Served against certified" in (inputs.out / "report.html").read_text()
