"""Tables of the cold tier: `langgraph-checkpoint-postgres`' own, and what we add beside them."""

from __future__ import annotations

import random
import time

from langgraph.checkpoint.postgres import PostgresSaver
from psycopg import sql

from langgraph_tiered_saver.cold.pool import Connection
from langgraph_tiered_saver.config import TieredConfig
from langgraph_tiered_saver.errors import ColdTierUnavailableError

# PostgresSaver names its columns, so it never sees ours; its rows have NULL there.
MIGRATIONS = (
    "ALTER TABLE checkpoints ADD COLUMN IF NOT EXISTS tiered_seq BIGINT",
    "ALTER TABLE checkpoint_writes ADD COLUMN IF NOT EXISTS tiered_seq BIGINT",
    # watermark: everything up to this sequence number is in these tables. tombstone: nothing older may come back.
    """CREATE TABLE IF NOT EXISTS tiered_threads (
        thread_id TEXT PRIMARY KEY,
        watermark BIGINT NOT NULL DEFAULT 0,
        tombstone BIGINT NOT NULL DEFAULT 0
    ) WITH (fillfactor = 70)""",
    "CREATE TABLE IF NOT EXISTS tiered_state (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    # delete_for_runs would otherwise read every checkpoint there is. The digest keeps a long run id within the size of
    # an index entry, beyond which PostgreSQL would refuse the checkpoint.
    """CREATE INDEX CONCURRENTLY IF NOT EXISTS tiered_checkpoints_run_id_idx
        ON checkpoints (md5(metadata ->> 'run_id')) WHERE metadata ? 'run_id'""",
)

LOCK_CLASS = 0x7E1D  # first key of every advisory lock we take
SETUP_LOCK = -1  # second key; shards count from 0

_LOCK_POLL = (0.05, 0.25)


def setup(connection: Connection, config: TieredConfig, *, repair: bool = False) -> dict[str, str]:
    """Create or upgrade everything, and record the settings that must not change later.

    Safe from any number of processes at once, and on a database that PostgresSaver made or uses.

    Args:
        connection: In autocommit mode.
        config: Schema, number of shards and time-out.
        repair: Do everything again, because somebody dropped tables that are recorded as made.

    Returns:
        The recorded settings: `shards` and `generation`.

    Raises:
        ColdTierUnavailableError: another setup held the lock for too long.
        psycopg.Error: PostgreSQL refused.
    """
    _lock(connection, config.flush_timeout)
    try:
        if config.postgres_schema is not None:
            schema = sql.Identifier(config.postgres_schema)
            if not _schema_exists(connection, config.postgres_schema):
                connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(schema))
        if repair:
            # Every migration of either list may run again on what is there.
            connection.execute("DROP TABLE IF EXISTS checkpoint_migrations, tiered_migrations")
        PostgresSaver(connection).setup()
        connection.execute("CREATE TABLE IF NOT EXISTS tiered_migrations (v INTEGER PRIMARY KEY)")
        row = connection.execute("SELECT coalesce(max(v), -1) AS v FROM tiered_migrations").fetchone()
        assert row is not None  # noqa: S101 - an aggregate always gives a row
        for version in range(row["v"] + 1, len(MIGRATIONS)):
            connection.execute(MIGRATIONS[version].encode())
            connection.execute("INSERT INTO tiered_migrations (v) VALUES (%s)", (version,))
        with connection.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO tiered_state (name, value) VALUES (%s, %s) ON CONFLICT DO NOTHING",
                [("shards", str(config.shard_count)), ("generation", "1")],
            )
        return {r["name"]: r["value"] for r in connection.execute("SELECT name, value FROM tiered_state")}
    finally:
        if not connection.closed:
            connection.execute("SELECT pg_advisory_unlock(%s, %s)", (LOCK_CLASS, SETUP_LOCK))


def last_sequence(connection: Connection) -> int:
    """Give the highest sequence number PostgreSQL has seen."""
    row = connection.execute("SELECT max(greatest(watermark, tombstone)) AS last FROM tiered_threads").fetchone()
    return int(row["last"] or 0) if row else 0


def _lock(connection: Connection, timeout: float) -> None:
    # Waiting inside PostgreSQL would hold a snapshot that CREATE INDEX CONCURRENTLY in the lock's holder waits for.
    deadline = time.monotonic() + timeout
    while True:
        row = connection.execute("SELECT pg_try_advisory_lock(%s, %s) AS ok", (LOCK_CLASS, SETUP_LOCK)).fetchone()
        if row is not None and row["ok"]:
            return
        if time.monotonic() > deadline:
            raise ColdTierUnavailableError(
                f"Another process has been setting up the tables for more than {timeout:.0f} s. Nothing was changed "
                "by this one; try again, or end the session that holds the advisory lock."
            )
        time.sleep(random.uniform(*_LOCK_POLL))  # noqa: S311 - jitter


def _schema_exists(connection: Connection, name: str) -> bool:
    found = connection.execute("SELECT 1 AS one FROM pg_namespace WHERE nspname = %s", (name,)).fetchone()
    return found is not None
