"""``python -m serving.engines --bundle DIR``: one engine in the foreground, until SIGTERM.

When tokens flow it prints one JSON line: {"url", "pid", "engine_pid", "model", "seconds"}. SIGTERM
or SIGINT ends the whole tree and exits 0. An engine that dies, or is not ready in time, is an error
with the end of its log and exit code 1. ``--record`` keeps a JSON file of the same facts (plus
start ticks, log and state), written before the engine is started, so that whoever started us can be
killed without the engine being lost.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from contracts import offline
from contracts.errors import RatchetError
from contracts.settings import Settings
from resources import processes
from serving.engines.launch import read_launch
from serving.engines.record import write_record
from serving.engines.supervisor import Stopped, Supervisor


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving.engines", description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="folder with launch.json")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="0 (the default) takes a free one")
    parser.add_argument("--log", type=Path, help="file for the engine's output, appended")
    parser.add_argument("--ready-timeout", type=float, default=240.0, help="seconds to first token")
    parser.add_argument("--record", type=Path, help="JSON file to keep while the engine lives")
    parser.add_argument("--release", default="", help="release id to note in the record")
    parser.add_argument(
        "--die-with-parent", action="store_true", help="end when the process that started us ends"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    offline.apply()
    parent = os.getppid()
    if given.die_with_parent:
        processes.die_with_parent()
        if os.getppid() != parent:
            return 1  # the parent ended before the kernel was asked
    try:
        return serve(given)
    except RatchetError as error:
        print(f"engine: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def serve(given: argparse.Namespace) -> int:
    """Start, announce, stay."""
    settings = Settings.from_env()
    launch = read_launch(given.bundle)
    supervisor = Supervisor(
        launch,
        host=given.host,
        port=given.port,
        log=given.log or settings.engines_dir / "logs" / f"engine-{os.getpid()}.log",
        environ=dict(os.environ),
    )
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: supervisor.stop_soon())

    def note(state: str, **more: Any) -> dict[str, Any]:
        facts = {
            "release": given.release,
            "state": state,
            "pid": os.getpid(),
            "ticks": processes.start_ticks(os.getpid()),
            "engine_pid": supervisor.engine_pid,
            "port": supervisor.port,
            "url": supervisor.url,
            "model": launch.name,
            "log": str(supervisor.log),
            **more,
        }
        if given.record:
            write_record(given.record, facts)
        return facts

    note("starting")
    try:
        seconds = supervisor.start(given.ready_timeout, on_spawn=lambda: note("starting"))
        ready = note("ready", seconds=round(seconds, 2))
        shown = ("url", "pid", "engine_pid", "model", "seconds")
        print(json.dumps({key: ready[key] for key in shown}), flush=True)
        supervisor.watch()
    except Stopped:
        pass
    finally:
        supervisor.end()
        if given.record:
            given.record.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
