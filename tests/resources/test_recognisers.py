"""Personal data and secrets: what is proven, what only looks like it, and how it is masked."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import planted
from resources.keys.secret import new_id, new_token
from resources.recognisers.pii import find_pii, is_card, is_iban
from resources.recognisers.redact import mask, redact
from resources.recognisers.secrets import find_secrets, is_random
from resources.recognisers.spans import Found, without_overlap


def seen(text: str) -> list[tuple[str, str]]:
    return [(found.kind, text[found.start : found.end]) for found in find_pii(text)]


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("Mail to <anna.lind+x@uni-bonn.de>, please.", "email", "anna.lind+x@uni-bonn.de"),
        ("Paid with 378282246310005.", "card", "378282246310005"),
        ("IBAN GB82 WEST 1234 5698 7654 32 AND more", "iban", "GB82 WEST 1234 5698 7654 32"),
        ("SSN: 219-09-9998", "ssn", "219-09-9998"),
        ("Call +49 30 901820 now", "phone", "+49 30 901820"),
        ("Call (212) 664-7665.", "phone", "(212) 664-7665"),
        ("It resolves to 8.8.8.8.", "ip", "8.8.8.8"),
        ("[2001:4860:4860::8888]:443", "ip", "2001:4860:4860::8888"),
    ],
)
def test_proven_data_is_found_to_the_character(text: str, kind: str, value: str) -> None:
    assert seen(text) == [(kind, value)]


@pytest.mark.parametrize(
    "text",
    [
        "git@github.com:org/repo.git and you@example.org and icon@2x.png",
        "4556 7375 8689 9854",  # wrong check digit
        "0000 0000 0000 0000",
        "tracking number 1234567890123456",
        "GB82 WEST 1234 5698 7654 33",
        "2024-11-20 12:30:45, 666-12-3456, 078-05-1120",
        "+1 212 555 0123",  # reserved for films
        "the version 1.2.3.4, pkg==2.0.0.1, section 10.0.0.1, 192.168.0.1",
        "std::vector<a::b> fe80::1 ::1 2001:db8::1",
    ],
)
def test_what_is_nobodys_is_not_reported(text: str) -> None:
    assert seen(text) == []


def test_checksums() -> None:
    assert is_card("4556737586899855") and not is_card("4556737586899856")
    assert not is_card("9556737586899850") and not is_card("45567375868998")
    assert not is_card("4111111111111111")  # what payment services give out for tests
    assert is_iban("DE89370400440532013000") and not is_iban("DE89370400440532013001")


@given(st.integers(0, 10**9))
def test_every_single_wrong_digit_of_a_card_is_noticed(seed: int) -> None:
    rng = random.Random(seed)
    number = planted.card(rng).replace(" ", "").replace("-", "")
    assert is_card(number)
    place = rng.randrange(6, len(number))  # behind the issuer's digits
    wrong = str((int(number[place]) + rng.randint(1, 9)) % 10)
    assert not is_card(number[:place] + wrong + number[place + 1 :])


def test_a_private_key_needs_its_body() -> None:
    rng = random.Random(1)
    key = planted.private_key(rng)
    (found,) = find_secrets(f"before\n{key}\nafter")
    assert (found.kind, found.end - found.start) == ("private_key", len(key))
    in_json = '{"private_key": "' + key.replace("\n", "\\n") + '"}'
    assert [item.kind for item in find_secrets(in_json)] == ["private_key"]
    assert not find_secrets("-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----")


def test_a_key_that_was_cut_off_is_one() -> None:
    key = planted.private_key(random.Random(2))[:600]
    (found,) = find_secrets(f"before\n{key}")
    assert (found.kind, found.end) == ("private_key", len(key) + 7)
    prose = "and here you paste the Key that you were given, on one line or on several. " * 3
    assert not find_secrets(f"-----BEGIN PRIVATE KEY-----\n{prose}")


def test_our_own_keys_are_known() -> None:
    for _ in range(20):
        token = new_token(new_id())
        assert [(f.kind, f.end - f.start) for f in find_secrets(f"Bearer {token}.")] == [
            ("api_key", len(token))
        ]


def test_what_stands_before_the_start_is_only_looked_back_at() -> None:
    text = "x@8.8.8.8 and 8.8.8.8"
    assert [f.start for f in find_pii(text, 2)] == [f.start for f in find_pii(text)] == [2, 14]
    assert find_pii("version 1.2.3.4 a8.8.8.8", 17) == []


def test_examples_are_no_keys() -> None:
    assert not find_secrets("AKIAIOSFODNN7EXAMPLE ghp_" + "x" * 36 + " sk-" + "your-key-" * 5)
    assert not is_random("abababababababababababab")


def test_overlaps_leave_the_first_and_longest() -> None:
    spans = [Found("a", 5, 9), Found("b", 0, 6), Found("c", 0, 3), Found("d", 9, 10)]
    assert without_overlap(spans) == [Found("b", 0, 6), Found("d", 9, 10)]


@given(st.text(), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40))))
def test_masking_moves_nothing(text: str, places: list[tuple[int, int]]) -> None:
    spans = [Found("x", min(a, len(text)), min(a + n, len(text))) for a, n in places]
    hidden = redact(text, spans)
    assert len(hidden) == len(text)
    covered = {n for span in spans for n in range(span.start, span.end)}
    for number, (before, after) in enumerate(zip(text, hidden, strict=True)):
        assert after == (mask(before) if number in covered else before)


def test_a_mask_keeps_the_shape_alone() -> None:
    assert mask("Anna.Lind@x-1.de\n4556 7375") == "XXXX.XXXX@X-X.XX\nXXXX XXXX"


def test_hostile_texts_take_no_time() -> None:
    """No pattern may backtrack for seconds: 1 MB of what each could begin with."""
    import time

    clock = time.process_time()
    for unit in ("1", "a@", "1-", "+1 ", "1.", "AA11", "2001:", "A1" * 9, "sk-" + "a" * 30, "(1) "):
        text = unit * (1_000_000 // len(unit))
        find_pii(text)
        find_secrets(text)
    assert time.process_time() - clock < 20
