"""Prompts: strict templates, a sandbox that holds, one self-contained file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import InputError, NotFoundError
from contracts.records import Passage
from resources import prompts
from resources.prompts import Prompts, PromptVersion

GOOD = """{# why this prompt is as it is #}
{% block system %}
Answer from the passages.
{% for p in passages %}
[{{ p.n }}] {{ p.title }}{% if p.heading %} > {{ p.heading }}{% endif %}: {{ p.text }}
{% endfor %}
{% endblock %}
{% block user %}
{{ question }}
{% endblock %}
"""


def passage(n: int, text: str = "Text.") -> Passage:
    return Passage(n=n, chunk_id=f"docs:a.md#{n}-{n + 5}", path="a.md", title="A", heading="H",
                   text=text, score=0.5)  # fmt: skip


def prompt(text: str = GOOD, name: str = "answer", version: str = "v1") -> PromptVersion:
    return PromptVersion.of(name, version, text)


def folder(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "prompts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "prompts"


def test_messages_are_the_two_blocks() -> None:
    assert prompts.problems(prompt()) == []
    assert prompt().messages("Why?", [passage(1), passage(2, "More.")]) == [
        {"role": "system", "content": "Answer from the passages.\n[1] A > H: Text.\n"
                                      "[2] A > H: More."},
        {"role": "user", "content": "Why?"},
    ]  # fmt: skip


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200))
def test_values_are_never_templates(text: str) -> None:
    hostile = "{{ 7 * 7 }}{% for x in passages %}{{ x }}{% endfor %}" + text
    system, user = prompt().messages(hostile, [passage(1, hostile)])
    assert user["content"] == hostile.strip()
    assert hostile.strip() in system["content"]


@pytest.mark.parametrize(
    "attack",
    [
        "{{ question.__class__.__mro__[1].__subclasses__() }}",
        "{{ passages.append(1) }}",
        "{{ passages[0].update({}) }}",
        "{{ question.format.__globals__ }}",
        "{{ (1).__class__.__base__ }}",
        "{{ '%s' | attr('__class__') }}",
        "{{ question.encode.__self__.__class__ }}",
        "{{ passages[0]['chunk_id'] }}",  # only the five fields are shown
    ],
)
def test_the_sandbox_holds(attack: str) -> None:
    bad = prompt(GOOD.replace("Answer from the passages.", attack))
    with pytest.raises(InputError, match="does not render"):
        bad.messages("x", [passage(1)])
    assert prompts.problems(bad)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (GOOD.replace("{{ question }}", "{{ qestion }}"), "unknown variable 'qestion'"),
        (GOOD.replace("{{ question }}", "hello"), "the question is not shown"),
        (GOOD.replace("{{ p.text }}", ""), "the text of 1 is not shown"),
        (GOOD.replace("p.title", "p.titel"), "a passage has no 'titel'"),
        (GOOD.replace("p.title", "passages[0].titel"), "has no attribute 'titel'"),
        (
            GOOD.replace("{{ p.title }}", "{% if p.n > 9 %}{{ p.titel }}{% endif %}{{ p.title }}"),
            "line 5: a passage has no 'titel'",
        ),
        (GOOD.replace("Answer", "{% macro f() %}{{ f() }}{% endmacro %}"), "macros and recursive"),
        (GOOD.replace("in passages", "in passages recursive"), "macros and recursive"),
        (GOOD.replace("block user", "block usr"), "unknown block 'usr'"),
        (GOOD + "left over", "stands outside the blocks"),
        (GOOD + "{% set x = 1 %}", "stands outside the blocks"),
        ("{% extends 'x' %}" + GOOD, "extends is not allowed"),
        (GOOD.replace("Answer", "{% include 'x' %}"), "include is not allowed"),
        (GOOD.replace("Answer", "{{ range(9) }}"), "unknown variable 'range'"),
        (GOOD.replace("Answer", "{{ 1 / 0 }}"), "ZeroDivisionError"),
        (GOOD.replace("{% endfor %}", ""), "line "),
        ("", "block 'system' is missing"),
    ],
)
def test_problems_are_found_before_a_request_does(text: str, problem: str) -> None:
    assert any(problem in found for found in prompts.problems(prompt(text)))


def test_output_and_time_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    doubling = "{% for a in question %}{% for b in question %}xxxxxxxx{% endfor %}{% endfor %}"
    greedy = prompt(GOOD.replace("Answer from the passages.", doubling))
    with pytest.raises(InputError, match="more than 64000 characters"):
        greedy.messages("q" * 3000, [])
    # Renders nothing for as long as 4e8 turns take: half a minute if nobody looked at the clock.
    silent = "{% for a in question %}{% for b in question %}{% endfor %}{% endfor %}"
    for text in (silent, silent.replace("for b in question", "for b in question if b == 'x'")):
        before = time.thread_time()
        with pytest.raises(InputError, match=r"longer than 0\.05 s"):
            monkeypatch.setattr(prompts, "MAX_SECONDS", 0.05)
            prompt(GOOD.replace("Answer", text)).messages("q" * 20_000, [])
        assert time.thread_time() - before < 1.0
    monkeypatch.setattr(prompts, "MAX_SECONDS", 0.0)
    with pytest.raises(InputError, match="longer than 0 s"):
        greedy.messages("q" * 10, [])


@pytest.mark.parametrize(
    ("question", "passages", "offender"),
    [
        (5, [], "question: Input should be a valid string"),
        (None, [], "question: Input should be a valid string"),
        (b"why", [], "question: Input should be a valid string"),
        ("why", "abc", "passages: "),
        ("why", [{"n": "1", "title": "T"}], "passages.0.n: Input should be a valid integer"),
        ("why", [passage(1), passage(2).model_copy(update={"text": None})],
         "passages.1.text: Input should be a valid string"),
        ("why", [passage(1).model_copy(update={"n": "1"})], "passages.0.n: Input should be a va"),
    ],
)  # fmt: skip
def test_variables_have_types(question: Any, passages: Any, offender: str) -> None:
    """What is wrong is named, what was given is not shown: it is people's words."""
    with pytest.raises(InputError, match="another type") as error:
        prompt().messages(question, passages)
    assert any(line.startswith(offender) for line in error.value.offenders), error.value.offenders
    assert "why" not in str(error.value)


def test_the_instructions_are_the_system_message_alone() -> None:
    assert prompt().instructions == "Answer from the passages."
    assert prompt(GOOD.replace("Answer", "{{ passages[0].n }}")).instructions == ""


def test_a_folder_becomes_one_file_and_comes_back(tmp_path: Path) -> None:
    files = {
        "answer/v1.jinja2": GOOD,
        "answer/v2.jinja2": GOOD.replace("Answer", "Reply"),
        "answer/tags.yaml": "stable: v1\ncanary: v2\n",
        "title/v1.jinja2": GOOD,
        "title/tags.yaml": "stable: v1\n",
    }
    home = folder(tmp_path, files)
    loaded = prompts.load(home)
    names = [(item.name, item.version) for item in loaded.all()]
    assert names == [("answer", "v1"), ("answer", "v2"), ("title", "v1")]
    again = Prompts.from_json(json.loads(json.dumps(loaded.to_json())))
    assert again == loaded
    assert again.get("answer").version == "v1"
    assert again.get("answer", "canary") == again.get("answer", "v2")
    with pytest.raises(NotFoundError, match="no version or tag 'v3'"):
        again.get("answer", "v3")
    with pytest.raises(NotFoundError, match="known prompts: answer, title"):
        again.get("anwser")


def test_every_offender_is_listed_at_once(tmp_path: Path) -> None:
    home = folder(tmp_path, {
        "answer/v1.jinja2": GOOD + "x", "answer/V 2.jinja2": GOOD,
        "answer/tags.yaml": "stable: v9\n",
        "bare/v1.jinja2": GOOD, "empty/tags.yaml": "stable: v1\n", "odd/v1.jinja2": GOOD,
        "odd/tags.yaml": "- a\n- b\n", "twice/v1.jinja2": GOOD,
        "twice/tags.yaml": "stable: v1\nv1: v1\nlatest: v1\n",
    })  # fmt: skip
    (home / "answer" / "v3.jinja2").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError) as error:
        prompts.load(home)
    text = "\n".join(error.value.offenders)
    for words in (
        "'v1' cannot be a tag", "'latest' cannot be a tag",
        "v1.jinja2: line 11: stands outside", "'V 2' is not a name", "v3.jinja2: not UTF-8",
        "stable points at v9", "bare/tags.yaml: missing", "prompts/empty: has no version",
        "odd/tags.yaml: must map tags", "tag 'v1' is also the name of a version",
    ):  # fmt: skip
        assert words in text, words


def test_a_tampered_file_is_refused(tmp_path: Path) -> None:
    home = folder(tmp_path, {"answer/v1.jinja2": GOOD, "answer/tags.yaml": "stable: v1\n"})
    data = prompts.load(home).to_json()
    data["prompts"]["answer"]["versions"]["v1"]["text"] += " "
    with pytest.raises(InputError, match="does not have the sha256"):
        Prompts.from_json(data)
    for other in (None, [], {"format": 2}, {"format": 1}, {"format": 1, "prompts": {"a": {}}},
                  {"format": 1, "prompts": {}}):  # fmt: skip
        with pytest.raises(InputError):
            Prompts.from_json(other)
    (tmp_path / "p.json").write_text("{")
    for path in (tmp_path / "p.json", tmp_path / "missing.json"):
        with pytest.raises(InputError, match="cannot be read"):
            prompts.read(path)
    with pytest.raises(InputError, match="does not exist"):
        prompts.load(tmp_path / "nowhere")
