"""The request log: one row per request, Parquet by UTC day, readable while it is being written.

In: what ``resources.request_writer`` wrote for the gateway. Out: ``read_day`` and ``find``. Layout
of ``<state>/requests/<YYYY-MM-DD>/``:

* ``<time>-<pid>-<n>.parquet``: complete, written under a temporary name and renamed.
* ``.<time>-<pid>-<n>.jsonl``: the journal of the file to come. A record is a line of it within
  milliseconds, so a killed gateway loses what was in its queue and no more; the next gateway turns
  the journal into Parquet. Readers here see journals too; tools that read the folder as Parquet
  skip names with a leading dot.

``python -m resources.requests --day YYYY-MM-DD --out FILE.parquet`` writes one day as one table,
and its numbers beside it as ``FILE.json``.

A writer holds a lock on its journal, so a journal without a lock is one whose writer has died.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj
import pyarrow.parquet as pq

from contracts.errors import InputError, RatchetError
from contracts.records import RequestRecord
from contracts.settings import Settings

#: Column by column what :class:`contracts.records.RequestRecord` says.
SCHEMA = pa.schema(
    [
        pa.field("response_id", pa.string(), nullable=False),
        pa.field("time", pa.string(), nullable=False),
        pa.field("channel", pa.string(), nullable=False),
        pa.field("release", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("prompt_version", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("refused", pa.bool_(), nullable=False),
        pa.field("stream", pa.bool_(), nullable=False),
        pa.field("status", pa.int32(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("chunk_ids", pa.list_(pa.string()), nullable=False),
        pa.field("cited", pa.list_(pa.int32()), nullable=False),
        pa.field("scores", pa.list_(pa.float64()), nullable=False),
        pa.field("prompt_tokens", pa.int64()),
        pa.field("completion_tokens", pa.int64()),
        pa.field("ttft_ms", pa.float64()),
        pa.field("latency_ms", pa.float64(), nullable=False),
        pa.field("retrieval_ms", pa.float64()),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("asked_model", pa.string(), nullable=False),
        pa.field("tenant", pa.string(), nullable=False),
        pa.field("key_id", pa.string(), nullable=False),
        pa.field("feature", pa.string(), nullable=False),
        pa.field("session", pa.string(), nullable=False),
        pa.field("provider", pa.string(), nullable=False),
        pa.field("tier", pa.string(), nullable=False),
        pa.field("cost", pa.float64(), nullable=False),
        pa.field("cached", pa.string(), nullable=False),
        pa.field("tokens_estimated", pa.bool_(), nullable=False),
        pa.field("attempts", pa.int32(), nullable=False),
        pa.field("guard", pa.string(), nullable=False),
        pa.field("prompt_experiment", pa.string(), nullable=False),
        pa.field("rollout", pa.string(), nullable=False),
        pa.field("arm", pa.string(), nullable=False),
    ]
)
#: Response ids name their UTC day, so that `find` opens one folder: resp-20261120-<24 hex>.
RESPONSE_ID = re.compile(r"resp-(\d{4})(\d{2})(\d{2})-[0-9a-f]{24}")


#: Random bytes are fetched for many ids at once: the system call lets go of Python's lock, and a
#: thread that writes logs then keeps it, 8 us a request on average. A fork begins with none.
_random: list[str] = []
os.register_at_fork(after_in_child=_random.clear)


def new_response_id(at: datetime) -> str:
    """An unguessable id that names the UTC day of ``at``."""
    while True:
        try:
            found = _random.pop()
            break
        except IndexError:
            many = os.urandom(12 * 256).hex()
            _random.extend(many[n : n + 24] for n in range(0, len(many), 24))
    return f"resp-{at.year:04}{at.month:02}{at.day:02}-{found}"


def read_day(settings: Settings, day: date | str) -> pa.Table:
    """One UTC day of the log, sorted by time; no rows for a day without requests.

    Args:
        day: a date, or ``YYYY-MM-DD``.

    Raises InputError naming every file that cannot be read.
    """
    offenders: list[str] = []
    table = _read_folder(_folder(settings, day), offenders)
    if offenders:
        raise InputError(
            f"The request log of {day} cannot be read in full.",
            where=str(_folder(settings, day)),
            offenders=offenders,
            next="move these files away; their requests are lost",
        )
    return table.sort_by([("time", "ascending"), ("response_id", "ascending")])


def days(settings: Settings) -> list[str]:
    """The UTC days that have a folder, ``YYYY-MM-DD``, oldest first."""
    return sorted(path.name for path in settings.requests_dir.glob("[0-9]*-[0-9]*-[0-9]*"))


def find(settings: Settings, response_id: str) -> RequestRecord | None:
    """The record of that response, or None. Files that cannot be read are passed over."""
    match = RESPONSE_ID.fullmatch(response_id)
    for day in ["-".join(match.groups())] if match else reversed(days(settings)):
        table = _read_folder(_folder(settings, day), [])
        rows = table.filter(pc.equal(table["response_id"], response_id)).to_pylist()
        if rows:
            return RequestRecord.model_validate(rows[0])
    return None


def owner(folder: Path, response_id: str) -> str | None:
    """The tenant whose response that is; None when there is no such response.

    Reads two columns, the newest files first: 0.4 ms a file. Blocks. Files that cannot be read, or
    are from before tenants were kept, are passed over.

    Args:
        folder: ``Settings.requests_dir``.
    """
    match = RESPONSE_ID.fullmatch(response_id)
    if match is None:
        return None
    home = folder / "-".join(match.groups())
    for path in sorted(home.glob(".*.jsonl"), reverse=True):
        with contextlib.suppress(OSError):  # it was rolled just now
            if response_id.encode() in path.read_bytes():
                for row in read_journal(path)[0]:
                    if row["response_id"] == response_id:
                        return str(row["tenant"])
    for path in sorted(home.glob("[!.]*.parquet"), reverse=True):
        with contextlib.suppress(OSError, pa.ArrowException, KeyError):
            table = pq.read_table(path, columns=["response_id", "tenant"], partitioning=None)
            at = pc.index(table["response_id"], response_id).as_py()
            if at >= 0:
                return str(table["tenant"][at].as_py())
    return None


def to_table(rows: Iterable[dict[str, Any]]) -> pa.Table:
    """Rows of RequestRecord fields as the log's table. Raises pyarrow errors for wrong types."""
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


def table_of(journal: Path) -> pa.Table:
    """A journal as a table: by Arrow's reader (1 us a row, and other threads go on meanwhile), or,
    when there is anything odd about it, row by row (17 us)."""
    options = pj.ParseOptions(explicit_schema=SCHEMA, unexpected_field_behavior="error")
    with contextlib.suppress(pa.ArrowException):  # an empty file, a torn line, a row of a megabyte
        table = pj.read_json(journal, parse_options=options)
        if all(table[f.name].null_count == 0 for f in SCHEMA if not f.nullable):
            return table.cast(SCHEMA)
    return to_table(read_journal(journal)[0])


def read_journal(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Whole records of a journal, and how many lines were torn by a kill or a full disk."""
    rows, torn = [], 0
    for line in path.read_bytes().split(b"\n"):
        if not line:
            continue
        try:
            rows.append(RequestRecord.model_validate_json(line).model_dump())
        except ValueError:
            torn += 1
    return rows, torn


def _read_folder(folder: Path, offenders: list[str]) -> pa.Table:
    """Every row of a day. A journal that is rolled while we read is read again as Parquet."""
    for _ in range(5):
        journals = sorted(folder.glob(".*.jsonl"))
        try:
            live = [
                row
                for path in journals
                if not parquet_of(path).exists()
                for row in read_journal(path)[0]
            ]
        except FileNotFoundError:
            continue
        names = [path for path in sorted(folder.glob("*.parquet")) if not path.name.startswith(".")]
        rolled = {parquet_of(path) for path in journals} & set(names)
        tables = [to_table(live)]
        for path in names:
            try:
                tables.append(_whole(pq.read_table(path, partitioning=None)))
            except (OSError, pa.ArrowException) as error:
                offenders.append(f"{path.name}: {' '.join(str(error).split())[:200]}")
        return _distinct(pa.concat_tables(tables)) if rolled else pa.concat_tables(tables)
    return to_table([])


def _whole(table: pa.Table) -> pa.Table:
    """A file's table with every column of SCHEMA: those that came later get their defaults.

    Raises pyarrow errors for a column without a default that is missing, or of another type.
    """
    columns = []
    for column in SCHEMA:
        if column.name in table.column_names:
            columns.append(table[column.name].cast(column.type))
            continue
        default = RequestRecord.model_fields[column.name]
        if default.is_required():
            raise pa.ArrowInvalid(f"the column '{column.name}' is missing")
        columns.append(pa.repeat(pa.scalar(default.default, column.type), table.num_rows))
    return pa.table(columns, schema=SCHEMA)


def _distinct(table: pa.Table) -> pa.Table:
    """Without repeated response ids: a file was rolled between two looks at the folder."""
    seen: set[str] = set()
    keep = []
    for value in table["response_id"].to_pylist():
        keep.append(value not in seen)
        seen.add(value)
    return table.filter(pa.array(keep, pa.bool_()))


def parquet_of(journal: Path) -> Path:
    return journal.with_name(journal.name.removeprefix(".").removesuffix(".jsonl") + ".parquet")


def _folder(settings: Settings, day: date | str) -> Path:
    text = day if isinstance(day, str) else day.isoformat()
    try:
        date.fromisoformat(text)
    except ValueError:
        raise InputError(f"'{text}' is not a day.", next="write YYYY-MM-DD") from None
    return settings.requests_dir / text


# -- one day as one table ------------------------------------------------------------------------


def summary(table: pa.Table, day: str) -> dict[str, Any]:
    """Numbers of a day: requests, answered, refused, errors, releases, chunks used, tokens."""
    rows = table.select(["error", "refused", "release", "stream", "completion_tokens"]).to_pylist()
    answered = [row for row in rows if row["error"] is None]
    return {
        "day": day,
        "requests": len(rows),
        "answered": len(answered),
        "refused": sum(row["refused"] for row in answered),
        "errors": len(rows) - len(answered),
        "streamed": sum(row["stream"] for row in rows),
        "completion_tokens": sum(row["completion_tokens"] or 0 for row in rows),
        "releases": sorted({row["release"] for row in rows if row["release"]}),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Write one day's table and summary; return the exit code."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m resources.requests")
    parser.add_argument("--day", required=True, help="UTC, YYYY-MM-DD")
    parser.add_argument("--out", type=Path, required=True, help="a .parquet file")
    given = parser.parse_args(argv)
    try:
        table = read_day(Settings.from_env(), given.day)
        # Copies of requests for a shadow are nobody's: they are a rollout's evidence and no more.
        table = table.filter(pc.not_equal(table["arm"], "shadow"))
    except RatchetError as error:
        print(f"requests: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    numbers = summary(table, given.day)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    part = given.out.with_name(given.out.name + ".part")
    pq.write_table(table, part, compression="zstd")
    part.replace(given.out)
    target = given.out.with_suffix(".json")
    part = target.with_name(target.name + ".part")
    part.write_text(json.dumps(numbers, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(target)
    print(f"requests: {numbers['requests']} on {given.day}, {numbers['errors']} failed", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
