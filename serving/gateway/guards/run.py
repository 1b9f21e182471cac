"""Guards: one call for what comes in, one for what goes out, one for streams, one for passages.

Patterns cost microseconds for a prompt and run where they are called. A long text is read in
pieces of about a millisecond, and the event loop turns between them; that is also where the latency
budget is looked at. Presidio runs in processes of its own, what mode ``async`` asks for when the
answer is on its way (later.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from resources.recognisers.spans import Found, without_overlap
from serving.gateway.api_request import ApiRequest
from serving.gateway.envelope import ApiError
from serving.gateway.guards import texts
from serving.gateway.guards.budget import Budget
from serving.gateway.guards.injection import score
from serving.gateway.guards.later import Later
from serving.gateway.guards.leak import (
    MIN_WORDS,
    Index,
    Literals,
    PromptIndex,
    PromptParts,
    read_canaries,
)
from serving.gateway.guards.passages import all_hits, neutralised
from serving.gateway.guards.patterns import HoldBack, find
from serving.gateway.guards.plan import Part, Plan
from serving.gateway.guards.policy import Guard, GuardPolicy, GuardsConfig, PassagesGuard
from serving.gateway.guards.presidio import Pool, require_presidio
from serving.gateway.guards.schema import Schemas
from serving.gateway.guards.stream import StreamGuard, Window
from serving.gateway.guards.texts import Slot
from serving.gateway.guards.verdict import Placeholders, Verdict
from serving.gateway.guards.work import (
    SLICE,
    fed,
    finding,
    injected,
    judge,
    replace,
    spans,
)
from serving.gateway.metrics import Metrics

#: (response id, verdict): what a guard in mode async found.
Report = Callable[[str, Verdict], None]
NO_PLAN = Plan(GuardPolicy())


class Guards:
    """Every policy of the configuration.

    Args:
        config: the block ``guards``.
        metrics: findings, failures, drops, seconds.
        report: told what guards in mode async find; never blocks.
        environ: where ``config.canaries_env`` is looked up.
    """

    def __init__(
        self,
        config: GuardsConfig,
        metrics: Metrics,
        report: Report = lambda response_id, verdict: None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._metrics, self._report = metrics, report
        self._seconds = {side: metrics.guard_seconds.labels(side) for side in ("input", "output")}
        self._plans = {
            name: Plan(policy, config.presidio) for name, policy in config.policies.items()
        }
        name = config.canaries_env
        self._canaries = read_canaries(environ.get(name, ""), name) if name else ()
        self._prompts, self._schemas = PromptIndex(), Schemas()
        self._budget = Budget(metrics)
        self._pool: Pool | None = None
        if config.presidio:
            require_presidio()
            self._pool = Pool(config.presidio)
        self._later = Later(config.later, metrics, self._found_later)

    async def start(self) -> None:
        """Start what runs beside requests. Raises ServiceError when Presidio does not start."""
        if self._pool:
            await self._pool.start()
        self._later.start()

    async def close(self) -> None:
        await self._later.close()
        if self._pool:
            await self._pool.close()

    def knows(self, policy: str) -> bool:
        """Whether a key may name this policy; "" is the policy without guards."""
        return not policy or policy in self._plans

    def reads_output(self, policy: str) -> bool:
        """Whether answers have to be parsed for it at all."""
        plan = self._plan(policy)
        return bool(plan.output or plan.output_later)

    def version(self, policy: str) -> str:
        """Changes with the policy and with any rule: part of every cache key."""
        return self._plan(policy).version

    async def check_input(self, policy: str, request: ApiRequest, response_id: str = "") -> Verdict:
        """Read a request, and redact its body in place. ``verdict.error`` ends it."""
        plan = self._plan(policy)
        verdict = Verdict("input")
        if plan.input is None and plan.input_later is None:
            return verdict
        slots = texts.slots(request)
        part = plan.input
        if part:
            if part.changes and texts.has_tokens(request):
                verdict.block("content_blocked", "Send text: token ids cannot be checked.", "input")
                return verdict
            with self._seconds["input"].time():
                await self._read(part, slots, verdict)
            self._count(verdict)
        if plan.input_later and verdict.error is None:
            later = plan.input_later
            frozen = [Slot(s.where, s.role, [s.text], 0) for s in slots]
            self._later.put(response_id, lambda: self._read(later, frozen, Verdict("input")))
        return verdict

    def check_passages(
        self, policy: str, passages: Sequence[str]
    ) -> tuple[list[str | None], Verdict]:
        """Each passage as it may enter a prompt; None for one that has to stay out."""
        guard, verdict = self._plan(policy).passages, Verdict("passages")
        shown: list[str | None] = list(passages)
        if guard is None:
            return shown, verdict
        for number, text in enumerate(passages):
            found = all_hits(text)
            if score(found) < guard.threshold:
                continue
            for hit in found:
                place = (f"passages.{number}", hit.start, hit.end)
                verdict.add(finding("passages", hit.rule, place, guard), guard)
            shown[number] = _passage(text, guard)
        self._count(verdict)
        return shown, verdict

    def stream(
        self, policy: str, request: ApiRequest, prompts: Sequence[str] | None = None
    ) -> StreamGuard | None:
        """For one answer of a stream; None when its text may pass as it comes.

        ``prompts`` must not come out; by default the request's system messages.
        """
        part = self._plan(policy).output
        return self._stream(part, request, prompts) if part else None

    async def check_output(
        self,
        policy: str,
        text: str,
        request: ApiRequest,
        prompts: Sequence[str] | None = None,
        response_id: str = "",
        *,
        promised: bool = True,
    ) -> Verdict:
        """Read one whole answer. ``verdict.text`` may go out, unless ``verdict.error``.

        ``promised``: ``response_format`` is about this text (it is not about arguments of calls).
        """
        plan = self._plan(policy)
        verdict = Verdict("output", text=text)
        if plan.output:
            with self._seconds["output"].time():
                verdict = await self._read_answer(plan.output, text, request, prompts, promised)
        self._finish(plan, text, request, prompts, response_id, promised)
        self._count(verdict)
        return verdict

    def after_stream(
        self,
        policy: str,
        guard: StreamGuard | None,
        text: str,
        request: ApiRequest,
        response_id: str = "",
    ) -> Verdict:
        """The verdict of a stream that has ended: what its guard found, the schema, and what is
        still to be done out of band. ``text`` is what the model wrote."""
        plan = self._plan(policy)
        verdict = guard.verdict if guard else Verdict("output")
        if plan.output:
            self._schema(plan.output, request, text, verdict, too_late=True)
        self._finish(plan, text, request, None, response_id, True)
        self._count(verdict)
        return verdict

    # -- the parts of a check ------------------------------------------------------------------

    def _plan(self, policy: str) -> Plan:
        if not policy:
            return NO_PLAN
        plan = self._plans.get(policy)
        if plan is None:
            raise ApiError("guard_unavailable", "The guard policy of this key does not exist.")
        return plan

    async def _read(self, part: Part, slots: list[Slot], verdict: Verdict) -> Verdict:
        """What a request says, into the verdict and, redacted, back into its texts."""
        await self._injection(part, slots, verdict)
        if verdict.error is None:
            await self._patterns(part, slots, verdict)
        return verdict

    async def _read_answer(
        self,
        part: Part,
        text: str,
        request: ApiRequest,
        prompts: Sequence[str] | None,
        promised: bool,
    ) -> Verdict:
        guard = self._stream(part, request, prompts, text)
        verdict = await self._whole(part, guard, text) if guard else Verdict("output", text=text)
        if part.presidio and verdict.error is None:
            await self._presidio_output(part, verdict)
        if promised:
            self._schema(part, request, text, verdict)
        return verdict

    async def _patterns(self, part: Part, slots: list[Slot], verdict: Verdict) -> None:
        """Personal data and secrets; texts are replaced when nothing is blocked."""
        guards = part.patterns
        if not guards:
            return
        name = "pii" if part.pii else "secrets"
        found = await self._budget.spend(guards, name, spans(slots), verdict)
        if found is None:
            return
        if part.presidio and part.pii:
            more = await self._presidio([slot.text for slot in slots], part.pii, verdict)
            found = [without_overlap([*a, *b]) for a, b in zip(found, more, strict=True)]
        if verdict.error is None:
            judge(part, slots, found, verdict)
        if verdict.action == "redact":
            names = Placeholders()
            for slot, there in zip(slots, found, strict=True):
                replace(slot, there, part.rules, names)

    async def _injection(self, part: Part, slots: list[Slot], verdict: Verdict) -> None:
        guard = part.injection
        if guard is None:
            return
        found = await self._budget.spend(
            [guard], "injection", injected(slots, guard.threshold), verdict
        )
        for rule, place in found or []:
            verdict.add(finding("injection", rule, place, guard), guard)
        if found and guard.enforced:
            verdict.block(
                "content_blocked", "The request looks like an attempt at prompt injection."
            )

    async def _whole(self, part: Part, guard: StreamGuard, text: str) -> Verdict:
        guards = [one for one in (part.pii, part.secrets, part.leak) if one]
        name = "pii" if part.pii else "secrets" if part.secrets else "leak"
        shown = await self._budget.spend(guards, name, fed(guard, text), guard.verdict)
        guard.verdict.text = text if shown is None else shown
        return guard.verdict

    async def _presidio(
        self, found: list[str], guard: Guard, verdict: Verdict
    ) -> list[list[Found]]:
        """Spans of each text; none when it failed and the policy lets that pass."""
        assert self._pool
        try:
            return await self._pool.find(found, guard.budget_ms / 1000)
        except Exception as error:
            self._budget.failed("pii", [guard], error, verdict)
        return [[] for _ in found]

    async def _presidio_output(self, part: Part, verdict: Verdict) -> None:
        assert part.pii
        (found,) = await self._presidio([verdict.text], part.pii, verdict)
        slot = Slot("answer", "assistant", [verdict.text], 0)
        judge(part, [slot], [found], verdict)
        if verdict.error is None:
            replace(slot, found, part.rules, Placeholders())
            verdict.text = slot.text

    def _schema(
        self, part: Part, request: ApiRequest, text: str, verdict: Verdict, too_late: bool = False
    ) -> None:
        guard = part.schema
        problem = guard and self._schemas.problem(request.body.get("response_format"), text)
        if not guard or not problem:
            return
        place = ("answer", 0, len(text))
        verdict.add(finding("schema", problem, place, guard), guard)
        if guard.enforced and not too_late:
            verdict.block("output_blocked", "The answer is not what response_format promised.")

    def _stream(
        self,
        part: Part,
        request: ApiRequest,
        prompts: Sequence[str] | None,
        whole: str | None = None,
    ) -> StreamGuard | None:
        """The windows of an answer. Where the ``whole`` of it is known and a glance shows that a
        window would find nothing, there is none."""
        windows: list[Window] = []
        canaries = self._canaries if part.leak else ()
        if canaries and (whole is None or any(canary in whole for canary in canaries)):
            windows.append(Literals(canaries))
        if part.leak and part.leak.words:
            secret = texts.system_prompts(request) if prompts is None else prompts
            index = self._prompts(secret) if secret else Index()
            words = min(part.leak.words, index.count)
            if words >= MIN_WORDS and (whole is None or index.may_stand_in(whole, words)):
                windows.append(PromptParts(index, words))
        if part.patterns and (whole is None or len(whole) > SLICE or find(whole)):
            windows.append(HoldBack())
        return StreamGuard(windows, part.rules) if windows else None

    def _count(self, verdict: Verdict) -> None:
        for one in verdict.findings:
            action = one.action if one.enforced else "flag"
            self._metrics.guard_findings.labels(one.guard, verdict.side, action).inc()

    # -- out of band ---------------------------------------------------------------------------

    def _finish(
        self,
        plan: Plan,
        text: str,
        request: ApiRequest,
        prompts: Sequence[str] | None,
        response_id: str,
        promised: bool,
    ) -> None:
        later = plan.output_later
        if later:
            self._later.put(
                response_id, lambda: self._read_answer(later, text, request, prompts, promised)
            )

    def _found_later(self, response_id: str, verdict: Verdict) -> None:
        self._count(verdict)
        self._report(response_id, verdict)


def _passage(text: str, guard: PassagesGuard) -> str | None:
    if not guard.enforced:
        return text
    return None if guard.action == "block" else neutralised(text, guard.threshold)
