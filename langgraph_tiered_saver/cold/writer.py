"""Writing records to PostgreSQL: a batch of many threads' records is one transaction of a few statements."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psycopg
from psycopg.rows import DictRow

from langgraph_tiered_saver import crash_points
from langgraph_tiered_saver.cold import generations, materialize, storage
from langgraph_tiered_saver.cold.generations import Generation
from langgraph_tiered_saver.cold.materialize import BlobKey, Placed
from langgraph_tiered_saver.cold.pool import Connection, set_timeouts
from langgraph_tiered_saver.cold.schema import LOCK_CLASS, STORAGE_LOCK
from langgraph_tiered_saver.config import Storage
from langgraph_tiered_saver.recent import RecentValues
from langgraph_tiered_saver.records import Blob, CheckpointRecord, Record, WritesRecord, unpack_value

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
RETURNING thread_id, tombstone, tombstone_generation, quarantined, incomplete,
    (SELECT value FROM tiered_state WHERE name = 'storage') AS storage,
    EXISTS (SELECT FROM tiered_state WHERE name = 'views') AS has_views"""

INSERT_QUARANTINE = """
INSERT INTO tiered_quarantine (thread_id, sequence, payload)
SELECT * FROM unnest(%b::text[], %b::bigint[], %b::bytea[]) ON CONFLICT DO NOTHING"""

# A checkpoint that references a blob that is missing would be read without the channel (I2).
DELETE_INCOMPLETE = """
DELETE FROM checkpoints c WHERE thread_id = %s AND tiered_seq = ANY(%s) AND tiered_blobs > (
    SELECT count(*) FROM jsonb_each_text(c.checkpoint -> 'channel_versions') AS v
    WHERE EXISTS (
        SELECT FROM checkpoint_blobs b WHERE b.thread_id = c.thread_id AND b.checkpoint_ns = c.checkpoint_ns
        AND b.channel = v.key AND b.version = v.value
    ) OR EXISTS (
        SELECT FROM tiered_deltas d WHERE d.thread_id = c.thread_id AND d.checkpoint_ns = c.checkpoint_ns
        AND d.channel = v.key AND d.version = v.value))
RETURNING checkpoint_id"""

# Later checkpoints may reference what is missing too, without carrying it.
MARK_INCOMPLETE = "UPDATE tiered_threads SET incomplete = true WHERE thread_id = ANY(%s)"

QUARANTINE = "UPDATE tiered_threads SET quarantined = true WHERE thread_id = %s"

WRITE_REASON = "UPDATE tiered_quarantine SET reason = %s WHERE thread_id = %s AND sequence = %s"

# A version is stored in one of the two tables.
INSERT_BLOBS = """
INSERT INTO checkpoint_blobs (thread_id, checkpoint_ns, channel, version, type, blob)
SELECT * FROM unnest(%b::text[], %b::text[], %b::text[], %b::text[], %b::text[], %b::bytea[])
    AS r (thread_id, checkpoint_ns, channel, version, type, blob)
WHERE NOT EXISTS (
    SELECT FROM tiered_deltas d WHERE d.thread_id = r.thread_id AND d.checkpoint_ns = r.checkpoint_ns
    AND d.channel = r.channel AND d.version = r.version)
ON CONFLICT (thread_id, checkpoint_ns, channel, version) DO NOTHING"""

INSERT_DELTAS = """
INSERT INTO tiered_deltas
    (thread_id, checkpoint_ns, channel, version, base, type, delta, depth, chain_bytes, size)
SELECT * FROM unnest(%b::text[], %b::text[], %b::text[], %b::text[], %b::text[], %b::text[], %b::bytea[], %b::int[],
    %b::bigint[], %b::bigint[])
    AS r (thread_id, checkpoint_ns, channel, version, base, type, delta, depth, chain_bytes, size)
WHERE NOT EXISTS (
    SELECT FROM checkpoint_blobs b WHERE b.thread_id = r.thread_id AND b.checkpoint_ns = r.checkpoint_ns
    AND b.channel = r.channel AND b.version = r.version)
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
        lost: How many checkpoints could not be kept, because a value of theirs cannot be made.
    """

    diverted: frozenset[str]
    generation: Generation
    lost: int = 0


@dataclass(frozen=True)
class _Outcome:
    """What a transaction of `write_locked` did, to be acted on once it is committed."""

    diverted: frozenset[str]
    placed: Placed
    lost: int


@dataclass
class Rows:
    """What the records of a batch come to; later ones are folded into earlier ones by the rules of each table."""

    blobs: dict[BlobKey, Blob] = field(default_factory=dict)
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
        for blob in record.blobs:
            self.blobs.setdefault(BlobKey(thread_id, ns, blob.channel, blob.version), blob)
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


def write(
    connection: Connection,
    batch: Sequence[ThreadRecords],
    *,
    statement_timeout: float,
    storage: Storage = "standard",
    recent: RecentValues | None = None,
) -> Written:
    """Write records of any number of threads in one transaction, idempotently.

    Records older than their thread's tombstone are skipped; those of a thread under quarantine join the others there.
    Rows go in in the order of their keys, so that two processes that flush the same records wait for each other
    instead of deadlocking.

    Args:
        connection: In autocommit mode.
        batch: At most one entry for each thread.
        statement_timeout: Seconds; 0 leaves the server's setting.
        storage: How values are stored that records carry as deltas.
        recent: The values that were written last; those of this batch join them when it is committed.

    Raises:
        psycopg.Error, BrokenDeltaError: nothing was written.
    """
    # In pipeline mode the transaction costs three round trips instead of one for each statement. psycopg's own
    # transaction blocks would add two, because they wait for their BEGIN and their COMMIT.
    pipelined = connection.pipeline() if psycopg.capabilities.has_pipeline() else nullcontext()
    locks = {entry.shard for entry in batch} | ({STORAGE_LOCK} if storage == "compact" else set())
    with _rolled_back_on_error(connection), pipelined as pipeline, connection.cursor() as cursor:
        connection.execute("BEGIN")
        set_timeouts(connection, statement_timeout)
        cursor.execute(LOCK_SHARED, (LOCK_CLASS, sorted(locks)))
        crash_points.reach("after_begin")
        outcome = _write(cursor, batch, storage, recent, pipeline)
        # What was refused before shows when results are fetched, at the latest when the pipeline ends; until then
        # PostgreSQL discards everything behind it, this too.
        connection.execute("COMMIT")
        # Behind the commit, in the round trip that ends the pipeline. A generation that was opened before the commit
        # without these records, while this process stood still in the transaction, is seen here. A lock that keeps the
        # opening waiting for the commit would let one process that stands still hold up all others.
        current = connection.execute(generations.READ)
    if recent is not None:
        for channel, value in outcome.placed.recent.items():
            recent.put(channel, value)
    return Written(outcome.diverted, generations.of_row(current.fetchone()), outcome.lost)


@contextmanager
def _rolled_back_on_error(connection: Connection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if not connection.closed:
            connection.rollback()
        raise


def write_locked(
    cursor: psycopg.Cursor[DictRow], batch: Sequence[ThreadRecords], *, storage: Storage = "standard"
) -> frozenset[str]:
    """Write records within a transaction that holds their shards' locks, and `STORAGE_LOCK` with compact storage.

    Args:
        cursor: The transaction's.
        batch: At most one entry for each thread.
        storage: How values are stored that records carry as deltas.

    Returns:
        The threads under quarantine, whose records were put there.

    Raises:
        psycopg.Error, BrokenDeltaError: the transaction must be rolled back.
    """
    return _write(cursor, batch, storage, None, None).diverted


def _write(
    cursor: psycopg.Cursor[DictRow],
    batch: Sequence[ThreadRecords],
    mode: Storage,
    recent: RecentValues | None,
    pipeline: psycopg.Pipeline | None,
) -> _Outcome:
    _insert(cursor, RAISE_WATERMARKS, {(e.thread_id,): (e.records[-1].sequence,) for e in batch if e.records})
    if pipeline is not None:
        # The rows must be waited for anyway; behind a flush instead of a sync, PostgreSQL would not count as idle the
        # time in which this process stands still.
        pipeline.sync()
    known = {row["thread_id"]: row for row in cursor} if any(e.records for e in batch) else {}
    diverted = frozenset(name for name, row in known.items() if row["quarantined"])
    tombstones = {name: (row["tombstone"], row["tombstone_generation"]) for name, row in known.items()}
    rows = fold([entry for entry in batch if entry.thread_id not in diverted], tombstones)
    if mode == "compact" and any(not row["has_views"] for row in known.values()):
        # A process that began while PostgreSQL was away, on a database that was set up for standard storage: nobody
        # could read deltas. The next process that begins sets it up.
        mode = "standard"
    placed = materialize.place(cursor, rows.blobs, storage=mode, recent=recent)
    if placed.deltas and any(row["storage"] != "compact" for row in known.values()):
        cursor.execute(storage.MARK_COMPACT)
    _insert(cursor, INSERT_BLOBS, placed.blobs)
    _insert(cursor, INSERT_DELTAS, placed.deltas)
    _insert(cursor, INSERT_CHECKPOINTS, rows.checkpoints)
    _insert(cursor, INSERT_FIRST_WRITES, rows.first_writes)
    _insert(cursor, INSERT_LAST_WRITES, rows.last_writes)
    lost = _remove_incomplete(cursor, batch, placed, {name for name, row in known.items() if row["incomplete"]})
    if diverted:
        aside = [entry for entry in batch if entry.thread_id in diverted]
        _insert(cursor, INSERT_QUARANTINE, _payloads(aside, tombstones))
    return _Outcome(diverted, placed, lost)


def _remove_incomplete(
    cursor: psycopg.Cursor[DictRow], batch: Sequence[ThreadRecords], placed: Placed, incomplete: set[str]
) -> int:
    """Remove the checkpoints of a batch that miss a value.

    Returns:
        How many, of threads whose losses were not counted when their records were found to be missing.
    """
    broken = {key.thread_id for key in placed.lost}
    if broken - incomplete:
        cursor.execute(MARK_INCOMPLETE, (sorted(broken),))
    lost = 0
    for entry in batch:
        if not entry.unsure and entry.thread_id not in broken and entry.thread_id not in incomplete:
            continue
        cursor.execute(DELETE_INCOMPLETE, (entry.thread_id, [item.sequence for item in entry.records]))
        # A pipeline tells the number of rows only when they are fetched.
        if removed := len(cursor.fetchall()):
            lost += 0 if entry.unsure else removed
            logger.error(
                "%d checkpoints of thread %.80r are lost with the records that they were built on",
                removed,
                entry.thread_id,
            )
    return lost


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


def _insert(cursor: psycopg.Cursor[Any], statement: str, rows: Mapping[Any, tuple[Any, ...]]) -> None:
    if rows:
        columns = zip(*(key + rows[key] for key in sorted(rows)), strict=True)
        cursor.execute(statement.encode(), [list(column) for column in columns])
