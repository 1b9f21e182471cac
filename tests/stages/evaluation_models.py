"""A tiny real model, tokenizer and adapter, and examples, for evaluation tests."""

from __future__ import annotations

from pathlib import Path

from contracts.params import Params, load_params
from contracts.records import Example
from contracts.settings import ROOT

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = "The cache is content-addressed. Rollback flips one pointer. Which gate blocks a release?"


def params() -> Params:
    """The repository's own parameters."""
    return load_params(ROOT / "params.yaml")


def save_base(folder: Path, *, positions: int = 256, seed: int = 1) -> Path:
    """A random two-layer Llama with grouped-query attention, its tokenizer and chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    special = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([WORDS], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = TEMPLATE
    config = LlamaConfig(
        hidden_size=64,  # heads of 32: vLLM's CPU attention dies on smaller ones
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=len(fast),
        max_position_embeddings=positions,
        pad_token_id=fast.pad_token_id,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, *, scale: float = 0.5, seed: int = 2) -> Path:
    """A LoRA adapter whose B matrices are random (``scale`` 0: it changes nothing)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    torch.manual_seed(seed)
    for name, tensor in tuned.named_parameters():
        if "lora_B" in name:
            tensor.data = torch.randn_like(tensor) * scale
    tuned.save_pretrained(folder)
    return folder


def example(
    number: int, *, document: str | None = "docs/a.md", answer: str | None = None
) -> Example:
    """A test example; without a document it is unanswerable."""
    return Example.model_validate(
        {
            "id": f"q{number:03d}",
            "split": "test",
            "question": f"Question {number}?",
            "document": document,
            "section": "A section" if document else None,
            "answer": (answer or f"Sentence number {number} is right.") if document else None,
            "passages": None,
            "answerable": document is not None,
        }
    )


def examples(documents: int = 8, each: int = 5, unanswerable: int = 8) -> list[Example]:
    """Questions about several documents, and some about none."""
    found = [
        example(number, document=f"docs/{number % documents}.md")
        for number in range(documents * each)
    ]
    return found + [example(1000 + number, document=None) for number in range(unanswerable)]
