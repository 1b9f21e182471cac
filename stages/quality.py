"""quality: which documents may be used, and whether the whole may be built on.

In: the Parquet files of the stage documents, one a source. Out: a folder with

    documents.parquet    accepted rows (contracts.records.Document), sorted by source and path
    quarantine.parquet   the others, with the reason; their text is kept
    report.json/.html    every expectation with what was observed; written last

Row by row: what could not be read, is too short or too long goes to quarantine, and so does an
exact copy of an earlier text: overridden methods repeat their docstring, and four copies of one
passage would fill a prompt that has room for three. A copy is no defect, though, and has a bound of
its own. Over all rows: a Great Expectations suite with the bounds of params.quality. If it fails,
so does the stage, after the report is written.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts.errors import InputError, QualityError
from contracts.params import Params, Quality
from contracts.records import Document
from stages import harness
from stages.documents import schema
from stages.tables import read_table, write_rows

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]
DUPLICATE = "copy of"


def run(paths: harness.Paths, params: Params) -> dict[str, float]:
    policy = params.quality
    rows = read_sources(paths.documents)
    accepted, quarantined = sort_out(rows, policy)
    results = validate(rows, accepted, quarantined, policy)
    write_output(paths.out, accepted, quarantined, results)
    failed = [row for row in results if not row["success"]]
    harness.progress(
        f"{len(rows)} documents: {len(accepted)} accepted, {len(quarantined)} in quarantine; "
        f"{len(results) - len(failed)} of {len(results)} expectations hold"
    )
    if failed:
        raise QualityError(
            f"{len(failed)} of {len(results)} expectations over the documents do not hold.",
            offenders=[f"{row['expectation']}: {row['observed']}" for row in failed],
            where=str(paths.out / "report.html"),
            next="mend the documents, or change the policy in params.yaml: quality",
        )
    copies = sum(row["problem"].startswith(DUPLICATE) for row in quarantined)
    return {
        "documents": float(len(rows)),
        "accepted": float(len(accepted)),
        "defects": float(len(quarantined) - copies),
        "copies": float(copies),
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


def sort_out(rows: list[Row], policy: Quality) -> tuple[list[Row], list[Row]]:
    """(accepted, quarantined with their reason as ``problem``); the first of equal texts stays."""
    accepted: list[Row] = []
    quarantined: list[Row] = []
    first: dict[str, str] = {}
    for row in rows:
        text = row["text"] or ""
        reason = row["problem"] or _defect(text, policy)
        if not reason and text in first:
            reason = f"{DUPLICATE} {first[text]}"
        if reason:
            quarantined.append({**row, "problem": reason})
        else:
            first[text] = row["doc_id"]
            accepted.append(row)
    return accepted, quarantined


def _defect(text: str, policy: Quality) -> str | None:
    """Why a text that could be read is not used."""
    length = len(text.strip())
    if length < policy.min_characters:
        return f"{length} characters, fewer than {policy.min_characters}"
    if len(text) > policy.max_characters:
        return f"{len(text):,} characters, more than {policy.max_characters:,}"
    return None


def validate(
    rows: list[Row], accepted: list[Row], quarantined: list[Row], policy: Quality
) -> list[Row]:
    """Run both suites: one over every row, one over the accepted.

    Returns a row for each expectation: expectation (readable), rule (GX's name), column, over,
    bound, observed, success.
    """
    import pandas as pd

    defects = {row["doc_id"] for row in quarantined if not row["problem"].startswith(DUPLICATE)}
    everything = pd.DataFrame(rows, columns=schema().names)
    everything["defect"] = [float(row["doc_id"] in defects) for row in rows]
    readable = everything[everything["problem"].isna()]
    usable = pd.DataFrame([_without_problem(row) for row in accepted])
    frames = {"all": everything, "readable": readable, "accepted": usable}
    suites = expectations(policy)
    return [row for over, frame in frames.items() for row in _run_suite(over, frame, suites[over])]


def expectations(policy: Quality) -> dict[str, list[tuple[str, Any]]]:
    """(What it demands in words, the expectation), by the rows that it is about."""
    import great_expectations.expectations as gxe

    columns = list(Document.model_fields)
    required = [name for name in columns if name != "git_path"]
    low, high = policy.min_characters, policy.max_characters
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
        *(
            (f"{name} is never missing", gxe.ExpectColumnValuesToNotBeNull(column=name))
            for name in required
        ),
    ]
    return {"all": every, "readable": readable, "accepted": accepted}


def _run_suite(over: str, frame: pd.DataFrame, suite: list[tuple[str, Any]]) -> Iterator[Row]:
    """Validate one frame and flatten the results, in the order of the suite."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False, metric_calculations=False)
    source = context.data_sources.add_pandas(over)
    batch = source.add_dataframe_asset(over).add_batch_definition_whole_dataframe("whole")
    for words, expectation in suite:
        # One validation an expectation: GX returns results in an order of its own.
        result = batch.get_batch(batch_parameters={"dataframe": frame}).validate(expectation)
        config = result.expectation_config
        bound = {
            key: value
            for key, value in config.kwargs.items()
            if key not in ("batch_id", "column") and value is not None
        }
        yield {
            "expectation": words,
            "rule": config.type,
            "over": over,
            "column": config.kwargs.get("column"),
            "bound": bound,
            "observed": _observed(result),
            "success": bool(result.success),
        }


def _observed(result: Any) -> str:
    """What an expectation saw, in one short line without memory addresses or dates."""
    if result.exception_info and result.exception_info.get("raised_exception"):
        return f"could not be judged: {result.exception_info.get('exception_message')}"
    seen = result.result
    if "observed_value" in seen:
        value = seen["observed_value"]
        if isinstance(value, float):
            return "no rows" if math.isnan(value) else f"{value:.4g}"
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    count = seen.get("unexpected_count", 0)
    if not count:
        return f"all {seen.get('element_count', 0)} rows"
    few = ", ".join(repr(item)[:40] for item in seen.get("partial_unexpected_list", [])[:3])
    return f"{count} of {seen.get('element_count')} rows do not, e.g. {few}"


def write_output(
    out: Path, accepted: list[Row], quarantined: list[Row], results: list[Row]
) -> None:
    """Everything that the stage writes; the report comes last."""
    from stages.quality_report import page

    harness.fresh_dir(out)
    kept = schema().remove(schema().get_field_index("problem"))
    write_rows(out / "documents.parquet", [_without_problem(row) for row in accepted], kept)
    write_rows(out / "quarantine.parquet", quarantined, schema())
    reasons = Counter(_kind(row["problem"]) for row in quarantined)
    report = {
        "success": all(row["success"] for row in results),
        "documents": len(accepted) + len(quarantined),
        "accepted": len(accepted),
        "quarantined": dict(sorted(reasons.items())),
        "expectations": results,
    }
    (out / "report.html").write_text(page(report, accepted, quarantined), encoding="utf-8")
    harness.write_json(out / "report.json", report)


def _without_problem(row: Row) -> Row:
    return {key: value for key, value in row.items() if key != "problem"}


def _kind(problem: str) -> str:
    """The class of a reason: its words before any figure or name."""
    if problem.startswith(DUPLICATE):
        return "exact copy of another text"
    if " characters, " in problem:
        return "too short" if "fewer" in problem else "too long"
    return problem.split(":")[0]


if __name__ == "__main__":
    harness.main("quality", run, paths=("documents", "out"))
