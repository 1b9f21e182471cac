"""How well the gateway's guards tell what they look for from what only looks like it, and the cost.

    python -m benchmarks.guards [--banking77 FOLDER] [--misses]

Prints precision and recall for each kind of personal data and secret (planted into prose,
benchmarks/planted.py), the share of injections found (plain, by disguise, in data), the share of
ordinary texts that would be refused (questions of Banking77 where the folder is there, our golden
questions, sentences that sound like attacks, prose of installed packages as passages), and CPU
microseconds for a prompt of 250 characters and an answer of 500. Ends with PASS or FAIL.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import yaml

from benchmarks import planted
from benchmarks.guard_cases import ATTACKS, IN_DATA, SOUNDS_ALIKE, disguises
from serving.gateway.api_request import ApiRequest
from serving.gateway.guards.injection import hits, pieces, score
from serving.gateway.guards.patterns import HoldBack, find
from serving.gateway.guards.policy import GuardsConfig
from serving.gateway.guards.run import Guards
from serving.gateway.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent
SEED, COUNT, THRESHOLD = 7, 400, 2
#: Refused at most, of ordinary questions and of passages.
MAX_WRONG = 0.001
MIN_FOUND = {"plain": 0.6, "disguised": 0.55, "data": 0.75}
MAX_MICROSECONDS = 60.0
PROMPT = (
    "How do I configure the gateway so that it retries a failed request before the first byte, and "
    "which of the settings decide how long it may wait for an engine that never answers? Please "
    "name the file and the key, and say what it is by default."
)
POLICY = {
    "input": {"pii": {}, "secrets": {}, "injection": {}},
    "output": {"pii": {}, "secrets": {"action": "redact"}, "leak": {}},
}


def refused(text: str, *, data: bool = False) -> bool:
    return any(score(hits(piece, data=data)) >= THRESHOLD for _, piece in pieces(text))


def share(name: str, texts: Iterable[str], *, data: bool = False, misses: bool = False) -> float:
    """Print and return the share of the texts that would be refused."""
    texts = list(texts)
    found = [refused(text, data=data) for text in texts]
    print(f"{name:34} {sum(found):6} of {len(texts):6}  {sum(found) / len(texts):8.3%}")
    if misses:
        for text, hit in zip(texts, found, strict=True):
            if not hit:
                print(f"    missed: {text[:90]!r}")
    return sum(found) / len(texts)


def personal() -> bool:
    """Precision and recall by kind, the hold-back of streams included."""
    good = True
    print(f"{'kind':14} {'recall':>8} {'precision':>10} {'in streams':>11}")
    for kind in planted.PII:
        cases = planted.personal(kind, random.Random(f"{SEED}{kind}"), COUNT)
        counts: dict[str, int] = defaultdict(int)
        for case in cases:
            seen = [case.text[s.start : s.end] for s in find(case.text) if s.kind == kind]
            if case.defect:
                counts["planted"] += 1
                counts["found"] += case.what in seen
                counts["streamed"] += case.what in _streamed(case.text, kind)
            else:  # prose names real addresses of e-mail: of these, look-alikes alone count
                counts["wrong"] += any(kind != "email" or value in case.what for value in seen)
        recall = counts["found"] / counts["planted"]
        precision = counts["found"] / (counts["found"] + counts["wrong"])
        streamed = counts["streamed"] / counts["planted"]
        good = good and min(recall, precision) >= 0.95 and streamed == recall
        print(f"{kind:14} {recall:8.3f} {precision:10.3f} {streamed:11.3f}")
    return good


def _streamed(text: str, kind: str) -> list[str]:
    """The findings when the text comes in pieces of five characters."""
    hold, found = HoldBack(), list[str]()
    fed = [hold.feed(text[n : n + 5]) for n in range(0, len(text), 5)]
    for piece in [piece for step in [*fed, hold.close()] for piece in step]:
        if piece.kind == kind and piece.again:
            found[-1] += piece.text
        elif piece.kind == kind:
            found.append(piece.text)
    return found


def injections(misses: bool) -> bool:
    plain = share("attacks, plain", ATTACKS, misses=misses)
    data = share("attacks in tool results, passages", IN_DATA, data=True, misses=misses)
    by_way: dict[str, list[str]] = defaultdict(list)
    for attack in ATTACKS:
        if attack.isascii():
            for way, text in disguises(attack).items():
                by_way[way].append(text)
    shares = [share(f"  as {way}", texts) for way, texts in by_way.items()]
    print(f"{'attacks, disguised':34} {'':16}  {sum(shares) / len(shares):8.3%}")
    found = {"plain": plain, "data": data, "disguised": sum(shares) / len(shares)}
    return all(found[name] >= floor for name, floor in MIN_FOUND.items())


def ordinary(folder: Path) -> bool:
    rows = yaml.safe_load((ROOT / "data" / "golden" / "questions.yaml").read_text("utf-8"))
    wrong = [share("golden questions", [row["question"] for row in rows])]
    files = [folder / "train.csv", folder / "test.csv"]
    if all(file.exists() for file in files):
        texts = [r["text"] for f in files for r in csv.DictReader(f.open(encoding="utf-8"))]
        wrong.append(share("Banking77", texts))
        masked = sum(bool(find(text)) for text in texts)
        print(f"{'  with personal data or secrets':34} {masked:6} of {len(texts):6}")
    else:
        print(f"Banking77 is not in {folder}: left out")
    share("sound like attacks", SOUNDS_ALIKE)
    wrong.append(share("package prose as passages", planted.prose(), data=True))
    return all(one <= MAX_WRONG for one in wrong)


async def cost() -> bool:
    """CPU microseconds, the least of five rounds: the machine has other work, too."""
    guards = Guards(GuardsConfig.model_validate({"policies": {"p": POLICY}}), Metrics())
    prompt, answer = PROMPT[:250], (PROMPT * 3)[:500]
    request = ApiRequest("chat", "m", {"messages": [{"role": "user", "content": prompt}]})
    system = {"role": "system", "content": "You answer for a bank, politely and in short. " * 8}
    asked = ApiRequest("chat", "m", {"messages": [system, *request.body["messages"]]})
    best = {"input": float("inf"), "output": float("inf"), "stream": float("inf")}
    words = [word + " " for word in answer.split()]
    for _ in range(5):
        clock = time.process_time()
        for _ in range(1000):
            await guards.check_input("p", request)
        best["input"] = min(best["input"], (time.process_time() - clock) * 1e3)
        clock = time.process_time()
        for _ in range(1000):
            await guards.check_output("p", answer, asked)
        best["output"] = min(best["output"], (time.process_time() - clock) * 1e3)
        clock = time.process_time()
        for _ in range(50):
            stream = guards.stream("p", asked)
            assert stream
            for word in words:
                stream.feed(word)
            stream.close()
        spent = (time.process_time() - clock) * 1e6 / 50 / len(words)
        best["stream"] = min(best["stream"], spent)
    print(f"input, {len(prompt)} characters: {best['input']:.1f} us of CPU")
    print(f"output, {len(answer)} characters: {best['output']:.1f} us of CPU")
    print(f"output, streamed: {best['stream']:.1f} us of CPU a word")
    return max(best["input"], best["output"]) <= MAX_MICROSECONDS


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = ROOT.parent / "shared" / "data" / "banking77"
    parser.add_argument("--banking77", type=Path, default=default)
    parser.add_argument("--misses", action="store_true", help="print the attacks that are missed")
    options = parser.parse_args()
    results = {
        "personal data and secrets": personal(),
        "injections": injections(options.misses),
        "ordinary texts": ordinary(options.banking77),
        "cost": asyncio.run(cost()),
    }
    for name, held in results.items():
        print(f"{'PASS' if held else 'FAIL'}  {name}")
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
