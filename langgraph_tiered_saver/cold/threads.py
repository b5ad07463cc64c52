"""Listing threads without loading any state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from langgraph_tiered_saver.cold.pool import Connection

LIST_THREADS = """
WITH latest AS (
    SELECT thread_id, coalesce(max(checkpoint_id) FILTER (WHERE checkpoint_ns = ''), max(checkpoint_id)) AS id
    FROM checkpoints GROUP BY thread_id
)
SELECT latest.thread_id, latest.id, c.ts, coalesce(t.watermark, 0) AS watermark
FROM (
    SELECT * FROM latest
    WHERE %(id)s::text IS NULL OR (id, thread_id) < (%(id)s, %(thread_id)s)
    ORDER BY id DESC, thread_id DESC LIMIT %(limit)s
) AS latest
CROSS JOIN LATERAL (
    SELECT checkpoint ->> 'ts' AS ts FROM checkpoints
    WHERE thread_id = latest.thread_id AND checkpoint_id = latest.id LIMIT 1
) AS c
LEFT JOIN tiered_threads t ON t.thread_id = latest.thread_id
ORDER BY latest.id DESC, latest.thread_id DESC"""


@dataclass(frozen=True)
class ThreadSummary:
    """A thread, as `TieredSaver.thread_ids` lists it.

    Attributes:
        thread_id: The thread.
        checkpoint_id: Its latest checkpoint (of the root namespace, if it has one).
        time: When that was made, as the checkpoint says; None if it says nothing readable.
        watermark: Sequence number up to which the thread is durable in PostgreSQL, in microseconds since 1970 by
            the hot tier's clock; 0 for a thread that only PostgresSaver wrote.
    """

    thread_id: str
    checkpoint_id: str
    time: datetime | None
    watermark: int

    @property
    def durable_until(self) -> datetime | None:
        """The watermark as a time; None for a thread that only PostgresSaver wrote."""
        return datetime.fromtimestamp(self.watermark / 1e6, timezone.utc) if self.watermark else None


def list_threads(connection: Connection, limit: int | None, before: ThreadSummary | None) -> list[ThreadSummary]:
    """List threads, the one with the newest checkpoint first.

    Args:
        connection: A connection to the cold tier.
        limit: At most so many; None for all.
        before: Go on after this one, the last of the previous page.
    """
    parameters = {
        "id": before.checkpoint_id if before else None,
        "thread_id": before.thread_id if before else None,
        "limit": limit,
    }
    return [
        ThreadSummary(row["thread_id"], row["id"], _time(row["ts"]), row["watermark"])
        for row in connection.execute(LIST_THREADS, parameters)
    ]


IS_EMPTY = """
SELECT NOT EXISTS (SELECT FROM checkpoints) AND NOT EXISTS (SELECT FROM checkpoint_writes) AS is_empty"""

LIST_NAMESPACES = """
SELECT thread_id, checkpoint_ns FROM checkpoints UNION SELECT thread_id, checkpoint_ns FROM checkpoint_writes"""

_PAGE = 10_000


def is_empty(connection: Connection) -> bool:
    """Tell whether there is no thread at all."""
    row = connection.execute(IS_EMPTY).fetchone()
    return bool(row and row["is_empty"])


def seen_bits(
    connection: Connection, shard_of: Callable[[str], int], bit_of: Callable[[str, str], int]
) -> dict[int, bytearray]:
    """Collect the bits of all threads and namespaces, by shard, as Redis numbers bits; reads every key once."""
    bits: dict[int, bytearray] = {}
    with connection.transaction(), connection.cursor(name="tiered_namespaces") as cursor:
        cursor.itersize = _PAGE
        cursor.execute(LIST_NAMESPACES)
        for row in cursor:
            shard, bit = shard_of(row["thread_id"]), bit_of(row["thread_id"], row["checkpoint_ns"])
            found = bits.setdefault(shard, bytearray())
            if len(found) <= bit // 8:
                found.extend(bytes(bit // 8 + 1 - len(found)))
            found[bit // 8] |= 0x80 >> bit % 8
    return bits


def quarantined(connection: Connection, names: Sequence[str]) -> set[str]:
    """Tell which of some threads are under quarantine."""
    rows = connection.execute(
        "SELECT thread_id FROM tiered_threads WHERE thread_id = ANY(%s) AND quarantined", (list(names),)
    )
    return {row["thread_id"] for row in rows}


def _time(text: str | None) -> datetime | None:
    try:
        # Python 3.10 does not read the "Z" that other languages write.
        return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else None
    except ValueError:
        return None
