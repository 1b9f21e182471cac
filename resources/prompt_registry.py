"""MLflow's prompt registry as a mirror of git: every prompt version of a release, and the tags.

In: the prompts file that a release names. Out: the prompts ``ratchet-<name>``, one version for each
version and text, and MLflow aliases that are exactly the tags of ``tags.yaml``. Git leads and
MLflow follows: an alias that somebody set there by hand is put back, and nothing is read from there
to be served. Each run mirrors everything, so what one run could not do the next one does.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from contracts.errors import RatchetError
from contracts.records import Release
from contracts.settings import Settings
from resources import prompts
from resources.prompts import Prompts, PromptVersion

PREFIX = "ratchet-"
VERSION, SHA256 = "ratchet.version", "ratchet.sha256"


@dataclass
class Mirrored:
    """What one run did. ``problem`` says why it did not come to its end."""

    registered: list[str] = field(default_factory=list)  # answer/v2: those that are new
    aliases: list[str] = field(default_factory=list)  # answer/canary -> v2: those that changed
    problem: str | None = None

    def __str__(self) -> str:
        done = "; ".join([*self.registered, *self.aliases]) or "nothing new"
        return f"{done}; NOT ALL: {self.problem}" if self.problem else done


def mirror(release: Release, settings: Settings) -> Mirrored:
    """Mirror the prompts of ``release``. Never raises: a release does not wait for MLflow."""
    done = Mirrored()
    if not settings.tracking:
        done.problem = "tracking is off (RATCHET_TRACKING=off); the next run with it catches up"
        return done
    from mlflow.exceptions import MlflowException

    from resources.tracking import Tracking, resolve_dvc

    member = release.members["prompts"]
    try:
        held = prompts.read(resolve_dvc(member.path, member.md5, settings.root))
        tracking = Tracking(settings)
        with (settings.state_dir / "mlflow.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two runs at once would register versions twice
            _mirror(held, release, tracking, done)
    except RatchetError as error:
        done.problem = error.what
    except MlflowException as error:
        done.problem = f"MLflow did not take it, the next run catches up: {error}"
    return done


def _mirror(held: Prompts, release: Release, tracking: Any, done: Mirrored) -> None:
    import mlflow

    mlflow.set_tracking_uri(tracking.settings.mlflow_uri)
    mlflow.set_experiment(experiment_id=tracking.experiment)  # whose page lists the prompts
    client = tracking.client
    for name, versions in sorted(held.versions.items()):
        found = _numbers(client, PREFIX + name)
        known = {key: number for number, key in sorted(found.items())}
        for item in versions.values():
            if _key(item) not in known:
                known[_key(item)] = _register(client, item, release)
                done.registered.append(f"{name}/{item.version}")
        at = _aliases(client, PREFIX + name, found)
        wanted = {tag: known[_key(versions[version])] for tag, version in held.tags[name].items()}
        for tag in sorted(at.keys() - wanted.keys()):
            client.delete_prompt_alias(PREFIX + name, tag)
            done.aliases.append(f"{name}/{tag} removed")
        for tag, number in sorted(wanted.items()):
            if at.get(tag) != number:
                client.set_prompt_alias(PREFIX + name, tag, number)
                done.aliases.append(f"{name}/{tag} -> {held.tags[name][tag]}")


def _key(item: PromptVersion) -> tuple[str, str]:
    return item.version, item.sha256


def _numbers(client: Any, name: str) -> dict[int, tuple[str, str]]:
    """What each of MLflow's versions is a mirror of; ("", "") for one that somebody else made."""
    from mlflow.exceptions import MlflowException

    found: dict[int, tuple[str, str]] = {}
    token = None
    try:
        while True:
            page = client.search_prompt_versions(name, max_results=100, page_token=token)
            for item in page:
                found[int(item.version)] = item.tags.get(VERSION, ""), item.tags.get(SHA256, "")
            token = page.token
            if not token:
                return found
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise


def _aliases(client: Any, name: str, numbers: Iterable[int]) -> dict[str, int]:
    """Where each alias points. A search does not tell (MLflow 3.17), so every version is asked."""
    return {
        alias: number
        for number in numbers
        for alias in client.get_prompt_version(name, number).aliases
    }


def _register(client: Any, item: PromptVersion, release: Release) -> int:
    made = client.register_prompt(
        PREFIX + item.name,
        item.text,
        commit_message=f"{item} of release {release.id}, git {release.git_commit[:12]}",
        tags={VERSION: item.version, SHA256: item.sha256},
    )
    return int(made.version)
