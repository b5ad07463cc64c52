"""What this process has acknowledged and PostgreSQL does not have yet: bookkeeping without any I/O.

Calls mutate state in memory and return what to do; the flusher does it. Every method may be called from any thread.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right, insort
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from langgraph_tiered_saver.config import TieredConfig
from langgraph_tiered_saver.errors import TieredSaverError

# How many threads' last flushed sequence numbers are remembered after their queue ran empty. Forgetting one costs a
# look at the journal, nothing else.
_REMEMBERED_THREADS = 10_000
# A future that tells that PostgreSQL has something, or why it does not.
Ticket = Future[None]


class Entry(NamedTuple):
    """One acknowledged record.

    Attributes:
        sequence: Its sequence number.
        previous: The previous record's in the journal at that moment; 0 if the journal was empty.
        size: Its bytes.
        payload: The record; None if memory was short, so that it must be read from the journal.
        generation: The generation in which it was acknowledged.
        maintains: It removes or copies rows.
        acknowledged: When, by this process's monotonic clock, in seconds.
    """

    sequence: int
    previous: int
    size: int
    payload: bytes | None
    generation: int
    maintains: bool
    acknowledged: float


def _sequence_of(entry: Entry) -> int:
    return entry.sequence


@dataclass
class _Queue:
    entries: list[Entry] = field(default_factory=list)
    flushed: int = 0
    adopt: bool = False
    tickets: list[tuple[int, Ticket]] = field(default_factory=list)
    soft: list[Ticket] = field(default_factory=list)
    settling: list[Ticket] = field(default_factory=list)
    planned_settling: list[Ticket] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What to flush for one thread.

    Attributes:
        thread_id: The thread.
        entries: This process's records, oldest first.
        read_journal: Somebody else's records may lie between or before them, so the journal must be read.
        without_journal: Such records are not looked at, because Redis is not trusted: others flush what they hold.
        generation: The generation that was trusted when this was planned; None if none was.
    """

    thread_id: str
    entries: Sequence[Entry]
    read_journal: bool
    without_journal: bool = False
    generation: int | None = None


@dataclass(frozen=True)
class BacklogState:
    """A look at the backlog: records, bytes, bytes in memory, age of the oldest record in seconds."""

    records: int
    bytes: int
    memory_bytes: int
    oldest_age: float
    quarantined: tuple[str, ...]


class Backlog:
    """The records of one process that are not durable in PostgreSQL yet."""

    def __init__(self, config: TieredConfig) -> None:
        self._config = config
        self._changed = threading.Condition(threading.Lock())
        self._queues: OrderedDict[str, _Queue] = OrderedDict()
        self._flushed: OrderedDict[str, int] = OrderedDict()
        self._quarantined: dict[str, TieredSaverError] = {}
        self._generation: int | None = None
        self._distrust: TieredSaverError | None = None
        self._uses_journal = False
        self._records = 0
        self._bytes = 0
        self._memory = 0
        self._flusher_waits = False
        self._room_waiters: list[Ticket] = []
        self._waiting = 0  # tickets that are not resolved; while there are any, nobody lingers
        self._hurry = False

    # --- the generation ------------------------------------------------------------------------------------------

    def trust(self, generation: int) -> None:
        """Begin to take over what is acknowledged in a generation, and to use the journal."""
        with self._changed:
            self._generation, self._distrust, self._uses_journal = generation, None, True
            self._changed.notify_all()

    def distrust(self, error: TieredSaverError) -> None:
        """Take over nothing more, and flush from memory alone; whoever waits for a journal is told the error.

        What removes or copies rows is given up: it must not overtake what others hold, and whoever asked for it asks
        again when all have flushed.
        """
        with self._changed:
            self._generation, self._distrust, self._uses_journal = None, error, False
            done: list[Ticket] = []
            for thread_id, queue in list(self._queues.items()):
                given_up = [entry for entry in queue.entries if entry.maintains]
                if given_up:
                    for entry in given_up:
                        self._release(entry)
                    queue.entries = [entry for entry in queue.entries if not entry.maintains]
                    last = queue.entries[-1].sequence if queue.entries else 0
                    done += [ticket for sequence, ticket in queue.tickets if sequence > last]
                    queue.tickets = [waiting for waiting in queue.tickets if waiting[0] <= last]
                    done += self._finish(thread_id, queue)
            self._waiting -= len(done)
            self._hurry = True
            self._changed.notify_all()
        for ticket in done:
            _resolve(ticket, None)
        self.fail_settling(error)

    def use_journal(self) -> None:
        """Read what memory could not keep from a journal that is there again, though its hot state is not trusted."""
        with self._changed:
            self._uses_journal = True
            self._hurry = True
            self._changed.notify_all()

    @property
    def generation(self) -> int | None:
        """The generation in which records are taken over; None while none is trusted."""
        return self._generation

    @property
    def uses_journal(self) -> bool:
        """Whether the journal may be read and trimmed."""
        return self._uses_journal

    def is_drained(self) -> bool:
        """Whether PostgreSQL has everything that this process has acknowledged."""
        return self._records == 0

    # --- writers -------------------------------------------------------------------------------------------------

    def add(
        self,
        thread_id: str,
        sequence: int,
        previous: int,
        payload: bytes,
        *,
        generation: int,
        ticket: Ticket | None = None,
        soft: bool = False,
        maintains: bool = False,
    ) -> bool:
        """Take over an acknowledged record.

        Args:
            thread_id: Its thread.
            sequence: Its sequence number.
            previous: What the script replied with it.
            payload: The record.
            generation: The generation in which the script was called.
            ticket: Resolved when PostgreSQL has the record; the flusher then does not linger.
            soft: The ticket fails with the first flush that does; the record stays.
            maintains: It removes or copies rows, so that it must come after all records before it.

        Returns:
            False if that generation is not trusted any more: the record counts as not acknowledged.
        """
        size = len(payload)
        with self._changed:
            if generation != self._generation:
                return False
            queue = self._queue(thread_id)
            keep = self._memory + size <= self._config.max_memory_bytes
            entry = Entry(sequence, previous, size, payload if keep else None, generation, maintains, time.monotonic())
            if not queue.entries or queue.entries[-1].sequence < sequence:
                queue.entries.append(entry)
            else:
                insort(queue.entries, entry, key=_sequence_of)
            self._records += 1
            self._bytes += size
            self._memory += size if keep else 0
            if ticket is not None:
                queue.tickets.append((sequence, ticket))
                if soft:
                    queue.soft.append(ticket)
                self._waiting += 1
                self._hurry = True
            if self._flusher_waits or ticket is not None:
                self._changed.notify_all()
        return True

    def settle(self, thread_ids: Iterable[str]) -> list[Ticket]:
        """Ask that PostgreSQL gets all records of some threads, whoever wrote them.

        Returns:
            One ticket for each thread, resolved when everything journaled before this call is in PostgreSQL.
        """
        tickets = []
        with self._changed:
            for thread_id in thread_ids:
                ticket: Ticket = Future()
                tickets.append(ticket)
                if self._uses_journal:
                    queue = self._queue(thread_id)
                    queue.adopt = True
                    queue.settling.append(ticket)
                    self._waiting += 1
            self._hurry = True
            self._changed.notify_all()
            distrust = None if self._uses_journal else self._distrust
        if distrust is not None:
            for ticket in tickets:
                _resolve(ticket, distrust)
        return tickets

    def adopt(self, thread_ids: Iterable[str]) -> None:
        """Note that the journals of some threads must be flushed, nobody waiting for it."""
        with self._changed:
            for thread_id in thread_ids:
                self._queue(thread_id).adopt = True
            self._changed.notify_all()

    def holds(self, thread_id: str) -> bool:
        """Whether this process has records of a thread that PostgreSQL does not have."""
        return thread_id in self._queues

    def threads(self) -> list[str]:
        """List the threads that this process has such records of."""
        with self._changed:
            return list(self._queues)

    def has_room(self) -> bool:
        """Whether the backlog is under its bounds."""
        return self._records < self._config.max_backlog_records and self._bytes < self._config.max_backlog_bytes

    def room(self) -> Ticket:
        """Give a ticket that is resolved when the backlog is under its bounds."""
        ticket: Ticket = Future()
        with self._changed:
            if self.has_room():
                ticket.set_result(None)
            else:
                self._room_waiters.append(ticket)
                self._hurry = True
                self._changed.notify_all()
        return ticket

    def everything(self) -> list[Ticket]:
        """Give tickets for every record that this process has acknowledged so far."""
        tickets = []
        with self._changed:
            for queue in self._queues.values():
                if queue.entries:
                    ticket: Ticket = Future()
                    queue.tickets.append((queue.entries[-1].sequence, ticket))
                    tickets.append(ticket)
            refused = list(self._quarantined.values())
            self._waiting += len(tickets)
            self._hurry = True
            self._changed.notify_all()
        for error in refused:
            failed: Ticket = Future()
            failed.set_exception(error)
            tickets.append(failed)
        return tickets

    # --- the flusher ---------------------------------------------------------------------------------------------

    def wait(self, timeout: float | None, *, for_work: bool = True) -> None:
        """Wait until there is something to flush, or at most `timeout` seconds.

        Args:
            timeout: Seconds; None to wait without end.
            for_work: False ends the wait only by `wake`, or when somebody is in a hurry.
        """
        with self._changed:
            if self._hurry or (for_work and self._queues):
                return
            self._flusher_waits = for_work
            self._changed.wait(timeout)
            self._flusher_waits = False

    def linger(self, seconds: float) -> None:
        """Wait for company, unless somebody waits for the flush or a batch is full already."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while not (
                self._hurry or self._waiting or self._room_waiters or self._records >= self._config.flush_max_records
            ):
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    return

    def wake(self) -> None:
        """End the flusher's wait."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()

    def plan(self) -> list[Plan]:
        """Choose what to flush next: the threads that have waited longest, up to a transaction's bounds."""
        plans: list[Plan] = []
        records = size = 0
        with self._changed:
            self._hurry = False
            uses_journal, generation = self._uses_journal, self._generation
            for thread_id, queue in self._queues.items():
                if records >= self._config.flush_max_records or size >= self._config.flush_max_bytes:
                    break
                chosen, read_journal = self._choose(queue, self._config.flush_max_records - records,
                                                    self._config.flush_max_bytes - size, uses_journal)  # fmt: skip
                if not uses_journal:
                    # What lies in the journal alone waits until Redis is back.
                    if not chosen:
                        continue
                elif queue.adopt or read_journal:
                    # Those who ask from now on need another look at the journal.
                    queue.planned_settling += queue.settling
                    queue.settling = []
                    queue.adopt = False
                    chosen, read_journal = list(queue.entries), True
                plans.append(Plan(thread_id, chosen, read_journal, not uses_journal, generation))
                records += max(1, len(chosen))
                size += sum(entry.size for entry in chosen)
        return plans

    def flushed(
        self,
        thread_id: str,
        up_to: int,
        *,
        last: bool = True,
        more: bool = False,
        refused: TieredSaverError | None = None,
        alone: bool = False,
    ) -> int:
        """Note that PostgreSQL has a thread's records up to a sequence number.

        Args:
            thread_id: The thread.
            up_to: The sequence number.
            last: The thread's plan is done with it.
            more: The journal held more than was read, so it must be read again before anybody is told that the
                thread is settled.
            refused: The thread is under quarantine, and whoever waits is told this.
            alone: Nothing is known of others' records before it.

        Returns:
            How many of them were this process's own.
        """
        done: list[Ticket] = []
        with self._changed:
            if refused is not None:
                self._quarantined[thread_id] = refused
            else:
                self._quarantined.pop(thread_id, None)
            queue = self._queues.get(thread_id)
            if queue is None:
                return 0
            count = bisect_right(queue.entries, up_to, key=_sequence_of)
            for entry in queue.entries[:count]:
                self._release(entry)
            del queue.entries[:count]
            if not alone:
                queue.flushed = max(queue.flushed, up_to)
            done += [ticket for sequence, ticket in queue.tickets if sequence <= up_to]
            queue.tickets = [waiting for waiting in queue.tickets if waiting[0] > up_to]
            if last:
                if more:
                    queue.adopt = True
                    queue.settling = queue.planned_settling + queue.settling
                else:
                    done += queue.planned_settling
                queue.planned_settling = []
                done += self._finish(thread_id, queue)
            self._waiting -= len(done)
            roomy: list[Ticket] = []
            if self._room_waiters and self.has_room():
                roomy, self._room_waiters = self._room_waiters, []
        for ticket in done:
            _resolve(ticket, refused)
        for ticket in roomy:
            _resolve(ticket, None)
        return count

    def failed(self, thread_ids: Iterable[str], error: TieredSaverError) -> None:
        """Tell those who wait for threads to settle that it could not be done now; the records stay."""
        tickets: list[Ticket] = []
        with self._changed:
            for thread_id in thread_ids:
                queue = self._queues.get(thread_id)
                if queue is not None:
                    failing, queue.soft = set(queue.soft), []
                    tickets += [ticket for _, ticket in queue.tickets if ticket in failing]
                    queue.tickets = [waiting for waiting in queue.tickets if waiting[1] not in failing]
                    tickets += queue.planned_settling + queue.settling
                    queue.planned_settling, queue.settling = [], []
                    # What this process does not hold itself is left to the sweep.
                    queue.adopt = False
                    tickets += self._finish(thread_id, queue)
            self._waiting -= len(tickets)
        for ticket in tickets:
            _resolve(ticket, error)

    def settle_again(self) -> None:
        """Look again at the threads whose settling failed; those who wait go on waiting."""
        with self._changed:
            for queue in self._queues.values():
                queue.settling = queue.planned_settling + queue.settling
                queue.planned_settling = []
                queue.adopt = queue.adopt or bool(queue.settling)

    def fail_settling(self, error: TieredSaverError) -> None:
        """Do what `failed` does, for all threads."""
        self.failed(list(self._queues), error)

    def quarantined(self) -> list[str]:
        """List the threads that were under quarantine when this process last flushed records of theirs."""
        with self._changed:
            return list(self._quarantined)

    def release(self, thread_ids: Iterable[str]) -> None:
        """Note that threads are not under quarantine any more."""
        with self._changed:
            for thread_id in thread_ids:
                self._quarantined.pop(thread_id, None)

    def give_up(self, error: TieredSaverError) -> int:
        """Fail everybody who waits, because the flusher stops.

        Returns:
            How many records are left to the journal.
        """
        with self._changed:
            queues, self._queues = list(self._queues.values()), OrderedDict()
            left, self._records, self._bytes, self._memory, self._waiting = self._records, 0, 0, 0, 0
            waiters, self._room_waiters = self._room_waiters, []
        for queue in queues:
            for ticket in [t for _, t in queue.tickets] + queue.planned_settling + queue.settling:
                _resolve(ticket, error)
        for ticket in waiters:
            _resolve(ticket, error)
        return left

    def state(self) -> BacklogState:
        """Look at the backlog."""
        with self._changed:
            now = time.monotonic()
            # Queues are in the order of their first record, but a thread that is written all the time moves on.
            oldest = min((q.entries[0].acknowledged for q in self._queues.values() if q.entries), default=now)
            return BacklogState(self._records, self._bytes, self._memory, now - oldest, tuple(self._quarantined))

    @property
    def records(self) -> int:
        """How many records this process has acknowledged that PostgreSQL does not have."""
        return self._records

    # --- inside the lock -----------------------------------------------------------------------------------------

    def _queue(self, thread_id: str) -> _Queue:
        queue = self._queues.get(thread_id)
        if queue is None:
            queue = self._queues[thread_id] = _Queue(flushed=self._flushed.pop(thread_id, 0))
        return queue

    def _choose(
        self, queue: _Queue, most_records: int, most_bytes: int, uses_journal: bool
    ) -> tuple[list[Entry], bool]:
        """Take the longest run of own records that nobody else's lie between or before.

        Without a journal others flush what they hold, and no record of ours needs another process's (see put.lua).
        """
        chosen: list[Entry] = []
        known, size = queue.flushed, 0
        for entry in queue.entries:
            if chosen and (len(chosen) >= most_records or size >= most_bytes):
                break
            if entry.payload is None or (uses_journal and entry.previous > known):
                return chosen, not chosen
            chosen.append(entry)
            known = entry.sequence
            size += entry.size
        return chosen, False

    def _release(self, entry: Entry) -> None:
        self._records -= 1
        self._bytes -= entry.size
        self._memory -= entry.size if entry.payload is not None else 0

    def _finish(self, thread_id: str, queue: _Queue) -> list[Ticket]:
        """Forget an empty queue; move one with work left behind those that wait longer.

        Returns:
            Tickets of records that a forgotten queue does not hold any more, to be resolved.
        """
        if queue.entries or queue.adopt or queue.settling or queue.planned_settling:
            self._queues.move_to_end(thread_id)
            return []
        self._queues.pop(thread_id, None)
        self._flushed[thread_id] = queue.flushed
        while len(self._flushed) > _REMEMBERED_THREADS:
            self._flushed.popitem(last=False)
        return [ticket for _, ticket in queue.tickets]


def _resolve(ticket: Ticket, error: BaseException | None) -> None:
    """Complete a ticket, unless its waiter has cancelled it meanwhile."""
    if ticket.set_running_or_notify_cancel():
        if error is None:
            ticket.set_result(None)
        else:
            ticket.set_exception(error)
