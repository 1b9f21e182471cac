"""Everything that the environment may say, in one typed object.

Secrets and addresses come from here and nowhere else; what changes an artifact's content stands in
params.yaml instead.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from contracts.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Settings:
    """Addresses, ports and folders. Paths are absolute; ports are TCP on ``host``."""

    root: Path  # the checkout: dvc.yaml stands here
    state_dir: Path  # what this checkout runs with: releases, channels, logs, caches
    dagster_home: Path
    host: str
    gateway_port: int
    dagster_port: int
    mlflow_port: int
    mlflow_uri: str  # tracking store: sqlite:///… by default, or an MLflow server
    qdrant_url: str | None
    postgres_url: str | None
    redis_url: str | None
    embeddings_url: str | None  # of an OpenAI-compatible server, for vectors.backend: openai
    embeddings_api_key: str | None = field(repr=False)
    tracking: bool  # whether stages report their executions to MLflow
    qdrant_api_key: str | None = field(default=None, repr=False)
    gateway_config: Path = ROOT / "serving" / "gateway.yaml"
    keys_secret: str | None = field(default=None, repr=False)  # HMAC key of virtual keys at rest
    gateway_workers: int = 1  # processes behind the gateway's port
    judge_url: str | None = None  # of an OpenAI-compatible server, for scorecard.judge
    judge_api_key: str | None = field(default=None, repr=False)
    private_host: str = "127.0.0.1"  # the pages for operators: they have no login
    private_port: int = 8081
    otlp_endpoint: str | None = None  # where traces go; MLflow's own when there is an MLflow server

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read the environment; every wrong variable is named at once."""
        wrong: list[str] = []

        def port(name: str, default: int) -> int:
            text = environ.get(name, str(default))
            if text.isdigit() and int(text) < 65536:
                return int(text)
            wrong.append(f"{name}={text!r} is not a port (0 to 65535)")
            return default

        workers = environ.get("RATCHET_GATEWAY_WORKERS") or "1"
        if not workers.isdigit() or not 1 <= int(workers) <= 256:
            wrong.append(
                f"RATCHET_GATEWAY_WORKERS={workers!r} is not a number of workers (1 to 256)"
            )
            workers = "1"
        root = Path(environ.get("RATCHET_ROOT") or ROOT).resolve()
        state = Path(environ.get("RATCHET_STATE_DIR") or root / ".ratchet").resolve()
        settings = cls(
            root=root,
            state_dir=state,
            dagster_home=Path(environ.get("DAGSTER_HOME") or root / ".dagster").resolve(),
            host=environ.get("RATCHET_HOST") or "127.0.0.1",
            gateway_port=port("RATCHET_GATEWAY_PORT", 8080),
            dagster_port=port("RATCHET_DAGSTER_PORT", 3000),
            mlflow_port=port("RATCHET_MLFLOW_PORT", 5000),
            mlflow_uri=environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{state / 'mlflow.db'}",
            qdrant_url=environ.get("QDRANT_URL") or None,
            postgres_url=environ.get("POSTGRES_URL") or None,
            redis_url=environ.get("REDIS_URL") or None,
            embeddings_url=environ.get("EMBEDDINGS_URL") or None,
            embeddings_api_key=environ.get("EMBEDDINGS_API_KEY") or None,
            tracking=environ.get("RATCHET_TRACKING") != "off",
            qdrant_api_key=environ.get("QDRANT_API_KEY") or None,
            gateway_config=Path(
                environ.get("RATCHET_GATEWAY_CONFIG") or root / "serving" / "gateway.yaml"
            ).resolve(),
            keys_secret=environ.get("RATCHET_KEYS_SECRET") or None,
            gateway_workers=int(workers),
            judge_url=environ.get("JUDGE_URL") or None,
            judge_api_key=environ.get("JUDGE_API_KEY") or None,
            private_host=environ.get("RATCHET_PRIVATE_HOST") or "127.0.0.1",
            private_port=port("RATCHET_PRIVATE_PORT", 8081),
            otlp_endpoint=environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or None,
        )
        if wrong:
            raise ConfigError(
                "The environment holds values that cannot be used.",
                offenders=wrong,
                next="unset them or give a number, e.g. RATCHET_GATEWAY_PORT=8080",
            )
        return settings

    @property
    def gateway_url(self) -> str:
        return f"http://{self.host}:{self.gateway_port}"

    @property
    def private_url(self) -> str:
        return f"http://{self.private_host}:{self.private_port}"

    @property
    def releases_dir(self) -> Path:
        """Installed releases, one folder an id: what serving reads (never data/)."""
        return self.state_dir / "releases"

    @property
    def channels_dir(self) -> Path:
        return self.state_dir / "channels"

    @property
    def engines_dir(self) -> Path:
        return self.state_dir / "engines"

    @property
    def requests_dir(self) -> Path:
        """The request log: <YYYY-MM-DD>/*.parquet."""
        return self.state_dir / "requests"

    @property
    def embeddings_dir(self) -> Path:
        return self.state_dir / "embeddings"

    @property
    def caches_dir(self) -> Path:
        """Content-addressed caches other than embeddings: may be deleted at any time."""
        return self.state_dir / "caches"

    @property
    def monitoring_dir(self) -> Path:
        """Results of the dated assets: <YYYY-MM-DD>/*.json."""
        return self.state_dir / "monitoring"

    @property
    def spool_dir(self) -> Path:
        """Stage executions that MLflow has not been told of yet."""
        return self.state_dir / "spool"
