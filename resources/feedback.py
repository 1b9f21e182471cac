"""What people thought of responses: JSON lines by the UTC day of the response.

In: FeedbackRecords. Out: ``<state>/feedback/<YYYY-MM-DD>.jsonl`` (mode 0600), in the order in which
they came. Nothing is changed or taken away: the last record of a key about a response is what it
thinks, the ones before are the history. ``last`` and ``history`` read a day.

The day is that of the response, not of the feedback, so that a day of the request log and its
feedback are joined by reading two places, however late the feedback came.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from datetime import date
from pathlib import Path

from contracts.errors import InputError
from contracts.records import FeedbackRecord
from contracts.settings import Settings
from resources.requests import RESPONSE_ID


def folder(settings: Settings) -> Path:
    return settings.state_dir / "feedback"


def append(home: Path, record: FeedbackRecord) -> None:
    """Write one record and sync it: who sent it is told that it is kept. Blocks.

    Several processes may append. Raises OSError with nothing half-written; InputError for a
    response id that is none.
    """
    match = RESPONSE_ID.fullmatch(record.response_id)
    if match is None:
        raise InputError("The response id is none.", next="take it from x-ratchet-response-id")
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = home / f"{'-'.join(match.groups())}.jsonl"
    line = record.model_dump_json().encode() + b"\n"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # given back when it is closed
        before = os.fstat(handle).st_size
        if os.write(handle, line) < len(line):
            with contextlib.suppress(OSError):
                os.ftruncate(handle, before)
            raise OSError(28, "No space left on device")
        os.fsync(handle)
    finally:
        os.close(handle)


def history(settings: Settings, day: date | str) -> list[FeedbackRecord]:
    """Everything about the responses of that UTC day, oldest first.

    Raises InputError for a line that is no record, with its number.
    """
    path = folder(settings) / f"{day}.jsonl"
    if not path.is_file():
        return []
    found, wrong = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            found.append(FeedbackRecord.model_validate_json(line))
        except ValueError:
            wrong.append(f"line {number}")
    if wrong:
        raise InputError(
            f"The feedback of {day} cannot be read in full.",
            where=str(path),
            offenders=wrong,
            next="mend or remove these lines",
        )
    return found


def last(settings: Settings, day: date | str) -> list[FeedbackRecord]:
    """The last word of each key on each response of that day."""
    words = {(record.response_id, record.key_id): record for record in history(settings, day)}
    return list(words.values())
