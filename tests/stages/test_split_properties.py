"""Every strategy and format, on nasty text: nothing lost, nothing over the limit, nothing moved."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.errors import ConfigError
from contracts.records import Heading
from stages import splitting
from stages.splitting import Strategy, WordCounter
from tests.stages.split_checks import COUNTER, check

STRATEGIES: tuple[Strategy, ...] = ("structure", "recursive", "fixed", "code")
FORMATS = ("markdown", "rst", "text", "code", "docstring")

WORDS = st.sampled_from(
    [
        "retrieval",
        "foo_bar()",
        "snake_case.attr",
        "naïve",
        "Ünïcödé",
        "漢字かな混じり",
        "한국어",
        "don't",
        "e.g.",
        "Stop.",
        "Why?",
        "x" * 150,
        "0123456789" * 12,
        "a-b-c" * 30,
        "\u200b",
        "\x1c",
        "\u00a0",
        "🙂🙂",
        "ﬁ",
        "e\u0301\u0323",
        "一。二！三？",
        "\u3000",
        "👩\u200d👩\u200d👧",
        "\x0b",
        "\x07",
        "\u2028",
        "-",
        "|",
        "`code`",
        "https://example.org/a/b?c=d&e=%20",
    ]
)
LINES = st.one_of(
    st.lists(WORDS, max_size=25).map(" ".join),
    st.sampled_from(
        [
            "# Top",
            "## Below",
            "### Deep #",
            "```python",
            "```",
            "~~~",
            "| a | b |",
            "|---|---|",
            "- item",
            "  1. item",
            "Args:",
            "Returns:",
            "",
            "",
            "    x = 1",
            "\t",
            "\r",
            "#not a heading",
            "Title",
            "=====",
            "=====  =====",
            "+---+---+",
            ".. code-block:: python",
            "Thus::",
            ">>> 1 + 1",
            ":param x: it",
            "class A:",
            "    def f(self):",
            "        return 1",
            "@property",
            "def f(): pass",
            "}",
        ]
    ),
)
TEXTS = st.lists(LINES, max_size=30).map("\n".join)
FORMAT = st.sampled_from(FORMATS)
STRATEGY = st.sampled_from(STRATEGIES)


def headings_at(text: str, numbers: list[int]) -> list[Heading]:
    """Headings at some of the lines of a text."""
    starts = [0] + [at + 1 for at, character in enumerate(text) if character == "\n"]
    found = sorted({starts[number % len(starts)] for number in numbers})
    return [Heading(level=1 + at % 3, title=f"H{at}", start=at) for at in found]


@settings(max_examples=250, deadline=None)
@given(
    text=TEXTS,
    limit=st.sampled_from([16, 23, 48, 128]),
    format=FORMAT,
    strategy=STRATEGY,
    numbers=st.lists(st.integers(0, 30), max_size=4),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_invariants_on_structured_text(
    text: str, limit: int, format: str, strategy: Strategy, numbers: list[int], end: str
) -> None:
    text = text.replace("\n", end)
    check(text, limit, format=format, strategy=strategy, headings=headings_at(text, numbers))


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=400),
    limit=st.sampled_from([16, 32]),
    format=FORMAT,
    strategy=STRATEGY,
)
def test_invariants_on_any_unicode(text: str, limit: int, format: str, strategy: Strategy) -> None:
    check(text, limit, format=format, strategy=strategy)


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, format=FORMAT, strategy=STRATEGY, window=st.sampled_from([64, 150]))
def test_invariants_across_windows(text: str, format: str, strategy: Strategy, window: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splitting, "WINDOW", window)
        check(text, 23, format=format, strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "text",
    [
        "A" * 100_000,
        "ab,cd;" * 5_000,
        "漢" * 5_000,
        "word " * 9_000,
        "é\u0301" * 3000,
        "a\u200b" * 2000,
        "漢字。" * 2000,
        "# x" + " " * 50_000 + "x",
        "한국어" * 1500,
        "((((" * 3000,
    ],
    ids=[
        *("one word", "punctuation", "cjk", "one line", "combining", "zero width", "sentences"),
        *("heading of spaces", "hangul", "brackets"),
    ],
)
def test_a_monstrous_line_is_cut(text: str, strategy: Strategy) -> None:
    pieces = check(text, 128, format="markdown", strategy=strategy)
    assert len(pieces) > 2 or text.startswith("# x")
    assert max(map(len, pieces)) <= 128 * 1024


def test_every_strategy_fills_its_chunks() -> None:
    """A splitter that cut every word would pass the invariants."""
    text = "\n\n".join(f"Paragraph {n} says that there are {n} of them." for n in range(400))
    for strategy in STRATEGIES:
        for format in FORMATS:
            pieces = check(text, 128, format=format, strategy=strategy)
            used = len(COUNTER.tokenizer.encode(text, add_special_tokens=False).ids)
            assert len(pieces) * 128 * 0.75 < used, (strategy, format)


def test_a_tokenizer_that_joins_words_is_refused() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    with pytest.raises(ConfigError, match="not BERT's"):
        WordCounter(Tokenizer(BPE()))


SPLIT_50_MB = """
import resource, sys
from stages.splitting import split
from tests.stages.split_checks import COUNTER
kind, strategy = sys.argv[1:]
unit = {"words": "words and more words ", "one": "x", "cjk": "漢字かな", "marks": "ab,cd;"}[kind]
text = (unit * (50_000_000 // len(unit.encode()) + 1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
spans = split(text, 254, COUNTER, format="text", strategy=strategy)
used = resource.getrusage(resource.RUSAGE_SELF)
assert max(span.tokens for span in spans) <= 254
position = 0
for span in spans:
    assert not text[position : span.start].strip()
    position = span.end
assert not text[position:].strip()
print((used.ru_maxrss - before) // 1024, used.ru_utime)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        *(("words", "structure"), ("words", "fixed"), ("one", "structure")),
        *(("cjk", "recursive"), ("marks", "code")),
    ],
)
def test_a_line_of_50_mb_takes_bounded_memory_and_time(kind: str, strategy: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SPLIT_50_MB, kind, strategy],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (240, 240)),
    )
    megabytes, seconds = map(float, done.stdout.split())
    assert megabytes < 600  # measured: 86 and 12 s for words
    assert seconds < 200
