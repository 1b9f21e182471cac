"""Words of technical English: which carry no meaning of their own, which stand for one another.

In: text. Out: words, stems, how rare each is. Used to make questions and to judge, roughly, what a
line has in common with one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

STOP = frozenset(
    """
    a an the this that these those it its is are was were be been being am do does did done
    has have had having will would can could should shall may might must of in on at to for
    from by with without into onto over under about as and or but if then than so not no nor
    only also too very just both each every any all some such what which who whom whose when
    where why how there here i you he she we they my your his her our their me us them one
    other another more most own same out up off again once before after while during because
    until between through above below against per via e g etc vs i.e e.g get got use used
    using make made need want way happen happens mean means work works ll ve re s t d m
    """.split()  # noqa: SIM905
)

#: Words that technical writing uses for one another. Each row is a set; stems are compared.
_SYNONYMS = """
remove delete drop erase discard purge|stop halt end terminate kill shut quit
start launch begin boot run|create make build generate produce
change modify edit alter update adjust|fail break crash error fault
folder directory path place location|file document page|show display print list see view
find locate search look|check verify validate test confirm|choose select pick decide
keep retain preserve hold store save|many number count amount|limit maximum max cap bound
minimum least floor min|long time seconds minutes duration|fast quick speed rapid
slow latency delay|error exception failure problem|fix repair solve resolve correct
big large size huge|small little tiny|old previous earlier former last
new fresh latest newest recent|return give yield provide|get obtain fetch retrieve read load
write put save store|send pass submit post|allow permit let enable possible
prevent forbid block refuse reject deny stop|require need must necessary|default standard usual
optional|value setting option parameter knob argument|configure set setup config
contain include hold have|explain describe tell say|reason why because cause
difference differ compare between|same equal identical|wrong incorrect bad invalid broken
right correct good valid|automatic automatically itself|user person people someone who
machine computer host server|memory ram|disk storage space|network connection
run execute call invoke|job task work|wait pause sleep block|order sequence sort
split divide separate cut|join merge combine|copy duplicate clone|move transfer rename
replace swap substitute exchange|add insert append put|convert transform turn
measure compute calculate count|compare against versus|match equal fit
whole entire complete full|part piece portion section|empty missing absent none|safe secure
secret password credential key token|install deploy setup ship|release version
rollback revert undo back|train learn fit|model network|question query ask
answer reply response respond|score metric number measure|result output outcome|input data
example sample|table database|column field|row record line entry|first initial|final last end
happen occur|avoid prevent skip|ignore skip omit|force must override|share common
again repeat retry|log record history|watch monitor observe track|warn alert notify warning
schedule plan night nightly|request call traffic|cost price expensive cheap|quality good
owner responsible who|approve sign accept agree|trust rely believe|know tell learn|try attempt
help support assist|important matter|true real actual
"""
SYNONYMS: dict[str, list[str]] = {}

_SUFFIXES = (
    "ations", "ation", "ments", "ment", "ings", "ing", "ions", "ion", "ness", "ers", "ies", "ied",
    "er", "or", "ed", "es", "ly", "al", "s", "y", "e",
)  # fmt: skip


def stem(word: str) -> str:
    """A crude stem: lower case, one English ending off, no doubled last consonant."""
    word = word.lower()
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 3 and not word.endswith("ss"):
            word = word[: -len(suffix)]
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "ls":
        word = word[:-1]
    return word


for _row in _SYNONYMS.replace("\n", "|").split("|"):
    for _word in _row.split():
        SYNONYMS.setdefault(stem(_word), []).extend(
            other for other in _row.split() if other != _word
        )

_WORD = re.compile(r"[A-Za-z][A-Za-z_]*[A-Za-z]|\d+|[A-Za-z]")


def words(text: str) -> list[str]:
    """Words and numbers of ``text``, in order."""
    return _WORD.findall(text)


def stems(text: str) -> list[str]:
    """Stems of the content words of ``text``; identifiers count as their parts."""
    parts = [part for word in words(text) for part in word.split("_") if part]
    return [stem(part) for part in parts if part.lower() not in STOP]


def rarity(documents: Iterable[str]) -> dict[str, float]:
    """Inverse document frequency of stems, scaled to (0, 1]."""
    from math import log

    counts: Counter[str] = Counter()
    total = 0
    for document in documents:
        counts.update(set(stems(document)))
        total += 1
    top = log(total + 1)
    return {word: log((total + 1) / (count + 0.5)) / top for word, count in counts.items()}
