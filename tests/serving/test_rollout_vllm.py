"""A rollout against two real vLLM replicas of the shipped base model, through a real gateway."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from contracts.settings import ROOT, Settings
from resources import processes, releases
from resources.ledger import Ledger
from serving.deploy.candidate import CandidateEngines
from serving.deploy.deployment import Patience
from serving.engines.record import list_records, read_record, stop
from serving.gateway.config import GatewayConfig
from serving.gateway.routing.config import Routing
from serving.rollout.controller import Controller
from tests.serving.conftest import Running, until
from tests.serving.rollouts import approval_policy, quick, releasable
from tests.serving.test_deploy import _again, open_json_rag
from tests.serving.test_rollout_gateway import ended, ticking

BUDGET = 600


def base_model(into: Path) -> None:
    """The shipped weights, out of DVC's folder, as dvc.lock names them."""
    store = ROOT / "data" / "shipped" / "files" / "md5"
    lock = yaml.safe_load((ROOT / "dvc.lock").read_text())
    (md5,) = [out["md5"] for out in lock["stages"]["base_model"]["outs"] if ".dir" in out["md5"]]
    into.mkdir(parents=True, exist_ok=True)
    for item in json.loads((store / md5[:2] / md5[2:]).read_text()):
        shutil.copy(store / item["md5"][:2] / item["md5"][2:], into / item["relpath"])


def install(settings: Settings, mark: str) -> str:
    """A release that a real engine can serve."""
    root = settings.root / mark
    releasable(root, mark)
    bundle = root / "data" / "bundle"
    shutil.rmtree(bundle / "checkpoint")
    base_model(bundle / "checkpoint")
    launch = {
        "engine": "vllm", "model": "checkpoint", "served_model_name": "nano", "env": {},
        "args": {"dtype": "bfloat16", "max-model-len": 512, "max-num-seqs": 8, "seed": 0,
                 "enforce-eager": True, "block-size": 32, "kv-cache-memory-bytes": 1 << 26},
    }  # fmt: skip
    (bundle / "launch.json").write_text(json.dumps(launch))
    return releases.install(_again(root), root, settings).name


@pytest.fixture
def engines(settings: Settings) -> Iterator[CandidateEngines]:
    yield CandidateEngines(settings, print, Patience(ready=400, drain=5), open_json_rag)
    for record in list_records(settings.engines_dir):
        for pid in processes.session_of(record.engine_pid, record.ticks):
            processes.send(pid, signal.SIGCONT)
        stop(record, 10)


@contextmanager
def held_up(pids: list[int]) -> Iterator[None]:
    """These processes get an eighth of the time: they stand still for 0.35 s of each 0.4 s."""
    stop_it = threading.Event()

    def work() -> None:
        while not stop_it.is_set():
            for sign, seconds in ((signal.SIGSTOP, 0.35), (signal.SIGCONT, 0.05)):
                for pid in pids:
                    processes.send(pid, sign)
                stop_it.wait(seconds)
        for pid in pids:
            processes.send(pid, signal.SIGCONT)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop_it.set()
        thread.join(10)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_replica_that_becomes_slow_is_taken_back(
    settings: Settings, engines: CandidateEngines, start: Callable[..., Running]
) -> None:
    approval_policy(settings)
    first, second = install(settings, "one"), install(settings, "two")
    engines.up(first, "stable", settings.root)
    routing = Routing.model_validate({"release_timeouts": {"first_byte": 120, "stall": 120}})
    gateway = start(config=GatewayConfig(routing=routing)).ready()
    gateway.client.timeout = httpx.Timeout(180)
    numbers = itertools.count()  # no question twice: answers from the cache count for nothing

    def ask(_: int) -> Any:
        return gateway.ask(f"What is fact {next(numbers)}?", max_tokens=8)

    found = Controller(settings, "stable", engines, engines.ledger)
    found.begin(second, quick(canary=[{"share": 0.5, "answers": 100_000}]), "canary")
    assert found.tick().did == "observe"
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(40)))
        assert {answer.status_code for answer in answers} == {200}
        # The last rows are written within 20 ms.
        report = until(lambda: (r := found.tick()).did != "nothing" and r)
        assert report.did == "forward", report.why
        pointer = releases.read_channel(settings, "stable")
        assert pointer is not None and pointer.candidate is not None
        assert pointer.candidate.engine_url != pointer.engine_url
        with ticking(found):
            # Both replicas answer, and equal ones are left alone.
            for begin in range(0, 120, 40):
                answers += pool.map(ask, range(begin, begin + 40))
            assert ended(settings) is None
            said = {a.headers["x-ratchet-release"] for a in answers}
            assert said == {first, second}
            record = read_record(settings.engines_dir / f"{second}.json")
            assert record is not None
            slow = [record.engine_pid, *processes.session_of(record.engine_pid, record.ticks)]
            asked = 0
            with held_up(sorted(set(slow))):
                while ended(settings) is None:
                    assert asked < BUDGET, "the request budget is spent"
                    answers += pool.map(ask, range(asked, asked + 8))
                    asked += 8
    row = Ledger.open(settings).last("stable")
    assert row is not None and row.kind == "rolled_back"
    assert "ttft" in row.reason or "errors" in row.reason
    assert {answer.status_code for answer in answers} == {200}
    found.tick()
    assert [r.release for r in list_records(settings.engines_dir)] == [first]
    assert not processes.session_of(record.engine_pid, record.ticks)
    print(f"taken back after {asked} requests: {row.reason}")
