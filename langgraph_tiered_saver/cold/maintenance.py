"""Operations that remove or copy a thread's rows, each in one transaction that holds the shard's lock exclusively.

They are journal records like any other: executed in the thread's order, by whoever flushes, as often as it takes.
Each leaves a tombstone, its sequence number, so that an older record which somebody still holds cannot bring back
what it removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from langgraph.checkpoint.serde.types import TASKS
from psycopg import Cursor
from psycopg.rows import DictRow

from langgraph_tiered_saver.cold.pool import Connection
from langgraph_tiered_saver.cold.schema import LOCK_CLASS
from langgraph_tiered_saver.cold.writer import set_timeout
from langgraph_tiered_saver.records import MaintenanceRecord

DELETE_THREAD = "delete_thread"
DELETE_RUNS = "delete_runs"
PRUNE = "prune"
COPY = "copy"

READ_TOMBSTONE = "SELECT tombstone FROM tiered_threads WHERE thread_id = %s"

WRITE_TOMBSTONE = """
INSERT INTO tiered_threads (thread_id, watermark, tombstone) VALUES (%s, %s, %s)
ON CONFLICT (thread_id) DO UPDATE SET
    watermark = greatest(tiered_threads.watermark, EXCLUDED.watermark),
    tombstone = greatest(tiered_threads.tombstone, EXCLUDED.tombstone)"""

DELETE_ALL = (
    "DELETE FROM checkpoints WHERE thread_id = %s",
    "DELETE FROM checkpoint_blobs WHERE thread_id = %s",
    "DELETE FROM checkpoint_writes WHERE thread_id = %s",
)

DELETE_NAMESPACES = (
    "DELETE FROM checkpoints WHERE thread_id = %s AND checkpoint_ns = ANY(%s)",
    "DELETE FROM checkpoint_blobs WHERE thread_id = %s AND checkpoint_ns = ANY(%s)",
    "DELETE FROM checkpoint_writes WHERE thread_id = %s AND checkpoint_ns = ANY(%s)",
)

# The condition on the digest is what the index is on.
FIND_RUNS = """
SELECT DISTINCT thread_id FROM checkpoints
WHERE metadata ? 'run_id' AND metadata ->> 'run_id' = ANY(%(runs)s)
AND md5(metadata ->> 'run_id') = ANY(ARRAY(SELECT md5(run) FROM unnest(%(runs)s::text[]) AS run))"""

FIND_RUN_CHECKPOINTS = """
SELECT checkpoint_ns, checkpoint_id FROM checkpoints
WHERE thread_id = %(thread)s AND metadata ->> 'run_id' = ANY(%(runs)s)"""

DELETE_CHECKPOINTS = """
WITH deleted AS (
    DELETE FROM checkpoints WHERE thread_id = %s AND checkpoint_ns = %s AND checkpoint_id = ANY(%s)
    RETURNING checkpoint -> 'channel_versions' AS versions
)
SELECT DISTINCT v.key AS channel, v.value AS version
FROM deleted CROSS JOIN LATERAL jsonb_each_text(deleted.versions) AS v"""

DELETE_WRITES = """
DELETE FROM checkpoint_writes WHERE thread_id = %s AND checkpoint_ns = %s AND checkpoint_id = ANY(%s)"""

# Blobs that a deleted checkpoint used and no other checkpoint of the namespace does.
DELETE_GARBAGE = """
DELETE FROM checkpoint_blobs AS b USING unnest(%s::text[], %s::text[]) AS freed (channel, version)
WHERE b.thread_id = %s AND b.checkpoint_ns = %s AND b.channel = freed.channel AND b.version = freed.version"""

REFERENCED = """
SELECT DISTINCT v.key AS channel, v.value AS version
FROM checkpoints c CROSS JOIN LATERAL jsonb_each_text(c.checkpoint -> 'channel_versions') AS v
WHERE c.thread_id = %s AND c.checkpoint_ns = %s"""

READ_CHAIN = """
SELECT checkpoint_ns, checkpoint_id, parent_checkpoint_id, (checkpoint ->> 'v')::int AS v,
    metadata -> 'parents' ->> '' AS root, metadata ? 'delta_writes_versioned' AS all_delta,
    ARRAY(SELECT jsonb_object_keys(
        CASE jsonb_typeof(metadata -> 'counters_since_delta_snapshot') WHEN 'object'
            THEN metadata -> 'counters_since_delta_snapshot' ELSE '{}' END)) AS delta_channels
FROM checkpoints WHERE thread_id = %s ORDER BY checkpoint_ns, checkpoint_id DESC"""

HAS_SENDS = """
SELECT 1 AS one FROM checkpoint_writes
WHERE thread_id = %s AND checkpoint_ns = %s AND checkpoint_id = %s AND channel = %s LIMIT 1"""

READ_VERSIONS = """
SELECT ARRAY(SELECT jsonb_object_keys(checkpoint -> 'channel_versions')) AS channels FROM checkpoints
WHERE thread_id = %s AND checkpoint_ns = %s AND checkpoint_id = %s"""

# Checkpoints that store a value of a channel: inlined, or as a blob of the version they name. The walk that rebuilds a
# delta channel goes past an inlined null, so that is none.
HAVE_VALUE = """
SELECT c.checkpoint_id FROM checkpoints c
WHERE c.thread_id = %s AND c.checkpoint_ns = %s AND (
    coalesce(c.checkpoint -> 'channel_values' -> %s, 'null'::jsonb) <> 'null'::jsonb
    OR EXISTS (
        SELECT 1 FROM checkpoint_blobs b
        WHERE b.thread_id = c.thread_id AND b.checkpoint_ns = c.checkpoint_ns AND b.channel = %s
        AND b.version = c.checkpoint -> 'channel_versions' ->> %s AND b.type <> 'empty'))"""

CUT_PARENTS = """
UPDATE checkpoints SET parent_checkpoint_id = NULL
WHERE thread_id = %s AND checkpoint_ns = %s AND checkpoint_id = ANY(%s) AND parent_checkpoint_id <> ALL(%s)"""

COPY_ROWS = (
    """INSERT INTO checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob)
    SELECT %(target)s, checkpoint_ns, channel, version, type, blob
    FROM checkpoint_blobs WHERE thread_id = %(source)s ON CONFLICT DO NOTHING""",
    """INSERT INTO checkpoints (thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, type, checkpoint,
        metadata, tiered_seq)
    SELECT %(target)s, checkpoint_ns, checkpoint_id, parent_checkpoint_id, type, checkpoint, metadata, %(sequence)s
    FROM checkpoints WHERE thread_id = %(source)s ON CONFLICT DO NOTHING""",
    """INSERT INTO checkpoint_writes (thread_id, checkpoint_ns, checkpoint_id, task_id, idx, channel, type, blob,
        task_path, tiered_seq)
    SELECT %(target)s, checkpoint_ns, checkpoint_id, task_id, idx, channel, type, blob, task_path, %(sequence)s
    FROM checkpoint_writes WHERE thread_id = %(source)s ON CONFLICT DO NOTHING""",
)

_Cursor = Cursor[DictRow]


def execute(
    connection: Connection,
    thread_id: str,
    sequence: int,
    record: MaintenanceRecord,
    *,
    shard_of: Callable[[str], int],
    statement_timeout: float,
) -> None:
    """Execute a journaled operation; one that was executed before changes nothing.

    Args:
        connection: In autocommit mode.
        thread_id: The thread whose journal holds the record.
        sequence: The record's sequence number, which becomes the thread's tombstone.
        record: The operation.
        shard_of: Gives a thread's shard, whose lock guards it.
        statement_timeout: Seconds for each statement; 0 leaves the server's setting.

    Raises:
        psycopg.Error: nothing was changed.
        ValueError: this version does not know the operation.
    """
    arguments = record.arguments
    with connection.transaction(), connection.cursor() as cursor:
        set_timeout(cursor, statement_timeout)
        source = arguments["source"] if record.operation == COPY else thread_id
        # Always in the order of the shards, like every flush, so that nobody waits in a circle.
        for shard in sorted({shard_of(thread_id), shard_of(source)}):
            shared = "" if shard == shard_of(thread_id) else "_shared"
            cursor.execute(f"SELECT pg_advisory_xact_lock{shared}(%s, %s)".encode(), (LOCK_CLASS, shard))
        done = cursor.execute(READ_TOMBSTONE, (thread_id,)).fetchone()
        if done is not None and done["tombstone"] >= sequence:
            return
        if record.operation == DELETE_THREAD:
            for statement in DELETE_ALL:
                cursor.execute(statement.encode(), (thread_id,))
        elif record.operation == DELETE_RUNS:
            _delete_runs(cursor, thread_id, arguments["run_ids"])
        elif record.operation == PRUNE:
            _keep_latest(cursor, thread_id)
        elif record.operation == COPY:
            for statement in COPY_ROWS:
                values = {"target": thread_id, "source": source, "sequence": sequence}
                cursor.execute(statement.encode(), values)
        else:
            raise ValueError(f"not an operation this version knows: {record.operation!r}")
        cursor.execute(WRITE_TOMBSTONE, (thread_id, sequence, sequence))


def threads_of_runs(connection: Connection, run_ids: Sequence[str]) -> list[str]:
    """Find the threads that hold checkpoints of some runs."""
    return [row["thread_id"] for row in connection.execute(FIND_RUNS, {"runs": list(run_ids)})]


def _delete_runs(cursor: _Cursor, thread_id: str, run_ids: Sequence[str]) -> None:
    doomed: dict[str, list[str]] = {}
    for row in cursor.execute(FIND_RUN_CHECKPOINTS, {"thread": thread_id, "runs": list(run_ids)}).fetchall():
        doomed.setdefault(row["checkpoint_ns"], []).append(row["checkpoint_id"])
    for ns, ids in doomed.items():
        _delete_checkpoints(cursor, thread_id, ns, ids)


def _delete_checkpoints(cursor: _Cursor, thread_id: str, ns: str, ids: Sequence[str]) -> None:
    cursor.execute(DELETE_WRITES, (thread_id, ns, ids))
    freed = _versions(cursor.execute(DELETE_CHECKPOINTS, (thread_id, ns, ids)))
    kept = _versions(cursor.execute(REFERENCED, (thread_id, ns)))
    if garbage := sorted(freed - kept):
        channels, versions = zip(*garbage, strict=True)
        cursor.execute(DELETE_GARBAGE, (list(channels), list(versions), thread_id, ns))


def _versions(rows: Iterable[DictRow]) -> set[tuple[str, str]]:
    return {(row["channel"], row["version"]) for row in rows}


def _keep_latest(cursor: _Cursor, thread_id: str) -> None:
    """Keep each namespace's latest checkpoint and what its delta channels are rebuilt from.

    The rules are those of `PostgresSaver.prune`, which refuses threads with a DeltaChannel: here the ancestors up
    to each such channel's last stored value stay, with their writes.
    """
    namespaces: dict[str, list[DictRow]] = {}
    for row in cursor.execute(READ_CHAIN, (thread_id,)).fetchall():
        namespaces.setdefault(row["checkpoint_ns"], []).append(row)
    kept = {ns: _kept(cursor, thread_id, ns, rows) for ns, rows in namespaces.items()}
    saved_roots = {row["checkpoint_id"] for row in namespaces.get("", ())}
    # A subgraph call's namespace (its task id follows a ":") goes with the root checkpoint the call started from.
    calls = [
        ns
        for ns, rows in namespaces.items()
        if ":" in ns and rows[0]["root"] in saved_roots and rows[0]["root"] not in kept[""]
    ]
    if calls:
        for statement in DELETE_NAMESPACES:
            cursor.execute(statement.encode(), (thread_id, calls))
    for ns, rows in namespaces.items():
        if ns not in calls:
            keep = sorted(kept[ns])
            doomed = [row["checkpoint_id"] for row in rows if row["checkpoint_id"] not in kept[ns]]
            if doomed:
                _delete_checkpoints(cursor, thread_id, ns, doomed)
            cursor.execute(CUT_PARENTS, (thread_id, ns, keep, keep))


def _kept(cursor: _Cursor, thread_id: str, ns: str, rows: Sequence[DictRow]) -> set[str]:
    head = rows[0]
    kept = {head["checkpoint_id"]}
    parent = head["parent_checkpoint_id"]
    # Before format 4 the parent's pending sends are part of the latest checkpoint.
    if (head["v"] or 0) < 4 and parent and cursor.execute(HAS_SENDS, (thread_id, ns, parent, TASKS)).fetchone():
        kept.add(parent)
    # A channel that has no version was never written, so nothing is rebuilt for it.
    found = cursor.execute(READ_VERSIONS, (thread_id, ns, head["checkpoint_id"])).fetchone()
    channels = set(found["channels"]) if found else set()
    if not any(row["all_delta"] for row in rows):
        channels &= {channel for row in rows for channel in row["delta_channels"]}
    parents = {row["checkpoint_id"]: row["parent_checkpoint_id"] for row in rows}
    for channel in channels:
        valued = {
            row["checkpoint_id"]
            for row in cursor.execute(HAVE_VALUE, (thread_id, ns, channel, channel, channel)).fetchall()
        }
        kept |= _ancestors_until(head["checkpoint_id"], parents, valued)
    return kept


def _ancestors_until(start: str, parents: Mapping[str, Any], goals: set[str]) -> set[str]:
    """Walk from a checkpoint to its nearest ancestor among the goals, or to the root, and give all on the way."""
    walked: set[str] = set()
    at: str | None = start
    while at is not None and at in parents:
        walked.add(at)
        if at in goals:
            break
        at = parents[at]
    return walked
