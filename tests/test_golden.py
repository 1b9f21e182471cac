"""The golden questions and the guide keep their promises to each other.

In: docs/*.md and data/golden/questions.yaml, as they stand in git. Out: a failure that lists every
offender. The gate is only as good as these questions, so a page may not be edited away from under
them, and no question may be answered by a page of the other split.
"""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from contracts.records import REFUSAL, Question

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
GOLDEN = ROOT / "data" / "golden" / "questions.yaml"

MIN_ANSWERABLE = 120  # issue 2
MIN_TEST = 60  # below it the paired gate has next to no power (FACTS, statistics)
MIN_UNANSWERABLE = 20
MIN_WORDS = 12_500  # 25 pages of 500 words
WITHOUT_QUESTIONS = {  # to train on
    "docs/approvals.md",
    "docs/caching.md",
    "docs/embeddings-and-scale.md",
    "docs/faults.md",
    "docs/first-steps.md",
    "docs/glossary.md",
    "docs/guards.md",
    "docs/index.md",
    "docs/judges.md",
    "docs/keys-and-limits.md",
    "docs/ledger.md",
    "docs/quality-and-acceptance.md",
    "docs/rollouts.md",
    "docs/routing.md",
    "docs/search-and-publishing.md",
    "docs/sources.md",
    "docs/telemetry.md",
}
STOP_WORDS = frozenset({"a", "an", "are", "do", "does", "how", "i", "in", "is", "it"}) | frozenset(
    {"my", "of", "the", "to", "what"}
)


def collapse(text: str) -> str:
    """Whitespace runs become one space."""
    return " ".join(text.split())


def guide_pages() -> list[Path]:
    """The pages of the guide: docs/*.md without the decision records below docs/decisions/."""
    return sorted(DOCS.glob("*.md"))


def sections(markdown: str) -> dict[str, str]:
    """Heading text -> collapsed text up to the next heading; fenced lines are never headings."""
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    fenced = False
    for line in markdown.splitlines():
        fenced ^= line.startswith("```")
        heading = None if fenced else re.match(r"#{1,6} (.+)", line)
        if heading:
            assert heading[1] not in found, f"heading {heading[1]!r} stands twice on a page"
            current = found.setdefault(heading[1].strip(), [])
        elif current is not None:
            current.append(line)
    return {heading: collapse(" ".join(lines)) for heading, lines in found.items()}


def words(text: str) -> frozenset[str]:
    """Lower-case words that carry meaning, for comparing questions."""
    return frozenset(re.findall(r"[a-z0-9]+", text.lower())) - STOP_WORDS


@pytest.fixture(scope="module")
def golden() -> list[Question]:
    """Every entry, through the closed record: an unknown or missing field fails here."""
    rows = yaml.safe_load(GOLDEN.read_text(encoding="utf-8"))
    return [Question.model_validate(row) for row in rows]


@pytest.fixture(scope="module")
def guide() -> dict[str, dict[str, str]]:
    """Page path -> its sections."""
    pages = guide_pages()
    return {f"docs/{page.name}": sections(page.read_text(encoding="utf-8")) for page in pages}


def test_there_are_enough_of_each_kind(golden: list[Question]) -> None:
    answerable = [q for q in golden if q.answerable]
    unanswerable = [q for q in golden if not q.answerable]
    assert len(answerable) >= MIN_ANSWERABLE
    assert len(unanswerable) >= MIN_UNANSWERABLE
    for split in ("dev", "test"):
        assert sum(q.split == split for q in answerable) >= MIN_TEST
        assert sum(q.split == split for q in unanswerable) >= MIN_UNANSWERABLE // 2 - 2


def test_ids_and_questions_are_unique(golden: list[Question]) -> None:
    ids = [q.id for q in golden]
    asked = [collapse(q.question).casefold() for q in golden]
    assert sorted(set(ids)) == sorted(ids)
    assert sorted(set(asked)) == sorted(asked)
    assert [i for i in ids if not re.fullmatch(r"[a-z]+(-[a-z]+)*-\d\d", i)] == []


def test_ids_name_their_document(golden: list[Question]) -> None:
    wrong = [q.id for q in golden if q.document and q.id.rsplit("-", 1)[0] != Path(q.document).stem]
    assert wrong == []


def test_unanswerable_questions_have_no_source(golden: list[Question]) -> None:
    wrong = [q.id for q in golden if not q.answerable and (q.document or q.section or q.answer)]
    wrong += [q.id for q in golden if q.answerable and not (q.document and q.section and q.answer)]
    assert wrong == []


def test_every_answer_stands_verbatim_in_its_section(
    golden: list[Question], guide: dict[str, dict[str, str]]
) -> None:
    wrong = []
    for q in (q for q in golden if q.answerable):
        page = guide.get(q.document or "")
        if page is None:
            wrong.append(f"{q.id}: there is no page {q.document}")
        elif q.section not in page:
            wrong.append(f"{q.id}: {q.document} has no section {q.section!r}")
        elif not q.answer or q.answer != collapse(q.answer) or q.answer not in page[q.section]:
            wrong.append(f"{q.id}: the answer does not stand in {q.document}, {q.section!r}")
    assert wrong == []


def test_answers_are_single_sentences(golden: list[Question]) -> None:
    """A model that copies sentences must be able to give the reference."""
    answers = {q.id: q.answer for q in golden if q.answer}
    wrong = [
        key
        for key, answer in answers.items()
        if not answer.rstrip('"').endswith(".")
        or re.search(r"[.?!] [A-Z]", answer)
        or not 4 <= len(answer.split()) <= 35
        or answer == REFUSAL
    ]
    assert wrong == []


def test_a_document_is_in_one_split_only(golden: list[Question]) -> None:
    splits: dict[str, set[str]] = {}
    for q in golden:
        if q.document:
            splits.setdefault(q.document, set()).add(q.split)
    assert {document for document, found in splits.items() if len(found) > 1} == set()


def test_every_page_has_questions_or_is_left_for_training(
    golden: list[Question], guide: dict[str, dict[str, str]]
) -> None:
    asked = {q.document for q in golden if q.document}
    assert set(guide) - asked == WITHOUT_QUESTIONS


def test_an_answer_stands_on_no_page_of_the_other_split(
    golden: list[Question], guide: dict[str, dict[str, str]]
) -> None:
    split_of = {q.document: q.split for q in golden if q.document}
    text_of = {page: " ".join(found.values()) for page, found in guide.items()}
    leaks = [
        f"{q.id}: also in {page}"
        for q in golden
        if q.answer
        for page, text in text_of.items()
        if split_of.get(page, "train") != q.split and q.answer in text
    ]
    assert leaks == []


def test_no_near_duplicate_questions_across_splits(golden: list[Question]) -> None:
    """Share of common words (Jaccard). The closest honest pair stands near 0.4."""
    alike = []
    for one, other in combinations(golden, 2):
        a, b = words(one.question), words(other.question)
        if one.split != other.split and len(a & b) / max(1, len(a | b)) >= 0.6:
            alike.append((one.id, other.id))
    assert alike == []


def test_the_near_duplicate_measure_can_fail() -> None:
    a, b = words("What is the purpose of a channel?"), words("what's the purpose of the channel")
    assert len(a & b) / len(a | b) >= 0.6


def test_links_between_pages_resolve() -> None:
    broken = []
    for page in guide_pages():
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", target) and not (page.parent / target).is_file():
                broken.append(f"{page.name}: {target}")
    assert broken == []


def test_the_map_names_every_page() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    names = {page.name for page in guide_pages()} - {"index.md"}
    assert [name for name in sorted(names) if f"({name})" not in index] == []


def test_the_guide_is_a_guide() -> None:
    pages = guide_pages()
    assert sum(len(page.read_text(encoding="utf-8").split()) for page in pages) >= MIN_WORDS
    assert len(pages) >= 16
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert text.startswith("# "), page.name
        # A byte-level tokenizer spends several tokens on every other character.
        assert text.isascii(), f"{page.name} holds characters outside ASCII"
