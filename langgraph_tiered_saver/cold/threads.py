"""Listing threads without loading any state."""

from __future__ import annotations

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


def _time(text: str | None) -> datetime | None:
    try:
        # Python 3.10 does not read the "Z" that other languages write.
        return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else None
    except ValueError:
        return None
