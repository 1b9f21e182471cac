"""Work over many items on a Ray cluster: what ``engine: ray`` means in a stage that offers it.

In: items and a function over a list of them. Out: what the function returns, in the order of the
items, whichever node computed it: so a stage writes the same bytes with ``local`` and with ``ray``.
A worker or a node that dies costs only its own batches, which Ray computes again.

``RAY_ADDRESS`` in the environment joins a cluster ("auto", or "host:6379" from one of its nodes);
its nodes need this project's libraries installed, the code itself travels with the work. Without an
address a cluster of this machine's cores is started; it ends with the process.

Items and results travel as pickles inside Ray Data's rows. As rows of their own they would become
Arrow values, and come back as other types (tuples as lists, missing keys as None).
"""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import pickle
import shlex
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from contracts import offline
from contracts.errors import ConfigError, RatchetError, ServiceError
from contracts.settings import ROOT

T = TypeVar("T")
R = TypeVar("R")

#: Of a cluster started here; what does not fit is spilled to its folder. Ray's own default is 30 %
#: of the machine's memory.
OBJECT_STORE_BYTES = 256 << 20

#: Packages that a work function may come from: they are sent to a cluster that is joined.
CODE = ("contracts", "resources", "stages")


def map_batches(items: Sequence[T], work: Callable[[list[T]], list[R]], batch: int) -> list[R]:
    """``work`` over ``items``, ``batch`` of them a call; its results one after the other, in order.

    Args:
        items: anything that pickles.
        work: a function of a module (or a ``functools.partial`` of one). It may return more or
            fewer results than it was given items.
        batch: items a task; a task costs some 10 ms, so give it at least ten times that to do.

    Raises what ``work`` raises where that is a RatchetError, else ``ray.exceptions.RayError`` with
    the worker's traceback; ConfigError and ServiceError where Ray is not there.
    """
    batches = [list(items[start : start + batch]) for start in range(0, len(items), batch)]
    results = dict(stream(batches, work))
    return [result for number in range(len(batches)) for result in results[number]]


def stream(
    batches: Sequence[list[T]], work: Callable[[list[T]], list[R]]
) -> Iterator[tuple[int, list[R]]]:
    """As :func:`map_batches`, of batches made by the caller: (number, results) as they are done."""
    if not batches:
        return
    start()
    import ray.data

    def run(row: dict[str, Any]) -> dict[str, Any]:
        try:
            results = work(pickle.loads(row["payload"]))
        except RatchetError as error:
            return {"number": row["number"], "payload": b"", "error": pickle.dumps(error)}
        return {"number": row["number"], "payload": pickle.dumps(results), "error": b""}

    rows = [{"number": n, "payload": pickle.dumps(part)} for n, part in enumerate(batches)]
    # One block a batch: a node takes a batch at a time, and only that is lost with it.
    table = ray.data.from_items(rows, override_num_blocks=len(rows)).map(run)
    for row in table.iter_rows():
        if row["error"]:
            raise pickle.loads(row["error"])
        yield row["number"], pickle.loads(row["payload"])


def start() -> Any:
    """The module ``ray``, connected: to RAY_ADDRESS, or to a cluster started here. Idempotent."""
    offline.apply()
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "A stage's engine is ray, and Ray is not installed.",
            where="params.yaml: engine",
            next="install the `ray` extra, or set engine: local",
        )
    import ray

    if ray.is_initialized():
        return ray
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            _knock(address)
            ray.init(address, runtime_env=environment(send_code=True), **_QUIET)
        else:
            _start_local(ray)
    except (OSError, ValueError, RuntimeError) as error:
        raise ServiceError(
            f"Ray cannot be used: {error}",
            where=f"RAY_ADDRESS={address}" if address else "a cluster started on this machine",
            next="correct or unset RAY_ADDRESS, or set engine: local in params.yaml",
        ) from error
    _hush(ray)
    return ray


_QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}


def environment(*, send_code: bool) -> dict[str, Any]:
    """The ``runtime_env`` of workers: our code, the offline switches, one thread a task."""
    variables = {name: os.environ.get(name, value) for name, value in offline.SWITCHES.items()}
    variables["OMP_NUM_THREADS"] = "1"  # a task has one core; and bits depend on the thread count
    if send_code:
        made: dict[str, Any] = {"py_modules": [str(ROOT / name) for name in CODE]}
    else:
        made, variables = {}, {**variables, "PYTHONPATH": str(ROOT)}
    if shlex.quote(sys.executable) != sys.executable:
        # Ray 2.60 writes the interpreter into a shell command as it is. With a blank in its path
        # no worker starts and Ray waits for ever. Nodes of a cluster then need the same path.
        made["py_executable"] = shlex.quote(sys.executable)
    return {**made, "env_vars": variables}


def _knock(address: str) -> None:
    """OSError where nobody listens: Ray's own answer to that is to abort the process."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _start_local(ray: Any) -> None:
    """A cluster of this process: all cores it may use, no dashboard, a folder that goes with it."""
    # Not TMPDIR: Ray's socket paths add 60 characters, and the kernel's limit is 107.
    folder = Path(tempfile.mkdtemp(prefix="ratchet-ray-", dir=os.environ.get("RAY_TMPDIR", "/tmp")))

    def stop() -> None:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(stop)  # runs before Ray's own, which was registered when it was imported
    ray.init(
        address="local",
        num_cpus=len(os.sched_getaffinity(0)),
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        runtime_env=environment(send_code=False),
        _temp_dir=str(folder),
        **_QUIET,
    )


def _hush(ray: Any) -> None:
    """No progress bars and no notices: a stage's log holds what the stage says."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
