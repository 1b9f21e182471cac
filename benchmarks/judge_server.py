"""A server that speaks the OpenAI chat API and says what it is told to: recorded verdicts, faults.

In: a function from the judged material to the fields of the answer, or to a fault. Out: real HTTP
on a port of its own, so that everything from the client to the calibration is the real thing.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any, Self

from aiohttp import web

#: What can go wrong in one call. ``busy`` asks to come back at once, ``later`` in an hour.
FAULTS = (
    *("hang", "garbage", "refusal", "truncated", "cut_off", "empty", "error", "drop", "busy"),
    "later",
)
AFTER = {"busy": "0", "later": "3600"}
#: What is said by those that are answers of some kind.
SAYS = {"garbage": "Well, I prefer the first.", "truncated": '{"evidence": "Tru', "empty": ""}
#: Material as the judge read it -> the fields that it answers with, or the name of a fault.
Answer = Callable[[dict[str, Any]], Mapping[str, Any] | str]


class JudgeServer:
    """``with JudgeServer(answer) as server``; ``server.url`` is what JUDGE_URL would be."""

    def __init__(self, answer: Answer, model: str = "recorded") -> None:
        self.answer, self.model = answer, model
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most = 0  # calls under way at once
        self._open = 0
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._started.wait(10):
            raise RuntimeError("the server did not start")
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._started.set()
        self._loop.run_forever()
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_post("/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("Authorization"))
        self._open += 1
        self.most = max(self.most, self._open)
        try:
            await asyncio.sleep(0)  # let others in: a server has calls under way at once
            said = self.answer(material(body))
            if isinstance(said, str):
                return await self._fault(request, said)
            return self._completion(json.dumps(said, ensure_ascii=False))
        finally:
            self._open -= 1

    def _completion(self, text: str | None, reason: str = "stop", **message: Any) -> web.Response:
        content = {"role": "assistant", "content": text, **message}
        choice = {"index": 0, "message": content, "finish_reason": reason}
        return web.json_response(
            {"object": "chat.completion", "model": self.model, "choices": [choice]}
        )

    async def _fault(self, request: web.Request, fault: str) -> web.StreamResponse:
        if fault == "hang":
            await asyncio.sleep(60)
        if fault == "drop":
            assert request.transport is not None
            request.transport.close()
        if fault in AFTER:
            return web.Response(status=429, headers={"Retry-After": AFTER[fault]}, text="busy")
        if fault == "error":
            key = request.headers.get("Authorization", "")
            return web.Response(status=500, text=f"it broke for {key}")
        if fault == "refusal":
            return self._completion(None, refusal="I cannot judge that.")
        if fault == "cut_off":
            return self._completion('{"evidence": "It goes on and', "length")
        texts = {
            "garbage": "Well, I prefer the first.",
            "truncated": '{"evidence": "Tru',
            "empty": "",
        }
        return self._completion(texts.get(fault))


def material(body: Mapping[str, Any]) -> dict[str, Any]:
    """What the request asks to judge: the last message, which is JSON; else its text, and the
    properties that the answer must have."""
    text = body["messages"][-1]["content"]
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError:
        schema = body["response_format"]["json_schema"]["schema"]
        return {"text": text, "properties": schema["properties"]}
    return found
