"""An OpenAI-compatible engine that speaks vLLM's dialect and fails on request.

A user message with ``fault:<name>`` in it gets that fault. Runs in a thread with its own loop and
real sockets, so that resets, stalls and disconnects are what they are in life.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import struct
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

#: Of the tool that is called when a request has some.
ARGUMENTS = '{"usage": "{\\"error\\": 1}"}'
ANSWER = "Fact 1 is größer than ☃. [1] Fact 9 too. [9]"


class FakeEngine:
    """Start with ``with FakeEngine() as engine``; ``engine.url`` answers."""

    def __init__(self, name: str = "nano", answer: str = ANSWER, pause: float = 0.0) -> None:
        self.name, self.answer, self.pause = name, answer, pause
        self.bodies: list[dict[str, Any]] = []  # what the engine was asked
        self.headers: list[dict[str, str]] = []
        self.open = 0  # generations being worked on
        self.aborted = 0  # generations whose client left
        self.healthy = True
        self.tokens = 1  # what a probe gets
        self.words = r"\S+\s*"  # how the answer is cut into chunks
        self.fault = ""  # of every request that names none itself
        self.waiting = 0  # what /metrics says of the queue
        self.paths: list[str] = []  # every POST, probes included
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._started = threading.Event()

    def __enter__(self) -> FakeEngine:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the listening socket and every connection, as a killed engine does."""
        if not self._loop.is_closed():
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
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/embeddings", self._embeddings)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            text=f'vllm:num_requests_running{{engine="0"}} {float(self.open)}\n'
            f'vllm:num_requests_waiting{{engine="0"}} {float(self.waiting)}\n'
            'vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 77.0\n'
        )

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        if (await request.json()).get("stream"):
            return await self._chat(request)
        return await self._one_piece(request, {"object": "text_completion",
            "choices": [{"index": 0, "text": self.answer, "finish_reason": "stop"}]})  # fmt: skip

    async def _embeddings(self, request: web.Request) -> web.StreamResponse:
        vector: Any = [0.5, -0.5]
        if (await request.json()).get("encoding_format") == "base64":
            vector = base64.b64encode(struct.pack("<2f", *vector)).decode()
        return await self._one_piece(request, {"object": "list",
            "data": [{"object": "embedding", "index": 0, "embedding": vector}]})  # fmt: skip

    async def _one_piece(self, request: web.Request, value: dict[str, Any]) -> web.StreamResponse:
        """An answer that is not streamed, with its faults."""
        body = await request.json()
        self.paths.append(request.path)
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        usage = {"prompt_tokens": 3, "completion_tokens": self.tokens,
                 "completion_tokens_details": {"reasoning_tokens": 0}}  # fmt: skip
        self.open += 1
        try:
            return await _broken_piece(request, self._fault(body)) or web.json_response(
                {"id": "x-1", "model": self.name, **value, "usage": usage}
            )
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        finally:
            self.open -= 1

    def _fault(self, body: dict[str, Any]) -> str:
        """What a text of the request asks for, else the engine's own fault."""
        last = body["messages"][-1]["content"] if "messages" in body else ""
        found = re.search(r"fault:([a-z0-9-]+)", str(last or body.get("prompt", body.get("input"))))
        return found.group(1) if found else self.fault

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if not body.get("stream"):
            if body.get("max_tokens") != 1:  # else a probe of readiness
                message: dict[str, Any] = {"role": "assistant", "content": self.answer}
                if body.get("tools"):
                    name = body["tools"][0]["function"]["name"]
                    call = {"name": name, "arguments": ARGUMENTS}
                    calls = [{"id": "c1", "type": "function", "function": call}]
                    message = {"role": "assistant", "content": None, "tool_calls": calls}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                return await self._one_piece(request, {"choices": [choice]})
            usage = {"prompt_tokens": 1, "completion_tokens": self.tokens}
            return web.json_response({"choices": [{"message": {"content": "x"}}], "usage": usage})
        self.paths.append(request.path)
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.open += 1
        try:
            return await self._answer(request, body, self._fault(body))
        except (asyncio.CancelledError, ConnectionResetError):
            self.aborted += 1
            raise
        finally:
            self.open -= 1

    async def _answer(
        self, request: web.Request, body: dict[str, Any], fault: str
    ) -> web.StreamResponse:
        refused = _refusal(fault)
        if refused:
            return refused
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "reset-first":
            assert request.transport is not None
            request.transport.abort()
            await asyncio.sleep(0)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        end = b"\r\n\r\n" if fault == "crlf" else b"\n\n"

        async def put(value: dict[str, Any] | bytes) -> None:
            data = (
                value
                if isinstance(value, bytes)
                else json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
            )
            raw = b"data: " + data + end
            if fault == "split":  # every byte on its own: characters and frames come in pieces
                for at in range(len(raw)):
                    await response.write(raw[at : at + 1])
                    await asyncio.sleep(0)
            elif fault == "multi-line":  # a JSON object on several data lines
                await response.write(raw.replace(b',"choices":', b',\ndata:"choices":'))
            else:
                await response.write(raw)

        if fault == "hang-body":
            await asyncio.sleep(3600)
        if fault == "empty":
            return response
        if fault == "drip":  # alive, and never an answer
            while True:
                await response.write(b": still queueing\n\n")
                await asyncio.sleep(0.01)
        if fault == "comments":
            await response.write(b": queueing\n\n")
        error = {"error": {"message": "the engine is out of luck", "code": 500}}
        if fault == "error-first":
            await put(error)
            await put(b"[DONE]")
            return response
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 7,
                "model": self.name}  # fmt: skip

        def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
            if "prompt" in body:
                choice = {"index": 0, "text": delta["content"], "finish_reason": finish}
                return {**head, "object": "text_completion", "choices": [choice]}
            return {
                **head,
                "choices": [
                    {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
                ],
            }

        await put(chunk({"role": "assistant", "content": ""}))
        words = re.findall(self.words, self._text(body))
        if body.get("tools"):
            words = []
            await self._call(body, lambda call: put(chunk({"tool_calls": [{"index": 0, **call}]})))
        for number, word in enumerate(words):
            if number == 2 and fault in _MIDDLE:
                return await _break(fault, request, response, put, error)
            await response.write(b": keep-alive\n\n" if fault == "comments" else b"")
            if number == 2 and fault == "giant":
                await put(chunk({"content": "y" * (3 << 20)}))
            if fault == "slow" or self.pause:
                await asyncio.sleep(self.pause or 0.05)
            await put(chunk({"content": word}))
        await put(chunk({"content": ""}, "tool_calls" if body.get("tools") else "stop"))
        if fault == "no-usage":
            await put(b"[DONE]")
            return response
        usage = {"prompt_tokens": 20, "completion_tokens": len(words), "total_tokens": 99}
        await put({**head, "choices": [], "usage": usage})
        if fault == "bare-end":  # without its empty line
            await response.write(b"data: [DONE]")
        else:
            await put(b"[DONE]")
        return response

    async def _call(self, body: dict[str, Any], put: Callable[[Any], Awaitable[None]]) -> None:
        """A call of the first tool, its arguments in pieces."""
        name = body["tools"][0]["function"]["name"]
        await put({"id": "c1", "type": "function", "function": {"name": name, "arguments": ""}})
        for start in range(0, len(ARGUMENTS), 5):
            await put({"function": {"arguments": ARGUMENTS[start : start + 5]}})

    def _text(self, body: dict[str, Any]) -> str:
        """The answer; ``{mark}`` is replaced by the mark in the prompt."""
        first = body["messages"][0]["content"] if "messages" in body else ""
        found = re.search(r"\((\w+)\)", first if isinstance(first, str) else "")
        return self.answer.replace("{mark}", found.group(1) if found else "?")


_MIDDLE = {"error-mid", "overloaded-mid", "stall-mid", "reset-mid", "eof", "garbage", "endless"}


def _refusal(fault: str) -> web.Response | None:
    context = (
        "This model's maximum context length is 1024 tokens. However, your prompt contains at "
        "least 1025 input tokens."
    )
    found = {
        "503": (503, {"error": {"message": "queue", "code": 503}}),
        "500": (500, {"error": {"message": "secret traceback", "code": 500}}),
        "429": (429, {"error": {"message": "rate", "code": "rate_limit"}}),
        "429-wait": (429, {"error": {"message": "rate", "code": "rate_limit"}}),
        "401": (401, {"error": {"message": "Incorrect API key provided: sk-sec", "code": 401}}),
        "404": (404, {"error": {"message": "no such model", "code": 404}}),
        "503-page": (503, None),
        "redirect": (307, None),
        "context": (400, {"error": {"message": context, "code": 400}}),
        "html": (502, None),
    }.get(fault)
    if found is None:
        return None
    status, value = found
    headers = {"retry-after": "1"} if fault == "429-wait" else {}
    if status == 307:
        headers["location"] = "http://127.0.0.1:9/"
    return (
        web.json_response(value, status=status, headers=headers)
        if value
        else web.Response(status=status, text="<html>bad gateway</html>", headers=headers)
    )


async def _broken_piece(request: web.Request, fault: str) -> web.StreamResponse | None:
    """The ways in which an answer in one piece fails; None for no fault."""
    if fault == "hang":
        await asyncio.sleep(3600)
    if fault == "error-200":
        return web.json_response({"error": {"message": "out of luck", "code": 500}})
    if fault == "html-200":
        return web.Response(text="<html>login</html>")
    if fault in ("cut", "stall-mid"):
        response = web.StreamResponse(headers={"content-length": "1000"})
        await response.prepare(request)
        await response.write(b'{"id": "x-1", ')
        if fault == "stall-mid":
            await asyncio.sleep(3600)
        assert request.transport is not None
        request.transport.abort()
        return response
    if fault == "reset-first":
        assert request.transport is not None
        request.transport.abort()
        await asyncio.sleep(0)
    return _refusal(fault)


async def _break(
    fault: str, request: web.Request, response: web.StreamResponse, put: Any, error: dict[str, Any]
) -> web.StreamResponse:
    """The ways in which a stream ends badly."""
    if fault == "error-mid":
        await put(error)
        await put(b"[DONE]")
    elif fault == "overloaded-mid":
        await put({"error": {"message": "queue", "code": 503}})
    elif fault == "garbage":
        await put(b"{not json")
    elif fault == "endless":
        for _ in range(40):
            await response.write(b"x" * 65536)
    elif fault == "stall-mid":
        await asyncio.sleep(3600)
    elif fault == "reset-mid":
        assert request.transport is not None
        request.transport.abort()
    return response
