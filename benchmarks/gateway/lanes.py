"""The lanes: each takes running subjects, keeps every sample, and gives rows of the table.

A subject that is not being measured is stopped, so that its background work costs the others
nothing. What is compared is measured in turns within seconds, in an order drawn anew each round.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gateway import mock
from benchmarks.gateway.load import NUMBER, Answer, Requests, closed_loop, connect, sequence
from benchmarks.gateway.samples import Samples, added, percentile
from benchmarks.gateway.subjects import MODEL, Subject

PAYLOADS = {"250B": 250, "10KB": 10_000, "100KB": 100_000}
SENTENCE = "Which setting decides how long the gateway waits for an engine that never answers? "
CONCURRENCY = 32
PACE_MS, STREAMS = 5, 96  # 19,200 events a second are offered
LARGE_TOKENS = 100_000


def body(size: int, *, stream: bool = False, pace: int = 0) -> bytes:
    """A request whose body has about ``size`` bytes of ordinary prose, and NUMBER in front."""
    text = f"{NUMBER.decode()} " + (f"pace={pace} " if pace else "")
    text += SENTENCE * (size // len(SENTENCE) + 1)
    asked: dict[str, object] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": text[: max(size - 140, 40)]}],
        "max_tokens": 128,
        "temperature": 0,  # else no cache looks at it
    }
    if stream:
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(asked).encode()


class LaneFailed(Exception):
    """A subject did not answer as it must; the lane ends here."""


@dataclass
class Results:
    """Rows of the table, by lane: name of the subject -> figure."""

    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)  # lanes that ended early, and why

    def put(self, lane: str, subject: str, value: float, note: str = "") -> None:
        self.figures.setdefault(lane, {})[subject] = value
        if note:
            self.notes[f"{lane}/{subject}"] = note


@contextmanager
def only(subject: Subject, among: Sequence[Subject]) -> Iterator[None]:
    """Run one of the subjects; the others stay stopped."""
    if subject in among:
        subject.resume()
    try:
        yield
    finally:
        if subject in among:
            subject.pause()


async def latency(
    subjects: Sequence[Subject], gateways: Sequence[Subject], results: Results, samples: Samples,
    *, stream: bool, rounds: int, count: int,
) -> None:  # fmt: skip
    """Lanes a and c: one request at a time; the whole answer, or a stream's first event."""
    lane = "ttft" if stream else "latency"
    data = body(PAYLOADS["250B"], stream=stream)
    found: dict[str, list[list[float]]] = {subject.name: [] for subject in subjects}
    for number in range(rounds):
        for subject in random.sample(subjects, len(subjects)):
            asked = max(count // 10, 10) if subject.name.startswith("litellm") else count
            with only(subject, gateways):
                answers = await sequence(
                    subject.url, Requests(subject.url, data, subject.key), asked
                )
            check(subject, answers)
            times = [(a.first if stream else a.last) - a.sent for a in answers]
            found[subject.name].append([1000 * value for value in times])
            rows = [(subject.name, number, f"{1000 * value:.4f}") for value in times]
            samples.write(lane, ("subject", "round", "ms"), rows)
    for subject in subjects:
        mine = found[subject.name]
        everything = [value for row in mine for value in row]
        for percent in (50, 99):
            results.put(f"{lane} p{percent} ms", subject.name, percentile(everything, percent))
            if subject.name in ("direct", "relay"):
                continue
            value, low, high = added(mine, found["relay"], percent)
            note = f"95 % interval {low:.3f} to {high:.3f}"
            results.put(f"{lane} added p{percent} ms", subject.name, value, note)


async def throughput(
    subjects: Sequence[Subject], gateways: Sequence[Subject], results: Results, samples: Samples,
    *, rounds: int, seconds: float,
) -> None:  # fmt: skip
    """Lane b: requests a second, 32 clients that ask again at once."""
    for payload, size in PAYLOADS.items():
        data = body(size)
        rates: dict[str, list[float]] = {subject.name: [] for subject in subjects}
        times: dict[str, list[float]] = {subject.name: [] for subject in subjects}
        costs: dict[str, list[float]] = {subject.name: [] for subject in subjects}
        for number in range(rounds):
            for subject in random.sample(subjects, len(subjects)):
                with only(subject, gateways):
                    spent = cpu_seconds(subject.pid)
                    answers, lasted = await closed_loop(
                        subject.url,
                        Requests(subject.url, data, subject.key),
                        CONCURRENCY,
                        # A slow one needs longer for a figure of as many answers.
                        4 * seconds if subject.name.startswith("litellm") else seconds,
                        warm=0.0,
                    )
                    spent = cpu_seconds(subject.pid) - spent
                check(subject, answers)
                costs[subject.name].append(1e6 * spent / len(answers))
                rates[subject.name].append(len(answers) / lasted)
                times[subject.name] += [1000 * answer.seconds for answer in answers]
                rows = [(subject.name, number, f"{1000 * a.seconds:.3f}") for a in answers]
                samples.write(f"throughput-{payload}", ("subject", "round", "ms"), rows)
        for subject in subjects:
            rate = percentile(rates[subject.name], 50)
            limited = subject.name != "direct" and rate > 0.9 * percentile(rates["direct"], 50)
            note = "rig-limited" if limited else ""
            results.put(f"requests/s {payload}", subject.name, rate, note)
            cost = percentile(costs[subject.name], 50)
            results.put(f"CPU us a request {payload}", subject.name, cost)
            p99 = percentile(times[subject.name], 99)
            results.put(f"p99 ms at {CONCURRENCY} clients {payload}", subject.name, p99)


async def frames(
    subjects: Sequence[Subject], gateways: Sequence[Subject], results: Results, samples: Samples,
    *, seconds: float,
) -> None:  # fmt: skip
    """Lane c: events a second, each written by the upstream on its own; every byte compared."""
    data = body(PAYLOADS["250B"], stream=True, pace=PACE_MS)
    right = hashlib.blake2b(mock.STREAM).digest()
    for subject in random.sample(subjects, len(subjects)):
        with only(subject, gateways):
            answers, lasted = await closed_loop(
                subject.url, Requests(subject.url, data, subject.key), STREAMS, seconds, warm=1.0
            )
        check(subject, answers)
        events = sum(events for answer in answers for _, events in answer.arrivals)
        same = sum(hashlib.blake2b(answer.body).digest() == right for answer in answers)
        gaps = [1000 * (b - a) for answer in answers for (a, _), (b, _) in
                zip(answer.arrivals, answer.arrivals[1:], strict=False)]  # fmt: skip
        results.put("SSE events/s", subject.name, events / lasted)
        results.put("streams identical %", subject.name, 100 * same / max(len(answers), 1))
        results.put("gap between events p99 ms", subject.name, percentile(gaps, 99))
        samples.write("frames", ("subject", "events", "seconds", "identical"),
                      [(subject.name, sum(n for _, n in a.arrivals), f"{a.seconds:.4f}",
                        hashlib.blake2b(a.body).digest() == right) for a in answers])  # fmt: skip


async def head_of_line(
    subjects: Sequence[Subject], gateways: Sequence[Subject], results: Results, samples: Samples,
    *, large: int,
) -> None:  # fmt: skip
    """Lane d: how long eight small streams stand still while prompts of 100K tokens come in."""
    small = body(PAYLOADS["250B"], stream=True, pace=10)
    giant = body(LARGE_TOKENS * 5)
    for subject in subjects:
        slow = subject.name.startswith("litellm")
        with only(subject, gateways):
            alone = await _gaps(subject, small, giant, 0)
            beside = await _gaps(subject, small, giant, 2 if slow else large)
        results.put("longest stall alone ms", subject.name, max(alone))
        results.put("longest stall beside 100K tokens ms", subject.name, max(beside))
        samples.write("head-of-line", ("subject", "beside", "gap_ms"),
                      [(subject.name, flag, f"{gap:.3f}") for flag, gaps in
                       ((0, alone), (1, beside)) for gap in gaps])  # fmt: skip


async def _gaps(subject: Subject, small: bytes, giant: bytes, large: int) -> list[float]:
    """Milliseconds between events of small streams."""
    over, requests = asyncio.Event(), Requests(subject.url, small, subject.key)
    answers: list[Answer] = []

    async def stream() -> None:
        connection = await connect(subject.url)
        while True:
            answers.append(await connection.ask(next(requests)))
            if over.is_set():
                connection.transport.close()
                return

    streams = [asyncio.create_task(stream()) for _ in range(8)]
    await asyncio.sleep(0.3)
    connection = await connect(subject.url)
    large_ones = Requests(subject.url, giant, subject.key)
    for _ in range(large):
        found = await connection.ask(next(large_ones))
        check(subject, [found])
        await asyncio.sleep(0.1)
    if not large:
        await asyncio.sleep(1.0)
    connection.transport.close()
    over.set()
    await asyncio.gather(*streams)
    check(subject, answers)
    return [1000 * (b - a) for answer in answers for (a, _), (b, _) in
            zip(answer.arrivals, answer.arrivals[1:], strict=False)]  # fmt: skip


async def flood(
    subjects: Sequence[Subject], gateways: Sequence[Subject], results: Results, samples: Samples,
    *, seconds: float,
) -> None:  # fmt: skip
    """Lane f: 32 clients with keys that nobody has; beside them one with a good key."""
    data = body(PAYLOADS["10KB"])
    for subject in subjects:
        good = Requests(subject.url, data, subject.key)
        bad = Requests(subject.url, data, "rk_0123456789ab." + "x" * 43)
        with only(subject, gateways):
            refused = asyncio.create_task(closed_loop(subject.url, bad, CONCURRENCY, seconds))
            served = asyncio.create_task(closed_loop(subject.url, good, 1, seconds))
            (answers, lasted), (others, _) = await refused, await served
        wrong = {a.status for a in answers} - {400, 401, 403}  # LiteLLM without a database: 400
        if wrong:
            raise LaneFailed(f"{subject.name} answered a wrong key with {sorted(wrong)}")
        check(subject, others)
        results.put("wrong keys refused/s", subject.name, len(answers) / lasted)
        p99 = percentile([1000 * a.seconds for a in others], 99)
        results.put("good key beside them p99 ms", subject.name, p99)
        samples.write("flood", ("subject", "good", "ms"),
                      [(subject.name, flag, f"{1000 * a.seconds:.3f}") for flag, rows in
                       ((0, answers), (1, others)) for a in rows])  # fmt: skip


def check(subject: Subject, answers: Sequence[Answer]) -> None:
    """A lane with a failed request in it has no figure. Raises LaneFailed."""
    wrong = sorted({answer.status for answer in answers} - {200})
    if wrong or not answers:
        body = next((a.body[:300] for a in answers if a.status != 200), b"")
        raise LaneFailed(
            f"{subject.name}: {len(answers)} answers, of them status {wrong}: {body!r}"
        )


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far, all threads."""
    found = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(found[11]) + int(found[12])) / os.sysconf("SC_CLK_TCK")
