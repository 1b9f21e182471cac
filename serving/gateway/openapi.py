"""The OpenAPI 3.1 document of the gateway, served at /openapi.json.

Bounds of fields come from the very checks that a request goes through (``plain_request.FIELDS``,
``fields.SCHEMAS``, the model of feedback), statuses and codes of errors from ``envelope.CODES``:
the document cannot say something else than the code does. It describes plain models; what a
release refuses on top of it is said in words.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from serving.gateway import fields, plain_request
from serving.gateway.api_request import PATHS, Kind
from serving.gateway.chat_request import MAX_QUESTION
from serving.gateway.envelope import CODES
from serving.gateway.feedback import Feedback

Schema = dict[str, Any]
#: Codes that only a route with a body, a model or a key can give.
_OF_BODIES = {"invalid_json", "invalid_request", "request_timeout", "body_too_large",
              "unsupported_media_type", "overloaded"}  # fmt: skip
_OF_KEYS = {"invalid_api_key", "keys_unavailable"}
_OF_EVERYTHING = {"not_found", "method_not_allowed", "internal_error"}
#: Written down for people in the log; nobody is there to read it.
_OF_NOBODY = {"client_disconnected"}
_STRING: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}


def _object(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


def _array(items: Schema, most: int, least: int = 1) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def _or_null(schema: Schema) -> Schema:
    """An optional field may also be null: it then counts as left out."""
    return {"anyOf": [schema, {"type": "null"}]}


_FUNCTION = _object(("name",), name=_STRING, parameters={"type": "object"})
_TOOL = _object(("type", "function"), type={"const": "function"}, function=_FUNCTION)
_CALL = _object(
    ("id", "function"),
    id=_STRING,
    type={"const": "function"},
    function=_object(("name", "arguments"), name=_STRING, arguments=_STRING),
)
_CHOICE: Schema = {
    "anyOf": [{"enum": ["none", "auto", "required"]}, _object(("function",), function={})]
}
_FORMAT: Schema = {
    "anyOf": [
        _object(("type",), type={"enum": ["text", "json_object"]}),
        _object(
            ("type", "json_schema"),
            type={"const": "json_schema"},
            json_schema=_object(("schema",), schema={"type": "object"}),
        ),
    ]
}
#: Fields whose check is more than a bound.
_OWN: dict[str, Schema] = {
    "tools": _array(_TOOL, plain_request.MAX_TOOLS, 0),
    "tool_choice": _CHOICE,
    "response_format": _FORMAT,
}


def _message() -> Schema:
    text: Schema = {"type": "string"}
    part = _object(("type", "text"), type={"const": "text"}, text=text)
    content: Schema = {"anyOf": [text, {"type": "array", "items": part}]}
    short = fields.SCHEMAS[fields.text(256)]
    others = sorted(plain_request.ROLES - {"assistant"})
    more = {"name": _or_null(short), "tool_call_id": _or_null(short)}
    calls = _or_null(_array(_CALL, plain_request.MAX_TOOLS, 0))
    assistant = _object(("role",), role={"const": "assistant"}, content=_or_null(content),
                        tool_calls=calls, **more)  # fmt: skip
    anybody = _object(("role", "content"), role={"enum": others}, content=content,
                      tool_calls=calls, **more)  # fmt: skip
    return {"anyOf": [anybody, assistant]}


def _prompts() -> Schema:
    token: Schema = {"type": "integer", "minimum": 0, "maximum": (1 << 31) - 1}
    ids: Schema = {"type": "array", "items": token, "minItems": 1}
    most = plain_request.MAX_PROMPTS
    return {"anyOf": [_STRING, _array(_STRING, most), ids, _array(ids, most)]}


def request_schema(kind: Kind) -> Schema:
    """The body of a request of that kind, as ``plain_request.parse`` reads it."""
    properties: dict[str, Schema] = {
        name: _or_null(_OWN.get(name) or fields.SCHEMAS[check])
        for name, check in plain_request.FIELDS[kind].items()
    }
    properties["model"] = {"type": "string", "minLength": 1}
    if kind != "embeddings":
        flag = _or_null(fields.SCHEMAS[fields.boolean])
        properties["stream"] = flag
        properties["stream_options"] = _or_null(_object(include_usage=flag))
    prompt = {"chat": "messages", "completions": "prompt", "embeddings": "input"}[kind]
    properties[prompt] = (
        _array(_message(), plain_request.MAX_MESSAGES) if kind == "chat" else _prompts()
    )
    return _object(("model", prompt), **properties)


def _envelope(codes: set[str]) -> Schema:
    error = _object(
        ("message", "type", "param", "code", "request_id"),
        message=_STRING,
        type={"enum": sorted({CODES[code][1] for code in codes})},
        param=_or_null(_STRING),
        code={"enum": sorted(codes)},
        request_id=_STRING,
    )
    return _object(("error",), error=error)


def _errors(codes: set[str]) -> dict[str, Any]:
    """Responses by status, each with the codes that it can carry."""
    by_status: dict[int, set[str]] = {}
    for code in codes | _OF_EVERYTHING:
        by_status.setdefault(CODES[code][0], set()).add(code)
    return {
        str(status): {
            "description": ", ".join(sorted(found)),
            "headers": {"x-request-id": {"schema": _STRING}},
            "content": {"application/json": {"schema": _envelope(found)}},
        }
        for status, found in sorted(by_status.items())
    }


def _answer(description: str, schema: Schema, *, stream: bool = False) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if stream:
        content["text/event-stream"] = {"schema": _object(data=_STRING)}  # of one event
    return {"description": description, "content": content}


_USAGE = _or_null(_object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT))
_CITATION = _object(("n", "text"), n=_COUNT, text=_STRING)
_ANSWERS: dict[Kind, tuple[str, str, Schema]] = {
    "chat": (
        "Answer a conversation.",
        ("The model of a release (its channel, or `ratchet`) answers the last user message, at "
        f"most {MAX_QUESTION} characters, from its documents, with citations; it refuses tools, "
        "response formats, logprobs and n above 1 with unsupported_parameter."),
        _object(("choices",), choices={"type": "array"}, usage=_USAGE, release=_STRING,
                citations={"type": "array", "items": _CITATION}),
    ),
    "completions": (
        "Continue a text.", "Plain models only.",
        _object(("choices",), choices={"type": "array"}, usage=_USAGE),
    ),
    "embeddings": (
        "Vectors of texts.", "Plain models only.",
        _object(("data",), data={"type": "array"}, usage=_USAGE),
    ),
}  # fmt: skip


def _asked(kind: Kind) -> dict[str, Any]:
    summary, description, schema = _ANSWERS[kind]
    of_models = set(CODES) - _OF_NOBODY - _OF_EVERYTHING
    return {
        "operationId": kind,
        "summary": summary,
        "description": description,
        "requestBody": _body({"$ref": f"#/components/schemas/{kind}"}),
        "responses": {
            "200": _answer("The answer.", schema, stream=kind != "embeddings"),
            **_errors(of_models),
        },
    }


def _body(schema: Schema) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": schema}}}


_MODEL = _object(
    ("id", "object", "created", "owned_by"),
    id=_STRING, object={"const": "model"}, created=_COUNT, owned_by=_STRING, release=_STRING,
)  # fmt: skip
_READY = _object(
    ("ready", "problem"),
    ready={"type": "boolean"},
    problem=_or_null(_STRING),
    models={"type": "array", "items": _STRING},
)


def _got(summary: str, *, keys: bool = False, **responses: Any) -> dict[str, Any]:
    """A GET. ``responses`` by status, as s200."""
    own = {name[1:]: value for name, value in responses.items()}
    found: dict[str, Any] = {
        "summary": summary,
        "responses": {**_errors(_OF_KEYS if keys else set()), **own},
    }
    if not keys:
        found["security"] = []
    return found


def _paths() -> dict[str, Any]:
    one = _got("One model.", keys=True, s200=_answer("It.", _MODEL))
    one["responses"] |= {"404": _errors({"model_not_found"})["404"]}
    name = {"name": "name", "in": "path", "required": True, "schema": {**_STRING, "minLength": 1}}
    models = _object(
        ("object", "data"), object={"const": "list"}, data={"type": "array", "items": _MODEL}
    )
    stored = _object(("object", "response_id"), object={"const": "feedback"}, response_id=_STRING)
    text = {"description": "Prometheus.", "content": {"text/plain": {"schema": _STRING}}}
    alive = _answer("The process lives.", _object(("status",), status=_STRING))
    opinion = {
        "operationId": "feedback",
        "summary": "Say what an answer was worth.",
        "requestBody": _body({"$ref": "#/components/schemas/feedback"}),
        "responses": {
            "200": _answer("It is on the disk.", stored),
            **_errors(_OF_BODIES | _OF_KEYS | {"rate_limit_exceeded"}),
        },
    }
    return {
        **{path: {"post": _asked(kind)} for kind, path in PATHS.items()},
        "/v1/models": {"get": _got("Names to use.", keys=True, s200=_answer("Them.", models))},
        "/v1/models/{name}": {"parameters": [name], "get": one},
        "/v1/feedback": {"post": opinion},
        "/healthz": {"get": _got("Whether the process lives.", s200=alive)},
        "/readyz": {
            "get": _got(
                "Whether tokens flow.",
                s200=_answer("They do.", _READY),
                s503=_answer("They do not, and why.", _READY),
            )
        },
        "/metrics": {"get": _got("Metrics of this worker.", s200=text)},
        "/openapi.json": {"get": _got("This document.", s200=_answer("It.", {"type": "object"}))},
    }


def document() -> dict[str, Any]:
    """The document."""
    schemas: dict[str, Schema] = {kind: request_schema(kind) for kind in PATHS}
    schemas["feedback"] = Feedback.model_json_schema()
    bearer = {"type": "http", "scheme": "bearer", "description": "A key of `ratchet keys create`."}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Ratchet's gateway",
            "version": "1",
            "description": "The OpenAI API in front of certified releases and plain models.",
        },
        # Whether a key is needed is the configuration's choice.
        "security": [{"key": []}, {}],
        "paths": _paths(),
        "components": {"schemas": schemas, "securitySchemes": {"key": bearer}},
    }


@cache
def document_bytes() -> bytes:
    return json.dumps(document(), separators=(",", ":")).encode()
