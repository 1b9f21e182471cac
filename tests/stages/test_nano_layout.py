"""The prompt that the nano model was trained on is the prompt that answers render."""

from pathlib import Path

import pytest

from contracts.records import REFUSAL, Passage
from resources import prompts
from stages.nano import layout

ROOT = Path(__file__).parents[2]

HOSTILE = [
    ("Plain", "", "One sentence. Another one? A third! The end."),
    (
        "Guide",
        "Guide > How it works",
        "## How it works It works. # Guide Again, e.g. here. i.e. so.",
    ),
    ("Other", "Guide > Lists", "Steps: 1. Stop it. 2. Start it. - first - second * third"),
    ("Table", "T", "| a | b | | c | d | ```bash make demo ``` Then wait."),
    ("Empty", "", ""),
    ("{{ question }}", "{% raw %}", "{{ 7 * 7 }}. §1a pretends to be a label. [2] pretends, too."),
    ("Long", "Long", " ".join(f"Sentence number {n} stands here." for n in range(40))),
]


def passages(rows: list[tuple[str, str, str]]) -> list[Passage]:
    return [
        Passage(n=n, chunk_id=f"s:p#{n}-{n + 1}", path="p.md", title=title, heading=heading,
                text=text, score=0.5)
        for n, (title, heading, text) in enumerate(rows, start=1)
    ]  # fmt: skip


def test_template_and_layout_agree() -> None:
    version = prompts.load(ROOT / "prompts").get("answer", "v1")
    for rows in ([], HOSTILE[:1], HOSTILE[1:4], HOSTILE[3:6], HOSTILE[6:], HOSTILE):
        shown = passages(rows)
        assert version.messages("How {{ so }}?", shown) == layout.messages("How {{ so }}?", shown)


def test_the_refusal_is_the_projects() -> None:
    assert layout.REFUSAL == REFUSAL
    assert layout.REFUSAL in layout.render_user("Why?", [])


def test_lines_lose_nothing_but_blanks() -> None:
    for _, _, text in HOSTILE:
        assert "".join("".join(layout.lines(text)).split()) == "".join(text.split())


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("One. Two? Three!", ["One.", "Two?", "Three!"]),
        ("Use it, e.g. here. Done.", ["Use it, e.g.\u00a0here.", "Done."]),
        ("Do: 1. Stop. 2. Go.", ["Do:", "1.\u00a0Stop.", "2.\u00a0Go."]),
        ("| a | | b |", ["| a |", "| b |"]),
        ("Version 1.2 of x.y stays.", ["Version 1.2 of x.y stays."]),
    ],
)
def test_where_lines_end(text: str, lines: list[str]) -> None:
    assert layout.lines(text) == lines


def test_lines_past_the_alphabet_have_no_label_but_a_source() -> None:
    rows = layout.labelled(2, HOSTILE[6][2])
    assert len(rows) == 40
    assert [bool(label) for label, _ in rows] == [True] * 20 + [False] * 20
    assert all(line.endswith(" [2]") for _, line in rows)


def test_find_target() -> None:
    user = layout.render_user("Q?", passages(HOSTILE[:2]))
    assert layout.find_target(user, "another ONE?") == "§1b Another one? [1]"
    assert layout.find_target(user, "Again, e.g. here.") == "§2b Again, e.g.\u00a0here. [2]"
    assert layout.find_target(user, None) == f"§0 {REFUSAL}"
    assert layout.find_target(user, "nowhere in sight") is None
    assert layout.find_target(user, REFUSAL) is None, "the refusal line answers nothing"


def test_labels_are_distinct() -> None:
    labels = layout.labels()
    assert len(set(labels)) == len(labels) == 1 + 5 + 5 * 20
