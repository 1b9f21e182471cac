"""Generated questions: their answers stand verbatim in the passage that they name."""

import random

from stages.nano import batches, layout, questions, words
from stages.nano.corpus import Section, Text
from tests.stages import nano_models


def maker() -> batches.Maker:
    texts = nano_models.texts()
    rarity = words.rarity(section.text for text in texts for section in text.sections)
    return batches.Maker(batches.chunk(texts, low=10, high=240), rarity)


def contexts(seed: int, count: int = 40) -> list[tuple[list[batches.Passage], list[batches.Item]]]:
    made, rng = maker(), random.Random(seed)
    found = []
    for _ in range(count):
        shown, hidden = made.context(rng, 3)
        found.append((shown, made.items(shown, hidden, rng, 6)))
    return found


def test_every_answer_is_verbatim_in_its_passage() -> None:
    answered = refused = 0
    for shown, items in contexts(1):
        user = layout.render_user("", shown)
        for item in items:
            assert item.target in user.split("\n")
            if item.target == f"{layout.REFUSE} {layout.REFUSAL}":
                refused += 1
                continue
            label, _, line = item.target.partition(" ")
            source = shown[int(label[1]) - 1]
            text, _, mark = line.rpartition(" ")
            assert mark == f"[{source.n}]"
            assert " ".join(text.split()) in source.text
            answered += 1
    assert answered > 50
    assert refused > 10


def test_no_passage_is_shown_twice() -> None:
    for shown, _ in contexts(2):
        assert len({passage.text for passage in shown}) == len(shown)
        assert [passage.n for passage in shown] == list(range(1, len(shown) + 1))


def test_same_seed_same_questions() -> None:
    assert contexts(3, 5) == contexts(3, 5)
    assert contexts(3, 5) != contexts(4, 5)


def test_the_asked_line_covers_the_question_best() -> None:
    made = maker()
    for shown, items in contexts(5):
        lines = [line for one in shown for _, line in layout.labelled(one.n, one.text)]
        for item in items:
            asked = set(words.stems(item.question))
            scores = sorted(made.cover(asked, set(words.stems(line))) for line in lines)
            if item.target.startswith(layout.REFUSE + " "):
                assert scores[-1] <= 0.45
            else:
                own = made.cover(asked, set(words.stems(item.target.partition(" ")[2])))
                assert own == scores[-1] > scores[-2]


def test_questions_vary() -> None:
    rng = random.Random(0)
    sentence = "The gate compares the candidate with the stable release."
    asked = {questions.ask(sentence, "Gates", {}, rng, "We see it in the log.") for _ in range(200)}
    assert len(asked) > 150
    assert questions.ask("It is so.", "", {}, rng) is None


def test_stems() -> None:
    assert words.stem("Releases") == words.stem("released") == words.stem("release")
    assert words.stem("stopping") == words.stem("stop")
    assert words.stems("the run_id of my releases") == ["run", "id", words.stem("release")]


def test_chunks_end_at_lines() -> None:
    text = Text("T", (Section("H", " ".join(f"Sentence {n} is here." for n in range(60))),))
    for passage in batches.chunk([text])[0]:
        assert len(passage.text) <= 620
        assert passage.text.endswith("here.")
