"""Operations that go past the hot tier while a generation is closed: write-through, and reads that need no journal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from langgraph_tiered_saver.cold import generations, maintenance
from langgraph_tiered_saver.cold.pool import Connection, set_timeouts
from langgraph_tiered_saver.cold.schema import GENERATION_LOCK, LOCK_CLASS
from langgraph_tiered_saver.cold.writer import Journaled, ThreadRecords, write_locked
from langgraph_tiered_saver.errors import ThreadQuarantinedError, stale_writer
from langgraph_tiered_saver.records import MaintenanceRecord, Record, encode

T = TypeVar("T")

# As the scripts' hybrid clock: PostgreSQL's time, unless the thread has a later number already.
ALLOCATE = """
INSERT INTO tiered_threads AS t (thread_id, watermark)
VALUES (%s, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint)
ON CONFLICT (thread_id) DO UPDATE
SET watermark = greatest(t.watermark + 1, t.tombstone + 1, EXCLUDED.watermark)
RETURNING watermark, run_lease, run_lease_ends > clock_timestamp() AS is_leased, quarantined"""


class GenerationMovedError(Exception):
    """The generation is not the one, or not closed any more; nothing was done."""


def check(connection: Connection, number: int) -> None:
    """Check that a generation is current and closed: PostgreSQL then has everything that was acknowledged before.

    Raises:
        GenerationMovedError: it is not.
    """
    if generations.read(connection) != generations.Generation(number, opened=False):
        raise GenerationMovedError


def read(connection: Connection, number: int, work: Callable[[Connection], T]) -> T:
    """Run a read that no journal needs to be settled for.

    Raises:
        GenerationMovedError: the journal may hold something again.
    """
    check(connection, number)
    return work(connection)


def write(
    connection: Connection,
    number: int,
    thread_id: str,
    record: Record,
    *,
    shard_of: Callable[[str], int],
    lease: str,
    statement_timeout: float,
) -> None:
    """Write a record that carries everything it needs, in one transaction; it is durable when this returns.

    Args:
        connection: In autocommit mode.
        number: The closed generation in which it is written.
        thread_id: Its thread.
        record: The operation.
        shard_of: Gives a thread's shard, whose lock guards it.
        lease: The token of the run lease that this process holds on the thread, or "".
        statement_timeout: Seconds for each statement; 0 leaves the server's setting.

    Raises:
        GenerationMovedError: the hot tier may be in use again; nothing was written.
        StaleWriterError: another run holds the thread's lease; nothing was written.
        ThreadQuarantinedError: an earlier record of the thread was refused for good, and this one waits with it.
        psycopg.Error: nothing was written.
    """
    with connection.transaction(), connection.cursor() as cursor:
        set_timeouts(connection, statement_timeout)
        cursor.execute("SELECT pg_advisory_xact_lock_shared(%s, %s)", (LOCK_CLASS, GENERATION_LOCK))
        check(connection, number)
        if isinstance(record, MaintenanceRecord):
            maintenance.lock(cursor, thread_id, record, shard_of)
        else:
            cursor.execute("SELECT pg_advisory_xact_lock_shared(%s, %s)", (LOCK_CLASS, shard_of(thread_id)))
        row = cursor.execute(ALLOCATE, (thread_id,)).fetchone()
        assert row is not None  # noqa: S101 - RETURNING gives the row
        # One that has ended nobody holds, not even who held it last: somebody without a lease may have written since.
        if (row["run_lease"] if row["is_leased"] else "") != lease:
            raise stale_writer(thread_id)
        sequence = row["watermark"]
        if isinstance(record, MaintenanceRecord) and not maintenance.waits(record, quarantined=row["quarantined"]):
            maintenance.execute_locked(cursor, thread_id, sequence, number, record)
            return
        journaled = Journaled(sequence, number, record, encode(record, number))
        diverted = write_locked(cursor, [ThreadRecords(thread_id, shard_of(thread_id), [journaled])])
    if diverted:
        raise ThreadQuarantinedError(
            f"Thread {thread_id!r:.80} is quarantined: PostgreSQL refused an earlier record of it. This one is kept "
            "with it; see `langgraph-tiered quarantine`.",
            thread_id=thread_id,
        )
