"""The nano tokenizer: byte-level BPE, one token for each label, a chat template.

In: the corpus. Out: a ``PreTrainedTokenizerFast`` that encodes any text without an unknown token.
"""

from __future__ import annotations

from typing import Any

from stages.nano import layout

BOS, SYSTEM, USER, ASSISTANT, END, PAD = (
    "<s>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<pad>",
)
CONTROL = (PAD, BOS, SYSTEM, USER, ASSISTANT, END)
CITATIONS = tuple(f"[{n}]" for n in range(1, 10))  # one token each, and visible text

#: Roles are control tokens; turns follow each other. Clients may send a user turn only.
CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + '<|end|>' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% else %}{{ '<|system|>' + message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train(texts: list[str], vocab: int) -> Any:
    """Train on ``texts``; ``vocab`` counts every token, specials included."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    # Words with their leading space, digits one by one, short runs of punctuation.
    pattern = Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]{1,2}|\s")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    special = [*CONTROL, *layout.labels()]
    visible = [layout.QUESTION, *CITATIONS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(visible) - len(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    # A label swallows the blank behind it, so that answers do not begin with one.
    core.add_special_tokens(
        [
            AddedToken(token, special=True, rstrip=token.startswith("§"), normalized=False)
            for token in special
        ]
    )
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in visible])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[SYSTEM, USER, ASSISTANT, *layout.labels()],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
