"""The gate's policy, data/policies/gate.yaml: typed and closed, with one digest.

The scorecard records the digest before it scores, and the gate refuses a card that was made under
another policy: nobody may look at the scores first and move a threshold afterwards.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from contracts.errors import ConfigError
from contracts.params import Block

Opponent = Literal["base", "live", "anchor"]


class Looks(Block):
    """How often the evidence may be looked at, and with how many reserve questions."""

    alpha: float = Field(gt=0, le=0.2)  # of both errors: blocking an equal one, passing a worse one
    reserve: list[int] = Field(min_length=1, max_length=3)  # drawn in all, at each look

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if self.reserve[0] != 0 or sorted(set(self.reserve)) != self.reserve:
            raise ValueError("reserve begins with 0 and grows: [0, 100, 200]")
        return self


class Coverage(Block):
    """What may be missing."""

    max_missing: float = Field(ge=0, le=1)  # deterministic scores; tolerated ones count as worst
    judge_undecided: float = Field(ge=0, le=1)  # more invalid judge verdicts: UNDECIDED at best
    judge_invalid: float = Field(ge=0, le=1)  # more of them: INVALID
    min_common: float = Field(ge=0, le=1)  # of the other release's questions, still asked
    min_pairs: int = Field(ge=2)  # fewer questions in common compare nothing

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.judge_invalid < self.judge_undecided:
            raise ValueError("judge_invalid is not below judge_undecided")
        return self


class Blocking(Block):
    """A metric compared question by question."""

    metric: str
    scale: Literal["graded", "binary"]
    margin: float = Field(gt=0, le=0.5)  # a loss that is acceptable; a PASS excludes a larger one
    judge: bool = False  # a model gave the scores, so some may be invalid


class Floor(Block):
    metric: str
    min: float  # of the mean


class Quality(Block):
    blocking: list[Blocking] = Field(max_length=4)  # Holm over more costs more than they tell
    floors: list[Floor]


class Suite(Block):
    """Prompts of one kind that must all be withstood."""

    min: float = Field(ge=0, le=1)  # of the one-sided 95 % lower bound of the share that passes


class Safety(Block):
    suites: dict[str, Suite]


class Slice(Block):
    by: Literal["document", "kind", "style"]
    max_gap: float = Field(gt=0, le=1)  # blocks when a larger one is shown


class Fairness(Block):
    metric: str
    min_questions: int = Field(ge=2)  # of a group; smaller ones are not compared
    slices: list[Slice]


class Latency(Block):
    """Of the profile. Ceilings hold on a slow laptop; ratios compare on one machine."""

    ttft_p95_ms: float = Field(gt=0)
    tpot_p95_ms: float = Field(gt=0)
    min_tokens_per_s: float = Field(gt=0)  # at mixed lengths
    min_ratio_to_peer: float = Field(gt=0)  # tokens/s of the engine over those of transformers
    max_slowdown: float = Field(gt=1)  # against the live release, on the same kind of machine


class Resources(Block):
    max_peak_of_budget: float = Field(gt=0)  # measured peak over bundle.memory_budget_bytes
    max_peak_of_plan: float = Field(gt=0)  # measured peak over what the plan says


class Policy(Block):
    version: int = Field(ge=1)
    looks: Looks
    resamples: int = Field(ge=100)
    seed: int
    coverage: Coverage
    quality: Quality
    safety: Safety
    fairness: Fairness
    latency: Latency
    resources: Resources

    @property
    def sha256(self) -> str:
        """Of the canonical JSON of the content: comments and spelling do not count."""
        return digest(self.model_dump(mode="json"))


def digest(content: Any) -> str:
    """SHA-256 of canonical JSON: 64 hex digits."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def load_policy(path: Path) -> Policy:
    """Read and check a policy file. Raises ConfigError listing every offender."""
    import yaml

    try:
        return Policy.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(
            "The gate's policy does not exist.",
            where=str(path),
            next="restore data/policies/gate.yaml from git",
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"The gate's policy is not YAML: {error}", where=str(path)) from None
    except ValidationError as error:
        offenders = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError(
            "The gate's policy is not what the gate accepts.",
            where=str(path),
            offenders=offenders,
            next="contracts/policy.py says what each key means",
        ) from None
