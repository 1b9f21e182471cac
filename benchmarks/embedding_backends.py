"""What computes MiniLM fastest on this CPU: torch, ONNX Runtime or OpenVINO; one thread each.

    BENCH_PYTHON=<python with onnx, onnxruntime, openvino> python -m benchmarks.embedding_backends

Every backend is given the same token rows in the same length-sorted batches, padded alike, so that
only the forward pass differs; the peer is what ``SentenceTransformer.encode`` gives in float32.
Rates are texts a CPU second, the better of two rounds after one that warms up. "Exact" is a least
cosine of 0.9999 to the peer.

Must hold: the backend and dtype of params.yaml are exact, and no exact backend is more than 1.5
times as fast: below that a second runtime, whose bits would have to be watched as torch's are (see
``resources.embedding``), costs more than it gives. Above it, look again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import package_docs
from benchmarks.embedding import agreement
from contracts import offline
from contracts.params import load_params
from contracts.settings import ROOT

if TYPE_CHECKING:
    from resources.embedding import Embedder

EXACT, MARGIN, BATCH = 0.9999, 1.5, 64


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--texts", type=int, default=400)
    parser.add_argument("--queries", type=int, default=100)
    given = parser.parse_args()
    python = os.environ.get("BENCH_PYTHON")
    if not python:
        parser.error("set BENCH_PYTHON: uv venv X; uv pip install onnx onnxruntime openvino ...")
    os.environ["OMP_NUM_THREADS"] = "1"
    offline.apply()
    import numpy as np
    from sentence_transformers import SentenceTransformer

    from resources.embedding import Embedder

    texts = package_docs.draw(given.texts)
    embedder = Embedder(dtype="float32", threads=1)
    batches = make(embedder, texts)
    order = [number for batch in batches for number in batch["numbers"]]
    peer = SentenceTransformer(str(embedder.folder), device="cpu")
    truth = peer.encode([texts[number] for number in order], show_progress_bar=False)
    with tempfile.TemporaryDirectory() as folder:
        seconds, vectors = others(python, embedder.folder, batches, Path(folder))
    for dtype in ("float32", "bfloat16"):
        seconds[f"torch {dtype}"], vectors[f"torch {dtype}"] = torch_side(dtype, batches)
    print(f"{len(texts)} docstrings; texts/CPU s, least cosine and ten nearest against the peer")
    cosines = {}
    for name in sorted(seconds, key=lambda name: seconds[name]):
        found: Any = np.asarray(vectors[name])
        cosines[name] = float((found * truth).sum(1).min())
        asked = slice(0, given.queries)
        near = agreement(truth[asked] @ truth.T, found[asked] @ found.T)
        print(
            f"{name:28}{len(texts) / seconds[name]:8.1f}/s  cosine {cosines[name]:.5f}  "
            f"top 10 same {near['overlap']:.2%}  {'exact' if cosines[name] >= EXACT else 'lossy'}"
        )
    return verdict(seconds, cosines)


def verdict(seconds: dict[str, float], cosines: dict[str, float]) -> int:
    """Print what holds; the exit code."""
    ours = f"torch {load_params(ROOT / 'params.yaml').vectors.dtype}"
    best = min((name for name in seconds if cosines[name] >= EXACT), key=lambda name: seconds[name])
    ratio = seconds[ours] / seconds[best]
    held = cosines[ours] >= EXACT and ratio <= MARGIN
    print(
        f"{'PASS' if held else 'FAIL'}  {ours}: cosine {cosines[ours]:.5f} (at least {EXACT}); the "
        f"fastest exact one is {best}, {ratio:.2f} times as fast (at most {MARGIN})"
    )
    return 0 if held else 1


def make(embedder: Embedder, texts: list[str]) -> list[dict[str, Any]]:
    """Token rows in length-sorted batches: {width, rows, numbers of the texts}."""
    from resources.embedding import make_batches
    from resources.encoder import padded_width

    rows = {f"{number:06}": row for number, row in enumerate(embedder._rows(texts))}
    return [
        {
            "width": max(padded_width(len(rows[key])) for key in keys),
            "rows": [rows[key] for key in keys],
            "numbers": [int(key) for key in keys],
        }
        for keys in make_batches(rows, BATCH)
    ]


def torch_side(dtype: str, batches: list[dict[str, Any]]) -> tuple[float, Any]:
    """CPU seconds and vectors of ``resources.encoder``, which is what the stage vectors runs."""
    import numpy as np

    from resources.embedding import find_model
    from resources.encoder import BertEncoder

    encoder = BertEncoder(find_model("all-MiniLM-L6-v2"), dtype)
    best = 1e9
    for _ in range(3):
        started = time.process_time()
        vectors = np.concatenate([encoder.encode(batch["rows"]) for batch in batches])
        best = min(best, time.process_time() - started)
    return best, vectors


def others(
    python: str, model: Path, batches: list[dict[str, Any]], folder: Path
) -> tuple[dict[str, float], dict[str, Any]]:
    """The same of the backends that live in an environment of their own."""
    import numpy as np

    (folder / "batches.json").write_text(json.dumps(batches))
    script = str(ROOT / "benchmarks" / "onnx_minilm.py")
    command = [python, script, str(model), str(folder / "batches.json"), str(folder)]
    environ = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds, {name: np.load(folder / f"{name}.npy") for name in seconds}


if __name__ == "__main__":
    sys.exit(main())
