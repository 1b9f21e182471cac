"""What kind of question a question is, by rules that anybody can read: no model, no chance.

In: the text of a question. Out: one of :data:`CLASSES`. Search does well on some kinds and badly on
others (a name in code asks for the very word, a symptom for its meaning), and a mean over all hides
it. The rules were written for the golden questions and the way people type: full sentences, terse
searches, symptoms. The first rule that matches decides, in this order:

    identifier   names something by its spelling: run_cache, .ratchet, AssetSpec, `vllm`, 503
    why          asks for a reason or a cause
    how-to       asks what to do or where to do it
    value        asks for a number, a time, a place or a name: how many, when, where, which
    yes-no       can be answered by yes or no
    definition   asks what something is, means or differs in
    behaviour    asks how something works or what happens then
    statement    no question at all: a symptom, an error message, a few keywords
"""

from __future__ import annotations

import re

#: Every class, in the order in which its rule is tried.
CLASSES = (
    "identifier",
    "why",
    "how-to",
    "value",
    "yes-no",
    "definition",
    "behaviour",
    "statement",
)

_SPELLING = re.compile(
    r"`[^`]+`"  # set as code
    r"|\b\w+_\w+"  # run_cache, __init__
    r"|(?<![\w.])\.[a-z]\w+|\b[\w-]+\.(?:[a-z]{2,5}|[A-Z]\w+)\b"  # .ratchet, release.json, a.B
    r"|\b\w+/\w+"  # dvc/how
    r"|(?<!\S)--?[a-z0-9]"  # -9, --force
    r"|\b[a-z]+[A-Z]\w*|\b[A-Z][a-z]+[A-Z]\w*"  # camelCase, AssetSpec
    r"|\b[1-5]\d\d\b(?! ?(?:gb|mb|ms|%|tokens|chunks))",  # 503
)

#: Written like identifiers, but names that people say.
_NAMES = re.compile(
    r"\b(?:vLLM|MLflow|DeepSeek|PyTorch|LoRA|GitHub|TensorRT|OpenAI|PySpark|MacOS|JavaScript)\b"
)

_START = r"(?:^|[,.;:?!-] |\band )"  # of a clause
_DO = r"(?:do|can|could|should|would|must|may|might) (?:i|we|you|one|somebody)\b"
_AUXILIARY = (
    r"(?:is|are|was|were|am|do|does|did|can|could|may|might|must|shall|should|will|would|has|have"
    r"|had|isn't|aren't|doesn't|don't|didn't|can't|won't)\b"
)

_RULES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("why", re.compile(r"\b(?:why|how come|reasons? for|what causes|whose fault)\b|\breason\?")),
    (
        "how-to",
        re.compile(
            rf"\bhow (?:to\b|{_DO}|(?:can|could|should|would) (?:my|the|a|an) (?:user|client"
            rf"|application|app|team|person)\b)|\bwhere {_DO}"
            rf"|\bwhat (?:do|should|must|can) (?:i|we|you|one|my|a client|the client)\b(?! (?:call"
            rf"|lose|mean|get)\b)|^(?:find|move|change|set|make|add|remove|delete|install) "
        ),
    ),
    (
        "value",
        re.compile(
            r"\bhow (?:many|much|long|fast|quick|quickly|soon|often|old|large|big|high|far)\b"
            rf"|{_START}(?:when|where|who)\b(?! (?:the|a|an|i|my|we|you|nothing|it)\b)"
            r"|\b(?:which|what) (?:\w+ )?(?:numbers?|fraction|share|percentage|range|port|address"
            r"|version|date|time|size|score|file|files|folder|field|fields|format|code|command"
            r"|interface|parameter|database|tool|model|models|kinds|options|endpoints|services"
            r"|stages|assets|job|order|digest|verdict|condition|corpus size)\b"
            rf"|{_START}(?:(?:to|from|in|on|of|at|up to) )?which\b|\bwhat's the range\b"
            rf"|{_START}(?:list|formula|at what|up to what)\b"
        ),
    ),
    ("yes-no", re.compile(rf"{_START}{_AUXILIARY}")),
    (
        "definition",
        re.compile(
            r"\bdefinition\b|\bdifference between\b|\bmeans?\b|\bmeant\b|\brefer to\b"
            r"|\bwhat (?:is|are|was)\b|\bwhat's\b|\bwhat (?:exactly )?do (?:we|you) call\b"
        ),
    ),
    ("behaviour", re.compile(r"\b(?:what|how|whose)\b")),
)


def query_class(question: str) -> str:
    """The class of one question; case and a missing question mark do not matter."""
    text = " ".join(question.split())
    if _SPELLING.search(_NAMES.sub(" ", text)):
        return "identifier"
    lowered = text.lower()
    return next((name for name, rule in _RULES if rule.search(lowered)), "statement")
