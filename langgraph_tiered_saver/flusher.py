"""The flusher: moves records from the journal to PostgreSQL, then trims the journal.

One background thread for each saver. It flushes what this process acknowledged from the bytes in memory, adopts what
others left behind, and sets aside the threads whose records PostgreSQL refuses for good.
"""

from __future__ import annotations

import logging
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import Any, TypeVar

import psycopg

from langgraph_tiered_saver import crash_points
from langgraph_tiered_saver.backlog import Backlog, Plan
from langgraph_tiered_saver.cold import maintenance, writer
from langgraph_tiered_saver.cold.generations import Generation
from langgraph_tiered_saver.cold.materialize import Weigher
from langgraph_tiered_saver.cold.pool import ColdPool, Connection, is_missing_schema, is_passing, is_poison
from langgraph_tiered_saver.cold.quarantine import reason_of
from langgraph_tiered_saver.cold.writer import Journaled, ThreadRecords, Written
from langgraph_tiered_saver.config import TieredConfig
from langgraph_tiered_saver.deltas import BrokenDeltaError
from langgraph_tiered_saver.errors import (
    ColdTierUnavailableError,
    HotTierUnavailableError,
    SaverClosedError,
    ThreadQuarantinedError,
    TieredSaverError,
)
from langgraph_tiered_saver.health import Health
from langgraph_tiered_saver.hot import tier
from langgraph_tiered_saver.hot.clients import SyncRedis
from langgraph_tiered_saver.recent import RecentValues
from langgraph_tiered_saver.records import MaintenanceRecord, decode
from langgraph_tiered_saver.stats import Counters

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BACKOFF_FIRST = 0.1
_BACKOFF_LAST = 5.0
_REST = 4  # how much longer than the last flush the flusher rests while records keep coming
_LONGEST_LINGER = 0.1  # seconds
_QUIET = 0.25  # seconds without a flush after which the next one is soon
_WITHOUT_JOURNAL = 0.1  # seconds between two looks at a backlog that cannot be flushed from memory
_SWEEP_THREADS = 256  # most orphans taken from one shard at once
_MAINTENANCE_STATEMENTS = 10  # how many times the time-out of a statement a delete or prune may take in all
_LEAST_READ = 64 * 1024  # bytes read from each of many journals at once
_UNREADABLE = "unreadable"
# Transactions in a row for one thread's records, whose deltas may come to much more than they are; then others' turn.
_MOST_RUNS = 16
# What is wrong with a record rather than with a server.
_REFUSALS = (psycopg.Error, UnicodeError, BrokenDeltaError)


@dataclass
class _Work:
    """Records of one thread that are ready to be written.

    Attributes:
        plan: What they were planned as.
        records: `(sequence number, payload)`, oldest first.
        more: The journal holds more than was read.
        missing: Own records that are neither in memory nor in the journal.
        lost: Those of them that PostgreSQL does not have either.
        own: The generations of this process's own records among them.
    """

    plan: Plan
    records: list[tuple[int, bytes]]
    more: bool = False
    missing: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    own: set[int] = field(default_factory=set)


class _OutdatedPlanError(Exception):
    """The generation in which something was planned is not trusted any more; its errors say nothing of the next one."""


# Consecutive records of one thread that go into one transaction.
_Run = tuple[_Work, list[Journaled]]


@dataclass
class _Round:
    """What goes into one transaction, beside maintenance records, which are transactions of their own.

    Attributes:
        runs: At most one of each thread.
        bytes: What PostgreSQL has to take.
    """

    runs: list[_Run] = field(default_factory=list)
    bytes: int = 0


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
        health: Health,
        repair_schema: Callable[[], None],
    ) -> None:
        self._backlog = backlog
        self._client = client
        self._calls = calls
        self._pool = pool
        self._config = config
        self._counters = counters
        self._health = health
        self._repair_schema = repair_schema
        self._recent = RecentValues(config.delta_memory_bytes)
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._stopping = threading.Event()
        self._draining = False
        self._next_sweep = 0.0
        self._has_swept = False
        self._took = 0.0
        self._ended = float("-inf")
        self._backoff = 0.0
        self._failing_since: float | None = None
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
            except HotTierUnavailableError as error:
                self._health.lose(error)
                self._backlog.fail_settling(error)
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
                self._backlog.linger(self._linger())
        if self._stopping.is_set():
            return
        if self._until_sweep() == 0 and self._backlog.uses_journal:
            self.sweep()
        plans = self._backlog.plan()
        if plans:
            began = time.monotonic()
            try:
                self.flush(plans)
            except _OutdatedPlanError:
                self._backlog.settle_again()
                return
            self._ended = time.monotonic()
            self._took = self._ended - began
        elif not self._backlog.uses_journal:
            # What is left lies in the journal alone; whoever trusts Redis again ends this wait.
            self._backlog.wait(_WITHOUT_JOURNAL, for_work=False)
        self._recovered()

    def _linger(self) -> float:
        """Give the seconds to wait for company.

        A transaction costs much the same for one record as for fifty, and takes the interpreter away from the graphs;
        so under load, a fifth of the time is spent on flushing, and four fifths on waiting for the next batch.
        """
        linger = self._config.flush_linger
        if time.monotonic() - self._ended > _QUIET:
            return linger
        return max(linger, min(_LONGEST_LINGER, _REST * self._took))

    def _fail(self, error: TieredSaverError) -> None:
        self._counters.add("flush_errors")
        if self.healthy:
            self.healthy = False
            logger.warning("Flushing has stopped and will be tried again: %s", error)
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        if self._pool.broken is not None or now - self._failing_since > self._config.postgres_timeout:
            self._backlog.fail_settling(error)
        else:
            # A server that restarts is back in a moment, and those who wait would rather do so.
            self._backlog.settle_again()
        self._backoff = min(_BACKOFF_LAST, max(_BACKOFF_FIRST, self._backoff * 2))

    def _recovered(self) -> None:
        self._backoff = 0.0
        self._failing_since = None
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
            crash_points.reach("in_adoption")
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
            _OutdatedPlanError: some of it must be planned anew.
            TieredSaverError: a tier could not be used.
        """
        # What is in memory goes first: it needs Redis only to be acknowledged.
        for group in ([p for p in plans if not p.read_journal], [p for p in plans if p.read_journal]):
            for batch in self._batches(self._collect(group)):
                self._write(batch)

    def _collect(self, plans: Sequence[Plan]) -> list[_Work]:
        """Bring each plan's records together: from memory, or the journal merged with memory."""
        replies = iter(self._journals([plan for plan in plans if plan.read_journal]))
        works = []
        for plan in plans:
            if not plan.read_journal:
                kept = [(e.sequence, e.payload) for e in plan.entries if e.payload is not None]
                works.append(_Work(plan, kept, own={entry.generation for entry in plan.entries}))
                continue
            reply = next(replies)
            journal: dict[int, bytes] = {}
            for i in range(1, len(reply), 2):
                # An entry that somebody added by hand may have the number of the one before it, which stays.
                journal.setdefault(int(reply[i]), reply[i + 1])
            more = int(reply[0]) > len(reply) // 2
            last_read = max(journal, default=0)
            missing = []
            # What is in memory and not in the journal was flushed by others, or Redis lost it: write it again.
            for entry in plan.entries:
                if entry.sequence not in journal and not (more and entry.sequence > last_read):
                    if entry.payload is None:
                        missing.append(entry.sequence)
                    else:
                        journal[entry.sequence] = entry.payload
            # Before anything later is written, which would raise the watermark.
            lost = self._beyond_watermark(plan.thread_id, missing) if missing else []
            # The journal may be gone before they are written, and with it what others could have adopted in time.
            own = {entry.generation for entry in plan.entries if entry.sequence in journal}
            works.append(_Work(plan, sorted(journal.items()), more, missing, lost, own))
        return works

    def _journals(self, plans: Sequence[Plan]) -> list[Any]:
        """Read the journals of some threads.

        Raises:
            _OutdatedPlanError: they must be planned anew.
            TieredSaverError: Redis could not be used.
        """
        most_records = self._config.flush_max_records
        most_bytes = max(_LEAST_READ, self._config.flush_max_bytes // max(1, len(plans)))
        # What a journal does not hold is taken for flushed, by whoever waits for it and by the order of what is flushed
        # now. So it must be the journal of the generation in which that was asked for; a Redis that was emptied in the
        # meantime has none.
        calls = [self._calls.journal(plan.thread_id, most_records, most_bytes, plan.generation) for plan in plans]
        try:
            return tier.run_many(self._client, calls) if calls else []
        except HotTierUnavailableError as error:
            if any(plan.generation != self._backlog.generation for plan in plans):
                raise _OutdatedPlanError from error
            raise

    def _batches(self, works: Sequence[_Work]) -> list[list[_Run]]:
        """Decode, and cut into transactions: bounded in what PostgreSQL has to take, a maintenance record by itself."""
        rounds: list[_Round] = []
        for work in works:
            run: list[Journaled] = []
            depth = runs = size = 0
            weigher = Weigher(self._config.storage)
            for number, (sequence, payload) in enumerate(work.records):
                try:
                    generation, record = decode(payload)
                except ValueError as error:
                    # An operation that writes nothing stands for it, and is refused when its turn comes. Its generation
                    # is taken for the newest, so that no tombstone makes it vanish.
                    generation, record = sys.maxsize, MaintenanceRecord(_UNREADABLE, {"reason": reason_of(error)})
                item = Journaled(sequence, generation, record, payload)
                maintains = isinstance(record, MaintenanceRecord)
                weight = 0 if maintains else weigher.weigh(record, payload)
                if run and (maintains or size + weight > self._config.flush_max_bytes):
                    depth = self._place(rounds, depth, work, run, size)
                    run, size, runs = [], 0, runs + 1
                    if runs == _MOST_RUNS:
                        _leave(work, number)
                        break
                    weigher = Weigher(self._config.storage)
                    weight = 0 if maintains else weigher.weigh(record, payload)
                if maintains:
                    depth = self._place(rounds, depth, work, [item], 0)
                else:
                    run.append(item)
                    size += weight
            if run or not work.records:
                self._place(rounds, depth, work, run, size)
        return [one.runs for one in rounds]

    def _place(self, rounds: list[_Round], depth: int, work: _Work, run: list[Journaled], size: int) -> int:
        """Put a run into the first transaction, from a depth on, that has room; give the depth behind it."""
        while depth < len(rounds) and rounds[depth].bytes + size > self._config.flush_max_bytes:
            depth += 1
        if depth == len(rounds):
            rounds.append(_Round())
        rounds[depth].runs.append((work, run))
        rounds[depth].bytes += size
        return depth + 1

    def _write(self, batch: Sequence[_Run]) -> None:
        maintaining = [(work, run) for work, run in batch if run and isinstance(run[0].record, MaintenanceRecord)]
        rows = [(work, run) for work, run in batch if run and not isinstance(run[0].record, MaintenanceRecord)]
        self._done([(work, run, None) for work, run in batch if not run])
        if rows:
            self._write_rows(rows)
        for work, run in maintaining:
            self._maintain(work, run[0])

    def _write_rows(self, batch: Sequence[_Run]) -> None:
        """Write a batch; if a record of it is refused for good, write the threads one by one."""
        try:
            written = self._write_entries([self._entry(work, run) for work, run in batch])
        except _REFUSALS as error:
            self._raise_if_passing(error)
            if len(batch) > 1:
                for one in batch:
                    self._write_rows([one])
                return
            self._write_until_refused(*batch[0], error)
            return
        crash_points.reach("after_commit")
        late = self._notice(batch, written.generation)
        self._done([(w, run, _refusal(w) if w.plan.thread_id in written.diverted else None) for w, run in batch])
        if late:
            self._health.came_late()

    def _write_entries(self, entries: Sequence[ThreadRecords]) -> Written:
        written = self._transaction(
            lambda c: writer.write(
                c,
                entries,
                statement_timeout=self._config.postgres_statement_timeout,
                storage=self._config.storage,
                recent=self._recent,
            )
        )
        if written.lost:
            self._counters.add("lost_records", written.lost)
        return written

    def _write_until_refused(self, work: _Work, run: list[Journaled], error: Exception) -> None:
        """Write a thread's records one by one up to the one that is refused; set that and the later ones aside."""
        at = 0
        diverted = late = False
        if len(run) > 1:
            for at, item in enumerate(run):  # noqa: B007 - where it ends is what is wanted
                try:
                    written = self._write_entries([self._entry(work, [item])])
                    diverted = diverted or bool(written.diverted)
                    late = self._notice([(work, [item])], written.generation) or late
                except _REFUSALS as refused:
                    self._raise_if_passing(refused)
                    error = refused
                    break
            else:
                # Somebody else has set the thread aside meanwhile, or PostgreSQL has changed its mind.
                self._done([(work, run, _refusal(work) if diverted else None)])
                if late:
                    self._health.came_late()
                return
        waits = self._set_aside(work, run[at:], reason_of(error))
        self._done([(work, run, _refusal(work) if waits else None)])
        if late:
            self._health.came_late()

    def _maintain(self, work: _Work, item: Journaled) -> None:
        thread_id, record = work.plan.thread_id, item.record
        assert isinstance(record, MaintenanceRecord)  # noqa: S101 - sorted out by the caller
        if record.operation == _UNREADABLE:
            waits = self._set_aside(work, [item], record.arguments["reason"])
            self._done([(work, [item], _refusal(work) if waits else None)])
            return
        waits = False
        try:
            crash_points.reach("before_delete")
            # An earlier record of the thread may wait in quarantine, and this one then waits behind it; unless the
            # quarantine ends between these two transactions.
            while self._execute(thread_id, item, record) and not (waits := self._set_aside(work, [item], None)):
                pass
            crash_points.reach("after_delete")
            self._recent.drop_thread(thread_id)
        except (psycopg.Error, ValueError, LookupError, TypeError) as error:
            # An operation, or arguments, that this version does not know would otherwise be tried for ever.
            self._raise_if_passing(error)
            waits = self._set_aside(work, [item], reason_of(error))
        self._done([(work, [item], _refusal(work) if waits else None)])

    def _execute(self, thread_id: str, item: Journaled, record: MaintenanceRecord) -> bool:
        return self._transaction(
            lambda c: maintenance.execute(
                c,
                thread_id,
                item.sequence,
                item.generation,
                record,
                shard_of=self._calls.keyspace.shard_of,
                statement_timeout=self._config.postgres_statement_timeout,
            ),
            statements=_MAINTENANCE_STATEMENTS,
        )

    def _raise_if_passing(self, error: Exception) -> None:
        """Raise an error again that is not the record's fault."""
        if isinstance(error, psycopg.Error) and not is_poison(error):
            raise self._pool.translate(error) from error

    def _entry(self, work: _Work, run: Sequence[Journaled]) -> ThreadRecords:
        shard = self._calls.keyspace.shard_of(work.plan.thread_id)
        return ThreadRecords(work.plan.thread_id, shard, run, unsure=bool(work.lost))

    def _set_aside(self, work: _Work, run: Sequence[Journaled], reason: str | None) -> bool:
        """Bring records to the quarantine table, where every process sees that they wait; tell whether they do."""
        timeout = self._config.postgres_statement_timeout
        entry = self._entry(work, run)
        waits = self._transaction(lambda c: writer.quarantine(c, entry, reason, statement_timeout=timeout))
        if waits and reason is not None:
            logger.error(
                "Thread %.80r is quarantined: record %d cannot be written (%s). Its records are kept; every other "
                "thread goes on. See `langgraph-tiered quarantine`",
                work.plan.thread_id,
                run[0].sequence,
                reason,
            )
        return waits

    def _notice(self, batch: Sequence[_Run], newest: Generation) -> bool:
        """Notice that own records may have come after everybody else had gone on without them.

        Before anybody is told that they are durable: with nothing left to flush, this process would trust Redis in that
        generation.
        """
        if newest.opened and any(old < newest.number for work, _ in batch for old in work.own):
            self._health.missed_by(newest.number)
            return True
        return False

    def _transaction(self, work: Callable[[Connection], T], *, statements: int = 1) -> T:
        """Run a transaction; a broken connection and missing tables are mended once."""
        try:
            try:
                with self._pool.connection(statements=statements) as connection:
                    done = work(connection)
            except psycopg.Error as error:
                if is_missing_schema(error):
                    self._repair_schema()
                elif error.sqlstate is not None or not is_passing(error):
                    raise
                with self._pool.connection(statements=statements) as connection:
                    done = work(connection)
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:
            if is_poison(error):
                raise
            raise self._pool.translate(error) from error
        self._counters.add("flush_batches")
        return done

    def _done(self, written: Sequence[tuple[_Work, list[Journaled], TieredSaverError | None]]) -> None:
        """Acknowledge what PostgreSQL has to the journal and to those who wait.

        Args:
            written: The runs; with each, the error for those who must not rely on it.
        """
        if not written:
            return
        unacknowledged: TieredSaverError | None = None
        if self._backlog.uses_journal:
            # An empty journal is acknowledged too, which tidies the dirty set; what was flushed without a look at the
            # journal is not, because trimming takes everything before it.
            acks = [
                self._calls.ack(work.plan.thread_id, run[-1].sequence if run else 0)
                for work, run, _ in written
                if not work.plan.without_journal
            ]
            try:
                if acks:
                    tier.run_many(self._client, acks)
            except TieredSaverError as error:
                # PostgreSQL has the records, which is what everybody waits for. The journals are trimmed by the next
                # flush of their threads, or by a sweep, which will write the same rows again.
                unacknowledged = error
            crash_points.reach("after_acknowledgement")
        for work, run, refused in written:
            upto = run[-1].sequence if run else 0
            last = not work.records or upto >= work.records[-1][0]
            if last and work.missing:
                self._account_for(work)
                upto = max(upto, *work.missing)
            own = self._backlog.flushed(
                work.plan.thread_id, upto, last=last, more=work.more, refused=refused, alone=work.plan.without_journal
            )
            if run:
                self._counters.add("flushed_records", len(run))
                self._counters.add("flushed_bytes", sum(len(item.payload) for item in run))
                self._counters.add("adopted_records", max(0, len(run) - own))
        if unacknowledged is not None:
            raise unacknowledged

    def _beyond_watermark(self, thread_id: str, sequences: Sequence[int]) -> list[int]:
        """Of records that memory could not keep and the journal does not have, find those that nobody has flushed."""

        def watermark(connection: Connection) -> int:
            statement = "SELECT watermark FROM tiered_threads WHERE thread_id = %s"
            row = connection.execute(statement, (thread_id,)).fetchone()
            return int(row["watermark"]) if row else 0

        durable = self._pool.run(watermark, probing=True)
        return [sequence for sequence in sequences if sequence > durable]

    def _account_for(self, work: _Work) -> None:
        """Count and log what is lost."""
        if work.lost:
            self._counters.add("lost_records", len(work.lost))
            logger.error(
                "Redis lost %d unflushed records of thread %r, and memory was too short to keep them: "
                "raise max_memory_bytes or make Redis durable (appendonly yes)",
                len(work.lost),
                work.plan.thread_id,
            )


def _leave(work: _Work, number: int) -> None:
    """Leave a thread's records from one on to the next flush."""
    first = work.records[number][0]
    del work.records[number:]
    work.more = work.plan.read_journal
    work.missing = [sequence for sequence in work.missing if sequence < first]
    work.lost = [sequence for sequence in work.lost if sequence < first]


def _refusal(work: _Work) -> ThreadQuarantinedError:
    return ThreadQuarantinedError(
        f"Thread {work.plan.thread_id!r:.80} is quarantined because PostgreSQL refused a record of it. Its records are "
        "kept; see `langgraph-tiered quarantine`.",
        thread_id=work.plan.thread_id,
    )
