"""Writing records to PostgreSQL: a batch of many threads' records is one transaction of a few statements."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psycopg
from psycopg.rows import DictRow

from langgraph_tiered_saver import crash_points
from langgraph_tiered_saver.cold import generations
from langgraph_tiered_saver.cold.generations import Generation
from langgraph_tiered_saver.cold.pool import Connection, set_timeouts
from langgraph_tiered_saver.cold.schema import LOCK_CLASS
from langgraph_tiered_saver.records import CheckpointRecord, Record, WritesRecord, unpack_value

logger = logging.getLogger(__name__)

# Deletes take the same locks exclusively, so that none runs between a flush's look at the tombstones and its commit.
LOCK_SHARED = """
SELECT count(pg_advisory_xact_lock_shared(%s, shard)) FROM (
    SELECT shard FROM unnest(%s::int[]) AS shard ORDER BY shard
) AS ordered"""

# First of all rows, in the order of the threads, so that nobody waits in a circle.
RAISE_WATERMARKS = """
INSERT INTO tiered_threads (thread_id, watermark) SELECT * FROM unnest(%b::text[], %b::bigint[])
ON CONFLICT (thread_id) DO UPDATE SET watermark = greatest(tiered_threads.watermark, EXCLUDED.watermark)
RETURNING thread_id, tombstone, tombstone_generation, quarantined"""

INSERT_QUARANTINE = """
INSERT INTO tiered_quarantine (thread_id, sequence, payload)
SELECT * FROM unnest(%b::text[], %b::bigint[], %b::bytea[]) ON CONFLICT DO NOTHING"""

# A checkpoint that references a blob that is missing would be read without the channel (I2).
DELETE_INCOMPLETE = """
DELETE FROM checkpoints c WHERE thread_id = %s AND tiered_seq = ANY(%s) AND tiered_blobs > (
    SELECT count(*) FROM jsonb_each_text(c.checkpoint -> 'channel_versions') AS v
    JOIN checkpoint_blobs b ON b.thread_id = c.thread_id AND b.checkpoint_ns = c.checkpoint_ns
        AND b.channel = v.key AND b.version = v.value)"""

QUARANTINE = "UPDATE tiered_threads SET quarantined = true WHERE thread_id = %s"

WRITE_REASON = "UPDATE tiered_quarantine SET reason = %s WHERE thread_id = %s AND sequence = %s"

INSERT_BLOBS = """
INSERT INTO checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob)
SELECT * FROM unnest(%b::text[], %b::text[], %b::text[], %b::text[], %b::text[], %b::bytea[])
ON CONFLICT (thread_id, checkpoint_ns, channel, version) DO NOTHING"""

# A checkpoint that is put again keeps its parent, as in PostgresSaver; the last sequence number wins.
INSERT_CHECKPOINTS = """
INSERT INTO checkpoints
    (thread_id, checkpoint_ns, checkpoint_id, parent_checkpoint_id, checkpoint, metadata, tiered_seq, tiered_blobs)
SELECT thread_id, checkpoint_ns, checkpoint_id, nullif(parent, ''), checkpoint::jsonb, metadata::jsonb, seq, blobs
FROM unnest(%b::text[], %b::text[], %b::text[], %b::text[], %b::text[], %b::text[], %b::bigint[], %b::int[])
    AS r (thread_id, checkpoint_ns, checkpoint_id, parent, checkpoint, metadata, seq, blobs)
ON CONFLICT (thread_id, checkpoint_ns, checkpoint_id) DO UPDATE
SET checkpoint = EXCLUDED.checkpoint, metadata = EXCLUDED.metadata, tiered_seq = EXCLUDED.tiered_seq,
    tiered_blobs = EXCLUDED.tiered_blobs
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


class Journaled(NamedTuple):
    """A record as it lies in the journal, and decoded."""

    sequence: int
    generation: int
    record: Record
    payload: bytes


@dataclass(frozen=True)
class ThreadRecords:
    """Some of a thread's records, in journal order.

    Attributes:
        thread_id: The thread.
        shard: Its shard, whose advisory lock guards it.
        records: The records; no maintenance records.
        unsure: Records before them were lost, perhaps with blobs that these reference.
    """

    thread_id: str
    shard: int
    records: Sequence[Journaled]
    unsure: bool = False


@dataclass(frozen=True)
class Written:
    """What a flush met.

    Attributes:
        diverted: Threads under quarantine, whose records were put there.
        generation: The current generation when the records were there for everybody to see. Whoever opened a later one
            saw them first.
    """

    diverted: frozenset[str]
    generation: Generation


@dataclass
class Rows:
    """What the records of a batch come to; later ones are folded into earlier ones by the rules of each table."""

    blobs: dict[tuple[str, str, str, str], tuple[str, bytes]] = field(default_factory=dict)
    checkpoints: dict[tuple[str, str, str], tuple[str, str, str, int, int]] = field(default_factory=dict)
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
        self.checkpoints[key] = (
            parent,
            record.checkpoint.decode(),
            record.metadata.decode(),
            sequence,
            record.blob_count,
        )

    def _add_writes(self, thread_id: str, sequence: int, record: WritesRecord) -> None:
        for index, channel, value in record.writes:
            key = (thread_id, record.checkpoint_ns, record.checkpoint_id, record.task_id, index)
            row = (record.task_path, channel, *unpack_value(value), sequence)
            if record.upsert:
                self.first_writes.pop(key, None)
                self.last_writes[key] = row
            elif key not in self.last_writes:
                self.first_writes.setdefault(key, row)


def write(connection: Connection, batch: Sequence[ThreadRecords], *, statement_timeout: float) -> Written:
    """Write records of any number of threads in one transaction, idempotently.

    Records older than their thread's tombstone are skipped; those of a thread under quarantine join the others there.
    Rows go in in the order of their keys, so that two processes that flush the same records wait for each other
    instead of deadlocking.

    Args:
        connection: In autocommit mode.
        batch: At most one entry for each thread.
        statement_timeout: Seconds; 0 leaves the server's setting.

    Raises:
        psycopg.Error: nothing was written.
    """
    # In pipeline mode the transaction costs three round trips instead of one for each statement.
    pipelined = connection.pipeline() if psycopg.capabilities.has_pipeline() else nullcontext()
    with pipelined as pipeline:
        with connection.transaction(), connection.cursor() as cursor:
            set_timeouts(connection, statement_timeout)
            cursor.execute(LOCK_SHARED, (LOCK_CLASS, sorted({entry.shard for entry in batch})))
            crash_points.reach("after_begin")
            diverted = write_locked(cursor, batch, pipeline)
        # Behind the commit, in the round trip that ends the pipeline. A generation that was opened before the commit
        # without these records, while this process stood still in the transaction, is seen here. A lock that keeps the
        # opening waiting for the commit would let one process that stands still hold up all others.
        current = connection.execute(generations.READ)
    return Written(diverted, generations.of_row(current.fetchone()))


def write_locked(
    cursor: psycopg.Cursor[DictRow], batch: Sequence[ThreadRecords], pipeline: psycopg.Pipeline | None = None
) -> frozenset[str]:
    """Write records within a transaction that holds their shards' locks.

    Args:
        cursor: The transaction's.
        batch: At most one entry for each thread.
        pipeline: The one that it is in.

    Returns:
        The threads under quarantine, whose records were put there.
    """
    _insert(cursor, RAISE_WATERMARKS, {(e.thread_id,): (e.records[-1].sequence,) for e in batch if e.records})
    if pipeline is not None:
        # The rows must be waited for anyway; behind a flush instead of a sync, PostgreSQL would not count as idle the
        # time in which this process stands still.
        pipeline.sync()
    known = {row["thread_id"]: row for row in cursor} if any(e.records for e in batch) else {}
    diverted = frozenset(name for name, row in known.items() if row["quarantined"])
    tombstones = {name: (row["tombstone"], row["tombstone_generation"]) for name, row in known.items()}
    rows = fold([entry for entry in batch if entry.thread_id not in diverted], tombstones)
    _insert(cursor, INSERT_BLOBS, rows.blobs)
    _insert(cursor, INSERT_CHECKPOINTS, rows.checkpoints)
    _insert(cursor, INSERT_FIRST_WRITES, rows.first_writes)
    _insert(cursor, INSERT_LAST_WRITES, rows.last_writes)
    for entry in batch:
        if entry.unsure:
            sequences = [item.sequence for item in entry.records]
            cursor.execute(DELETE_INCOMPLETE, (entry.thread_id, sequences))
            if cursor.rowcount > 0:
                logger.error(
                    "%d checkpoints of thread %.80r are lost with the records that they were built on",
                    cursor.rowcount,
                    entry.thread_id,
                )
    if diverted:
        aside = [entry for entry in batch if entry.thread_id in diverted]
        _insert(cursor, INSERT_QUARANTINE, _payloads(aside, tombstones))
    return diverted


def quarantine(connection: Connection, entry: ThreadRecords, reason: str | None, *, statement_timeout: float) -> bool:
    """Set a thread aside: keep its records as they are, the first of which was refused, in a table of their own.

    Args:
        connection: In autocommit mode.
        entry: The thread's records, the refused one first.
        reason: Why it was refused; None if an earlier one was, and waits there.
        statement_timeout: Seconds; 0 leaves the server's setting.

    Returns:
        Whether they wait there now; not if the quarantine has ended meanwhile, or the thread was deleted.

    Raises:
        psycopg.Error: nothing was changed.
    """
    with connection.transaction(), connection.cursor() as cursor:
        set_timeouts(connection, statement_timeout)
        cursor.execute(LOCK_SHARED, (LOCK_CLASS, [entry.shard]))
        _insert(cursor, RAISE_WATERMARKS, {(entry.thread_id,): (entry.records[-1].sequence,)})
        row = cursor.fetchone()
        assert row is not None  # noqa: S101 - RETURNING gives the row
        tombstones = {entry.thread_id: (row["tombstone"], row["tombstone_generation"])}
        payloads = _payloads([entry], tombstones)
        if not payloads or (reason is None and not row["quarantined"]):
            return False
        cursor.execute(QUARANTINE, (entry.thread_id,))
        _insert(cursor, INSERT_QUARANTINE, payloads)
        if reason is not None:
            cursor.execute(WRITE_REASON, (reason, entry.thread_id, entry.records[0].sequence))
    return True


def _payloads(
    batch: Sequence[ThreadRecords], tombstones: Mapping[str, tuple[int, int]]
) -> dict[tuple[str, int], tuple[bytes]]:
    return {
        (entry.thread_id, item.sequence): (item.payload,)
        for entry in batch
        for item in entry.records
        if _is_newer(item, tombstones.get(entry.thread_id, (0, 0)))
    }


def _is_newer(item: Journaled, tombstone: tuple[int, int]) -> bool:
    return item.sequence > tombstone[0] and item.generation >= tombstone[1]


def fold(batch: Sequence[ThreadRecords], tombstones: Mapping[str, tuple[int, int]]) -> Rows:
    """Work out the rows of some records.

    Args:
        batch: The records.
        tombstones: Per thread, the sequence number and the generation below which nothing may come back.
    """
    rows = Rows()
    for entry in batch:
        for item in entry.records:
            if _is_newer(item, tombstones.get(entry.thread_id, (0, 0))):
                rows.add(entry.thread_id, item.sequence, item.record)
    return rows


def _insert(cursor: psycopg.Cursor[Any], statement: str, rows: Mapping[tuple[Any, ...], tuple[Any, ...]]) -> None:
    if rows:
        columns = zip(*(key + rows[key] for key in sorted(rows)), strict=True)
        cursor.execute(statement.encode(), [list(column) for column in columns])
