from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resources.sentences import sentences

PAGE = """## The order of a deployment

A deployment has four steps, and the flip is last. The channel is
flipped in one rename, e.g. by `os.replace`. Is that safe? It is!

- The first item stands alone, as it should.
- The second item has two sentences. This is the other one.

| Variable | Used for |
|---|---|
| RATCHET_HOST | the address that processes bind to |

```bash
ratchet status --json
```
"""


def test_sentences_items_rows_and_code_lines_each_stand_alone() -> None:
    assert sentences(PAGE) == [
        "A deployment has four steps, and the flip is last.",
        "The channel is flipped in one rename, e.g. by `os.replace`.",
        "- The first item stands alone, as it should.",
        "- The second item has two sentences.",
        "This is the other one.",
        "| Variable | Used for |",
        "| RATCHET_HOST | the address that processes bind to |",
        "ratchet status --json",
    ]


@pytest.mark.parametrize(
    "text", ["", "\n\n", "## Only a heading", "```\n```", "| --- | --- |", "Hm."]
)
def test_what_answers_nothing_is_left_out(text: str) -> None:
    assert sentences(text) == []


@given(st.text(alphabet="ab. ?!`#|-\n1)(", max_size=200))
def test_every_sentence_stands_in_the_text_in_order(text: str) -> None:
    collapsed, at = " ".join(text.split()), 0
    for sentence in sentences(text):
        assert sentence == " ".join(sentence.split())
        for word in sentence.split():
            at = collapsed.index(word, at) + len(word)
