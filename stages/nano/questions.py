"""Questions made from sentences: what the nano model is trained to answer.

In: a sentence, the heading above it, a seeded generator. Out: a question that a reader could ask
whose answer the sentence is, with lexical overlap of varying degree.

People ask with some of the sentence's words, inflected differently, some replaced by synonyms,
mixed with words of the topic and with words that are nowhere in the text. So does this: keep one to
five content words or a stretch of the sentence, change endings, swap in synonyms, set them into the
grammar of another real sentence, add words of the heading and of the text around, wrap it all in a
frame of English questions that suits what the sentence says (a number, a reason, a place, a
command). No sentence is understood here; the frames only make the shapes familiar.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

from stages.nano.words import STOP, SYNONYMS, stem, stems, words

_FRAMES = {
    "plain": (
        "How do I {}?",
        "How do I {}?",
        "How can I {}?",
        "How does {} work?",
        "What does {} do?",
        "What is {}?",
        "What happens when {}?",
        "What happens if {}?",
        "What happens to {}?",
        "Which {}?",
        "What {}?",
        "How {}?",
        "How is {}?",
        "How are {}?",
        "When {}?",
        "Where {}?",
        "Who {}?",
        "Is {}?",
        "Can I {}?",
        "Can {}?",
        "Does {}?",
        "Do I need {}?",
        "Should I {}?",
        "I want to {}, how?",
        "What should I do about {}?",
        "Tell me about {}.",
        "{}?",
        "{}",
        "What do I do if {}?",
        "Is there a {}?",
        "Are {}?",
        "How should {}?",
        "What are {}?",
    ),
    "number": (
        "How many {}?",
        "How much {}?",
        "What is the number of {}?",
        "How long {}?",
        "What limit {}?",
        "How often {}?",
        "At what {}?",
        "How big is {}?",
        "How large is {}?",
        "What size {}?",
        "How fast {}?",
    ),
    "reason": (
        "Why {}?",
        "Why does {}?",
        "Why is {}?",
        "Why are {}?",
        "What is the reason for {}?",
        "Why do {}?",
    ),
    "denial": (
        "Can I {}?",
        "Is it possible to {}?",
        "Why not {}?",
        "Is {} allowed?",
        "Does {}?",
        "Is {}?",
        "Will {}?",
    ),
    "place": (
        "Where {}?",
        "Where is {}?",
        "Where are {}?",
        "In which file {}?",
        "Which file {}?",
        "Where do I {}?",
    ),
    "command": (
        "Which command {}?",
        "What command {}?",
        "How do I {}?",
        "What do I run to {}?",
        "Which option {}?",
    ),
    "time": (
        "When {}?",
        "When should I {}?",
        "When does {}?",
        "What comes before {}?",
        "What happens after {}?",
    ),
    "duty": (
        "Do I have to {}?",
        "Must {}?",
        "What must {}?",
        "What should {}?",
        "What is required {}?",
        "Should {}?",
    ),
}
_CUES = {
    "number": re.compile(
        r"\d|\b(two|three|four|five|ten|twice|half|percent"
        r"|seconds?|minutes?|hours?|days?)\b"
    ),
    "reason": re.compile(
        r"\b(because|since|so that|therefore|otherwise|reason"
        r"|means that|in order to)\b",
        re.I,
    ),
    "denial": re.compile(r"\b(not|cannot|no|never|without|nothing|refuse[sd]?|only)\b", re.I),
    "place": re.compile(
        r"\w/\w|\.(?:json|ya?ml|py|toml|md|txt|db)\b"
        r"|\b(folder|directory|file|stored|under)\b"
    ),
    "command": re.compile(r"`|--\w|\b(run|command|option|flag)\b"),
    "time": re.compile(r"\b(when|before|after|until|once|while|during|every|first|then)\b", re.I),
    "duty": re.compile(r"\b(must|should|need|needs|required?|has to|have to|always)\b", re.I),
}
_GLUE = (
    "the",
    "the",
    "a",
    "my",
    "in",
    "of",
    "for",
    "to",
    "on",
    "with",
    "from",
    "is",
    "and",
    "by",
    "an",
    "it",
)
_NOISE = (
    "exactly",
    "really",
    "actually",
    "normally",
    "currently",
    "usually",
    "anything",
    "something",
    "system",
    "thing",
    "things",
    "still",
    "already",
    "ever",
    "day",
    "example",
    "case",
    "purpose",
    "difference",
    "good",
    "best",
    "possible",
    "kind",
    "sure",
    "point",
    "know",
    "tell",
    "explain",
    "please",
    "default",
)


def inflect(word: str, rng: random.Random) -> str:
    """Another form of ``word``, of its length or near it."""
    if len(word) < 4 or not word.isalpha() or not word.islower():
        return word
    base = stem(word)
    if len(base) < 3:
        return word
    tail = (
        "e"
        if word.endswith("e") or (word.endswith(("ed", "es", "ing")) and rng.random() < 0.4)
        else ""
    )
    return base + rng.choice((tail, "s", tail + "d" if tail else "ed", "ing", "es"))


def ask(
    sentence: str,
    heading: str,
    rarity_of: dict[str, float],
    rng: random.Random,
    carrier: str = "",
    near: str = "",
    akin: Mapping[str, Sequence[str]] = SYNONYMS,
) -> str | None:
    """A question that ``sentence`` answers, or None where it has too few words to ask about.

    Args:
        sentence: what the answer will be.
        heading: topic of the passage; questions often name it.
        rarity_of: see :func:`rarity`.
        carrier: another sentence, whose small words and grammar the question borrows.
        near: text around; a word of it may slip in, as people mix up neighbouring things.
        akin: words that may stand for one another, by stem.
    """
    tokens = words(sentence)
    places = [at for at, word in enumerate(tokens) if word.lower() not in STOP and len(word) > 1]
    if len(places) < 2:
        return None
    style = rng.random()
    if style < 0.25:
        phrase = _span(tokens, places, rng, akin)
    else:
        kept = [tokens[at] for at in _choose(tokens, places, rarity_of, rng)]
        kept = [_vary(word, rng, akin) for word in kept]
        kept += _strays(heading, near, rng)
        if style < 0.4:
            rng.shuffle(kept)
            phrase = kept
        else:
            phrase = _carried(kept, carrier, rng)
    question = rng.choice(_FRAMES[_kind(sentence, rng)]).format(" ".join(phrase))
    if rng.random() < 0.25:
        question = question.lower()
    elif rng.random() < 0.9:
        question = question[0].upper() + question[1:]
    return question if rng.random() < 0.85 else question.rstrip("?.")


def _choose(
    tokens: list[str], places: list[int], rarity_of: dict[str, float], rng: random.Random
) -> list[int]:
    """Places of the content words that the question keeps: neighbours, or by rarity."""
    count = min(rng.choice((1, 2, 2, 2, 3, 3, 3, 4, 5)), len(places))
    if rng.random() < 0.4:
        first = rng.randrange(len(places) - count + 1)
        return places[first : first + count]
    weights = [0.3 + rarity_of.get(stem(tokens[at]), 1.0) for at in places]
    kept = sorted(_sample(places, weights, count, rng))
    if rng.random() < 0.35:
        rng.shuffle(kept)
    return kept


def _span(
    tokens: list[str], places: list[int], rng: random.Random, akin: Mapping[str, Sequence[str]]
) -> list[str]:
    """A stretch of the sentence, some of its words changed or dropped."""
    first = max(0, rng.choice(places) - rng.randrange(4))
    span = tokens[first : first + rng.randrange(3, 9)]
    out = []
    for word in span:
        if word.lower() in STOP:
            out.append(word.lower())
        elif rng.random() < 0.8:
            out.append(_vary(word, rng, akin))
    return out or span


def _vary(word: str, rng: random.Random, akin: Mapping[str, Sequence[str]]) -> str:
    """``word`` as another person would write it: a synonym, another ending, lower case."""
    others = akin.get(stem(word), ())
    if others and rng.random() < 0.35:
        return rng.choice(others)
    if rng.random() < 0.25:
        return inflect(word.lower(), rng)
    return word.lower() if word[1:].islower() and rng.random() < 0.85 else word


def _strays(heading: str, near: str, rng: random.Random) -> list[str]:
    """Words of the question that its answer need not have: topic, neighbours, padding."""
    strays = []
    for text, share in ((heading, 0.45), (near, 0.25)):
        pool = [word for word in words(text) if word.lower() not in STOP and len(word) > 2]
        if pool and rng.random() < share:
            strays.append(rng.choice(pool).lower())
    if rng.random() < 0.3:
        strays.append(rng.choice(_NOISE))
    return strays


def _carried(kept: list[str], carrier: str, rng: random.Random) -> list[str]:
    """``kept`` in the places of a carrier's content words; a few of its own words stay as noise."""
    tokens = [word.lower() for word in words(carrier)] or list(_GLUE)
    length = min(len(tokens), len(kept) + rng.randrange(2, 7))
    first = rng.randrange(len(tokens) - length + 1)
    stay = rng.choice((0, 0, 1, 1, 2))
    queue, out = list(kept), []
    for word in tokens[first : first + length]:
        if word in STOP:
            out.append(word)
        elif queue:
            out.append(queue.pop(0))
        elif stay:
            out.append(word)
            stay -= 1
    return out + queue


def _kind(sentence: str, rng: random.Random) -> str:
    kinds = [kind for kind, cue in _CUES.items() if cue.search(sentence)]
    return rng.choice(kinds) if kinds and rng.random() < 0.6 else "plain"


def _sample(items: list[int], weights: list[float], count: int, rng: random.Random) -> list[int]:
    """``count`` items without replacement, by weight."""
    keyed = sorted(
        ((rng.random() ** (1 / weight), item) for item, weight in zip(items, weights, strict=True))
    )
    return [item for _, item in keyed[-count:]]


def coverage(question: str, text: str, rarity_of: dict[str, float]) -> float:
    """Share of the question's content words, by rarity, that ``text`` has (synonyms: half)."""
    asked, held = set(stems(question)), set(stems(text))
    total = sum(rarity_of.get(word, 1.0) for word in asked)
    if not total:
        return 0.0
    score = 0.0
    for word in asked:
        weight = rarity_of.get(word, 1.0)
        if word in held:
            score += weight
        elif any(stem(other) in held for other in SYNONYMS.get(word, ())):
            score += weight / 2
    return score / total
