"""Defects planted into prose that nobody here wrote, each with look-alikes that are no defect.

In: a seeded generator and the descriptions of the installed packages. Out: cases, that is texts
that hold a defect and texts that only look like it. benchmarks/defects.py measures precision and
recall on them, tests/stages/test_defect_classes.py holds them to floors.
"""

from __future__ import annotations

import base64
import random
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distributions

PIECE = 2000  # characters of a text


CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Case:
    text: str
    defect: bool
    what: str = ""  # the planted string, or what the look-alike is


@cache
def prose() -> tuple[str, ...]:
    """Pieces of about 2,000 characters of every installed package's description that are prose:
    mostly letters. Descriptions hold rulers, tables of blanks and control characters as well, which
    are the very defects that are planted."""
    texts = {
        str(item.metadata["Name"]).lower(): (item.read_text("METADATA") or "").partition("\n\n")[2]
        for item in distributions()
    }
    pieces = []
    for _, text in sorted(texts.items()):
        for start in range(0, len(text) - PIECE // 2, PIECE):
            piece = text[start : start + PIECE]
            if 2 * sum(map(str.isalpha, piece)) >= len(piece) and not CONTROL.search(piece):
                pieces.append(piece)
    return tuple(dict.fromkeys(pieces))


def sample(rng: random.Random, count: int) -> list[str]:
    return rng.sample(list(prose()), count)


def inserted(rng: random.Random, text: str, value: str) -> str:
    """``value`` between two words of the text."""
    words = text.split(" ")
    place = rng.randrange(len(words))
    return " ".join([*words[:place], value, *words[place:]])


TYPOGRAPHY = {"'": "’", '"': "“", " - ": " – ", "...": "…", "(c)": "©"}
NAMES = ("Müller", "Łukasz", "François", "Søren", "Åse", "naïve", "Gödel", "café", "über", "Peña")
WRONG = ("cp1252", "latin-1", "cp1250", "cp437", "mac-roman")


def mojibake(rng: random.Random, count: int) -> list[Case]:
    """Typographic text decoded wrongly; the same text decoded rightly is no defect."""
    cases = []
    for text in sample(rng, 2 * count):
        for plain, typographic in TYPOGRAPHY.items():
            text = text.replace(plain, typographic)
        for _ in range(rng.randint(3, 8)):
            text = inserted(rng, text, rng.choice(NAMES))
        cases.append(Case(text, False, "rightly decoded"))
        if len(cases) <= count:
            wrong = rng.choice(WRONG)
            broken = "".join(_decoded(byte, wrong) for byte in text.encode())
            cases[-1] = Case(broken, True, wrong)
    return cases


def _decoded(byte: int, encoding: str) -> str:
    """One byte read as that encoding; where it has no such byte, as browsers do, a C1 control."""
    try:
        return bytes([byte]).decode(encoding)
    except UnicodeDecodeError:
        return chr(byte)


def noise(rng: random.Random, count: int) -> list[Case]:
    """Control characters, rulers, one sentence over and over; untouched prose is no defect."""
    cases = []
    for number, text in enumerate(sample(rng, count)):
        kind = number % 4
        if kind == 0:
            signs = list(text)
            for place in rng.sample(range(len(signs)), rng.randint(10, 80)):
                signs[place] = chr(rng.choice((0, 1, 2, 7, 0x1B, 0x8F, 0xFFFD)))
            cases.append(Case("".join(signs), True, "control"))
        elif kind == 1:
            cases.append(Case(rng.choice("=-*_.#") * rng.randint(200, 2000), True, "ruler"))
        elif kind == 2:
            cases.append(Case((text[:60] + "\n") * rng.randint(60, 200), True, "loop"))
        else:
            cases.append(Case("0 " * rng.randint(200, 3000), True, "zeros"))
    return cases + [Case(text, False, "prose") for text in sample(rng, count)]


def edited(rng: random.Random, text: str, words: int) -> str:
    """The text with so many words replaced by others of its own."""
    parts = text.split(" ")
    for place in rng.sample(range(len(parts)), min(words, len(parts))):
        parts[place] = rng.choice(parts)[::-1] + "x"
    return " ".join(parts)


# Sentences written for this file, one language a line.
FOREIGN = {
    "de": "Das Programm liest zuerst die Einstellungen und prüft danach jede Datei im Ordner. "
    "Fehlt eine Angabe, so bricht es mit einer verständlichen Meldung ab.",
    "fr": "Le programme lit d'abord les réglages, puis il vérifie chaque fichier du dossier. "
    "Lorsqu'une valeur manque, il s'arrête et explique ce qu'il faut corriger.",
    "es": "El programa lee primero los ajustes y después comprueba cada archivo de la carpeta. "
    "Cuando falta un valor, se detiene y explica lo que hay que corregir.",
    "it": "Il programma legge prima le impostazioni e poi controlla ogni file della cartella. "
    "Quando manca un valore, si ferma e spiega che cosa bisogna correggere.",
    "pt": "O programa lê primeiro as configurações e depois verifica cada ficheiro da pasta. "
    "Quando falta um valor, ele para e explica o que é preciso corrigir.",
    "nl": "Het programma leest eerst de instellingen en controleert daarna elk bestand in de map. "
    "Als er een waarde ontbreekt, stopt het en legt het uit wat er moet gebeuren.",
}

NOTICE = (
    "This file is part of the product and is provided without any warranty whatsoever.\n"
    "Permission to use it is granted to everyone who keeps this notice in all the copies.\n"
    "Please send questions about this notice to the people who maintain the distribution.\n"
    "Navigation: overview of the project, installation guide, reference pages, changes.\n"
)


def digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.digits, k=count))


def with_luhn(body: str) -> str:
    """``body`` and its check digit."""
    doubled = [int(c) * (2 if n % 2 == 0 else 1) for n, c in enumerate(body[::-1])]
    return body + str(-sum(v - 9 if v > 9 else v for v in doubled) % 10)


def card(rng: random.Random) -> str:
    start, length = rng.choice((("4", 16), ("51", 16), ("55", 16), ("2300", 16), ("37", 15)))
    number = with_luhn(start + digits(rng, length - len(start) - 1))
    gap = rng.choice(("", " ", "-"))
    if length == 15:
        return gap.join((number[:4], number[4:10], number[10:]))
    return gap.join(number[n : n + 4] for n in range(0, 16, 4))


def no_card(rng: random.Random) -> str:
    number = with_luhn("4" + digits(rng, 14))
    wrong = number[:-1] + str((int(number[-1]) + rng.randint(1, 9)) % 10)
    return rng.choice((wrong, f"0x{number}", f"978{digits(rng, 10)}", f"1.{number}", f"a{number}"))


def iban(rng: random.Random) -> str:
    country, length = rng.choice((("DE", 22), ("FR", 27), ("ES", 24), ("NL", 18), ("GB", 22)))
    letters = "".join(rng.choices(string.ascii_uppercase, k=4)) if country in ("NL", "GB") else ""
    body = letters + digits(rng, length - 4 - len(letters))
    number = "".join(str(int(c, 36)) for c in f"{body}{country}00")
    value = f"{country}{98 - int(number) % 97:02d}{body}"
    if rng.random() < 0.5:
        return value
    return " ".join(value[n : n + 4] for n in range(0, len(value), 4))


def no_iban(rng: random.Random) -> str:
    value = iban(rng)
    wrong = value[:2] + f"{(int(value[2:4]) + 1) % 100:02d}" + value[4:]
    return rng.choice((wrong, f"XX{value[2:]}", f"AB{digits(rng, 14)}"))


def ssn(rng: random.Random) -> str:
    area = rng.choice([n for n in range(1, 900) if n != 666])
    return f"{area:03d}-{rng.randint(1, 99):02d}-{rng.randint(1, 9999):04d}"


def no_ssn(rng: random.Random) -> str:
    return rng.choice(
        (
            f"000-12-{digits(rng, 4)}",
            f"9{digits(rng, 2)}-12-3456",
            f"666-45-{digits(rng, 4)}",
            "078-05-1120",
            f"{digits(rng, 4)}-{digits(rng, 2)}-{digits(rng, 4)}",
            f"abc-{ssn(rng)}",
        )
    )


def phone(rng: random.Random) -> str:
    area, first = rng.randint(211, 989), rng.randint(212, 989)
    while area % 100 == 11 or first % 100 == 11 or first == 555:
        area, first = rng.randint(211, 989), rng.randint(212, 989)
    line = digits(rng, 4)
    return rng.choice(
        (
            f"+1 {area} {first} {line}",
            f"({area}) {first}-{line}",
            f"+1-{area}-{first}-{line}",
            f"+49 30 {rng.randint(2, 9)}{digits(rng, 6)}",
            f"+44 20 7{digits(rng, 3)} {digits(rng, 4)}",
            f"+33 {rng.randint(1, 7)} {digits(rng, 2)} {digits(rng, 2)} 4{digits(rng, 1)} 95",
        )
    )


def no_phone(rng: random.Random) -> str:
    return rng.choice(
        (
            f"20{digits(rng, 2)}-{rng.randint(10, 12)}-{rng.randint(10, 28)}",
            "+1 212 555 0142",
            f"v{digits(rng, 2)}.{digits(rng, 3)}.{digits(rng, 4)}",
            f"+{digits(rng, 4)}",
            f"#{digits(rng, 3)}-{digits(rng, 3)}-{digits(rng, 4)}0",
            f"1+{digits(rng, 6)}",
            f"{digits(rng, 10)}",
        )
    )


def email(rng: random.Random) -> str:
    names = ("anna.lind", "j.smith", "marta+lists", "lee_k", "o.brien", "team-a")
    hosts = ("posteo.de", "mail.acme.io", "uni-bonn.de", "contoso.co.uk", "fastmail.fm")
    return f"{rng.choice(names)}{rng.randint(1, 99)}@{rng.choice(hosts)}"


def no_email(rng: random.Random) -> str:
    return rng.choice(
        (
            "@dg.asset",
            f"icon@{rng.randint(2, 3)}x.png",
            "git@github.com:org/project.git",
            f"user{rng.randint(1, 9)}@example.com",
            "name @ https://host.org/file.whl",
            "https://token@host.org/path",
            "root@localhost",
        )
    )


def ip(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return "2a01:4f8:" + ":".join(f"{rng.randint(1, 65535):x}" for _ in range(2)) + "::1"
    rest = ".".join(str(rng.randint(1, 254)) for _ in range(3))
    return f"{rng.choice((8, 17, 34, 52, 81, 93, 104, 142, 151, 185, 199))}.{rest}"


def no_ip(rng: random.Random) -> str:
    rest = ".".join(str(rng.randint(1, 254)) for _ in range(2))
    return rng.choice(
        (
            f"10.1.{rest}",
            f"192.168.{rest}",
            "127.0.0.1",
            "0.0.0.0",
            f"version {rng.randint(1, 9)}.{rng.randint(0, 9)}.{rest}",
            f"torch=={rng.randint(1, 9)}.0.{rest}",
            f"8.8.{rest}.5",
            f"{rng.randint(300, 999)}.8.{rest}",
            "fe80::1ff:fe23:4567:890a",
            "12:30:45",
            "std::vector",
        )
    )


def private_key(rng: random.Random) -> str:
    kind = rng.choice(("RSA ", "EC ", "OPENSSH ", ""))
    body = base64.b64encode(rng.randbytes(rng.randint(120, 900))).decode()
    lines = "\n".join(body[n : n + 64] for n in range(0, len(body), 64))
    return f"-----BEGIN {kind}PRIVATE KEY-----\n{lines}\n-----END {kind}PRIVATE KEY-----"


def no_private_key(rng: random.Random) -> str:
    return rng.choice(
        (
            "-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----",
            "a file that begins with -----BEGIN RSA PRIVATE KEY----- and ends likewise",
            private_key(rng).replace("PRIVATE", "PUBLIC"),
            "-----BEGIN PRIVATE KEY-----\n"
            + "your key goes here " * 5
            + "\n-----END PRIVATE KEY-----",
        )
    )


ALNUM = string.ascii_letters + string.digits


def api_key(rng: random.Random) -> str:
    def body(count: int, signs: str = ALNUM) -> str:
        return "".join(rng.choices(signs, k=count))

    return rng.choice(
        (
            "AKIA" + body(16, string.ascii_uppercase + "234567"),
            "ghp_" + body(36),
            "glpat-" + body(20),
            "sk-proj-" + body(48),
            "sk-ant-api03-" + body(90),
            "hf_" + body(34, string.ascii_letters),
            "sk-" + rng.randbytes(16).hex(),
            "AIza" + body(35),
            "sk_live_" + body(24),
            "xoxb-" + body(12, string.digits) + "-" + body(24),
            "npm_" + body(36),
        )
    )


def no_api_key(rng: random.Random) -> str:
    return rng.choice(
        (
            "AKIAIOSFODNN7EXAMPLE",
            "sk-your-api-key-here-0000000000000000000",
            "sk-" + "x" * 40,
            "ghp_" + "x" * 36,
            "ghp_" + "A1" * 18,
            "hf_your_token_here",
            "sk-learn-contrib-something-very-long-package-name-2",
            rng.randbytes(32).hex(),
            "npm_config_registry_with_a_very_long_name",
            "risk-" + rng.randbytes(20).hex(),
        )
    )


#: kind of personal data -> (makes one, makes a look-alike)
PII: dict[str, tuple[Callable[[random.Random], str], Callable[[random.Random], str]]] = {
    "email": (email, no_email),
    "phone": (phone, no_phone),
    "ip": (ip, no_ip),
    "card": (card, no_card),
    "iban": (iban, no_iban),
    "ssn": (ssn, no_ssn),
    "private_key": (private_key, no_private_key),
    "api_key": (api_key, no_api_key),
}


def personal(kind: str, rng: random.Random, count: int) -> list[Case]:
    """One of its kind planted into each text, and one look-alike into each of as many others."""
    good, bad = PII[kind]
    cases = []
    for number, text in enumerate(sample(rng, 2 * count)):
        value = good(rng) if number < count else bad(rng)
        cases.append(Case(inserted(rng, text, value), number < count, value))
    return cases
