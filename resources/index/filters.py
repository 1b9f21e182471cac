"""Which payload fields a search may be restricted by, and what a Filter asks of them."""

from __future__ import annotations

from collections.abc import Collection

from contracts.records import Filter

#: Field of Filter to field of the payload; every one of these has a payload index.
FIELDS = {
    "sources": "source",
    "paths": "path",
    "formats": "format",
    "languages": "language",
    "licences": "licence",
    "without_documents": "doc_id",
}


Clause = tuple[str, list[str]]


def clauses(only: Filter) -> tuple[list[Clause], list[Clause]]:
    """(field, values that it must have one of) …, (field, values that it must not have) …"""
    given = [(field, list(getattr(only, name))) for name, field in FIELDS.items()]
    given = [(field, values) for field, values in given if values]
    must = [clause for clause in given if clause[0] != "doc_id"]
    return must, [clause for clause in given if clause[0] == "doc_id"]


def hide(only: Filter | None, documents: Collection[str]) -> Filter | None:
    """``only``, and none of those documents."""
    if not documents:
        return only
    only = only or Filter()
    refused = sorted({*only.without_documents, *documents})
    return only.model_copy(update={"without_documents": refused})
