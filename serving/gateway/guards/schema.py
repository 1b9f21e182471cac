"""Whether an answer is what its ``response_format`` promised.

Clients write these schemas: references are not followed to any address, and patterns run on an
engine without backtracking.
"""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import Any

import jsonschema_rs

from serving.gateway.guards.recent import Recent


class Schemas:
    """Compiled schemas, the last 128 of them."""

    def __init__(self) -> None:
        self._known: Recent[Any] = Recent(128)

    def problem(self, response_format: Any, text: str) -> str | None:
        """``not_json`` or ``invalid``; ``bad_schema`` when the schema itself cannot be used; None
        when the answer is valid or nothing was promised."""
        kind = response_format.get("type") if isinstance(response_format, dict) else None
        if kind not in ("json_schema", "json_object"):
            return None
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return "not_json"
        if kind == "json_object":
            return None if isinstance(value, dict) else "invalid"
        promised = response_format.get("json_schema")
        schema = promised.get("schema") if isinstance(promised, dict) else None
        if schema is None:
            return None
        try:
            return None if self._validator(schema).is_valid(value) else "invalid"
        except (ValueError, jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError):
            return "bad_schema"

    def _validator(self, schema: Any) -> Any:
        text = json.dumps(schema, sort_keys=True).encode()
        return self._known.get(
            blake2b(text, digest_size=16).digest(),
            lambda: jsonschema_rs.validator_for(
                schema,
                retriever=_nowhere,
                pattern_options=jsonschema_rs.RegexOptions(size_limit=1 << 20),
            ),
        )


def _nowhere(address: str) -> Any:
    raise ValueError("references to other documents are not followed")
