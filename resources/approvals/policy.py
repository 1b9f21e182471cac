"""How risky a release is, by what differs from the one that is live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from contracts.errors import ConfigError
from contracts.records import Release
from contracts.settings import Settings

Level = Literal["low", "medium", "high"]
LEVELS: tuple[Level, ...] = get_args(Level)


class ApprovalPolicy(BaseModel):
    """data/policies/approval.yaml, which explains every key."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    approve_from: Level | Literal["never"]
    first: Level
    members: dict[str, Level]
    policy: Level
    other: Level

    def waits(self, level: Level) -> bool:
        """Whether a release of that risk waits for a person."""
        if self.approve_from == "never":
            return False
        return LEVELS.index(level) >= LEVELS.index(self.approve_from)


@dataclass(frozen=True)
class Risk:
    """A level and what made it so, the gravest first."""

    level: Level
    reasons: list[str]


def load(settings: Settings) -> ApprovalPolicy:
    """Read the policy. Raises ConfigError naming every key that is wrong."""
    import yaml

    path = settings.root / "data" / "policies" / "approval.yaml"
    try:
        return ApprovalPolicy.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(
            "There is no approval policy, so nobody can tell whether a release may go out.",
            where=str(path),
            next="restore the file from git",
        ) from None
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError(
            "The approval policy cannot be used.", where=str(path), offenders=wrong
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"The approval policy cannot be read: {error}", where=str(path)) from None


def assess(policy: ApprovalPolicy, live: Release | None, release: Release) -> Risk:
    """The risk of replacing ``live`` by ``release``."""
    if live is None:
        return Risk(policy.first, ["no release is live on this channel"])
    found: list[tuple[Level, str]] = []
    for name in [*release.members, *(set(live.members) - set(release.members))]:
        before, after = live.members.get(name), release.members.get(name)
        if (before and before.md5) != (after and after.md5):
            word = "changed" if before and after else "added" if after else "removed"
            level = policy.members.get(name, policy.other)
            found.append((level, f"{name} was {word} ({level})"))
    if live.prompt != release.prompt:
        level = policy.members.get("prompts", policy.other)
        found.append((level, f"another prompt version is used ({level})"))
    if live.gate.get("policy_sha256") != release.gate.get("policy_sha256"):
        found.append((policy.policy, f"the gate's policy was changed ({policy.policy})"))
    if not found:
        return Risk("low", ["nothing that answers a question differs"])
    found.sort(key=lambda item: -LEVELS.index(item[0]))
    return Risk(found[0][0], [reason for _, reason in found])
