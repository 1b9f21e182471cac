"""Is the chain whole? Pure functions over rows as they lie in the database."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import ValidationError

from resources.ledger.entry import GENESIS, Entry, Head, canonical
from resources.ledger.tables import COLUMNS

Row = Sequence[Any]  # in the order of COLUMNS


def parse(row: Row) -> Entry:
    """A row as Entry. Raises ValueError (of pydantic: ValidationError) for what is none."""
    values = dict(zip(COLUMNS, row, strict=True))
    body = json.loads(values["body"])
    if canonical(body) != values["body"]:
        raise ValueError("its body is not written as the ledger writes it")
    return Entry.model_validate(values | {"body": body}, strict=True)


def check(rows: Iterable[Row]) -> list[str]:
    """What is wrong with the rows, ordered by seq. Every row is judged, also after a fault."""
    problems: list[str] = []
    seq, last_hash = 0, GENESIS
    for row in rows:
        here = f"row {row[0]}"
        if row[0] != seq + 1:
            problems.append(
                f"{here}: rows are missing before it, the last one was {seq}"
                if isinstance(row[0], int)
                else f"{here}: its number is none"
            )
        elif row[COLUMNS.index("prev")] != last_hash:
            problems.append(
                f"{here}: it does not follow the row before it: one of the two was altered, "
                "replaced or moved"
            )
        try:
            entry = parse(row)
            if entry.computed() != entry.hash:
                problems.append(f"{here}: it was altered: its content does not give its hash")
        except (ValidationError, ValueError, TypeError) as error:
            problems.append(f"{here}: it was altered: {str(error).splitlines()[0]}")
        seq = row[0] if isinstance(row[0], int) else seq + 1
        last_hash = row[COLUMNS.index("hash")]
    return problems


def check_heads(rows: Sequence[Row], noted: Iterable[tuple[str, Head]]) -> list[str]:
    """Heads that somebody noted, and that are not in the chain."""
    hashes = {row[0]: row[COLUMNS.index("hash")] for row in rows}
    problems = []
    for name, head in noted:
        found = hashes.get(head.seq)
        if found is None:
            end = rows[-1][0] if rows else "none"
            problems.append(
                f"{name} is row {head.seq}, and the newest row here is {end}: rows are missing"
            )
        elif found != head.hash:
            problems.append(f"{name} has another hash than row {head.seq} here")
    return problems
