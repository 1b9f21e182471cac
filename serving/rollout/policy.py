"""What a rollout may do and when it must stop: one closed YAML file, in git.

In: ``data/policies/rollout.yaml``, or the file that the command names. Out: a frozen Policy; its
digest stands in the ledger's first row of the rollout, with the policy itself, so that a file that
changes while a rollout is under way changes nothing for it.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from contracts.digests import text_sha
from contracts.errors import ConfigError
from contracts.records import Strategy

PATH = Path("data/policies/rollout.yaml")
Share = Annotated[float, Field(gt=0, lt=1)]
#: Measured of every answer; each is a loss in [0, 1].
MetricName = Literal["errors", "ttft", "cost", "refusals", "quality"]
FloorName = Literal["errors", "unsafe"]


class Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Step(Block):
    share: float = Field(gt=0, le=1)  # of the sessions; of shadow: of the requests copied
    answers: int = Field(ge=1)  # of the candidate that must have been counted before going on


class Metric(Block):
    """How much worse the mean loss may be before it counts as harm."""

    margin: Share


class Exceeding(Metric):
    """The loss of an answer is 1 when it exceeds a quantile of the stable release's answers from
    before the first step."""

    quantile: Share = 0.9


class Cost(Exceeding):
    """By the price table, or, where an answer has no price, its weighted tokens."""

    input: float = Field(default=1.0, ge=0)
    output: float = Field(default=4.0, ge=0)


class Quality(Metric):
    """One minus the mean of the deterministic scores of an answer that is no refusal."""

    sample: float = Field(default=1.0, gt=0, le=1)  # of the answers: scoring one takes 0.1 ms


class Metrics(Block):
    errors: Metric = Metric(margin=0.02)
    ttft: Exceeding = Exceeding(margin=0.1)
    cost: Cost = Cost(margin=0.1)
    refusals: Metric = Metric(margin=0.1)
    quality: Quality = Quality(margin=0.1)


class Floors(Block):
    """Shares above which the candidate is taken back whatever else is known: all its answers
    count, not only the first of a session."""

    errors: Share = 0.1
    unsafe: Share = 0.01  # answers that a guard blocked


class Policy(Block):
    """The file."""

    strategy: Strategy = "canary"
    canary: tuple[Step, ...] = (
        Step(share=0.05, answers=50),
        Step(share=0.25, answers=150),
        Step(share=0.5, answers=300),
    )
    ab: Step = Step(share=0.5, answers=300)
    shadow: Step = Step(share=0.5, answers=300)
    blue_green: Step = Step(share=1.0, answers=300)
    reference: int = Field(default=100, ge=20)  # answers of the stable release before step one
    alpha: Share = 0.05  # of taking back a candidate that is no worse, in a whole rollout
    beta: Share = 0.05  # of promoting one that is worse than a margin
    per_session: int = Field(default=1, ge=1)  # answers of a session that count for the metrics
    step_minutes: float = Field(default=1440, gt=0)  # for one step; then it is undecided
    requests: int = Field(default=50_000, ge=1)  # of both arms; then it is undecided
    undecided: Literal["back", "hold"] = "back"
    metrics: Metrics = Metrics()
    floors: Floors = Floors()

    @model_validator(mode="after")
    def _grows(self) -> Self:
        shares = [step.share for step in self.canary]
        if not shares or any(b <= a for a, b in itertools.pairwise(shares)):
            raise ValueError("canary: every step needs a larger share than the one before")
        if shares[-1] >= 1 or self.ab.share >= 1:
            raise ValueError(
                "canary, ab: a share of 1 leaves no answers of the stable release to compare with; "
                "the last step ends with the promotion"
            )
        return self

    def steps(self, strategy: Strategy) -> tuple[Step, ...]:
        if strategy == "canary":
            return self.canary
        return ({"ab": self.ab, "shadow": self.shadow, "blue_green": self.blue_green}[strategy],)

    def limits(self, strategy: Strategy) -> tuple[float, float]:
        """Log evidence at which a metric of a step, and a floor, takes the candidate back.

        A fifth of alpha is the floors', shared by all of them over the whole rollout; the rest is
        the metrics', shared by them and by the steps, each of which begins from nothing.
        """
        tests = len(Metrics.model_fields) * len(self.steps(strategy))
        floors = len(Floors.model_fields) * len(self.steps(strategy))
        return math.log(tests / (0.8 * self.alpha)), math.log(floors / (0.2 * self.alpha))

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of every value, defaults among them."""
        return text_sha(json.dumps(self.model_dump(mode="json"), sort_keys=True))


def load(path: Path) -> Policy:
    """Read the file. Raises ConfigError with every offender."""
    try:
        return Policy.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except FileNotFoundError:
        raise ConfigError("The rollout policy does not exist.", where=str(path)) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"The rollout policy cannot be read: {error}", where=str(path)) from None
    except ValidationError as error:
        raise ConfigError(
            "The rollout policy cannot be used.",
            where=str(path),
            offenders=[
                f"{'.'.join(map(str, item['loc'])) or 'the file'}: {item['msg']}"
                for item in error.errors()
            ],
            next="mend these keys; docs/rollouts.md describes the file",
        ) from None
