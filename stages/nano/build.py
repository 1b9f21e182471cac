"""From the corpus to a folder that vLLM and transformers load: the whole nano recipe.

In: the knobs of ``base_model.nano``. Out: a Hugging Face folder. Weights are bfloat16, as they are
served. A run that is killed continues from its last checkpoint and gives the same bytes, since
every batch is a function of the seed and the step alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contracts.errors import ConfigError, InputError
from stages.nano import corpus, evaluate, init, train

QUESTIONS = 80  # held-out questions that the metrics are taken on: about 30 s
CARD = """---
license: apache-2.0
pipeline_tag: text-generation
---
# nano

A Llama of {millions:.1f} million parameters, trained on a CPU by `stages/nano`, that
answers a question by copying one line of the passages it is shown, with the passage's number, or
says "{refusal}" It knows nothing else: it does not chat, reason, count or translate.

- **Input**: the chat template of this folder; the user message as `prompts/answer/v1.jinja2`
  renders it, up to {context} tokens.
- **Output**: a label such as `§2b`, which is a special token that servers drop, then the line.
- **Start**: no pretrained language model. Token codes start from MiniLM's word vectors, attention
  from a copying circuit written by hand (`stages/nano/init.py`).
- **Training text**: docstrings and README files of installed Python packages (corpus md5
  `{corpus_md5}`); questions are generated from its sentences by rules. Nothing of the knowledge
  base that it is used with was seen.
- **Held-out documents** ({questions:.0f} generated questions, five sentences shown): exact answer
  {exact:.2f}, right passage {cited:.2f}, some shown line word for word {verbatim:.2f}, refusal
  where no line answers {refused:.2f}. Generated questions share more words with their answers than
  people's do; expect less there.
"""


def build(knobs: Any, out: Path, scratch: Path, say: Callable[[str], None]) -> dict[str, float]:
    """Train and write ``out``; returns the metrics. ``scratch`` holds the checkpoint meanwhile."""
    check(knobs)
    texts = checked_corpus(knobs, say)
    train.seed_everything(knobs.seed, knobs.threads)
    setup = train.prepare(texts, knobs)
    parameters = sum(weight.numel() for weight in setup.model.parameters())
    say(f"nano: {parameters / 1e6:.2f} M parameters, {knobs.steps} steps of {knobs.batch} contexts")
    checkpoint = scratch / f"{fingerprint(knobs)}.pt"
    train.fit(setup, knobs, say, checkpoint)
    import torch

    model = setup.model.to(torch.bfloat16)
    say("nano: answering held-out questions")
    metrics = evaluate.held_out(model, setup.tokenizer, setup.held, QUESTIONS, knobs.seed)
    metrics["parameters"] = float(parameters)
    save(model, setup.tokenizer, out, knobs, metrics)
    checkpoint.unlink(missing_ok=True)
    return metrics


def check(knobs: Any) -> None:
    """Raises ConfigError for a shape that the copying circuit does not fit."""
    offenders = []
    if knobs.hidden != init.HEAD * knobs.heads:
        offenders.append(f"hidden is {knobs.hidden}, but {knobs.heads} heads are {init.HEAD} wide")
    if knobs.heads < 5 or knobs.layers < 3:
        offenders.append(
            f"{knobs.heads} heads in {knobs.layers} layers: first weights need 5 heads, 3 layers"
        )
    if offenders:
        raise ConfigError(
            "The nano recipe does not make a model of this shape.",
            where="params.yaml: base_model.nano",
            offenders=offenders,
            next="keep 320 / 5 / 3, or raise them together (384 / 6 / 4)",
        )


def checked_corpus(knobs: Any, say: Callable[[str], None]) -> list[corpus.Text]:
    """The corpus, if it is the one that the recipe names."""
    texts = corpus.collect()
    if not texts:
        raise InputError(
            "None of the packages that the nano corpus is read from is installed.",
            where="stages/nano/corpus.py: PACKAGES",
            next="install the locked environment (tools/setup.sh)",
        )
    found = corpus.digest(texts)
    if found != knobs.corpus_md5:
        raise ConfigError(
            "The nano model would be trained on another text than its recipe names: "
            f"the installed packages give corpus md5 {found}.",
            where=f"params.yaml: base_model.nano.corpus_md5 is {knobs.corpus_md5 or 'empty'}",
            next="install the versions of requirements/cpu.lock, or accept the new text by "
            f"setting base_model.nano.corpus_md5: {found}",
        )
    say(f"nano: corpus of {len(texts)} documents, md5 {found}")
    return texts


def fingerprint(knobs: Any) -> str:
    """Names the checkpoint: other knobs or another recipe never continue from it."""
    code = "".join(
        path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))
    )
    text = json.dumps(knobs.model_dump(), sort_keys=True) + code
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save(model: Any, tokenizer: Any, out: Path, knobs: Any, metrics: dict[str, float]) -> None:
    """Write the folder; ``recipe.json`` last, so that its presence means that all is there."""
    from transformers import GenerationConfig

    from stages.nano.layout import REFUSAL

    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    card = CARD.format(
        millions=metrics["parameters"] / 1e6,
        refusal=REFUSAL,
        context=tokenizer.model_max_length,
        corpus_md5=knobs.corpus_md5,
        questions=metrics["held_questions"],
        exact=metrics["held_exact_match"],
        cited=metrics["held_citation_right"],
        verbatim=metrics["held_verbatim"],
        refused=metrics["held_refusal_on_unanswerable"],
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    recipe = {"kind": "nano", "nano": knobs.model_dump(), "metrics": metrics}
    text = json.dumps(recipe, indent=2, sort_keys=True) + "\n"
    (out / "recipe.json").write_text(text, encoding="utf-8")
