"""The table of documents: what the stage documents writes and the stage quality reads.

Columns: every field of ``contracts.records.Document``, and ``problem``: why a row has no usable
text, or null.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]

TEXT_COLUMNS = ("doc_id", "source", "path", "title", "md5", "text", "git_path")


def schema() -> pa.Schema:
    """The columns and their types, in order; ``headings`` is a list of {level, title, start}."""
    import pyarrow as pa

    heading = pa.struct([("level", pa.int32()), ("title", pa.string()), ("start", pa.int64())])
    names = [(name, pa.string()) for name in (*TEXT_COLUMNS, "format", "language", "licence")]
    return pa.schema([*names, ("headings", pa.list_(heading)), ("problem", pa.string())])


def document_row(
    source: str,
    path: str,
    *,
    md5: str | None = None,
    title: str = "",
    text: str = "",
    git_path: str | None = None,
    format: str = "text",
    language: str = "",
    licence: str | None = None,
    headings: Sequence[Row] = (),
    problem: str | None = None,
) -> Row:
    """A row of :func:`schema`. ``md5`` is of the source bytes; without it, of the text's."""
    if md5 is None:
        md5 = hashlib.md5(text.encode("utf-8", "replace"), usedforsecurity=False).hexdigest()
    return {
        "doc_id": f"{source}:{path}",
        "source": source,
        "path": path,
        "title": title or path,
        "md5": md5,
        "text": text,
        "git_path": git_path,
        "format": format,
        "language": language,
        "licence": licence,
        "headings": list(headings),
        "problem": problem,
    }
