"""The flusher: moves records from the journal to PostgreSQL, then trims the journal.

One background thread for each saver. It flushes what this process acknowledged from the bytes in memory, adopts what
others left behind, and sets aside the threads whose records PostgreSQL refuses for good.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field

import psycopg

from langgraph_tiered_saver.backlog import Backlog, Plan
from langgraph_tiered_saver.cold import maintenance
from langgraph_tiered_saver.cold.pool import ColdPool, Connection, is_missing_schema, is_passing, is_poison
from langgraph_tiered_saver.cold.writer import ThreadRecords, write
from langgraph_tiered_saver.config import TieredConfig
from langgraph_tiered_saver.errors import (
    ColdTierUnavailableError,
    SaverClosedError,
    ThreadQuarantinedError,
    TieredSaverError,
)
from langgraph_tiered_saver.hot import tier
from langgraph_tiered_saver.hot.clients import SyncRedis
from langgraph_tiered_saver.records import MaintenanceRecord, Record, decode
from langgraph_tiered_saver.stats import Counters

logger = logging.getLogger(__name__)

_BACKOFF_FIRST = 0.1
_BACKOFF_LAST = 5.0
_SWEEP_THREADS = 256  # most orphans taken from one shard at once
_MAINTENANCE_STATEMENTS = 10  # how many times the time-out of a statement a delete or prune may take in all
_LEAST_READ = 64 * 1024  # bytes read from each of many journals at once


@dataclass
class _Work:
    """Records of one thread that are ready to be written.

    Attributes:
        plan: What they were planned as.
        records: `(sequence number, payload)`, oldest first.
        more: The journal holds more than was read.
        missing: Own records that are neither in memory nor in the journal.
    """

    plan: Plan
    records: list[tuple[int, bytes]]
    more: bool = False
    missing: list[int] = field(default_factory=list)


class Flusher:
    """Flushes, adopts and sweeps, in a thread of its own that starts with the first work."""

    def __init__(
        self,
        backlog: Backlog,
        client: SyncRedis,
        calls: tier.HotCalls,
        pool: ColdPool,
        config: TieredConfig,
        counters: Counters,
        repair_schema: Callable[[], None],
    ) -> None:
        self._backlog = backlog
        self._client = client
        self._calls = calls
        self._pool = pool
        self._config = config
        self._counters = counters
        self._repair_schema = repair_schema
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._stopping = threading.Event()
        self._draining = False
        self._next_sweep = 0.0
        self._has_swept = False
        self._backoff = 0.0
        self.healthy = True

    # --- life cycle ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread, if it does not run yet."""
        if self._thread is None:
            with self._starting:
                if self._thread is None and not self._stopping.is_set():
                    # A daemon: an exit without close() must not hang. What is left is in the journal.
                    thread = threading.Thread(target=self._run, name="langgraph-tiered-flusher", daemon=True)
                    thread.start()
                    self._thread = thread

    def stop(self, timeout: float) -> int:
        """Drain until the deadline, then stop.

        Args:
            timeout: Seconds.

        Returns:
            How many records are left to the journal.
        """
        deadline = time.monotonic() + timeout
        self._draining = True
        for ticket in self._backlog.everything():
            try:
                ticket.result(max(0.0, deadline - time.monotonic()))
            except TieredSaverError:  # a quarantined thread; its records stay in the journal
                continue
            except FutureTimeoutError:
                break
        self._stopping.set()
        self._backlog.wake()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(max(1.0, deadline - time.monotonic()))
        return self._backlog.give_up(
            SaverClosedError("The saver was closed before the flush; what it acknowledged is in the journal.")
        )

    def _run(self) -> None:
        self._next_sweep = time.monotonic() + random.uniform(0, 0.1)  # noqa: S311 - jitter
        while not self._stopping.is_set():
            try:
                self.step()
            except TieredSaverError as error:
                self._fail(error)
            except Exception:
                # A bug must not end the only thread that makes records durable; they stay queued and journaled.
                logger.exception("The flusher met an unexpected error and goes on")
                self._fail(ColdTierUnavailableError("The flusher met an unexpected error; see the log."))

    def step(self) -> None:
        """Wait for work, then do one round of it.

        Raises:
            TieredSaverError: a tier could not be used; everything stays as it was.
        """
        if self._backoff:
            self._backlog.wait(self._backoff * random.uniform(0.5, 1.0), for_work=False)  # noqa: S311 - jitter
        else:
            self._backlog.wait(self._until_sweep())
            if not self._draining:
                self._backlog.linger(self._config.flush_linger)
        if self._stopping.is_set():
            return
        if self._until_sweep() == 0:
            self.sweep()
        plans = self._backlog.plan()
        if plans:
            self.flush(plans)
        self._recovered()

    def _fail(self, error: TieredSaverError) -> None:
        self._counters.add("flush_errors")
        if self.healthy:
            self.healthy = False
            logger.warning("Flushing has stopped and will be tried again: %s", error)
        self._backlog.fail_settling(error)
        self._backoff = min(_BACKOFF_LAST, max(_BACKOFF_FIRST, self._backoff * 2))

    def _recovered(self) -> None:
        self._backoff = 0.0
        if not self.healthy:
            self.healthy = True
            logger.warning("Flushing goes on; %d records are waiting", self._backlog.records)

    # --- adoption ------------------------------------------------------------------------------------------------

    def sweep(self) -> int:
        """Look for orphans, unless another process does so during this interval; always the first time.

        Returns:
            How many threads are to be adopted.
        """
        interval = self._config.sweep_interval
        self._next_sweep = time.monotonic() + interval * random.uniform(0.9, 1.1)  # noqa: S311 - jitter
        # A lease outlives the process that took it, and may be the very one whose orphans wait: the first look of a
        # process, which costs one round trip, is free.
        first, self._has_swept = not self._has_swept, True
        if not tier.acquire_sweep(self._client, self._config) and not first:
            return 0
        return self.adopt_orphans(self._config.orphan_grace)

    def adopt_orphans(self, grace: float) -> int:
        """Queue every thread whose oldest unflushed record is older than `grace` seconds.

        Returns:
            How many they are.
        """
        shards = range(self._calls.keyspace.shards)
        replies = tier.run_many(self._client, [self._calls.sweep(shard, grace, _SWEEP_THREADS) for shard in shards])
        orphans = [name.decode() for names in replies for name in names]
        if orphans:
            logger.info("Adopting the unflushed records of %d threads", len(orphans))
            self._backlog.adopt(orphans)
        return len(orphans)

    def _until_sweep(self) -> float | None:
        if self._config.sweep_interval == 0:
            return None
        return max(0.0, self._next_sweep - time.monotonic())

    # --- flushing ------------------------------------------------------------------------------------------------

    def flush(self, plans: Sequence[Plan]) -> None:
        """Write what was planned, acknowledge it to the journal and to those who wait.

        Raises:
            TieredSaverError: a tier could not be used.
        """
        # What is in memory goes first: it needs Redis only to be acknowledged.
        for group in ([p for p in plans if not p.read_journal], [p for p in plans if p.read_journal]):
            for batch in self._batches(self._collect(group)):
                self._write(batch)

    def _collect(self, plans: Sequence[Plan]) -> list[_Work]:
        """Bring each plan's records together: from memory, or the journal merged with memory."""
        reading = [plan.thread_id for plan in plans if plan.read_journal]
        most_bytes = max(_LEAST_READ, self._config.flush_max_bytes // max(1, len(reading)))
        calls = [self._calls.journal(name, self._config.flush_max_records, most_bytes) for name in reading]
        replies = iter(tier.run_many(self._client, calls) if calls else ())
        works = []
        for plan in plans:
            if not plan.read_journal:
                works.append(_Work(plan, [(e.sequence, e.payload) for e in plan.entries if e.payload is not None]))
                continue
            reply = next(replies)
            journal = {int(reply[i]): reply[i + 1] for i in range(1, len(reply), 2)}
            more = int(reply[0]) > len(journal)
            last_read = max(journal, default=0)
            missing = []
            # What is in memory and not in the journal was flushed by others, or Redis lost it: write it again.
            for entry in plan.entries:
                if entry.sequence not in journal and not (more and entry.sequence > last_read):
                    if entry.payload is None:
                        missing.append(entry.sequence)
                    else:
                        journal[entry.sequence] = entry.payload
            works.append(_Work(plan, sorted(journal.items()), more, missing))
        return works

    def _batches(self, works: Sequence[_Work]) -> list[list[tuple[_Work, list[tuple[int, Record]]]]]:
        """Decode, and cut into transactions: a maintenance record is one of its own.

        A thread whose records cannot be decoded is set aside.
        """
        rounds: list[list[tuple[_Work, list[tuple[int, Record]]]]] = [[]]
        for work in works:
            run: list[tuple[int, Record]] = []
            depth = 0
            for sequence, payload in work.records:
                try:
                    record = decode(payload)
                except ValueError as error:
                    self._quarantine(work.plan.thread_id, sequence, error)
                    break
                if isinstance(record, MaintenanceRecord):
                    if run:
                        depth = self._place(rounds, depth, work, run)
                        run = []
                    depth = self._place(rounds, depth, work, [(sequence, record)])
                else:
                    run.append((sequence, record))
            if run or not work.records:
                self._place(rounds, depth, work, run)
        return [batch for batch in rounds if batch]

    @staticmethod
    def _place(
        rounds: list[list[tuple[_Work, list[tuple[int, Record]]]]],
        depth: int,
        work: _Work,
        run: list[tuple[int, Record]],
    ) -> int:
        while len(rounds) <= depth:
            rounds.append([])
        rounds[depth].append((work, run))
        return depth + 1

    def _write(self, batch: Sequence[tuple[_Work, list[tuple[int, Record]]]]) -> None:
        maintaining = [(work, run) for work, run in batch if run and isinstance(run[0][1], MaintenanceRecord)]
        plain = [(work, run) for work, run in batch if not (run and isinstance(run[0][1], MaintenanceRecord))]
        written = [(work, run) for work, run in plain if not run]
        if rows := [(work, run) for work, run in plain if run]:
            written += self._write_rows(rows)
        for work, run in maintaining:
            if self._maintain(work.plan.thread_id, run[0][0], run[0][1]):
                written.append((work, run))
        self._acknowledge(written)

    def _write_rows(
        self, batch: list[tuple[_Work, list[tuple[int, Record]]]]
    ) -> list[tuple[_Work, list[tuple[int, Record]]]]:
        """Write a batch; if a record of it is refused for good, write the threads one by one.

        Returns:
            What was written.
        """
        shard_of = self._calls.keyspace.shard_of
        entries = [ThreadRecords(w.plan.thread_id, shard_of(w.plan.thread_id), run) for w, run in batch]
        try:
            self._transaction(lambda c: write(c, entries, statement_timeout=self._config.postgres_statement_timeout))
        except psycopg.Error as error:
            if not is_poison(error):
                raise self._pool.translate(error) from error
            if len(batch) > 1:
                return [done for one in batch for done in self._write_rows([one])]
            work, run = batch[0]
            if len(run) > 1:
                return self._write_until_refused(work, run)
            self._quarantine(work.plan.thread_id, run[0][0], error)
            return []
        return batch

    def _write_until_refused(
        self, work: _Work, run: list[tuple[int, Record]]
    ) -> list[tuple[_Work, list[tuple[int, Record]]]]:
        """Write a thread's records one by one up to the one that is refused."""
        for count, item in enumerate(run):
            if not self._write_rows([(work, [item])]):
                return [(work, run[:count])] if count else []
        return [(work, run)]

    def _maintain(self, thread_id: str, sequence: int, record: Record) -> bool:
        assert isinstance(record, MaintenanceRecord)  # noqa: S101 - sorted out by the caller
        try:
            self._transaction(
                lambda c: maintenance.execute(
                    c,
                    thread_id,
                    sequence,
                    record,
                    shard_of=self._calls.keyspace.shard_of,
                    statement_timeout=self._config.postgres_statement_timeout,
                ),
                statements=_MAINTENANCE_STATEMENTS,
            )
        except ValueError as error:
            self._quarantine(thread_id, sequence, error)
            return False
        except psycopg.Error as error:
            if not is_poison(error):
                raise self._pool.translate(error) from error
            self._quarantine(thread_id, sequence, error)
            return False
        return True

    def _transaction(self, work: Callable[[Connection], None], *, statements: int = 1) -> None:
        """Run a transaction; a broken connection and missing tables are mended once."""
        try:
            try:
                with self._pool.connection(statements=statements) as connection:
                    work(connection)
            except psycopg.Error as error:
                if is_missing_schema(error):
                    self._repair_schema()
                elif error.sqlstate is not None or not is_passing(error):
                    raise
                with self._pool.connection(statements=statements) as connection:
                    work(connection)
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:
            if is_poison(error):
                raise
            raise self._pool.translate(error) from error
        self._counters.add("flush_batches")

    def _acknowledge(self, written: Sequence[tuple[_Work, list[tuple[int, Record]]]]) -> None:
        if not written:
            return
        # An empty journal is acknowledged too, which tidies the dirty set.
        acks = [self._calls.ack(work.plan.thread_id, run[-1][0] if run else 0) for work, run in written]
        unacknowledged: TieredSaverError | None = None
        try:
            tier.run_many(self._client, acks)
        except TieredSaverError as error:
            # PostgreSQL has the records, which is what everybody waits for. The journals are trimmed by the next flush
            # of their threads, or by a sweep, which will write the same rows again.
            unacknowledged = error
        for work, run in written:
            upto = run[-1][0] if run else 0
            last = not work.records or upto >= work.records[-1][0]
            if last and work.missing:
                self._account_for(work)
                upto = max(upto, *work.missing)
            own = self._backlog.flushed(work.plan.thread_id, upto, last=last, more=work.more)
            if run:
                sizes = dict(work.records)
                self._counters.add("flushed_records", len(run))
                self._counters.add("flushed_bytes", sum(len(sizes[sequence]) for sequence, _ in run))
                self._counters.add("adopted_records", max(0, len(run) - own))
        if unacknowledged is not None:
            raise unacknowledged

    def _account_for(self, work: _Work) -> None:
        """Records that memory could not keep and the journal does not have: others flushed them, or they are lost."""

        def watermark(connection: Connection) -> int:
            row = connection.execute(
                "SELECT watermark FROM tiered_threads WHERE thread_id = %s", (work.plan.thread_id,)
            ).fetchone()
            return int(row["watermark"]) if row else 0

        durable = self._pool.run(watermark)
        lost = [sequence for sequence in work.missing if sequence > durable]
        if lost:
            self._counters.add("lost_records", len(lost))
            logger.error(
                "Redis lost %d unflushed records of thread %r, and memory was too short to keep them: "
                "raise max_memory_bytes or make Redis durable (appendonly yes)",
                len(lost),
                work.plan.thread_id,
            )

    def _quarantine(self, thread_id: str, sequence: int, error: Exception) -> None:
        reason = self._pool.translate(error) if isinstance(error, psycopg.Error) else error
        logger.error(
            "Thread %.80r is quarantined: record %d cannot be written (%s). Its records stay in the journal; every "
            "other thread goes on",
            thread_id,
            sequence,
            reason,
        )
        self._backlog.quarantine(
            thread_id,
            ThreadQuarantinedError(
                f"Thread {thread_id!r:.80} is quarantined because PostgreSQL refused record {sequence}: {reason} "
                "The thread's records are safe in the journal.",
                thread_id=thread_id,
            ),
        )
