"""How passages and a question are laid out for the nano model, and what it answers.

In: passages (n, title, heading, text) and a question. Out: the chat messages and the target.

Each sentence stands on a line of its own between a *label* and its source number::

    §2 Rollback > How a rollback works
    §2a A rollback replaces one small pointer file. [2]
    §2b There is no partial rollback. [2]
    §0 The documents do not say.
    Question: Can I roll back only the prompt?

Labels are single *special* tokens of the nano tokenizer. The model answers ``§2b`` first and then
copies that line; a server drops special tokens from its text, so a client reads only "There is no
partial rollback. [2]". Choosing a sentence is thereby one decision over one token, which the rest
of the answer can look back at; refusing is choosing the line ``§0``. For any other model the labels
are plain text that it need not mind.

``prompts/answer/v1.jinja2`` is the same layout in jinja; tests hold the two together. This copy
exists so that the base model depends on nothing that changes with a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REFUSAL = "The documents do not say."
LETTERS = "abcdefghijklmnopqrst"  # lines a passage may label; 128 word pieces hold 5 to 15
PASSAGES = 5  # passages that the labels cover; the prompt shows 3
REFUSE = "§0"
QUESTION = "Question:"
SYSTEM = (
    "Answer the question with the one line below that answers it, word for word, "
    "with its source number. "
    "If no line answers it, say: " + REFUSAL
)

#: Where a line ends inside whitespace-collapsed Markdown or docstring text. jinja has no regular
#: expressions, so the rule is a chain of plain replacements; a no-break space protects "e.g. ".
BREAKS = (
    ("e.g. ", "e.g.\u00a0"),
    ("i.e. ", "i.e.\u00a0"),
    *((f" {digit}. ", f"\n{digit}.\u00a0") for digit in range(1, 10)),  # an ordered list
    (". ", ".\n"),
    ("? ", "?\n"),
    ("! ", "!\n"),
    (" | | ", " |\n| "),
    (" - ", "\n- "),
    (" * ", "\n* "),
    ("``` ", "```\n"),
)


def labels() -> list[str]:
    """Every label, each one token: the refusal, the passages, the lines."""
    numbers = range(1, PASSAGES + 1)
    return (
        [REFUSE]
        + [f"§{n}" for n in numbers]
        + [f"§{n}{letter}" for n in numbers for letter in LETTERS]
    )


def lines(text: str) -> list[str]:
    """The lines of one passage: its sentences, list items and table rows."""
    for old, new in BREAKS:
        text = text.replace(old, new)
    return [line for line in text.split("\n") if line.strip()]


def body(text: str, title: str, heading: str) -> str:
    """Chunk text without the Markdown heading line that the label line already shows."""
    for name in (heading.split(" > ")[-1], title):
        for mark in ("### ", "## ", "# "):
            text = text.replace(f"{mark}{name} ", "")
    return text


def header(n: int, title: str, heading: str) -> str:
    """The label line of a passage; heading paths mostly begin with the title already."""
    if heading.startswith(title):
        return f"§{n} {heading}"
    return f"§{n} {title} > {heading}" if heading else f"§{n} {title}"


def labelled(n: int, text: str) -> list[tuple[str, str]]:
    """(label, line with its source number) of a text; lines past the alphabet have no label."""
    rows = []
    for number, line in enumerate(lines(text)):
        label = f"§{n}{LETTERS[number]}" if number < len(LETTERS) else ""
        rows.append((label, f"{line} [{n}]"))
    return rows


def render_user(question: str, passages: Sequence[Any]) -> str:
    """The user message. Passages have ``n``, ``title``, ``heading`` and ``text``."""
    rows = []
    for passage in passages:
        rows.append(header(passage.n, passage.title, passage.heading))
        text = body(passage.text, passage.title, passage.heading)
        rows += [f"{label} {line}" if label else line for label, line in labelled(passage.n, text)]
    rows += [f"{REFUSE} {REFUSAL}", f"{QUESTION} {question}"]
    return "\n".join(rows)


def messages(question: str, passages: Sequence[Any]) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": render_user(question, passages)},
    ]


def find_target(user: str, answer: str | None) -> str | None:
    """The line of a rendered prompt that holds ``answer``, with its label: what to be trained on.

    ``answer`` None asks for the refusal line. Returns None where no line holds the answer.
    The match ignores case and runs of whitespace; the shortest line that holds it wins.
    """
    rows = [row for row in user.split("\n") if row.startswith("§")]
    wanted = normal(REFUSAL if answer is None else answer)
    if answer is None:
        found = [row for row in rows if row.startswith(REFUSE + " ")]
    else:
        found = [row for row in rows if wanted in normal(row) and not row.startswith(REFUSE + " ")]
        found = [row for row in found if row.rstrip().endswith("]")]
    return min(found, key=len) if found else None


def normal(text: str) -> str:
    return " ".join(text.lower().split())
