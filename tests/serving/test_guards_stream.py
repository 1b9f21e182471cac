"""Streams: nothing that could still be a finding goes out, however the answer was cut."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import planted
from serving.gateway.envelope import ApiError
from serving.gateway.guards.leak import GAP, LONGEST, Literals, PromptIndex, PromptParts
from serving.gateway.guards.patterns import HOLD, HoldBack, Piece, find
from serving.gateway.guards.plan import Plan
from serving.gateway.guards.policy import GuardPolicy
from serving.gateway.guards.stream import StreamGuard, Window

RNG = random.Random(3)
KEY = planted.private_key(RNG)
#: Seeded, unlike resources.keys.secret.new_token: workers of pytest-xdist have to agree on it.
TOKEN = "rk_0123456789ab." + "".join(RNG.choices(string.ascii_letters + string.digits, k=43))
#: Findings, what only begins like one, and what stands between.
ATOMS = [
    *("anna.lind@uni-bonn.de", "+49 30 901820", "(212) 664-7665", "378282246310005"),
    *("4556 7375 8689 9855", "GB82 WEST 1234 5698 7654 32", "219-09-9998", "8.8.8.8"),
    *("2001:4860:4860::8888", TOKEN, KEY, KEY[:300], KEY[:700]),
    *("-----BEGIN ", "RSA ", "PRIVATE KEY-----", "-----END PRIVATE KEY-----", "-----", "-"),
    *(" ", "  ", "\n", ". ", ", ", "the ", "A", "X1", "12 ", "1.2", "(", "+", ":", "@", "é"),
    *("日本", "version ", "z" * 700, "1" * 600, "HELLO WORLD "),
]
TEXTS = st.lists(st.sampled_from(ATOMS), max_size=25).map("".join)
PROMPT = (
    "the quick brown fox jumps over the lazy dog and the quick red fox sleeps while the dog eats "
    "all the food of the other brown animals near here"
)
WORDS = PROMPT.split()


def cut(text: str, places: Iterable[int]) -> list[str]:
    """The text in pieces."""
    ends = [*sorted({min(place, len(text)) for place in places}), len(text)]
    return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def through(window: Window, parts: Sequence[str], bound: int) -> str:
    """What a guard that redacts everything lets out; checks that no character is lost."""
    pieces: list[Piece] = []
    for part in parts:
        pieces += window.feed(part)
        assert window.held <= bound
    pieces += window.close()
    assert window.held == 0
    assert "".join(piece.text for piece in pieces) == "".join(parts)
    return shown(pieces)


def shown(pieces: Iterable[Piece]) -> str:
    return "".join("" if p.again else f"[{p.kind}]" if p.kind else p.text for p in pieces)


def redacted(text: str) -> str:
    """The guard of the whole text, by the recognisers alone."""
    parts, done = [], 0
    for span in find(text):
        parts += [text[done : span.start], f"[{span.kind}]"]
        done = span.end
    return "".join([*parts, text[done:]])


@settings(deadline=None)  # of wall time: the machine may be busy
@given(TEXTS, st.lists(st.integers(0, 3000), max_size=12))
def test_any_split_lets_out_what_the_whole_text_does(text: str, places: list[int]) -> None:
    expected = redacted(text)
    assert through(HoldBack(), cut(text, places), HOLD) == expected
    assert through(HoldBack(), [text], HOLD) == expected
    if len(text) < 1500:
        assert through(HoldBack(), list(text), HOLD) == expected


@settings(deadline=None)
@given(st.text(max_size=300), st.lists(st.integers(0, 300), max_size=8))
def test_any_text_at_all(text: str, places: list[int]) -> None:
    assert through(HoldBack(), cut(text, places), HOLD) == redacted(text)


@pytest.mark.parametrize("value", ATOMS[:10])
def test_a_finding_cut_at_every_place_stays_in(value: str) -> None:
    text = f"It is {value}, as you know."
    for place in range(len(text)):
        out = through(HoldBack(), cut(text, [place]), HOLD)
        assert value not in out and out.startswith("It is [") and out.endswith("], as you know.")


def test_prose_waits_for_a_word_only() -> None:
    hold, most = HoldBack(), 0
    for sign in "Answers arrive word by word, and in 2024 nobody wants to wait for them. " * 9:
        hold.feed(sign)
        most = max(most, hold.held)
    assert most <= 12


def test_a_key_without_an_end_hides_what_follows_it() -> None:
    hold = HoldBack()
    out = shown([*hold.feed(f"Here: {KEY[:700]}"), *hold.feed("\nmore of it " * 50)])
    assert out == "Here: [private_key]" and hold.held < HOLD
    assert shown([*hold.feed("- done"), *hold.close()]) == "- done"


PARTS = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 27), st.integers(1, 14), st.sampled_from([" ", ", ", "  ", "\n"]))
        .map(lambda at: at[2].join(WORDS[at[0] : at[0] + at[1]])),
        st.sampled_from(["w" * 99, " hello ", "The Quick  brown", " " * 50, ".", "é", "x"]),
    ),
    max_size=12,
).map(" ".join)  # fmt: skip


@settings(deadline=None)
@given(PARTS, st.lists(st.integers(0, 900), max_size=8))
def test_the_system_prompt_stays_in_however_it_is_cut(text: str, places: list[int]) -> None:
    index = PromptIndex()([PROMPT])
    bound = 7 * (LONGEST + GAP)
    whole = through(PromptParts(index, 7), [text], bound)
    assert through(PromptParts(index, 7), list(text), bound) == whole
    assert through(PromptParts(index, 7), cut(text, places), bound) == whole
    kept = whole.lower().replace("[system_prompt]", "|")
    for start in range(len(WORDS) - 6):  # by another way: no seven words of it are left
        run = r"\W{1,32}".join(WORDS[start : start + 7])
        assert not re.search(rf"(?<!\w){run}(?!\w)", kept)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["canary", "-one", "one-kanary", "z", "canary-on", " "]), max_size=12),
    st.lists(st.integers(0, 90), max_size=6),
)
def test_canaries(parts: list[str], places: list[int]) -> None:
    strings, text = ("canary-one", "one-kanary", "zcanary-onz"), "".join(parts)
    expected = re.sub("|".join(strings), "[canary]", text)
    assert through(Literals(strings), cut(text, places), 11) == expected
    assert through(Literals(strings), list(text), 11) == expected


def guard_of(pii: dict[str, str]) -> StreamGuard:
    part = Plan(GuardPolicy.model_validate({"output": {"pii": pii}})).output
    assert part
    return StreamGuard([HoldBack()], part.rules)


def test_placeholders_are_numbered_by_value() -> None:
    guard = guard_of({"action": "redact"})
    out = "".join(map(guard.feed, "a.b@uni-bonn.de, c.d@uni-bonn.de and a.b@uni-bonn.de."))
    assert out + guard.close() == "[EMAIL_1], [EMAIL_2] and [EMAIL_1]."
    assert [(f.kind, f.start) for f in guard.verdict.findings] == [
        ("email", 0), ("email", 17), ("email", 37),
    ]  # fmt: skip
    assert guard.verdict.action == "redact" and "uni-bonn" not in str(guard.verdict.record())


def test_a_blocking_guard_ends_the_stream_before_the_finding() -> None:
    guard, out = guard_of({"action": "block"}), ""
    with pytest.raises(ApiError) as raised:
        for sign in "Write to a.b@uni-bonn.de today":
            out += guard.feed(sign)
    assert raised.value.code == "output_blocked" and out == "Write to "
    assert guard.verdict.action == "block" and guard.verdict.error is raised.value


def test_a_guard_that_only_looks_holds_nothing_back() -> None:
    for guard in (guard_of({"mode": "observe"}), guard_of({"action": "flag"})):
        text = "Write to a.b@uni-bonn.de"
        assert [guard.feed(sign) for sign in text] == list(text)
        assert guard.close() == "" and guard.held == 0 and not guard.changes
        assert [f.kind for f in guard.verdict.findings] == ["email"]
        assert guard.verdict.action == "flag"
