"""A bundle's ``launch.json`` as a vLLM command line and environment.

In: ``<bundle>/launch.json``: {"engine": "vllm", "model": path relative to the bundle,
"served_model_name": str, "args": {flag: value}, "env": {name: value}}. Flags are vLLM's long
options without the leading dashes, with ``-`` or ``_``. Out: argv and the child's environment.
What belongs to the process and not to the release (host, port, model path) cannot stand in args.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contracts import offline
from contracts.errors import InputError

#: Set by whoever starts the process; in a bundle they would tie a release to a machine.
RESERVED = frozenset(
    {"host", "port", "model", "served-model-name", "uds", "ssl-keyfile", "api-key"}
)
#: Facts: eager starts fastest, and an access log line per request would fill the disk.
DEFAULTS: dict[str, Any] = {"enforce-eager": True, "disable-uvicorn-access-log": True}
_FLAG = re.compile(r"[a-z][a-z0-9-]*")
LAUNCHER = Path(__file__).with_name("vllm_launcher.py")


@dataclass(frozen=True)
class Launch:
    """How one bundle is started."""

    model: Path
    name: str  # served model name
    args: dict[str, Any]
    env: dict[str, str] = field(default_factory=dict)

    def argv(self, host: str, port: int) -> list[str]:
        """The engine's command line."""
        return [
            sys.executable,
            "-P",
            str(LAUNCHER),
            "serve",
            str(self.model),
            "--served-model-name",
            self.name,
            "--host",
            host,
            "--port",
            str(port),
            *flags({**DEFAULTS, **self.args}),
        ]

    def environ(self, base: Mapping[str, str]) -> dict[str, str]:
        """The child's environment: ours, every offline switch, then the bundle's own.

        Repository variables that point at our own services stay out of the engine's process.
        """
        kept = {key: value for key, value in base.items() if key not in _SECRETS}
        return {**kept, **offline.SWITCHES, **self.env}


#: Addresses may hold passwords; the engine needs none of them.
_SECRETS = frozenset(
    {
        "EMBEDDINGS_API_KEY",
        "EMBEDDINGS_URL",
        "JUDGE_API_KEY",
        "JUDGE_URL",
        "MLFLOW_TRACKING_URI",
        "POSTGRES_URL",
        "QDRANT_API_KEY",
        "QDRANT_URL",
        "REDIS_URL",
    }
)


def read_launch(bundle: Path) -> Launch:
    """Read and check ``launch.json``. Raises InputError naming every offender."""
    path = bundle / "launch.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            "The bundle has no launch.json.", where=str(bundle), next="build it: `dvc repro bundle`"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"launch.json cannot be read: {error}", where=str(path)) from None
    wrong = _problems(data, bundle)
    if wrong:
        raise InputError("launch.json cannot be used.", where=str(path), offenders=wrong)
    return Launch(
        model=(bundle / data["model"]).resolve(),
        name=data["served_model_name"],
        args={dashed(key): value for key, value in data.get("args", {}).items()},
        env={key: str(value) for key, value in data.get("env", {}).items()},
    )


def flags(args: Mapping[str, Any]) -> list[str]:
    """Options as vLLM's parser takes them: true ``--x``, false ``--no-x``, null nothing, lists
    one word each, objects JSON."""
    words: list[str] = []
    for key, value in args.items():
        name = dashed(key)
        if value is None:
            continue
        if value is True:
            words.append(f"--{name}")
        elif value is False:
            words.append(f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *(_word(item) for item in value)]
        else:
            words += [f"--{name}", _word(value)]
    return words


def dashed(key: str) -> str:
    """``max_model_len`` and ``--max-model-len`` as ``max-model-len``."""
    return key.removeprefix("--").replace("_", "-")


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def _problems(data: Any, bundle: Path) -> list[str]:
    if not isinstance(data, dict):
        return ["must be an object"]
    known = {"engine", "model", "served_model_name", "args", "env"}
    wrong = [f"{key}: unknown key" for key in sorted(data.keys() - known)]
    if data.get("engine") != "vllm":
        wrong.append(f"engine: {data.get('engine')!r}; this machine starts 'vllm'")
    for key in ("model", "served_model_name"):
        if not isinstance(data.get(key), str) or not data[key]:
            wrong.append(f"{key}: must be text")
    for key in ("args", "env"):
        if not isinstance(data.get(key, {}), dict):
            wrong.append(f"{key}: must be an object")
    if wrong:
        return wrong
    model = (bundle / data["model"]).resolve()
    if not model.is_relative_to(bundle.resolve()):
        wrong.append("model: leads out of the bundle")
    elif not (model / "config.json").is_file():
        wrong.append(f"model: no checkpoint at {data['model']} (config.json is missing)")
    for key in map(dashed, data.get("args", {})):
        if key in RESERVED:
            wrong.append(f"args.{key}: set by whoever starts the engine")
        elif not _FLAG.fullmatch(key):
            wrong.append(f"args.{key}: not the name of an option")
    wrong += [
        f"env.{key}: secrets and addresses do not belong in a bundle"
        for key in data.get("env", {})
        if key in _SECRETS
    ]
    return wrong
