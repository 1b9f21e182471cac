"""The profile's side of the engine: started as it is deployed, loaded over HTTP, measured.

In: a bundle, chats, how many tokens to ask for. Out: times to the first token and between tokens,
tokens per second, the answers, and the peak memory of the engine's processes. The engine is reached
as a process (``python -m serving.engines``), which prints one JSON line when it is ready and ends
on SIGTERM with all its children.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.errors import ServiceError
from stages import harness
from stages.statistics import percentile

START_SECONDS, REQUEST_SECONDS = 240.0, 120.0


@dataclass(frozen=True)
class Timing:
    """One answered request. Seconds; ``first`` is the time to the first token."""

    first: float
    total: float
    tokens: int
    text: str
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Server:
    """A running engine. ``session`` is the process session of its tree."""

    url: str
    model: str
    session: int
    seconds: float


@contextlib.contextmanager
def engine(bundle: Path) -> Iterator[Server]:
    """Start the engine of ``bundle`` and end it afterwards. Raises ServiceError if it will not."""
    with tempfile.TemporaryDirectory(prefix="ratchet-profile-") as folder:
        command = [sys.executable, "-m", "serving.engines", "--bundle", str(bundle), "--port", "0"]
        command += ["--die-with-parent", "--log", str(Path(folder) / "engine.log")]
        begun = time.monotonic()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            ready = _first_line(process, begun + START_SECONDS)
            yield Server(
                ready["url"], ready["model"], int(ready["engine_pid"]), time.monotonic() - begun
            )
        finally:
            _stop(process)


def _first_line(process: subprocess.Popen[bytes], deadline: float) -> dict[str, Any]:
    """The engine's announcement, or ServiceError with what it said instead."""
    assert process.stdout is not None and process.stderr is not None
    while time.monotonic() < deadline:
        if select.select([process.stdout], [], [], 0.5)[0]:
            line = process.stdout.readline()
            if line:
                announced: dict[str, Any] = json.loads(line)
                return announced
            break  # end of file: it is ending
    _stop(process)
    said = process.stderr.read().decode("utf-8", "replace")[-3000:].strip()
    raise ServiceError("The engine of the bundle did not start.", where="data/bundle", next=said)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL for what does not listen."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def quantiles(values: Sequence[float]) -> dict[str, float | None]:
    """Median and 95th percentile of seconds, in milliseconds."""
    milliseconds = [value * 1000 for value in values]
    return {"p50": percentile(milliseconds, 0.5), "p95": percentile(milliseconds, 0.95)}


def measure(
    server: Server,
    chats: Sequence[list[dict[str, str]]],
    lengths: Sequence[int],
    concurrency: int,
    *,
    salt: str,
) -> dict[str, Any]:
    """Figures of one run. ``salt`` keeps the prefixes that earlier runs cached out of this one."""
    bodies = [
        {
            "messages": chat,
            "max_tokens": length,
            "min_tokens": length,
            "ignore_eos": True,
            "cache_salt": salt,
        }
        for chat, length in zip(chats, lengths, strict=True)
    ]
    begun = time.perf_counter()
    timings = asyncio.run(drive(server, bodies, concurrency))
    seconds = time.perf_counter() - begun
    short = [
        index
        for index, (item, length) in enumerate(zip(timings, lengths, strict=True))
        if item.tokens != length
    ]
    if short:
        raise ServiceError(
            f"{len(short)} of {len(lengths)} answers do not have the length that was asked for.",
            where=server.url,
            next="compare bundle.max_model_len with the longest prompt + 2 * profile.max_tokens",
        )
    harness.progress(f"profile: {salt} lengths, {sum(lengths) / seconds:.0f} tokens/s")
    first = [item.first for item in timings]
    between = [(item.total - item.first) / (item.tokens - 1) for item in timings if item.tokens > 1]
    return {
        "seconds": round(seconds, 3),
        "tokens": sum(lengths),
        "tokens_per_s": round(sum(lengths) / seconds, 1),
        "ttft_ms": quantiles(first),
        "tpot_ms": quantiles(between),
        # The gate puts intervals around the quantiles.
        "samples_ms": {
            "ttft": [round(value * 1000, 3) for value in first],
            "tpot": [round(value * 1000, 3) for value in between],
        },
    }


async def drive(
    server: Server, bodies: Sequence[Mapping[str, Any]], concurrency: int
) -> list[Timing]:
    """Stream every request, ``concurrency`` at a time; timings in the order of ``bodies``."""
    import aiohttp

    gate = asyncio.Semaphore(concurrency)
    timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session:

        async def one(body: Mapping[str, Any]) -> Timing:
            async with gate:
                return await _stream(session, server, body)

        return list(await asyncio.gather(*map(one, bodies)))


async def _stream(session: Any, server: Server, body: Mapping[str, Any]) -> Timing:
    """One streamed chat completion."""
    request = {
        "model": server.model,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **body,
    }
    begun, first, tokens, prompt, pieces = time.perf_counter(), None, 0, 0, []
    async with session.post(f"{server.url}/v1/chat/completions", json=request) as response:
        if response.status != 200:
            raise ServiceError(
                f"The engine answered {response.status}.",
                where=server.url,
                next=(await response.text())[:500],
            )
        async for line in response.content:
            text = line.decode().strip()
            if not text.startswith("data: ") or text == "data: [DONE]":
                continue
            event = json.loads(text[6:])
            if "error" in event:  # errors after the first byte come inside a 200
                raise ServiceError("The engine broke off.", where=server.url, next=text[:500])
            if event.get("choices"):
                first = first if first is not None else time.perf_counter() - begun
                pieces.append(event["choices"][0]["delta"].get("content") or "")
            if event.get("usage"):
                tokens = int(event["usage"]["completion_tokens"])
                prompt = int(event["usage"].get("prompt_tokens") or 0)
    total = time.perf_counter() - begun
    return Timing(total if first is None else first, total, tokens, "".join(pieces).strip(), prompt)


def ask(
    server: Server, rows: Sequence[Mapping[str, Any]], max_tokens: int, concurrency: int
) -> list[str]:
    """The engine's own greedy answers to the gate's questions.

    Raises ServiceError when it reads a chat as another number of tokens than the gate's model did:
    then the two do not see the same prompt, and no figure of this profile means anything.
    """
    bodies = [{"messages": json.loads(row["messages"]), "max_tokens": max_tokens} for row in rows]
    timings = asyncio.run(drive(server, bodies, concurrency))
    other = [
        f"{row['question_id']}: {item.prompt_tokens} tokens, "
        f"the gate's model read {row['prompt_tokens']}"
        for row, item in zip(rows, timings, strict=True)
        if item.prompt_tokens != row["prompt_tokens"]
    ]
    if other:
        raise ServiceError(
            f"The engine reads {len(other)} of {len(rows)} prompts as other tokens.",
            offenders=other[:5],
            where=server.url,
            next="compare the chat templates of base_model and of the bundle's checkpoint",
        )
    return [item.text for item in timings]


def peak_bytes(session: int) -> int:
    """Sum of the peak resident memory of every process of ``session``.

    An upper bound: pages that they share count once for each.
    """
    total = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, IndexError, ValueError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[3]) != session:
                continue
            for line in (entry / "status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    total += int(line.split()[1]) * 1024
    return total
