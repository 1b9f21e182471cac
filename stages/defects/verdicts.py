"""verdicts: from findings and the policy to accepted and quarantined documents.

In: rows of the documents and the finding of each, in the same order. Out: :class:`Sorted`. The
first reason that applies is the one that is given, from "cannot be used at all" to "is not needed":
unreadable, too short or long, mojibake, noise, language, blocked data, exact copy, near copy,
boilerplate. Of equal or alike texts the first by source and path stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from contracts.params import Quality
from resources.recognisers.pii import find_pii
from resources.recognisers.redact import mask, redact
from resources.recognisers.secrets import find_secrets
from resources.recognisers.spans import Found, without_overlap
from stages.defects.boilerplate import MIN_LINE, boilerplate
from stages.defects.language import foreign
from stages.defects.near_duplicates import near_duplicates, shingles
from stages.defects.scan import Finding
from stages.defects.words import hash64

Row = dict[str, Any]
COPY = "exact copy of another text"
NEAR_COPY = "near copy of another text"

#: Of each kind of personal data the report shows so many masked spans.
SAMPLES = 5
#: Boilerplate lines that the report shows, the most frequent first.
SHOWN_LINES = 10


@dataclass
class Sorted:
    accepted: list[Row]  # without the column problem
    quarantined: list[Row]  # with it; what the policy redacts or blocks is masked here, too
    families: list[Row]  # kept, copies: [{doc_id, jaccard}]
    boilerplate: list[Row]  # line, documents
    pii: list[Row]  # kind, policy, documents, spans; every kind
    samples: list[Row]  # kind, document, line, masked
    redacted: int  # accepted documents in which something was masked
    leaks: list[Row]  # question, doc_id, kind, detail; of accepted documents


def sort_out(rows: Sequence[Row], findings: Sequence[Finding], policy: Quality) -> Sorted:
    """Judge every row."""
    problems = [own_problem(row, item, policy) for row, item in zip(rows, findings, strict=True)]
    clean = [masked(row, item, policy) for row, item in zip(rows, findings, strict=True)]
    _copies(rows, clean, problems)
    families = _near_copies(rows, findings, problems, policy)
    lines = _boilerplate(rows, findings, problems, policy)
    accepted, quarantined = [], []
    for row, problem in zip(clean, problems, strict=True):
        if problem:
            quarantined.append({**row, "problem": problem})
        else:
            accepted.append({key: value for key, value in row.items() if key != "problem"})
    kept = [n for n, problem in enumerate(problems) if not problem]
    return Sorted(
        accepted=accepted,
        quarantined=quarantined,
        families=families,
        boilerplate=lines,
        pii=_pii(findings, policy),
        samples=_samples(rows, findings),
        redacted=sum(clean[n]["text"] != rows[n]["text"] for n in kept),
        leaks=[
            {"question": leak.protected, "doc_id": rows[n]["doc_id"]}
            | {"kind": leak.kind, "detail": leak.detail}
            for n in kept
            for leak in findings[n].leaks
        ],
    )


def own_problem(row: Row, finding: Finding, policy: Quality) -> str | None:
    """Why a document is not used, as far as it says so itself."""
    if row["problem"]:
        return str(row["problem"])
    text = row["text"] or ""
    length = len(text.strip())
    if length < policy.min_characters:
        return f"{length} characters, fewer than {policy.min_characters}"
    if len(text) > policy.max_characters:
        return f"{len(text):,} characters, more than {policy.max_characters:,}"
    return (
        finding.mojibake
        or finding.noise
        or foreign(row["language"] or "", row["format"] or "", policy.languages)
        or _blocked(text, finding.spans, policy)
    )


def _blocked(text: str, spans: Sequence[Found], policy: Quality) -> str | None:
    actions = policy.pii.model_dump()
    for span in spans:
        if actions[span.kind] == "block":
            return f"{span.kind}: in line {line_of(text, span.start)}"
    return None


def line_of(text: str, offset: int) -> int:
    """The line, counted from 1, that the character stands in."""
    return text.count("\n", 0, offset) + 1


def masked(row: Row, finding: Finding, policy: Quality) -> Row:
    """The row with everything masked that the policy redacts or blocks, headings and title too."""
    text = row["text"] or ""
    title = row["title"] or ""
    hidden = [span for span in finding.spans if _hides(span, policy)]
    # A title that stands in a text without such spans holds none, and most titles do.
    unseen = finding.spans or title not in text
    in_title = [span for span in _spans(title) if _hides(span, policy)] if unseen else []
    if not hidden and not in_title:
        return row
    headings = [
        {
            **item,
            "title": redact(item["title"], [s for s in _spans(item["title"]) if _hides(s, policy)]),
        }
        for item in row["headings"] or []
    ]
    return {
        **row,
        "text": redact(text, hidden),
        "title": redact(title, in_title) if in_title else row["title"],
        "headings": headings,
    }


def _hides(span: Found, policy: Quality) -> bool:
    return bool(getattr(policy.pii, span.kind) != "report")


def _spans(text: str) -> list[Found]:
    return without_overlap(find_secrets(text) + find_pii(text))


def _copies(rows: Sequence[Row], clean: Sequence[Row], problems: list[str | None]) -> None:
    """Mark exact copies. Masked texts are compared: two that differ in a card alone are equal."""
    first: dict[str, str] = {}
    for number, row in enumerate(clean):
        text = row["text"] or ""
        if problems[number] is None:
            if text in first:
                problems[number] = f"copy of {first[text]}"
            else:
                first[text] = rows[number]["doc_id"]


def _near_copies(
    rows: Sequence[Row],
    findings: Sequence[Finding],
    problems: list[str | None],
    policy: Quality,
) -> list[Row]:
    """Mark near copies; returns the families, by the document that stays."""
    left = [n for n, problem in enumerate(problems) if problem is None]
    found = near_duplicates(
        [findings[n].signature for n in left],
        lambda place: shingles(rows[left[place]]["text"]),
        policy.near_duplicate,
    )
    families: dict[str, list[Row]] = {}
    for place, copy in found.items():
        number, kept = left[place], rows[left[copy.of]]["doc_id"]
        problems[number] = f"near copy of {kept} (similarity {copy.jaccard:.2f})"
        member = {"doc_id": rows[number]["doc_id"], "jaccard": round(copy.jaccard, 4)}
        families.setdefault(kept, []).append(member)
    return [{"kept": kept, "copies": families[kept]} for kept in sorted(families)]


def _boilerplate(
    rows: Sequence[Row],
    findings: Sequence[Finding],
    problems: list[str | None],
    policy: Quality,
) -> list[Row]:
    """Mark documents that are mostly boilerplate; returns the most frequent such lines."""
    left = [n for n, problem in enumerate(problems) if problem is None]
    found = boilerplate([findings[n].lines for n in left], policy.boilerplate_documents)
    for number, share in zip(left, found.shares, strict=True):
        if share > policy.max_boilerplate:
            problems[number] = f"boilerplate: {share:.0%} of it stands in many other documents"
    often = sorted(found.hashes.items(), key=lambda item: (-item[1], item[0]))[:SHOWN_LINES]
    words = _lines_of(rows, findings, left, dict(often))
    return [{"line": words[key], "documents": count} for key, count in often if key in words]


def _lines_of(
    rows: Sequence[Row], findings: Sequence[Finding], left: Sequence[int], wanted: Mapping[int, int]
) -> dict[int, str]:
    """The words of lines by hash, from the first texts that hold them, personal data masked."""
    words: dict[int, str] = {}
    for number in left:
        if len(words) == len(wanted):
            break
        if not (set(findings[number].lines.hashes.tolist()) & wanted.keys()) - words.keys():
            continue
        for line in rows[number]["text"].split("\n"):
            line = " ".join(line.split())
            if len(line) >= MIN_LINE and hash64(line) in wanted:
                words.setdefault(hash64(line), redact(line, _spans(line))[:100])
    return words


def _pii(findings: Sequence[Finding], policy: Quality) -> list[Row]:
    spans: Counter[str] = Counter()
    documents: Counter[str] = Counter()
    for finding in findings:
        kinds = [span.kind for span in finding.spans]
        spans.update(kinds)
        documents.update(set(kinds))
    return [
        {"kind": kind, "policy": action, "documents": documents[kind], "spans": spans[kind]}
        for kind, action in policy.pii.model_dump().items()
    ]


def _samples(rows: Sequence[Row], findings: Sequence[Finding]) -> list[Row]:
    """The first spans of each kind, masked: where to look, never what stands there."""
    shown: Counter[str] = Counter()
    found = []
    for row, finding in zip(rows, findings, strict=True):
        for span in finding.spans:
            shown[span.kind] += 1
            if shown[span.kind] <= SAMPLES:
                text = row["text"]
                found.append(
                    {"kind": span.kind, "doc_id": row["doc_id"]}
                    | {"line": line_of(text, span.start)}
                    | {"masked": " ".join(mask(text[span.start : span.end]).split())[:60]}
                )
    return sorted(found, key=lambda item: item["kind"])


def kind_of(problem: str) -> str:
    """The class of a reason: its words before any figure or name."""
    if problem.startswith("copy of "):
        return COPY
    if problem.startswith("near copy of "):
        return NEAR_COPY
    if " characters, " in problem:
        return "too short" if "fewer" in problem else "too long"
    return problem.split(":")[0]
