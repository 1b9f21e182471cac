"""The dashboard and the alert rules ask for what the code exports, names and labels alike."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from contracts.settings import ROOT
from serving.gateway.metrics import Metrics

FOLDER = ROOT / "serving" / "gateway" / "dashboards"
#: What Prometheus adds to every series of a scrape.
SCRAPED = {"job", "instance"}
WORDS = {"sum", "min", "max", "by", "rate", "increase", "histogram_quantile", "offset"}
_SELECTOR = re.compile(r'\{((?:\s*[a-z_]+\s*(?:=~|!~|!=|=)\s*"[^"]*"\s*,?)*)\}')
#: \$ is Grafana's.
_WORD = re.compile(r"\$?[A-Za-z_][A-Za-z0-9_:]*")


def exported() -> dict[str, set[str]]:
    """Series name -> its labels, as a scrape of a new gateway would show them."""
    found: dict[str, set[str]] = {}
    for metric in Metrics().registry._collector_to_names:
        name, kind = metric._name, metric._type  # type: ignore[attr-defined]
        labels = set(metric._labelnames)  # type: ignore[attr-defined]
        if kind == "counter":
            found[f"{name}_total"] = labels
        elif kind == "histogram":
            found |= {f"{name}_sum": labels, f"{name}_count": labels}
            found[f"{name}_bucket"] = labels | {"le"}
        else:
            found[name] = labels
    return found


def problems(expression: str, known: dict[str, set[str]]) -> list[str]:
    """What an expression asks for and nobody exports."""
    wrong = []
    if expression.count("(") != expression.count(")"):
        wrong.append("its brackets do not match")
    labels = {word for inner in _SELECTOR.findall(expression)
              for word in re.findall(r"([a-z_]+)\s*[=!]", inner)}  # fmt: skip
    rest = _SELECTOR.sub("", expression)
    for inner in re.findall(r"\bby\s*\(([^)]*)\)", rest):
        labels |= {word.strip() for word in inner.split(",")}
    rest = re.sub(r"\bby\s*\([^)]*\)", "", rest)
    rest = re.sub(r"\[[^\]]*\]|\b\d+(?:\.\d+)?[smhd]?\b", "", rest)
    names = {word for word in _WORD.findall(rest) if word not in WORDS}
    wrong += [f"there is no {name}" for name in sorted(names - set(known))]
    if not names & set(known):
        wrong.append("it asks for nothing")
    allowed = set.union(SCRAPED, *(known.get(name, set()) for name in names))
    wrong += [f"no label {label}" for label in sorted(labels - allowed)]
    return wrong


def board() -> dict[str, Any]:
    value: dict[str, Any] = json.loads((FOLDER / "gateway.json").read_text())
    return value


def rules() -> list[dict[str, Any]]:
    value = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
    assert set(value) == {"groups"}
    return [rule for group in value["groups"] for rule in group["rules"]]


def test_the_dashboard_asks_for_what_is_exported() -> None:
    known = exported()
    wrong, asked = [], set()
    for panel in board()["panels"]:
        for target in panel.get("targets", []):
            wrong += [f"{panel['title']}: {what}" for what in problems(target["expr"], known)]
            asked |= set(_WORD.findall(target["expr"])) & set(known)
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                if not re.search(rf"by \([^)]*\b{label}\b", target["expr"]):
                    name = next(n for n in known if n in target["expr"])
                    if "sum" in target["expr"] or label not in known[name]:
                        wrong.append(f"{panel['title']}: {label} is not in its result")
    assert wrong == []
    assert len(asked) > 40


def test_the_dashboard_has_the_form_that_grafana_reads() -> None:
    value = board()
    ids = [panel["id"] for panel in value["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in value["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["targets"] and panel["datasource"] == {
                "type": "prometheus", "uid": "${datasource}"}  # fmt: skip
    names = {variable["name"] for variable in value["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(value["panels"])))
    assert used - {"__rate_interval"} == names


def test_the_alert_rules_are_rules_about_what_is_exported() -> None:
    known = exported()
    wrong, names = [], []
    for rule in rules():
        names.append(rule["alert"])
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}, rule["alert"]
        assert re.fullmatch(r"\d+[smhd]", rule.get("for", "0s"))
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert re.search(r"[<>=]", _SELECTOR.sub("", rule["expr"])), rule["alert"]
        wrong += [f"{rule['alert']}: {what}" for what in problems(rule["expr"], known)]
        for label in re.findall(r"\$labels\.(\w+)", str(rule["annotations"])):
            if not re.search(rf"by \([^)]*\b{label}\b", rule["expr"]):
                wrong.append(f"{rule['alert']}: {label} is not in its result")
    assert wrong == []
    assert len(set(names)) == len(names) > 10
    guide = (ROOT / "docs" / "telemetry.md").read_text()
    assert [name for name in names if name not in guide] == []


@pytest.mark.parametrize(
    ("expression", "what"),
    [
        ("rate(ratchet_gateway_request_total[5m])", "there is no ratchet_gateway_request_total"),
        ("sum by (tenant) (rate(ratchet_gateway_requests_total[5m]))", "no label tenant"),
        ('ratchet_gateway_ready{channel="x"}', "no label channel"),
        ("sum(rate(ratchet_gateway_requests_total[5m])", "its brackets do not match"),
        ("sum(1)", "it asks for nothing"),
        ("ratchet_gateway_request_seconds", "there is no ratchet_gateway_request_seconds"),
    ],
)
def test_the_check_can_fail(expression: str, what: str) -> None:
    assert what in problems(expression, exported())


def test_the_files_lie_where_the_guide_says() -> None:
    guide = Path(ROOT / "docs" / "telemetry.md").read_text()
    assert all(f"serving/gateway/dashboards/{path.name}" in guide for path in FOLDER.iterdir())
