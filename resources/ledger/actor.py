"""Who acts: the name that a row of the ledger carries. A name and no proof: see docs/ledger.md."""

from __future__ import annotations

import getpass
import os
import subprocess
from collections.abc import Mapping

#: Set by resources/dagster_process.py for the processes of a Dagster run.
RUN_ID = "DAGSTER_DVC_RUN_ID"
LONGEST = 200


def actor(environ: Mapping[str, str] = os.environ) -> str:
    """In this order: the Dagster run that this process belongs to (``dagster:<run id>``),
    RATCHET_ACTOR, git's user (``Ann <ann@example.org>``), the login name."""
    if run := environ.get(RUN_ID):
        return f"dagster:{run}"[:LONGEST]
    named = " ".join((environ.get("RATCHET_ACTOR") or "").split())
    return (named or _git_user() or _login())[:LONGEST]


def _git_user() -> str:
    name, mail = (_git("user.name"), _git("user.email"))
    return f"{name} <{mail}>" if name and mail else name or mail


def _git(key: str) -> str:
    try:
        found = subprocess.run(
            ["git", "config", "--get", key], capture_output=True, text=True, check=False, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine
        return ""
    return " ".join(found.stdout.split())


def _login() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"uid {os.getuid()}"
