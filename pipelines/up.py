"""`ratchet up`: Dagster UI and daemon, MLflow, engine and gateway, in the foreground.

One Ctrl-C (or SIGTERM) ends them all; so does the end of this process, however it comes. When one
of them dies, the rest is stopped and its last lines are shown.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType

from contracts.settings import Settings
from pipelines.instance import prepare_home
from pipelines.processes import Service

READY_SECONDS = 240.0  # a loaded two-core laptop; MLflow was seen to take 79 s


def services(settings: Settings) -> list[Service]:
    """What `up` runs, in the order in which it starts."""
    logs, root = settings.state_dir / "logs", settings.root
    python = sys.executable
    dagster_url = f"http://{settings.host}:{settings.dagster_port}"
    found = [
        Service(
            "gateway",
            [python, "-m", "serving.gateway"],
            settings.gateway_url + "/healthz",
            logs / "gateway.log",
            root,
        ),
        Service(
            "private",
            [python, "-m", "serving.private"],
            settings.private_url + "/healthz",
            logs / "private.log",
            root,
        ),
        Service(  # so that a candidate that breaks is gone in a second, whatever Dagster does
            "rollout",
            [python, "-m", "serving.rollout", "watch"],
            None,
            logs / "rollout.log",
            root,
        ),
        Service(
            "dagster-webserver",
            [python, "-m", "pipelines.webserver", "-w", "workspace.yaml",
             "-h", settings.host, "-p", str(settings.dagster_port)],
            dagster_url + "/server_info",
            logs / "dagster-webserver.log",
            root,
        ),
        Service(
            "dagster-daemon",
            [python, "-m", "dagster._daemon", "run", "-w", "workspace.yaml"],
            None,
            logs / "dagster-daemon.log",
            root,
        ),
    ]  # fmt: skip
    if settings.mlflow_uri.startswith("sqlite:"):  # an address means: somebody else runs it
        found.append(mlflow_server(settings))
    return found


def mlflow_server(settings: Settings) -> Service:
    """MLflow's own server over the local store, read by browsers; stages write to the store."""
    return Service(
        "mlflow",
        [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", settings.mlflow_uri,
         "--artifacts-destination", str(settings.state_dir / "mlartifacts"),
         "--host", settings.host, "--port", str(settings.mlflow_port), "--workers", "1"],
        f"http://{settings.host}:{settings.mlflow_port}/health",
        settings.state_dir / "logs" / "mlflow.log",
        settings.root,
        # Its job runner is for MLflow's own judges: six processes, 240 MB each, that we never use.
        {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )  # fmt: skip


def deploy(settings: Settings, *arguments: str) -> int:
    """`python -m serving.deploy …`: its progress is shown, its JSON is for scripts."""
    command = [sys.executable, "-m", "serving.deploy", *arguments]
    result = subprocess.run(command, cwd=settings.root, stdout=subprocess.DEVNULL, check=False)
    return result.returncode


def up(settings: Settings, say: Callable[[str], None]) -> None:
    """Run until Ctrl-C or SIGTERM. Raises ServiceError when one of the services dies."""
    prepare_home(settings)
    _migrate_tracking(settings)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's `&` hands SIGINT down as ignored
        signal.signal(number, _interrupt)
    running = services(settings)
    try:
        for service in running:
            service.start()
            say(f"{service.name:<18} starting")
        if something_serves(settings):
            say(f"{'engine':<18} starting (about 40 s)")
            deploy(settings, "ensure")
        else:
            say(
                f"{'engine':<18} nothing deployed yet: materialize `deployment`, or run `make demo`"
            )
        for service in running:
            service.wait_ready(READY_SECONDS)
            say(f"{service.name:<18} {service.url or 'running'}")
        say("all up; Ctrl-C ends them all")
        while True:
            for service in running:
                service.check()
            time.sleep(1.0)
    except KeyboardInterrupt:
        say("stopping")
    finally:
        for service in reversed(running):
            service.stop()
        deploy(settings, "down", "--all")


def something_serves(settings: Settings) -> bool:
    """Whether the ledger, or a pointer from before there was one, names a release. After a kill
    between the two there is a row and no pointer yet."""
    from resources.ledger import Ledger

    if any(settings.channels_dir.glob("*.json")):
        return True
    with contextlib.closing(Ledger.open(settings)) as ledger:
        return bool(ledger.channels())


def _migrate_tracking(settings: Settings) -> None:
    """Create MLflow's store before two processes race to do it."""
    if (
        settings.mlflow_uri.startswith("sqlite:")
        and not (settings.state_dir / "mlflow.db").exists()
    ):
        from resources.tracking import Tracking

        Tracking(settings)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
