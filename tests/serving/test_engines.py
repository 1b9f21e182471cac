"""Starting and ending engines: real processes, with a stand-in where vLLM would be imported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import InputError
from contracts.settings import ROOT
from resources import processes
from serving.engines import probe
from serving.engines.launch import flags, read_launch
from serving.engines.record import list_records, read_record, stop, write_record
from tests.serving.conftest import until
from tests.serving.factory import LAUNCH

FAKE = Path(__file__).with_name("fake_vllm")


def make_bundle(root: Path, how: str = "", **changes: Any) -> Path:
    """A bundle whose engine behaves as FAKE_VLLM=``how`` says."""
    (root / "checkpoint").mkdir(parents=True)
    (root / "checkpoint" / "config.json").write_text("{}")
    launch = {**LAUNCH, "env": {"FAKE_VLLM": how}, **changes}
    (root / "launch.json").write_text(json.dumps(launch))
    return root


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start ``python -m serving.engines``; whatever is left at the end is ended."""
    found: list[subprocess.Popen[str]] = []
    records = tmp_path / "records"

    def run(bundle: Path, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "serving.engines", "--bundle", str(bundle), *options]
        command += ["--log", str(tmp_path / "engine.log")]
        command += ["--record", str(records / f"e{len(found)}.json")]
        environ = {**os.environ, "PYTHONPATH": str(FAKE), "RATCHET_ROOT": str(tmp_path)}
        found.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environ,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
        return found[-1]

    yield run
    for process in found:
        process.kill()
        process.communicate()
    for record in list_records(records):
        stop(record, 0.2)


def ready(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    value: dict[str, Any] = json.loads(line)
    return value


def members(facts: dict[str, Any]) -> list[int]:
    return processes.session_of(facts["engine_pid"], 0)


def test_an_engine_announces_itself_and_sigterm_ends_the_whole_tree(
    start: Start, tmp_path: Path
) -> None:
    process = start(make_bundle(tmp_path / "bundle"))
    facts = ready(process)
    assert set(facts) == {"url", "pid", "engine_pid", "model", "seconds"}
    assert facts["pid"] == process.pid and facts["model"] == "nano"
    assert probe.healthy(facts["url"]) and probe.tokens_flow(facts["url"], "nano") == 1
    assert probe.in_flight(facts["url"]) == 0
    record = read_record(tmp_path / "records" / "e0.json")
    assert record is not None and record.state == "ready" and record.alive
    assert len(members(facts)) == 2
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert members(facts) == []
    assert not record.path.exists()
    words = (tmp_path / "engine.log").read_text()
    assert "--dtype bfloat16 --max-model-len 1024" in words
    assert "--enforce-eager --disable-uvicorn-access-log" in words


def test_a_killed_engine_is_an_error_with_its_log_and_leaves_no_children(
    start: Start, tmp_path: Path
) -> None:
    process = start(make_bundle(tmp_path / "bundle"))
    facts = ready(process)
    os.kill(facts["engine_pid"], signal.SIGKILL)
    _, said = process.communicate(timeout=15)
    assert process.returncode == 1
    assert "ended by itself (killed by SIGKILL)" in said and "fake vllm" in said
    assert members(facts) == []


def test_a_killed_supervisor_takes_the_engine_along(start: Start, tmp_path: Path) -> None:
    process = start(make_bundle(tmp_path / "bundle"))
    facts = ready(process)
    process.kill()
    until(lambda: not members(facts), 5)
    record = read_record(tmp_path / "records" / "e0.json")
    assert record is not None and not record.alive


@pytest.mark.slow
def test_what_a_double_kill_leaves_is_found_by_its_session(start: Start, tmp_path: Path) -> None:
    process = start(make_bundle(tmp_path / "bundle"))
    facts = ready(process)
    os.kill(process.pid, signal.SIGSTOP)  # so that it cannot clean up
    os.kill(facts["engine_pid"], signal.SIGKILL)
    process.kill()
    process.wait()
    record = read_record(tmp_path / "records" / "e0.json")
    assert record is not None and not record.alive and len(record.leftovers()) == 1
    assert stop(record)
    assert record.leftovers() == [] and not record.path.exists()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("die", "ended while it was starting (exit code 1)"),
        pytest.param("no-token", "without producing a token", marks=pytest.mark.slow),
        pytest.param("never-ready", "does not answer /health yet", marks=pytest.mark.slow),
    ],
)
def test_an_engine_that_does_not_start_is_explained(
    start: Start, tmp_path: Path, how: str, words: str
) -> None:
    process = start(make_bundle(tmp_path / "bundle", how), "--ready-timeout", "1")
    out, said = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "")
    assert words in said and str(tmp_path / "engine.log") in said
    if how == "die":
        assert "RuntimeError: weights are missing" in said
    assert list_records(tmp_path / "records") == []


@pytest.mark.slow
def test_a_port_lost_in_a_race_is_tried_again(start: Start, tmp_path: Path) -> None:
    facts = ready(start(make_bundle(tmp_path / "bundle", "port-taken-once")))
    assert probe.healthy(facts["url"])


@pytest.mark.slow
def test_sigterm_while_starting_ends_at_once(start: Start, tmp_path: Path) -> None:
    process = start(make_bundle(tmp_path / "bundle", "never-ready"), "--ready-timeout", "60")
    path = tmp_path / "records" / "e0.json"
    record = until(lambda: (r := read_record(path)) and r.engine_pid and r)
    assert record.state == "starting"
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert record.leftovers() == []


def test_a_recycled_pid_is_never_signalled(tmp_path: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        path = tmp_path / "r.json"
        ticks = until(lambda: processes.start_ticks(bystander.pid))
        facts = {
            "release": "r", "state": "ready", "pid": bystander.pid, "ticks": ticks - 1,
            "engine_pid": 0, "port": 1, "url": "http://x", "model": "m", "log": "",
        }  # fmt: skip
        write_record(path, facts)
        record = read_record(path)
        assert record is not None and not record.alive
        assert stop(record) is False and not path.exists()
        time.sleep(0.05)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_flags_are_what_vllms_parser_takes() -> None:
    words = flags(
        {"max_model_len": 1024, "enable-prefix-caching": False, "enforce_eager": True,
         "structured-outputs-config": {"backend": "xgrammar"}, "seed": None,
         "lora-modules": ["a=b", "c=d"]}
    )  # fmt: skip
    assert words == [
        "--max-model-len", "1024", "--no-enable-prefix-caching", "--enforce-eager",
        "--structured-outputs-config", '{"backend": "xgrammar"}', "--lora-modules", "a=b", "c=d",
    ]  # fmt: skip


def test_a_wrong_launch_file_lists_every_offender(tmp_path: Path) -> None:
    bundle = make_bundle(
        tmp_path / "b", args={"port": 1, "api_key": "x", "No Such": 1}, env={"REDIS_URL": "x"}
    )
    with pytest.raises(InputError) as error:
        read_launch(bundle)
    assert len(error.value.offenders) == 3 + 1
    for change in ({"model": "../elsewhere"}, {"engine": "trtllm"}, {"extra": 1}):
        (bundle / "launch.json").write_text(json.dumps({**LAUNCH, **change}))
        with pytest.raises(InputError, match=next(iter(change))):
            read_launch(bundle)


def test_the_engine_gets_no_address_of_ours_and_every_offline_switch(tmp_path: Path) -> None:
    launch = read_launch(make_bundle(tmp_path / "b"))
    given = {"PATH": "/bin", "POSTGRES_URL": "postgres://u:secret@h/d", "JUDGE_API_KEY": "sk"}
    environ = launch.environ(given)
    assert not {"POSTGRES_URL", "JUDGE_API_KEY"} & environ.keys() and environ["PATH"] == "/bin"
    assert environ["HF_HUB_OFFLINE"] == "1" and environ["VLLM_NO_USAGE_STATS"] == "1"


def test_the_launcher_answers_for_the_missing_distribution() -> None:
    """vLLM's own version lookups must work under the launcher, in children as well."""
    path = ROOT / "serving" / "engines" / "vllm_launcher.py"
    code = (
        "import runpy, sys, importlib.metadata as m; runpy.run_path(sys.argv[1]);"
        "print(m.version('vllm')); m.version('no-such-thing')"
    )
    command = [sys.executable, "-c", code, str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout.strip().startswith("0.32.") and result.stdout.strip().endswith("+cpu")
    assert "PackageNotFoundError" in result.stderr
