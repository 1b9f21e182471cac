"""Packed training batches: one context of passages, many questions about it.

In: the corpus as chunks, the tokenizer, a seeded generator. Out: tensors for one step.

Questions of one context do not see each other: a mask hides every other question and positions
restart behind the context, so that each (question, answer) is exactly what inference sees. Encoding
a context once for a dozen questions is what makes minutes of CPU enough.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stages.nano import layout, questions, tokens, words
from stages.nano.corpus import Text


@dataclass(frozen=True)
class Passage:
    """A chunk as a prompt shows it. Subclasses may carry more along."""

    title: str
    heading: str
    text: str
    n: int = 1


@dataclass(frozen=True)
class Item:
    """One question about a context; ``target`` begins with the label."""

    question: str
    target: str


def chunk(texts: list[Text], low: int = 280, high: int = 620) -> list[list[Passage]]:
    """Chunks of every document, cut at line ends between ``low`` and ``high`` characters."""
    documents = []
    for text in texts:
        passages: list[Passage] = []
        for section in text.sections:
            current = ""
            for line in layout.lines(section.text):
                line = line[:high]
                if current and len(current) + len(line) > high:
                    passages.append(Passage(text.title, section.heading, current))
                    current = ""
                current = f"{current} {line}" if current else line
            if len(current) >= low or (current and not passages):
                passages.append(Passage(text.title, section.heading, current))
        if passages:
            documents.append(passages)
    return documents


class Maker:
    """Makes contexts with questions. All randomness comes from the generator handed in."""

    def __init__(
        self,
        documents: Sequence[Sequence[Passage]],
        rarity_of: dict[str, float],
        akin: Mapping[str, Sequence[str]] = words.SYNONYMS,
    ) -> None:
        self.documents, self.rarity_of, self.akin = documents, rarity_of, akin
        self.akin_stems = {word: {words.stem(other) for other in akin[word]} for word in akin}
        self.weights = [min(len(passages), 12) for passages in documents]
        # Sentences whose grammar questions borrow: prose of a usual length.
        self.carriers = [
            line
            for passages in documents
            for passage in passages
            for line in layout.lines(passage.text)
            if 30 < len(line) < 160
            and sum(c.isalpha() or c == " " for c in line) > 0.93 * len(line)
        ] or ["this is the one that you want to see"]

    def context(self, rng: random.Random, count: int) -> tuple[list[Passage], list[Passage]]:
        """Passages to show, and passages of the same documents that stay hidden."""
        main = rng.choices(self.documents, self.weights)[0]
        near = rng.choices(self.documents, self.weights)[0]
        start = rng.randrange(len(main))
        pool = (
            main[start : start + count + 2]
            if rng.random() < 0.7
            else rng.sample(main, min(len(main), count + 2))
        )
        shown = rng.sample(pool, min(len(pool), rng.choice((1, 2, 2, 3, 3)), count))
        for _ in range(20 * count):
            if len(shown) == count:
                break
            other = near if rng.random() < 0.6 else rng.choices(self.documents, self.weights)[0]
            one = rng.choice(other)
            if one not in shown:
                shown.append(one)
        rng.shuffle(shown)
        shown = [replace(one, n=n) for n, one in enumerate(shown, start=1)]
        texts = {one.text for one in shown}
        hidden = [one for one in (*main, *near) if one.text not in texts]
        return shown, hidden

    def sentences(self, rng: random.Random, count: int) -> tuple[list[Passage], list[Passage]]:
        """As :meth:`context`, with passages of one sentence each: what a reranker would leave."""
        main = rng.choices(self.documents, self.weights)[0]
        near = rng.choices(self.documents, self.weights)[0]
        start = rng.randrange(len(main))
        pool = self._single(main[start : start + 3])
        rng.shuffle(pool)
        for other in (main, near):
            if len(pool) < 2 * count:
                rest = self._single(other)
                pool += rng.sample(rest, min(len(rest), 2 * count))
        distinct = list({one.text: one for one in pool}.values())
        shown = [replace(one, n=n) for n, one in enumerate(distinct[:count], start=1)]
        rng.shuffle(shown)
        return [replace(one, n=n) for n, one in enumerate(shown, start=1)], distinct[count:]

    @staticmethod
    def _single(passages: Sequence[Passage]) -> list[Passage]:
        """A passage for each line of ``passages`` that is long enough to be asked about."""
        return [
            replace(one, text=line)
            for one in passages
            for line in layout.lines(layout.body(one.text, one.title, one.heading))
            if len(line) > 30
        ]

    def items(
        self,
        shown: list[Passage],
        hidden: list[Passage],
        rng: random.Random,
        count: int,
        unanswerable: float = 0.15,
    ) -> list[Item]:
        """Questions about ``shown``; that share of them cannot be answered from it."""
        rows = [
            (f"{label} {line}", line, one)
            for one in shown
            for label, line in layout.labelled(one.n, layout.body(one.text, one.title, one.heading))
        ]
        rows = [row for row in rows if row[0].startswith("§")]
        covers = [set(words.stems(line)) for _, line, _ in rows]
        made: list[Item] = []
        for _ in range(count * 3):
            if len(made) == count:
                break
            if rng.random() < unanswerable:
                item = self._unanswerable(hidden, covers, shown, rng)
            else:
                item = self._answerable(rows, covers, rng)
            if item:
                made.append(item)
        return made

    def _answerable(
        self, rows: list[Any], covers: list[set[str]], rng: random.Random
    ) -> Item | None:
        at = rng.randrange(len(rows))
        target, line, one = rows[at]
        heading = one.heading if rng.random() < 0.8 else one.title
        question = questions.ask(
            line.rpartition(" [")[0],
            heading,
            self.rarity_of,
            rng,
            rng.choice(self.carriers),
            near=rng.choice(rows)[1],
            akin=self.akin,
        )
        if question is None:
            return None
        asked = set(words.stems(question))
        scores = [self.cover(asked, held) for held in covers]
        others = max((score for place, score in enumerate(scores) if place != at), default=0.0)
        if scores[at] < 0.1 or scores[at] < 1.1 * others + 0.02:
            return None
        return Item(question, target)

    def _unanswerable(
        self,
        hidden: list[Passage],
        covers: list[set[str]],
        shown: list[Passage],
        rng: random.Random,
    ) -> Item | None:
        pool = (
            hidden
            if hidden and rng.random() < 0.7
            else rng.choices(self.documents, self.weights)[0]
        )
        one = rng.choice(pool)
        line = rng.choice(layout.lines(one.text))
        heading = rng.choice(shown).heading if rng.random() < 0.3 else one.heading
        near = rng.choice(shown).text
        question = questions.ask(
            line, heading, self.rarity_of, rng, rng.choice(self.carriers), near, self.akin
        )
        if question is None:
            return None
        asked = set(words.stems(question))
        own = self.cover(asked, set(words.stems(line)))
        if max(self.cover(asked, held) for held in covers) > min(0.45, 0.75 * own):
            return None
        return Item(question, f"{layout.REFUSE} {layout.REFUSAL}")

    def cover(self, asked: set[str], held: set[str]) -> float:
        """As :func:`questions.coverage`, on stems already taken."""
        total = score = 0.0
        for word in asked:
            weight = self.rarity_of.get(word, 1.0)
            total += weight
            if word in held:
                score += weight
            elif word in self.akin_stems and not held.isdisjoint(self.akin_stems[word]):
                score += weight / 2
        return score / total if total else 0.0


@dataclass
class Row:
    """One packed sequence: ids, segment (0 is the context), positions, what to predict where."""

    ids: list[int]
    segment: list[int]
    position: list[int]
    predict: list[tuple[int, int, bool]]  # place, next token, is it the label


def shifted(shown: list[Passage], rng: random.Random) -> dict[str, str]:
    """Another letter for each line's label, in order: a label is a name and not a place.

    Real prompts begin at ``a`` and mostly end before ``h``; without this the later letters would
    hardly be trained.
    """
    renamed = {}
    for passage in shown:
        text = layout.body(passage.text, passage.title, passage.heading)
        count = min(len(layout.lines(text)), len(layout.LETTERS))
        first = rng.randrange(len(layout.LETTERS) - count + 1)
        for at in range(count):
            letters = layout.LETTERS[at], layout.LETTERS[first + at]
            renamed[f"§{passage.n}{letters[0]} "] = f"§{passage.n}{letters[1]} "
    return renamed


def rename(text: str, renamed: dict[str, str]) -> str:
    """``text`` with the labels at the start of its lines renamed."""
    rows = text.split("\n")
    return "\n".join(renamed.get(row[:4], row[:4]) + row[4:] for row in rows)


def pack(
    tokenizer: Any,
    shown: list[Passage],
    items: list[Item],
    limit: int,
    copied: list[int],
    system: str,
    renamed: dict[str, str],
) -> Row:
    """The context and as many of ``items`` as fit ``limit``.

    ``copied`` says how many tokens of each answer are trained, ``renamed`` which labels change.
    """
    user = rename(layout.render_user("", shown), renamed).rstrip()
    prompt = f"{tokens.BOS}{tokens.SYSTEM}{system}{tokens.USER}{user}"
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    row = Row(list(ids), [0] * len(ids), list(range(len(ids))), [])
    for number, (item, length) in enumerate(zip(items, copied, strict=True), start=1):
        question = tokenizer.encode(f" {item.question}{tokens.ASSISTANT}", add_special_tokens=False)
        answer = tokenizer.encode(
            f"{rename(item.target, renamed)}{tokens.END}", add_special_tokens=False
        )[:length]
        if len(row.ids) + len(question) + len(answer) > limit:
            break
        start = len(row.ids) + len(question) - 1
        row.predict += [(start + step, token, step == 0) for step, token in enumerate(answer)]
        both = question + answer[:-1]
        row.ids += both
        row.segment += [number] * len(both)
        row.position += range(len(ids), len(ids) + len(both))
    return row


def collate(rows: list[Row], pad: int) -> dict[str, Any]:
    """Tensors: ids, position (B,T); mask (B,1,T,T) bool; places, targets (N,); first (N,) bool."""
    import torch

    length = max(len(row.ids) for row in rows)
    length += -length % 16
    ids = torch.full((len(rows), length), pad)
    segment = torch.full((len(rows), length), -1)
    position = torch.zeros((len(rows), length), dtype=torch.long)
    places, targets, first = [], [], []
    for at, row in enumerate(rows):
        size = len(row.ids)
        ids[at, :size] = torch.tensor(row.ids)
        segment[at, :size] = torch.tensor(row.segment)
        position[at, :size] = torch.tensor(row.position)
        places += [at * length + place for place, _, _ in row.predict]
        targets += [token for _, token, _ in row.predict]
        first += [label for _, _, label in row.predict]
    same = segment[:, :, None] == segment[:, None, :]
    mask = torch.ones(length, length, dtype=torch.bool).tril() & (same | (segment[:, None, :] == 0))
    mask |= torch.eye(length, dtype=torch.bool)
    return {
        "ids": ids,
        "position": position,
        "mask": mask[:, None],
        "places": torch.tensor(places),
        "targets": torch.tensor(targets),
        "first": torch.tensor(first),
    }
