"""Whether an answer is what its ``response_format`` promised.

Clients write these schemas: references are not followed to any address, and patterns run on an
engine without backtracking.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

import jsonschema_rs

from contracts.digests import text_sha


class Schemas:
    """Compiled schemas, the last 128 of them."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Any] = OrderedDict()

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
        key = text_sha(json.dumps(schema, sort_keys=True))
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = jsonschema_rs.validator_for(
                schema,
                retriever=_nowhere,
                pattern_options=jsonschema_rs.RegexOptions(size_limit=1 << 20),
            )
            if len(self._known) > 128:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(key)
        return found


def _nowhere(address: str) -> Any:
    raise ValueError("references to other documents are not followed")
