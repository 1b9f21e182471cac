"""``python -m serving.rollout start|status|abort|tick|watch``: try a release on a channel.

``start`` says what is to be tried and returns; ``tick`` does one step; ``watch`` ticks for ever, as
the child of `ratchet up` does. One line of JSON on stdout, progress on stderr.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import time
from pathlib import Path
from typing import Any, get_args

from contracts import offline
from contracts.errors import RatchetError
from contracts.records import Strategy
from contracts.settings import Settings
from resources import releases
from resources.ledger import Ledger
from serving.deploy.candidate import CandidateEngines
from serving.rollout import policy
from serving.rollout.controller import Controller, Report
from serving.rollout.state import BODY

log = logging.getLogger("ratchet.rollout")
#: Seconds between two looks: while a rollout is open, and else.
OPEN_SECONDS, IDLE_SECONDS = 0.25, 1.0
#: Seconds after a look that failed: the ledger's database may be away.
FAILED_SECONDS = 2.0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving.rollout", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("start", help="try a release beside the one that serves")
    start.add_argument(
        "--release", default="data/release.json", help="release file, or the id of an installed one"
    )
    start.add_argument(
        "--strategy", choices=("direct", *get_args(Strategy)), help="instead of the policy's"
    )
    start.add_argument("--policy", type=Path, help=f"default: {policy.PATH}")
    start.add_argument("--reason", default="", help="why, for the ledger")
    abort = commands.add_parser("abort", help="take the candidate back now")
    abort.add_argument("--reason", required=True, help="why, for the ledger")
    tick = commands.add_parser("tick", help="look once and do at most one thing")
    status = commands.add_parser("status", help="where the rollout stands")
    watch = commands.add_parser("watch", help="tick until it is ended")
    watch.add_argument("--until-end", action="store_true", help="end with the rollout")
    for command in (start, abort, tick, status, watch):
        command.add_argument("--channel", default="stable")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    offline.apply()
    logging.basicConfig(level=logging.INFO, format="rollout: %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, _interrupt)  # so that a new engine is ended on the way out
    try:
        print(json.dumps(run(Settings.from_env(), given)), flush=True)
    except RatchetError as error:
        print(f"rollout: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def run(settings: Settings, given: argparse.Namespace) -> dict[str, Any]:
    """The command's result."""
    releases.channel_path(settings, given.channel)
    ledger = Ledger.open(settings)
    engines = CandidateEngines(settings, _say)
    controller = Controller(settings, given.channel, engines, ledger)
    if given.command == "start":
        return _start(settings, controller, engines, given)
    if given.command == "abort":
        row = controller.abort(given.reason)
        return {"channel": given.channel, "ledger": row.seq, "did": "back", "why": row.reason}
    if given.command == "status":
        return status(controller, ledger)
    if given.command == "tick":
        return told(controller.tick())
    return _watch(controller, given.until_end)


def _start(
    settings: Settings, controller: Controller, engines: CandidateEngines, given: argparse.Namespace
) -> dict[str, Any]:
    rules = policy.load(given.policy or settings.root / policy.PATH)
    strategy = given.strategy or rules.strategy
    if strategy == "direct":
        return engines.up(given.release, given.channel, settings.root, given.reason)
    release = engines.install(given.release)
    row = controller.begin(release, rules, strategy, given.reason)
    return {
        "channel": given.channel, "release": release, "strategy": strategy,
        "rollout": row.body[BODY]["id"], "ledger": row.seq,
    }  # fmt: skip


def _watch(controller: Controller, until_end: bool) -> dict[str, Any]:
    """Tick, and say what was done. A look that fails is followed by another one."""
    said = ""
    while True:
        seconds = FAILED_SECONDS
        try:
            report = controller.tick()
            if report.did != "nothing" or report.why != said:
                log.info("%s: %s", report.did, report.why)
                said = report.why
            if until_end and not report.open and report.why != "another controller is at work":
                return told(report)
            seconds = OPEN_SECONDS if report.open else IDLE_SECONDS
        except RatchetError as error:
            log.error("%s", error)
        time.sleep(seconds)


def status(controller: Controller, ledger: Ledger) -> dict[str, Any]:
    """The open rollout with its evidence so far, and how the last one ended."""
    rollout, decision = controller.look()
    ended = [
        row
        for row in ledger.entries(channel=controller.channel, kinds=("promoted", "rolled_back"))
        if BODY in row.body
    ]
    found: dict[str, Any] = {"channel": controller.channel, "rollout": None, "last": None}
    if rollout is not None:
        found["rollout"] = {
            "id": rollout.id, "release": rollout.release, "strategy": rollout.strategy,
            "step": rollout.step, "share": rollout.share, "since": rollout.last.time,
            "began": rollout.began.time, "stable": rollout.pointer.release,
            **({"next": decision.action, "why": decision.reason} if decision else {}),
            "findings": [item.record() for item in decision.findings] if decision else [],
        }  # fmt: skip
    if ended:
        row = ended[-1]
        found["last"] = {"did": row.body[BODY]["action"], "release": row.release,
                         "why": row.reason, "time": row.time, "ledger": row.seq}  # fmt: skip
    return found


def told(report: Report) -> dict[str, Any]:
    """A report as JSON."""
    return {
        "did": report.did, "why": report.why, "open": report.open,
        "release": report.rollout.release if report.rollout else None,
        "step": report.rollout.step if report.rollout else None,
    }  # fmt: skip


def _say(message: str) -> None:
    print(f"rollout: {message}", file=sys.stderr, flush=True)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
