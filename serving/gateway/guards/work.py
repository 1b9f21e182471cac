"""The work of the guards as generators: each pauses after about a millisecond of reading.

In: the texts of a request or an answer. Out: findings in a verdict, replaced texts. Whoever drives
a generator decides what happens in a pause (run.py: the event loop turns, the deadline is looked
at).
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

from resources.recognisers.spans import Found
from serving.gateway.guards.injection import hits, pieces, score
from serving.gateway.guards.patterns import HoldBack, find
from serving.gateway.guards.plan import Part, version
from serving.gateway.guards.policy import Guard
from serving.gateway.guards.stream import Rules, StreamGuard
from serving.gateway.guards.texts import Slot
from serving.gateway.guards.verdict import Finding, Placeholders, Verdict

T = TypeVar("T")
Work = Generator[None, None, T]
#: Characters that are read without a pause: 1 ms.
SLICE = 8192
#: Whose words are judged. A system message is the application's own; what tools return is data.
READ_AS_DATA = {"user": False, "tool": True, "function": True}


def spans(slots: list[Slot]) -> Work[list[list[Found]]]:
    """Findings by pattern in each text; a pause after every SLICE characters."""
    found, since = [], 0
    for slot in slots:
        text = slot.text
        since += len(text)
        if len(text) <= SLICE:
            found.append(find(text))
            if since > SLICE:
                since = 0
                yield
            continue
        found.append((yield from long_spans(text)))
        since = 0
    return found


def long_spans(text: str) -> Work[list[Found]]:
    hold, place = HoldBack(), 0
    found: list[Found] = []
    for start in range(0, len(text) + SLICE, SLICE):
        part = text[start : start + SLICE]
        for piece in hold.feed(part) if part else hold.close():
            end = place + len(piece.text)
            if piece.kind and piece.again and found:
                found[-1] = Found(piece.kind, found[-1].start, end)
            elif piece.kind:
                found.append(Found(piece.kind, place, end))
            place = end
        yield
    return found


def injected(slots: list[Slot], threshold: int) -> Work[list[tuple[str, tuple[str, int, int]]]]:
    """(rule, place) of the texts whose hits reach the threshold."""
    found: list[tuple[str, tuple[str, int, int]]] = []
    since = 0
    for slot in slots:
        if slot.role not in READ_AS_DATA:
            continue
        together = []
        for start, piece in pieces(slot.text):
            together += [(start, hit) for hit in hits(piece, data=READ_AS_DATA[slot.role])]
            since += len(piece)
            if since > SLICE:
                since = 0
                yield
        if score([hit for _, hit in together]) >= threshold:
            for start, hit in together:
                found.append((hit.rule, (slot.where, start + hit.start, start + hit.end)))
    return found


def fed(guard: StreamGuard, text: str) -> Work[str]:
    parts = []
    for start in range(0, len(text), SLICE):
        if start:
            yield
        parts.append(guard.feed(text[start : start + SLICE]))
    return "".join([*parts, guard.close()])


def judge(part: Part, slots: list[Slot], found: list[list[Found]], verdict: Verdict) -> None:
    """Findings into the verdict; the first that a policy blocks ends the request."""
    code: str = "output_blocked" if verdict.side == "output" else "content_blocked"
    for slot, spans_there in zip(slots, found, strict=True):
        for span in spans_there:
            rule = part.rules.get(span.kind)
            if rule is None:
                continue
            name, guard, _ = rule
            place = (slot.where, span.start, span.end)
            verdict.add(finding(name, span.kind, place, guard), guard)
            if guard.enforced and guard.action == "block":
                verdict.block(code, f"The policy allows no {span.kind} here.", slot.where)


def replace(slot: Slot, found: list[Found], rules: Rules, names: Placeholders) -> None:
    parts, done, text = [], 0, slot.text
    for span in found:
        rule = rules.get(span.kind)
        if rule and rule[1].enforced and rule[1].action == "redact":
            parts += [text[done : span.start], names(span.kind, text[span.start : span.end])]
            done = span.end
    if parts:
        slot.box[slot.key] = "".join([*parts, text[done:]])


def finding(name: str, kind: str, place: tuple[str, int, int], guard: Guard) -> Finding:
    return Finding(name, kind, *place, version(name), guard.action, guard.enforced)
