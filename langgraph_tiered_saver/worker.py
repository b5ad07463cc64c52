"""`langgraph-tiered worker`: the flusher's sweep as a process of its own, and the retention policy.

It makes durable what writers left behind, so that no other process of an application has to, and removes what the
policy says from the cold tier.
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import redis

from langgraph_tiered_saver.backlog import Ticket
from langgraph_tiered_saver.errors import FlushTimeoutError, ThreadQuarantinedError, TieredSaverError
from langgraph_tiered_saver.hot import tier
from langgraph_tiered_saver.retention_policy import PassResult, Retention, make_pass
from langgraph_tiered_saver.runtime import Runtime
from langgraph_tiered_saver.saver import TieredSaver

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

_TICK = 0.5  # seconds between two looks at the counters, which cost nothing


@dataclass(frozen=True)
class Status:
    """What a worker has done, and what is left.

    Attributes:
        seconds: How long it has run.
        adopted_records: Records of other processes that it brought to PostgreSQL.
        unflushed_threads: Threads of any process with records that PostgreSQL does not have; None if Redis is away.
        quarantined_threads: Threads of which PostgreSQL refused a record for good.
        flush_errors: Flushes that failed and were tried again.
        healthy: Whether the last round succeeded.
        removed_checkpoints: Checkpoints that the retention policy removed.
        deleted_threads: Threads that it removed whole.
    """

    seconds: float
    adopted_records: int
    unflushed_threads: int | None
    quarantined_threads: tuple[str, ...]
    flush_errors: int
    healthy: bool
    removed_checkpoints: int = 0
    deleted_threads: int = 0

    def as_json(self) -> dict[str, Any]:
        """Give everything as JSON can hold it."""
        return {**asdict(self), "seconds": round(self.seconds, 3)}

    def __str__(self) -> str:
        waiting = "?" if self.unflushed_threads is None else self.unflushed_threads
        parts = [f"{self.adopted_records} records adopted, {waiting} threads with unflushed records"]
        if self.quarantined_threads:
            parts.append(f"{len(self.quarantined_threads)} quarantined")
        if self.flush_errors:
            parts.append(f"flush errors: {self.flush_errors}")
        if self.removed_checkpoints:
            parts.append(f"{self.removed_checkpoints} old checkpoints removed")
        if self.deleted_threads:
            parts.append(f"{self.deleted_threads} idle threads deleted")
        return ", ".join(parts) + ("" if self.healthy else "; a tier is away")


class StopSignal:
    """Waits for SIGTERM or SIGINT, in the main thread."""

    def __init__(self) -> None:
        self.name = ""
        self._usual: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        # A pipe, because a handler that takes the lock of an Event can meet its own thread holding it.
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._usual[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)
        os.close(self._reader)
        os.close(self._writer)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.name:
            self.name = signal.Signals(number).name
            os.write(self._writer, b"!")

    def wait(self, seconds: float) -> bool:
        """Wait at most so many seconds, and tell whether a signal came, now or earlier."""
        return bool(select.select([self._reader], [], [], seconds)[0])


def adopt_all(saver: TieredSaver, progress: Callable[[int, int], None]) -> Status:
    """Bring everything that is unflushed now to PostgreSQL, whoever wrote it and however young it is.

    Args:
        saver: A saver that does not sweep by itself (`sweep_interval=0`).
        progress: Is told how many threads are done, and of how many, several times a second.

    Returns:
        What was done. Threads that PostgreSQL refused for good are named in it.

    Raises:
        FlushTimeoutError: not everything was in PostgreSQL after `flush_timeout` seconds.
        TierUnavailableError, HotTierRejectedError, ColdTierRejectedError: a tier could not be used.
    """
    began = time.monotonic()
    runtime = _open(saver)
    tickets = runtime.backlog.settle(tier.dirty_threads(runtime.client, runtime.calls.keyspace, None))
    deadline = began + saver.config.flush_timeout
    waiting: Sequence[Ticket] = tickets
    while waiting and (left := deadline - time.monotonic()) > 0:
        _, pending = concurrent.futures.wait(waiting, min(_TICK, left))
        waiting = list(pending)
        progress(len(tickets) - len(waiting), len(tickets))
    for ticket in tickets:
        error = ticket.exception() if ticket.done() else None
        if error is not None and not isinstance(error, ThreadQuarantinedError):
            raise error
    if waiting:
        raise FlushTimeoutError(
            f"{len(waiting)} of {len(tickets)} threads were not in PostgreSQL after {saver.config.flush_timeout:g} s. "
            "Their records are safe in the journal; run the worker again, or give it a longer --timeout.",
            records=runtime.backlog.records,
        )
    return status(saver, began)


def serve(saver: TieredSaver, stop: StopSignal, status_interval: float, report: Callable[[Status], None]) -> Status:
    """Adopt orphans and apply the retention policy until a signal comes, then drain and close the saver.

    Args:
        saver: A saver that sweeps by itself; its own flusher does the work.
        stop: What ends it.
        status_interval: Seconds between two reports.
        report: Is told how it stands.

    Raises:
        TieredSaverError: a tier could not be used at the start. Later the flusher tries again by itself.
    """
    began = time.monotonic()
    retention = Retention(_open(saver))
    logger.info(
        "Worker started for key prefix %r: looks every %g s for records older than %g s; %s",
        saver.config.key_prefix,
        saver.config.sweep_interval,
        saver.config.orphan_grace,
        status(saver, began),
    )
    retention.start()
    adopted = told = 0
    next_report = began + status_interval
    while not stop.wait(_TICK):
        before, adopted = adopted, saver.stats().adopted_records
        if adopted > told and adopted == before:
            logger.info("Adopted %d records, which are in PostgreSQL now", adopted - told)
            told = adopted
        if time.monotonic() >= next_report:
            next_report = time.monotonic() + status_interval
            report(status(saver, began, retention))
    logger.info("%s: draining", stop.name)
    retention.stop()
    final = status(saver, began, retention)
    saver.close()
    logger.info("Worker stopped after %.0f s: %s", time.monotonic() - began, final)
    return final


def retain_all(saver: TieredSaver, progress: Callable[[PassResult], None], *, dry_run: bool) -> PassResult | None:
    """Apply the retention policy to all threads once.

    Args:
        saver: A saver.
        progress: Is told how it stands.
        dry_run: Count only.

    Returns:
        What was removed; None if another process is at it.

    Raises:
        TieredSaverError: a tier could not be used; another call goes on from there.
    """
    return make_pass(_open(saver), dry_run=dry_run, progress=progress)


def status(saver: TieredSaver, began: float, retention: Retention | None = None) -> Status:
    """Tell how it stands; one round trip.

    Args:
        saver: An open saver.
        began: When the worker began, by the monotonic clock.
        retention: What applies the retention policy.
    """
    runtime = _open(saver)
    stats = saver.stats()
    waiting: int | None
    try:
        waiting = _unflushed_threads(runtime)
    except TieredSaverError:  # the flusher logs that Redis is away, and when it is back
        waiting = None
    return Status(
        time.monotonic() - began,
        stats.adopted_records,
        waiting,
        stats.quarantined_threads,
        stats.flush_errors,
        stats.flusher_healthy,
        retention.removed_checkpoints if retention else 0,
        retention.deleted_threads if retention else 0,
    )


def _open(saver: TieredSaver) -> Runtime:
    runtime = saver._source.current()  # noqa: SLF001 - no public call adopts what others wrote
    if not runtime.ready:
        runtime.open()
    return runtime


def _unflushed_threads(runtime: Runtime) -> int:
    try:
        pipeline = runtime.client.pipeline(transaction=False)
        for shard in range(runtime.calls.keyspace.shards):
            pipeline.zcard(runtime.calls.keyspace.dirty(shard))
        return sum(pipeline.execute())
    except (redis.RedisError, OSError) as error:
        raise tier.translate(error) from error
