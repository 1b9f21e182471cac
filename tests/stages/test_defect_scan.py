"""Findings are remembered by text and code, and survive the way through the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stages.defects import scan
from stages.defects.near_duplicates import jaccard, near_duplicates, shingles, signature
from stages.defects.words import runs, word_hashes
from stages.leakage import Leak, Protected, leakage

QUESTION = "How long may a candidate wait before the gate refuses to judge it at all?"
TEXTS = [
    f"Somebody wrote to anna@posteo.de and asked: {QUESTION}",
    "It\u00e2\u20ac\u2122s broken, isn\u00e2\u20ac\u2122t it? " * 3,
    "",
    "An ordinary text of a few words.",
]


def test_a_finding_survives_the_cache(tmp_path: Path) -> None:
    first, scanned = scan.scan_all(TEXTS, {"q": QUESTION}, tmp_path)
    again, rescanned = scan.scan_all([*TEXTS, TEXTS[0]], {"q": QUESTION}, tmp_path)
    assert (scanned, rescanned) == (4, 0)
    for one, other in zip(first, again, strict=False):
        assert scan.pack(one) == scan.pack(other)
    assert [item.kind for item in again[0].spans] == ["email"]
    assert [item.protected for item in again[0].leaks] == ["q"]
    assert again[1].mojibake and not again[0].mojibake
    assert np.array_equal(again[0].signature, signature(shingles(TEXTS[0])))


def test_other_questions_or_other_code_scan_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan.scan_all(TEXTS, {"q": QUESTION}, tmp_path)
    assert scan.scan_all(TEXTS, {}, tmp_path)[1] == 4
    monkeypatch.setattr(scan, "code_digest", lambda: "f" * 64)
    assert scan.scan_all(TEXTS, {"q": QUESTION}, tmp_path)[1] == 4


def test_a_killed_scan_keeps_its_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text number {n} of many" for n in range(10)]
    plain, calls = scan.scan, 0

    def dies(text: str, protected: Protected) -> scan.Finding:
        nonlocal calls
        calls += 1
        if calls > 7:
            raise KeyboardInterrupt
        return plain(text, protected)

    monkeypatch.setattr(scan, "BATCH", 3)
    monkeypatch.setattr(scan, "scan", dies)
    with pytest.raises(KeyboardInterrupt):
        scan.scan_all(texts, {}, tmp_path)
    monkeypatch.setattr(scan, "scan", plain)
    assert scan.scan_all(texts, {}, tmp_path)[1] == 4


def test_runs_depend_on_order_and_words_alone() -> None:
    one, other = word_hashes("Alpha, beta GAMMA!"), word_hashes("alpha beta\ngamma")
    assert np.array_equal(one, other) and len(runs(one, 2)) == 2
    assert runs(one, 3) != runs(word_hashes("gamma beta alpha"), 3)
    assert np.array_equal(runs(one, 9), runs(one, 3)) and len(runs(word_hashes(""), 5)) == 0


def test_hashes_are_the_same_in_every_process() -> None:
    assert word_hashes("ratchet").tolist() == [13858545480409992411]


def test_the_ends_of_a_chain_are_no_copies() -> None:
    """a ~ b ~ c, but a and c are too far apart: b goes, c stays."""
    words = [f"word{n}" for n in range(100)]
    texts = [
        " ".join(words),
        " ".join([*words[:-8], *("x" * n for n in range(1, 9))]),
        " ".join([*(f"y{n}" for n in range(8)), *words[8:-8], *("x" * n for n in range(1, 9))]),
    ]
    found = near_duplicates(
        [signature(shingles(t)) for t in texts], lambda n: shingles(texts[n]), 0.8
    )
    assert {number: copy.of for number, copy in found.items()} == {1: 0}
    assert jaccard(shingles(texts[1]), shingles(texts[2])) >= 0.8


def test_short_and_wordless_texts_are_no_near_copies() -> None:
    texts = ["Get the asset by its key.", "Get the asset by its key.", "!!!", "???"]
    found = near_duplicates(
        [signature(shingles(t)) for t in texts], lambda n: shingles(texts[n]), 0.8
    )
    assert found == {}


def test_leaks_are_told_apart() -> None:
    long = (
        "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    )
    many = " ".join(f"word{n}" for n in range(80))
    protected = {"short": "What is a gate?", "q": QUESTION, "long": long, "many": many}
    texts = {
        "exact": QUESTION.upper().replace("?", " !"),
        "half": "one two three four five six seven eight nine ten eleven twelve, and no more",
        "run": f"It said: {long.split(' ', 2)[2]} and so on",
        "similar": " ".join([*(f"x{n}" if n % 11 == 5 else f"word{n}" for n in range(80))][4:]),
        "short": "What is a gate?",
    }
    found = {(key, leak.protected, leak.kind) for key, leak in leakage(protected, texts)}
    assert found == {("exact", "q", "exact"), ("run", "long", "ngram")}
    near = " ".join(f"word{n}" if n not in (12, 60) else "other" for n in range(80))
    (leak,) = Protected({"many": many}).leaks(near)
    assert leak.kind == "ngram"  # 13 words in a row are there: the stronger reason is given
    swapped = " ".join(words for n, words in enumerate(many.split()) if n % 14 != 13)
    assert leakage({"many": many}, {"t": swapped})[0][1].kind == "ngram"
    assert Protected({}).leaks(QUESTION) == []
    assert index_of("a b") == []


def index_of(text: str) -> list[Leak]:
    """What a text too short to give anything away gives away."""
    return Protected({"q": QUESTION}).leaks(text)
