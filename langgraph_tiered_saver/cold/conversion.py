"""Storing the values of a thread in the other way, a bounded number of bytes in each transaction, while writers go on.

What takes long, reading values and comparing them, is done before the shard's lock is taken. Under the lock it is
checked that the rows are still there; if not, because the thread was pruned meanwhile, say, the thread is looked at
anew. Every transaction leaves each version stored in one of the two ways, so that a conversion may end anywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from psycopg import Cursor
from psycopg.rows import DictRow

from langgraph_tiered_saver import codec, deltas
from langgraph_tiered_saver.cold import storage
from langgraph_tiered_saver.cold.materialize import (
    BlobKey,
    DeltaRow,
    Place,
    next_place,
    read_places,
    read_values,
    walk,
)
from langgraph_tiered_saver.cold.pool import Connection, set_timeouts
from langgraph_tiered_saver.cold.schema import LOCK_CLASS, STORAGE_LOCK
from langgraph_tiered_saver.cold.writer import INSERT_BLOBS, INSERT_DELTAS
from langgraph_tiered_saver.records import TypedValue

logger = logging.getLogger(__name__)

PAGE = 100  # threads listed at once
# Whole values in one transaction. Written, they take about 60 ms here, which is how long a flush of another thread of
# the shard may wait.
MOST_BYTES = 4 * 1024 * 1024

# Each thread costs one descent of the index.
NEXT_THREADS = """
WITH RECURSIVE names AS (
    (SELECT thread_id, 1 AS number FROM {table} WHERE thread_id > %(after)s ORDER BY thread_id LIMIT 1)
    UNION ALL
    SELECT following.thread_id, names.number + 1 FROM names CROSS JOIN LATERAL (
        SELECT thread_id FROM {table} WHERE thread_id > names.thread_id ORDER BY thread_id LIMIT 1
    ) AS following WHERE names.number < %(limit)s
)
SELECT thread_id FROM names ORDER BY thread_id"""

# In the order in which versions are made. What a value's length is, PostgreSQL knows without reading it.
LIST_VERSIONS = """
SELECT * FROM (
    SELECT checkpoint_ns, channel, version, '' AS base, octet_length(blob) AS size, 0 AS depth, 0 AS chain_bytes
    FROM checkpoint_blobs WHERE thread_id = %(thread)s AND blob IS NOT NULL
    UNION ALL
    SELECT checkpoint_ns, channel, version, base, size, depth, chain_bytes
    FROM tiered_deltas WHERE thread_id = %(thread)s
) AS stored ORDER BY checkpoint_ns, channel, version COLLATE "C\""""

READ_TOMBSTONE = "SELECT tombstone FROM tiered_threads WHERE thread_id = %s"

_DELETE = """
DELETE FROM {table} AS stored
USING unnest(%s::text[], %s::text[], %s::text[], %s::text[]) AS r (thread_id, checkpoint_ns, channel, version)
WHERE stored.thread_id = r.thread_id AND stored.checkpoint_ns = r.checkpoint_ns AND stored.channel = r.channel
AND stored.version = r.version"""
DELETE_BLOBS = _DELETE.format(table="checkpoint_blobs")
DELETE_DELTAS = _DELETE.format(table="tiered_deltas")

# A version that deltas were made to since the versions were listed.
FIND_NEW_BASES = """
SELECT count(*) AS count FROM tiered_deltas d
JOIN unnest(%s::text[], %s::text[], %s::text[], %s::text[]) AS r (thread_id, checkpoint_ns, channel, version)
ON d.thread_id = r.thread_id AND d.checkpoint_ns = r.checkpoint_ns AND d.channel = r.channel AND d.base = r.version"""

# What was prepared for a removal no longer holds.
COUNT_CONVERSION = """
INSERT INTO tiered_threads AS t (thread_id, conversions) VALUES (%s, 1)
ON CONFLICT (thread_id) DO UPDATE SET conversions = t.conversions + 1"""

END_COMPACT = """
UPDATE tiered_state SET value = 'standard'
WHERE name = 'storage' AND value = 'compact' AND NOT EXISTS (SELECT FROM tiered_deltas)"""

COUNT_VALUES = """
SELECT (SELECT count(*) FROM checkpoint_blobs) AS whole_values,
    (SELECT count(*) FROM tiered_deltas) AS deltas,
    (SELECT coalesce(sum(octet_length(delta)), 0)::bigint FROM tiered_deltas) AS delta_bytes,
    (SELECT coalesce(sum(size), 0)::bigint FROM tiered_deltas) AS made_bytes,
    pg_total_relation_size('checkpoint_blobs') AS whole_disk_bytes,
    pg_total_relation_size('tiered_deltas') AS delta_disk_bytes"""

_Cursor = Cursor[DictRow]


class _MovedError(Exception):
    """Somebody else changed the rows; nothing was done."""


class Version(NamedTuple):
    """A version of a channel, and how it is stored."""

    key: BlobKey
    base: str
    size: int
    place: Place


@dataclass(frozen=True)
class Batch:
    """What one transaction did.

    Attributes:
        versions: How many versions were converted.
        bytes_before: What they took, without what PostgreSQL adds to rows and takes away by compressing.
        bytes_after: What they take now.
        damaged: Versions that cannot be rebuilt, and were left as they are.
    """

    versions: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    damaged: Sequence[BlobKey] = ()


@dataclass(frozen=True)
class StorageState:
    """How values are stored.

    Attributes:
        storage: `"standard"`: PostgresSaver sees all; `"compact"`: there may be deltas.
        views: Schema of the views that show whole values, or None.
        whole_values: Values in checkpoint_blobs.
        deltas: Values in tiered_deltas.
        delta_bytes: Bytes of their deltas.
        made_bytes: Bytes of the values that these make.
        whole_disk_bytes: What checkpoint_blobs takes, with indexes, and room that VACUUM has not freed.
        delta_disk_bytes: What tiered_deltas takes.
    """

    storage: str
    views: str | None
    whole_values: int
    deltas: int
    delta_bytes: int
    made_bytes: int
    whole_disk_bytes: int
    delta_disk_bytes: int


def show(connection: Connection) -> StorageState:
    """Look at how values are stored; reads every row's lengths."""
    recorded = connection.execute(storage.READ_RECORDED).fetchone() or {}
    counts = connection.execute(COUNT_VALUES).fetchone() or {}
    return StorageState(recorded.get("storage") or "standard", recorded.get("views"), **counts)


def next_threads(connection: Connection, after: str, *, to_compact: bool) -> list[str]:
    """List the next threads that may have something to convert, in the order of their names; none after the last."""
    statement = NEXT_THREADS.format(table="checkpoint_blobs" if to_compact else "tiered_deltas")
    rows = connection.execute(statement.encode(), {"after": after, "limit": PAGE}).fetchall()
    return [row["thread_id"] for row in rows]


def begin_compact(connection: Connection) -> None:
    """Let readers know that there may be deltas, before there are any."""
    storage.create_views(connection)
    connection.execute(storage.MARK_COMPACT)


def end_compact(connection: Connection) -> bool:
    """Let readers know that there are no deltas any more, if that is so; tell whether it is."""
    with connection.transaction(), connection.cursor() as cursor:
        # Whoever is about to store one waits, and makes the mark anew.
        cursor.execute("SELECT pg_advisory_xact_lock(%s, %s)", (LOCK_CLASS, STORAGE_LOCK))
        cursor.execute(END_COMPACT)
    return storage.recorded(connection) != "compact"


class ThreadConversion:
    """Converts one thread, step by step; each step needs a connection in autocommit mode."""

    def __init__(self, thread_id: str, shard: int, *, statement_timeout: float) -> None:
        """Begin.

        Args:
            thread_id: The thread.
            shard: Its shard, whose lock guards it.
            statement_timeout: Seconds for each statement; 0 leaves the server's setting.
        """
        self._thread_id = thread_id
        self._shard = shard
        self._timeout = statement_timeout
        self._versions: list[Version] | None = None
        self._bases: set[BlobKey] = set()
        self._at = 0
        self._previous: Version | None = None
        self._held: dict[BlobKey, TypedValue] = {}
        self._after = ("", "", "")

    # --- to deltas -----------------------------------------------------------------------------------------------

    def to_compact(self, connection: Connection) -> Batch | None:
        """Store some more values as deltas to the versions before them.

        A version that others are made from stays whole, so that no chain grows.

        Returns:
            What was done; None if the thread is done.
        """
        with connection.cursor() as cursor:
            tombstone = self._tombstone(cursor)
            if self._versions is None:
                self._list(cursor)
            versions = self._next_versions()
            if not versions:
                return None
            changes = self._compare(cursor, versions)
        if not changes:
            return Batch()
        try:
            with connection.transaction(), connection.cursor() as cursor:
                self._lock(cursor, STORAGE_LOCK)
                if self._tombstone(cursor) != tombstone or self._has_moved(cursor, changes):
                    raise _MovedError  # noqa: TRY301 - it rolls the transaction back
                self._exchange(cursor, DELETE_BLOBS, INSERT_DELTAS, changes)
        except _MovedError:
            self._versions = None
            return Batch()
        sizes = [(row.size, len(row.delta)) for row in changes.values()]
        return Batch(len(sizes), sum(before for before, _ in sizes), sum(after for _, after in sizes))

    def _list(self, cursor: _Cursor) -> None:
        self._versions, self._at, self._previous, self._held = [], 0, None, {}
        for row in cursor.execute(LIST_VERSIONS, {"thread": self._thread_id}).fetchall():
            key = BlobKey(self._thread_id, row["checkpoint_ns"], row["channel"], row["version"])
            place = Place(row["depth"], row["chain_bytes"])
            self._versions.append(Version(key, row["base"], row["size"], place))
        self._bases = {one.key._replace(version=one.base) for one in self._versions if one.base}

    def _next_versions(self) -> list[Version]:
        assert self._versions is not None  # noqa: S101 - listed by the caller
        taken: list[Version] = []
        size = 0
        for one in self._versions[self._at : self._at + 1000]:
            if taken and size + one.size > MOST_BYTES:
                break
            taken.append(one)
            size += one.size
        self._at += len(taken)
        return taken

    def _may_change(self, one: Version, previous: Version | None) -> bool:
        return (
            previous is not None
            and previous.key.of_channel == one.key.of_channel
            and not one.base
            and one.size >= codec.LEAST_DELTA_BASE
            and one.key not in self._bases
        )

    def _compare(self, cursor: _Cursor, versions: Sequence[Version]) -> dict[BlobKey, DeltaRow]:
        """Find out which of some versions are shorter as deltas to those before them."""
        needed: dict[BlobKey, None] = {}
        previous = self._previous
        for one in versions:
            if previous is not None and self._may_change(one, previous):
                needed |= {previous.key: None, one.key: None}
            previous = one
        values = read_values(cursor, [key for key in needed if key not in self._held]) | self._held
        changes: dict[BlobKey, DeltaRow] = {}
        for one in versions:
            before, now = self._previous, one
            if before is not None and self._may_change(one, before):
                base, value = values.get(before.key), values.get(one.key)
                delta = deltas.diff(base[1], value[1]) if base and value and base[0] == value[0] else None
                place = next_place(before.place, delta, one.size) if delta is not None else None
                if value is not None and delta is not None and place is not None:
                    changes[one.key] = DeltaRow(before.key.version, value[0], delta, *place, one.size)
                    now = Version(one.key, before.key.version, one.size, place)
            self._previous = now
        self._held = {key: typed for key, typed in values.items() if key == versions[-1].key}
        return changes

    def _has_moved(self, cursor: _Cursor, changes: Mapping[BlobKey, DeltaRow]) -> bool:
        """Tell whether a base is not where it was, or is to become a delta though deltas were made to it meanwhile."""
        bases = {key._replace(version=row.base): row for key, row in changes.items()}
        outside = {key: row for key, row in bases.items() if key not in changes}
        places = read_places(cursor, outside)
        for key, row in outside.items():
            place = places.get(key)
            if place is None or next_place(place, row.delta, row.size) != (row.depth, row.chain_bytes):
                return True
        _apply(cursor, FIND_NEW_BASES, self._last_ones(changes))
        found = cursor.fetchone()
        return bool(found and found["count"])

    def _last_ones(self, changes: Mapping[BlobKey, DeltaRow]) -> list[BlobKey]:
        """Those that writers may have made deltas to meanwhile: the last of their channel when they were listed."""
        assert self._versions is not None  # noqa: S101 - listed by the caller
        last = {one.key.of_channel: one.key for one in self._versions}
        return [key for key in changes if last[key.of_channel] == key]

    # --- to whole values -----------------------------------------------------------------------------------------

    def to_standard(self, connection: Connection) -> Batch | None:
        """Store some more values whole that are stored as deltas.

        Returns:
            What was done; None if the thread is done.
        """
        whole: dict[BlobKey, TypedValue] = {}
        damaged: list[BlobKey] = []
        size = before = 0
        with connection.cursor() as cursor:
            after = self._after
            for stored in walk(cursor, self._thread_id, after):
                if whole and size + stored.size > MOST_BYTES:
                    break
                after = stored.key[1:]
                before += stored.delta_size
                if stored.value is None:
                    damaged.append(stored.key)
                    logger.error("Version %s of channel %r of thread %.80r stays a delta: %s", stored.key.version,
                                 stored.key.channel, self._thread_id, stored.reason)  # fmt: skip
                else:
                    whole[stored.key] = stored.value
                    size += len(stored.value[1])
        if not (whole or damaged):
            return None
        if whole:
            try:
                with connection.transaction(), connection.cursor() as cursor:
                    self._lock(cursor)
                    self._exchange(cursor, DELETE_DELTAS, INSERT_BLOBS, whole)
            except _MovedError:
                return Batch()
        self._after = after
        return Batch(len(whole), before, size, damaged)

    # --- both ----------------------------------------------------------------------------------------------------

    def _lock(self, cursor: _Cursor, *shared: int) -> None:
        set_timeouts(cursor.connection, self._timeout)
        for lock in shared:
            cursor.execute("SELECT pg_advisory_xact_lock_shared(%s, %s)", (LOCK_CLASS, lock))
        cursor.execute("SELECT pg_advisory_xact_lock(%s, %s)", (LOCK_CLASS, self._shard))

    def _tombstone(self, cursor: _Cursor) -> int:
        row = cursor.execute(READ_TOMBSTONE, (self._thread_id,)).fetchone()
        return int(row["tombstone"]) if row else 0

    def _exchange(self, cursor: _Cursor, delete: str, insert: str, rows: Mapping[BlobKey, tuple[Any, ...]]) -> None:
        """Replace rows of one table by rows of the other, all of them or none."""
        _apply(cursor, delete, rows)
        if cursor.rowcount != len(rows):
            raise _MovedError
        columns = zip(*(key + rows[key] for key in sorted(rows)), strict=True)
        cursor.execute(insert.encode(), [list(column) for column in columns])
        cursor.execute(COUNT_CONVERSION, (self._thread_id,))


def _apply(cursor: _Cursor, statement: str, keys: Iterable[BlobKey]) -> None:
    columns = [list(column) for column in zip(*keys, strict=True)]
    cursor.execute(statement.encode(), columns or [[], [], [], []], prepare=False)
