"""Threads under quarantine: PostgreSQL refused a record of theirs for good; it and the later ones are kept as they are.

They are tried again, or dropped, when somebody says so. What a value is stays here: nobody is shown more of a record
than its kind, its number, its time, the checkpoint it belongs to, and its size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

import psycopg
from psycopg import Cursor
from psycopg.rows import DictRow

from langgraph_tiered_saver.cold import maintenance
from langgraph_tiered_saver.cold.materialize import Weigher
from langgraph_tiered_saver.cold.pool import Connection, set_timeouts
from langgraph_tiered_saver.cold.schema import LOCK_CLASS, STORAGE_LOCK
from langgraph_tiered_saver.cold.writer import Journaled, ThreadRecords, write_locked
from langgraph_tiered_saver.config import Storage
from langgraph_tiered_saver.deltas import BrokenDeltaError
from langgraph_tiered_saver.records import CHECKPOINT, MAINTENANCE, WRITES, MaintenanceRecord, Record, decode

# The reason is that of the first refused record; those that came later wait because of it.
LIST_THREADS = """
SELECT thread_id, count(*) AS records, sum(octet_length(payload))::bigint AS bytes, min(since) AS since,
    (array_agg(reason ORDER BY sequence) FILTER (WHERE reason IS NOT NULL))[1] AS reason
FROM tiered_quarantine GROUP BY thread_id ORDER BY min(since), thread_id"""

LIST_RECORDS = """
SELECT sequence, octet_length(payload) AS size, substring(payload FROM 1 FOR %(head)s) AS head, since, reason
FROM tiered_quarantine WHERE thread_id = %(thread)s ORDER BY sequence"""

# A record begins with the length of its kind, in four bytes, and its kind.
READ_MAINTENANCE = """
SELECT payload FROM tiered_quarantine WHERE thread_id = %s AND substring(payload FROM 5 FOR 1) = %s"""

READ_SIZES = """
SELECT sequence, octet_length(payload) AS size FROM tiered_quarantine WHERE thread_id = %s ORDER BY sequence"""

READ_PAYLOADS = """
SELECT sequence, payload FROM tiered_quarantine
WHERE thread_id = %s AND sequence BETWEEN %s AND %s ORDER BY sequence"""

END = "UPDATE tiered_threads SET quarantined = false WHERE thread_id = %s"

DELETE = "DELETE FROM tiered_quarantine WHERE thread_id = %s"

_HEAD = 4096  # bytes of a record in which its names are found, if they are not very long ones
_PAGE_RECORDS = 500  # records brought to this process, and written, at once
_PAGE_BYTES = 8 * 1024 * 1024

_KINDS = {CHECKPOINT: "checkpoint", WRITES: "writes"}


@dataclass(frozen=True)
class QuarantinedThread:
    """A thread of which PostgreSQL refused a record for good, as `TieredSaver.quarantined` lists it.

    Attributes:
        thread_id: The thread.
        records: How many records wait: the refused one, and those that came later.
        bytes: Their size.
        since: When the first was set aside, by PostgreSQL's clock.
        reason: Why PostgreSQL refused it.
    """

    thread_id: str
    records: int
    bytes: int
    since: datetime
    reason: str


@dataclass(frozen=True)
class QuarantinedRecord:
    """A record that waits in quarantine, without its values.

    Attributes:
        sequence: Its sequence number, in microseconds since 1970 by the clock of the tier that acknowledged it.
        kind: `"checkpoint"`, `"writes"`, the name of an operation that removes or copies (`"prune"`, ...), or
            `"unreadable"`.
        checkpoint_ns: Namespace of the checkpoint that it is, or belongs to; or `""`.
        checkpoint_id: That checkpoint; or `""`.
        size: Bytes.
        since: When it was set aside, by PostgreSQL's clock.
        reason: Why it was refused; None if it waits because an earlier one was.
    """

    sequence: int
    kind: str
    checkpoint_ns: str
    checkpoint_id: str
    size: int
    since: datetime
    reason: str | None

    @property
    def acknowledged(self) -> datetime:
        """When it was acknowledged."""
        return datetime.fromtimestamp(self.sequence / 1e6, timezone.utc)


class StillRefusedError(Exception):
    """PostgreSQL refuses a record as before; everything is as it was. The text says why."""


def reason_of(error: Exception) -> str:
    """Say why a record was refused, without the values that PostgreSQL adds to its messages."""
    if isinstance(error, psycopg.Error) and error.sqlstate is not None:
        primary = error.diag.message_primary or "no message"
        return f"{primary} ({type(error).__name__}, {error.sqlstate})"
    return f"{error} ({type(error).__name__})"


def list_threads(connection: Connection) -> list[QuarantinedThread]:
    """List the threads under quarantine, the one that has waited longest first."""
    found = []
    for row in connection.execute(LIST_THREADS):
        since = row["since"].astimezone(timezone.utc)
        found.append(
            QuarantinedThread(row["thread_id"], row["records"], row["bytes"], since, row["reason"] or "unknown")
        )
    return found


def list_records(connection: Connection, thread_id: str) -> list[QuarantinedRecord]:
    """List what waits of a thread, in order."""
    found = []
    with connection.cursor(binary=True) as cursor:
        for row in cursor.execute(LIST_RECORDS, {"thread": thread_id, "head": _HEAD}):
            kind, ns, checkpoint_id = _describe(row["head"])
            found.append(
                QuarantinedRecord(
                    row["sequence"], kind, ns, checkpoint_id, row["size"], row["since"].astimezone(timezone.utc),
                    row["reason"],
                )
            )  # fmt: skip
    return found


def retry(
    connection: Connection,
    thread_id: str,
    *,
    shard_of: Callable[[str], int],
    statement_timeout: float,
    storage: Storage = "standard",
) -> int:
    """Write a thread's records as they would have been written, and end its quarantine; all of them or none.

    Args:
        connection: In autocommit mode.
        thread_id: The thread.
        shard_of: Gives a thread's shard, whose lock guards it.
        statement_timeout: Seconds for each statement; 0 leaves the server's setting.
        storage: How values are stored that records carry as deltas.

    Returns:
        How many records were written; 0 if none waited.

    Raises:
        StillRefusedError: a record cannot be read, names an operation that this version does not know, or carries a
            delta that cannot be applied.
        psycopg.Error: PostgreSQL refused again, or could not be used; nothing was changed.
    """
    while True:
        sources = _copied_from(connection, thread_id)
        with connection.transaction(), connection.cursor() as cursor:
            set_timeouts(connection, statement_timeout)
            # In the order of the shards, like every flush, so that nobody waits in a circle.
            if storage == "compact":
                cursor.execute("SELECT pg_advisory_xact_lock_shared(%s, %s)", (LOCK_CLASS, STORAGE_LOCK))
            for shard in sorted({shard_of(name) for name in (thread_id, *sources)}):
                shared = "" if shard == shard_of(thread_id) else "_shared"
                cursor.execute(f"SELECT pg_advisory_xact_lock{shared}(%s, %s)".encode(), (LOCK_CLASS, shard))
            if _copied_from(connection, thread_id) <= sources:
                return _write_all(cursor, thread_id, shard_of(thread_id), storage)


def _copied_from(connection: Connection, thread_id: str) -> frozenset[str]:
    """Find the other threads that records in quarantine copy from."""
    sources = set()
    for row in connection.execute(READ_MAINTENANCE, (thread_id, MAINTENANCE)):
        record = _decode(row["payload"])[1]
        if isinstance(record, MaintenanceRecord) and record.operation == maintenance.COPY:
            sources.add(str(record.arguments.get("source", thread_id)))
    return frozenset(sources)


def _write_all(cursor: Cursor[DictRow], thread_id: str, shard: int, storage: Storage) -> int:
    written = 0
    # Until this transaction ends nobody else sees that; within it, nothing may be diverted into quarantine again.
    cursor.execute(END, (thread_id,))
    for page in _pages(cursor, thread_id):
        run: list[Journaled] = []
        for item in page:
            if not isinstance(item.record, MaintenanceRecord):
                run.append(item)
                continue
            _write(cursor, thread_id, shard, run, storage)
            run = []
            _execute(cursor, thread_id, item, item.record)
        _write(cursor, thread_id, shard, run, storage)
        written += len(page)
    cursor.execute(DELETE, (thread_id,))
    return written


def _execute(cursor: Cursor[DictRow], thread_id: str, item: Journaled, record: MaintenanceRecord) -> None:
    known = cursor.execute(maintenance.READ_TOMBSTONE, (thread_id,)).fetchone()
    if known is not None and (item.sequence <= known["tombstone"] or item.generation < known["tombstone_generation"]):
        return
    try:
        maintenance.execute_locked(cursor, thread_id, item.sequence, 0, record)
    except (ValueError, LookupError, TypeError) as error:
        raise StillRefusedError(reason_of(error)) from error
    cursor.execute(END, (thread_id,))


def _write(cursor: Cursor[DictRow], thread_id: str, shard: int, run: Sequence[Journaled], storage: Storage) -> None:
    """Write records, so many at once as memory is sure to hold when their deltas are made whole."""
    part: list[Journaled] = []
    weigher, size = Weigher(storage), 0
    for item in run:
        weight = weigher.weigh(item.record, item.payload)
        if part and size + weight > _PAGE_BYTES:
            _write_part(cursor, thread_id, shard, part, storage)
            part, weigher, size = [], Weigher(storage), 0
            weight = weigher.weigh(item.record, item.payload)
        part.append(item)
        size += weight
    if part:
        _write_part(cursor, thread_id, shard, part, storage)


def _write_part(
    cursor: Cursor[DictRow], thread_id: str, shard: int, run: Sequence[Journaled], storage: Storage
) -> None:
    try:
        write_locked(cursor, [ThreadRecords(thread_id, shard, run)], storage=storage)
    except (UnicodeError, BrokenDeltaError) as error:
        raise StillRefusedError(reason_of(error)) from error


def _pages(cursor: Cursor[DictRow], thread_id: str) -> Iterator[list[Journaled]]:
    """Read the records in order, so many at once as memory is sure to hold."""
    bounds: list[tuple[int, int]] = []
    count = size = 0
    for row in cursor.execute(READ_SIZES, (thread_id,)).fetchall():
        if bounds and count < _PAGE_RECORDS and size + row["size"] <= _PAGE_BYTES:
            bounds[-1] = (bounds[-1][0], row["sequence"])
        else:
            bounds.append((row["sequence"], row["sequence"]))
            count = size = 0
        count, size = count + 1, size + row["size"]
    for first, last in bounds:
        page = []
        for row in cursor.execute(READ_PAYLOADS, (thread_id, first, last)).fetchall():
            generation, record = _decode(row["payload"])
            page.append(Journaled(row["sequence"], generation, record, row["payload"]))
        yield page


def _decode(payload: bytes) -> tuple[int, Record]:
    try:
        return decode(payload)
    except ValueError as error:
        raise StillRefusedError(reason_of(error)) from error


def _describe(head: bytes) -> tuple[str, str, str]:
    """Tell a record's kind, namespace and checkpoint by its first bytes."""
    parts: list[bytes] = []
    at = 0
    while len(parts) < 4 and at + 4 <= len(head):
        end = at + 4 + int.from_bytes(head[at : at + 4], "big")
        if end > len(head):
            break
        parts.append(head[at + 4 : end])
        at = end
    kind = parts[0] if parts else b""
    names = [part.decode(errors="replace") for part in parts[2:4]] + ["", ""]
    if kind in _KINDS:
        return _KINDS[kind], names[0], names[1]
    return (names[0] or "unreadable" if kind == MAINTENANCE else "unreadable"), "", ""
