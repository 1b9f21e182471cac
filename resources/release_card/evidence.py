"""What a release's members say, read by digest; None where the bytes are not here."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from contracts.records import Release
from contracts.settings import Settings


@dataclass(frozen=True)
class Metric:
    """One metric of the candidate beside its base model's mean."""

    name: str
    mean: float | None
    low: float | None
    high: float | None
    n: int
    invalid: int
    base: float | None


class Evidence:
    """Of one release."""

    def __init__(self, release: Release, settings: Settings) -> None:
        self._release, self._settings = release, settings
        self.missing: list[str] = []  # evidence that was asked for and is not here

    @cached_property
    def metrics(self) -> list[Metric]:
        systems = (self._json("scorecard", "summary.json") or {}).get("systems", {})
        base = systems.get("base", {})
        return [
            Metric(
                name,
                found.get("mean"),
                found.get("low"),
                found.get("high"),
                found.get("n", 0),
                found.get("invalid", 0),
                base.get(name, {}).get("mean"),
            )
            for name, found in sorted(systems.get("candidate", {}).items())
        ]

    @cached_property
    def worst_documents(self) -> list[tuple[str, float, int]]:
        """The five documents with the lowest answer overlap: (document, mean, questions)."""
        systems = (self._json("scorecard", "summary.json") or {}).get("systems", {})
        documents = systems.get("candidate", {}).get("answer_overlap", {}).get("documents", {})
        rows = [(name, item["mean"], item["n"]) for name, item in documents.items()]
        return sorted(rows, key=lambda row: row[1])[:5]

    @cached_property
    def verdict(self) -> dict[str, Any]:
        return self._json("gate", "verdict.json") or {}

    @cached_property
    def examples(self) -> dict[str, Any]:
        return self._json("examples", "manifest.json") or {}

    @cached_property
    def plan(self) -> dict[str, Any]:
        """The bundle's memory plan."""
        return self._json("bundle", "memory.json") or {}

    @cached_property
    def events(self) -> list[Any]:
        """What the ledger says of the release, oldest first."""
        from resources.ledger import Ledger

        with contextlib.closing(Ledger.open(self._settings)) as ledger:
            return list(ledger.entries(release=self._release.id))

    @cached_property
    def answers(self) -> dict[str, dict[str, Any]]:
        """The candidate's answers to the golden questions, by question id: question, answer."""
        path = self.file("answers")
        if path is None:
            self.missing.append("answers")
            return {}
        import pyarrow.parquet as pq

        rows = pq.read_table(path, columns=["question_id", "system", "question", "answer"])
        return {row["question_id"]: row for row in rows.to_pylist() if row["system"] == "candidate"}

    @property
    def sources(self) -> Iterator[tuple[str, str]]:
        """(key, path) of every source of documents."""
        for key, item in self._release.params.get("documents", {}).get("sources", {}).items():
            yield key, item["path"]

    def _json(self, member: str, name: str) -> dict[str, Any] | None:
        path = self.file(member, name)
        if path is None:
            self.missing.append(f"{member} ({name})")
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def file(self, name: str, inside: str = "") -> Path | None:
        """A file of a member: in the workspace if that is the same build, else in DVC's cache."""
        from resources.tracking import resolve_file

        member = self._release.members.get(name)
        if member is None:
            return None
        return resolve_file(member.path, member.md5, self._settings.root, inside)
