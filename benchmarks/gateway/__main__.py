"""What the gateway costs, side by side in one run: direct, a bare relay, ours, LiteLLM.

    python -m benchmarks.gateway [--quick] [--soak MINUTES] [--lanes latency throughput ...]
                                 [--out FOLDER] [--without-litellm]

The gateway under test is pinned to core 0; the mock upstream and the load generator share core 1.
Subjects: ``direct`` (no gateway: the rig's own ceiling), ``relay`` (relay.py, the floor for
Python), ``minimal``, ``governed`` and ``full`` (subjects.py says what each has), and LiteLLM's
proxy at a pinned version, in an environment that is built once under RATCHET_BENCH_CACHE (a
temporary folder without it). Every sample is written under ``--out`` as CSV.

Prints a table for each figure, with the ratio to the relay and to LiteLLM, then every target with
PASS or FAIL; a target that was not measured says so. Exit status 1 when one fails.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import uvloop

from benchmarks.gateway import lanes, report, soak
from benchmarks.gateway.samples import Samples
from benchmarks.gateway.subjects import (
    GATEWAY_CORE,
    LITELLM,
    RIG_CORE,
    Subject,
    Unavailable,
    litellm,
    ours,
    python,
)

LANES = ("latency", "throughput", "ttft", "frames", "head-of-line", "flood", "soak")
OURS = ("minimal", "governed", "full")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description=__doc__)
    parser.add_argument("--lanes", nargs="+", choices=LANES, default=LANES)
    parser.add_argument("--soak", type=float, default=10.0, help="minutes")
    parser.add_argument("--quick", action="store_true", help="a fifth of the samples")
    parser.add_argument("--without-litellm", action="store_true")
    parser.add_argument("--out", type=Path, help="a new folder for raw samples")
    return parser.parse_args()


@contextlib.contextmanager
def subjects(folder: Path, with_litellm: bool, missing: list[str]) -> Iterator[list[Subject]]:
    """Every subject, running and stopped with SIGSTOP; the direct one is the mock itself."""
    cache = Path(os.environ.get("RATCHET_BENCH_CACHE") or folder)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        mock = enter(python("benchmarks.gateway.mock", core=RIG_CORE, log=folder / "mock.log"))
        mock.name = "direct"
        found = [mock]
        relay = enter(python("benchmarks.gateway.relay", mock.url, core=GATEWAY_CORE,
                             log=folder / "relay.log"))  # fmt: skip
        relay.name = "relay"
        found.append(relay)
        for lane in OURS:
            found.append(enter(ours(lane, mock.url, folder)))
            found[-1].pause()
        for lane in ("plain", "governed") if with_litellm else ():
            try:
                found.append(enter(litellm(lane, mock.url, folder, cache)))
                found[-1].pause()
            except Unavailable as error:
                missing.append(str(error))
                break
        relay.pause()
        yield found


async def measure(
    given: argparse.Namespace, found: list[Subject], results: lanes.Results, samples: Samples
) -> None:
    """Every lane that was asked for."""
    for lane in given.lanes:
        began = time.monotonic()
        try:
            await one_lane(lane, given, found, results, samples)
        except lanes.LaneFailed as error:
            results.failed.append(f"{lane}: {error}")
        print(f"{lane}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


async def one_lane(
    lane: str,
    given: argparse.Namespace,
    found: list[Subject],
    results: lanes.Results,
    samples: Samples,
) -> None:
    some = 5 if given.quick else 1
    gateways = found[1:]
    governed = [s for s in found if s.name in ("governed", "full", "litellm-governed")]
    if lane in ("latency", "ttft"):
        await lanes.latency(found, gateways, results, samples, stream=lane == "ttft",
                            rounds=25 // some, count=200)  # fmt: skip
    elif lane == "throughput":
        await lanes.throughput(found, gateways, results, samples, seconds=3 / some + 0.5,
                               rounds=2 if given.quick else 3)  # fmt: skip
    elif lane == "frames":
        await lanes.frames(found, gateways, results, samples, seconds=15 / some)
    elif lane == "head-of-line":
        await lanes.head_of_line(found, gateways, results, samples, large=20 // some)
    elif lane == "flood":
        await lanes.flood(governed, gateways, results, samples, seconds=5 / some)
    elif lane == "soak":
        full = next(subject for subject in found if subject.name == "full")
        with lanes.only(full, gateways):
            await soak.soak(full, results, samples, given.soak)


def main() -> int:
    given = arguments()
    if len(os.sched_getaffinity(0)) < 2:
        print("this needs two cores: one for the gateway, one for the rig", file=sys.stderr)
        return 2
    random.seed(7)
    busy = os.getloadavg()[0]
    out = given.out or Path(tempfile.mkdtemp(prefix="gateway-samples-"))
    results = lanes.Results()
    missing: list[str] = []
    with (
        tempfile.TemporaryDirectory(prefix="gateway-bench-") as text,
        subjects(Path(text), not given.without_litellm, missing) as found,
    ):
        os.sched_setaffinity(0, {RIG_CORE})
        uvloop.run(measure(given, found, results, Samples(out)))
    print(f"{platform.platform()}, Python {platform.python_version()}, LiteLLM {LITELLM}, "
          f"load before {busy:.1f}; samples in {out}")  # fmt: skip
    for text in missing:
        print(f"missing: {text}; no ratio to it is claimed")
    return report.show(results)


if __name__ == "__main__":
    sys.exit(main())
