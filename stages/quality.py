"""quality: which documents may be used, and whether the whole may be built on.

In: the Parquet files of the stage documents, one a source; the golden questions. Out: a folder with

    documents.parquet    accepted rows (contracts.records.Document), sorted by source and path
    quarantine.parquet   the others, with the reason; their text is kept
    report.json/.html    every expectation with what was observed; written last

Row by row (stages/defects): what could not be read, is too short or too long, was decoded wrongly,
is noise, in a language that nobody asks in, holds a secret, repeats an earlier text or is mostly
boilerplate goes to quarantine with its reason. Personal data is reported, masked or blocked, as
params.quality.pii says. A copy is no defect and has a bound of its own: overridden methods repeat
their docstring, and four copies of one passage would fill a prompt that has room for three. Over
all rows: a Great Expectations suite with the bounds of params.quality. If it fails, so does the
stage, after the report is written.

What one text's bytes say about it is remembered by their hash (stages/defects/scan.py).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, get_args

from contracts.errors import InputError, QualityError
from contracts.params import Params, Quality
from contracts.records import Document
from contracts.settings import Settings
from stages import harness
from stages.defects.scan import scan_all
from stages.defects.verdicts import COPY, NEAR_COPY, Sorted, kind_of, sort_out
from stages.document_table import schema
from stages.expectations import validate
from stages.tables import read_table, write_rows

Row = dict[str, Any]


def run(paths: harness.Paths, params: Params) -> dict[str, float]:
    policy = params.quality
    rows = read_sources(paths.documents)
    questions = read_questions(paths.golden)
    texts = [row["text"] or "" for row in rows]
    findings, scanned = scan_all(texts, questions, Settings.from_env().caches_dir)
    found = sort_out(rows, findings, policy)
    results = judge(rows, found, policy)
    write_output(paths.out, found, results, policy)
    failed = [row for row in results if not row["success"]]
    harness.progress(
        f"{len(rows)} documents ({scanned} new texts scanned): {len(found.accepted)} accepted, "
        f"{len(found.quarantined)} in quarantine; "
        f"{len(results) - len(failed)} of {len(results)} expectations hold"
    )
    if failed:
        raise QualityError(
            f"{len(failed)} of {len(results)} expectations over the documents do not hold.",
            offenders=[f"{row['expectation']}: {row['observed']}" for row in failed],
            where=str(paths.out / "report.html"),
            next="mend the documents, or change the policy in params.yaml: quality",
        )
    kinds = Counter(kind_of(row["problem"]) for row in found.quarantined)
    copies = kinds[COPY] + kinds[NEAR_COPY]
    return {
        "documents": float(len(rows)),
        "accepted": float(len(found.accepted)),
        "defects": float(len(found.quarantined) - copies),
        "copies": float(kinds[COPY]),
        "near_copies": float(kinds[NEAR_COPY]),
        "personal_data": float(sum(item["spans"] for item in found.pii)),
        "redacted": float(found.redacted),
        "expectations": float(len(results)),
    }


def read_sources(folder: Path) -> list[Row]:
    """Rows of every source, sorted by source and path. Raises InputError."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise InputError(
            "There are no documents.", where=str(folder), next="run the stage documents"
        )
    rows = [row for file in files for row in read_table(file, schema().names).to_pylist()]
    return sorted(rows, key=lambda row: (row["source"] or "", row["path"] or ""))


def read_questions(path: Path) -> dict[str, str]:
    """Golden questions by id: no document may hold one. Raises InputError."""
    import yaml

    try:
        # libyaml's loader takes a tenth of the 0.4 s that PyYAML's own takes for 130 questions.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        entries = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
        return {entry["id"]: entry["question"] for entry in entries or []}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(
            f"The golden questions cannot be read: {error!r}",
            where=str(path),
            next="the comment at the top of the file says what an entry has",
        ) from None


def judge(rows: list[Row], found: Sorted, policy: Quality) -> list[Row]:
    """The results of the suites: over every row, the readable and the accepted ones."""
    import pandas as pd

    copies = (COPY, NEAR_COPY)
    defects = {row["doc_id"] for row in found.quarantined if kind_of(row["problem"]) not in copies}
    everything = pd.DataFrame(rows, columns=schema().names)
    everything["defect"] = [float(row["doc_id"] in defects) for row in rows]
    readable = everything[everything["problem"].isna()]
    accepted = pd.DataFrame(found.accepted, columns=list(Document.model_fields))
    leaks = pd.DataFrame(
        {"leak": [f"{leak['question']} in {leak['doc_id']}" for leak in found.leaks]}
    )
    every, distinct, usable, apart = expectations(policy)
    return validate(
        {
            "all": (everything, every),
            "readable": (readable, distinct),
            "accepted": (accepted, usable),
            "leaks": (leaks, apart),
        }
    )


def expectations(policy: Quality) -> tuple[list[tuple[str, Any]], ...]:
    """(What it demands in words, the expectation): over all, readable, accepted rows, and leaks."""
    import great_expectations.expectations as gxe

    columns = list(Document.model_fields)
    required = [name for name in columns if name not in ("git_path", "licence")]
    low, high = policy.min_characters, policy.max_characters
    formats = list(get_args(Document.model_fields["format"].annotation))
    every = [
        ("doc_id is unique", gxe.ExpectColumnValuesToBeUnique(column="doc_id")),
        (
            f"at most {policy.max_quarantined:.1%} of documents are defective",
            gxe.ExpectColumnMeanToBeBetween(column="defect", max_value=policy.max_quarantined),
        ),
    ]
    readable = [
        (
            f"at least {policy.min_unique_text:.0%} of texts are distinct",
            gxe.ExpectColumnProportionOfUniqueValuesToBeBetween(
                column="text", min_value=policy.min_unique_text
            ),
        )
    ]
    accepted = [
        (
            f"at least {policy.min_documents} documents",
            gxe.ExpectTableRowCountToBeBetween(min_value=policy.min_documents),
        ),
        (
            "exactly the columns of a Document",
            gxe.ExpectTableColumnsToMatchSet(column_set=columns, exact_match=True),
        ),
        (
            f"text has {low} to {high:,} characters",
            gxe.ExpectColumnValueLengthsToBeBetween(column="text", min_value=low, max_value=high),
        ),
        ("text is unique", gxe.ExpectColumnValuesToBeUnique(column="text")),
        ("md5 is an MD5", gxe.ExpectColumnValuesToMatchRegex(column="md5", regex="^[0-9a-f]{32}$")),
        (
            "title is not empty",
            gxe.ExpectColumnValueLengthsToBeBetween(column="title", min_value=1),
        ),
        (
            f"format is one of {', '.join(formats)}",
            gxe.ExpectColumnValuesToBeInSet(column="format", value_set=formats),
        ),
        *(
            (f"{name} is never missing", gxe.ExpectColumnValuesToNotBeNull(column=name))
            for name in required
        ),
    ]
    leaks = [
        (
            "no golden question stands in a document",
            gxe.ExpectColumnValuesToBeNull(column="leak"),
        )
    ]
    return every, readable, accepted, leaks


def write_output(out: Path, found: Sorted, results: list[Row], policy: Quality) -> None:
    """Everything that the stage writes; the report comes last."""
    from stages.quality_report import page

    harness.fresh_dir(out)
    kept = schema().remove(schema().get_field_index("problem"))
    write_rows(out / "documents.parquet", found.accepted, kept)
    write_rows(out / "quarantine.parquet", found.quarantined, schema())
    reasons = Counter(kind_of(row["problem"]) for row in found.quarantined)
    sources: dict[str, Counter[str]] = {}
    for row in found.quarantined:
        sources.setdefault(row["source"], Counter())[kind_of(row["problem"])] += 1
    report = {
        "success": all(row["success"] for row in results),
        "documents": len(found.accepted) + len(found.quarantined),
        "accepted": len(found.accepted),
        "quarantined": dict(sorted(reasons.items())),
        "quarantined_by_source": {key: dict(sorted(n.items())) for key, n in sources.items()},
        "near_copies": found.families,
        "boilerplate": found.boilerplate,
        "pii": found.pii,
        "pii_seen": found.samples,
        "redacted": found.redacted,
        "leaks": found.leaks,
        "languages": policy.languages,
        "expectations": results,
    }
    (out / "report.html").write_text(
        page(report, found.accepted, found.quarantined), encoding="utf-8"
    )
    harness.write_json(out / "report.json", report)


if __name__ == "__main__":
    harness.main("quality", run, paths=("documents", "golden", "out"))
