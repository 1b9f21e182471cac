"""``<state>/ledger.head``: the newest row that this machine saw, so that a cut-off tail is found.

Written after the row is in the database, and only ever forward. A process that is killed between
the two leaves the file behind the table: that is legal, as long as the rows after it continue the
chain. The file ahead of the table is not: rows are missing.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from contracts.errors import ServiceError
from resources.ledger.entry import Head


class HeadFile:
    """One line, ``SEQ:HASH``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Head | None:
        """None where there is no file. Raises InputError for one that holds something else."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ServiceError(
                f"The head of the ledger cannot be read: {error}", where=str(self.path)
            ) from None
        return Head.parse(text)

    def note(self, head: Head) -> None:
        """Write ``head`` unless a later one stands there. Raises ServiceError."""
        part = self.path.with_name(f".{self.path.name}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with part.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                before = self.read()
                if before is not None and before.seq >= head.seq:
                    return
                with part.open("w", encoding="utf-8") as stream:
                    stream.write(f"{head}\n")
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(part, self.path)
        except OSError as error:
            raise ServiceError(
                f"The head of the ledger cannot be written: {error}", where=str(self.path)
            ) from None
