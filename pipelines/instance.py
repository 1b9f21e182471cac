"""Dagster's home of this checkout: where its state lives, and how it is told.

SQLite under ``.dagster`` by default, Postgres when ``POSTGRES_URL`` is set. The file is written
anew on every start, so that it cannot drift from the environment.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from contracts.settings import Settings

POOL_LIMIT = 1  # one DVC command a checkout: related stages answer "busy" instead of waiting


def dagster_yaml(settings: Settings) -> dict[str, Any]:
    """The instance's configuration. The address itself stays in the environment."""
    config: dict[str, Any] = {
        "telemetry": {"enabled": False},
        "nux": {"enabled": False},
        "concurrency": {"pools": {"granularity": "op", "default_limit": POOL_LIMIT}},
        "run_monitoring": {"enabled": True, "start_timeout_seconds": 180},
    }
    if settings.postgres_url:
        config["storage"] = {"postgres": {"postgres_url": {"env": "POSTGRES_URL"}}}
    return config


def prepare_home(settings: Settings) -> Path:
    """Write dagster.yaml into the home, point this process at it, and make its databases."""
    import yaml

    home = settings.dagster_home
    home.mkdir(parents=True, exist_ok=True)
    part = home / f"dagster.yaml.{os.getpid()}.part"
    part.write_text(yaml.safe_dump(dagster_yaml(settings)), encoding="utf-8")
    os.replace(part, home / "dagster.yaml")
    os.environ["DAGSTER_HOME"] = str(home)
    if not settings.postgres_url:
        _make_databases(home)
    return home


def _make_databases(home: Path) -> None:
    """SQLite's, once. Web server and daemon start together, and each would make what is not there:
    the later one dies of "table alembic_version already exists"."""
    made = home / ".databases-made"
    if made.exists():
        return
    import dagster as dg

    with dg.DagsterInstance.from_config(str(home)) as instance:
        instance.get_runs_count()
        instance.all_asset_keys()
        instance.all_instigator_state()
    made.touch()
