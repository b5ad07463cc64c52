"""Tables of the cold tier: `langgraph-checkpoint-postgres`' own, and what we add beside them."""

from __future__ import annotations

import random
import time

from langgraph.checkpoint.postgres import PostgresSaver
from psycopg import sql

from langgraph_tiered_saver.cold import storage
from langgraph_tiered_saver.cold.pool import Connection
from langgraph_tiered_saver.config import Storage, TieredConfig
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
    # How many blobs the checkpoint references: what tells a channel without a value from a missing blob.
    "ALTER TABLE checkpoints ADD COLUMN IF NOT EXISTS tiered_blobs INTEGER",
    # tombstone_generation: nothing that was journaled in an older generation may come back either.
    # quarantined: a record was refused for good, and the later ones wait with it.
    """ALTER TABLE tiered_threads
        ADD COLUMN IF NOT EXISTS tombstone_generation BIGINT NOT NULL DEFAULT 0,
        ADD COLUMN IF NOT EXISTS quarantined BOOLEAN NOT NULL DEFAULT false,
        ADD COLUMN IF NOT EXISTS run_lease TEXT,
        ADD COLUMN IF NOT EXISTS run_lease_ends TIMESTAMPTZ""",
    """CREATE TABLE IF NOT EXISTS tiered_quarantine (
        thread_id TEXT NOT NULL,
        sequence BIGINT NOT NULL,
        payload BYTEA NOT NULL,
        reason TEXT,
        since TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (thread_id, sequence)
    )""",
    """CREATE TABLE IF NOT EXISTS tiered_generation (
        one BOOLEAN PRIMARY KEY DEFAULT true CHECK (one),
        number BIGINT NOT NULL,
        opened BOOLEAN NOT NULL,
        started_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
        unreachable_at TIMESTAMPTZ NOT NULL DEFAULT to_timestamp(0)
    ) WITH (fillfactor = 50)""",
    """CREATE TABLE IF NOT EXISTS tiered_members (
        member TEXT PRIMARY KEY,
        generation BIGINT NOT NULL,
        seen_at TIMESTAMPTZ NOT NULL
    ) WITH (fillfactor = 50)""",
    # The sequence number of the last operation that removed the thread whole.
    "ALTER TABLE tiered_threads ADD COLUMN IF NOT EXISTS deleted BIGINT",
    # Whose turn it is to apply the retention policy, and where its pass has come to.
    """CREATE TABLE IF NOT EXISTS tiered_retention (
        one BOOLEAN PRIMARY KEY DEFAULT true CHECK (one),
        holder TEXT,
        held_until TIMESTAMPTZ NOT NULL DEFAULT to_timestamp(0),
        came_to TEXT NOT NULL DEFAULT '',
        finished_at TIMESTAMPTZ NOT NULL DEFAULT to_timestamp(0)
    ) WITH (fillfactor = 50)""",
    # Whoever opens a generation looks for the leases that are held. A lease's end, which moves, is not in the index.
    """CREATE INDEX CONCURRENTLY IF NOT EXISTS tiered_threads_run_lease_idx
        ON tiered_threads (thread_id) WHERE run_lease IS NOT NULL""",
    # A version of a channel that is not in checkpoint_blobs: its value is `delta` applied to that of version `base`.
    # depth, chain_bytes: how many deltas lie between it and a whole value, and their bytes. size: bytes of the value.
    """CREATE TABLE IF NOT EXISTS tiered_deltas (
        thread_id TEXT NOT NULL,
        checkpoint_ns TEXT NOT NULL,
        channel TEXT NOT NULL,
        version TEXT NOT NULL,
        base TEXT NOT NULL,
        type TEXT NOT NULL,
        delta BYTEA NOT NULL,
        depth INTEGER NOT NULL,
        chain_bytes BIGINT NOT NULL,
        size BIGINT NOT NULL,
        PRIMARY KEY (thread_id, checkpoint_ns, channel, version)
    )""",
    # incomplete: a value could not be made, so that checkpoints that reference it must not become visible.
    # conversions: how often values of the thread were stored in another way.
    """ALTER TABLE tiered_threads
        ADD COLUMN IF NOT EXISTS incomplete BOOLEAN NOT NULL DEFAULT false,
        ADD COLUMN IF NOT EXISTS conversions BIGINT NOT NULL DEFAULT 0""",
)

LOCK_CLASS = 0x7E1D  # first key of every advisory lock we take
SETUP_LOCK = -1  # second key; shards count from 0
GENERATION_LOCK = -2  # held shared by whoever writes past the hot tier, exclusively by whoever opens a generation
STORAGE_LOCK = -3  # held shared by whoever may store deltas, exclusively by whoever says that there are none

_LOCK_POLL = (0.05, 0.25)


def setup(
    connection: Connection, config: TieredConfig, *, generation: tuple[int, bool] = (1, False), repair: bool = False
) -> dict[str, str]:
    """Create or upgrade everything, and record the settings that must not change later.

    Safe from any number of processes at once, and on a database that PostgresSaver made or uses.

    Args:
        connection: In autocommit mode.
        config: Schema, number of shards, storage and time-out.
        generation: The number and whether it is open, if PostgreSQL records none yet.
        repair: Do everything again, because somebody dropped tables that are recorded as made.

    Returns:
        The recorded settings: `shards`, `storage`, and with compact storage `views`, the schema of the views.

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
            for table in ("checkpoint_migrations", "tiered_migrations"):
                _empty(connection, table)
        PostgresSaver(connection).setup()
        connection.execute("CREATE TABLE IF NOT EXISTS tiered_migrations (v INTEGER PRIMARY KEY)")
        row = connection.execute("SELECT coalesce(max(v), -1) AS v FROM tiered_migrations").fetchone()
        assert row is not None  # noqa: S101 - an aggregate always gives a row
        for version in range(row["v"] + 1, len(MIGRATIONS)):
            connection.execute(MIGRATIONS[version].encode())
            connection.execute("INSERT INTO tiered_migrations (v) VALUES (%s)", (version,))
        connection.execute(
            "INSERT INTO tiered_state (name, value) VALUES ('shards', %s) ON CONFLICT DO NOTHING",
            (str(config.shard_count),),
        )
        connection.execute(
            "INSERT INTO tiered_state (name, value) VALUES ('storage', %s) ON CONFLICT DO NOTHING", (config.storage,)
        )
        if "compact" in (config.storage, storage.recorded(connection)):
            storage.create_views(connection)
        connection.execute(
            "INSERT INTO tiered_generation (number, opened) VALUES (%s, %s) ON CONFLICT DO NOTHING", generation
        )
        return {r["name"]: r["value"] for r in connection.execute("SELECT name, value FROM tiered_state")}
    finally:
        if not connection.closed:
            connection.execute("SELECT pg_advisory_unlock(%s, %s)", (LOCK_CLASS, SETUP_LOCK))


def recorded(connection: Connection, wanted: Storage = "standard") -> dict[str, str] | None:
    """Give the recorded settings, or None if nothing of this version, or not what a storage needs, was set up."""
    row = connection.execute("SELECT to_regclass('tiered_generation') IS NOT NULL AS ready").fetchone()
    if row is None or not row["ready"]:
        return None
    if connection.execute("SELECT 1 AS one FROM tiered_generation").fetchone() is None:
        return None
    version = connection.execute("SELECT max(v) AS v FROM tiered_migrations").fetchone()
    if version is None or version["v"] != len(MIGRATIONS) - 1:
        return None
    found = {r["name"]: r["value"] for r in connection.execute("SELECT name, value FROM tiered_state")}
    ready = "shards" in found and (wanted == "standard" or "views" in found)
    return found if ready else None


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


def _empty(connection: Connection, table: str) -> None:
    """Empty a table, if it is there; a view may depend on it."""
    row = connection.execute("SELECT to_regclass(%s) IS NOT NULL AS there", (table,)).fetchone()
    if row is not None and row["there"]:
        connection.execute(sql.SQL("DELETE FROM {}").format(sql.Identifier(table)))


def _schema_exists(connection: Connection, name: str) -> bool:
    found = connection.execute("SELECT 1 AS one FROM pg_namespace WHERE nspname = %s", (name,)).fetchone()
    return found is not None
