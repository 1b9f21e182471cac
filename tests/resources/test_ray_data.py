"""Work on a Ray cluster: in order, the same as here, and whole when a node dies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contracts.errors import ConfigError, ServiceError
from contracts.params import Source
from contracts.settings import ROOT
from resources import ray_data
from resources.embedding import Embedder, embed_rows
from stages import chunks, documents, vectors
from stages.sources import cached
from tests.conftest import free_port
from tests.stages.knowledge import PAGES, params, paths
from tests.stages.sources import docx_bytes, pdf_bytes


def numbered(start: int, items: list[Any]) -> list[tuple[int, Any]]:
    """Types that Arrow would change: tuples, None, mixed lists; more results than items."""
    return [(start + len(items), item) for item in items for _ in range(2)]


def refuse(items: list[int]) -> list[int]:
    raise ConfigError("No.", where="here", next="there", offenders=["a", "b"])


def fail(items: list[int]) -> list[int]:
    raise KeyError("a bug")


def node_of(folder: str, items: list[int]) -> list[str]:
    """The node that each item was computed on; leaves a mark, and takes a moment."""
    import ray

    node = str(ray.get_runtime_context().get_node_id())
    for item in items:
        (Path(folder) / f"{item}-{node}").touch()
    deadline = time.monotonic() + 0.15
    while time.monotonic() < deadline:
        sum(range(1000))
    return [f"{item}-{node}" for item in items]


def test_ray_is_imported_only_when_chosen() -> None:
    code = (
        "import sys, resources.ray_data as r, stages.vectors;"
        "assert r.map_batches([], list, 3) == [];"
        "sys.exit('ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_without_ray_the_next_step_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="install the `ray` extra"):
        ray_data.map_batches([1], list, 1)


def test_what_workers_are_told() -> None:
    variables = ray_data.environment(send_code=False)["env_vars"]
    assert variables["PYTHONPATH"] == str(ROOT)
    assert (variables["HF_HUB_OFFLINE"], variables["OMP_NUM_THREADS"]) == ("1", "1")
    sent = ray_data.environment(send_code=True)
    assert [Path(folder).name for folder in sent["py_modules"]] == list(ray_data.CODE)
    assert all(Path(folder).is_dir() for folder in sent["py_modules"])


LOCAL = """
import os, sys
from pathlib import Path
from resources import ray_data
if __name__ == "__main__":
    assert ray_data.map_batches(list(range(9)), lambda items: [-n for n in items], 2) == [
        -n for n in range(9)
    ]
    import ray
    print(ray.cluster_resources()["CPU"], flush=True)
    if "die" in sys.argv:
        os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["end", "die"])
def test_a_cluster_started_here_ends_with_the_process(tmp_path: Path, how: str) -> None:
    """Also when the process is killed: Ray's reaper then ends what it started."""
    folder = Path(f"/tmp/rl{os.getpid()}{how}")
    folder.mkdir()
    environ = {**os.environ, "RAY_TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    environ.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-c", LOCAL, how], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == (0 if how == "end" else -9), done.stderr
    assert done.stdout == f"{len(os.sched_getaffinity(0)):.1f}\n", "nothing but what it says itself"
    assert done.stderr == ""
    deadline = time.monotonic() + 30
    while left := using(folder):
        assert time.monotonic() < deadline, left
    if how == "end":
        assert list(folder.iterdir()) == []
    shutil.rmtree(folder)


def using(folder: Path) -> list[str]:
    """Command lines of processes that name the folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if str(folder) in line:
            found.append(line[:200])
    return found


def test_an_address_without_a_cluster_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    with pytest.raises(ServiceError, match=r"(?s)refused.*correct or unset RAY_ADDRESS"):
        ray_data.map_batches([1], list, 1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each on this machine; this process joins it by its address."""
    import ray
    from ray import cloudpickle
    from ray.cluster_utils import Cluster

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers have no tests to import
    folder = Path(f"/tmp/rc{os.getpid()}")  # short: sockets stand in it
    Path("/tmp/ray").mkdir(exist_ok=True)  # Ray notes the address there, whatever temp_dir says
    node = {"num_cpus": 1, "object_store_memory": 100 << 20}
    head = {**node, "include_dashboard": False, "temp_dir": str(folder)}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.add_node(**node)
    made.wait_for_nodes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", made.address)
        yield made
    ray.shutdown()
    made.shutdown()
    shutil.rmtree(folder)


@pytest.mark.slow
def test_results_come_in_order_from_both_nodes(cluster: Any, tmp_path: Path) -> None:
    items = [{"a": (1, None)}, "b", b"c", [1, "d"], np.int64(5)] * 4
    assert ray_data.map_batches(items, partial(numbered, 10), 3) == [
        result for n in range(0, 20, 3) for result in numbered(10, items[n : n + 3])
    ]
    found = ray_data.map_batches(list(range(24)), partial(node_of, str(tmp_path)), 2)
    assert [name.split("-")[0] for name in found] == [str(n) for n in range(24)]
    assert len({name.split("-")[1] for name in found}) == 2


@pytest.mark.slow
def test_errors_of_the_work_arrive(cluster: Any) -> None:
    from ray.exceptions import RayError

    with pytest.raises(ConfigError) as caught:
        ray_data.map_batches([1, 2, 3], refuse, 1)
    assert (caught.value.what, caught.value.next, caught.value.where) == ("No.", "there", "here")
    assert caught.value.offenders == ["a", "b"] and "  next:  there" in str(caught.value)
    with pytest.raises(RayError, match="a bug"):
        ray_data.map_batches([1, 2, 3], fail, 1)


@pytest.mark.slow
def test_stages_give_the_same_bytes_with_either_engine(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """documents, chunks and vectors, each from an empty cache and in several batches."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cached, "RAY_BATCH", 2)
    monkeypatch.setattr(chunks, "BATCH", 300)
    pages = {name: text.encode() for name, text in PAGES.items()} | {
        "page.html": b"<h1>Notes</h1><p>What changed, <b>and why</b>.</p>",
        "page.pdf": pdf_bytes("A page of words, written for every engine alike."),
        "handbook.docx": docx_bytes(),
        "broken.pdf": b"no PDF at all",
    }
    (tmp_path / "docs").mkdir()
    for name, data in pages.items():
        (tmp_path / "docs" / name).write_bytes(data)
    made: dict[str, list[bytes]] = {}
    for engine in ("local", "ray"):
        folder = tmp_path / engine
        monkeypatch.setenv("RATCHET_STATE_DIR", str(folder / "state"))
        knobs = params(
            documents={"sources": {"docs": Source(uri="docs", path="docs")}, "engine": engine},
            chunks={"engine": engine},
            vectors={"engine": engine, "batch": 2},
        )
        outs = [folder / f"{name}.parquet" for name in ("documents", "chunks", "vectors")]
        found = documents.run(paths(key="docs", out=outs[0]), knobs)
        assert (found["documents"], found["unreadable"]) == (len(pages), 1)
        assert chunks.run(paths(documents=folder, out=outs[1]), knobs)["chunks"] > 3
        assert vectors.run(paths(chunks=outs[1], out=outs[2]), knobs)["vectors"] > 3
        made[engine] = [out.read_bytes() for out in outs]
    assert made["local"] == made["ray"]


@pytest.mark.slow
def test_a_worker_with_another_model_is_refused(cluster: Any) -> None:
    rows = [("key", Embedder()._rows(["some text"])[0])]
    with pytest.raises(ConfigError, match="A node of the Ray cluster has other weights"):
        list(ray_data.stream([rows], partial(embed_rows, "all-MiniLM-L6-v2", "bfloat16", "0" * 64)))


@pytest.mark.slow
def test_a_node_that_dies_costs_only_its_batches(cluster: Any, tmp_path: Path) -> None:
    """Last of the cluster's tests, since it ends a node of it."""
    worker = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    cluster.wait_for_nodes()
    items = list(range(60))
    done = ray_data.stream([[n] for n in items], partial(node_of, str(tmp_path)))
    found = dict([next(done) for _ in range(10)])
    cluster.remove_node(worker, allow_graceful=False)
    found.update(done)
    assert [found[n][0].split("-")[0] for n in items] == [str(n) for n in items]
    assert any(worker.node_id in mark.name for mark in tmp_path.iterdir()), "it had begun to work"
