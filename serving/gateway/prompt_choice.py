"""Which version of the release's prompt a session sees, and its messages, rendered off the loop.

In: the configuration's block ``prompts`` (prompt -> tag or version -> weight) and the live release.
Out: for each request a Choice, the same for all requests of a session and in every worker.

Assignment is weighted rendezvous hashing, keyed with the gateway's secret: each version gets a
score from the session's hash and its weight, and the highest wins. The weights are not part of the
hash, so a change of weights moves only what it has to: sessions go to versions whose share grew and
come from those whose share shrank. Tags are resolved first and versions are hashed, so a session
that is in the canary stays with that version when it becomes stable. The price: whoever is
assigned away from a version early is so in every later experiment against it. What is new with
every change of versions or weights is the experiment's id, which exposures are logged under.

The release leads: what it does not hold cannot be tried, and then nothing of the block is.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from typing import Annotated

from pydantic import AfterValidator, Field

from contracts.errors import RatchetError
from contracts.records import Passage
from contracts.settings import Settings
from resources.certification import certified, pair_of, path
from resources.prompts import NAME, Message, Prompts, PromptVersion
from serving.gateway.live import Live

log = logging.getLogger("ratchet.gateway.prompts")


def _some(weights: dict[str, float]) -> dict[str, float]:
    if sum(weights.values()) <= 0:
        raise ValueError("needs a weight above 0")
    return weights


Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
Weight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
#: The block: prompt -> tag or version -> weight.
Experiments = dict[Name, Annotated[dict[Name, Weight], AfterValidator(_some)]]


@dataclass(frozen=True)
class Choice:
    """What one request renders. ``experiment`` is "" where there is none."""

    prompt: PromptVersion
    experiment: str = ""

    @property
    def version(self) -> str:
        return f"{self.prompt.name}/{self.prompt.version}"


@dataclass(frozen=True)
class Arm:
    prompt: PromptVersion
    weight: float
    seed: bytes  # 16, secret

    def score(self, unit: bytes) -> float:
        number = int.from_bytes(blake2b(unit, key=self.seed, digest_size=8).digest(), "big")
        return -self.weight / math.log((number + 0.5) / 2**64)


@dataclass(frozen=True)
class Plan:
    """The block, resolved for one release. Without arms the release's own prompt is used."""

    own: PromptVersion
    arms: tuple[Arm, ...] = ()
    experiment: str = ""
    problem: str | None = None

    def choose(self, tenant: str, session: str, response_id: str) -> Choice:
        """The version for a session of a tenant; without a session, for this request alone."""
        if not self.arms:
            return Choice(self.own)
        kind, whose = ("session", session) if session else ("request", response_id)
        unit = f"{tenant}\0{kind}\0{whose}".encode("utf-8", "replace")
        return Choice(max(self.arms, key=lambda arm: arm.score(unit)).prompt, self.experiment)


def plan(
    experiments: Mapping[str, Mapping[str, float]],
    prompts: Prompts,
    own: PromptVersion,
    secret: bytes,
    certified: Collection[str],
) -> Plan:
    """Resolve the block. What the release does not hold, and what no gate has judged with its
    model, is the plan's ``problem``.

    Args:
        experiments: the block.
        prompts: every version that the release holds.
        own: the version that the release names.
        secret: the same for all workers; the first 64 bytes count.
        certified: SHA-256 of the prompt texts that passed with the release's model; ``own`` did.
    """
    if not experiments:
        return Plan(own)
    wrong = [
        f"prompts.{name}: this release renders '{own.name}'"
        for name in experiments
        if name != own.name
    ]
    weights: dict[str, float] = {}
    for name, weight in experiments.get(own.name, {}).items():
        try:
            found = prompts.get(own.name, name)
        except RatchetError as error:
            wrong.append(f"prompts.{own.name}.{name}: {error.what} ({error.next})")
            continue
        if found.sha256 not in {own.sha256, *certified}:
            wrong.append(
                f"prompts.{own.name}.{name}: {found.version} has not passed the gate with this "
                "release's model (ratchet release certified)"
            )
        weights[found.version] = weights.get(found.version, 0.0) + weight
    if wrong:
        return Plan(own, problem="; ".join(wrong))
    used = {version: weight for version, weight in sorted(weights.items()) if weight > 0}
    arms = tuple(
        Arm(prompts.get(own.name, version), weight, _seed(secret, f"{own.name}/{version}"))
        for version, weight in used.items()
    )
    parts = [f"{arm.prompt.version}:{arm.prompt.sha256}:{arm.weight!r}" for arm in arms]
    digest = blake2b("\n".join(parts).encode(), digest_size=4).hexdigest()
    return Plan(own, arms, f"{own.name}@{digest}")


def _seed(secret: bytes, version: str) -> bytes:
    return blake2b(
        version.encode(), key=secret[:64], digest_size=16, person=b"prompt-choice"
    ).digest()


class PromptChooser:
    """Chooses and renders. Its one thread keeps the loop free: rendering takes 0.3 to 10 ms, and a
    template that loops is ended only after ``resources.prompts.MAX_SECONDS``.

    Args:
        secret: keys the assignment.
        settings: where the certified pairs are.
    """

    def __init__(self, secret: bytes, settings: Settings) -> None:
        self._secret, self._settings = secret, settings
        self._known: list[tuple[object, object, object, Plan]] = []  # newest last
        self._thread = ThreadPoolExecutor(1, "render-prompt")

    def plan(self, experiments: Mapping[str, Mapping[str, float]], live: Live) -> Plan:
        """The plan for that configuration and release; a new problem is logged once."""
        stamp = self._stamp() if experiments else None
        for known in self._known:
            if known[0] is experiments and known[1] is live and known[2] == stamp:
                return known[3]
        model = pair_of(live.installed.release)["model"]
        passed = certified(self._settings, model) if experiments else frozenset[str]()
        found = plan(experiments, live.prompts, live.rag.prompt, self._secret, passed)
        self._known = [*self._known[-1:], (experiments, live, stamp, found)]  # of two live releases
        if found.problem:
            log.error(
                "the block 'prompts' is not used with release %s, its own prompt %s is: %s",
                live.release, live.prompt_version, found.problem,
            )  # fmt: skip
        elif found.arms:
            log.info("prompt experiment %s runs with release %s", found.experiment, live.release)
        return found

    def _stamp(self) -> tuple[int, int] | None:
        """Of the certified pairs: a look of 2 us, so that a new pair needs no restart."""
        try:
            stat = path(self._settings).stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns

    async def render(
        self, prompt: PromptVersion, question: str, passages: Sequence[Passage]
    ) -> tuple[list[Message], str]:
        """The messages, and the instructions among them, which no answer may give away. Raises
        InputError."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, _render, prompt, question, passages)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def _render(
    prompt: PromptVersion, question: str, passages: Sequence[Passage]
) -> tuple[list[Message], str]:
    return prompt.messages(question, passages), prompt.instructions
