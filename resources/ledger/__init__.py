"""The ledger: who let which release onto which channel, when and why; append-only, hash-chained.

It leads and everything else follows (docs/decisions/0011): what a channel serves is what its last
*change* says, and pointer files, MLflow's aliases and ``data/stable.json`` are written after it.
"""

from resources.ledger.actor import actor
from resources.ledger.entry import CHANGES, Entry, Head, Kind
from resources.ledger.history import Served, let_in
from resources.ledger.store import Ledger

__all__ = ["CHANGES", "Entry", "Head", "Kind", "Ledger", "Served", "actor", "let_in"]
