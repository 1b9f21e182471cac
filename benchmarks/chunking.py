"""How fast texts are cut, token-exact, against other people's splitters on the same texts.

``[BENCH_PYTHON=…] python -m benchmarks.chunking``. The text is what installed packages bring along:
their Markdown and reStructuredText files and their docstrings. Seconds are CPU seconds of one
process with one thread, rounds of ours and langchain's taken in turn, each of ours with an empty
memory of words. Every chunk is counted again afterwards, outside of the clock.
Target: >= 1.2 MB/s per core, and >= 2 times langchain's recursive splitter with a token length.

Then the stage itself, as a process: first build, unchanged re-run, one of 10,000 documents changed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import package_docs
from contracts import offline
from contracts.settings import ROOT
from resources.embedding import find_model, load_tokenizer
from stages.splitting import WordCounter, split

LIMIT, ROUNDS, TEXT_BYTES, CODE_BYTES = 254, 3, 6_000_000, 4_000_000
STAGE_DOCUMENTS, STAGE_BYTES = 10_000, 20_000_000
LEAST_SPEED, LEAST_RATIO = 1.2, 2.0
PEERS = ("chonkie recursive", "semantic-text-splitter")

#: (text, format)
Text = tuple[str, str]


def texts() -> Iterator[Text]:
    """Documentation files of the environment, then docstrings."""
    yield from package_docs.files()
    for file in package_docs.sources(*package_docs.PACKAGES):
        yield from ((text, "docstring") for _, text in package_docs.docstrings(file))


def sources() -> Iterator[Text]:
    for path in package_docs.sources(*package_docs.PACKAGES):
        yield path.read_text(encoding="utf-8", errors="replace"), "code"


def take(found: Iterator[Text], limit: int) -> tuple[list[Text], float]:
    """Texts up to so many bytes, and their size in MB."""
    taken: list[Text] = []
    size = 0
    for item in found:
        taken.append(item)
        size += len(item[0].encode())
        if size >= limit:
            break
    return taken, size / 1e6


def ours(corpus: list[Text], tokenizer: Any) -> tuple[float, list[list[tuple[int, int]]]]:
    """CPU seconds, and the spans of each text."""
    counter = WordCounter(tokenizer)
    clock = time.process_time()
    found = [split(text, LIMIT, counter, format=format) for text, format in corpus]
    seconds = time.process_time() - clock
    return seconds, [[(one.start, one.end) for one in spans] for spans in found]


def peer(
    corpus: list[Text], splitter: str, python: str | None, tokenizer: Path
) -> tuple[float, list[list[tuple[int, int]]]] | None:
    """As :func:`ours`, of another splitter; None, and a line that says why, where it cannot run."""
    if not python:
        print(f"skipped: {splitter}: BENCH_PYTHON names no interpreter that has it")
        return None
    job = {
        "splitter": splitter,
        "tokenizer": str(tokenizer),
        "limit": LIMIT,
        "texts": [text for text, _ in corpus],
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
    answer = json.loads(done.stdout)
    return answer["seconds"], answer["spans"]


def describe(
    name: str, speed: float, corpus: list[Text], spans: list[list[Any]], tokenizer: Any
) -> None:
    """One line of the table; chunks are counted again by the tokenizer."""
    pieces = [text[a:b] for (text, _), found in zip(corpus, spans, strict=True) for a, b in found]
    counts = [len(one) for one in tokenizer.encode_batch_fast(pieces, add_special_tokens=False)]
    over = sum(count > LIMIT for count in counts) / len(counts)
    mean = sum(counts) / len(counts)
    print(f"{name:26} {speed:6.2f} {len(counts):8} {mean:8.0f} {over:8.2%}", flush=True)


def speeds() -> tuple[float, float]:
    """Print the table. Returns our MB/s and its ratio to langchain's."""
    folder = find_model("all-MiniLM-L6-v2")
    tokenizer = load_tokenizer(folder)
    corpus, size = take(texts(), TEXT_BYTES)
    code, code_size = take(sources(), CODE_BYTES)
    mine, theirs = [], []
    for _ in range(ROUNDS):
        mine.append(ours(corpus, tokenizer))
        other = peer(corpus, "langchain recursive", sys.executable, folder / "tokenizer.json")
        if other is None:
            raise SystemExit("langchain-text-splitters is needed: pip install it")
        theirs.append(other)
    speed = [size / seconds for seconds, _ in mine]
    lang = [size / seconds for seconds, _ in theirs]
    print(
        f"\n{len(corpus)} texts, {size:.1f} MB, at most {LIMIT} tokens; {ROUNDS} rounds: ", end=""
    )
    print(", ".join(f"{a:.2f} / {b:.2f}" for a, b in zip(speed, lang, strict=True)) + " MB/s\n")
    print(f"{'splitter':26} {'MB/s':>6} {'chunks':>8} {'tokens':>8} {'over':>8}")
    describe("ratchet", sorted(speed)[ROUNDS // 2], corpus, mine[0][1], tokenizer)
    describe("langchain recursive", sorted(lang)[ROUNDS // 2], corpus, theirs[0][1], tokenizer)
    for name in PEERS:
        if found := peer(corpus, name, os.environ.get("BENCH_PYTHON"), folder / "tokenizer.json"):
            describe(name, size / found[0], corpus, found[1], tokenizer)
    seconds, spans = ours(code, tokenizer)
    describe("ratchet, Python sources", code_size / seconds, code, spans, tokenizer)
    ratios = sorted(a / b for a, b in zip(speed, lang, strict=True))
    return min(speed), ratios[ROUNDS // 2]


def stage() -> None:
    """Seconds of ``python -m stages.chunks``: cold, unchanged, one document changed."""
    corpus, _ = take(texts(), STAGE_BYTES)
    whole = "\n\n".join(text for text, _ in corpus)
    step = min(len(whole), STAGE_BYTES) // STAGE_DOCUMENTS
    rows: list[dict[str, Any]] = [
        {"text": whole[n * step : (n + 1) * step], "path": f"{n}.md", "format": "markdown"}
        for n in range(STAGE_DOCUMENTS)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cold, out = execute(folder, rows)
        print(f"\nstage, {len(rows)} documents, {step * len(rows) / 1e6:.0f} M characters")
        print(f"{'run':26} {'wall s':>7} {'CPU s':>7} {'of first':>9}")
        report("first build", cold, cold)
        first = out.read_bytes()
        report("unchanged", execute(folder, rows)[0], cold)
        same = first == out.read_bytes()
        rows[5000]["text"] += "\n\nOne more line."
        report("one document changed", execute(folder, rows)[0], cold)
        warm = out.read_bytes()
        execute(folder, rows, {"RATCHET_STATE_DIR": str(folder / "other")})
        print(f"same bytes cold and warm: {same and warm == out.read_bytes()}")


def execute(
    folder: Path, rows: list[dict[str, Any]], environment: dict[str, str] | None = None
) -> tuple[tuple[float, float], Path]:
    """Run the stage. Returns (wall, CPU) seconds and its output."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from stages.document_table import document_row, schema

    made = [document_row("bench", **row) for row in rows]
    columns = [field for field in schema() if field.name != "problem"]
    pq.write_table(pa.Table.from_pylist(made, pa.schema(columns)), folder / "documents.parquet")
    out = folder / "o.parquet"
    command = ["-m", "stages.chunks", "--documents", str(folder), "--out", str(out)]
    given = {"RATCHET_STATE_DIR": str(folder / "state"), "RATCHET_TRACKING": "off"}
    clock, before = time.monotonic(), os.times()
    subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **given, **(environment or {})},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    after = os.times()
    cpu = sum(after[2:4]) - sum(before[2:4])
    return (time.monotonic() - clock, cpu), out


def report(name: str, seconds: tuple[float, float], first: tuple[float, float]) -> None:
    share = seconds[1] / first[1]
    print(f"{name:26} {seconds[0]:7.2f} {seconds[1]:7.2f} {share:9.1%}", flush=True)


def main() -> int:
    offline.apply()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    speed, ratio = speeds()
    stage()
    passed = speed >= LEAST_SPEED and ratio >= LEAST_RATIO
    print(
        f"\n{'PASS' if passed else 'FAIL'}: {speed:.2f} MB/s in the slowest round (at least "
        f"{LEAST_SPEED}), {ratio:.1f} times langchain in the median one (at least {LEAST_RATIO})"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
