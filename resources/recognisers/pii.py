"""pii: personal data in a text, found by pattern and then checked by what its own rules allow.

In: a text. Out: spans by kind. A pattern alone condemns version numbers, hashes and examples, so
each kind is proven: Luhn and issuer for cards, mod 97 and length for IBANs, assigned ranges for US
social security numbers, calling codes for phones, public unicast ranges for addresses. Numbers
that are reserved for examples (RFC 2606, 555-01xx, 078-05-1120) are no one's and are not reported.
Names and street addresses are not looked for: that takes a model, and finds half.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from resources.recognisers.spans import Found, without_overlap

EMAIL = re.compile(
    r"(?<![\w.%+/:=-])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"
)
#: RFC 2606 and RFC 6761, and the endings of files whose names hold an @ ("logo@2x.png").
NO_DOMAIN = re.compile(
    r"(?:^|\.)(?:example(?:\.\w+)?|test|invalid|localhost|local|internal|"
    r"png|jpe?g|gif|svg|webp|css|js|py|whl|json|ya?ml)$"
)
NO_ONE = {"git", "hg", "user", "username", "noreply", "no-reply"}

#: Every span has one of these.
SUSPECT = re.compile(r"[@0-9]")
#: Where cards, social security and phone numbers and IPv4 addresses can be.
ZONE = re.compile(r"[+(0-9][0-9 .()-]{5,}")
COLONS = re.compile(r":(?::|[0-9A-Fa-f]{1,4}:)")

CARD = re.compile(
    r"(?<![\w.+/=-])(?:[0-9]{4}([ -]?)(?:[0-9]{4}\1){2}[0-9]{1,7}"
    r"|[0-9]{4}([ -]?)[0-9]{6}\2[0-9]{5})(?![\w]|[.-][0-9])"
)
#: Issuer ranges in use, by their first digits: Visa, Mastercard, Amex, Discover, JCB, Diners,
#: UnionPay; each with the lengths that it issues.
ISSUERS = (
    (re.compile(r"4"), {13, 16, 19}),
    (re.compile(r"5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720"), {16}),
    (re.compile(r"3[47]"), {15}),
    (re.compile(r"6011|64[4-9]|65"), {16, 19}),
    (re.compile(r"35(?:2[89]|[3-8])"), {16, 19}),
    (re.compile(r"30[0-5]|309|3[689]"), {14, 16, 19}),
    (re.compile(r"62"), {16, 17, 18, 19}),
)

IBAN = re.compile(
    r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])"
)
#: Characters of an IBAN, by country (SWIFT's IBAN registry).
IBAN_LENGTHS = {
    country: length
    for length, countries in {
        15: "NO",
        16: "BE",
        18: "DK FI FO GL NL SD",
        19: "MK SI",
        20: "AT BA EE KZ LT LU MN XK",
        21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA",
        23: "AE GI IL IQ OM SO TL",
        24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST",
        26: "IS TR",
        27: "BI DJ FR GR IT MC MR SM",
        28: "AL AZ BY CY DO GT HU LB NI PL SV",
        29: "BR EG PS QA UA",
        30: "JO KW MU YE",
        31: "MT SC",
        32: "LC",
        33: "RU",
    }.items()
    for country in countries.split()
}

SSN = re.compile(r"(?<![\w.+-])([0-9]{3})-([0-9]{2})-([0-9]{4})(?![\w]|[.-][0-9])")
#: Printed on a wallet's sample card, in an advertisement, and in every second tutorial.
SSN_EXAMPLES = {"078-05-1120", "219-09-9999", "123-45-6789", "111-11-1111"}

PHONE = re.compile(
    r"(?<![\w.+/=-])(?:\+1[ .-]?(?:\([0-9]{3}\)|[0-9]{3})[ .-]?[0-9]{3}[ .-]?[0-9]{4}"
    r"|\+[2-9][0-9]{0,2}[ .-]?(?:\([0-9]{1,4}\)[ .-]?)?[0-9]{1,4}(?:[ .-]?[0-9]{2,5}){1,5}"
    r"|\([0-9]{3}\) ?[0-9]{3}-[0-9]{4}|[0-9]{3}-[0-9]{3}-[0-9]{4})(?![\w]|[.-][0-9])"
)
NORTH_AMERICA = re.compile(r"[2-9](?!11)[0-9]{2}[2-9](?!11)[0-9]{2}[0-9]{4}")
EXAMPLE_LINE = re.compile(r"[0-9]{3}55501[0-9]{2}")
#: Country calling codes (ITU-T E.164): one digit, two digits; three-digit codes begin with these.
CODES = re.compile(
    r"1|7|20|27|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|"
    r"21[12368]|2[2-6][0-9]|29[0178]|35[0-9]|37[0-9]|38[0-35-79]|42[013]|50[0-9]|59[0-9]|67[0-9]|68[0-9]|69[0-2]|"
    r"85[02356]|88[06]|96[0-9]|97[0-7]|99[2-68]"
)

IPV4 = re.compile(r"(?<![\w.+/=-])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![\w]|[.-]\w)")
VERSION = re.compile(r"(?:version|release|\bv|[=~<>!]=)[ \t]*$", re.IGNORECASE)
IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,35}(?![\w:])")


def find_pii(text: str, start: int = 0) -> list[Found]:
    """Every proven span from ``start`` on, in order; of two that overlap the first and longest.

    What stands before ``start`` is looked back at and nothing more.
    """
    if not SUSPECT.search(text, start):  # most prose: 2 of 10 us
        return []
    spans: list[Found] = []
    if "@" in text:
        spans += _emails(text, start)
    spans += _ibans(text, start)
    for zone in ZONE.finditer(text, start):  # one pass instead of four: a third of the time
        window = (zone.start(), zone.end() + 2)
        spans += _cards(text, *window)
        spans += _ssns(text, *window)
        spans += _phones(text, *window)
        spans += _ipv4(text, *window)
    if COLONS.search(text):
        spans += _ipv6(text, start)
    return without_overlap(spans)


def _emails(text: str, start: int) -> Iterator[Found]:
    for match in EMAIL.finditer(text, start):
        name, _, domain = match.group().lower().partition("@")
        if name in NO_ONE or NO_DOMAIN.search(domain) or ".." in name or name.endswith("."):
            continue
        yield Found("email", match.start(), match.end())


def _cards(text: str, start: int, end: int) -> Iterator[Found]:
    for match in CARD.finditer(text, start, end):
        digits = re.sub(r"\D", "", match.group())
        if is_card(digits):
            yield Found("card", match.start(), match.end())


def is_card(digits: str) -> bool:
    """Whether an issuer gives out numbers like this one, its check digit (Luhn) included.

    Numbers of two different digits are those that payment services give out for tests.
    """
    known = any(len(digits) in lengths and at.match(digits) for at, lengths in ISSUERS)
    if not known or len(set(digits)) < 3 or digits.endswith("0" * 10):
        return False
    doubled = [int(digit) * (2 if place % 2 else 1) for place, digit in enumerate(digits[::-1])]
    return sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


def _ibans(text: str, start: int) -> Iterator[Found]:
    for match in IBAN.finditer(text, start):
        length = IBAN_LENGTHS.get(match.group()[:2])
        if length is None:
            continue
        end, seen = match.start(), 0
        while end < match.end() and seen < length:  # the next word may have been taken along
            seen += text[end] != " "
            end += 1
        whole = end == match.end() or text[end] == " "
        if seen == length and whole and is_iban(text[match.start() : end].replace(" ", "")):
            yield Found("iban", match.start(), end)


def is_iban(value: str) -> bool:
    """Whether the check digits fit (ISO 7064, mod 97 is 1)."""
    turned = value[4:] + value[:4]
    return int("".join(str(int(character, 36)) for character in turned)) % 97 == 1


def _ssns(text: str, start: int, end: int) -> Iterator[Found]:
    for match in SSN.finditer(text, start, end):
        area, group, serial = match.groups()
        given = area not in ("000", "666") and area[0] != "9" and group != "00" and serial != "0000"
        if given and match.group() not in SSN_EXAMPLES:
            yield Found("ssn", match.start(), match.end())


def _phones(text: str, start: int, end: int) -> Iterator[Found]:
    for match in PHONE.finditer(text, start, end):
        digits = re.sub(r"\D", "", match.group())
        if match.group().startswith("+"):
            given = 8 <= len(digits) <= 15 and bool(CODES.match(digits)) and len(set(digits)) > 2
            national = digits[1:] if digits.startswith("1") else ""
        else:
            given, national = True, digits
        if national and not NORTH_AMERICA.fullmatch(national):
            continue
        if given and not EXAMPLE_LINE.fullmatch(national):
            yield Found("phone", match.start(), match.end())


def _ipv4(text: str, start: int, end: int) -> Iterator[Found]:
    """Public addresses; four numbers after "version" or ">=" are a version."""
    for match in IPV4.finditer(text, start, end):
        if VERSION.search(text[max(0, match.start() - 12) : match.start()]):
            continue
        if _is_public(match.group()):
            yield Found("ip", match.start(), match.end())


def _ipv6(text: str, start: int) -> Iterator[Found]:
    for match in IPV6.finditer(text, start):
        if _is_public(match.group()):
            yield Found("ip", match.start(), match.end())


def _is_public(value: str) -> bool:
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        return False
    return address.is_global and not address.is_multicast
