"""What stands, what serves, what waits: one look at this checkout."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from typing import Any

from contracts.errors import RatchetError
from contracts.settings import Settings
from resources import published


def answers(url: str, timeout: float = 2.0) -> bool:
    """Whether an HTTP address answers at all; any status counts."""
    try:
        with urllib.request.urlopen(url, timeout=timeout):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


def status(settings: Settings) -> dict[str, Any]:
    """The state as plain values; each part stands alone, so a broken one hides no other."""
    return {
        "dvc": dvc_status(settings),
        "release": current_release(settings),
        "channels": channels(settings),
        "ledger": ledger(settings),
        "published_index": published.published(settings),
        "services": {
            "gateway": {
                "url": settings.gateway_url,
                "up": answers(settings.gateway_url + "/healthz"),
            },
            "dagster": _service(settings.host, settings.dagster_port),
            "mlflow": _service(settings.host, settings.mlflow_port),
        },
        "spool": len(list(settings.spool_dir.glob("*.json"))),
    }


def _service(host: str, port: int) -> dict[str, Any]:
    url = f"http://{host}:{port}"
    return {"url": url, "up": answers(url)}


def dvc_status(settings: Settings) -> dict[str, Any]:
    """`dvc status` as {stage: what changed}; {"error": …} when DVC is busy or broken."""
    result = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "--json"],
        cwd=settings.root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if result.returncode:
        return {"error": result.stderr.strip().splitlines()[-1:] or "dvc status failed"}
    value: dict[str, Any] = json.loads(result.stdout or "{}")
    return value


def current_release(settings: Settings) -> dict[str, Any] | None:
    """The release in the workspace."""
    path = settings.root / "data" / "release.json"
    if not path.is_file():
        return None
    value = json.loads(path.read_text(encoding="utf-8"))
    return {
        "id": value["id"],
        "gate": value["gate"].get("verdict"),
        "git_commit": value["git_commit"],
    }


def channels(settings: Settings) -> dict[str, Any]:
    """Channels and whether their engines answer."""
    found: dict[str, Any] = {}
    for path in sorted(settings.channels_dir.glob("*.json")):
        value = json.loads(path.read_text(encoding="utf-8"))
        found[path.stem] = value | {"engine_up": answers(value["engine_url"] + "/health")}
    return found


def ledger(settings: Settings) -> dict[str, Any]:
    """The last row of every channel, and what does not agree with it."""
    from resources.ledger import Ledger
    from resources.promotion import differences

    try:
        book = Ledger.open(settings)
        rows = {
            name: row.model_dump() | {"line": str(row)} for name, row in book.channels().items()
        }
        return {"channels": rows, "problems": differences(settings, book)}
    except RatchetError as error:
        return {"channels": {}, "problems": [error.what]}


def render(value: dict[str, Any]) -> str:
    """The state as a terminal shows it."""
    lines = []
    release = value["release"]
    lines.append(
        f"release   {release['id']}  gate {release['gate']}  git {release['git_commit'][:12]}"
        if release
        else "release   none yet: run `make demo` or `dvc repro`"
    )
    for name, channel in value["channels"].items():
        up = "engine up" if channel["engine_up"] else "engine down: `ratchet up` starts it"
        lines.append(f"channel   {name} -> {channel['release']}  ({up}, {channel['engine_url']})")
        if row := value["ledger"]["channels"].get(name):
            reason = f": {' '.join(row['reason'].split())}" if row["reason"] else ""
            lines.append(f"          {row['line']}{reason}")
    if not value["channels"]:
        lines.append("channel   none: nothing is deployed")
    lines += [f"ledger    {problem}" for problem in value["ledger"]["problems"]]
    index = value["published_index"]
    lines.append(f"index     {index['md5']}" if index else "index     none published")
    changed = value["dvc"]
    if "error" in changed:
        lines.append(f"dvc       {changed['error']}")
    else:
        lines.append(
            "dvc       up to date" if not changed else f"dvc       stale: {', '.join(changed)}"
        )
    for name, service in value["services"].items():
        lines.append(f"{name:<9} {'up  ' if service['up'] else 'down'}  {service['url']}")
    if value["spool"]:
        lines.append(f"mlflow    {value['spool']} stage executions wait: `ratchet track`")
    return "\n".join(lines)
