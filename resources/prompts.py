"""Prompts: jinja2 templates in git, checked when they are loaded, rendered in a sandbox.

In: ``prompts/<name>/<version>.jinja2`` and ``prompts/<name>/tags.yaml``, or the self-contained
``prompts.json`` that the stage ``prompts`` makes of them (it is what a release names and what the
gateway and the offline answers render from). Out: chat messages for one question.

A template has exactly two blocks, ``system`` and ``user``, and sees the two variables of
:class:`Variables`, whose types are checked at every rendering. Text outside the blocks, another
variable, a field that passages do not have, an include, a macro or a call of a global is refused at
load time: a typo must not wait for the first request that takes its branch. Values are data and are
never compiled, so a question that holds ``{{ … }}`` stays text. Clients cannot bring templates.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import (
    Environment,
    StrictUndefined,
    Template,
    TemplateError,
    meta,
    nodes,
    pass_context,
)
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, ValidationError

from contracts.errors import InputError, NotFoundError, RatchetError
from contracts.records import Passage

#: Names and versions are looked up in an index of what was loaded and never joined to a path.
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
#: A tag is an MLflow alias too: resources/prompt_registry.py mirrors it. MLflow keeps ``latest``
#: and ``v<digits>`` for itself.
TAG = re.compile(r"(?!latest$|v\d+$)[a-z][a-z0-9_-]{0,63}")
BLOCKS = ("system", "user")
#: Rendered characters of one message. Twenty passages of 254 tokens stay under a third of it.
MAX_CHARACTERS = 64_000
#: Of CPU time, so that a busy machine fails nothing. Looked at between rendered pieces and at every
#: turn of a loop. Twelve sentences take our template 0.9 ms, twenty passages of 1,200 characters 8.
MAX_SECONDS = 0.25

Message = dict[str, str]


class Shown(BaseModel):
    """What a template may read of a passage."""

    model_config = ConfigDict(strict=True, from_attributes=True)

    n: int
    title: str
    heading: str
    path: str
    text: str


class Variables(BaseModel):
    """What a template may read."""

    model_config = ConfigDict(strict=True)

    question: str
    passages: Sequence[Shown]


FIELDS = tuple(Shown.model_fields)


def environment() -> Environment:
    """The project's only jinja2 environment: immutable sandbox, strict, no globals, no loader."""
    env = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True
    )
    env.globals.clear()  # range, lipsum, cycler…: without them loops only walk what they are given
    return env


#: No template can name it: variables and filters of that name are unknown at load time.
_CLOCK = "-clock"


@pass_context
def _on_the_clock(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    """``items`` until the rendering's deadline. Raises TimeoutError."""
    deadline = context.parent[_CLOCK]
    for item in items:
        if time.thread_time() > deadline:
            raise TimeoutError
        yield item


@dataclass(frozen=True)
class PromptVersion:
    """One immutable version of a prompt. ``sha256`` is of ``text`` as UTF-8."""

    name: str
    version: str
    text: str
    sha256: str

    @classmethod
    def of(cls, name: str, version: str, text: str) -> PromptVersion:
        return cls(name, version, text, hashlib.sha256(text.encode()).hexdigest())

    @cached_property
    def _template(self) -> Template:
        """Compiled, with a look at the clock at every turn of every loop: a loop that renders
        nothing would otherwise never be interrupted."""
        env = environment()
        env.filters[_CLOCK] = _on_the_clock
        tree = env.parse(self.text)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(
                loop.iter, _CLOCK, [], [], None, None, lineno=loop.lineno, environment=env
            )
        return env.from_string(tree)

    def messages(self, question: str, passages: Sequence[Passage]) -> list[Message]:
        """The system and the user message for ``question``. Up to MAX_SECONDS of CPU a message.

        Raises InputError for values of another type, when rendering fails, and when it passes
        MAX_CHARACTERS or MAX_SECONDS.
        """
        values = self._values(question, passages)
        try:
            return [{"role": block, "content": self._render(block, values)} for block in BLOCKS]
        except RatchetError:
            raise
        except Exception as error:  # a template can raise anything: it is a program
            raise InputError(
                f"The prompt does not render: {type(error).__name__}: {error}", where=str(self)
            ) from error

    @cached_property
    def instructions(self) -> str:
        """The system message without question and passages: what must not leak into an answer,
        while passages are there to be quoted. "" for a template that needs a passage."""
        try:
            return self.messages("", [])[0]["content"]
        except RatchetError:
            return ""

    def _values(self, question: str, passages: Sequence[Passage]) -> dict[str, Any]:
        try:
            return Variables(question=question, passages=passages).model_dump()  # type: ignore[arg-type]
        except ValidationError as error:  # never its input: that is people's words
            wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise InputError(
            "The prompt's variables have another type.", where=str(self), offenders=wrong
        )

    def _render(self, block: str, values: dict[str, Any]) -> str:
        template, deadline, size = self._template, time.thread_time() + MAX_SECONDS, 0
        pieces: list[str] = []
        try:
            for piece in template.blocks[block](template.new_context({**values, _CLOCK: deadline})):
                size += len(piece)
                pieces.append(piece)
                if size > MAX_CHARACTERS or time.thread_time() > deadline:
                    raise TimeoutError
        except TimeoutError:
            raise InputError(
                f"Block '{block}' renders more than {MAX_CHARACTERS} characters "
                f"or longer than {MAX_SECONDS:g} s.",
                where=str(self),
                next="show fewer passages (answers.top_k) or a smaller template",
            ) from None
        return "".join(pieces).strip()

    def __str__(self) -> str:
        return f"prompts/{self.name}/{self.version}.jinja2"


@dataclass(frozen=True)
class Prompts:
    """Every version of every prompt, and the tags that point at them."""

    versions: dict[str, dict[str, PromptVersion]] = field(default_factory=dict)
    tags: dict[str, dict[str, str]] = field(default_factory=dict)  # name -> tag -> version

    def get(self, name: str, version: str = "stable") -> PromptVersion:
        """The prompt of that version or tag. Raises NotFoundError naming what there is."""
        of_name = self.versions.get(name)
        if of_name is None:
            known = ", ".join(sorted(self.versions)) or "none"
            raise NotFoundError(f"There is no prompt '{name}'.", next=f"known prompts: {known}")
        found = of_name.get(self.tags.get(name, {}).get(version, version))
        if found is None:
            known = ", ".join(sorted({*of_name, *self.tags.get(name, {})}))
            raise NotFoundError(
                f"Prompt '{name}' has no version or tag '{version}'.", next=f"known: {known}"
            )
        return found

    def all(self) -> list[PromptVersion]:
        """Every version, by name and version."""
        found = [item for of_name in self.versions.values() for item in of_name.values()]
        return sorted(found, key=lambda item: (item.name, item.version))

    def to_json(self) -> dict[str, Any]:
        """The self-contained form; :meth:`from_json` reads it back."""
        return {
            "format": 1,
            "prompts": {
                name: {
                    "tags": dict(sorted(self.tags.get(name, {}).items())),
                    "versions": {
                        version: {"sha256": item.sha256, "text": item.text}
                        for version, item in sorted(of_name.items())
                    },
                }
                for name, of_name in sorted(self.versions.items())
            },
        }

    @classmethod
    def from_json(cls, data: Any, where: str = "prompts.json") -> Prompts:
        """Read :meth:`to_json`. Every version is checked as at load time, its hash too."""
        if not isinstance(data, dict) or data.get("format") != 1:
            raise InputError(
                "This is not a prompts file of format 1.",
                where=where,
                next="make it with `python -m stages.prompts`",
            )
        offenders: list[str] = []
        found: list[PromptVersion] = []
        tags: dict[str, dict[str, str]] = {}
        try:
            for name, entry in data["prompts"].items():
                tags[name] = dict(entry["tags"])
                for version, item in entry["versions"].items():
                    prompt = PromptVersion.of(name, version, item["text"])
                    if prompt.sha256 != item["sha256"]:
                        offenders.append(f"{prompt}: its text does not have the sha256 it names")
                    found.append(prompt)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            offenders.append(f"not the form that stages.prompts writes: {error!r}")
        return _checked(found, tags, offenders, where)


def load(folder: Path) -> Prompts:
    """Read ``<folder>/<name>/<version>.jinja2`` and ``tags.yaml``. Raises InputError naming all
    offenders: bad names, templates that do not parse or render, tags that point nowhere."""
    if not folder.is_dir():
        raise InputError(
            "The folder of prompts does not exist.",
            where=str(folder),
            next="expected <folder>/<name>/<version>.jinja2 and tags.yaml",
        )
    offenders: list[str] = []
    found: list[PromptVersion] = []
    tags: dict[str, dict[str, str]] = {}
    for home in sorted(item for item in folder.iterdir() if item.is_dir()):
        for path in sorted(home.glob("*.jinja2")):
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                offenders.append(f"{path}: not UTF-8 at byte {error.start}")
                continue
            found.append(PromptVersion.of(home.name, path.name.removesuffix(".jinja2"), text))
        tags[home.name] = _read_tags(home / "tags.yaml", offenders)
    return _checked(found, tags, offenders, str(folder))


def read(path: Path) -> Prompts:
    """Read a prompts JSON file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"The prompts file cannot be read: {error}", where=str(path)) from None
    return Prompts.from_json(data, str(path))


def _read_tags(path: Path, offenders: list[str]) -> dict[str, str]:
    """``tags.yaml`` as tag -> version; problems are added to ``offenders``."""
    import yaml

    if not path.is_file():
        offenders.append(f"{path}: missing; it must at least say which version is stable")
        return {}
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        offenders.append(f"{path}: not YAML: {' '.join(str(error).split())}")
        return {}
    if not isinstance(data, dict) or not all(
        isinstance(tag, str) and isinstance(version, str) for tag, version in data.items()
    ):
        offenders.append(f"{path}: must map tags to versions, e.g. 'stable: v1'")
        return {}
    return data


def _checked(
    found: Iterable[PromptVersion],
    tags: dict[str, dict[str, str]],
    offenders: list[str],
    where: str,
) -> Prompts:
    """Prompts of what was found, or InputError listing every offender."""
    versions: dict[str, dict[str, PromptVersion]] = {}
    for prompt in found:
        versions.setdefault(prompt.name, {})[prompt.version] = prompt
        offenders += [f"{prompt}: {problem}" for problem in problems(prompt)]
    for name in sorted(tags.keys() | versions.keys()):
        if name not in versions:
            offenders.append(f"prompts/{name}: has no version")
        if "stable" not in tags.get(name, {}):
            offenders.append(f"prompts/{name}/tags.yaml: no tag 'stable'")
        offenders += [
            f"prompts/{name}/tags.yaml: {tag} points at {version}, which does not exist"
            for tag, version in tags.get(name, {}).items()
            if version not in versions.get(name, {})
        ]
        offenders += [
            f"prompts/{name}/tags.yaml: '{tag}' cannot be a tag (lower-case letters, digits, '_', "
            "'-', at most 64; not latest, not v1)"
            for tag in tags.get(name, {})
            if not TAG.fullmatch(tag)
        ]
        offenders += [
            f"prompts/{name}/tags.yaml: tag '{tag}' is also the name of a version"
            for tag in tags.get(name, {})
            if tag in versions.get(name, {})
        ]
    if not versions and not offenders:
        offenders.append("no prompt was found")
    if offenders:
        raise InputError(
            "The prompts cannot be used.",
            where=where,
            offenders=offenders,
            next="correct every line above; nothing was written",
        )
    return Prompts(versions, tags)


def problems(prompt: PromptVersion) -> list[str]:
    """Everything that is wrong with one version: its name, its structure, its rendering."""
    wrong = [
        f"'{part}' is not a name (lower-case letters, digits, '.', '_', '-', at most 64)"
        for part in (prompt.name, prompt.version)
        if not NAME.fullmatch(part)
    ]
    env = environment()
    try:
        tree = env.parse(prompt.text)
    except TemplateError as error:
        return [*wrong, f"line {getattr(error, 'lineno', '?')}: {error}"]
    wrong += _structure(tree)
    return wrong or _rendering(prompt)


def _structure(tree: nodes.Template) -> list[str]:
    """Blocks, variables and tags that the two-block form does not allow."""
    names = [node.name for node in tree.find_all(nodes.Block)]
    wrong = [f"block '{name}' is missing" for name in BLOCKS if name not in names]
    wrong += [f"unknown block '{name}'" for name in names if name not in BLOCKS]
    for node in tree.body:
        silent = isinstance(node, nodes.Output) and all(
            isinstance(part, nodes.TemplateData) and not part.data.strip() for part in node.nodes
        )
        if not silent and not isinstance(node, nodes.Block):
            wrong.append(f"line {node.lineno}: stands outside the blocks and would be lost")
    foreign = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
    wrong += [
        f"line {node.lineno}: {type(node).__name__.lower()} is not allowed, a version stands alone"
        for node in tree.find_all(foreign)
    ]
    wrong += [
        f"line {node.lineno}: macros and recursive loops are not allowed, they have no bound"
        for node in tree.find_all((nodes.Macro, nodes.CallBlock, nodes.For))
        if not isinstance(node, nodes.For) or node.recursive
    ]
    wrong += _fields(tree)
    unknown = meta.find_undeclared_variables(tree) - Variables.model_fields.keys()
    wrong += [
        f"unknown variable '{name}'; there are {sorted(Variables.model_fields)}"
        for name in sorted(unknown)
    ]
    return wrong


def _fields(tree: nodes.Template) -> list[str]:
    """Fields that passages do not have, read in loops over ``passages`` itself."""
    loops = [
        (loop, loop.target.name)
        for loop in tree.find_all(nodes.For)
        if isinstance(loop.iter, nodes.Name) and loop.iter.name == "passages"
        if isinstance(loop.target, nodes.Name)
    ]
    return [
        f"line {node.lineno}: a passage has no '{node.attr}'; there are {list(FIELDS)}"
        for loop, name in loops
        for node in loop.find_all(nodes.Getattr)
        if isinstance(node.node, nodes.Name) and node.node.name == name
        if node.attr not in FIELDS
    ]


def _rendering(prompt: PromptVersion) -> list[str]:
    """Render with no, one and three passages; say what fails or comes out empty or the same."""
    wrong: list[str] = []
    for count in (0, 1, 3):
        passages = [
            Passage(
                n=n,
                chunk_id=f"s:p#{n}-{n + 1}",
                path=f"path-{n}.md",
                title=f"Title {n}",
                heading="" if n == 2 else f"Heading {n}",
                text=f"Text {n}.",
                score=0.5,
            )
            for n in range(1, count + 1)
        ]
        try:
            messages = prompt.messages("What is {{ asked }}?", passages)
        except RatchetError as error:
            wrong.append(f"with {count} passages: {error.what}")
            continue
        shown = "\n".join(message["content"] for message in messages)
        if "What is {{ asked }}?" not in shown:
            wrong.append(f"with {count} passages: the question is not shown")
        lost = [str(item.n) for item in passages if item.text not in shown]
        if lost:
            wrong.append(f"with {count} passages: the text of {', '.join(lost)} is not shown")
    return wrong
