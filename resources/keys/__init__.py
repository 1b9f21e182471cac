"""Virtual keys: who may call the gateway, for whom, at what price.

``records`` says what a key is, ``secret`` how its secret is kept, ``store`` where it lives: SQLite
in the state folder, or Postgres by address.
"""

from resources.keys.records import Key, KeyLimits, Spend
from resources.keys.store import Issued, KeyStore, StoredKey

__all__ = ["Issued", "Key", "KeyLimits", "KeyStore", "Spend", "StoredKey"]
