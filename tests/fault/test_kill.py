"""Real processes, killed with SIGKILL at any moment: nothing acknowledged is lost, nothing deleted comes back."""

from __future__ import annotations

import random
import threading
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
from langgraph.checkpoint.postgres import PostgresSaver

from langgraph_tiered_saver.cold.schema import LOCK_CLASS
from langgraph_tiered_saver.hot import scripts
from langgraph_tiered_saver.hot.keys import Keyspace, sweep_key
from tests.fault.workers import (
    Acked,
    Chain,
    Place,
    Worker,
    address,
    assert_durable,
    journal_lengths,
    locked_table,
    read_rows,
    unflushed,
    values_of,
    waiting_backends,
    writes_of,
)
from tests.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from langgraph_tiered_saver import TieredSaver

# What makes a saver adopt orphans within a fraction of a second.
ADOPTING = {"sweep_interval": 0.2, "orphan_grace": 0.3}
# What makes a process keep its records in memory until somebody calls `flush`, and never look at anybody else's.
HOLDING = {"flush_linger": 3600.0, "sweep_interval": 0.0}
THREADS = ["red", "grün: {a}/b", "blue"]


@pytest.fixture
def place(redis_url: str, postgres_url: str, key_prefix: str, tmp_path: Path) -> Place:
    """Where this test's processes meet."""
    return Place(redis_url, postgres_url, key_prefix, tmp_path)


@pytest.fixture
def start(place: Place) -> Iterator[Callable[..., Worker]]:
    """A function that starts a worker in a role; what still runs after the test is killed."""
    workers: list[Worker] = []

    def start(role: str, **options: Any) -> Worker:
        workers.append(Worker(place, role, f"worker-{len(workers)}", **options))
        return workers[-1]

    yield start
    for worker in workers:
        worker.kill()


def last_of_each_thread(acked: list[Acked]) -> dict[str, Acked]:
    """Give the last acknowledged checkpoint of each thread."""
    return {record.thread_id: record for record in acked if record.kind == "put"}


def assert_visible(saver: TieredSaver, acked: list[Acked]) -> None:
    """Check that `get_tuple` gives each thread's last acknowledged checkpoint, or one the killed call still made."""
    written = {record[1:] for record in acked if record.kind == "writes"}
    for thread_id, record in last_of_each_thread(acked).items():
        found = saver.get_tuple(address(thread_id))
        assert found is not None
        step = found.checkpoint["channel_values"]["step"]
        assert step in (record.step, record.step + 1)
        assert found.checkpoint["channel_values"] == values_of(thread_id, step)
        if step == record.step:
            assert found.checkpoint["id"] == record.checkpoint_id
            if record[1:] in written:
                task = f"task-{step}"
                assert found.pending_writes == [(task, *write) for write in writes_of(thread_id, step)]


def adopt(make_saver: Callable[..., TieredSaver], place: Place) -> TieredSaver:
    """Open a saver that adopts orphans, and wait until nothing is left to adopt."""
    saver = make_saver(**ADOPTING)
    saver.setup()
    wait_until(lambda: not unflushed(place.redis_url, place.key_prefix), 20, "every journal is flushed")
    return saver


@pytest.mark.parametrize(
    ("seed", "role", "settings"),
    [
        (1, "write", ADOPTING),
        (2, "write", ADOPTING),
        (3, "awrite", ADOPTING),
        (4, "awrite", {**ADOPTING, "flush_linger": 0.0, "flush_max_records": 3}),
        (5, "write", {**ADOPTING, "write_mode": "through"}),
        (6, "write", HOLDING),
    ],
)
def test_a_killed_writer_loses_nothing(
    seed: int,
    role: str,
    settings: dict[str, Any],
    start: Callable[..., Worker],
    make_saver: Callable[..., TieredSaver],
    place: Place,
) -> None:
    """I1, I9: SIGKILL at any moment; the next process sees the latest at once, and PostgreSQL gets every record."""
    writer = start(role, threads=THREADS, settings=settings)
    writer.wait_for(1)
    time.sleep(random.Random(seed).uniform(0.0, 0.4))  # not for luck: any moment must do

    writer.kill()

    acked = writer.acked()
    # Sweeping is off here, so that it is the hot tier that answers.
    reader = make_saver(sweep_interval=0)
    assert_visible(reader, acked)
    stats = reader.stats()
    assert (stats.hot_hits, stats.hot_misses, stats.cold_reads) == (len(last_of_each_thread(acked)), 0, 0)
    adopter = adopt(make_saver, place)
    assert_durable(place.postgres_url, acked)
    if settings is HOLDING:
        assert adopter.stats().adopted_records >= len(acked)
    assert adopter.stats().lost_records == 0


def test_older_checkpoints_are_read_before_any_adoption(
    start: Callable[..., Worker], make_saver: Callable[..., TieredSaver], place: Place
) -> None:
    """I9: what a killed process left only in the journal is found by id and by `list`, though nobody sweeps."""
    writer = start("write", threads=THREADS, steps=5, settings=HOLDING)
    writer.wait_for(30)
    writer.kill()
    acked = writer.acked()
    assert sum(journal_lengths(place.redis_url, place.key_prefix).values()) == 30

    reader = make_saver(sweep_interval=0)
    by_id = {
        record: reader.get_tuple(address(record.thread_id, record.checkpoint_id)) for record in acked if record.step < 4
    }
    listed = {(at.config["configurable"]["thread_id"], at.checkpoint["id"]) for at in reader.list(None)}

    for record, found in by_id.items():
        assert found is not None
        assert found.checkpoint["channel_values"] == values_of(record.thread_id, record.step)
    assert listed == {(record.thread_id, record.checkpoint_id) for record in acked}
    assert reader.stats().adopted_records == 30
    assert_durable(place.postgres_url, acked)


def test_a_write_without_its_checkpoint_is_adopted(make_saver: Callable[..., TieredSaver], place: Place) -> None:
    """I1: writes that arrive before their checkpoint, in another process, count once it is there."""
    early, late = make_saver(**HOLDING), make_saver(**HOLDING)
    chain = Chain(late, "red")
    arguments = chain.next()
    config = address("red", arguments[1]["id"])

    early.put_writes(config, writes_of("red", 0), "task-0")
    chain.config = late.put(*arguments)

    expected = [("task-0", *write) for write in writes_of("red", 0)]
    for found in (late.get_tuple(address("red")), adopt(make_saver, place).get_tuple(config)):
        assert found is not None
        assert found.pending_writes == expected
    assert_durable(place.postgres_url, [Acked("writes", "red", chain.checkpoint_id, 0)])


@pytest.mark.parametrize("table", ["checkpoint_blobs", "checkpoint_writes", "tiered_threads"])
def test_killed_in_the_middle_of_a_flush(
    table: str, start: Callable[..., Worker], make_saver: Callable[..., TieredSaver], place: Place
) -> None:
    """I1, I4: a writer that dies while its transaction is under way leaves no half of it, and nothing is lost."""
    make_saver(sweep_interval=0).setup()
    before = read_rows(place.postgres_url)
    with locked_table(place.postgres_url, table):
        writer = start("write", threads=THREADS, steps=10, settings=ADOPTING)
        writer.wait_for(60)
        wait_until(lambda: waiting_backends(place.postgres_url), message="the flush waits for the lock")

        writer.kill()

        assert table == "checkpoint_blobs" or read_rows_unless_locked(place.postgres_url, table) == before
    adopt(make_saver, place)
    assert len(writer.acked()) == 60
    assert_durable(place.postgres_url, writer.acked())
    rows = read_rows(place.postgres_url)
    # One row of each write channel, and one blob each of "log" at every step and of "constant" once.
    assert [len(rows[name]) for name in rows] == [30, 33, 60]


def read_rows_unless_locked(postgres_url: str, locked: str) -> dict[str, list[tuple[Any, ...]]]:
    """Read the tables that nobody has locked; the locked one counts as empty."""
    with psycopg.connect(postgres_url) as connection:
        return {
            table: [] if table == locked else connection.execute(f"SELECT * FROM {table}").fetchall()
            for table in ("checkpoints", "checkpoint_blobs", "checkpoint_writes")
        }


def test_killed_between_the_commit_and_the_trim(
    start: Callable[..., Worker], make_saver: Callable[..., TieredSaver], place: Place
) -> None:
    """I4: records that PostgreSQL has and the journal still holds are flushed again and leave the same rows."""
    writer = start("write_and_die_after_commit", threads=THREADS, steps=5, settings=HOLDING)
    wait_until(lambda: writer.process.poll() is not None, 20, "the writer dies")
    writer.reap()
    acked = writer.acked()
    before = read_rows(place.postgres_url)
    assert (len(acked), len(before["checkpoints"])) == (30, 15), writer.errors()
    assert sum(journal_lengths(place.redis_url, place.key_prefix).values()) == 30

    adopter = adopt(make_saver, place)

    assert adopter.stats().adopted_records == 30
    assert read_rows(place.postgres_url) == before
    assert_durable(place.postgres_url, acked)


# --- deleting --------------------------------------------------------------------------------------------------------


def assert_deleted(saver: TieredSaver, place: Place, thread_id: str) -> None:
    """Check that neither a saver, nor PostgresSaver, nor any row or key of the journal knows the thread."""
    assert saver.get_tuple(address(thread_id)) is None
    assert list(saver.list({"configurable": {"thread_id": thread_id}})) == []
    with PostgresSaver.from_conn_string(place.postgres_url) as cold:
        assert cold.get_tuple(address(thread_id)) is None
    for table, rows in read_rows(place.postgres_url).items():
        assert [row for row in rows if row[0] == thread_id] == [], table
    assert unflushed(place.redis_url, place.key_prefix) == []


def test_delete_while_a_flush_is_under_way(
    start: Callable[..., Worker], make_saver: Callable[..., TieredSaver], place: Place
) -> None:
    """I5: another process deletes a thread whose flush hangs in PostgreSQL; the thread stays deleted."""
    saver = make_saver(sweep_interval=0)
    saver.setup()
    other = Chain(saver, "other")
    chain = Chain(saver, "red")
    deleter = start("delete", thread="red", settings={"sweep_interval": 0})
    deleter.wait_for(1)
    with locked_table(place.postgres_url, "checkpoint_writes"):
        for _ in range(10):
            chain.put(), chain.write(), other.put()
        wait_until(lambda: waiting_backends(place.postgres_url), message="the flush waits for the table")

        deleter.tell("now")

        wait_until(lambda: len(waiting_backends(place.postgres_url)) == 2, message="the delete waits for the flush")
        assert deleter.reports() == [["ready"]]
    deleter.wait_for(2)
    deleter.finish()
    saver.flush()

    assert_deleted(saver, place, "red")
    assert count_of(saver, "other") == 10


def count_of(saver: TieredSaver, thread_id: str) -> int:
    """Count a thread's checkpoints."""
    return len(list(saver.list({"configurable": {"thread_id": thread_id}})))


def test_old_records_in_memory_do_not_resurrect_a_thread(
    start: Callable[..., Worker], make_saver: Callable[..., TieredSaver], place: Place
) -> None:
    """I5: a process that still holds records from before a delete flushes them after it; nothing comes back."""
    holder = make_saver(**HOLDING)
    chain = Chain(holder, "red")
    for _ in range(10):
        chain.put(), chain.write()
    deleter = start("delete", thread="red", settings={"sweep_interval": 0})
    deleter.wait_for(1)
    deleter.tell("now")
    deleter.wait_for(2)
    deleter.finish()
    assert holder.stats().backlog_records == 20

    holder.flush()

    assert holder.stats().backlog_records == 0
    assert_deleted(holder, place, "red")


def test_a_thread_lives_again_after_its_delete(make_saver: Callable[..., TieredSaver], place: Place) -> None:
    """I2, I5: a step taken after a delete, by who still holds older ones, is complete and is all there is."""
    holder, deleter = make_saver(**HOLDING), make_saver(sweep_interval=0)
    chain = Chain(holder, "red")
    for _ in range(5):
        chain.put(), chain.write()
    deleter.delete_thread("red")

    acked = [chain.put(), chain.write()]  # sends only what changed, unless it notices
    holder.flush()

    for saver in (holder, deleter):
        assert [at.checkpoint["channel_values"] for at in saver.list(address("red"))] == [values_of("red", 5)]
        found = saver.get_tuple(address("red"))
        assert found is not None
        assert found.checkpoint["channel_values"] == values_of("red", 5)
    rows = read_rows(place.postgres_url)
    assert [len(rows[name]) for name in rows] == [1, 2, 2]
    assert {row[2] for row in rows["checkpoints"]} == {acked[0].checkpoint_id}


def test_a_killed_deleter_finishes_its_delete(
    start: Callable[..., Worker], make_saver: Callable[..., TieredSaver], place: Place
) -> None:
    """I5: a delete that was journaled is executed by whoever adopts it, and old records stay out."""
    holder = make_saver(**HOLDING)
    chain = Chain(holder, "red")
    for _ in range(5):
        chain.put(), chain.write()
    holder.flush()
    chain.put(), chain.write()
    deleter = start("delete", thread="red", settings={"sweep_interval": 0})
    deleter.wait_for(1)
    with locked_table(place.postgres_url, "checkpoint_writes"):
        deleter.tell("now")
        wait_until(lambda: waiting_backends(place.postgres_url), message="the delete waits for the table")

        deleter.kill()

        assert deleter.reports() == [["ready"]]
    adopter = adopt(make_saver, place)
    holder.flush()
    assert_deleted(adopter, place, "red")


def test_a_flush_queued_behind_a_delete_writes_nothing(make_saver: Callable[..., TieredSaver], place: Place) -> None:
    """I5: of a delete and an older flush that both wait for the shard's lock, the flush comes second and skips."""
    holder, deleter = make_saver(**HOLDING), make_saver(sweep_interval=0)
    chain = Chain(holder, "red")
    for _ in range(5):
        chain.put(), chain.write()
    deleter.setup()
    shard = Keyspace(place.key_prefix, holder.config.shard_count).shard_of("red")
    with psycopg.connect(place.postgres_url) as connection:
        connection.execute("SELECT pg_advisory_xact_lock(%s, %s)", (LOCK_CLASS, shard))
        deleting = threading.Thread(target=deleter.delete_thread, args=("red",))
        deleting.start()
        wait_until(lambda: waiting_backends(place.postgres_url), message="the delete waits")
        flushing = threading.Thread(target=holder.flush)
        flushing.start()
        wait_until(lambda: len(waiting_backends(place.postgres_url)) == 2, message="the flush waits behind it")
        connection.rollback()
    deleting.join(20)
    flushing.join(20)

    assert not deleting.is_alive()
    assert not flushing.is_alive()
    assert_deleted(holder, place, "red")


# --- two writers -----------------------------------------------------------------------------------------------------

# All records of a thread that PostgreSQL has, by sequence number, and the watermark: one look at one moment.
LOOK = """
SELECT (SELECT array_agg(DISTINCT seq) FROM (
    SELECT tiered_seq AS seq FROM checkpoints WHERE thread_id = %(thread)s
    UNION SELECT tiered_seq FROM checkpoint_writes WHERE thread_id = %(thread)s) AS every),
    (SELECT watermark FROM tiered_threads WHERE thread_id = %(thread)s)"""


def test_two_processes_write_to_one_thread(
    start: Callable[..., Worker], make_saver: Callable[..., TieredSaver], place: Place
) -> None:
    """I1, I3: with two writers and a third process adopting, PostgreSQL holds a prefix of the journal's order always.

    One writer is killed on the way. Every record has a sequence number of its own; a look at PostgreSQL must show
    all numbers of the thread up to the highest it shows.
    """
    make_saver(sweep_interval=0).setup()
    sweeper = start("sweep", settings={"sweep_interval": 0.05, "orphan_grace": 0.02})
    sweeper.wait_for(1)
    # One flushes often, in transactions as small as they get, the other seldom: its records must not be overtaken.
    paces = ({"flush_linger": 0.001, "flush_max_records": 5}, {"flush_linger": 0.05})
    writers = [start("write", threads=["shared"], steps=300, settings={**pace, "sweep_interval": 0}) for pace in paces]
    looks: list[tuple[set[int], int]] = []
    missing: list[tuple[int, int]] = []
    with (
        psycopg.connect(place.postgres_url, autocommit=True) as connection,
        redis.Redis.from_url(place.redis_url) as client,
    ):
        journal = Keyspace(place.key_prefix, 64).thread("shared").journal

        def look() -> bool:
            acked = sum(len(writer.acked()) for writer in writers)
            journaled = [int(name.split(b"-")[0]) for name, _ in client.xrange(journal)]
            row = connection.execute(LOOK, {"thread": "shared"}).fetchone()
            assert row is not None
            durable = set(row[0] or ())
            looks.append((durable, row[1] or 0))
            # What was acknowledged before the journal was read is in it, or in PostgreSQL, which was read later.
            if len(durable | set(journaled)) < acked:
                missing.append((acked, len(durable | set(journaled))))
            if acked > 600 and writers[0].process.poll() is None:
                writers[0].kill()
            return len(writers[1].acked()) == 600 and writers[0].process.poll() is not None

        wait_until(look, 60, "the writers finish")
    for writer in writers[1:]:
        writer.finish()
    sweeper.finish()
    adopt(make_saver, place)
    with psycopg.connect(place.postgres_url) as connection:
        row = connection.execute(LOOK, {"thread": "shared"}).fetchone()
    assert row is not None
    every = set(row[0])

    assert missing == []
    for durable, watermark in looks:
        highest = max(durable, default=0)
        assert durable == {number for number in every if number <= highest}
        assert durable == {number for number in every if number <= watermark}
    assert any(0 < len(durable) < len(every) for durable, _ in looks), "no look fell into the run"
    acked = [record for writer in writers for record in writer.acked()]
    assert all(writer.acked() for writer in writers)
    assert_durable(place.postgres_url, acked)


def test_writers_take_turns_on_one_thread(make_saver: Callable[..., TieredSaver], place: Place) -> None:
    """I3: records of two savers that alternate arrive in the journal's order, whoever flushes first."""
    first, second = make_saver(**HOLDING), make_saver(**HOLDING)
    chain = Chain(first, "red")
    acked = []
    for _ in range(10):
        for saver in (first, second):
            chain.saver = saver
            acked += [chain.put(), chain.write()]

    second.flush()

    # The second one's last record comes after all of the first one's, so that these had to come along.
    assert_durable(place.postgres_url, acked)
    assert second.stats().adopted_records == 20
    first.flush()
    assert unflushed(place.redis_url, place.key_prefix) == []
    rows = read_rows(place.postgres_url)
    assert [len(rows[name]) for name in rows] == [20, 21, 40]


# --- sweeping --------------------------------------------------------------------------------------------------------


def test_one_process_sweeps_in_each_interval(start: Callable[..., Worker], place: Place) -> None:
    """I8: of many idle processes one looks for orphans in each interval; the others ask once and let it be.

    Each process's first look, at its start, is not counted: orphans must not wait for a lease that a dead one left.
    """
    interval, processes = 0.5, 4
    settings = {"sweep_interval": interval, "shard_count": 2}
    sweepers = [start("sweep", settings=settings) for _ in range(processes)]
    for sweeper in sweepers:
        sweeper.wait_for(1)
    sweeps, leases, others = [], 0, []
    with redis.Redis.from_url(place.redis_url) as client, client.monitor() as monitor:
        ending = threading.Timer(3.0 + interval, lambda: client.echo(place.key_prefix))
        ending.start()
        began: float | None = None
        for command in monitor.listen():
            text = command["command"]
            if place.key_prefix not in text:
                continue
            if text.startswith("ECHO"):
                break
            began = command["time"] if began is None else began
            if command["time"] - began < interval:
                continue
            if scripts.SWEEP.digest in text:
                # One script call for each shard; the first shard's tells when.
                sweeps += [command["time"]] if f"{{{place.key_prefix}:0}}:dirty" in text else []
            elif sweep_key(place.key_prefix).decode() in text:
                leases += 1
            elif command["client_type"] != "lua":
                others.append(text)
        ending.join()
    for sweeper in sweepers:
        sweeper.finish()

    assert 3 <= len(sweeps) <= 7
    assert min(later - earlier for earlier, later in pairwise(sweeps)) > 0.9 * interval
    assert leases <= processes * 8
    assert others == []


def test_a_process_that_is_told_not_to_sweeps_never(
    start: Callable[..., Worker], make_saver: Callable[..., TieredSaver], place: Place
) -> None:
    """With `sweep_interval=0` orphans are left to others, also at the start."""
    writer = start("write", threads=["red"], steps=1, settings=HOLDING)
    writer.wait_for(2)
    writer.kill()
    idle = make_saver(sweep_interval=0, orphan_grace=0.0)
    idle.setup()
    Chain(idle, "blue").put()
    idle.flush()

    assert sum(journal_lengths(place.redis_url, place.key_prefix).values()) == 2
    sweeper = start("sweep", settings=ADOPTING)
    wait_until(lambda: not unflushed(place.redis_url, place.key_prefix), 20, "the sweeping process adopts")
    sweeper.finish()
    assert_durable(place.postgres_url, writer.acked())


def test_a_live_writer_that_is_slow_and_its_adopter(make_saver: Callable[..., TieredSaver], place: Place) -> None:
    """I4: records that somebody adopts although their writer lives are in PostgreSQL once."""
    slow = make_saver(**HOLDING)
    chain = Chain(slow, "red")
    acked = [record for _ in range(10) for record in (chain.put(), chain.write())]

    adopter = adopt(make_saver, place)

    before = read_rows(place.postgres_url)
    assert adopter.stats().adopted_records == 20
    slow.flush()
    assert read_rows(place.postgres_url) == before
    assert slow.stats().backlog_records == 0
    assert_durable(place.postgres_url, acked)
