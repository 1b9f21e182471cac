"""language: prose in a language that nobody is going to ask in.

In: the columns ``language`` and ``format`` of a document, the languages that the policy allows.
Out: why it is not used, or None. Code and documents whose language could not be told (too short
for the detector) pass.
"""

from __future__ import annotations

from collections.abc import Collection


def foreign(language: str, format: str, allowed: Collection[str]) -> str | None:
    """A reason such as "language: de, not one of en", or None; an empty ``allowed`` allows all."""
    if not allowed or not language or format == "code" or language in allowed:
        return None
    return f"language: {language}, not one of {', '.join(sorted(allowed))}"
