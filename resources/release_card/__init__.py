"""The documents that are written from a release: a model card, and a technical file.

Both are Markdown rendered from the release, the evidence that it names (scorecard, verdict, bundle)
and the ledger. Evidence is read by digest, from the workspace or DVC's cache, so a card never shows
the figures of another build; what is not here is named as missing. What only people know (purpose,
provider, residual risks) stands as an explicit gap.

The card's sections follow Mitchell et al., "Model Cards for Model Reporting" (arXiv 1810.03993);
the technical file's follow Annex IV of Regulation (EU) 2024/1689. Neither is legal advice.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from contracts.records import Release
from contracts.settings import Settings
from resources.release_card.evidence import Evidence

_TEMPLATES = Path(__file__).parent


def model_card(release: Release, settings: Settings) -> str:
    """What the model is for, made from, and how well it did. Markdown."""
    return _render("model_card.md.jinja2", release, settings)


def technical_file(release: Release, settings: Settings) -> str:
    """The release in the order of Annex IV, with a gap wherever a person has to write. Markdown."""
    return _render("technical_file.md.jinja2", release, settings)


def _render(template: str, release: Release, settings: Settings) -> str:
    import jinja2

    # A release from elsewhere may lack a field: its place shows "-", the rest is still true.
    environment = jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        finalize=lambda value: "-" if isinstance(value, jinja2.Undefined) else value,
    )
    environment.filters["cell"] = _cell
    environment.filters["json"] = partial(json.dumps, ensure_ascii=False)
    evidence = Evidence(release, settings)
    source = (_TEMPLATES / template).read_text(encoding="utf-8")
    return environment.from_string(source).render(release=release, evidence=evidence)


def _cell(value: Any) -> str:
    """A value in a Markdown table: one line, no bar; numbers to three places."""
    if isinstance(value, float):
        return f"{value:.3f}"
    return "-" if value is None or value == "" else " ".join(str(value).split()).replace("|", "\\|")
