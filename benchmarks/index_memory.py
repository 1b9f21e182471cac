"""100,000 chunks built, published and searched within 4 GiB of memory.

``python -m benchmarks.index_memory``. Three processes of their own, as in life: the stage ``index``
on Parquet files, the publish, and a reader that asks 200 questions in every mode. Each reports the
peak of its resident memory, mapped files included (``VmHWM``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from benchmarks.knowledge import rows, text_like
from contracts import offline
from contracts.params import Search, load_params
from contracts.settings import ROOT, Settings

COUNT, LIMIT_MIB = 100_000, 4096
MODEL = {"name": "all-MiniLM-L6-v2", "dtype": "bfloat16", "digest": "benchmark", "dimension": 384}


def prepare(folder: Path) -> None:
    """chunks.parquet and vectors.parquet as the stages write them; questions beside them."""
    import pyarrow as pa

    from stages.tables import write_table
    from stages.vectors import write_vectors

    texts, vectors, questions, asked = text_like(COUNT)
    table = pa.Table.from_pylist(rows(texts))
    write_table(folder / "chunks.parquet", table)
    write_vectors(folder / "vectors.parquet", table, vectors, MODEL)
    np.save(folder / "asked.npy", asked)
    (folder / "questions.json").write_text(json.dumps(questions))


def build(folder: Path) -> None:
    from stages import index

    paths = SimpleNamespace(
        chunks=folder / "chunks.parquet", vectors=folder / "vectors.parquet", out=folder / "index"
    )
    index.run(paths, load_params(ROOT / "params.yaml"))


def publish(folder: Path) -> None:
    from resources import published

    params = load_params(ROOT / "params.yaml")
    policy = published.Policy.of(params, folder)
    content = json.loads((folder / "index" / "manifest.json").read_text())["content"]
    policy.report.parent.mkdir()
    # What the stage retrieval writes; these made texts have no golden questions.
    policy.report.write_text(json.dumps({"index": content, "metrics": {policy.metric: 1.0}}))
    published.publish(folder / "index", Settings.from_env(), policy)


def search(folder: Path) -> None:
    from resources.published_reader import open_published

    asked = np.load(folder / "asked.npy")
    questions = json.loads((folder / "questions.json").read_text())
    reader = open_published(Settings.from_env())
    assert reader.count == COUNT
    for mode in ("dense", "sparse", "fused"):
        times = []
        for vector, text in zip(asked, questions, strict=True):
            clock = time.perf_counter()
            reader.search(vector, 10, text=text, search=Search(mode=mode))
            times.append(time.perf_counter() - clock)
        print(f"  {mode:7} p50 {np.median(times) * 1000:.2f} ms, {len(times)} questions")


STEPS = {"build": build, "publish": publish, "search": search}


def main() -> int:
    offline.apply()
    peaks = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environ = os.environ | {"RATCHET_STATE_DIR": str(folder / "state")}
        prepare(folder)
        for step in STEPS:
            clock = time.monotonic()
            command = [sys.executable, "-m", "benchmarks.index_memory", step, name]
            subprocess.run(command, check=True, env=environ, cwd=ROOT)
            peak = int((folder / f"{step}.peak").read_text()) / 1024
            peaks[step] = (peak, time.monotonic() - clock)
    print(f"\n{COUNT} chunks of 384 dimensions")
    for step, (peak, seconds) in peaks.items():
        print(f"{step:10} peak {peak:7.0f} MiB   {seconds:6.1f} s")
    ok = all(peak <= LIMIT_MIB for peak, _ in peaks.values())
    print("PASS" if ok else "FAIL", f"(every process within {LIMIT_MIB} MiB)")
    return 0 if ok else 1


def step(name: str, folder: Path) -> int:
    """One step in this process; its peak goes to a file."""
    offline.apply()
    STEPS[name](folder)
    status = Path("/proc/self/status").read_text()  # ru_maxrss would start at the parent's
    peak = status.split("VmHWM:")[1].split()[0]  # KiB
    (folder / f"{name}.peak").write_text(peak)
    return 0


if __name__ == "__main__":
    sys.exit(step(sys.argv[1], Path(sys.argv[2])) if len(sys.argv) > 1 else main())
