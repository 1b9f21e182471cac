"""`make demo`: documents to a certified, served release; one question; one answer walked back.

The same jobs that people launch in the UI, run here one after the other against this checkout's
Dagster instance, so that every run stands in the UI afterwards. Everything started is stopped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from contracts import offline
from contracts.errors import RatchetError, ServiceError
from contracts.settings import Settings
from pipelines import ask, trace, up
from pipelines.run import run_job

QUESTIONS = (
    "When does the old engine stop during a deployment?",
    "What happens when a score is missing?",
    "What is the capital of Mongolia?",
)


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print what begins and how long it took."""
    print(f"\n▶ {title}", flush=True)
    started = time.monotonic()
    yield
    print(f"  {time.monotonic() - started:.1f} s", flush=True)


def fetch_shipped(settings: Settings) -> None:
    """The nano base model's trained weights, from the DVC remote inside the repository."""
    import subprocess

    command = [sys.executable, "-m", "dvc", "pull", "--quiet", "base_model"]
    if subprocess.run(command, cwd=settings.root, check=False).returncode:
        print("  no shipped weights fit dvc.lock: the base model is trained here (minutes)")


def main() -> int:
    started = time.monotonic()
    offline.apply()
    settings = Settings.from_env()
    from assets.stages import project

    gateway = up.services(settings)[0]
    try:
        with step("base model: shipped weights"):
            fetch_shipped(settings)
        for source in project().stages["documents"].keys:
            with step(f"documents: {source}"):
                run_job("sources", source, settings)
        with step("lifecycle: quality, chunks, vectors, index … bundle, profile, gate, release"):
            run_job("lifecycle", None, settings)
        with step("deployment: start vLLM, ask it, flip the channel `stable`"):
            run_job("deploy", None, settings)
        with step("gateway"):
            gateway.start()
            gateway.wait_ready(up.READY_SECONDS)
            print(f"  {settings.gateway_url}")
        result = talk(settings)
        with step("nightly: today's requests, online evaluation, drift"):
            run_job("nightly", datetime.now(UTC).strftime("%Y-%m-%d"), settings)
        print(f"\nratchet trace {result}\n")
        print(trace.render(trace.trace(result, settings)))
    finally:
        gateway.stop()
        up.deploy(settings, "down", "--all")
    minutes = (time.monotonic() - started) / 60
    print(f"\nDone in {minutes:.1f} min. Next: `make up` serves it and opens the Dagster UI.")
    return 0


def talk(settings: Settings) -> str:
    """Ask the questions; returns the id of the first response, once the log holds it."""
    from resources.requests import find

    first = ""
    for question in QUESTIONS:
        answer = ask.ask(question, settings)
        first = first or answer["response_id"]
        print(f"\n? {question}\n{ask.render(answer)}", flush=True)
    deadline = time.monotonic() + 30
    while find(settings, first) is None:
        if time.monotonic() > deadline:
            raise ServiceError(
                "The request log did not get the response.", where=str(settings.requests_dir)
            )
        time.sleep(0.2)
    return first


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RatchetError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
