"""Writing records to PostgreSQL: a batch of many threads' records is one transaction of a few statements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import psycopg

from langgraph_tiered_saver.cold.pool import Connection
from langgraph_tiered_saver.cold.schema import LOCK_CLASS
from langgraph_tiered_saver.records import CheckpointRecord, Record, WritesRecord, unpack_value

# Deletes take the same locks exclusively, so that none runs between a flush's look at the tombstones and its commit.
LOCK_SHARED = """
SELECT count(pg_advisory_xact_lock_shared(%s, shard)) FROM (
    SELECT shard FROM unnest(%s::int[]) AS shard ORDER BY shard
) AS ordered"""

READ_TOMBSTONES = "SELECT thread_id, tombstone FROM tiered_threads WHERE thread_id = ANY(%s) AND tombstone > 0"

INSERT_BLOBS = """
INSERT INTO checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob)
SELECT * FROM unnest(%b::text[], %b::text[], %b::text[], %b::text[], %b::text[], %b::bytea[])
ON CONFLICT (thread_id, checkpoint_ns, channel, version) DO NOTHING"""

# A checkpoint that is put again keeps its parent, as in PostgresSaver; the last sequence number wins.
INSERT_CHECKPOINTS = """
INSERT INTO checkpoints
    (thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, checkpoint, metadata, tiered_seq)
SELECT thread_id, checkpoint_ns, checkpoint_id, nullif(parent, ''), checkpoint::jsonb, metadata::jsonb, seq
FROM unnest(%b::text[], %b::text[], %b::text[], %b::text[], %b::text[], %b::text[], %b::bigint[])
    AS r (thread_id, checkpoint_ns, checkpoint_id, parent, checkpoint, metadata, seq)
ON CONFLICT (thread_id, checkpoint_ns, checkpoint_id) DO UPDATE
SET checkpoint = EXCLUDED.checkpoint, metadata = EXCLUDED.metadata, tiered_seq = EXCLUDED.tiered_seq
WHERE checkpoints.tiered_seq IS NULL OR checkpoints.tiered_seq < EXCLUDED.tiered_seq"""

_INSERT_WRITES = """
INSERT INTO checkpoint_writes
    (thread_id, checkpoint_ns, checkpoint_id, task_id, idx, task_path, channel, type, blob, tiered_seq)
SELECT * FROM unnest(%b::text[], %b::text[], %b::text[], %b::text[], %b::int[], %b::text[], %b::text[], %b::text[],
    %b::bytea[], %b::bigint[])
ON CONFLICT (thread_id, checkpoint_ns, checkpoint_id, task_id, idx) DO UPDATE
SET task_path = EXCLUDED.task_path, channel = EXCLUDED.channel, type = EXCLUDED.type, blob = EXCLUDED.blob,
    tiered_seq = EXCLUDED.tiered_seq"""

# Regular writes: the first sequence number wins, and a row that PostgresSaver wrote came first. A special write in a
# mixed call (idx < 0) gives way to whatever is there, like in PostgresSaver.
INSERT_FIRST_WRITES = _INSERT_WRITES + " WHERE EXCLUDED.idx >= 0 AND EXCLUDED.tiered_seq < checkpoint_writes.tiered_seq"
# Special writes: the last one wins.
INSERT_LAST_WRITES = (
    _INSERT_WRITES + " WHERE checkpoint_writes.tiered_seq IS NULL OR checkpoint_writes.tiered_seq < EXCLUDED.tiered_seq"
)

RAISE_WATERMARKS = """
INSERT INTO tiered_threads (thread_id, watermark) SELECT * FROM unnest(%b::text[], %b::bigint[])
ON CONFLICT (thread_id) DO UPDATE SET watermark = greatest(tiered_threads.watermark, EXCLUDED.watermark)"""


@dataclass(frozen=True)
class ThreadRecords:
    """Some of a thread's records, in journal order.

    Attributes:
        thread_id: The thread.
        shard: Its shard, whose advisory lock guards it.
        records: `(sequence number, record)`.
    """

    thread_id: str
    shard: int
    records: Sequence[tuple[int, Record]]


@dataclass
class Rows:
    """What the records of a batch come to; later ones are folded into earlier ones by the rules of each table."""

    blobs: dict[tuple[str, str, str, str], tuple[str, bytes]] = field(default_factory=dict)
    checkpoints: dict[tuple[str, str, str], tuple[str, str, str, int]] = field(default_factory=dict)
    first_writes: dict[tuple[str, str, str, str, int], tuple[Any, ...]] = field(default_factory=dict)
    last_writes: dict[tuple[str, str, str, str, int], tuple[Any, ...]] = field(default_factory=dict)

    def add(self, thread_id: str, sequence: int, record: Record) -> None:
        """Fold in a checkpoint or writes; sequence numbers of a thread must not go down."""
        if isinstance(record, CheckpointRecord):
            self._add_checkpoint(thread_id, sequence, record)
        elif isinstance(record, WritesRecord):
            self._add_writes(thread_id, sequence, record)

    def _add_checkpoint(self, thread_id: str, sequence: int, record: CheckpointRecord) -> None:
        ns = record.checkpoint_ns
        for channel, version, value in record.blobs:
            self.blobs.setdefault((thread_id, ns, channel, version), unpack_value(value))
        key = (thread_id, ns, record.checkpoint_id)
        earlier = self.checkpoints.get(key)
        parent = earlier[0] if earlier else record.parent_id
        self.checkpoints[key] = (parent, record.checkpoint.decode(), record.metadata.decode(), sequence)

    def _add_writes(self, thread_id: str, sequence: int, record: WritesRecord) -> None:
        for index, channel, value in record.writes:
            key = (thread_id, record.checkpoint_ns, record.checkpoint_id, record.task_id, index)
            row = (record.task_path, channel, *unpack_value(value), sequence)
            if record.upsert:
                self.first_writes.pop(key, None)
                self.last_writes[key] = row
            elif key not in self.last_writes:
                self.first_writes.setdefault(key, row)


def write(connection: Connection, batch: Sequence[ThreadRecords], *, statement_timeout: float) -> None:
    """Write records of any number of threads in one transaction, idempotently.

    Records older than their thread's tombstone are skipped. Rows go in in the order of their keys, so that two
    processes that flush the same records wait for each other instead of deadlocking.

    Args:
        connection: In autocommit mode.
        batch: At most one entry for each thread; no maintenance records.
        statement_timeout: Seconds; 0 leaves the server's setting.

    Raises:
        psycopg.Error: nothing was written.
    """
    threads = [entry.thread_id for entry in batch]
    # In pipeline mode the transaction costs three round trips instead of one for each statement.
    pipeline = connection.pipeline() if psycopg.capabilities.has_pipeline() else nullcontext()
    with pipeline, connection.transaction(), connection.cursor() as cursor:
        set_timeout(cursor, statement_timeout)
        cursor.execute(LOCK_SHARED, (LOCK_CLASS, sorted({entry.shard for entry in batch})))
        cursor.execute(READ_TOMBSTONES, (threads,))
        rows = _fold(batch, {row["thread_id"]: row["tombstone"] for row in cursor})
        _insert(cursor, INSERT_BLOBS, rows.blobs)
        _insert(cursor, INSERT_CHECKPOINTS, rows.checkpoints)
        _insert(cursor, INSERT_FIRST_WRITES, rows.first_writes)
        _insert(cursor, INSERT_LAST_WRITES, rows.last_writes)
        _insert(cursor, RAISE_WATERMARKS, {(e.thread_id,): (e.records[-1][0],) for e in batch if e.records})


def set_timeout(cursor: psycopg.Cursor[Any], seconds: float) -> None:
    """Bound every statement of the current transaction."""
    if seconds:
        cursor.execute("SELECT set_config('statement_timeout', %s, true)", (str(int(seconds * 1000)),))


def _fold(batch: Sequence[ThreadRecords], tombstones: Mapping[str, int]) -> Rows:
    rows = Rows()
    for entry in batch:
        tombstone = tombstones.get(entry.thread_id, 0)
        for sequence, record in entry.records:
            if sequence > tombstone:
                rows.add(entry.thread_id, sequence, record)
    return rows


def _insert(cursor: psycopg.Cursor[Any], statement: str, rows: Mapping[tuple[Any, ...], tuple[Any, ...]]) -> None:
    if rows:
        columns = zip(*(key + rows[key] for key in sorted(rows)), strict=True)
        cursor.execute(statement.encode(), [list(column) for column in columns])
