from __future__ import annotations

import pytest
from pydantic import ValidationError

from contracts.errors import RatchetError
from contracts.records import Member, Release


def body() -> dict[str, object]:
    return {
        "members": {"index": {"path": "data/index", "md5": "0" * 32, "size": 1}},
        "prompt": {"name": "answer", "version": "v1", "sha256": "0" * 64},
        "git_commit": "abc",
    }


def test_release_id_is_the_hash_of_everything_else() -> None:
    first = Release.compute_id(body())
    assert Release.compute_id(body() | {"id": "whatever"}) == first
    changed = body() | {"prompt": {"name": "answer", "version": "v2", "sha256": "0" * 64}}
    assert Release.compute_id(changed) != first


def test_records_are_closed_and_frozen() -> None:
    member = Member(path="p", md5="m", size=1)
    with pytest.raises(ValidationError):
        Member.model_validate({"path": "p", "md5": "m", "size": 1, "sise": 1})
    with pytest.raises(ValidationError):
        member.path = "q"  # type: ignore[misc]


def test_an_error_says_what_where_and_next() -> None:
    text = str(RatchetError("It broke.", where="here", next="mend it", offenders=["a", "b"]))
    assert text.splitlines() == ["It broke.", "  - a", "  - b", "  where: here", "  next:  mend it"]
