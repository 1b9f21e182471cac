"""What every stage's process does around its work.

In: path options, ``params.yaml``. Out: the stage's output, its metrics file, a spooled record of
the execution for MLflow. A stage module ends with::

    if __name__ == "__main__":
        harness.main("chunks", run, paths=("documents", "out"))

where ``run(paths, params) -> dict[str, float]`` writes its output and returns flat metrics.
A RatchetError becomes one readable message and an exit code; any other exception is a bug and
keeps its traceback.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from contracts import offline
from contracts.errors import RatchetError
from contracts.params import Params, load_params

#: A path option may be a folder of the repository, a file, or plain text such as a source's key.
Paths = SimpleNamespace
Run = Callable[[Any, Params], dict[str, float]]

#: Python's own (700, 10, 10) has the collector walk a table of 100,000 rows again and again, and
#: every class of an import: a tenth of the CPU time of acceptance and of quality.
GC = (50_000, 20, 20)


def main(
    name: str,
    run: Run,
    *,
    paths: Sequence[str],
    options: Sequence[str] = (),
    argv: Sequence[str] | None = None,
) -> None:
    """Run one stage and exit: 0, or a RatchetError's code.

    Args:
        name: the stage; also its block in params.yaml.
        run: the work.
        paths: names of required options that hold paths; given to ``run`` as ``Path``.
        options: names of required options that hold text.
        argv: command line without the program; ``sys.argv`` by default.
    """
    sys.exit(execute(name, run, paths=paths, options=options, argv=argv))


def execute(
    name: str,
    run: Run,
    *,
    paths: Sequence[str],
    options: Sequence[str] = (),
    argv: Sequence[str] | None = None,
) -> int:
    """As :func:`main`, but returns the exit code."""
    from resources import spool  # late: keeps `import stages.x` free of the state folder

    offline.apply()
    gc.set_threshold(*GC)
    parser = argparse.ArgumentParser(prog=f"python -m stages.{name}")
    for option in paths:
        parser.add_argument(f"--{option.replace('_', '-')}", type=Path, required=True)
    for option in options:
        parser.add_argument(f"--{option.replace('_', '-')}", required=True)
    parser.add_argument("--metrics", type=Path, help="where to write the metrics, as JSON")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    given = parser.parse_args(argv)

    started, clock = time.time(), time.monotonic()
    error: str | None = None
    metrics: dict[str, float] = {}
    params: Params | None = None
    code = 1
    try:
        params = load_params(given.params)
        metrics = run(given, params)
        if given.metrics:
            write_json(given.metrics, metrics)
        code = 0
    except RatchetError as problem:
        error, code = str(problem), problem.exit_code
        print(f"\n{name}: {problem}", file=sys.stderr, flush=True)
    except BaseException as problem:
        error = f"{type(problem).__name__}: {problem}"
        raise
    finally:
        block = getattr(params, name, None)
        spool.record(
            stage=name,
            started=started,
            seconds=time.monotonic() - clock,
            params=block.model_dump() if block is not None else {},
            metrics=metrics,
            paths={key: str(value) for key, value in vars(given).items() if value is not None},
            error=error,
        )
    return code


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as stable JSON (sorted keys, newline at the end), whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(
        json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    os.replace(part, path)


def fresh_dir(path: Path) -> Path:
    """An empty folder at ``path``; what stood there goes."""
    import shutil

    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    return path


def progress(message: str) -> None:
    """One line of progress, seen at once in a terminal and in Dagster's log."""
    print(message, flush=True)
