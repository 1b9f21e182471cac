"""What the nano model can do on documents it never saw.

In: a trained setup. Out: shares in [0, 1] over held-out questions: whole answers exactly right,
citations right, refusals where the passages lack the answer.
"""

from __future__ import annotations

import random
from typing import Any

from stages.nano import layout, tokens
from stages.nano.batches import Maker

MAX_ANSWER = 160  # tokens


def prompt_ids(tokenizer: Any, user: str, system: str = layout.SYSTEM) -> list[int]:
    """A prompt as the chat template renders it."""
    text = f"{tokens.BOS}{tokens.SYSTEM}{system}{tokens.USER}{user}{tokens.ASSISTANT}"
    return list(tokenizer.encode(text, add_special_tokens=False))


def answer(model: Any, tokenizer: Any, user: str, limit: int = MAX_ANSWER) -> str:
    """The greedy answer, its label included."""
    import torch

    ids = torch.tensor([prompt_ids(tokenizer, user)])
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=limit,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=False)
    return str(text.partition(tokens.END)[0])


def held_out(model: Any, tokenizer: Any, maker: Maker, count: int, seed: int) -> dict[str, float]:
    """Scores over ``count`` contexts of five sentences with one question each.

    ``held_verbatim`` is the share of answers that are some line of the prompt to the last token,
    the right one or not: how well the model copies, whatever it chose.
    """
    rng = random.Random(f"{seed}/evaluate")
    exact: list[bool] = []
    cited: list[bool] = []
    verbatim: list[bool] = []
    refused: list[bool] = []
    false_refusals: list[bool] = []
    model.eval()
    while len(exact) + len(refused) < count:
        shown, hidden = maker.sentences(rng, 5)
        for item in maker.items(shown, hidden, rng, 1):
            user = layout.render_user(item.question, shown)
            # Through the tokenizer: labels swallow the blank behind them.
            lines = {_round_trip(tokenizer, line) for line in user.split("\n")}
            wanted = _round_trip(tokenizer, item.target)
            got = answer(model, tokenizer, user)
            verbatim.append(got in lines)
            if item.target.startswith(layout.REFUSE + " "):
                refused.append(got == wanted)
                continue
            exact.append(got == wanted)
            cited.append(got[-3:] == wanted[-3:])
            false_refusals.append(got.startswith(layout.REFUSE))
    return {
        "held_exact_match": _share(exact),
        "held_citation_right": _share(cited),
        "held_verbatim": _share(verbatim),
        "held_refusal_on_unanswerable": _share(refused),
        "held_false_refusal": _share(false_refusals),
        "held_questions": float(len(exact) + len(refused)),
    }


def _round_trip(tokenizer: Any, text: str) -> str:
    return str(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)))


def _share(values: list[bool]) -> float:
    return round(sum(values) / len(values), 4) if values else 0.0
