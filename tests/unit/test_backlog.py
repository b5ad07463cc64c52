"""The bookkeeping of records that PostgreSQL does not have yet, and the choice of what to flush next."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from langgraph_tiered_saver import ColdTierUnavailableError, SaverClosedError, TieredConfig, backlog
from langgraph_tiered_saver.backlog import Backlog, Plan

if TYPE_CHECKING:
    from collections.abc import Iterable

# On a busy machine neither a slow example nor slow generation is a failure.
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
LONG = 600.0  # seconds that no test waits
SOON = 5.0  # seconds in which a woken thread has surely gone on
REFUSED = ColdTierUnavailableError("not now")


def make(**settings: object) -> Backlog:
    queue = Backlog(TieredConfig.from_settings(settings))
    queue.trust(1)
    return queue


def add(queue: Backlog, thread_id: str, *sequences: int, previous: int = 0, payload: bytes = b"x") -> None:
    """Add records that follow each other in the journal."""
    for sequence in sequences:
        queue.add(thread_id, sequence, previous, payload, generation=1)
        previous = sequence


def chosen(plan: Plan) -> list[int]:
    return [entry.sequence for entry in plan.entries]


def done(tickets: Iterable[Future[None]]) -> list[bool]:
    return [ticket.done() for ticket in tickets]


# --- the chain rule --------------------------------------------------------------------------------------------------


def test_own_records_in_a_row_are_flushed_from_memory() -> None:
    """I3: a record may go while this process knows every one before it."""
    queue = make()
    add(queue, "t", 1, 2, 5)

    (plan,) = queue.plan()

    assert (plan.thread_id, chosen(plan), plan.read_journal) == ("t", [1, 2, 5], False)


def test_a_record_of_somebody_else_in_front_needs_the_journal() -> None:
    """I3: a record whose predecessor is unknown is not planned without it."""
    queue = make()
    add(queue, "t", 4, previous=3)

    (plan,) = queue.plan()

    assert (chosen(plan), plan.read_journal) == ([4], True)


def test_a_record_of_somebody_else_between_ends_the_run() -> None:
    """I3: what comes before the gap goes first, what comes after it needs the journal."""
    queue = make()
    add(queue, "t", 1, 2)
    add(queue, "t", 4, 5, previous=3)

    (first,) = queue.plan()
    queue.flushed("t", 2)
    (second,) = queue.plan()

    assert (chosen(first), first.read_journal) == ([1, 2], False)
    assert (chosen(second), second.read_journal) == ([4, 5], True)


def test_what_was_flushed_is_known_to_later_records() -> None:
    """I3: a record that follows one that PostgreSQL has needs no look at the journal, even when nothing was left."""
    queue = make()
    add(queue, "t", 1)
    queue.plan()
    queue.flushed("t", 1)

    add(queue, "t", 2, previous=1)

    assert [(chosen(plan), plan.read_journal) for plan in queue.plan()] == [([2], False)]


def test_a_record_that_was_added_late_is_sorted_in() -> None:
    """I3: two threads of a process may hand over their records in another order than Redis took them."""
    queue = make()
    add(queue, "t", 2, previous=1)
    add(queue, "t", 1)

    (plan,) = queue.plan()

    assert (chosen(plan), plan.read_journal) == ([1, 2], False)


def test_records_that_memory_did_not_keep_are_read_from_the_journal() -> None:
    """I8: beyond the bound bytes are dropped, and only the bytes."""
    queue = make(max_memory_bytes=4)
    add(queue, "t", 1, 2, 3, payload=b"xx")

    assert (queue.state().records, queue.state().bytes, queue.state().memory_bytes) == (3, 6, 4)
    (first,) = queue.plan()
    assert (chosen(first), first.read_journal) == ([1, 2], False)
    queue.flushed("t", 2)
    (second,) = queue.plan()
    assert (chosen(second), second.read_journal) == ([3], True)
    assert [entry.payload for entry in second.entries] == [None]
    queue.flushed("t", 3)
    assert (queue.state().records, queue.state().bytes, queue.state().memory_bytes) == (0, 0, 0)


@dataclass
class Journal:
    """What Redis and PostgreSQL hold of one thread."""

    waiting: list[int] = field(default_factory=list)
    durable: set[int] = field(default_factory=set)
    last: int = 0

    def append(self) -> tuple[int, int]:
        """Do what the appending script does."""
        previous = self.waiting[-1] if self.waiting else 0
        self.last += 1
        self.waiting.append(self.last)
        return self.last, previous

    def write(self, sequences: list[int]) -> None:
        """Do what PostgreSQL does, and check that the records arrive in order."""
        for sequence in sequences:
            assert set(range(1, sequence)) <= self.durable, f"{sequence} before one of its predecessors"
            self.durable.add(sequence)

    def trim(self, up_to: int) -> None:
        """Do what the acknowledging script does."""
        self.waiting = [sequence for sequence in self.waiting if sequence > up_to]


class Process:
    """A backlog and a flusher that can stop anywhere between two steps."""

    def __init__(self, journal: Journal, settings: dict[str, int]) -> None:
        self.journal = journal
        self.queue = make(**settings)
        self.unadded: list[tuple[int, int]] = []
        self.read: list[tuple[list[int], int, bool]] = []
        self.written: list[tuple[int, bool]] = []

    def append(self) -> None:
        """Redis takes a record; its reply is still under way."""
        self.unadded.append(self.journal.append())

    def receive(self, which: int) -> None:
        """A reply arrives; they may overtake each other."""
        if self.unadded:
            sequence, previous = self.unadded.pop(which % len(self.unadded))
            self.queue.add("t", sequence, previous, b"xx", generation=1)

    def plan(self, most: int) -> None:
        """Plan, and read the journal if the plan says so."""
        if self.read or self.written:
            return  # one flusher, one round at a time
        for plan in self.queue.plan():
            if plan.read_journal:
                found, more = self.journal.waiting[:most], len(self.journal.waiting) > most
                last = found[-1] if found else 0
                own = [entry for entry in plan.entries if not (more and entry.sequence > last)]
                kept = [entry.sequence for entry in own if entry.payload is not None]
                # What neither memory nor the journal has was flushed by others.
                gone = max((entry.sequence for entry in own if entry.sequence not in found), default=0)
                self.read.append((sorted({*found, *kept}), gone, more))
            else:
                assert plan.entries
                assert all(entry.payload is not None for entry in plan.entries)
                self.read.append((chosen(plan), 0, False))

    def write(self) -> None:
        """Write the round to PostgreSQL."""
        while self.read:
            sequences, gone, more = self.read.pop(0)
            self.journal.write(sequences)
            assert gone <= max(self.journal.durable, default=0)
            self.written.append((max([gone, *sequences]), more))

    def acknowledge(self) -> None:
        """Trim the journal, and tell who waits."""
        while self.written:
            up_to, more = self.written.pop(0)
            self.journal.trim(up_to)
            self.queue.flushed("t", up_to, more=more)


steps = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.sampled_from(["append", "append", "receive", "receive", "plan", "write", "acknowledge", "settle", "crash"]),
        st.integers(0, 3),
    ),
    max_size=60,
)


@settings(RELAXED, max_examples=400)
@given(steps, st.sampled_from([{}, {"flush_max_records": 2}, {"max_memory_bytes": 4}, {"max_memory_bytes": 0}]))
def test_no_interleaving_writes_a_record_before_its_predecessors(
    steps: list[tuple[int, str, int]], settings: dict[str, int]
) -> None:
    """I1, I3, I9: whoever appends, flushes, is slow or dies, PostgreSQL always has a prefix, and in the end all."""
    journal = Journal()
    processes = [Process(journal, settings), Process(journal, settings)]
    settling: list[tuple[set[int], Future[None], Process]] = []
    for who, step, which in steps:
        process = processes[who]
        if step == "receive":
            process.receive(which)
        elif step == "plan":
            process.plan(1 + which)
        elif step == "settle":
            settling.append((set(range(1, journal.last + 1)), *process.queue.settle(["t"]), process))
        elif step == "crash":
            processes[who] = Process(journal, settings)
        else:
            getattr(process, step)()
        for everything_then, ticket, _ in settling:
            # Whoever was told that the thread is settled finds in PostgreSQL what was acknowledged before he asked.
            assert not ticket.done() or everything_then <= journal.durable

    processes[0].queue.adopt(["t"])
    for process in processes:
        while process.unadded:
            process.receive(0)
        for _ in range(2 * journal.last + 3):
            process.plan(2)
            process.write()
            process.acknowledge()

    assert journal.durable == set(range(1, journal.last + 1))
    assert journal.waiting == []
    assert [process.queue.records for process in processes] == [0, 0]
    assert all(ticket.done() for _, ticket, process in settling if process in processes)


# --- bounds and fairness ---------------------------------------------------------------------------------------------


def test_a_transaction_takes_no_more_records_than_its_bound() -> None:
    """I8: the rest of a thread waits for the next round, in order."""
    queue = make(flush_max_records=2)
    add(queue, "t", 1, 2, 3)

    (plan,) = queue.plan()

    assert chosen(plan) == [1, 2]
    queue.flushed("t", 2)
    assert [chosen(plan) for plan in queue.plan()] == [[3]]


def test_a_transaction_takes_no_more_bytes_than_its_bound() -> None:
    """I8: a record that is larger than the bound makes a transaction of its own."""
    queue = make(flush_max_bytes=10)
    add(queue, "t", 1, 2, payload=b"x" * 6)
    add(queue, "t", 3, previous=2, payload=b"x" * 50)
    add(queue, "t", 4, previous=3)

    rounds = []
    while plans := queue.plan():
        rounds.append([chosen(plan) for plan in plans])
        queue.flushed("t", rounds[-1][0][-1])

    assert rounds == [[[1, 2]], [[3]], [[4]]]


def test_the_thread_that_waits_longest_goes_first() -> None:
    """No thread waits for ever behind one that is written all the time."""
    queue = make(flush_max_records=2)
    add(queue, "busy", 1, 2, 3)
    add(queue, "quiet", 1)

    first = queue.plan()
    queue.flushed("busy", 2)
    add(queue, "busy", 4, 5, previous=3)
    second = queue.plan()

    assert [(plan.thread_id, chosen(plan)) for plan in first] == [("busy", [1, 2])]
    assert [(plan.thread_id, chosen(plan)) for plan in second] == [("quiet", [1]), ("busy", [3])]


def test_many_threads_share_a_transaction() -> None:
    """One round takes what several threads have, up to its bound."""
    queue = make(flush_max_records=3)
    for number in range(5):
        add(queue, f"t{number}", 1)

    assert [plan.thread_id for plan in queue.plan()] == ["t0", "t1", "t2"]


def test_what_is_remembered_of_idle_threads_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """I8: a process that serves a million threads does not remember them all; forgetting costs a look, no order."""
    monkeypatch.setattr(backlog, "_REMEMBERED_THREADS", 2)
    queue = make()
    for name in ("a", "b", "c"):
        add(queue, name, 1)
        queue.plan()
        queue.flushed(name, 1)

    for name in ("a", "b", "c"):
        add(queue, name, 2, previous=1)

    assert {plan.thread_id: plan.read_journal for plan in queue.plan()} == {"a": True, "b": False, "c": False}
    assert len(queue._flushed) <= 2


def test_room_is_given_when_the_backlog_is_under_its_bounds() -> None:
    """I8: at the bound writers wait, and go on as soon as a flush has made room."""
    queue = make(max_backlog_records=2)
    assert queue.has_room()
    assert queue.room().done()
    add(queue, "t", 1, 2)
    assert not queue.has_room()
    ticket = queue.room()
    assert not ticket.done()

    queue.plan()
    queue.flushed("t", 1)

    assert queue.has_room()
    assert ticket.result(0) is None


def test_bytes_bound_the_backlog_too() -> None:
    """I8: what was dropped from memory counts as well, since it lies in the journal."""
    queue = make(max_backlog_bytes=4, max_memory_bytes=0)
    add(queue, "t", 1, 2, payload=b"xx")

    assert not queue.has_room()
    queue.plan()
    queue.flushed("t", 2)
    assert queue.has_room()


# --- those who wait --------------------------------------------------------------------------------------------------


def test_a_write_through_ticket_is_resolved_by_its_own_flush() -> None:
    """I1: a write-through call returns when PostgreSQL has its record, not before and not much later."""
    queue = make()
    tickets = [Future[None](), Future[None]()]
    queue.add("t", 1, 0, b"x", generation=1, ticket=tickets[0])
    queue.add("t", 2, 1, b"x", generation=1, ticket=tickets[1])

    assert queue.flushed("t", 1) == 1

    assert done(tickets) == [True, False]
    queue.flushed("t", 2)
    assert done(tickets) == [True, True]


def test_everything_is_what_was_acknowledged_before() -> None:
    """I1: `flush()` waits for the records of its time, not for those that come meanwhile."""
    queue = make()
    add(queue, "a", 1)
    add(queue, "b", 1)
    tickets = queue.everything()
    add(queue, "a", 2, previous=1)

    queue.flushed("a", 1)
    assert sorted(done(tickets)) == [False, True]
    queue.flushed("b", 1)

    assert done(tickets) == [True, True]
    assert queue.records == 1
    assert make().everything() == []


def test_settling_looks_at_the_journal_whoever_wrote_it() -> None:
    """I9: a thread of which this process has nothing is read from its journal too."""
    queue = make()

    (ticket,) = queue.settle(["t"])

    (plan,) = queue.plan()
    assert (plan.thread_id, chosen(plan), plan.read_journal) == ("t", [], True)
    assert not ticket.done()
    queue.flushed("t", 7)
    assert ticket.result(0) is None


def test_who_asks_during_a_flush_waits_for_the_next_look() -> None:
    """I9: the journal was read before he asked, so that it may lack what was acknowledged since."""
    queue = make()
    (early,) = queue.settle(["t"])
    queue.plan()
    (late,) = queue.settle(["t"])

    queue.flushed("t", 3)

    assert done([early, late]) == [True, False]
    (plan,) = queue.plan()
    assert plan.read_journal
    queue.flushed("t", 4)
    assert late.done()


def test_a_long_journal_is_settled_when_all_of_it_was_read() -> None:
    """I9: who waits for a thread is told after the last piece."""
    queue = make()
    (ticket,) = queue.settle(["t"])
    queue.plan()
    queue.flushed("t", 100, more=True)
    assert not ticket.done()

    (plan,) = queue.plan()
    queue.flushed("t", 150)

    assert plan.read_journal
    assert ticket.done()


def test_pieces_of_a_round_do_not_settle_a_thread() -> None:
    """I9: a maintenance record makes a transaction of its own; the thread is settled after the last of them."""
    queue = make()
    (ticket,) = queue.settle(["t"])
    queue.plan()

    queue.flushed("t", 1, last=False)

    assert not ticket.done()
    queue.flushed("t", 2, last=True)
    assert ticket.done()


def test_a_failed_flush_keeps_the_records_and_tells_those_who_settle() -> None:
    """I1, I7: nothing is forgotten; a reader gets a typed error at once, `flush()` and write-through go on waiting."""
    queue = make()
    write_through: Future[None] = Future()
    queue.add("t", 1, 0, b"x", generation=1, ticket=write_through)
    (reader,) = queue.settle(["t"])
    everything = queue.everything()
    queue.plan()

    queue.fail_settling(REFUSED)

    assert reader.exception(0) is REFUSED
    assert done([write_through, *everything]) == [False, False]
    assert [chosen(plan) for plan in queue.plan()] == [[1]]
    queue.flushed("t", 1)
    assert done([write_through, *everything]) == [True, True]


def test_a_cancelled_waiter_harms_nobody() -> None:
    """A caller that was cancelled while waiting must not break the flusher that would tell him."""
    queue = make()
    cancelled, waiting = queue.settle(["t"]) + queue.settle(["t"])
    assert cancelled.cancel()
    queue.plan()

    queue.flushed("t", 1)

    assert waiting.done()


def test_a_quarantined_thread_is_told_and_set_aside() -> None:
    """I7: everybody who waits for it learns why, later ones too; every other thread goes on."""
    queue = make()
    write_through: Future[None] = Future()
    queue.add("bad", 1, 0, b"x", generation=1, ticket=write_through)
    (reader,) = queue.settle(["bad"])
    add(queue, "good", 1)
    everything = queue.everything()

    queue.plan()
    queue.flushed("bad", 1, refused=REFUSED)

    assert [write_through.exception(0), reader.exception(0)] == [REFUSED, REFUSED]
    assert (queue.state().quarantined, queue.records) == (("bad",), 1)
    later: Future[None] = Future()
    queue.add("bad", 2, 1, b"x", generation=1, ticket=later)
    assert [plan.thread_id for plan in queue.plan()] == ["good", "bad"]
    queue.flushed("bad", 2, refused=REFUSED)
    assert later.exception(0) is REFUSED
    queue.flushed("good", 1)
    assert [ticket.exception(0) for ticket in everything] == [REFUSED, None]
    assert [ticket.exception(0) for ticket in queue.everything()] == [REFUSED]
    queue.release(["bad"])
    assert (queue.state().quarantined, queue.everything()) == ((), [])


def test_nothing_is_taken_over_in_a_generation_that_has_ended() -> None:
    """I6: a reply of a generation that is not trusted any more acknowledges nothing."""
    queue = make()

    queue.distrust(REFUSED)

    assert not queue.add("t", 1, 0, b"x", generation=1)
    assert queue.is_drained()
    queue.trust(2)
    assert not queue.add("t", 1, 0, b"x", generation=1)
    assert queue.add("t", 1, 0, b"x", generation=2)


def test_without_a_journal_memory_is_flushed_alone() -> None:
    """I1: what this process holds goes to PostgreSQL without others' records; what memory did not keep waits."""
    queue = make(max_memory_bytes=2)
    queue.add("t", 2, 1, b"x", generation=1)
    queue.add("t", 3, 2, b"x", generation=1)
    queue.add("t", 4, 3, b"x", generation=1)
    queue.adopt(["orphan"])
    (reader,) = queue.settle(["t"])

    queue.distrust(REFUSED)

    assert reader.exception(0) is REFUSED
    assert [ticket.exception(0) for ticket in queue.settle(["t"])] == [REFUSED]
    assert [(p.thread_id, [e.sequence for e in p.entries], p.read_journal) for p in queue.plan()] == [
        ("t", [2, 3], False)
    ]
    queue.flushed("t", 3)
    assert queue.plan() == []
    queue.use_journal()
    assert [(p.thread_id, p.read_journal) for p in queue.plan()] == [("t", True)]


def test_a_soft_ticket_fails_with_the_first_flush_that_does() -> None:
    """I8: who would like a record to be durable at once, and can do without, does not wait for a failing flush."""
    queue = make()
    soft: Future[None] = Future()
    hard: Future[None] = Future()
    queue.add("t", 1, 0, b"x", generation=1, ticket=soft, soft=True)
    queue.add("t", 2, 1, b"x", generation=1, ticket=hard)

    queue.fail_settling(REFUSED)

    assert soft.exception(0) is REFUSED
    assert not hard.done()
    queue.flushed("t", 2)
    assert hard.result(0) is None


def test_giving_up_tells_everybody_and_counts_what_is_left() -> None:
    """I7: a saver that closes leaves its records to the journal, and no waiter without an answer."""
    queue = make(max_backlog_records=2)
    closed = SaverClosedError("closed")
    write_through: Future[None] = Future()
    queue.add("t", 1, 0, b"x", generation=1, ticket=write_through)
    add(queue, "t", 2, previous=1)
    waiting = [write_through, *queue.settle(["t", "other"]), *queue.everything(), queue.room()]

    left = queue.give_up(closed)

    assert left == 2
    assert [ticket.exception(0) for ticket in waiting] == [closed] * len(waiting)
    assert queue.state() == backlog.BacklogState(0, 0, 0, 0.0, ())


def test_the_oldest_record_tells_the_lag() -> None:
    """The lag is the age of the oldest record, also of a thread that was moved behind others."""
    queue = make(flush_max_records=1)
    assert queue.state().oldest_age == 0.0
    add(queue, "a", 1)
    first = queue._queues["a"].entries[0].acknowledged
    add(queue, "b", 1)

    now = time.monotonic()
    assert queue.state().oldest_age >= now - first
    queue.flushed("a", 1)
    queue.flushed("b", 1)
    assert queue.state().oldest_age == 0.0


# --- the flusher's waits ---------------------------------------------------------------------------------------------


def wait_then_linger(queue: Backlog, seconds: float = LONG) -> threading.Thread:
    """Do what the flusher does between two rounds."""

    def run() -> None:
        queue.wait(seconds)
        queue.linger(seconds)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def assert_goes_on(flusher: threading.Thread) -> None:
    flusher.join(SOON)
    assert not flusher.is_alive()


def test_the_flusher_lingers_for_company() -> None:
    """Records that come one by one make one transaction: nobody waits for them, so it waits for more."""
    queue = make(flush_max_records=3)
    flusher = wait_then_linger(queue)
    add(queue, "t", 1, 2)
    flusher.join(0.2)
    assert flusher.is_alive()

    add(queue, "u", 1)
    queue.wake()

    assert_goes_on(flusher)


@pytest.mark.parametrize("who", ["settle", "everything", "write-through", "room", "wake"])
def test_who_waits_for_a_flush_does_not_pay_for_the_linger(who: str) -> None:
    """I8: the linger is for records that nobody waits for."""
    queue = make(max_backlog_records=1)
    flusher = wait_then_linger(queue)
    add(queue, "t", 1)
    {
        "settle": lambda: queue.settle(["t"]),
        "everything": queue.everything,
        "write-through": lambda: queue.add("t", 2, 1, b"x", generation=1, ticket=Future()),
        "room": queue.room,
        "wake": queue.wake,
    }[who]()

    assert_goes_on(flusher)


def test_who_waits_for_the_rest_does_not_pay_for_the_linger_either() -> None:
    """I8: what is left after a round because a foreign record lies between, or because the round was full."""
    for queue, expected in ((make(), [1]), (make(flush_max_records=1), [1])):
        add(queue, "t", 1)
        add(queue, "t", 3, previous=2)
        tickets = queue.everything()
        (plan,) = queue.plan()
        assert chosen(plan) == expected
        queue.flushed("t", 1)
        assert done(tickets) == [False]

        assert_goes_on(wait_then_linger(queue))


def test_who_waits_behind_a_full_round_does_not_pay_for_the_linger() -> None:
    """I8: a thread that did not fit into the round is waited for as well."""
    queue = make(flush_max_records=1)
    add(queue, "a", 1)
    add(queue, "b", 1)
    tickets = queue.everything()
    assert [plan.thread_id for plan in queue.plan()] == ["a"]
    queue.flushed("a", 1)
    assert sorted(done(tickets)) == [False, True]

    # Nothing else may end the linger: one record is less than a full round.
    queue._config = TieredConfig()
    assert_goes_on(wait_then_linger(queue))


def test_who_waits_for_a_long_journal_does_not_pay_for_the_linger() -> None:
    """I8: nor between the pieces of a journal that is longer than one round."""
    queue = make()
    (ticket,) = queue.settle(["t"])
    queue.plan()
    queue.flushed("t", 100, more=True)
    assert not ticket.done()

    assert_goes_on(wait_then_linger(queue))


def test_a_pause_after_a_failure_is_not_ended_by_new_records() -> None:
    """I8: while PostgreSQL is away, every new record must not start another try."""
    queue = make()
    started = time.monotonic()
    waiter = threading.Thread(target=lambda: queue.wait(0.3, for_work=False), daemon=True)
    waiter.start()
    for number in range(1, 20):
        add(queue, "t", number, previous=number - 1)
    waiter.join(SOON)

    assert time.monotonic() - started >= 0.25
