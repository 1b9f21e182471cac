"""In front of a real vLLM: tokens a second through the gateway against tokens a second without it.

    python -m benchmarks.gateway.vllm --bundle FOLDER [--rounds N] [--seconds S]

``--bundle``: a folder with ``launch.json``, as the stage ``bundle`` writes it; the engine is
started with ``serving.engines``. Eight clients stream answers, each to a question of its own;
direct and through the gateway (governed and full) take turns, and each figure is the median of the
rounds. Nothing is pinned: on a machine without a GPU the engine wants every core, and what the
gateway takes from it is part of the figure. Exit status 1 when the governed lane has less than
97 %.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path

import uvloop

from benchmarks.gateway.lanes import check
from benchmarks.gateway.load import NUMBER, Answer, Requests, closed_loop
from benchmarks.gateway.subjects import Subject, ours, python

CLIENTS, TARGET = 8, 0.97
QUESTION = f"{NUMBER.decode()} What does the gateway do when an engine never answers?"


def tokens(answer: Answer) -> int:
    """Completion tokens, as the engine counted them in the stream's last event."""
    events = [line[6:] for line in answer.body.split(b"\n") if line.startswith(b"data: {")]
    usage = json.loads(events[-1]).get("usage") or {}
    return int(usage["completion_tokens"])


async def rate(subject: Subject, model: str, seconds: float) -> float:
    """Tokens a second of the answers that ended in that time."""
    body = json.dumps({
        "model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 96,
        "temperature": 0.0, "stream": True, "stream_options": {"include_usage": True},
    }).encode()  # fmt: skip
    requests = Requests(subject.url, body, subject.key)
    answers, lasted = await closed_loop(subject.url, requests, CLIENTS, seconds, warm=2.0)
    check(subject, answers)
    return sum(map(tokens, answers)) / lasted


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway.vllm", description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0)
    given = parser.parse_args()
    model = json.loads((given.bundle / "launch.json").read_text())["served_model_name"]
    random.seed(7)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gateway-vllm-")))
        engine = stack.enter_context(
            python("serving.engines", "--bundle", str(given.bundle), "--die-with-parent",
                   log=folder / "engine.log", RATCHET_ROOT=str(folder))
        )  # fmt: skip
        subjects = {"direct": (engine, model)}
        for lane in ("governed", "full"):
            found = stack.enter_context(ours(lane, engine.url, folder, model=model, core=None))
            subjects[lane] = (found, "mock")
        rates: dict[str, list[float]] = {name: [] for name in subjects}
        for _ in range(given.rounds):
            for name in random.sample(list(subjects), len(subjects)):
                subject, asked = subjects[name]
                rates[name].append(uvloop.run(rate(subject, asked, given.seconds)))
    direct = statistics.median(rates["direct"])
    for name, values in rates.items():
        middle = statistics.median(values)
        shown = " ".join(f"{value:.0f}" for value in values)
        print(f"{name:10} {middle:8.1f} tokens/s  {middle / direct:6.3f} of direct  ({shown})")
    good = statistics.median(rates["governed"]) / direct >= TARGET
    print(f"{'PASS' if good else 'FAIL'}  governed has at least {TARGET:.0%} of direct")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
