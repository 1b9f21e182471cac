r"""The rules by which prompt injection is recognised, each with what it is worth.

A rule reads a normalised copy (normalise.py: lower case, no accents). In its pattern a blank
stands for anything between two words that is no word, ``_N`` for at most N words more. ``traces``
are plain strings of which each match has one: a text without them costs 0.1 us a trace.

Worth 2 acts alone (the default threshold), worth 1 only together with another rule: it is also how
people talk. "Forget what I said", "override the default rules" and questions about system prompts
are everyday sentences. ``data`` rules read retrieved passages and tool results only, where nobody
has a reason to speak to the model.
"""

# ruff: noqa: E501
# One rule a line where it can be: a table of patterns is read by column.

from __future__ import annotations

import re
from dataclasses import dataclass

from serving.gateway.guards.normalise import normalise


@dataclass(frozen=True, slots=True)
class Rule:
    id: str
    worth: int
    traces: tuple[str, ...]
    pattern: re.Pattern[str]
    data: bool = False


def _rule(id: str, worth: int, traces: str, pattern: str, data: bool = False) -> Rule:
    words = re.sub(r" _(\d)", r"(?:[\\W_]{1,8}\\w{1,30}){0,\1}", pattern)
    return Rule(id, worth, tuple(traces.split("|")), _compiled(words.replace(" ", GAP)), data)


def _raw(id: str, worth: int, traces: tuple[str, ...], pattern: str) -> Rule:
    return Rule(id, worth, traces, re.compile(pattern))


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![^\W_])(?:{pattern})")


GAP = r"[\W_]{1,8}"
IGNORE = (
    r"(?:ignor(?:e|ing)|disregard(?:ing)?|discard(?:ing)?|forget(?:ting)?|neglect|overrid(?:e|ing)|overrule|"
    r"(?:do not|don t|dont|stop|no longer) (?:follow(?:ing)?|obey(?:ing)?|adher(?:e|ing) to|"
    r"listen(?:ing)? to)|pay no attention to)"
)
IGNORE_TRACES = "ignor|disregard|discard|forget|neglect|overr|follow|obey|adher|listen|attention to"
EARLIER = r"(?:previous|previously|prior|above|preceding|earlier|former|foregoing|original|initial)"
ORDERS = r"(?:instructions?|prompts?|directives?|guidelines?|programming|system message)"
ORDER_TRACES = "prompt|instruction|directive|guideline|programming|system message"
PROMPT_TRACES = "prompt|instruction|directive|preamble|system message"
HIDDEN = r"(?:system|initial|hidden|secret|original|developer|internal|confidential|base)"
PROMPT = r"(?:prompts?|instructions?|directives|preamble|system message)"
TELL = (
    r"(?:reveal|print|show|repeat|output|display|tell|give|leak|dump|expose|share|write|echo|"
    r"recite|disclose|translate|summari[sz]e|reproduce|copy|what is|what are|what s|whats)"
)
LEAK = r"(?:reveal|leak|dump|expose|recite|disclose|print|output|repeat|reproduce|echo)"
FREE = r"(?:unrestricted|unfiltered|uncensored|jailbroken|unaligned|amoral)"
MODEL = r"(?:ai|llm|language model|assistant|chatbot|chat ?gpt|gpt|claude|gemini|bot)"

RULES = (
    _rule("override", 2, ORDER_TRACES, rf"{IGNORE} _4 {EARLIER} _2 {ORDERS}"),
    _rule("override", 2, ORDER_TRACES, rf"{IGNORE} _3 {ORDERS} _3 (?:above|before|previously|so far)"),
    _rule("override", 2, ORDER_TRACES, rf"{IGNORE} (?:all|any|every|each) _2 {ORDERS}"),
    _rule("override", 2, IGNORE_TRACES,
          rf"{IGNORE} _2 (?:your|openai s|anthropic s) _2 (?:{ORDERS}|rules|training|safety|"
          r"restrictions|ethics|polic(?:y|ies)|filters|constraints)"),
    _rule("override-weak", 1, IGNORE_TRACES,
          rf"{IGNORE} _4 {EARLIER} _2 (?:rules|commands|directions|constraints|restrictions|context|"
          r"guidance|text|messages?)"),
    _rule("override-weak", 1, "ignor|disregard|forget",
          r"(?:ignore|disregard|forget) (?:all|everything|anything|whatever) _4 "
          r"(?:above|before|previously|so far|told|said|preceding)"),
    _rule("instead", 1, IGNORE_TRACES,
          rf"{IGNORE} _8 (?:instead|and|now|then) _1 (?:say|print|output|respond with|reply with|"
          r"tell me|write|reveal|execute|run|answer with)"),
    _rule("exfiltrate", 2, PROMPT_TRACES,
          rf"{TELL} _4 your _2 {HIDDEN} _1 {PROMPT}"),
    _rule("exfiltrate", 2, PROMPT_TRACES,
          rf"{LEAK} _3 (?:the|this|its|all) _2 {HIDDEN} _1 {PROMPT}"),
    _rule("exfiltrate-weak", 1, PROMPT_TRACES,
          rf"{TELL} _4 (?:the|your) _2 {PROMPT}"),
    _rule("repeat", 2, "you are",
          r"(?:starting|beginning|begins|starts) (?:with|from)(?: the)?(?: words| phrase)? you are"),
    _rule("repeat-weak", 1, "above|before",
          r"(?:repeat|print|output|recite|echo|reproduce|copy) _4 (?:above|before this|preceding)"),
    _rule("persona", 2, "unrestrict|unfilter|uncensor|jailb|unalign|amoral|dan mode|anything now|"
          "restrictions|limitations|filters|censorship|guideline|ethic|morals",
          rf"(?:you are now|you re now|act|behave|respond|pretend|role ?play|simulate|become) _6 "
          rf"(?:{FREE}|dan mode|do anything now|without _2 (?:restrictions|limitations|filters|"
          r"censorship|guidelines|ethics|morals)|no _2 (?:restrictions|filters|limitations|ethics))"),
    _rule("persona", 2, "you are|you re",
          r"(?:you are|you re) (?:now|no longer) _2 (?:dan|stan|aim|evil|jailbroken|bound by|"
          r"restricted|an? ai|chatgpt|claude|governed)"),
    _rule("persona", 2, "anything now|dan mode|jailbreak mode|god mode|unrestricted mode",
          r"(?:do anything now|(?:enter|enable|activate|engage|switch to|in) _2 "
          r"(?:dan|jailbreak|god|unrestricted) mode)"),
    _rule("persona-weak", 1, "mode",
          r"(?:developer|debug|admin|maintenance|sudo|dan|god) mode _2 (?:enabled|activated|engaged|"
          r"unlocked|on)"),
    _rule("unsafe-weak", 1, "safety|content|ethic|moral|moderation",
          r"(?:bypass|disable|turn off|circumvent|evade|remove|without|no|ignore) _3 "
          r"(?:safety|content|ethical|moral|moderation) _1 (?:filters?|guidelines|guardrails|"
          r"polic(?:y|ies)|checks|restrictions|protocols|measures|constraints)"),
    _rule("unsafe", 2, "your",
          r"(?:bypass|disable|turn off|circumvent|evade|remove|deactivate) _2 your _2 (?:safety|"
          r"content|ethical|moderation|filters?|guardrails|restrictions|guidelines|limitations)"),
    _rule("no-refusal-weak", 1, "refus|decline|disclaimer|apolog|warn",
          r"(?:never|do not|don t|dont|cannot|must not|without) _3 (?:refus(?:e|ing)|declin(?:e|ing)|"
          r"apologi[sz](?:e|ing)|disclaimers?|warnings?)"),
    _rule("no-refusal-weak", 1, "start|begin",
          r"(?:start|begin) _2 (?:your|the) (?:response|answer|reply) with (?:sure|absolutely|yes|of)"),
    _raw("markers", 2, ("<|im_start|>", "<|start_header_id|>", "<|system|>", "<start_of_turn>", "<<sys>>"),
         r"<\|(?:im_start|start_header_id)\|>\s*(?:system|assistant|user)\b|<\|system\|>|"
         r"<start_of_turn>\s*(?:model|system)|<<sys>>"),
    _raw("markers-weak", 1, ("<|im_", "<|end", "<|eot", "[inst]", "[/inst]", "system>", "##"),
         r"<\|(?:im_start|im_end|endoftext|eot_id|end_of_text)\|>|\[/?inst\]|</?system>|"
         r"#{2,} ?(?:system|new instructions?) ?(?:prompt|message)?:"),
    _raw("image-exfiltration", 2, ("](http",),
         r"!\[[^\]]{0,80}\]\(https?://[^)\s]{1,200}[?&][^)\s]{0,80}=(?:\{|\[|<|%7b|\$\{)"),
    _rule("apart", 2, "ignore|disregard|forget",
          r"\w{0,20}(?:ignore|disregard|forget)(?:all|any|the|my|your|of){0,3}(?:previous|prior|"
          r"above|earlier)(?:instructions?|prompts?|directives)"),
    # Other languages, accents folded away.
    _rule("override", 2, "anweisung|instruktion|vorgabe",
          r"(?:ignorier\w*|vergiss|vergessen|missachte\w*) _4 (?:anweisung\w*|instruktion\w*|"
          r"vorgabe\w*)"),
    _rule("override", 2, "instruction|consigne",
          r"(?:ignore[rz]?|oublie[rz]?) _4 (?:instructions|consignes) _2 (?:precedentes|anterieures|"
          r"initiales|ci dessus)"),
    _rule("override", 2, "instruc",
          r"(?:ignor[ae]|olvida|olvide|esqueca|desconsidere|dimentica) _4 (?:instrucciones|instrucoes)"
          r" _2 (?:anteriores|previas|iniciales|iniciais|acima)"),
    _rule("override", 2, "istruzioni", r"(?:ignora|dimentica) _4 istruzioni _2 precedenti"),
    _rule("override", 2, "指令|指示|提示|规则",
          r"\w{0,30}(?:忽略|忽视|无视|忘记|無視)\w{0,10}(?:之前|以上|上述|前面|先前)\w{0,6}(?:指令|指示|提示|规则)"),
    _rule("override", 2, normalise("инструкци"),
          normalise("(?:игнорируй|забудь|проигнорируй)")
          + r"\w* _3 " + normalise("(?:предыдущие|прошлые|прежние)") + " _2 "
          + normalise("инструкции")),
    # What speaks to the model where only facts should stand.
    _rule("addressed", 1, "ai|llm|model|assistant|chatbot|gpt|claude|gemini|bot",
          rf"(?:dear|hey|attention|note to|message to|instructions? (?:to|for)|if you are an?|as an?)"
          rf"(?: the| any| all)? _1 {MODEL}", True),
    _rule("conduct", 1, "when|whenever|if|before",
          r"(?:when|whenever|before) _1 (?:summari[sz]ing|answering|responding|processing|asked|"
          r"replying|reading this) _9 (?:say|include|recommend|mention|tell|respond|reply|output|"
          r"state|claim|append|add)", True),
    _rule("conduct", 1, "you must|you should|you will|your",
          r"(?:you (?:must|should|will|are to)(?: now| always| instead)? (?:say|reply|respond|answer|"
          r"recommend|tell|output|ignore|include|claim|append|call)|"
          r"your (?:new|real|actual|only) (?:task|instructions?|objective|role|goal|purpose))", True),
    _rule("secrecy", 1, "tell|inform|mention|reveal|disclose|notify|alert",
          r"(?:do not|don t|dont|never|without) _1 (?:tell|inform|telling|informing|alert|notify|"
          r"mention|reveal|disclose) _4 (?:users?|humans?|operators?|anyone|anybody)", True),
    _rule("exfiltrate-data", 2,
          "conversation|chat history|system prompt|api key|credential|password|secret|environment",
          r"(?:send|post|forward|exfiltrate|upload|email|transmit|leak|append|encode) _6 "
          r"(?:conversation|chat history|system prompt|api keys?|credentials|passwords?|secrets?|"
          r"environment variables) _6 (?:to|at|via|into) _2 \S{0,40}"
          r"(?:https?|www|url|webhook|endpoint|attacker|@)", True),
)  # fmt: skip
