"""Presidio behind the guard of personal data: the pool with processes that speak its protocol and
fail on request, then the real Presidio.

Trained spaCy pipelines are on no package index, so the real one reads a pipeline made here, whose
names come from a list. What a trained pipeline recognises is its makers' to say.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from contracts.errors import ConfigError, ServiceError
from contracts.settings import Settings
from serving.gateway.guards import presidio, run
from serving.gateway.guards.policy import PresidioConfig
from serving.gateway.guards.presidio import Pool
from serving.gateway.guards.verdict import Verdict
from tests.serving.conftest import Running, events
from tests.serving.conftest import until as until_true
from tests.serving.fake_engine import FakeEngine
from tests.serving.test_gateway_plain import configured, post
from tests.serving.test_guards_run import EMAIL, chat, count, made, until

WORKER = """
import json, os, sys, time
config = json.loads(sys.stdin.readline())
if config["model"] == "broken":
    print(json.dumps({"error": "no such model"}), flush=True)
    sys.exit()
if config["model"] == "slow":
    time.sleep(600)
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    texts = json.loads(line)["texts"]
    if "hang" in texts:
        time.sleep(600)
    if "die" in texts:
        os._exit(1)
    print(json.dumps({"spans": [[["person", 0, len(t)]] for t in texts]}), flush=True)
"""
PIPELINE = """
import sys
sys.modules["torch"] = None  # spaCy would import it
import spacy
pipeline = spacy.blank("en")
pipeline.add_pipe("entity_ruler").add_patterns(
    [{"label": "PERSON", "pattern": "Anna Lind"}, {"label": "GPE", "pattern": "Ulm"}])
pipeline.to_disk(sys.argv[1])
"""
GUARD = {"engine": "presidio", "budget_ms": 20_000}
BOTH = {"input": {"pii": GUARD}, "output": {"pii": GUARD}}


def with_pool(tmp_path: Path, work: Callable[[Pool], Awaitable[None]], **config: Any) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    pool = Pool(PresidioConfig(**{"model": "m", **config}), [sys.executable, str(script)])

    async def main() -> None:
        try:
            await pool.start()
            await work(pool)
        finally:
            await pool.close()

    asyncio.run(main())
    children = psutil.Process().children(recursive=True)
    assert [child for child in children if str(script) in child.cmdline()] == []


def test_configured_and_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presidio.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install \.\[presidio\]"):
        made({"input": {"pii": GUARD}}, presidio={"model": "en_core_web_sm"})


def test_a_worker_that_hangs_or_dies_is_replaced(tmp_path: Path) -> None:
    async def work(pool: Pool) -> None:
        assert [[s.kind for s in spans] for spans in await pool.find(["a", "bc"], 20)] == [
            ["person"], ["person"],
        ]  # fmt: skip
        with pytest.raises(TimeoutError):
            await pool.find(["hang"], 0.2)
        assert (await pool.find(["abc"], 20))[0][0].end == 3  # of the new worker
        with pytest.raises(ServiceError):
            await pool.find(["die"], 20)
        assert len(await pool.find(["abc"], 20)) == 1

    with_pool(tmp_path, work)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model": "broken"}, "no such model"),
        ({"model": "slow", "start_seconds": 0.2}, r"within 0\.2 s"),
    ],
)
def test_what_does_not_start_is_said_and_leaves_nobody(
    tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    async def nothing(pool: Pool) -> None:
        raise AssertionError("it started")

    with pytest.raises(ServiceError, match=said):
        with_pool(tmp_path, nothing, workers=2, **config)


def test_its_findings_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "require_presidio", lambda: None)
    guards = made(BOTH, presidio={"model": "m", "entities": ["PERSON"]})

    async def work(pool: Pool) -> None:
        guards._pool = pool
        request = chat("Anna")
        verdict = await guards.check_input("p", request)
        assert request.texts()[1] == "[PERSON_2]" and verdict.findings[1].kind == "person"
        assert (await guards.check_output("p", "Anna", request)).text == "[PERSON_1]"

    with_pool(tmp_path, work)


def test_out_of_band_it_is_asked_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "require_presidio", lambda: None)
    late = {**GUARD, "mode": "async", "action": "flag"}
    told: list[tuple[str, Verdict]] = []
    guards = made(
        {"input": {"pii": late}, "output": {"pii": late}},
        presidio={"model": "m", "entities": ["PERSON"]},
        report=lambda *found: told.append(found),
    )

    async def work(pool: Pool) -> None:
        guards._pool = pool
        guards._later.start()
        request = chat("Anna")
        assert (await guards.check_input("p", request, "in")).findings == []
        assert (await guards.check_output("p", "Anna", request, response_id="out")).text == "Anna"
        await until(lambda: len(told) == 2)
        await guards._later.close()

    with_pool(tmp_path, work)
    assert [response for response, _ in told] == ["in", "out"]
    assert {f.kind for _, verdict in told for f in verdict.findings} == {"person"}


def test_another_pipeline_is_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the cache would go on with what the old one let through."""
    monkeypatch.setattr(run, "require_presidio", lambda: None)
    plain = {"input": {"pii": {}}}
    versions = {
        (name, model): made(policy, presidio={"model": model}).version("p")
        for name, policy in (("both", BOTH), ("plain", plain))
        for model in ("a", "b")
    }
    assert versions["both", "a"] != versions["both", "b"]
    assert versions["plain", "a"] == versions["plain", "b"]


# -- the real one ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a spaCy pipeline that knows one person and one place."""
    if importlib.util.find_spec("presidio_analyzer") is None:
        pytest.skip("presidio-analyzer is not installed: pip install .[presidio]")
    path = str(tmp_path_factory.mktemp("pipeline"))
    subprocess.run([sys.executable, "-c", PIPELINE, path], check=True)
    return path


@pytest.mark.slow
def test_names_places_and_patterns_together(pipeline: str) -> None:
    guards = made(BOTH, presidio={"model": pipeline})
    said = f"\U0001f600 Anna Lind of Ulm ({EMAIL}) knows Anna Lind."

    async def main() -> None:
        await guards.start()
        try:
            request = chat(said, "Nobody is named here.")
            verdict = await guards.check_input("p", request)
            hidden = "\U0001f600 [PERSON_1] of [LOCATION_1] ([EMAIL_1]) knows [PERSON_1]."
            assert request.texts()[1:] == [hidden, "Nobody is named here."]
            here = [f for f in verdict.findings if f.where == "messages.1.content"]
            assert [(f.kind, said[f.start : f.end]) for f in here] == [
                ("person", "Anna Lind"), ("location", "Ulm"), ("email", EMAIL),
                ("person", "Anna Lind"),
            ]  # fmt: skip
            assert (await guards.check_output("p", said, chat("hi"))).text == hidden
        finally:
            await guards.close()

    asyncio.run(main())
    assert count(guards, "guard_findings_total", guard="pii", side="input", action="redact") == 5


@pytest.mark.slow
def test_through_the_whole_gateway(
    start: Callable[..., Running], own_engine: FakeEngine, pipeline: str
) -> None:
    """What a client says of a person reaches no engine; what the engine says no client, unless it
    streams: then patterns decide alone."""
    own_engine.answer = f"Anna Lind of Ulm: {EMAIL}"
    guards = {"policies": {"names": BOTH}, "presidio": {"model": pipeline}}
    running = start(config=configured(own_engine.url, guards=guards, guard="names")).ready()
    messages = [{"role": "user", "content": "Is Anna Lind in?"}]
    whole = post(running, messages=messages)
    assert own_engine.bodies[-1]["messages"][0]["content"] == "Is [PERSON_1] in?"
    told = whole.json()["choices"][0]["message"]["content"]
    assert told == "[PERSON_1] of [LOCATION_1]: [EMAIL_1]"
    streamed = events(post(running, messages=messages, stream=True))[:-1]
    told = "".join(c["delta"].get("content", "") for e in streamed for c in e["choices"])
    assert told == "Anna Lind of Ulm: [EMAIL_1]"


@pytest.mark.slow
def test_a_configuration_that_is_not_taken_leaves_no_process(
    start: Callable[..., Running], own_engine: FakeEngine, settings: Settings, pipeline: str
) -> None:
    """Neither one whose pipeline is not installed (nothing is downloaded), nor one that is refused
    when its Presidio runs already."""
    path = settings.root / "serving" / "gateway.yaml"
    path.parent.mkdir(parents=True)

    def write(model: str, **provider: str) -> None:
        guards = {"policies": {"names": BOTH}, "presidio": {"model": model}} if model else {}
        value = configured(own_engine.url, guards=guards).model_dump(
            mode="json", by_alias=True, exclude_unset=True
        )
        value["routing"]["providers"]["p0"].update(provider)
        path.with_suffix(".new").write_text(json.dumps(value))
        path.with_suffix(".new").replace(path)

    def refused() -> float:
        name = "ratchet_gateway_config_reloads_total"
        return running.metric(name, outcome="refused")

    write("")
    running = start(config=None).ready()
    workers = {child.pid for child in psutil.Process().children()}
    write("en_core_web_sm")
    until_true(lambda: refused() == 1, 60)
    write(pipeline, api_key_env="RATCHET_NO_SUCH_KEY")
    until_true(lambda: refused() == 2, 60)
    until_true(lambda: {child.pid for child in psutil.Process().children()} <= workers)
    assert post(running).status_code == 200
