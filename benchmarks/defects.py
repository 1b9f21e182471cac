"""How well each class of defect is told from what only looks like it, and what that costs.

    python -m benchmarks.defects

Precision and recall per class on defects planted into the descriptions of the installed packages
(benchmarks/planted.py; seeded), then CPU seconds of the stage quality over 10,000 documents of
20 MB, cold and warm. Ends with PASS or FAIL against :data:`FLOORS`.
"""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import planted
from benchmarks.planted import Case

ROOT = Path(__file__).resolve().parent.parent
SEED = 7
THRESHOLD = 0.9


@dataclass(frozen=True)
class Score:
    name: str
    planted: int
    found: int  # of the planted
    alike: int  # texts or spans that only look like it
    wrong: int  # of them, flagged

    @property
    def precision(self) -> float:
        flagged = self.found + self.wrong
        return self.found / flagged if flagged else 1.0

    @property
    def recall(self) -> float:
        return self.found / self.planted if self.planted else 1.0


#: (precision, recall) that each class must reach.
FLOORS = {
    "mojibake": (0.99, 0.95),
    "noise": (0.99, 0.99),
    "near_duplicates": (0.99, 0.97),
    "boilerplate": (0.99, 0.99),
    "language": (0.97, 0.97),
    "leakage": (0.99, 0.99),
    "email": (0.95, 0.98),
    "phone": (0.95, 0.98),
    "ip": (0.95, 0.98),
    "card": (0.98, 0.99),
    "iban": (0.99, 0.99),
    "ssn": (0.98, 0.99),
    "private_key": (0.99, 0.99),
    "api_key": (0.99, 0.98),
}


def scored(name: str, cases: Iterable[Case], flagged: Callable[[Case], bool]) -> Score:
    """Count the cases that are flagged."""
    counts = {(defect, hit): 0 for defect in (True, False) for hit in (True, False)}
    for case in cases:
        counts[case.defect, flagged(case)] += 1
    found, missed = counts[True, True], counts[True, False]
    wrong, right = counts[False, True], counts[False, False]
    return Score(name, found + missed, found, wrong + right, wrong)


def mojibake(count: int) -> Score:
    from stages.defects.mojibake import mojibake

    cases = planted.mojibake(random.Random(SEED), count)
    return scored("mojibake", cases, lambda case: bool(mojibake(case.text)))


def noise(count: int) -> Score:
    from stages.defects.noise import noise

    cases = planted.noise(random.Random(SEED), count)
    return scored("noise", cases, lambda case: bool(noise(case.text)))


def near_duplicates(count: int) -> Score:
    """Truth is the Jaccard similarity of word 5-shingles, counted with Python sets of words."""
    from stages.defects.near_duplicates import near_duplicates, shingles, signature
    from stages.defects.words import WORD

    def words(text: str) -> set[tuple[str, ...]]:
        found = WORD.findall(text.lower())
        return {tuple(found[n : n + 5]) for n in range(len(found) - 4)}

    rng = random.Random(SEED)
    originals = [text for text in planted.sample(rng, count) if len(words(text)) > 50]
    copies = [planted.edited(rng, text, rng.randint(0, 6)) for text in originals]
    texts = originals + copies
    found = near_duplicates(
        [signature(shingles(text)) for text in texts], lambda n: shingles(texts[n]), THRESHOLD
    )
    cases = []
    for number, (text, copy) in enumerate(zip(originals, copies, strict=True)):
        one, other = words(text), words(copy)
        alike = len(one & other) / len(one | other) >= THRESHOLD
        cases.append(Case(copy, alike, str(len(originals) + number)))
    # Pieces of real packages repeat each other, too: those pairs are checked in the same way.
    for number in range(len(originals)):
        if number in found:
            one, other = words(texts[number]), words(texts[found[number].of])
            truly = len(one & other) / len(one | other) >= THRESHOLD
            cases.append(Case(texts[number], truly, str(number)))
    return scored("near_duplicates", cases, lambda case: int(case.what) in found)


def boilerplate(count: int) -> Score:
    """Texts of nothing but a notice and a line, among texts that carry the notice as well."""
    from stages.defects.boilerplate import boilerplate, read_lines

    rng = random.Random(SEED)
    cases = []
    for number, text in enumerate(planted.sample(rng, 2 * count)):
        body = text[:40].replace("\n", " ") if number < count else text[:1200]
        cases.append(Case(planted.NOTICE + body, number < count))
    shares = boilerplate([read_lines(case.text) for case in cases], 20).shares
    by_text = {case.text: share for case, share in zip(cases, shares, strict=True)}
    return scored("boilerplate", cases, lambda case: by_text[case.text] > 0.8)


def language(count: int) -> Score:
    """The whole path: the detector of the stage documents, then the policy."""
    from stages.defects.language import foreign
    from stages.sources.language import languages

    rng = random.Random(SEED)
    cases = [Case(text, False) for text in planted.sample(rng, count)]
    for number in range(count):
        key = sorted(planted.FOREIGN)[number % len(planted.FOREIGN)]
        sentences = planted.FOREIGN[key].split(". ")
        cases.append(Case(". ".join(rng.choices(sentences, k=rng.randint(2, 6))), True, key))
    told = dict(zip(cases, languages([case.text for case in cases]), strict=True))
    return scored("language", cases, lambda case: bool(foreign(told[case], "text", ["en"])))


def leakage(count: int) -> Score:
    """Golden questions in prose as they are or rewrapped; look-alikes share half of one."""
    import yaml

    from stages.leakage import MIN_WORDS, Protected

    entries = yaml.safe_load((ROOT / "data" / "golden" / "questions.yaml").read_text())
    index = Protected({entry["id"]: entry["question"] for entry in entries})
    questions = [q["question"] for q in entries if len(q["question"].split()) > MIN_WORDS + 4]
    rng = random.Random(SEED)
    cases = []
    for number, text in enumerate(planted.sample(rng, 2 * count)):
        question = rng.choice(questions)
        if number < count:
            shown = rng.choice((question, question.upper(), question.replace(" ", "\n  ")))
        else:
            words = question.split()
            shown = " ".join(words[: len(words) // 2])
        cases.append(Case(planted.inserted(rng, text, shown), number < count, question))
    return scored("leakage", cases, lambda case: bool(index.leaks(case.text)))


def personal(kind: str, count: int) -> Score:
    """By span. Whatever the prose itself holds of that kind counts as wrong, but for e-mail.

    Descriptions of packages name their authors' addresses: of e-mail, only look-alikes count.
    """
    from resources.recognisers.pii import find_pii
    from resources.recognisers.secrets import find_secrets
    from resources.recognisers.spans import without_overlap

    cases = planted.personal(kind, random.Random(f"{SEED}{kind}"), count)
    found = alike = wrong = 0
    for case in cases:
        spans = without_overlap(find_secrets(case.text) + find_pii(case.text))
        seen = [case.text[item.start : item.end] for item in spans if item.kind == kind]
        if case.defect:
            found += case.what in seen
        else:
            alike += 1
            wrong += any(kind != "email" or value in case.what for value in seen)
    return Score(kind, sum(case.defect for case in cases), found, alike, wrong)


def scores(count: int) -> list[Score]:
    """Every class, ``count`` planted defects each."""
    classes = (mojibake, noise, near_duplicates, boilerplate, language, leakage)
    return [measure(count) for measure in classes] + [personal(kind, count) for kind in planted.PII]


def holds(score: Score) -> bool:
    precision, recall = FLOORS[score.name]
    return score.precision >= precision and score.recall >= recall


def speed() -> list[tuple[str, float]]:
    """CPU seconds of the stage quality over 10,000 documents, 20 MB: cold, warm, one edited."""
    from stages.document_table import document_row, schema
    from stages.tables import write_rows

    pieces = planted.prose()
    rng = random.Random(SEED)
    rows = [
        document_row(
            "docs", f"{n:05d}.md", text=planted.edited(rng, rng.choice(pieces), 60), language="en"
        )
        for n in range(10_000)
    ]
    measured = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for word in ("cold", "warm, nothing changed", "warm, one document edited"):
            if word.endswith("edited"):
                rows[5] = {**rows[5], "text": rows[5]["text"] + " One more sentence."}
            write_rows(folder / "documents" / "docs.parquet", rows, schema())
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            _stage(folder)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            measured.append(
                (word, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            )
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        _python(
            "import great_expectations.expectations, matplotlib.figure, pandas, pyarrow", folder
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        measured.append(
            ("imports alone", after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        )
    return measured


def _stage(folder: Path) -> None:
    """The stage in a process of its own; it may judge the documents bad, but not crash."""
    _python(
        "from stages import harness, quality; "
        "harness.execute('quality', quality.run, paths=('documents', 'golden', 'out'), argv=["
        f"'--documents', '{folder}/documents', '--golden', 'data/golden/questions.yaml', "
        f"'--out', '{folder}/out'])",
        folder,
    )


def _python(code: str, folder: Path) -> None:
    import os

    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=ROOT,
        env={**os.environ, "RATCHET_STATE_DIR": str(folder / "state"), "RATCHET_TRACKING": "off"},
    )


def main() -> int:
    print(f"{len(planted.prose())} pieces of installed packages' descriptions, seed {SEED}\n")
    print(
        f"{'class':16}{'planted':>8}{'found':>7}{'alike':>7}{'wrong':>7}{'prec.':>8}{'recall':>8}"
    )
    failed = []
    for score in scores(400):
        print(
            f"{score.name:16}{score.planted:8}{score.found:7}{score.alike:7}{score.wrong:7}"
            f"{score.precision:8.3f}{score.recall:8.3f}  {'PASS' if holds(score) else 'FAIL'}"
        )
        if not holds(score):
            failed.append(score.name)
    times = speed()
    print("\nstage quality, 10,000 documents, 20 MB")
    for word, seconds in times:
        print(f"  {word:28}{seconds:7.2f} CPU s")
    print(f"\n{'FAIL: ' + ', '.join(failed) if failed else 'PASS'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
