"""Bounds: what happens when PostgreSQL is slower than the writers, and what waiting for it means."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from langgraph_tiered_saver import (
    BacklogFullError,
    ColdTierUnavailableError,
    FlushTimeoutError,
    TieredSaver,
    TieredStats,
)
from tests.fault.workers import (
    Chain,
    address,
    assert_durable,
    in_threads,
    journal_lengths,
    locked_table,
    read_rows,
    unflushed,
    values_of,
    waiting_backends,
)
from tests.support import wait_until

SLACK = 1.0


def fill(saver: TieredSaver, chain: Chain, records: int, postgres_url: str) -> list[Any]:
    """Put so many checkpoints while PostgreSQL is blocked, and wait until the flush has met the block."""
    acked = [chain.put() for _ in range(records)]
    wait_until(lambda: waiting_backends(postgres_url), message="the flush waits for the lock")
    assert saver.stats().backlog_records == records
    return acked


@pytest.mark.parametrize("bound", [{"max_backlog_records": 10}, {"max_backlog_bytes": 5000}], ids=["records", "bytes"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_full_backlog(
    bound: dict[str, int],
    asynchronous: bool,
    make_saver: Callable[..., TieredSaver],
    redis_url: str,
    postgres_url: str,
    key_prefix: str,
) -> None:
    """I8, I1: at the bound a write waits and then is refused; reads go on; nothing is doubled or lost after it."""
    saver = make_saver(backlog_timeout=0.4, sweep_interval=0, **bound)
    saver.setup()
    chain = Chain(saver, "red")
    with locked_table(postgres_url):
        acked = []
        while saver._source.current().backlog.has_room():
            acked += [chain.put()]
        wait_until(lambda: waiting_backends(postgres_url), message="the flush waits for the lock")
        journaled = journal_lengths(redis_url, key_prefix)
        # One record may reach beyond the bound in bytes; none may in records.
        if "max_backlog_records" in bound:
            assert len(acked) == 10
        else:
            assert 5000 <= saver.stats().backlog_bytes < 6000
        arguments = chain.next()
        calls: list[Callable[[], Any]] = [
            lambda: saver.put(*arguments),
            lambda: saver.put_writes(chain.config, [("log", 1)], "task"),
        ]
        if asynchronous:
            calls = [
                lambda: asyncio.run(saver.aput(*arguments)),
                lambda: asyncio.run(saver.aput_writes(chain.config, [("log", 1)], "task")),
            ]

        for call in calls:
            began = time.monotonic()
            with pytest.raises(BacklogFullError, match=r"This write was not made.*max_backlog_records") as caught:
                call()
            assert 0.4 <= time.monotonic() - began < 0.4 + SLACK
            assert isinstance(caught.value, TimeoutError)
            assert str(len(acked)) in str(caught.value)

        assert journal_lengths(redis_url, key_prefix) == journaled
        found = saver.get_tuple(address("red"))
        assert found is not None
        assert found.checkpoint["id"] == acked[-1].checkpoint_id
        aread = asyncio.run(saver.aget_tuple(address("red")))
        assert aread is not None
        assert aread.checkpoint["channel_values"] == values_of("red", len(acked) - 1)
    saver.flush()
    chain.config = saver.put(*arguments)
    saver.flush()

    assert_durable(postgres_url, acked)
    rows = read_rows(postgres_url)
    assert len(rows["checkpoints"]) == len(acked) + 1
    assert rows["checkpoint_writes"] == []
    assert unflushed(redis_url, key_prefix) == []
    stats = saver.stats()
    assert (stats.backlog_records, stats.backlog_bytes, stats.memory_bytes) == (0, 0, 0)
    assert (stats.checkpoints, stats.flushed_records, stats.lost_records) == (len(acked) + 1, len(acked) + 1, 0)


def test_a_write_that_waits_for_room_gets_it(make_saver: Callable[..., TieredSaver], postgres_url: str) -> None:
    """I8: writers wait at the bound, sync and async, and go on as soon as PostgreSQL does; the bound holds."""
    saver = make_saver(max_backlog_records=5, backlog_timeout=20.0, sweep_interval=0)
    saver.setup()
    most = 0
    acked: list[Any] = []

    def write(number: int) -> None:
        nonlocal most
        chain = Chain(saver, f"sync {number}")
        for _ in range(10):
            acked.append(chain.put())
            most = max(most, saver.stats().backlog_records)

    async def awrite(number: int) -> None:
        nonlocal most
        chain = Chain(saver, f"async {number}")
        for _ in range(10):
            acked.append(await chain.aput())
            most = max(most, saver.stats().backlog_records)

    async def several() -> None:
        await asyncio.gather(*map(awrite, range(4)))

    with ThreadPoolExecutor(5) as threads:
        with locked_table(postgres_url):
            writers = [threads.submit(write, number) for number in range(4)]
            writers.append(threads.submit(lambda: asyncio.run(several())))
            wait_until(lambda: len(saver._source.current().backlog._room_waiters) == 8, message="all writers wait")
            assert len(acked) == saver.stats().backlog_records < 5 + 8
        for writer in writers:
            writer.result(30)
    saver.flush()

    assert len(acked) == 80
    assert_durable(postgres_url, acked)
    assert len(read_rows(postgres_url)["checkpoints"]) == 80
    # Those who are let in at once may together exceed the bound by one record each.
    assert most <= 5 + 8


@pytest.mark.parametrize("max_memory_bytes", [0, 1500])
def test_memory_is_bounded(
    max_memory_bytes: int,
    make_saver: Callable[..., TieredSaver],
    redis_url: str,
    postgres_url: str,
    key_prefix: str,
) -> None:
    """I1, I8: what does not fit into memory is re-read from the journal, and every record arrives once, in order."""
    saver = make_saver(max_memory_bytes=max_memory_bytes, flush_max_records=7, sweep_interval=0)
    saver.setup()
    chains = [Chain(saver, f"thread {number}") for number in range(5)]
    acked = []
    with locked_table(postgres_url):
        for _ in range(20):
            for chain in chains:
                acked += [chain.put(), chain.write()]
                stats = saver.stats()
                assert stats.memory_bytes <= max_memory_bytes
        assert stats.backlog_records == 200
        assert stats.backlog_bytes > 10 * max_memory_bytes
        if max_memory_bytes:
            assert stats.memory_bytes > 0
    saver.flush()

    assert_durable(postgres_url, acked)
    rows = read_rows(postgres_url)
    assert [len(rows[name]) for name in rows] == [100, 105, 200]
    assert unflushed(redis_url, key_prefix) == []
    stats = saver.stats()
    assert (stats.backlog_records, stats.backlog_bytes, stats.memory_bytes) == (0, 0, 0)
    assert (stats.flushed_records, stats.adopted_records, stats.lost_records) == (200, 0, 0)


def test_large_records_make_transactions_of_their_own(
    make_saver: Callable[..., TieredSaver], postgres_url: str
) -> None:
    """I8: a transaction's bytes are bounded, a record that is larger by itself goes through nevertheless."""
    saver = make_saver(flush_max_bytes=100_000, flush_linger=0.2, sweep_interval=0)
    saver.setup()
    config = address("red")
    ids = []
    with locked_table(postgres_url):
        for size in (50_000, 300_000, 10, 60_000, 60_000, 10):
            chain = Chain(saver, "red")
            _, checkpoint, metadata, versions = chain.next()
            checkpoint["channel_values"]["log"] = [b"x" * size]
            config = saver.put(config, checkpoint, metadata, versions)
            ids.append((checkpoint["id"], size))
    saver.flush()

    for checkpoint_id, size in ids:
        found = saver.get_tuple(address("red", checkpoint_id))
        assert found is not None
        assert found.checkpoint["channel_values"]["log"] == [b"x" * size]
    assert 3 <= saver.stats().flush_batches <= 6


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_flush_that_does_not_make_it(
    asynchronous: bool, make_saver: Callable[..., TieredSaver], postgres_url: str
) -> None:
    """I7: flush(timeout) raises with the number of records that are missing; the next one finds them done."""
    saver = make_saver(sweep_interval=0)
    saver.setup()

    def flush(timeout: float | None) -> None:
        if asynchronous:
            asyncio.run(saver.aflush(timeout))
        else:
            saver.flush(timeout)

    flush(0.0)  # nothing is missing, so nothing is waited for
    with locked_table(postgres_url):
        acked = fill(saver, Chain(saver, "red"), 7, postgres_url)
        acked += [Chain(saver, "blue").put()]
        for timeout in (0.3, 0.0):
            began = time.monotonic()
            with pytest.raises(FlushTimeoutError, match=r"8 acknowledged records.*safe in the journal") as caught:
                flush(timeout)
            assert caught.value.records == 8
            assert timeout <= time.monotonic() - began < timeout + SLACK
    flush(None)

    assert_durable(postgres_url, acked)
    assert saver.stats().backlog_records == 0


def test_flush_does_not_wait_for_the_linger(make_saver: Callable[..., TieredSaver], postgres_url: str) -> None:
    """I8: whoever waits for a flush is not made to linger, however many transactions and threads it takes."""
    saver = make_saver(flush_linger=3600.0, flush_max_records=3, sweep_interval=0)
    saver.setup()
    chains = [Chain(saver, f"thread {number}") for number in range(5)]
    acked = [record for _ in range(4) for chain in chains for record in (chain.put(), chain.write())]
    began = time.monotonic()

    saver.flush(10.0)

    assert time.monotonic() - began < 5
    assert_durable(postgres_url, acked)
    acked = [record for chain in chains for record in (chain.put(), chain.write())]
    assert len(list(saver.list(None))) == 25
    acked += [chain.put() for chain in chains]
    assert len(list(saver.list(address("thread 0")))) == 6
    saver.flush(10.0)
    assert_durable(postgres_url, acked)


def test_a_flush_of_what_others_wrote_between(
    make_saver: Callable[..., TieredSaver], postgres_url: str, redis_url: str, key_prefix: str
) -> None:
    """I3, I8: records of two savers on one thread, taking turns: each one's flush ends soon, linger or not."""
    first, second = (make_saver(flush_linger=3600.0, sweep_interval=0) for _ in range(2))
    chain = Chain(first, "red")
    acked = []
    for _ in range(5):
        for saver in (first, second):
            chain.saver = saver
            acked += [chain.put(), chain.write()]

    first.flush(5.0)
    second.flush(5.0)

    assert_durable(postgres_url, acked)
    assert unflushed(redis_url, key_prefix) == []
    assert first.stats().flushed_records + second.stats().flushed_records >= 20


def durable_ids(postgres_url: str) -> set[str]:
    """Read the ids of all checkpoints in PostgreSQL."""
    with psycopg.connect(postgres_url) as connection:
        return {row[0] for row in connection.execute("SELECT checkpoint_id FROM checkpoints")}


def test_write_through(make_saver: Callable[..., TieredSaver], postgres_url: str) -> None:
    """In write-through mode each call returns only when another connection sees its rows, sync and async."""
    saver = make_saver(write_mode="through", sweep_interval=0)
    saver.setup()
    with psycopg.connect(postgres_url, autocommit=True) as connection:

        def look() -> tuple[Any, ...]:
            row = connection.execute(
                "SELECT (SELECT count(*) FROM checkpoints), (SELECT count(*) FROM checkpoint_writes)"
            ).fetchone()
            assert row is not None
            return row

        chain = Chain(saver, "red")
        for number in range(10):
            chain.put()
            assert look() == (number + 1, 2 * number)
            chain.write()
            assert look() == (number + 1, 2 * number + 2)

        async def main() -> None:
            for number in range(10, 20):
                await chain.aput()
                assert look() == (number + 1, 2 * number)
                await chain.awrite()
                assert look() == (number + 1, 2 * number + 2)

        asyncio.run(main())
    assert saver.stats().backlog_records == 0


@pytest.mark.parametrize("same_thread", [True, False], ids=["one thread", "twenty threads"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_group_commit(
    same_thread: bool, asynchronous: bool, make_saver: Callable[..., TieredSaver], postgres_url: str
) -> None:
    """Write-through calls at the same moment share transactions: there are fewer of these than calls."""
    saver = make_saver(write_mode="through", sweep_interval=0)
    saver.setup()
    chains = [Chain(saver, "red" if same_thread else f"thread {number}") for number in range(20)]
    acked: list[Any] = []

    async def awrite(chain: Chain) -> None:
        for _ in range(5):
            record = await chain.aput()
            assert record.checkpoint_id in await asyncio.to_thread(durable_ids, postgres_url)
            acked.append(record)

    async def several() -> None:
        await asyncio.gather(*map(awrite, chains))

    def write(number: int) -> None:
        for _ in range(5):
            record = chains[number].put()
            assert record.checkpoint_id in durable_ids(postgres_url)
            acked.append(record)

    if asynchronous:
        asyncio.run(several())
    else:
        in_threads(20, write)

    assert_durable(postgres_url, acked)
    stats = saver.stats()
    assert stats.checkpoints == stats.flushed_records == len(acked) == 100
    assert 1 <= stats.flush_batches < 80


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_write_through_that_does_not_make_it(
    asynchronous: bool, make_saver: Callable[..., TieredSaver], postgres_url: str
) -> None:
    """I1: a write-through call raises after flush_timeout; its record is safe, flushed later, and may be repeated."""
    saver = make_saver(write_mode="through", flush_timeout=0.4, sweep_interval=0)
    saver.setup()
    chain = Chain(saver, "red")
    acked = [chain.put()]
    arguments = chain.next()
    with locked_table(postgres_url):
        began = time.monotonic()
        with pytest.raises(FlushTimeoutError, match=r"safe in the journal.*repeating the call is safe") as caught:
            asyncio.run(saver.aput(*arguments)) if asynchronous else saver.put(*arguments)
        assert 0.4 <= time.monotonic() - began < 0.4 + SLACK
        assert caught.value.records == 1
        found = saver.get_tuple(address("red"))
        assert found is not None
        assert found.checkpoint["channel_values"] == values_of("red", 1)
    wait_until(lambda: saver.stats().backlog_records == 0, message="the record is flushed")
    before = read_rows(postgres_url)

    saver.put(*arguments)

    after = read_rows(postgres_url)
    assert [row[:7] for row in after["checkpoints"]] == [row[:7] for row in before["checkpoints"]]
    assert after["checkpoint_blobs"] == before["checkpoint_blobs"]
    assert_durable(postgres_url, acked)


def test_a_read_that_needs_a_flush_that_hangs(make_saver: Callable[..., TieredSaver], postgres_url: str) -> None:
    """I7, I8: `list` and reads of older checkpoints wait for the flush until their time-out; the latest stays hot."""
    saver = make_saver(flush_timeout=0.4, sweep_interval=0)
    saver.setup()
    chain = Chain(saver, "red")
    with locked_table(postgres_url, "checkpoint_writes"):
        first = chain.put()
        chain.write()
        chain.put()
        for call in (
            lambda: list(saver.list(address("red"))),
            lambda: list(saver.list(None)),
            lambda: saver.get_tuple(address("red", first.checkpoint_id)),
            lambda: asyncio.run(saver.aget_tuple(address("red", first.checkpoint_id))),
            saver.thread_ids,
        ):
            began = time.monotonic()
            with pytest.raises(ColdTierUnavailableError, match="safe in the journal"):
                call()
            assert time.monotonic() - began < 0.4 + SLACK
        began = time.monotonic()
        assert saver.get_tuple(address("red")) is not None
        assert time.monotonic() - began < 0.3
    assert len(list(saver.list(address("red")))) == 2


def test_stats_tell_what_happens(make_saver: Callable[..., TieredSaver], postgres_url: str) -> None:
    """Every counter moves with what it counts, and comes back when what it measures is over."""
    saver = make_saver(sweep_interval=0)
    assert saver.stats() == TieredStats()
    saver.setup()
    assert saver.stats() == TieredStats(generation=1, hot_trusted=True)
    chain = Chain(saver, "red")
    with locked_table(postgres_url):
        fill(saver, chain, 6, postgres_url)
        chain.write()
        began = time.monotonic()
        stats = saver.stats()
        assert (stats.checkpoints, stats.writes, stats.backlog_records) == (6, 1, 7)
        assert 7 * 100 < stats.backlog_bytes < 7 * 2000
        assert stats.memory_bytes == stats.backlog_bytes
        assert (stats.flushed_records, stats.flush_batches, stats.flushed_bytes) == (0, 0, 0)
        wait_until(lambda: saver.stats().flush_lag_seconds > stats.flush_lag_seconds, message="the lag grows")
        later = saver.stats()
        assert later.flush_lag_seconds - stats.flush_lag_seconds <= time.monotonic() - began + 0.01
    saver.flush()
    done = saver.stats()
    assert (done.backlog_records, done.backlog_bytes, done.memory_bytes, done.flush_lag_seconds) == (0, 0, 0, 0.0)
    assert (done.flushed_records, done.flushed_bytes) == (7, stats.backlog_bytes)
    assert 1 <= done.flush_batches <= 7
    assert (done.adopted_records, done.lost_records, done.flush_errors) == (0, 0, 0)
    assert done.flusher_healthy

    saver.get_tuple(address("red"))
    saver.get_tuple(chain.config)
    assert (saver.stats().hot_hits, saver.stats().hot_misses, saver.stats().cold_reads) == (2, 0, 0)
    saver.get_tuple(address("nobody"))
    assert (saver.stats().hot_hits, saver.stats().hot_misses, saver.stats().cold_reads) == (2, 1, 1)
    list(saver.list(address("red")))
    assert saver.stats().cold_reads == 2
    assert saver.stats().cold_errors == 0


def test_stats_of_a_flush_that_fails(
    make_saver: Callable[..., TieredSaver], postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """I1: failures are counted and shown, in one log line each way, and the flusher recovers by itself."""
    saver = make_saver(sweep_interval=0, postgres_statement_timeout=0.2)
    saver.setup()
    with locked_table(postgres_url):
        acked = [Chain(saver, "red").put()]
        wait_until(lambda: saver.stats().flush_errors >= 3, message="the flush fails three times")
        stats = saver.stats()
        assert not stats.flusher_healthy
        assert stats.backlog_records == 1
        assert stats.quarantined_threads == ()
    wait_until(lambda: saver.stats().backlog_records == 0, message="the flusher recovers")

    wait_until(lambda: saver.stats().flusher_healthy, message="the flusher says that it is healthy")
    assert_durable(postgres_url, acked)
    lines = [record.getMessage() for record in caplog.records if record.name.endswith(".flusher")]
    assert [line.split(" has")[0].split(" goes")[0] for line in lines] == ["Flushing", "Flushing"]


def test_a_blocked_thread_does_not_hold_up_the_process(
    make_saver: Callable[..., TieredSaver], postgres_url: str
) -> None:
    """I8: put stays fast while a flush hangs, whatever thread it is for."""
    saver = make_saver(sweep_interval=0)
    saver.setup()
    with locked_table(postgres_url):
        acked = fill(saver, Chain(saver, "red"), 1, postgres_url)
        slowest = 0.0
        for number in range(100):
            chain = Chain(saver, f"thread {number % 10}")
            began = time.monotonic()
            acked.append(chain.put())
            slowest = max(slowest, time.monotonic() - began)
    assert slowest < 0.5
    saver.flush()
    assert_durable(postgres_url, acked)
    assert threading.active_count() < 40
