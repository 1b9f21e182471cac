"""Prompts are counted as the engine will: transformers is the judge."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import ConfigError
from serving.gateway.api_request import ApiRequest
from serving.gateway.envelope import ApiError
from serving.gateway.limits import tokens
from serving.gateway.limits.tokens import Tokenizers, estimate, most_tokens

TEMPLATE = (
    "{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ '<|' + message.role + '|>' + message.content | trim + '\n' }}"
    "{%- if loop.index > 50 %}{% break %}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer trained on this guide, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    path = tmp_path_factory.mktemp("a model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|user|>", "<|system|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    guide = Path(__file__).parents[2] / "docs"
    tokenizer.train_from_iterator([p.read_text() for p in sorted(guide.glob("g*.md"))], trainer)
    tokenizer.enable_truncation(16)  # saved as some are; it must not count
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def chat(*messages: tuple[str, Any], **body: Any) -> ApiRequest:
    written = [{"role": role, "content": content} for role, content in messages]
    return ApiRequest("chat", "m", {"messages": written, **body})


def count(folder: Path | None, request: ApiRequest, most: int | None = None) -> int:
    tokenizers = Tokenizers()
    try:
        return asyncio.run(tokenizers.open(folder).count(request, most))
    finally:
        tokenizers.close()


def test_a_chat_is_counted_as_transformers_would(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    judge = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    judge.chat_template = TEMPLATE
    for request in (
        chat(("system", "Answer briefly."), ("user", "  Wie groß ist der Zähler? 😀 <|user|>")),
        chat(("user", "{{ 7 * 7 }} {% raw %}"), ("assistant", "49"), ("user", "why?")),
        chat(("user", "x"), tools=[{"type": "function", "function": {"name": "für"}}]),
        chat(("user", "long " * 5000)),
    ):
        text = judge.apply_chat_template(
            request.body["messages"],
            tools=request.body.get("tools"),
            tokenize=False,
            add_generation_prompt=True,
        )
        expected = len(judge(text, add_special_tokens=False, truncation=False)["input_ids"])
        assert count(folder, request) == expected


def test_parts_are_joined_and_images_are_not_text(folder: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "text", "text": "b"}]
    assert count(folder, chat(("user", parts))) == count(folder, chat(("user", "a\nb")))


def test_completions_and_embeddings(folder: Path) -> None:
    def completion(prompt: Any) -> int:
        return count(folder, ApiRequest("completions", "m", {"prompt": prompt}))

    one = completion("the gateway")
    assert completion(["the gateway", "the gateway"]) == 2 * one
    assert completion([5, 6, 7]) == 3
    assert completion([[5, 6, 7], [8]]) == 4
    assert count(folder, ApiRequest("embeddings", "m", {"input": ["the gateway"]})) == one


def test_too_long_a_prompt_is_refused_at_its_first_token_over(folder: Path) -> None:
    request = chat(("user", "the gateway"))
    found = count(folder, request)
    assert count(folder, request, found) == found
    for hopeless in (request, chat(("user", "words " * 100_000))):
        with pytest.raises(ApiError) as caught:
            count(folder, hopeless, found - 1)
        assert caught.value.code == "context_length_exceeded"


def test_the_loop_goes_on_while_a_megabyte_is_counted(folder: Path) -> None:
    # Words of every kind: one that repeats would come out of the tokenizer's own cache.
    text = " ".join(f"{number:x}{number * 7919}" for number in range(70_000))[:1_000_000]

    async def main() -> tuple[int, float, int]:
        tokenizers, worst, ticks = Tokenizers(), 0.0, 0
        counter = tokenizers.open(folder)
        task = asyncio.create_task(counter.count(chat(("user", text))))
        used = time.thread_time()
        while not task.done():
            await asyncio.sleep(0)
            # CPU of this thread between two looks: what the loop itself was kept busy with,
            # whatever else the machine does; a held interpreter would show in the ticks.
            now = time.thread_time()
            worst, used, ticks = max(worst, now - used), now, ticks + 1
        tokenizers.close()
        return await task, worst, ticks

    found, worst, ticks = asyncio.run(main())
    assert found > 100_000
    assert worst < 0.05
    assert ticks > 1000  # it really ran beside the counting


def test_what_takes_too_long_is_estimated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = chat(("user", "the gateway " * 2000))
    exact = count(folder, request)
    monkeypatch.setattr(tokens, "DEADLINE_SECONDS", 0.0)
    assert count(folder, request) == estimate(request) >= exact
    monkeypatch.setattr(tokens, "MAX_WAITING", 0)
    assert count(folder, request) == estimate(request)


@pytest.mark.parametrize(
    "text", ["", "plain", "日本語のテキスト", "😀" * 50, "\x00\u200b", "a" * 999]
)
def test_the_estimate_is_an_upper_bound(folder: Path, text: str) -> None:
    request = chat(("system", text), ("user", text), tools=[{"name": text}])
    assert count(None, request) == estimate(request)
    assert count(None, request) >= count(folder, request)
    with pytest.raises(ApiError):
        count(None, request, 10)


@pytest.mark.parametrize("text", ["", "plain", "日本語のテキスト", "😀" * 50, "a" * 999])
def test_the_cheap_bound_is_one_or_is_not_given(folder: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    tokenizers = Tokenizers()
    counter = tokenizers.open(folder)
    several = chat(("system", text), *[("user", text)] * 3)
    for request in (several, ApiRequest("completions", "m", {"prompt": [text, text]})):
        bound = counter.bound(request)
        assert bound is not None and bound >= count(folder, request)
    assert counter.bound(chat(("user", text), tools=[{"name": "look"}])) is None
    # A template that says things itself is counted in; one that repeats texts has no bound.
    template = tmp_path / "chat_template.jinja"
    template.write_text("You are helpful. " * 90 + TEMPLATE)
    bound = tokenizers.open(tmp_path).bound(several)
    assert bound is not None and bound >= count(tmp_path, several)
    template.write_text(TEMPLATE + TEMPLATE)
    assert Tokenizers().open(tmp_path).bound(several) is None
    tokenizers.close()


def test_letters_that_a_tokenizer_may_take_apart_have_no_bound(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers

    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    counter = Tokenizers().open(tmp_path)
    assert counter.bound(chat(("user", "a \ufdfa"))) is None  # one letter becomes eighteen
    assert counter.bound(chat(("user", "a a"))) is not None


def test_what_was_not_counted_before_is_counted_afterwards(folder: Path) -> None:
    counter = Tokenizers().open(folder)
    small, large = chat(("user", "the gateway")), chat(("user", "the gateway " * 1000))
    assert counter.afterwards(small) == (count(folder, small), False)
    assert counter.afterwards(large) == (3000, True)
    assert Tokenizers().open(None).afterwards(large) == (estimate(large), False)


def test_a_template_that_refuses_leaves_it_to_the_engine(folder: Path) -> None:
    request = chat(("bad", "x"))
    assert count(folder, request) == estimate(request)


def test_a_template_cannot_leave_its_sandbox(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    template = "{{ messages.__class__.__base__.__subclasses__() }}"
    (tmp_path / "chat_template.jinja").write_text(template)
    request = chat(("user", "x"))
    assert count(tmp_path, request) == estimate(request)


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizers().open(tmp_path)


def test_n_multiplies_the_answers() -> None:
    def most(kind: Any = "chat", **more: Any) -> int:
        body = more.pop("body", {})
        return most_tokens(ApiRequest(kind, "m", body, **more), 100, 16)

    assert most() == 116
    assert most(max_tokens=50) == 150
    assert most(max_tokens=50, n=3) == 250
    assert most("completions", max_tokens=50, n=2, prompts=3) == 400
    assert most("completions", max_tokens=50, n=2, body={"best_of": 5}) == 350
    assert most("embeddings", max_tokens=50) == 100
