"""How many tokens a prompt has: with the model's own tokenizer and chat template.

Small prompts are counted at once; large ones in one thread, so that the event loop goes on: the
tokenizer lets go of the interpreter while it works (``encode_batch_fast`` does, ``encode`` does
not: 1 MB held the loop for seconds, against 30 ms). What cannot be counted exactly, for want of a
tokenizer or of time, is estimated from above: a byte-level tokenizer makes at most one token of a
byte, and every message and tool costs some marks.
"""

from __future__ import annotations

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, Template, Undefined
from jinja2.exceptions import TemplateError
from jinja2.utils import Namespace
from tokenizers import Tokenizer

from contracts.errors import ConfigError
from resources.prompts import environment
from serving.gateway.api_request import ApiRequest
from serving.gateway.envelope import ApiError

#: Bytes that are counted on the event loop: 50 us for 250, under 1 ms for this many.
INLINE_BYTES = 4_000
#: Seconds after which the estimate has to do. 1 MB takes 0.6 s on an idle core.
DEADLINE_SECONDS = 2.0
#: Prompts that may wait for the thread; the next ones are estimated.
MAX_WAITING = 32
#: Tokens of the marks around a message, a tool or a prompt, for the estimate.
MARKS = 16


class TokenCounter:
    """Counts for one model; made by Tokenizers.

    Args:
        tokenizer: the model's; None estimates.
        template: its chat template; None counts the messages' texts and MARKS each.
        pool: the thread for large prompts.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, template: Template | None, pool: ThreadPoolExecutor
    ) -> None:
        self._tokenizer, self._template, self._pool = tokenizer, template, pool
        self._longest = 0 if tokenizer is None else _longest_token(tokenizer)
        self._frame = self._empty_chat()

    @property
    def estimates(self) -> bool:
        """Whether there is no tokenizer: the bound is all that there is."""
        return self._tokenizer is None

    def bound(self, request: ApiRequest) -> int | None:
        """At least as many tokens as there are, worked out in 3 us; None where only counting tells:
        tools, whose form the template chooses, and letters that a tokenizer may take apart into
        more than their bytes."""
        if self._tokenizer is None:
            return estimate(request)
        if not self._longest and not all(map(str.isascii, request.texts())):
            return None
        if request.kind != "chat":
            return estimate(request)
        plain = "tools" not in request.body and all(len(m) == 2 for m in request.body["messages"])
        return self._frame + estimate(request) if plain and self._frame is not None else None

    def afterwards(self, request: ApiRequest) -> tuple[int, bool]:
        """Tokens of a prompt that was not counted before it went up, and whether that is a guess:
        a large one is taken for a quarter of its bytes. Where there is no tokenizer, the bound."""
        if self._tokenizer is None or _size(request) <= INLINE_BYTES:
            return self._now(request) if self._tokenizer else estimate(request), False
        return -(-_size(request) // 4), True

    async def count(self, request: ApiRequest, most: int | None = None) -> int:
        """Tokens of all prompts of a request.

        Args:
            request: validated.
            most: the key's max_prompt_tokens.

        Raises ApiError ``context_length_exceeded`` when there are more than ``most``.
        """
        found = await self._count(request, most)
        if most is not None and found > most:
            raise too_long(most)
        return found

    async def _count(self, request: ApiRequest, most: int | None) -> int:
        size = _size(request)
        if self._tokenizer is None:
            return estimate(request)
        # No token is longer than the longest: hopeless prompts are not counted at all.
        if most is not None and self._longest and size > 4 * most * self._longest:
            raise too_long(most)
        if size <= INLINE_BYTES:
            return self._now(request)
        if self._pool._work_queue.qsize() >= MAX_WAITING:
            return estimate(request)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                return await loop.run_in_executor(self._pool, self._now, request)
        except TimeoutError:
            return estimate(request)

    def _empty_chat(self) -> int | None:
        """Tokens of a chat in which nothing is said: what the template adds. None for a template
        that cannot be rendered, or that does more with a text than to write it once."""
        if self._tokenizer is None or self._template is None:
            return 0
        try:
            empty, some = (
                self._rendered(
                    ApiRequest("chat", "", {"messages": [{"role": "user", "content": text}]})
                )
                for text in ("", "x" * MARKS)
            )
        except Exception:  # a template can raise anything
            return None
        assert empty is not None and some is not None
        return self._tokens(empty, specials=False) if len(some) - len(empty) <= MARKS else None

    def _now(self, request: ApiRequest) -> int:
        if request.kind == "chat":
            try:
                text = self._rendered(request)
            except Exception:  # a template can raise anything; the engine will say what it is
                return estimate(request)
            if text is not None:
                return self._tokens(text, specials=False)
            return sum(self._tokens(text) + MARKS for text in request.texts())
        prompts = request.body.get("prompt" if request.kind == "completions" else "input")
        return sum(
            self._tokens(prompt) if isinstance(prompt, str) else len(prompt)
            for prompt in _prompts(prompts)
        )

    def _rendered(self, request: ApiRequest) -> str | None:
        """What the engine will make of the messages; None without a template."""
        if self._template is None:
            return None
        body = request.body
        messages = [_flat(message) for message in body["messages"]]
        return self._template.render(
            messages=messages,
            tools=body.get("tools"),
            documents=None,
            add_generation_prompt=True,
            **(body.get("chat_template_kwargs") or {}),
        )

    def _tokens(self, text: str, *, specials: bool = True) -> int:
        assert self._tokenizer is not None
        return len(self._tokenizer.encode_batch_fast([text], add_special_tokens=specials)[0])


class Tokenizers:
    """Opens the tokenizer of each model once, and owns the thread that counts large prompts."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "count-tokens")
        self._open: dict[Path | None, TokenCounter] = {}

    def open(self, folder: Path | None) -> TokenCounter:
        """The counter for a Hugging Face folder (``tokenizer.json`` and the chat template, in
        ``chat_template.jinja`` or ``tokenizer_config.json``); for None an estimate.

        Blocks for up to a second the first time. Raises ConfigError for a folder that is there and
        cannot be used.
        """
        if folder not in self._open:
            if folder is None:
                self._open[folder] = TokenCounter(None, None, self._pool)
            else:
                self._open[folder] = TokenCounter(*_load(folder), self._pool)
        return self._open[folder]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def most_tokens(request: ApiRequest, prompt: int, default_max: int) -> int:
    """What a request may use at most: its prompts once, and every answer that it may ask for.

    Args:
        request: ``n`` and ``best_of`` multiply the answers; so do several prompts.
        prompt: tokens of all prompts.
        default_max: tokens of an answer when the request sets no limit.
    """
    if request.kind == "embeddings":
        return prompt
    best_of = request.body.get("best_of")
    answers = max(request.n, best_of if isinstance(best_of, int) else 1) * request.prompts
    limit = default_max if request.max_tokens is None else request.max_tokens
    return prompt + answers * limit


def estimate(request: ApiRequest) -> int:
    """An upper bound for byte-level tokenizers: a token a byte, and MARKS a message or tool."""
    body = request.body
    if request.kind != "chat":
        prompts = _prompts(body.get("prompt" if request.kind == "completions" else "input"))
        return sum(
            MARKS + (len(item.encode("utf-8", "replace")) if isinstance(item, str) else len(item))
            for item in prompts
        )
    found = MARKS
    for part in (*body["messages"], *(body.get("tools") or ())):
        found += MARKS + _bytes(part)
    return found


def too_long(most: int) -> ApiError:
    return ApiError(
        "context_length_exceeded",
        f"The prompt has more than the {most} tokens that this key may send.",
        param="messages",
    )


def _load(folder: Path) -> tuple[Tokenizer, Template | None]:
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_truncation()  # some are saved with one, and would count at most that
        tokenizer.no_padding()
        text = _template_text(folder)
        if text is None:
            return tokenizer, None
        text = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)  # marks for training only
        return tokenizer, chat_environment().from_string(text)
    except Exception as error:  # the tokenizers package raises bare Exception
        raise ConfigError(
            f"The tokenizer cannot be used: {error}",
            where=str(folder),
            next="name a folder with tokenizer.json, as transformers saves it, or none",
        ) from None


def _template_text(folder: Path) -> str | None:
    path, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    template = found.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None


def chat_environment() -> Environment:
    """The project's sandbox with what Hugging Face chat templates may use."""
    env = environment()
    env.add_extension("jinja2.ext.loopcontrols")
    env.undefined = Undefined  # templates test for keys that are not there
    env.filters["tojson"] = _tojson
    env.globals.update(
        raise_exception=_refuse,
        strftime_now=lambda form: datetime.now().strftime(form),
        namespace=Namespace,
        range=range,
        dict=dict,
    )
    return env


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter: unlike jinja2's own it escapes no HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _longest_token(tokenizer: Tokenizer) -> int:
    """Bytes of the longest token of a byte-level tokenizer; 0 for others, which may drop text."""
    vocabulary = tokenizer.get_vocab()
    if tokenizer.normalizer is not None or "\u0120" not in vocabulary:  # the byte of a space
        return 0
    return max(map(len, vocabulary))


def _flat(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose text parts are joined, as vLLM does for templates that expect a string."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = [part["text"] for part in content if part.get("type") == "text"]
    return {**message, "content": "\n".join(texts)}


def _prompts(value: Any) -> list[Any]:
    """The prompts of a completion or embedding: texts, or lists of token ids."""
    if isinstance(value, str):
        return [value]
    if value and isinstance(value[0], int):
        return [value]
    return list(value or [])


def _size(request: ApiRequest) -> int:
    """Bytes that there are to count, up to four times too many outside ASCII; tools included."""
    found = sum(len(text) if text.isascii() else 4 * len(text) for text in request.texts())
    if tools := request.body.get("tools"):
        found += _bytes(tools)
    return found


def _bytes(value: Any) -> int:
    """Bytes of a JSON value's texts, keys and marks."""
    if isinstance(value, str):
        return len(value.encode("utf-8", "replace"))
    if isinstance(value, dict):
        return sum(len(key) + _bytes(item) + 6 for key, item in value.items())
    if isinstance(value, list):
        return sum(_bytes(item) + 2 for item in value)
    return 20
