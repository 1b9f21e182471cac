"""Docstrings of an installed package as documents, read from its files without importing it.

In: a package's name. Out: one raw document for each public module, class, function and method whose
docstring says something. Reading the syntax trees costs about 1 ms a file and runs no code of the
package; importing dagster alone would cost 2 s and give the same text.

A name that the package's ``__init__`` re-exports is called by its public name: what is defined as
``dagster._core.definitions.asset_spec.AssetSpec`` is documented as ``dagster.AssetSpec``.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from re import IGNORECASE, MULTILINE, escape, search, sub

from contracts.errors import ConfigError, InputError

#: A docstring of substance: shorter ones repeat the name of what they document.
MIN_CHARACTERS, MIN_WORDS = 60, 8

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def package_folder(package: str, lock: Path) -> Path:
    """Where the package's files are, once its version agrees with the lock file.

    Raises ConfigError when it is not installed, InputError when the versions differ: its text
    would then not be what the lock says, and two machines would disagree about the documents.
    """
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):  # "a.b" without a, or no name at all
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"The package {package!r} is not installed (or is a single module).",
            where=f"params.yaml: documents.sources, python:{package}",
            next="install it, or take the source out of params.yaml",
        )
    try:
        distribution, installed = package, version(package)
    except PackageNotFoundError:
        distribution = packages_distributions()[package][0]
        installed = version(distribution)
    try:
        text = lock.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"The lock file of the source python:{package} cannot be read: {error.strerror}.",
            where=str(lock),
            next="name the lock file that pins the package as the source's `path`",
        ) from None
    name = sub(r"[-_.]+", "[-_.]+", escape(distribution).replace("\\-", "-"))
    pin = search(rf"^{name}==([^\s;\\]+)", text, MULTILINE | IGNORECASE)
    if pin is None or pin[1] != installed:
        pinned = f"pins {pin[1]}" if pin else "does not pin it"
        raise InputError(
            f"{distribution} {installed} is installed, but the lock file {pinned}.",
            where=str(lock),
            next="install what the lock says (tools/setup.sh), or lock what is installed",
        )
    return Path(spec.submodule_search_locations[0])


def docstrings(package: str, folder: Path) -> Iterator[tuple[str, str]]:
    """(qualified name, cleaned docstring), in the order of the files; names are unique."""
    public = _exports(package, folder)
    seen: set[str] = set()
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        if any(part.startswith("_vendored") or part in ("tests", "test") for part in parts):
            continue
        module = ".".join([package, *(part for part in parts if part != "__init__")])
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, RecursionError):  # a template that is not Python yet
            continue
        for name, text in _walk(tree, module):
            name = _public_name(name, public)
            if name not in seen and len(text) >= MIN_CHARACTERS and len(text.split()) >= MIN_WORDS:
                seen.add(name)
                yield name, text


def _walk(node: ast.Module | Definition, name: str) -> Iterator[tuple[str, str]]:
    """Docstrings of ``node`` and of the public definitions inside it."""
    raw = ast.get_docstring(node, clean=False)
    if raw:
        yield name, inspect.cleandoc(raw)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for child in _definitions(node.body):
        if not child.name.startswith("_"):
            yield from _walk(child, f"{name}.{child.name}")


def _definitions(body: list[ast.stmt]) -> Iterator[Definition]:
    """Definitions of a body, also below ``if`` and ``try`` (version switches)."""
    for item in body:
        if isinstance(item, Definition):
            yield item
        elif isinstance(item, ast.If | ast.Try):
            yield from _definitions([*item.body, *item.orelse])


def _exports(package: str, folder: Path) -> dict[str, str]:
    """Full name of the definition -> public name, from the package's ``__init__``."""
    init = folder / "__init__.py"
    if not init.is_file():
        return {}
    exports: dict[str, str] = {}
    for node in ast.walk(ast.parse(init.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                public = f"{package}.{alias.asname or alias.name}"
                exports.setdefault(f"{node.module}.{alias.name}", public)
    return exports


def _public_name(name: str, public: dict[str, str]) -> str:
    """The name with its longest re-exported beginning replaced."""
    parts = name.split(".")
    for end in range(len(parts), 1, -1):
        head = ".".join(parts[:end])
        if head in public:
            return ".".join([public[head], *parts[end:]])
    return name
