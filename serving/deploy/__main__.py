"""``python -m serving.deploy up|rollback|ensure|down|status``: releases to engines and back.

Progress on stderr, one line of JSON on stdout at the end. A failure prints what, where and the next
step, and leaves what was serving as it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from typing import Any

from contracts import offline
from contracts.errors import RatchetError
from contracts.settings import Settings
from resources import registry
from serving.deploy.deployment import Deployer, Patience


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving.deploy", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="serve a release on a channel")
    up.add_argument(
        "--release", default="data/release.json", help="release file, or the id of an installed one"
    )
    up.add_argument("--channel", default="stable")
    back = commands.add_parser(
        "rollback", help="serve a release again that a channel served before"
    )
    back.add_argument("--channel", default="stable")
    back.add_argument(
        "--to", metavar="RELEASE", help="its id; the one before, if this is not given"
    )
    back.add_argument("--reason", required=True, help="why, for the ledger")
    up.add_argument("--reason", default="", help="why, for the ledger")
    ensure = commands.add_parser("ensure", help="bring the channels' engines back if they are dead")
    ensure.add_argument("--channel", help="only this one")
    for command in (up, back, ensure):
        command.add_argument("--ready-timeout", type=float, default=300.0, help="s to a token")
        command.add_argument("--drain-timeout", type=float, default=60.0, help="s, the old engine")
    down = commands.add_parser("down", help="stop engines; channels keep pointing")
    which = down.add_mutually_exclusive_group()
    which.add_argument("--channel", default="stable")
    which.add_argument("--all", action="store_true", help="every engine that this checkout started")
    commands.add_parser("status", help="channels, engines and installed releases")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    offline.apply()
    signal.signal(signal.SIGTERM, _interrupt)  # so that a new engine is ended on the way out
    try:
        settings = Settings.from_env()
        result = run(settings, given)
        if result.get("changed"):
            with contextlib.suppress(OSError):  # the release is live: that is the result
                registry.follow_later(settings)
        print(json.dumps(result), flush=True)
    except RatchetError as error:
        print(f"deploy: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("deploy: interrupted; `status` shows what serves", file=sys.stderr, flush=True)
        return 130
    return 0


def run(settings: Settings, given: argparse.Namespace) -> dict[str, Any]:
    """The command's result."""
    patience = Patience()
    if given.command in ("up", "rollback", "ensure"):
        patience = Patience(ready=given.ready_timeout, drain=given.drain_timeout)
    deployer = Deployer(settings, _say, patience)
    if given.command == "up":
        return deployer.up(given.release, given.channel, settings.root, given.reason)
    if given.command == "rollback":
        return deployer.rollback(given.channel, given.to, given.reason)
    if given.command == "ensure":
        return deployer.ensure(given.channel)
    if given.command == "down":
        return deployer.down(None if given.all else given.channel)
    return deployer.status()


def _say(message: str) -> None:
    print(f"deploy: {message}", file=sys.stderr, flush=True)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
