"""The OpenAPI document, held against the gateway that answers: schemathesis asks what it allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import checks

from contracts.settings import Settings
from serving.gateway import plain_request
from serving.gateway.api_request import PATHS
from serving.gateway.app import create_app
from serving.gateway.config import GatewayConfig, Requests
from serving.gateway.envelope import CODES
from serving.gateway.openapi import document, request_schema
from serving.gateway.routing.config import Routing
from tests.serving.conftest import Running
from tests.serving.fake_engine import FakeEngine

EXAMPLES = 40
#: What a document cannot say: a body that it allows may name a model that is not there, ask a
#: tool of a model without tools, or be too large all together.
UNSAID = [checks.positive_data_acceptance]


def asked() -> dict[str, Any]:
    """The document, with the name of a model that is there, and without streams of completions,
    which the fake engine does not speak."""
    found = document()
    schemas = found["components"]["schemas"]
    for kind in PATHS:
        schemas[kind]["properties"]["model"] = {"const": "small"}
    schemas["completions"]["properties"]["stream"] = {"enum": [False, None]}
    return found


schema = schemathesis.openapi.from_dict(asked())
#: What is wrong may also be too much, or come too slowly on a loaded machine.
schema.config.checks.negative_data_rejection.expected_statuses += ["408", "413"]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A gateway of one plain model."""
    root = tmp_path_factory.mktemp("a checkout")
    with FakeEngine() as engine:
        routing = Routing.model_validate({
            "providers": {"it": {"url": engine.url}},
            "models": [{"name": "small", "candidates": [{"provider": "it", "model": "nano"}]}],
        })  # fmt: skip
        config = GatewayConfig(routing=routing, requests=Requests(in_flight=64))
        running = Running(Settings.from_env({"RATCHET_ROOT": str(root)}), config=config)
        try:
            yield running.ready()
        finally:
            running.stop()


@pytest.fixture(scope="module")
def url(running: Running) -> str:
    return running.url


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_the_gateway_does_what_its_document_says(case: schemathesis.Case, url: str) -> None:
    """Never a 500, no status, type, header or body that is not written down."""
    response = case.call(base_url=url)
    assert response.status_code != 500, response.text
    case.validate_response(response, excluded_checks=UNSAID)


def test_the_document_is_served(url: str) -> None:
    answer = httpx.get(url + "/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == document()


def test_every_route_is_in_the_document_and_the_reverse(running: Running) -> None:
    app = create_app(running.gateway)
    routes = {route.path.replace(":path}", "}") for route in app._router.routes}
    assert routes | set(app._handlers) == set(document()["paths"])


def test_every_code_is_in_the_document() -> None:
    said: set[str] = set()
    for operations in document()["paths"].values():
        for operation in operations.values():
            if isinstance(operation, dict):
                for status, response in operation["responses"].items():
                    envelope = response["content"].get("application/json", {}).get("schema", {})
                    error = envelope.get("properties", {}).get("error")
                    codes = error["properties"]["code"]["enum"] if error else []
                    assert {str(CODES[code][0]) for code in codes} <= {status}
                    said |= set(codes)
    assert said == set(CODES) - {"client_disconnected"}


@pytest.mark.parametrize("kind", PATHS)
def test_every_field_is_in_the_document_with_the_bounds_of_its_check(kind: Any) -> None:
    properties = request_schema(kind)["properties"]
    assert set(plain_request.FIELDS[kind]) <= set(properties)
    for name, check in plain_request.FIELDS[kind].items():
        said = properties[name]["anyOf"][0]
        for bound, outside in (("minimum", -1), ("maximum", 1)):
            if bound in said:
                check(name, said[bound])
                with pytest.raises(Exception, match=name):
                    check(name, said[bound] + outside)
