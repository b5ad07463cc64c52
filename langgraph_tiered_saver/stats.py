"""What a saver counts about itself."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class TieredStats:
    """A look at one process's saver, as `TieredSaver.stats()` gives it. Counters start at 0 when it is made.

    Attributes:
        backlog_records: Records this process has acknowledged that PostgreSQL does not have yet.
        backlog_bytes: Their size in bytes.
        memory_bytes: How many of these bytes this process keeps; the rest is re-read from the journal.
        flush_lag_seconds: Age of the oldest such record in seconds; 0 if there is none.
        hot_hits: Reads of a latest checkpoint, or of its delta channels' history, that the hot tier answered.
        hot_misses: The same, that it could not answer.
        cold_reads: Reads answered by the cold tier, misses among them.
        checkpoints: Checkpoints acknowledged.
        writes: `put_writes` calls acknowledged.
        flushed_records: Records of any process that this one wrote to PostgreSQL.
        flushed_bytes: Their size in bytes.
        flush_batches: Transactions these took.
        adopted_records: Flushed records that another process had acknowledged.
        lost_records: Records that neither the journal nor this process's memory nor PostgreSQL has.
        flush_errors: Flushes that failed and were tried again.
        hot_errors: Calls that Redis did not answer or refused.
        cold_errors: Reads that PostgreSQL did not answer or refused.
        quarantined_threads: Threads set aside because PostgreSQL refused a record for good.
        flusher_healthy: Whether the flusher's last round succeeded; if not, it tries again by itself.
        hot_trusted: Whether Redis is in use; if not, this process goes past it.
        cold_available: Whether PostgreSQL answered last.
        direct_writes: Writes that went past Redis, straight to PostgreSQL.
        direct_reads: Reads of a latest checkpoint that went past Redis.
        not_durable: Calls that should have returned only once PostgreSQL had them, and did not because it was away.
        hot_ack_shortfalls: Writes that fewer replicas than `hot_ack` had in time.
        generation: The hot tier's generation; 0 while Redis is not trusted.
    """

    backlog_records: int = 0
    backlog_bytes: int = 0
    memory_bytes: int = 0
    flush_lag_seconds: float = 0.0
    hot_hits: int = 0
    hot_misses: int = 0
    cold_reads: int = 0
    checkpoints: int = 0
    writes: int = 0
    flushed_records: int = 0
    flushed_bytes: int = 0
    flush_batches: int = 0
    adopted_records: int = 0
    lost_records: int = 0
    flush_errors: int = 0
    hot_errors: int = 0
    cold_errors: int = 0
    quarantined_threads: tuple[str, ...] = ()
    flusher_healthy: bool = True
    hot_trusted: bool = False
    cold_available: bool = True
    direct_writes: int = 0
    direct_reads: int = 0
    not_durable: int = 0
    hot_ack_shortfalls: int = 0
    generation: int = 0


class Counters:
    """Counters that any thread may raise."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, int] = {}

    def add(self, name: str, by: int = 1) -> None:
        """Raise the counter of a `TieredStats` field."""
        with self._lock:
            self._values[name] = self._values.get(name, 0) + by

    def values(self) -> dict[str, int]:
        """Give all counters that were raised."""
        with self._lock:
            return dict(self._values)
