"""docs/faults.md and the tests say the same: each row's test exists, and each test has its row."""

from __future__ import annotations

import re
from pathlib import Path

from contracts.settings import ROOT

HERE = Path(__file__).parent
NAMED = re.compile(r"\| `(?P<path>[\w./]+\.py)::(?P<name>\w+)` \|$", re.M)


def _tests_in(path: Path) -> set[str]:
    return set(re.findall(r"^(?:async )?def (test_\w+)", path.read_text(encoding="utf-8"), re.M))


def named() -> set[tuple[Path, str]]:
    """Path and name of the test in each row."""
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "| Test |" not in line]
    found = NAMED.findall(text)
    assert len(found) == len(rows) > 50  # no row without its test
    return {(ROOT / path if "/" in path else HERE / path, name) for path, name in found}


def test_every_row_has_its_test() -> None:
    missing = [
        f"{path.name}::{name}"
        for path, name in sorted(named())
        if not path.is_file() or name not in _tests_in(path)
    ]
    assert missing == []


def test_every_test_of_faults_has_its_row() -> None:
    rows = named()
    files = sorted(set(HERE.glob("test_faults_*.py")) - {Path(__file__)})
    assert len(files) == 5
    silent = [
        f"{path.name}::{name}"
        for path in files
        for name in sorted(_tests_in(path))
        if (path, name) not in rows
    ]
    assert silent == []
