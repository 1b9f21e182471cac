"""The table in both databases, and its guard: triggers that refuse everything but the next row.

The guard stops mistakes and programs. Who may drop triggers may also alter rows; that is what the
chain of hashes is for.
"""

from __future__ import annotations

TABLE = "ratchet_ledger"
COLUMNS = ("seq", "time", "kind", "channel", "release", "actor", "reason", "body", "prev", "hash")
ADVISORY_LOCK = 5_724_401_734  # the key store has the number before
_CREATE = f"""CREATE TABLE {TABLE} (seq INTEGER PRIMARY KEY, time TEXT NOT NULL, kind TEXT NOT NULL,
channel TEXT NOT NULL, release TEXT NOT NULL, actor TEXT NOT NULL, reason TEXT NOT NULL,
body TEXT NOT NULL, prev TEXT NOT NULL, hash TEXT NOT NULL)"""
_INDEX = f"CREATE INDEX {TABLE}_channel ON {TABLE} (channel, kind, seq)"
#: A row that is not the next one. In SQLite it also stops INSERT OR REPLACE, for which no trigger
#: on DELETE runs.
_NOT_NEXT = f"""NEW.seq <> (SELECT COALESCE(MAX(seq), 0) + 1 FROM {TABLE}) OR NEW.prev <> COALESCE(
(SELECT hash FROM {TABLE} ORDER BY seq DESC LIMIT 1), '{"0" * 64}')"""

SQLITE = (
    _CREATE,
    _INDEX,
    f"""CREATE TRIGGER {TABLE}_next BEFORE INSERT ON {TABLE} WHEN {_NOT_NEXT}
    BEGIN SELECT RAISE(ABORT, 'the ledger takes only the next row'); END""",
    f"""CREATE TRIGGER {TABLE}_no_update BEFORE UPDATE ON {TABLE}
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
    f"""CREATE TRIGGER {TABLE}_no_delete BEFORE DELETE ON {TABLE}
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END""",
)
POSTGRES = (
    _CREATE,
    _INDEX,
    f"""CREATE OR REPLACE FUNCTION {TABLE}_next() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN IF {_NOT_NEXT} THEN RAISE EXCEPTION 'the ledger takes only the next row'; END IF;
    RETURN NEW; END $$""",
    f"""CREATE OR REPLACE FUNCTION {TABLE}_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN RAISE EXCEPTION 'the ledger is append-only'; END $$""",
    f"""CREATE TRIGGER {TABLE}_next BEFORE INSERT ON {TABLE}
    FOR EACH ROW EXECUTE FUNCTION {TABLE}_next()""",
    f"""CREATE TRIGGER {TABLE}_append_only BEFORE UPDATE OR DELETE ON {TABLE}
    FOR EACH ROW EXECUTE FUNCTION {TABLE}_refuse()""",
    f"""CREATE TRIGGER {TABLE}_no_truncate BEFORE TRUNCATE ON {TABLE}
    FOR EACH STATEMENT EXECUTE FUNCTION {TABLE}_refuse()""",
)
EXISTS_SQLITE = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
#: Not to_regclass: after waiting for a lock it may answer from a cache older than the wait.
EXISTS_POSTGRES = (
    "SELECT 1 FROM pg_catalog.pg_tables WHERE schemaname = current_schema() AND tablename = ?"
)
