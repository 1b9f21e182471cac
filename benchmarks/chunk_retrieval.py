"""What chunks are worth: retrieval on 472 public questions, against other people's splitters.

``RATCHET_DATA=… [BENCH_PYTHON=…] python -m benchmarks.chunk_retrieval``. Corpora, questions and
reference spans are Chroma's (github: brandonstarxel/chunking_evaluation), and so are the measures
(research.trychroma.com/evaluating-chunking), counted in tokens of the embedding model: recall is
the share of a question's reference tokens that the five chunks found hold; IoU is intersection over
union of both. One index over all five corpora, at most 254 tokens
a chunk. The corpora are prose without markup, and are cut as each of :data:`WAYS`.
Target, as the formats text and Markdown: recall@5 within 0.01 of the best library, IoU >= 0.049.
The second figure was taken from a run with BM25, so BM25 decides; dense search is judged and
printed as well.

langchain runs in this environment, chonkie and semantic-text-splitter in BENCH_PYTHON's.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from contracts import offline
from resources.embedding import Embedder
from stages.splitting import Strategy, WordCounter, split

if TYPE_CHECKING:
    import numpy as np

LIMIT, K = 254, 5
MARGIN, LEAST_IOU = 0.01, 0.049
#: Name: format, strategy.
WAYS: dict[str, tuple[str, Strategy]] = {
    "ratchet text": ("text", "structure"),
    "ratchet markdown": ("markdown", "structure"),
    "ratchet recursive": ("text", "recursive"),
    "ratchet fixed": ("text", "fixed"),
}
JUDGED = ("ratchet text", "ratchet markdown")
PEERS = ("langchain recursive", "chonkie recursive", "semantic-text-splitter")

#: (corpus, start, end)
Span = tuple[str, int, int]

#: Texts, questions -> scores, (questions, texts).
Search = Callable[[list[str], list[str], Embedder], "np.ndarray"]


@dataclass(frozen=True)
class Question:
    text: str
    references: list[Span]


def read(folder: Path) -> tuple[dict[str, str], list[Question]]:
    """Corpora by name, and the questions."""
    corpora = {
        path.stem: path.read_bytes().decode() for path in sorted((folder / "corpora").glob("*.md"))
    }
    questions = []
    with (folder / "questions.csv").open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            found = [
                (row["corpus_id"], one["start_index"], one["end_index"])
                for one in json.loads(row["references"])
            ]
            questions.append(Question(row["question"], found))
    return corpora, questions


def ours(
    corpora: dict[str, str], embedder: Embedder, format: str, strategy: Strategy
) -> list[Span]:
    counter = WordCounter(embedder.tokenizer)
    return [
        (name, one.start, one.end)
        for name, text in corpora.items()
        for one in split(text, LIMIT, counter, format=format, strategy=strategy)
    ]


def peer(corpora: dict[str, str], embedder: Embedder, splitter: str) -> list[Span] | None:
    """The chunks of another splitter; None, and a line that says why, where it cannot be run."""
    python = sys.executable if splitter.startswith("langchain") else os.environ.get("BENCH_PYTHON")
    if not python:
        print(f"skipped: {splitter}: BENCH_PYTHON names no interpreter that has it")
        return None
    job = {
        "splitter": splitter,
        "tokenizer": str(embedder.folder / "tokenizer.json"),
        "limit": LIMIT,
        "texts": list(corpora.values()),
    }
    done = subprocess.run(
        [python, str(Path(__file__).with_name("chunking_peers.py"))],
        input=json.dumps(job),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(f"skipped: {splitter}: {done.stderr.strip().splitlines()[-1]}")
        return None
    found = json.loads(done.stdout)["spans"]
    return [
        (name, a, b) for name, spans in zip(corpora, found, strict=True) for a, b in spans if a < b
    ]


class Tokens:
    """Where the tokens of each corpus begin, so that spans of characters become sets of tokens."""

    def __init__(self, corpora: dict[str, str], embedder: Embedder) -> None:
        import numpy as np

        self._starts = {
            name: np.array(
                [a for a, _ in embedder.tokenizer.encode(text, add_special_tokens=False).offsets]
            )
            for name, text in corpora.items()
        }

    def of(self, spans: list[Span]) -> set[tuple[str, int]]:
        found: set[tuple[str, int]] = set()
        for name, start, end in spans:
            first, last = self._starts[name].searchsorted([start, end])
            found.update((name, number) for number in range(first, last))
        return found


def dense(texts: list[str], asked: list[str], embedder: Embedder) -> np.ndarray:
    """Cosines, (questions, texts)."""
    scores: np.ndarray = embedder.embed(asked) @ embedder.embed(texts).T
    return scores


def bm25(texts: list[str], asked: list[str], embedder: Embedder) -> np.ndarray:
    """Okapi BM25 over the tokenizer's tokens, k1 1.2, b 0.75: (questions, texts)."""
    import numpy as np

    rows = [one.ids for one in embedder.tokenizer.encode_batch(texts, add_special_tokens=False)]
    counts = np.zeros((len(texts), embedder.tokenizer.get_vocab_size()), dtype=np.float32)
    for number, row in enumerate(rows):
        np.add.at(counts[number], row, 1)
    holding = (counts > 0).sum(axis=0)
    weight = np.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
    length = counts.sum(axis=1, keepdims=True)
    counts = counts * 2.2 / (counts + 1.2 * (0.25 + 0.75 * length / length.mean()))
    found = embedder.tokenizer.encode_batch(asked, add_special_tokens=False)
    return np.stack([counts[:, one.ids] @ weight[one.ids] for one in found])


def measure(
    chunks: list[Span],
    corpora: dict[str, str],
    questions: list[Question],
    embedder: Embedder,
    tokens: Tokens,
    search: Search,
) -> np.ndarray:
    """(questions, 2): recall and IoU of the five chunks that each question finds."""
    import numpy as np

    texts = [corpora[name][start:end] for name, start, end in chunks]
    scores = search(texts, [question.text for question in questions], embedder)
    nearest = np.argsort(-scores, axis=1, kind="stable")[:, :K]
    rows = []
    for question, row in zip(questions, nearest, strict=True):
        wanted = tokens.of(question.references)
        found = tokens.of([chunks[number] for number in row])
        both = len(wanted & found)
        rows.append((both / len(wanted), both / len(wanted | found)))
    return np.array(rows)


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of a mean, 10,000 resamples, seeded."""
    import numpy as np

    rng = np.random.default_rng(7)
    means = values[rng.integers(0, len(values), (10_000, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def main() -> int:
    offline.apply()
    data = Path(os.environ.get("RATCHET_DATA", "../shared/data")) / "chunking_evaluation"
    if not data.is_dir():
        print(f"no such folder: {data}; set RATCHET_DATA")
        return 1
    cache = Path(os.environ.get("BENCH_CACHE", ".ratchet/benchmarks"))
    corpora, questions = read(data)
    embedder = Embedder(cache_dir=cache / "embeddings")
    tokens = Tokens(corpora, embedder)
    chunks: dict[str, list[Span] | None] = {
        name: ours(corpora, embedder, *way) for name, way in WAYS.items()
    }
    chunks |= {name: peer(corpora, embedder, name) for name in PEERS}
    print(f"{len(questions)} questions, {len(corpora)} corpora, at most {LIMIT} tokens, top {K}")
    passed = []
    for search in (bm25, dense):
        results = {
            name: measure(found, corpora, questions, embedder, tokens, search)
            for name, found in chunks.items()
            if found
        }
        passed.append(report(search.__name__, results, chunks))
    return 0 if passed[0] else 1


def report(
    search: str, results: dict[str, np.ndarray], chunks: dict[str, list[Span] | None]
) -> bool:
    """Print the table of one kind of search. Returns whether all of JUDGED meet the targets."""
    best = max((name for name in results if name in PEERS), key=lambda n: results[n][:, 0].mean())
    print(f"\n{search + ':':24} chunks  recall@5 (95 %)        minus {best} (95 %)      IoU (95 %)")
    for name, values in results.items():
        recall, iou = values[:, 0], values[:, 1]
        difference = recall - results[best][:, 0]
        print(
            f"{name:24} {len(chunks[name] or []):6}  {recall.mean():.3f} ({_range(recall)})  "
            f"{difference.mean():+.3f} ({_range(difference)})   {iou.mean():.4f} ({_range(iou, 4)})"
        )
    reference = results[best][:, 0].mean()
    passed = []
    for name in JUDGED:
        recall, iou = results[name].mean(axis=0)
        passed.append(bool(recall >= reference - MARGIN and iou >= LEAST_IOU))
        print(
            f"{'PASS' if passed[-1] else 'FAIL'}: {name}: recall@5 {recall:.4f} (at least "
            f"{reference - MARGIN:.4f}), IoU {iou:.4f} (at least {LEAST_IOU})"
        )
    return all(passed)


def _range(values: np.ndarray, digits: int = 3) -> str:
    low, high = interval(values)
    return f"{low:.{digits}f} to {high:.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
