"""Operations that remove or copy a thread's rows, each in one transaction that holds the shard's lock exclusively.

They are journal records like any other: executed in the thread's order, by whoever flushes, as often as it takes.
Each leaves a tombstone, its sequence number, so that an older record which somebody still holds cannot bring back
what it removed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from psycopg import Cursor
from psycopg.rows import DictRow

from langgraph_tiered_saver.cold import retention
from langgraph_tiered_saver.cold.pool import Connection, set_timeouts
from langgraph_tiered_saver.cold.schema import LOCK_CLASS
from langgraph_tiered_saver.records import MaintenanceRecord

_Cursor = Cursor[DictRow]

DELETE_THREAD = "delete_thread"
DELETE_RUNS = "delete_runs"
PRUNE = "prune"  # to each namespace's latest, all at once
RETAIN = "retain"
COPY = "copy"
DROP_QUARANTINED = "drop_quarantined"
_END_QUARANTINE = (DELETE_THREAD, DROP_QUARANTINED)

READ_TOMBSTONE = "SELECT tombstone, tombstone_generation, quarantined FROM tiered_threads WHERE thread_id = %s"

WRITE_TOMBSTONE = """
INSERT INTO tiered_threads (thread_id, watermark, tombstone, tombstone_generation) VALUES (%s, %s, %s, %s)
ON CONFLICT (thread_id) DO UPDATE SET
    watermark = greatest(tiered_threads.watermark, EXCLUDED.watermark),
    tombstone = greatest(tiered_threads.tombstone, EXCLUDED.tombstone),
    tombstone_generation = greatest(tiered_threads.tombstone_generation, EXCLUDED.tombstone_generation)"""

# What came later stays, and so does the quarantine then: when a generation ends, each process flushes what it holds by
# itself.
DELETE_QUARANTINE = "DELETE FROM tiered_quarantine WHERE thread_id = %s AND sequence <= %s"
END_QUARANTINE = """
UPDATE tiered_threads SET quarantined = EXISTS (SELECT FROM tiered_quarantine WHERE thread_id = %(thread)s)
WHERE thread_id = %(thread)s"""

# Nothing older may be in the tables: what tells this tombstone from one that leaves older rows where they are.
MARK_DELETED = """
INSERT INTO tiered_threads (thread_id, deleted) VALUES (%s, %s)
ON CONFLICT (thread_id) DO UPDATE SET deleted = EXCLUDED.deleted, incomplete = false"""

DELETE_ALL = (
    "DELETE FROM checkpoints WHERE thread_id = %s",
    "DELETE FROM checkpoint_blobs WHERE thread_id = %s",
    "DELETE FROM tiered_deltas WHERE thread_id = %s",
    "DELETE FROM checkpoint_writes WHERE thread_id = %s",
)

# The condition on the digest is what the index is on.
FIND_RUNS = """
SELECT DISTINCT thread_id FROM checkpoints
WHERE metadata ? 'run_id' AND metadata ->> 'run_id' = ANY(%(runs)s)
AND md5(metadata ->> 'run_id') = ANY(ARRAY(SELECT md5(run) FROM unnest(%(runs)s::text[]) AS run))"""

FIND_RUN_CHECKPOINTS = """
SELECT checkpoint_ns, checkpoint_id FROM checkpoints
WHERE thread_id = %(thread)s AND metadata ->> 'run_id' = ANY(%(runs)s)"""

HAS_DELTAS = "SELECT EXISTS (SELECT FROM tiered_deltas WHERE thread_id = %s) AS found"

HAS_VALUES = """
SELECT EXISTS (SELECT FROM checkpoint_blobs WHERE thread_id = %(thread)s)
    OR EXISTS (SELECT FROM tiered_deltas WHERE thread_id = %(thread)s) AS found"""

COPY_DELTAS = """
INSERT INTO tiered_deltas (thread_id, checkpoint_ns, channel, version, base, type, delta, depth, chain_bytes, size)
SELECT %(target)s, checkpoint_ns, channel, version, base, type, delta, depth, chain_bytes, size
FROM tiered_deltas WHERE thread_id = %(source)s"""

# What the target has under the name of a base may be another value.
COPY_DELTAS_WHOLE = """
INSERT INTO checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob)
SELECT %(target)s, d.checkpoint_ns, d.channel, d.version, d.type,
    tiered_whole(d.thread_id, d.checkpoint_ns, d.channel, d.version)
FROM tiered_deltas d WHERE d.thread_id = %(source)s AND NOT EXISTS (
    SELECT FROM tiered_deltas t WHERE t.thread_id = %(target)s AND t.checkpoint_ns = d.checkpoint_ns
    AND t.channel = d.channel AND t.version = d.version)
ON CONFLICT DO NOTHING"""

COPY_ROWS = (
    """INSERT INTO checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob)
    SELECT %(target)s, checkpoint_ns, channel, version, type, blob
    FROM checkpoint_blobs b WHERE thread_id = %(source)s AND NOT EXISTS (
        SELECT FROM tiered_deltas t WHERE t.thread_id = %(target)s AND t.checkpoint_ns = b.checkpoint_ns
        AND t.channel = b.channel AND t.version = b.version)
    ON CONFLICT DO NOTHING""",
    """INSERT INTO checkpoints (thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, type, checkpoint,
        metadata, tiered_seq, tiered_blobs)
    SELECT %(target)s, checkpoint_ns, checkpoint_id, parent_checkpoint_id, type, checkpoint, metadata, %(sequence)s,
        tiered_blobs
    FROM checkpoints WHERE thread_id = %(source)s ON CONFLICT DO NOTHING""",
    """INSERT INTO checkpoint_writes (thread_id, checkpoint_ns, checkpoint_id, task_id, idx, channel, type, blob,
        task_path, tiered_seq)
    SELECT %(target)s, checkpoint_ns, checkpoint_id, task_id, idx, channel, type, blob, task_path, %(sequence)s
    FROM checkpoint_writes WHERE thread_id = %(source)s ON CONFLICT DO NOTHING""",
)


def execute(
    connection: Connection,
    thread_id: str,
    sequence: int,
    generation: int,
    record: MaintenanceRecord,
    *,
    shard_of: Callable[[str], int],
    statement_timeout: float,
) -> bool:
    """Execute a journaled operation; one that was executed before changes nothing.

    Args:
        connection: In autocommit mode.
        thread_id: The thread whose journal holds the record.
        sequence: The record's sequence number, which becomes the thread's tombstone.
        generation: The generation in which it was acknowledged.
        record: The operation.
        shard_of: Gives a thread's shard, whose lock guards it.
        statement_timeout: Seconds for each statement; 0 leaves the server's setting.

    Returns:
        Whether it must wait in quarantine, because an earlier record of the thread does.

    Raises:
        psycopg.Error: nothing was changed.
        ValueError: this version does not know the operation.
    """
    removal = None
    if record.operation == RETAIN:
        # What takes long is done before the lock, which holds up every other thread of the shard.
        with connection.transaction(), connection.cursor() as cursor:
            set_timeouts(connection, statement_timeout)
            removal = _prepare(cursor, thread_id, sequence, record)
    with connection.transaction(), connection.cursor() as cursor:
        set_timeouts(connection, statement_timeout)
        lock(cursor, thread_id, record, shard_of)
        known = cursor.execute(READ_TOMBSTONE, (thread_id,)).fetchone()
        if known is None or (known["tombstone"] < sequence and known["tombstone_generation"] <= generation):
            if known is not None and waits(record, quarantined=known["quarantined"]):
                return True
            execute_locked(cursor, thread_id, sequence, 0, record, removal)
    return False


def waits(record: MaintenanceRecord, *, quarantined: bool) -> bool:
    """Tell whether an operation on a thread must wait in quarantine, behind the records that are there."""
    return quarantined and record.operation not in _END_QUARANTINE


def lock(cursor: _Cursor, thread_id: str, record: MaintenanceRecord, shard_of: Callable[[str], int]) -> None:
    """Take the locks that an operation needs, within its transaction."""
    source = record.arguments["source"] if record.operation == COPY else thread_id
    # Always in the order of the shards, like every flush, so that nobody waits in a circle.
    for shard in sorted({shard_of(thread_id), shard_of(source)}):
        shared = "" if shard == shard_of(thread_id) else "_shared"
        cursor.execute(f"SELECT pg_advisory_xact_lock{shared}(%s, %s)".encode(), (LOCK_CLASS, shard))


def execute_locked(
    cursor: _Cursor,
    thread_id: str,
    sequence: int,
    generation: int,
    record: MaintenanceRecord,
    removal: retention.Removal | None = None,
) -> None:
    """Execute an operation within a transaction that holds its locks.

    Args:
        cursor: The transaction's.
        thread_id: The thread.
        sequence: The operation's sequence number.
        generation: Nothing of the thread that was journaled in an older generation may come back; 0 if the sequence
            number alone decides.
        record: The operation.
        removal: What it removes, if that was found out before.

    Raises:
        ValueError: this version does not know the operation.
    """
    arguments = record.arguments
    if record.operation == DELETE_THREAD:
        _delete_all(cursor, thread_id, sequence)
    elif record.operation == DELETE_RUNS:
        _delete_runs(cursor, thread_id, arguments["run_ids"])
    elif record.operation == PRUNE:
        rules = retention.Rules(keep_last=1)
        retention.remove(cursor, thread_id, retention.prepare(cursor, thread_id, rules, sequence, None))
    elif record.operation == RETAIN:
        if removal is None or not retention.still_holds(cursor, thread_id, removal):
            removal = _prepare(cursor, thread_id, sequence, record)
        _retain(cursor, thread_id, sequence, removal)
    elif record.operation == COPY:
        _copy(cursor, thread_id, arguments["source"], sequence)
    elif record.operation == DROP_QUARANTINED:
        _drop_quarantined(cursor, thread_id, sequence)
    else:
        raise ValueError(f"not an operation this version knows: {record.operation!r}")
    tombstone = sequence
    if generation and record.operation not in _END_QUARANTINE:
        # Past Redis, an older record may still lie in its journal, its writer gone. What a delete removes is to stay
        # away; anything else must not keep out what was acknowledged.
        tombstone = generation = 0
    cursor.execute(WRITE_TOMBSTONE, (thread_id, sequence, tombstone, generation))


def threads_of_runs(connection: Connection, run_ids: Sequence[str]) -> list[str]:
    """Find the threads that hold checkpoints of some runs."""
    return [row["thread_id"] for row in connection.execute(FIND_RUNS, {"runs": list(run_ids)})]


def _copy(cursor: _Cursor, thread_id: str, source: str, sequence: int) -> None:
    values = {"target": thread_id, "source": source, "sequence": sequence}
    # Looked at before anything is copied.
    is_new = not _is_true(cursor.execute(HAS_VALUES, {"thread": thread_id}))
    if _is_true(cursor.execute(HAS_DELTAS, (source,))):
        # Deltas need no mark that there are some: the source's have made it.
        cursor.execute(COPY_DELTAS if is_new else COPY_DELTAS_WHOLE, values)
    for statement in COPY_ROWS:
        cursor.execute(statement.encode(), values)


def _is_true(cursor: _Cursor) -> bool:
    row = cursor.fetchone()
    return bool(row and row["found"])


def _delete_all(cursor: _Cursor, thread_id: str, sequence: int) -> None:
    _drop_quarantined(cursor, thread_id, sequence)
    for statement in DELETE_ALL:
        cursor.execute(statement.encode(), (thread_id,))
    cursor.execute(MARK_DELETED, (thread_id, sequence))


def _prepare(cursor: _Cursor, thread_id: str, sequence: int, record: MaintenanceRecord) -> retention.Removal:
    rules = retention.Rules.from_arguments(record.arguments)
    return retention.prepare(cursor, thread_id, rules, sequence, retention.MOST_REMOVED)


def _retain(cursor: _Cursor, thread_id: str, sequence: int, removal: retention.Removal) -> None:
    if removal.whole:
        _delete_all(cursor, thread_id, sequence)
    else:
        retention.remove(cursor, thread_id, removal)


def _drop_quarantined(cursor: _Cursor, thread_id: str, sequence: int) -> None:
    cursor.execute(DELETE_QUARANTINE, (thread_id, sequence))
    cursor.execute(END_QUARANTINE, {"thread": thread_id})


def _delete_runs(cursor: _Cursor, thread_id: str, run_ids: Sequence[str]) -> None:
    doomed: dict[str, list[str]] = {}
    for row in cursor.execute(FIND_RUN_CHECKPOINTS, {"thread": thread_id, "runs": list(run_ids)}).fetchall():
        doomed.setdefault(row["checkpoint_ns"], []).append(row["checkpoint_id"])
    for ns, ids in doomed.items():
        retention.delete_checkpoints(cursor, thread_id, ns, ids)
