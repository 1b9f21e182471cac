"""Lane e: hours in minutes. Clients that come, read a little and leave; nothing may pile up."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import time
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.gateway.lanes import PAYLOADS, Results, body
from benchmarks.gateway.load import Requests, connect
from benchmarks.gateway.samples import Samples
from benchmarks.gateway.subjects import Subject

CLIENTS, PACE = 24, 10
#: Gauges that are what they were when nobody is there.
AT_REST = ("ratchet_gateway_in_flight", "ratchet_gateway_leases", "ratchet_gateway_tasks")


async def soak(subject: Subject, results: Results, samples: Samples, minutes: float) -> None:
    """RSS over time, and descriptors, tasks and reservations before and after."""
    before = await _rest(subject)
    over = asyncio.Event()
    counts: Counter[str] = Counter()
    clients = [asyncio.create_task(_client(subject, n, over, counts)) for n in range(CLIENTS)]
    began, rows = time.monotonic(), []
    while (now := time.monotonic() - began) < 60 * minutes:
        rows.append((now, _rss(subject.pid), _descriptors(subject.pid)))
        await asyncio.sleep(0.5)
    over.set()
    await asyncio.gather(*clients)
    after = await _rest(subject)
    samples.write("soak", ("seconds", "rss_mib", "descriptors"),
                  [(f"{s:.1f}", f"{rss:.2f}", fds) for s, rss, fds in rows])  # fmt: skip
    # The first fifth fills caches and pools of connections.
    steady = np.asarray([row[:2] for row in rows if row[0] > 12 * minutes])
    slope = float(np.polyfit(steady[:, 0] / 60, steady[:, 1], 1)[0])
    note = f"{minutes:g} min, {counts['whole']} whole, {counts['left']} left early"
    results.put("RSS slope MiB/min", subject.name, slope, note)
    failed = {name: n for name, n in counts.items() if name.startswith("status")}
    results.put("failed in the soak", subject.name, sum(failed.values()), str(failed or ""))
    for name, value in after.items():
        note = f"{before[name]:g} before"
        results.put(f"{name} after the soak, added", subject.name, value - before[name], note)


async def _client(subject: Subject, number: int, over: asyncio.Event, counts: Counter[str]) -> None:
    """Half of the requests are streams, half of those are left in the middle; of the others a
    tenth is left before the answer."""
    draw = random.Random(number)
    connection = await connect(subject.url)
    requests = {
        (size, stream): Requests(
            subject.url, body(size, stream=stream, pace=PACE if stream else 0), subject.key
        )
        for size in (PAYLOADS["250B"], PAYLOADS["10KB"])
        for stream in (False, True)
    }
    while not over.is_set():
        stream = draw.random() < 0.5
        size = PAYLOADS["10KB"] if draw.random() < 0.2 else PAYLOADS["250B"]
        answer = connection.ask(next(requests[size, stream]))
        if draw.random() < (0.5 if stream else 0.1):
            await asyncio.wait([answer], timeout=draw.random() * 0.4 if stream else 0.001)
            connection.transport.abort()
            counts["left"] += 1
            connection = await connect(subject.url)
            continue
        found = await answer
        counts["whole" if found.status == 200 else f"status {found.status}"] += 1
        if found.status == 0:
            connection = await connect(subject.url)
        await asyncio.sleep(draw.random() * 0.05)
    connection.transport.close()


async def _rest(subject: Subject) -> dict[str, float]:
    """Descriptors and gauges once they have not changed for 6 s: connections to upstreams are kept
    for 3 s, and the request log closes its file after 2."""
    found: dict[str, float] = {}
    same = 0
    for _ in range(60):
        await asyncio.sleep(1.0)
        last, found = found, {"descriptors": float(_descriptors(subject.pid)), **_gauges(subject)}
        same = same + 1 if found == last else 0
        if same == 6:
            break
    return found


def _gauges(subject: Subject) -> dict[str, float]:
    with contextlib.closing(urllib.request.urlopen(f"{subject.url}/metrics", timeout=5)) as answer:
        text = answer.read().decode()
    found = {}
    for name in AT_REST:
        match = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
        if match:
            found[name] = float(match[1])
    return found


def _rss(pid: int) -> float:
    """MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def _descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
