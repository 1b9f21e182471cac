"""MLflow's model registry: every release is a version of the model ``ratchet``.

The bytes live in DVC, so a version points at an *external* logged model whose tags hold the
release id and the digests of bundle, adapter and base. Aliases follow the ledger and never lead it:
``candidate`` is the release whose verdict it heard last, ``stable`` what the channel serves.

``python -m resources.registry`` puts the aliases right and says what it moved.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contracts.errors import RatchetError
from contracts.records import Release
from contracts.settings import Settings
from resources import releases
from resources.ledger import Ledger
from resources.ledger.actor import RUN_ID

MODEL = "ratchet"
#: The channel whose release has the alias of the same name.
STABLE = "stable"


def register(release: Release, settings: Settings) -> str:
    """Register ``release`` once; no alias moves. Returns the version number."""
    with _alone(settings):
        return _register(release, settings)


def follow(settings: Settings, ledger: Ledger) -> list[str]:
    """Point the aliases where the ledger says. Returns a sentence for each that was elsewhere."""
    with _alone(settings):
        client = _client(settings)
        moved = []
        for alias, wanted in _wanted(ledger).items():
            before = _release_at(alias, client)
            if before == wanted:
                continue
            version = _version_of(wanted, client)
            if version is None and (found := _find(wanted, settings)) is not None:
                version = _register(found, settings)
            if version is not None:
                client.set_registered_model_alias(MODEL, alias, version)
                moved.append(f"MLflow's alias {alias}: {before or 'none'} -> {wanted}")
            elif before is not None:
                client.delete_registered_model_alias(MODEL, alias)
                moved.append(
                    f"MLflow's alias {alias} was at {before} and is removed: the ledger says "
                    f"{wanted}, which is not installed here and cannot be registered"
                )
        return moved


def follow_later(settings: Settings) -> None:
    """:func:`follow` in a process of its own, whose import of MLflow nobody waits for.

    Not inside a Dagster run, which does it itself; nor where no store was made yet.
    """
    local = settings.mlflow_uri.removeprefix("sqlite:///")
    if not settings.tracking or RUN_ID in os.environ:
        return
    if local != settings.mlflow_uri and not Path(local).exists():
        return
    logs = settings.state_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / "registry.log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "resources.registry"],
            cwd=settings.root,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _wanted(ledger: Ledger) -> dict[str, str]:
    """Release id by alias."""
    found = {}
    if verdicts := ledger.entries(kinds=["verdict"], limit=1):
        found["candidate"] = verdicts[0].release
    last = ledger.last(STABLE)
    if last is not None and last.pointer is not None:
        found["stable"] = last.pointer.release
    return found


def _register(release: Release, settings: Settings) -> str:
    """The version of the release, made if there is none."""
    import mlflow

    from resources.tracking import Tracking

    tracking = Tracking(settings)
    mlflow.set_tracking_uri(settings.mlflow_uri)
    version = _version_of(release.id, tracking.client)
    if version is None:
        members = {
            key: release.members[key].md5
            for key in ("bundle", "adapter", "base_model")
            if key in release.members
        }
        tags = {"ratchet.release": release.id, "ratchet.git_commit": release.git_commit}
        tags |= {f"ratchet.{key}_md5": md5 for key, md5 in members.items()}
        runs = tracking.stage_runs(members["bundle"])
        model = mlflow.create_external_model(
            name=f"{MODEL}-{release.id}",
            source_run_id=runs[0].info.run_id if runs else None,
            tags=tags,
            params={"prompt": f"{release.prompt['name']}/{release.prompt['version']}"},
            model_type="vllm-bundle",
            experiment_id=tracking.experiment,
        )
        version = mlflow.register_model(f"models:/{model.model_id}", MODEL, tags=tags).version
    return str(version)


def _client(settings: Settings) -> Any:
    from resources.tracking import Tracking

    return Tracking(settings).client


def _version_of(release_id: str, client: Any) -> str | None:
    """The version that already holds this release."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.search_model_versions(
            f"name = '{MODEL}' and tag.`ratchet.release` = '{release_id}'"
        )
    except MlflowException:
        return None
    return str(found[0].version) if found else None


def _release_at(alias: str, client: Any) -> str | None:
    """The release that the alias points at; None where there is no such alias."""
    from mlflow.exceptions import MlflowException

    try:
        version = client.get_model_version_by_alias(MODEL, alias)
    except MlflowException:
        return None
    return str(version.tags.get("ratchet.release", f"version {version.version}"))


def _find(release_id: str, settings: Settings) -> Release | None:
    """The release's record, where this checkout has it."""
    with contextlib.suppress(RatchetError):
        return releases.load(settings, release_id).release
    with contextlib.suppress(RatchetError):
        found = releases.read_release(settings.root / "data" / "release.json")
        return found if found.id == release_id else None
    return None


@contextlib.contextmanager
def _alone(settings: Settings) -> Iterator[None]:
    """One at a time: two would register a release twice. The kernel drops a dead one's lock."""
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    with (settings.state_dir / ".registry.lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    from contracts import offline

    offline.apply()
    try:
        _settings = Settings.from_env()
        for _line in follow(_settings, Ledger.open(_settings)):
            print(_line, flush=True)
    except RatchetError as error:
        print(f"registry: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
