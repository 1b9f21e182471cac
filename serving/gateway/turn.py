"""What answers of releases and of plain models have in common: one admitted request on its way."""

from __future__ import annotations

from dataclasses import dataclass

from serving.gateway.api_request import ApiRequest
from serving.gateway.auth import Principal
from serving.gateway.cache.response_cache import Hit
from serving.gateway.cache.scope import Scope, scope
from serving.gateway.exchange import Exchange
from serving.gateway.reply import Reply
from serving.gateway.routing.router import Route
from serving.gateway.services import Configured, Services
from serving.gateway.upstream import UpstreamResponse


@dataclass(slots=True)
class Turn:
    """One request with the parts and the configuration that it began with."""

    services: Services
    now: Configured
    exchange: Exchange
    reply: Reply
    principal: Principal
    policy: str  # of guards

    @classmethod
    def begin(cls, services: Services, exchange: Exchange, reply: Reply) -> Turn:
        now, principal = services.now, exchange.principal
        assert principal is not None
        return cls(services, now, exchange, reply, principal, now.policy(principal))

    async def check_input(self, request: ApiRequest) -> None:
        """Let the guards read what came in; those that redact change the request. Raises ApiError
        when it may not go on."""
        exchange = self.exchange
        verdict = await self.now.guards.check_input(self.policy, request, exchange.response_id)
        exchange.judged(verdict)
        if verdict.error is not None:
            raise verdict.error

    async def open(
        self, route: Route, request: ApiRequest, *, want_text: bool = False
    ) -> UpstreamResponse:
        """Ask an upstream. Raises UpstreamError; however it ends, the exchange knows who was
        asked and how often."""
        exchange, trace = self.exchange, self.exchange.trace
        trace.asked(request)
        try:
            response = await self.services.router.open(
                route,
                request,
                tenant=self.principal.tenant,
                request_id=exchange.response_id,
                trace=trace,
                want_text=want_text,
            )
        finally:
            exchange.provider, exchange.attempts = trace.endpoint[0], trace.attempts
        exchange.tier = response.tier
        return response

    def scope(
        self, request: ApiRequest, target: str, *, prompt: str = "", temperature: float = 1.0
    ) -> Scope:
        """What the answer depends on, for the cache; see cache.scope."""
        now = self.now
        return scope(
            request,
            now.config.cache.exact,
            tenant=self.principal.tenant,
            target=target,
            prompt=prompt,
            guard=now.guards.version(self.policy),
            personal=self.policy in now.config.cache.personal,
            temperature=temperature,
        )

    async def replay(self, request: ApiRequest, hit: Hit) -> None:
        """Send an answer that was given before. The request counts; its tokens and cost do not."""
        self.exchange.cached = "semantic" if hit.tier == "semantic" else "exact"
        body = hit.answer.replay(self.exchange.response_id)
        if request.stream:
            await self.reply.frame(body)
            await self.reply.end()
        else:
            await self.reply.whole(200, body)

    @property
    def changed(self) -> bool:
        """Whether guards changed what was asked, shown to the model or answered."""
        return self.exchange.guard in ("redact", "block")

    def ended(self, response: UpstreamResponse) -> None:
        """Note what the upstream said of its answer, however that ended."""
        self.exchange.usage(response.usage)
        if response.scan.finish_reason:
            self.exchange.trace.finish_reasons = [response.scan.finish_reason]
