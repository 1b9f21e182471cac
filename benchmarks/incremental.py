"""What a change of the documents costs, against the first build of the same knowledge base.

Runs the whole knowledge group (documents to published index) through DVC in a scratch copy of this
checkout, over 10,000 documents that nobody here wrote: first from nothing, then after one document
was edited, one deleted and one added, then with nothing to do.

    python -m benchmarks.incremental [--documents 10000] [--keep FOLDER]

Must hold: the change costs at most 5 % of the first build, nothing to do at most 1 %, and only the
changed chunks are embedded. Costs are CPU seconds of all processes; wall time is shown beside them.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks import package_docs
from contracts.settings import ROOT

CHANGE, NOTHING = 0.05, 0.01
STAGES = ("retrieval", "acceptance")  # with all that they need: the knowledge group


@dataclass(frozen=True)
class Cost:
    """Seconds of one pass, and how many texts it embedded."""

    cpu: float
    wall: float
    embedded: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="benchmarks.incremental")
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--keep", type=Path, help="work here, and leave everything there")
    given = parser.parse_args()
    folder = given.keep or Path(tempfile.mkdtemp(prefix="ratchet-incremental-"))
    try:
        return measure(folder / "checkout", given.documents)
    finally:
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)


def measure(root: Path, count: int) -> int:
    make_checkout(root)
    corpus = root / "corpus"
    size = package_docs.write(corpus, count + 1)
    files = sorted(corpus.rglob("*.md"))
    kept_back = files[count // 3]
    later = kept_back.read_text(encoding="utf-8")
    kept_back.unlink()
    files.remove(kept_back)
    write_questions(root, files)
    print(f"{len(files)} documents, {size / 1e6:.1f} MB", flush=True)

    passes = {"first build": build(root)}
    files[count // 2].write_text(
        files[count // 2].read_text(encoding="utf-8") + "\n## Addendum\n\nA later remark.\n",
        encoding="utf-8",
    )
    files[1].unlink()
    kept_back.write_text(later, encoding="utf-8")
    passes["edit 1, delete 1, add 1"] = build(root)
    passes["nothing to do"] = build(root)

    first = passes["first build"]
    print(f"\n{'pass':26}{'CPU s':>9}{'of first':>10}{'wall s':>9}{'of first':>10}{'embedded':>10}")
    for name, cost in passes.items():
        print(
            f"{name:26}{cost.cpu:9.1f}{cost.cpu / first.cpu:10.2%}"
            f"{cost.wall:9.1f}{cost.wall / first.wall:10.2%}{cost.embedded:10}"
        )
    change, nothing = passes["edit 1, delete 1, add 1"], passes["nothing to do"]
    good = change.cpu <= CHANGE * first.cpu and nothing.cpu <= NOTHING * first.cpu
    good &= 0 < change.embedded < 200 and nothing.embedded == 0
    print("PASS" if good else f"FAIL: wanted {CHANGE:.0%} and {NOTHING:.0%} of the first build")
    return 0 if good else 1


def make_checkout(root: Path) -> None:
    """A copy of this checkout's files with one source, and nothing of its state."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.split(b"\0")
    for name in filter(None, map(os.fsdecode, listed)):
        if name != "dvc.lock" and not name.startswith(("data/shipped/", "tests/")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_file():
                shutil.copy2(ROOT / name, root / name)
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    path = root / "params.yaml"
    params = yaml.safe_load(path.read_text(encoding="utf-8"))
    source = {"uri": "corpus", "path": "corpus", "include": ["**/*.md"]}
    params["documents"]["sources"] = {"packages": source}
    params["quality"]["max_quarantined"] = 0.2
    params["retrieval"]["min_recall"] = 0.2
    path.write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")


def write_questions(root: Path, files: list[Path]) -> None:
    """Some sixty questions that name a section; none of its words, lest they count as leaked."""
    found_in: dict[Path, re.Match[str]] = {}
    for file in files:
        text = file.read_text("utf-8")
        found = re.search(r"^## (\w+)\n\n([A-Z][^\n]{40,})", text, re.MULTILINE)
        if found and len(text) > 2000 and text.replace("\n", "").isprintable():
            found_in[file] = found
    # What stands in two files may go to quarantine as a near copy.
    often = Counter(found[2] for found in found_in.values())
    alone = {file: found for file, found in found_in.items() if often[found[2]] == 1}
    questions = []
    for number, file in enumerate(sorted(alone)[:: max(1, len(alone) // 60)]):
        found = alone[file]
        questions.append(
            {
                "id": f"p{number:03}",
                "question": f"What is {found[1]} of {file.stem} for?",
                "document": file.relative_to(root).as_posix(),
                "section": found[1],
                "answer": found[2],
                "split": "dev" if number % 2 else "test",
                "answerable": True,
            }
        )
    golden = root / "data" / "golden"
    shutil.rmtree(golden)
    golden.mkdir()
    (golden / "questions.yaml").write_text(
        yaml.safe_dump(questions, allow_unicode=True), encoding="utf-8"
    )


def build(root: Path) -> Cost:
    """One pass over the knowledge group. Ends the benchmark when it fails."""
    environ = {
        **os.environ,
        "RATCHET_ROOT": str(root),
        "RATCHET_STATE_DIR": str(root / ".ratchet"),
        "RATCHET_TRACKING": "off",
        "PYTHONPATH": str(root),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    output = ""
    for command in (
        ["-m", "dvc", "repro", *STAGES],
        ["-m", "pipelines.cli", "index", "publish"],
    ):
        done = subprocess.run(
            [sys.executable, *command], cwd=root, env=environ, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        output += done.stdout
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - clock
    found = re.search(r"(\d+) computed", output)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    cost = Cost(cpu, wall, int(found[1]) if found else 0)
    print(f"  {cost.wall:.1f} s, {cost.cpu:.1f} CPU s, {cost.embedded} embedded", flush=True)
    return cost


if __name__ == "__main__":
    sys.exit(main())
