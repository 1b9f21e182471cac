"""Embedding against plain sentence-transformers: the same mixed-length texts, one thread each.

    python -m benchmarks.embedding [--texts 600] [--queries 300] [--isa]

The peer is ``SentenceTransformer.encode`` at float32, called batch by batch (32 or 64 texts, in the
order they come in; the faster of the two is what counts). Ours is ``resources.embedding.Embedder``
without a cache. Costs are CPU seconds of one process, the sides taking turns; of two rounds the
better one counts, for each side.

Must hold for the dtype that params.yaml names: at least 3 times the peer's rate, cosine >= 0.9999
to the peer for every text, and the same ten nearest texts, all of them, for at least 99 % of the
queries. Also shown: the share of single neighbours that are the same, and what the others lose (the
most by which a text that was taken is less alike than the tenth that should have been, in cosine).

``--isa`` shows what other machines get, in child processes that may not use AMX, or nothing above
AVX2: 40 texts, since bfloat16 is emulated there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks import package_docs
from contracts import offline
from contracts.params import load_params
from contracts.settings import ROOT

RATIO, COSINE, NEIGHBOURS = 3.0, 0.9999, 0.99
PEER_BATCHES = (32, 64)
#: What a machine has to forget to look like an older one: oneDNN, MKL and torch's own kernels.
ISA = {
    "AVX-512 without AMX": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "AVX2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    },
}
ISA_TEXTS, ISA_QUERIES = 40, 10


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--texts", type=int, default=600)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--isa", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(given.texts, given.queries)))
        return 0
    dtype = load_params(ROOT / "params.yaml").vectors.dtype
    ours = show("this machine", child(given.texts, given.queries, {}))[f"ours, {dtype}"]
    if given.isa:
        for name, variables in ISA.items():
            show(name, child(ISA_TEXTS, ISA_QUERIES, variables))
    held = [
        (f"{ours['ratio']:.2f} times the peer", ours["ratio"], RATIO),
        (f"least cosine {ours['cosine']:.5f}", ours["cosine"], COSINE),
        (f"all ten the same {ours['identical']:.2%}", ours["identical"], NEIGHBOURS),
    ]
    for text, value, least in held:
        print(f"{'PASS' if value >= least else 'FAIL'}  {dtype}: {text} (at least {least})")
    return 0 if all(value >= least for _, value, least in held) else 1


def measure(count: int, queries: int) -> dict[str, Any]:
    """Rates (texts a CPU second) and agreement of every side, in this process."""
    import torch
    from sentence_transformers import SentenceTransformer

    from resources.embedding import Embedder

    torch.set_num_threads(1)
    drawn = package_docs.draw(count + queries)
    corpus, asked = drawn[:count], [text.partition("\n")[0] for text in drawn[count:]]
    ours = {f"ours, {dtype}": Embedder(dtype=dtype, threads=1) for dtype in ("float32", "bfloat16")}
    embedder = next(iter(ours.values()))
    peer = SentenceTransformer(str(embedder.folder), device="cpu")
    encode = partial(peer.encode, batch_size=64, show_progress_bar=False)
    sides: dict[str, Callable[[], Any]] = {
        **{
            f"peer, {size} a call": partial(by_batch, encode, corpus, size) for size in PEER_BATCHES
        },
        "peer, all in one call": partial(encode, corpus),
        **{name: partial(one.embed, corpus) for name, one in ours.items()},
    }
    for one in ours.values():
        one.warm()
    encode(corpus[:64])
    seconds: dict[str, float] = {}
    vectors: dict[str, Any] = {}
    for _ in range(2):
        for name, run in sides.items():
            started = time.process_time()
            vectors[name] = run()
            seconds[name] = min(seconds.get(name, 1e9), time.process_time() - started)
    truth = vectors[f"peer, {PEER_BATCHES[0]} a call"]
    scores = encode(asked) @ truth.T
    rows = {}
    for name, found in vectors.items():
        probes = ours[name].embed(asked) if name in ours else encode(asked)
        rows[name] = {
            "rate": count / seconds[name],
            "cosine": float((found * truth).sum(1).min()),
            **agreement(scores, probes @ found.T),
        }
    lengths = [len(one.ids) for one in embedder.tokenizer.encode_batch(corpus)]
    tokens = sum(min(length, 256) for length in lengths) / count
    return {"rows": rows, "texts": count, "tokens": tokens}


def by_batch(encode: Callable[[list[str]], Any], corpus: list[str], batch: int) -> Any:
    import numpy as np

    parts = [corpus[start : start + batch] for start in range(0, len(corpus), batch)]
    return np.concatenate([encode(part) for part in parts])


def agreement(truth: Any, got: Any, k: int = 10) -> dict[str, float]:
    """How far the ``k`` nearest by the scores ``got`` are those by ``truth``: (queries, texts)."""
    import numpy as np

    best = np.argsort(-truth, axis=1)[:, :k]
    taken = np.argsort(-got, axis=1)[:, :k]
    shared = [len(set(a) & set(b)) for a, b in zip(best.tolist(), taken.tolist(), strict=True)]
    tenth = np.take_along_axis(truth, best[:, -1:], axis=1)[:, 0]
    worst = np.take_along_axis(truth, taken, axis=1).min(axis=1)
    return {
        "overlap": sum(shared) / (k * len(shared)),
        "identical": sum(number == k for number in shared) / len(shared),
        "loss": float((tenth - worst).max()),
    }


def child(texts: int, queries: int, variables: dict[str, str]) -> dict[str, Any]:
    """:func:`measure` in a process of its own, which those variables hold for from the start."""
    command = [sys.executable, "-m", "benchmarks.embedding", "--child"]
    command += ["--texts", str(texts), "--queries", str(queries)]
    environ = {**os.environ, **offline.SWITCHES, "OMP_NUM_THREADS": "1", **variables}
    environ["TQDM_DISABLE"] = "1"
    done = subprocess.run(
        command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def show(machine: str, result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Print the table; the rows, each with its ratio to the faster peer."""
    rows: dict[str, dict[str, float]] = result["rows"]
    peer = max(rows[f"peer, {size} a call"]["rate"] for size in PEER_BATCHES)
    print(f"\n{machine}: {result['texts']} docstrings, {result['tokens']:.0f} tokens in the mean")
    head = ("texts/CPU s", "ratio", "least cosine", "top 10 same", "all ten same", "loses up to")
    print(f"{'':24}" + "".join(f"{name:>14}" for name in head))
    for name, row in rows.items():
        row["ratio"] = row["rate"] / peer
        print(
            f"{name:24}{row['rate']:14.1f}{row['ratio']:14.2f}{row['cosine']:14.5f}"
            f"{row['overlap']:14.2%}{row['identical']:14.1%}{row['loss']:14.5f}",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
