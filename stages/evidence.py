"""What the evaluation stages hand on as files: test questions, scores, the verdict.

In: ``examples/test.jsonl``, ``scores.parquet``, ``verdict.json``. Out: typed rows, or one error
that names everything that is wrong with the file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from contracts.errors import GateError, InputError
from contracts.records import Example, SafetyPrompt, Score
from stages import tables

System = Literal["base", "candidate"]
SYSTEMS: tuple[System, ...] = get_args(System)


def read_examples(path: Path, *, may_be_empty: bool = False) -> list[Example]:
    """The examples of one split, by id. Raises InputError listing every bad row."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(
            "There are no test examples.", where=str(path), next="dvc repro examples"
        ) from None
    examples, offenders = [], []
    for number, line in enumerate(lines, start=1):
        try:
            examples.append(Example.model_validate_json(line))
        except ValidationError as error:
            problem = error.errors()[0]
            offenders.append(
                f"line {number}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}"
            )
    ids = [example.id for example in examples]
    offenders += [
        f"id {name} stands {ids.count(name)} times"
        for name in sorted({i for i in ids if ids.count(i) > 1})
    ]
    offenders += [
        f"{e.id}: answerable, but without an answer"
        for e in examples
        if e.answerable and not e.answer
    ]
    if not examples and not offenders and not may_be_empty:
        offenders.append("the file is empty")
    if offenders:
        raise InputError("The test examples cannot be used.", where=str(path), offenders=offenders)
    return sorted(examples, key=lambda example: example.id)


def read_safety(path: Path) -> list[SafetyPrompt]:
    """The safety prompts, by id. Raises InputError naming every entry that is wrong."""
    import yaml

    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"The safety prompts cannot be read: {error}", where=str(path)) from None
    found, offenders = [], []
    for number, entry in enumerate(entries if isinstance(entries, list) else [], start=1):
        try:
            found.append(SafetyPrompt.model_validate(entry))
        except ValidationError as error:
            problem = error.errors()[0]
            spot = ".".join(map(str, problem["loc"]))
            offenders.append(f"entry {number}: {spot}: {problem['msg']}")
    ids = [item.id for item in found]
    offenders += [f"id {name} stands twice" for name in sorted(set(ids)) if ids.count(name) > 1]
    if not entries:
        offenders.append("the file holds no list of prompts")
    if offenders:
        raise InputError("The safety prompts cannot be used.", where=str(path), offenders=offenders)
    return sorted(found, key=lambda item: item.id)


def write_scores(scores: Sequence[Score], path: Path) -> None:
    """Score rows by question, system and metric."""
    import pyarrow as pa

    text = pa.string()
    schema = pa.schema(
        [
            ("question_id", text),
            ("system", text),
            ("metric", text),
            ("value", pa.float64()),
            ("reason", text),
        ]
    )
    rows = sorted(
        (item.model_dump() for item in scores),
        key=lambda r: (r["question_id"], r["system"], r["metric"]),
    )
    tables.write_rows(path, rows, schema)


def read_scores(path: Path) -> list[Score]:
    """Rows of scores.parquet. Raises InputError where a column is not what Score says."""
    rows = tables.read_table(path, list(Score.model_fields)).to_pylist()
    known = set(SYSTEMS)
    offenders = sorted({f"system {row['system']}" for row in rows if row["system"] not in known})
    if offenders:
        raise InputError(
            "The scores are not of systems known here.", where=str(path), offenders=offenders
        )
    return [Score(**row) for row in rows]


def require_pass(path: Path) -> dict[str, Any]:
    """The verdict of ``data/gate/verdict.json``. Raises GateError unless it says PASS."""
    try:
        verdict: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise InputError(
            f"There is no verdict to rely on: {error}", where=str(path), next="dvc repro gate"
        ) from None
    if verdict.get("verdict") != "PASS":
        raise GateError(
            f"The gate says {verdict.get('verdict')}; only a PASS goes on.",
            where=str(path),
            offenders=list(verdict.get("reasons", [])),
            next="ratchet gate explain",
        )
    return verdict
