"""Classes of questions: the rules, their order, and the golden questions as people type them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from stages.query_class import CLASSES, query_class

GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "questions.yaml"


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("the event says run_cache, did my code actually execute?", "identifier"),
        ("move .ratchet to a bigger disk", "identifier"),
        ("I edited release.json by hand, will it still deploy?", "identifier"),
        ("What can dvc/how say after a run?", "identifier"),
        ("What should a client do on a 503?", "identifier"),
        ("Which log entries can I lose if the gateway gets kill -9?", "identifier"),
        ("At what point does EnvVar look up the value?", "identifier"),
        ("what does `ratchet down` stop", "identifier"),
        ("How are the vLLM options verified before a deployment?", "behaviour"),  # said, not spelt
        ("Why don't we just reject any candidate whose average went down?", "why"),
        ("The release id is the same as last week. How come?", "why"),
        ("vLLM dies during startup, what is the usual reason?", "why"),
        ("How do I change the wording of the prompt?", "how-to"),
        ("I want to index another folder, what do I edit?", "how-to"),
        ("where do I point Prometheus", "how-to"),
        ("how long may a question be", "value"),
        ("At what time does the nightly job start?", "value"),
        ("A long answer was finished after midnight. To which day does it belong?", "value"),
        ("where on disk does a deployed release live", "value"),
        ("does ratchet phone home", "yes-no"),
        ("one answer timed out during evaluation, can the candidate still pass", "yes-no"),
        ("Does the API check who is calling?", "yes-no"),
        ("what is nano", "definition"),
        ("difference between healthz and readyz for the load balancer", "definition"),
        ("What happens when the new engine doesn't pass its check?", "behaviour"),
        ("how is a release identifier computed", "behaviour"),
        ("no space left on device", "statement"),
        ("my nightly schedule never fires", "statement"),
        ("", "statement"),
    ],
)
def test_the_class_of_a_question(question: str, expected: str) -> None:
    assert query_class(question) == expected


def test_white_space_and_the_question_mark_do_not_matter() -> None:
    golden = yaml.safe_load(GOLDEN.read_text(encoding="utf-8"))
    for item in golden:
        plain = query_class(item["question"])
        assert plain in CLASSES
        assert query_class("  " + item["question"].replace(" ", "\n ") + " ") == plain


def test_every_class_has_golden_questions_on_dev() -> None:
    """A class without questions is a row that says nothing."""
    golden = yaml.safe_load(GOLDEN.read_text(encoding="utf-8"))
    asked = [query_class(q["question"]) for q in golden if q["split"] == "dev" and q["answerable"]]
    counts = {name: asked.count(name) for name in CLASSES}
    assert min(counts.values()) >= 3 and max(counts.values()) <= len(asked) / 3, counts
