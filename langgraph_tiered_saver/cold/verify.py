"""Looking for what must not be in the cold tier, some threads at a time, on one snapshot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from psycopg import Cursor
from psycopg.rows import DictRow

from langgraph_tiered_saver.cold import materialize
from langgraph_tiered_saver.cold.pool import Connection

PAGE = 100  # threads looked at together
_ROWS = 1000  # checkpoints read at once
_FEW = 10  # of many faults of one kind, so many are told of each thread

SNAPSHOT = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"

COUNT_THREADS = "SELECT count(*) AS count FROM tiered_threads"

# Each thread costs one descent of an index, however many rows it has.
_NEXT = """
WITH RECURSIVE names AS (
    (SELECT thread_id, 1 AS number FROM {table} WHERE thread_id > %(after)s ORDER BY thread_id LIMIT 1)
    UNION ALL
    SELECT following.thread_id, names.number + 1 FROM names CROSS JOIN LATERAL (
        SELECT thread_id FROM {table} WHERE thread_id > names.thread_id ORDER BY thread_id LIMIT 1
    ) AS following WHERE names.number < %(limit)s
)
SELECT thread_id FROM names"""

NEXT_THREADS = (
    " UNION ".join(f"({_NEXT.format(table=table)})" for table in ("checkpoints", "checkpoint_writes", "tiered_threads"))
    + " ORDER BY thread_id LIMIT %(limit)s"
)

KNOWN_THREADS = """
SELECT name FROM unnest(%s::text[]) AS name
WHERE EXISTS (SELECT FROM checkpoints WHERE thread_id = name)
OR EXISTS (SELECT FROM checkpoint_writes WHERE thread_id = name)
OR EXISTS (SELECT FROM tiered_threads WHERE thread_id = name)"""

READ_THREADS = """
SELECT name AS thread_id, t.watermark, t.tombstone, t.deleted, coalesce(t.quarantined, false) AS quarantined, q.reason,
    q.records, least(c.first, w.first) AS first, greatest(c.last, w.last) AS last,
    EXISTS (SELECT FROM tiered_deltas WHERE thread_id = name) AS has_deltas
FROM unnest(%s::text[]) AS name
LEFT JOIN tiered_threads t ON t.thread_id = name
CROSS JOIN LATERAL (
    SELECT min(tiered_seq) AS first, max(tiered_seq) AS last FROM checkpoints WHERE thread_id = name
) AS c
CROSS JOIN LATERAL (
    SELECT min(tiered_seq) AS first, max(tiered_seq) AS last FROM checkpoint_writes WHERE thread_id = name
) AS w
CROSS JOIN LATERAL (
    SELECT count(*) AS records, (array_agg(reason ORDER BY sequence) FILTER (WHERE reason IS NOT NULL))[1] AS reason
    FROM tiered_quarantine WHERE thread_id = name
) AS q"""

# tiered_blobs is not there for what PostgresSaver wrote, so that nobody knows how many blobs there should be.
READ_CHECKPOINTS = """
SELECT c.thread_id, c.checkpoint_ns, c.checkpoint_id, c.parent_checkpoint_id, c.tiered_blobs, b.blobs,
    c.parent_checkpoint_id IS NULL OR EXISTS (
        SELECT FROM checkpoints p
        WHERE p.thread_id = c.thread_id AND p.checkpoint_ns = c.checkpoint_ns
        AND p.checkpoint_id = c.parent_checkpoint_id
    ) AS has_parent,
    CASE WHEN b.blobs < c.tiered_blobs THEN ARRAY(
        SELECT v.key FROM jsonb_each_text(c.checkpoint -> 'channel_versions') AS v
        WHERE NOT c.checkpoint -> 'channel_values' ? v.key AND NOT EXISTS (
            SELECT FROM checkpoint_blobs x
            WHERE x.thread_id = c.thread_id AND x.checkpoint_ns = c.checkpoint_ns
            AND x.channel = v.key AND x.version = v.value)
        AND NOT EXISTS (
            SELECT FROM tiered_deltas x
            WHERE x.thread_id = c.thread_id AND x.checkpoint_ns = c.checkpoint_ns
            AND x.channel = v.key AND x.version = v.value)
        ORDER BY v.key LIMIT 5
    ) END AS without
FROM (
    SELECT * FROM checkpoints
    WHERE thread_id = ANY(%(names)s)
    AND (thread_id, checkpoint_ns, checkpoint_id) > (%(thread)s, %(ns)s, %(id)s)
    ORDER BY thread_id, checkpoint_ns, checkpoint_id LIMIT %(limit)s
) AS c
CROSS JOIN LATERAL (
    SELECT CASE WHEN c.tiered_blobs IS NOT NULL THEN (
        SELECT count(*) FROM jsonb_each_text(c.checkpoint -> 'channel_versions') AS v
        WHERE EXISTS (
            SELECT FROM checkpoint_blobs x
            WHERE x.thread_id = c.thread_id AND x.checkpoint_ns = c.checkpoint_ns
            AND x.channel = v.key AND x.version = v.value)
        OR EXISTS (
            SELECT FROM tiered_deltas x
            WHERE x.thread_id = c.thread_id AND x.checkpoint_ns = c.checkpoint_ns
            AND x.channel = v.key AND x.version = v.value)
    ) END AS blobs
) AS b
ORDER BY c.thread_id, c.checkpoint_ns, c.checkpoint_id"""

# A version must be stored in one way only: two rows would be read as two values.
READ_STORED_TWICE = """
SELECT d.thread_id, d.checkpoint_ns, d.channel, d.version FROM tiered_deltas d
JOIN checkpoint_blobs b USING (thread_id, checkpoint_ns, channel, version)
WHERE d.thread_id = %(name)s ORDER BY 2, 3, 4 LIMIT %(limit)s"""

READ_STRAY_WRITES = """
SELECT w.thread_id, w.checkpoint_ns, w.checkpoint_id, count(*) AS writes, coalesce(max(w.tiered_seq), 0) AS last,
    NOT EXISTS (
        SELECT FROM checkpoints c
        WHERE c.thread_id = w.thread_id AND c.checkpoint_ns = w.checkpoint_ns AND c.checkpoint_id > w.checkpoint_id
    ) AS is_newest
FROM checkpoint_writes w
WHERE w.thread_id = ANY(%(names)s) AND NOT EXISTS (
    SELECT FROM checkpoints c
    WHERE c.thread_id = w.thread_id AND c.checkpoint_ns = w.checkpoint_ns AND c.checkpoint_id = w.checkpoint_id)
GROUP BY w.thread_id, w.checkpoint_ns, w.checkpoint_id
ORDER BY w.thread_id, w.checkpoint_ns, w.checkpoint_id LIMIT %(limit)s"""

_Cursor = Cursor[DictRow]


@dataclass(frozen=True)
class Incomplete:
    """A checkpoint that references more blobs than there are.

    Attributes:
        checkpoint_ns: Its namespace.
        checkpoint_id: Its id.
        expected: How many blobs it references.
        found: How many of them there are.
        without: Channels that have no value, some of which never had one.
    """

    checkpoint_ns: str
    checkpoint_id: str
    expected: int
    found: int
    without: Sequence[str]


@dataclass(frozen=True)
class Orphan:
    """A checkpoint whose parent is not there."""

    checkpoint_ns: str
    checkpoint_id: str
    parent_id: str


@dataclass(frozen=True)
class StrayWrites:
    """Writes whose checkpoint is not there.

    Attributes:
        checkpoint_ns: The checkpoint's namespace.
        checkpoint_id: Its id.
        writes: How many writes.
        last: The last one's sequence number; 0 if PostgresSaver wrote them.
        is_newest: The namespace has no later checkpoint.
    """

    checkpoint_ns: str
    checkpoint_id: str
    writes: int
    last: int
    is_newest: bool


@dataclass(frozen=True)
class DamagedDelta:
    """A value that is stored as a delta, and cannot be made of it.

    Attributes:
        checkpoint_ns: Its namespace.
        channel: Its channel.
        version: Its version.
        reason: Why.
    """

    checkpoint_ns: str
    channel: str
    version: str
    reason: str


@dataclass
class ColdThread:
    """What the cold tier has of a thread.

    Attributes:
        watermark: Up to where it is said to be durable; 0 if nothing is said.
        tombstone: Sequence number of the last operation that removed or copied rows; 0 if there was none.
        deleted: Sequence number of the last operation that removed the thread whole; 0 if there was none.
        quarantined: Records of it wait in quarantine.
        reason: Why the first of them was refused.
        waiting: How many they are.
        first: The least sequence number of its rows; None without any.
        last: The greatest.
        has_deltas: Some of its values are stored as deltas.
        latest: The latest checkpoint of each namespace.
        incomplete: Some of the checkpoints that miss blobs.
        orphans: Some of the checkpoints that miss their parent.
        strays: Some of the writes that miss their checkpoint.
        damaged: Some of the values that cannot be rebuilt from deltas, once `look_at_deltas` has looked.
        more: How many more there are of the four.
    """

    watermark: int
    tombstone: int
    deleted: int
    quarantined: bool
    reason: str
    waiting: int
    first: int | None
    last: int | None
    has_deltas: bool = False
    latest: dict[str, str] = field(default_factory=dict)
    incomplete: list[Incomplete] = field(default_factory=list)
    orphans: list[Orphan] = field(default_factory=list)
    strays: list[StrayWrites] = field(default_factory=list)
    damaged: list[DamagedDelta] = field(default_factory=list)
    more: int = 0


def count_threads(connection: Connection) -> int:
    """Count the threads that were ever written by this library."""
    row = connection.execute(COUNT_THREADS).fetchone()
    return int(row["count"]) if row else 0


def next_threads(connection: Connection, after: str) -> list[str]:
    """List the next threads, in the order of their names; after the last one, none."""
    rows = connection.execute(NEXT_THREADS.encode(), {"after": after, "limit": PAGE}).fetchall()
    return [row["thread_id"] for row in rows]


def known_threads(connection: Connection, names: Sequence[str]) -> set[str]:
    """Tell which of some threads the cold tier knows."""
    return {row["name"] for row in connection.execute(KNOWN_THREADS, (list(names),))}


def look(connection: Connection, names: Sequence[str]) -> dict[str, ColdThread]:
    """Look at some threads, on one snapshot of them."""
    with connection.transaction(), connection.cursor() as cursor:
        cursor.execute(SNAPSHOT)
        threads = {
            row["thread_id"]: ColdThread(
                row["watermark"] or 0,
                row["tombstone"] or 0,
                row["deleted"] or 0,
                row["quarantined"],
                row["reason"] or "",
                row["records"],
                row["first"],
                row["last"],
                row["has_deltas"],
            )
            for row in cursor.execute(READ_THREADS, (list(names),), prepare=False).fetchall()
        }
        _look_at_checkpoints(cursor, threads)
        _look_at_writes(cursor, threads)
    return threads


def _look_at_checkpoints(cursor: _Cursor, threads: Mapping[str, ColdThread]) -> None:
    at = {"names": list(threads), "thread": "", "ns": "", "id": "", "limit": _ROWS}
    while True:
        rows = cursor.execute(READ_CHECKPOINTS, at, prepare=False).fetchall()
        for row in rows:
            thread, ns, name = threads[row["thread_id"]], row["checkpoint_ns"], row["checkpoint_id"]
            thread.latest[ns] = name
            if row["tiered_blobs"] is not None and row["blobs"] < row["tiered_blobs"]:
                fault = Incomplete(ns, name, row["tiered_blobs"], row["blobs"], tuple(row["without"]))
                _add(thread, thread.incomplete, fault)
            # A parent that was pruned is no fault.
            if not row["has_parent"] and not thread.tombstone:
                _add(thread, thread.orphans, Orphan(ns, name, row["parent_checkpoint_id"]))
        if len(rows) < _ROWS:
            return
        last = rows[-1]
        at |= {"thread": last["thread_id"], "ns": last["checkpoint_ns"], "id": last["checkpoint_id"]}


def _look_at_writes(cursor: _Cursor, threads: Mapping[str, ColdThread]) -> None:
    values = {"names": list(threads), "limit": _ROWS}
    for row in cursor.execute(READ_STRAY_WRITES, values, prepare=False).fetchall():
        thread = threads[row["thread_id"]]
        stray = StrayWrites(row["checkpoint_ns"], row["checkpoint_id"], row["writes"], row["last"], row["is_newest"])
        _add(thread, thread.strays, stray)


def look_at_deltas(connection: Connection, name: str, thread: ColdThread) -> None:
    """Make every value of a thread that is stored as a delta, and note those that are not what was stored.

    Costs as much as the thread's values are long, so it is a call of its own for each thread, on a snapshot of its own.
    """
    thread.damaged.clear()
    with connection.transaction(), connection.cursor() as cursor:
        cursor.execute(SNAPSHOT)
        for row in cursor.execute(READ_STORED_TWICE, {"name": name, "limit": _ROWS}, prepare=False).fetchall():
            reason = "it is stored both whole and as a delta"
            _add(thread, thread.damaged, DamagedDelta(row["checkpoint_ns"], row["channel"], row["version"], reason))
        for stored in materialize.walk(cursor, name):
            reason = stored.reason
            if stored.value is not None and len(stored.value[1]) != stored.size:
                reason = f"it has {len(stored.value[1])} bytes, but its row says {stored.size}"
            if reason:
                place = DamagedDelta(stored.key.checkpoint_ns, stored.key.channel, stored.key.version, reason)
                _add(thread, thread.damaged, place)


def _add(thread: ColdThread, faults: list[Any], fault: object) -> None:
    if len(faults) < _FEW:
        faults.append(fault)
    else:
        thread.more += 1
