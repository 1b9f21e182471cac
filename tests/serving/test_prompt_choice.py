"""Prompt experiments: sticky, weighted, moving as little as possible; rendering leaves the loop."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import pytest
from pydantic import ValidationError

from contracts.errors import InputError
from contracts.settings import Settings
from resources import prompts
from resources.prompts import Prompts, PromptVersion
from serving.gateway.config import GatewayConfig
from serving.gateway.prompt_choice import Plan, PromptChooser, plan
from tests.serving.factory import TEMPLATE

SECRET = b"s" * 32
VERSIONS = {
    name: PromptVersion.of("answer", name, TEMPLATE.replace("MARK", name))
    for name in ("v1", "v2", "v3")
}
HELD = Prompts({"answer": VERSIONS}, {"answer": {"stable": "v1", "canary": "v2"}})
PASSED = {version.sha256 for version in VERSIONS.values()}
SESSIONS = [f"session-{n}" for n in range(10_000)]


def planned(weights: dict[str, float], secret: bytes = SECRET, held: Prompts = HELD) -> Plan:
    return plan({"answer": weights}, held, VERSIONS["v1"], secret, PASSED)


def assigned(found: Plan, tenant: str = "acme") -> list[str]:
    return [found.choose(tenant, session, "resp").prompt.version for session in SESSIONS]


def test_without_an_experiment_the_releases_own_prompt_is_used() -> None:
    choice = plan({}, HELD, VERSIONS["v3"], SECRET, ()).choose("acme", "s", "resp")
    assert (choice.version, choice.experiment) == ("answer/v3", "")


def test_shares_follow_weights_and_a_session_stays() -> None:
    """10,000 sessions at 10 %: the standard deviation is 30."""
    first = assigned(planned({"stable": 90, "canary": 10}))
    assert abs(Counter(first)["v2"] - 1000) < 120
    assert first == assigned(planned({"canary": 1, "stable": 9}))  # another process, same shares
    other_key = assigned(planned({"stable": 90, "canary": 10}, b"t" * 32))
    assert other_key != first and abs(Counter(other_key)["v2"] - 1000) < 120
    assert assigned(planned({"stable": 90, "canary": 10}), "other tenant") != first


def test_other_weights_move_only_what_they_must() -> None:
    before = assigned(planned({"stable": 90, "canary": 10}))
    after = assigned(planned({"stable": 80, "canary": 20}))
    moved = Counter((a, b) for a, b in zip(before, after, strict=True) if a != b)
    assert set(moved) == {("v1", "v2")}
    assert abs(moved["v1", "v2"] - 1000) < 120  # the share grew by a tenth
    third = assigned(planned({"stable": 80, "canary": 20, "v3": 25}))
    assert {b for a, b in zip(after, third, strict=True) if a != b} == {"v3"}


def test_whoever_was_in_the_canary_stays_with_it_when_it_becomes_stable() -> None:
    before = assigned(planned({"stable": 90, "canary": 10}))
    promoted = Prompts({"answer": VERSIONS}, {"answer": {"stable": "v2", "canary": "v1"}})
    after = assigned(planned({"stable": 90, "canary": 10}, held=promoted))
    assert {b for a, b in zip(before, after, strict=True) if a == "v2"} == {"v2"}


def test_without_a_session_each_request_is_drawn() -> None:
    found = planned({"stable": 50, "canary": 50})
    drawn = [found.choose("acme", "", f"resp-{n}").version for n in range(200)]
    assert 70 < Counter(drawn)["answer/v1"] < 130
    assert found.choose("acme", "x", "r").prompt is found.choose("acme", "x", "q").prompt


def test_tags_are_versions_and_weights_of_the_same_version_add_up() -> None:
    tagged = planned({"stable": 40, "v1": 40, "canary": 20, "v3": 0})
    named = planned({"v2": 20, "v1": 80})
    assert tagged.experiment == named.experiment and tagged.experiment.startswith("answer@")
    assert assigned(tagged) == assigned(named)
    assert planned({"v2": 21, "v1": 80}).experiment != named.experiment


@pytest.mark.parametrize(
    ("experiments", "problem"),
    [
        (
            {"answer": {"stable": 9, "canry": 1}},
            "no version or tag 'canry'. (known: canary, stable",
        ),
        ({"answer": {"v9": 1}}, "prompts.answer.v9"),
        ({"answr": {"stable": 1}}, "prompts.answr: this release renders 'answer'"),
        ({"answr": {"v1": 1}, "answer": {"v9": 1, "v8": 1}}, "v8"),
    ],
)
def test_what_the_release_does_not_hold_is_not_tried(
    experiments: dict[str, dict[str, float]], problem: str
) -> None:
    found = plan(experiments, HELD, VERSIONS["v1"], SECRET, PASSED)
    assert found.problem is not None and problem in found.problem
    assert {*assigned(found)} == {"v1"} and not found.experiment


def test_a_version_that_no_gate_judged_with_this_model_is_not_tried() -> None:
    experiments = {"answer": {"stable": 1, "canary": 1}}
    passed = [VERSIONS["v3"].sha256, "another text of v2"]
    found = plan(experiments, HELD, VERSIONS["v1"], SECRET, passed)
    assert found.problem is not None
    assert "prompts.answer.canary: v2 has not passed the gate" in found.problem
    assert {*assigned(found)} == {"v1"} and not found.experiment


@pytest.mark.parametrize(
    "block",
    [
        {"answer": {}}, {"answer": {"stable": 0}}, {"answer": {"stable": -1}},
        {"answer": {"stable": float("inf")}}, {"answer": {"../x": 1}}, {"../x": {"stable": 1}},
        {"answer": "v2"}, {"answer": {"stable": "much"}},
    ],
)  # fmt: skip
def test_the_block_is_closed(block: Any) -> None:
    with pytest.raises(ValidationError, match="prompts"):
        GatewayConfig.model_validate({"prompts": block})


def test_a_looping_template_is_ended_and_the_event_loop_goes_on() -> None:
    """Rendered on the loop, no beat would fall into the MAX_SECONDS. The best of three: another
    process may have the cores for a while, a blocked loop would be blocked every time."""
    loops = "{% for a in question %}{% for b in question %}{% endfor %}{% endfor %}"
    greedy = PromptVersion.of("answer", "v1", TEMPLATE.replace("MARK", loops))
    assert prompts.problems(greedy) == []  # nothing shows with a short question

    async def longest_gap() -> float:
        chooser, gaps = PromptChooser(SECRET, Settings.from_env()), [0.0]
        rendering = asyncio.create_task(chooser.render(greedy, "q" * 20_000, []))
        while not rendering.done():
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            gaps.append(time.perf_counter() - before)
        chooser.close()
        with pytest.raises(InputError, match="longer than"):
            rendering.result()
        return max(gaps)

    assert any(asyncio.run(longest_gap()) < 0.05 for _ in range(3))
