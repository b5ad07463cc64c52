"""Servers that go away, stall, refuse, and come back, with what they had or with less; two savers stand for processes.

Each test has a key prefix and a schema of its own on the module's servers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from langgraph.checkpoint.postgres import PostgresSaver
from psycopg.rows import dict_row

from langgraph_tiered_saver import (
    AcknowledgementShortfallError,
    BacklogFullError,
    BothTiersUnavailableError,
    ColdTierUnavailableError,
    FlushTimeoutError,
    HotTierUnavailableError,
    InvalidInputError,
    TieredSaver,
)
from langgraph_tiered_saver.cold import direct, generations, pool, writer
from langgraph_tiered_saver.cold.generations import Generation
from langgraph_tiered_saver.hot import tier
from langgraph_tiered_saver.records import CheckpointRecord
from tests.fault.proxy import Proxy
from tests.fault.stack import RedisServer, Stack
from tests.fault.workers import Chain, address
from tests.support import wait_until

TIMEOUT = 1.0  # redis_timeout of these tests
PROBE = 0.5  # a Redis that was away gets another look for so long


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with Stack() as stack:
        yield stack


class Place:
    """A key prefix and a schema on the stack, and the savers that were opened there."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.name = f"o{uuid.uuid4().hex}"
        self.savers: list[TieredSaver] = []

    def open(self, redis_url: str = "", postgres_url: str = "", **settings: Any) -> TieredSaver:
        settings = {
            "redis_timeout": TIMEOUT,
            "postgres_timeout": 2.0,
            "poll_interval": 0.2,
            "flush_timeout": 10.0,
            "close_timeout": 2.0,
            "key_prefix": self.name,
            "postgres_schema": self.name,
            **settings,
        }
        urls = redis_url or self.stack.redis.url, postgres_url or self.stack.postgres.url
        saver = TieredSaver.from_conn_string(*urls, **settings)
        self.savers.append(saver)
        return saver

    def rows(self, statement: str) -> list[dict[str, Any]]:
        with self.stack.postgres.connect(autocommit=True) as connection:
            connection.execute(f"SET search_path TO {self.name}")
            with connection.cursor(row_factory=dict_row) as cursor:
                return cursor.execute(statement).fetchall()

    def assert_whole(self, *chains: Chain) -> None:
        """Every acknowledged checkpoint and write is in PostgreSQL, once, and I2 holds."""
        for saver in self.savers:
            saver.flush()
        url = f"{self.stack.postgres.url}?options=-csearch_path%3D{self.name}"
        with PostgresSaver.from_conn_string(url) as reference:
            for chain in chains:
                found = list(reference.list(address(chain.thread_id)))
                assert [at.config["configurable"]["checkpoint_id"] for at in found] == chain.ids[::-1]
                assert [at.checkpoint["channel_values"]["step"] for at in found][::-1] == list(range(len(chain.ids)))
        assert (
            self.rows(
                """SELECT c.checkpoint_id FROM checkpoints c WHERE tiered_blobs > (
                SELECT count(*) FROM jsonb_each_text(c.checkpoint -> 'channel_versions') v JOIN checkpoint_blobs b
                ON (b.thread_id, b.checkpoint_ns, b.channel, b.version)
                    = (c.thread_id, c.checkpoint_ns, v.key, v.value))"""
            )
            == []
        )


class Steps(Chain):
    """A chain that remembers the ids it was acknowledged."""

    def __init__(self, saver: TieredSaver, thread_id: str) -> None:
        super().__init__(saver, thread_id)
        self.thread_id = thread_id
        self.ids: list[str] = []

    def next(self) -> Any:
        config, checkpoint, metadata, changed = super().next()
        checkpoint["v"] = 4  # as graphs write it; older formats stay cold
        return config, checkpoint, metadata, changed

    def put(self) -> Any:
        acked = super().put()
        self.ids.append(self.config["configurable"]["checkpoint_id"])
        return acked

    async def aput(self) -> Any:
        acked = await super().aput()
        self.ids.append(self.config["configurable"]["checkpoint_id"])
        return acked

    def latest(self, saver: TieredSaver | None = None) -> str | None:
        found = (saver or self.saver).get_tuple(address(self.thread_id))
        return None if found is None else found.config["configurable"]["checkpoint_id"]


@pytest.fixture
def place(stack: Stack) -> Iterator[Place]:
    place = Place(stack)
    yield place
    for saver in place.savers:
        saver.close()
    stack.redis.flushall()


@pytest.fixture
def proxy(stack: Stack) -> Iterator[Proxy]:
    with Proxy(stack.redis.port) as proxy:
        yield proxy


def through(url: str, proxy: Proxy, port: int) -> str:
    return url.replace(f":{port}", f":{proxy.port}")


# --- Redis away ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lost_authentication(server: RedisServer) -> Iterator[None]:
    with server.client() as client:
        client.acl_setuser("default", enabled=True, nopass=False, reset_passwords=True, passwords=["+another"])
        client.client_kill_filter(_type="normal", skipme=True)
        try:
            yield
        finally:
            client.acl_setuser("default", enabled=True, nopass=True)


@contextlib.contextmanager
def misconfigured(server: RedisServer) -> Iterator[None]:
    """Let a background save fail, after which Redis refuses writes."""
    with server.client() as client:
        before = client.config_get("save")["save"]
        blocked = Path(client.config_get("dir")["dir"]) / client.config_get("dbfilename")["dbfilename"]
        blocked.unlink(missing_ok=True)
        (blocked / "inside").mkdir(parents=True)
        client.config_set("save", "3600 1")
        client.bgsave()
        wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
        try:
            yield
        finally:
            client.config_set("save", before)
            (blocked / "inside").rmdir()
            blocked.rmdir()
            client.bgsave()
            wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "ok")


@contextlib.contextmanager
def loading(server: RedisServer, *, as_replica: bool = False) -> Iterator[None]:
    """Let the server load data, after a restart or, on the connections there are, as a replica."""
    with contextlib.ExitStack() as others:
        if as_replica:
            server.load_slowly_from(others.enter_context(RedisServer()))
        else:
            server.restart_loading()
        try:
            yield
            assert server.is_loading(), "it did so all the time"
        finally:
            server.finish_loading()


@contextlib.contextmanager
def redis_outage(kind: str, stack: Stack, proxy: Proxy) -> Iterator[None]:
    server = stack.redis
    if kind == "refused":
        proxy.refuse()
        proxy.cut()
        try:
            yield
        finally:
            proxy.heal()
    elif kind == "deaf":
        proxy.deaf()
        try:
            yield
        finally:
            proxy.heal()
    elif kind == "stalled":
        server.pause()
        try:
            yield
        finally:
            server.go_on()
    elif kind == "killed":
        server.kill()
        try:
            yield
        finally:
            server.start()
    elif kind == "OOM":
        server.config_set(maxmemory=1)
        try:
            yield
        finally:
            server.config_set(maxmemory=0)
    elif kind == "READONLY":
        with server.client() as client:
            client.replicaof("127.0.0.1", "1")
            try:
                yield
            finally:
                client.replicaof("NO", "ONE")
    elif kind == "MISCONF":
        with misconfigured(server):
            yield
    elif kind.startswith("LOADING"):
        with loading(server, as_replica=kind == "LOADING replica"):
            yield
    else:
        with lost_authentication(server):
            yield


OUTAGES = [
    "refused",
    "deaf",
    "stalled",
    "killed",
    "LOADING",
    "LOADING replica",
    "OOM",
    "READONLY",
    "MISCONF",
    "authentication",
]


@pytest.mark.parametrize("kind", OUTAGES)
def test_writes_and_reads_go_on_while_redis_is_away(
    kind: str, stack: Stack, place: Place, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """I6, I9: no call fails, one pays the time-out, all is durable when it returns; then Redis is used again."""
    caplog.set_level(logging.WARNING, "langgraph_tiered_saver.health")
    saver = place.open(through(stack.redis.url, proxy, stack.redis.port))
    chain, other = Steps(saver, "red"), Steps(saver, "blue")
    for _ in range(3):
        chain.put(), chain.write()
    other.put()
    # The servers have only just started, and a busy machine may let this process stand still meanwhile.
    wait_until(lambda: saver.stats().hot_trusted)
    caplog.clear()
    with redis_outage(kind, stack, proxy):
        began = time.monotonic()
        chain.put()
        first = time.monotonic() - began
        began = time.monotonic()
        for _ in range(4):
            chain.put(), chain.write()
            assert chain.latest() == chain.ids[-1]
        asyncio.run(chain.aput())
        assert len(list(saver.list(address("red")))) == len(chain.ids)
        assert other.latest() == other.ids[-1]
        rest = time.monotonic() - began
        stats = saver.stats()
        assert (stats.hot_trusted, stats.backlog_records) == (False, 0)
        assert stats.direct_writes >= 8
        assert len(place.rows("SELECT 1 FROM checkpoints WHERE thread_id = 'red'")) == len(chain.ids)
    assert first < TIMEOUT + PROBE + 1.5
    assert rest < 3.0
    wait_until(lambda: saver.stats().hot_trusted, 10, "Redis is trusted again")
    chain.put(), other.put()
    before = saver.stats()
    assert (chain.latest(), other.latest()) == (chain.ids[-1], other.ids[-1])
    assert chain.latest() == chain.ids[-1]
    assert saver.stats().hot_hits > before.hot_hits
    place.assert_whole(chain, other)
    lines = [record.message for record in caplog.records if "trusted" in record.message]
    assert len(lines) == 2, lines


def test_fallback_off_raises(stack: Stack, place: Place, proxy: Proxy) -> None:
    """I7: with `fallback=False` every call says that Redis is away, and goes on when it is back."""
    saver = place.open(through(stack.redis.url, proxy, stack.redis.port), fallback=False)
    chain = Steps(saver, "red")
    chain.put()
    proxy.refuse()
    proxy.cut()
    for call in (lambda: chain.latest(), lambda: saver.put_writes(chain.config, [("log", 1)], "task")):
        with pytest.raises(HotTierUnavailableError, match="nothing was acknowledged"):
            call()
    assert saver.stats().direct_writes == 0
    proxy.heal()
    wait_until(lambda: saver.stats().hot_trusted)
    assert chain.latest() == chain.ids[-1]


def test_a_saver_that_starts_while_redis_is_away(stack: Stack, place: Place, proxy: Proxy) -> None:
    """I9: a new process resumes from PostgreSQL what another one left there."""
    first = place.open()
    chain = Steps(first, "red")
    chain.put()
    first.flush()
    proxy.refuse()
    saver = place.open(through(stack.redis.url, proxy, stack.redis.port))
    chain.saver = saver
    assert chain.latest() == chain.ids[-1]
    chain.put()
    # The bound for a process that reaches Redis while another one does not is the poll interval.
    wait_until(lambda: chain.latest(first) == chain.ids[-1], 3)
    proxy.heal()
    wait_until(lambda: saver.stats().hot_trusted and first.stats().hot_trusted)
    place.assert_whole(chain)


def test_a_saver_that_starts_while_redis_loads(stack: Stack, place: Place) -> None:
    """I9: a Redis that lets connections in and answers LOADING does not keep a new process waiting."""
    first = place.open()
    chain = Steps(first, "red")
    chain.put()
    first.flush()
    with loading(stack.redis):
        saver = place.open()
        began = time.monotonic()
        chain.saver = saver
        assert chain.latest() == chain.ids[-1]
        chain.put()
        assert time.monotonic() - began < 3.0
        assert not saver.stats().hot_trusted
        assert "BusyLoadingError" in str(saver._source.current().health.problem)
    wait_until(lambda: saver.stats().hot_trusted and first.stats().hot_trusted, 10, "Redis is trusted")
    assert chain.latest(first) == chain.ids[-1]
    place.assert_whole(chain)


def test_loading_is_refused_on_connections_that_there_are(stack: Stack, place: Place) -> None:
    """I7: a server that resynchronises refuses synchronous and asynchronous writes at once, and they say why."""
    savers = [place.open(fallback=False) for _ in range(2)]
    chains = [Steps(saver, f"thread {number}") for number, saver in enumerate(savers)]

    async def work() -> list[float]:
        for chain in chains:
            await chain.aput()
            chain.put()
        refused = [chain.next() for chain in chains]
        seconds = []
        with loading(stack.redis, as_replica=True):
            began = time.monotonic()
            with pytest.raises(HotTierUnavailableError, match=r"(BusyLoadingError|LOADING).*nothing was acknowledged"):
                savers[0].put(*refused[0])
            seconds.append(time.monotonic() - began)
            began = time.monotonic()
            with pytest.raises(HotTierUnavailableError, match=r"(BusyLoadingError|LOADING).*nothing was acknowledged"):
                await savers[1].aput(*refused[1])
            seconds.append(time.monotonic() - began)
        return seconds

    assert max(asyncio.run(work())) < TIMEOUT + PROBE
    wait_until(lambda: all(saver.stats().hot_trusted for saver in savers), 10, "Redis is trusted again")
    assert [chain.latest() for chain in chains] == [chain.ids[-1] for chain in chains]
    place.assert_whole(*chains)


def test_the_reply_is_lost(stack: Stack, place: Place, proxy: Proxy) -> None:
    """I4: a script that was executed though its reply was lost is repeated, and leaves one checkpoint."""
    saver = place.open(through(stack.redis.url, proxy, stack.redis.port))
    chain = Steps(saver, "red")
    chain.put()
    for count in (1, 3):
        proxy.drop_reply(count, b"EVALSHA")
        chain.put(), chain.write()
        proxy.heal()
        assert chain.latest() == chain.ids[-1]
    place.assert_whole(chain)


# --- Redis back with less --------------------------------------------------------------------------------------------


@pytest.fixture
def second(stack: Stack) -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


def lose(kind: str, stack: Stack, second: RedisServer, proxy: Proxy) -> None:
    if kind == "wiped":
        stack.redis.restart_wiped()
    elif kind == "truncated":
        stack.redis.restart_truncated(0.5)
    elif kind == "restarted":
        stack.redis.restart()
    elif kind == "flushed":
        stack.redis.flushall()
    elif kind == "swapped":
        proxy.retarget(second.port)
        proxy.cut()
    else:
        second.promote()
        proxy.retarget(second.port)
        proxy.cut()


@pytest.mark.parametrize("kind", ["wiped", "truncated", "restarted", "flushed", "swapped", "lagging replica"])
def test_redis_back_with_less(kind: str, stack: Stack, place: Place, proxy: Proxy, second: RedisServer) -> None:
    """I1, I6: what Redis lost is flushed by the writer that lives, and no process reads an older checkpoint."""
    url = through(stack.redis.url, proxy, stack.redis.port)
    writer, reader = place.open(url), place.open(url)
    chains = [Steps(writer, f"thread {number}") for number in range(3)]
    for chain in chains:
        chain.put(), chain.write()
        assert chain.latest(reader) == chain.ids[-1]
    writer.flush()
    if kind == "lagging replica":
        second.replicate(stack.redis.port)
    stack.redis.sync_from_now()
    if kind == "lagging replica":
        with second.client() as client:
            client.replicaof("127.0.0.1", "1")  # its link is cut, and it stays behind
    stack.postgres.pause()
    for chain in chains:
        chain.put(), chain.write()
    held = writer.stats().backlog_records
    lose(kind, stack, second, proxy)
    stack.postgres.go_on()
    with ThreadPoolExecutor(3) as threads:
        seen = list(threads.map(lambda chain: (chain.latest(reader), chain.latest(writer)), chains))
    assert held == 6
    assert seen == [(chain.ids[-1],) * 2 for chain in chains]
    for chain in chains:
        chain.put()
    wait_until(lambda: writer.stats().hot_trusted and reader.stats().hot_trusted, 10)
    assert [chain.latest(reader) for chain in chains] == [chain.ids[-1] for chain in chains]
    place.assert_whole(*chains)
    assert writer.stats().lost_records == 0


def test_what_memory_could_not_keep_is_counted(stack: Stack, place: Place, proxy: Proxy) -> None:
    """I7: records that only a wiped Redis had are lost, counted and logged; nothing incomplete is shown (I2)."""
    saver = place.open(max_memory_bytes=600, flush_linger=600.0, sweep_interval=0)
    chain = Steps(saver, "red")
    chain.put()
    saver.flush()
    for _ in range(4):
        chain.put()
    stack.redis.flushall()
    found = saver.get_tuple(address("red"))
    assert found is not None
    assert found.config["configurable"]["checkpoint_id"] in chain.ids
    assert saver.stats().lost_records == 4
    place.assert_whole()


# --- PostgreSQL away -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def postgres_outage(kind: str, stack: Stack) -> Iterator[None]:
    server = stack.postgres
    if kind == "crashed":
        server.crash()
        yield
    elif kind == "down":
        server.kill()
        try:
            yield
        finally:
            server.start()
    elif kind == "stalled":
        server.pause()
        try:
            yield
        finally:
            server.go_on()
    elif kind == "out of connections":
        with server.hold_connections():
            yield
    elif kind == "read-only":
        server.set_read_only(True)
        try:
            yield
        finally:
            server.set_read_only(False)
    else:
        server.raise_in_writes(kind, 4, [])
        yield


@pytest.mark.parametrize("kind", ["crashed", "down", "stalled", "out of connections", "read-only"])
def test_writes_and_hot_reads_go_on_while_postgresql_is_away(kind: str, stack: Stack, place: Place) -> None:
    """I1, I4: acknowledgements and hot reads go on at Redis' pace; the flusher resumes, nothing lost or doubled."""
    saver = place.open(postgres_statement_timeout=1.0)
    chain = Steps(saver, "red")
    chain.put()
    saver.flush()
    with postgres_outage(kind, stack):
        began = time.monotonic()
        for _ in range(20):
            chain.put(), chain.write()
            assert chain.latest() == chain.ids[-1]
        assert time.monotonic() - began < 2.0
    wait_until(lambda: saver.stats().backlog_records == 0, 15, "the flusher resumes")
    assert len(list(saver.list(address("red")))) == len(chain.ids)
    assert saver.stats().hot_trusted
    place.assert_whole(chain)


def test_cold_reads_fail_at_once_while_the_breaker_is_open(stack: Stack, place: Place) -> None:
    """I7, I8: after one failure `list` and reads of old checkpoints raise at once; later they work by themselves."""
    saver = place.open()
    chain = Steps(saver, "red")
    chain.put(), chain.put()
    saver.flush()
    stack.postgres.kill()
    calls: list[Callable[[], Any]] = [
        lambda: list(saver.list(address("red"))),
        lambda: saver.get_tuple(address("red", chain.ids[0])),
        lambda: saver.get_tuple(address("nobody")),
        lambda: saver.thread_ids(),
    ]
    try:
        with pytest.raises(ColdTierUnavailableError):
            calls[0]()
        for call in calls:
            began = time.monotonic()
            with pytest.raises(ColdTierUnavailableError):
                call()
            assert time.monotonic() - began < 0.3
        assert not saver.stats().cold_available
        assert chain.latest() == chain.ids[-1]
    finally:
        stack.postgres.start()
    wait_until(lambda: saver.stats().cold_available, 10)
    assert len(calls[0]()) == 2


def test_the_backlog_bound_holds(stack: Stack, place: Place) -> None:
    """I8: at the bound a write waits, then says so; what was acknowledged is flushed when PostgreSQL is back."""
    saver = place.open(max_backlog_records=10, backlog_timeout=0.3)
    chain = Steps(saver, "red")
    chain.put()
    saver.flush()
    with postgres_outage("stalled", stack):
        with pytest.raises(BacklogFullError):  # noqa: PT012 - which one it is depends on the flusher
            for _ in range(20):
                chain.put()
        assert saver.stats().backlog_records <= 11
    place.assert_whole(chain)


# --- both away -------------------------------------------------------------------------------------------------------


def test_both_away(stack: Stack, place: Place, proxy: Proxy) -> None:
    """I7: with neither server a write fails loudly; then the thread resumes from the last acknowledged checkpoint."""
    saver = place.open(through(stack.redis.url, proxy, stack.redis.port))
    chain = Steps(saver, "red")
    chain.put()
    stack.postgres.kill()
    try:
        chain.put()
        proxy.refuse()
        proxy.cut()
        arguments = chain.next()
        for _ in range(2):
            with pytest.raises(BothTiersUnavailableError):
                saver.put(*arguments)
        with pytest.raises(BothTiersUnavailableError):
            chain.latest()
        chain.step -= 1
    finally:
        stack.postgres.start()
    # PostgreSQL alone is enough to go on, with what this process still holds.
    wait_until(lambda: saver.stats().cold_available, 10)
    assert chain.latest() == chain.ids[-1]
    proxy.heal()
    chain.put()
    wait_until(lambda: saver.stats().hot_trusted, 10)
    place.assert_whole(chain)


# --- durability on demand --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channel", ["__interrupt__", "__error__", "__resume__", "ordinary"])
def test_what_a_run_stops_for_is_durable(channel: str, place: Place) -> None:
    """An interrupt, an error or an answer is in PostgreSQL, with all before it, when its call returns."""
    saver = place.open(flush_linger=600.0, sweep_interval=0)
    chain = Steps(saver, "red")
    chain.put()
    saver.put_writes(chain.config, [(channel, "value")], "task")
    waits = channel != "ordinary"
    assert saver.stats().backlog_records == (0 if waits else 2)
    assert len(place.rows("SELECT 1 FROM checkpoint_writes")) == waits


def test_an_interrupt_does_not_wait_for_a_postgresql_that_is_away(stack: Stack, place: Place) -> None:
    """A run that stops while PostgreSQL is away goes on, counted and logged; with `durable_strict` it says so."""
    lenient, strict = place.open(), place.open(durable_strict=True, flush_timeout=1.0)
    chains = [Steps(lenient, "red"), Steps(strict, "blue")]
    for chain in chains:
        chain.put()
        chain.saver.flush()
    stack.postgres.kill()
    try:
        lenient.put_writes(chains[0].config, [("__interrupt__", "value")], "task")
        with pytest.raises(FlushTimeoutError):
            strict.put_writes(chains[1].config, [("__interrupt__", "value")], "task")
    finally:
        stack.postgres.start()
    assert lenient.stats().not_durable == 1
    for saver in (lenient, strict):
        saver.flush(15)
    assert len(place.rows("SELECT 1 FROM checkpoint_writes")) == 2


def test_wait_durable(stack: Stack, place: Place) -> None:
    """Waiting for a checkpoint brings it to PostgreSQL, whoever wrote it; what is not there cannot be waited for."""
    writer, other = place.open(flush_linger=600.0, sweep_interval=0), place.open()
    chain = Steps(writer, "red")
    chain.put(), chain.put()
    other.wait_durable(chain.config)
    assert len(place.rows("SELECT 1 FROM checkpoints")) == 2
    chain.put()
    asyncio.run(writer.await_durable(address("red")))
    assert len(place.rows("SELECT 1 FROM checkpoints")) == 3
    with pytest.raises(InvalidInputError, match="no checkpoint"):
        writer.wait_durable(address("red", "nothing"))
    stack.postgres.pause()
    try:
        chain.put()
        with pytest.raises(FlushTimeoutError):
            writer.wait_durable(chain.config, timeout=0.5)
    finally:
        stack.postgres.go_on()


def test_replicas_are_waited_for(
    stack: Stack, place: Place, second: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """`hot_ack=1` returns once the replica has the write; a shortfall is logged, or raised in strict mode."""
    second.replicate(stack.redis.port)
    lenient = place.open(hot_ack=1, hot_ack_timeout=0.5)
    strict = place.open(hot_ack=1, hot_ack_timeout=0.2, hot_ack_strict=True)
    chain = Steps(strict, "red")
    chain.put()
    with second.client() as replica:
        assert any(b":hot:" in key for key in replica.scan_iter(f"{{{place.name}:*", 1000))
    second.promote()
    with pytest.raises(AcknowledgementShortfallError, match="0 of 1 replicas"):
        chain.put()
    Steps(lenient, "blue").put()
    assert lenient.stats().hot_ack_shortfalls == 1
    aof = place.open(hot_ack_aof=True, hot_ack_timeout=2.0, hot_ack_strict=True)
    Steps(aof, "green").put()


# --- under load ------------------------------------------------------------------------------------------------------


def test_many_threads_while_redis_comes_and_goes(stack: Stack, place: Place) -> None:
    """I1, I6: eight writers in two savers through three losses of Redis: nothing fails, nothing is lost or stale."""
    savers = [place.open(), place.open()]
    chains = [Steps(savers[number % 2], f"thread {number}") for number in range(8)]
    done = threading.Event()

    def work(chain: Steps) -> None:
        while not done.is_set():
            chain.put(), chain.write()
            for saver in savers:
                assert chain.latest(saver) == chain.ids[-1]

    with ThreadPoolExecutor(8) as threads:
        futures = [threads.submit(work, chain) for chain in chains]
        try:
            for number, lose in enumerate((stack.redis.flushall, stack.redis.restart, stack.redis.restart_wiped), 1):
                wait_until(lambda number=number: all(len(chain.ids) >= 2 * number for chain in chains), 60)  # type: ignore[misc]
                lose()
            wait_until(lambda: all(saver.stats().hot_trusted for saver in savers), 30)
            wait_until(lambda: all(len(chain.ids) >= 8 for chain in chains), 60)
        finally:
            done.set()
        for future in futures:
            future.result(20)
    place.assert_whole(*chains)


STANDING_STILL = """
import sys
from langgraph_tiered_saver import TieredSaver
redis_url, postgres_url, name = sys.argv[1:]
settings = {"key_prefix": name, "postgres_schema": name, "poll_interval": 0.2, "redis_timeout": 1.0}
saver = TieredSaver.from_conn_string(redis_url, postgres_url, **settings)
for _ in sys.stdin:
    found = saver.get_tuple({"configurable": {"thread_id": "red"}})
    print(found.config["configurable"]["checkpoint_id"], saver.stats().hot_trusted, flush=True)
"""


def test_a_process_that_stood_still_does_not_answer_from_what_was(stack: Stack, place: Place, proxy: Proxy) -> None:
    """I6: stopped while the others went past Redis, which kept its old state, a process asks before it trusts again."""
    writer = place.open(through(stack.redis.url, proxy, stack.redis.port))
    chain = Steps(writer, "red")
    chain.put(), writer.flush()
    command = [sys.executable, "-c", STANDING_STILL, stack.redis.url, stack.postgres.url, place.name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        try:
            for _ in range(2):
                print(file=other.stdin, flush=True)
                assert other.stdout.readline() == f"{chain.ids[-1]} True\n"
            proxy.refuse()
            proxy.cut()
            other.send_signal(signal.SIGSTOP)
            chain.put()  # waits until the other one counts as dead
            chain.put()
            print(file=other.stdin, flush=True)
            other.send_signal(signal.SIGCONT)
            assert other.stdout.readline().split()[0] == chain.ids[-1]
        finally:
            other.kill()


WRITING = """
import sys
from langgraph_tiered_saver import TieredSaver
from tests.fault.test_outages import Steps
redis_url, postgres_url, name = sys.argv[1:]
settings = {"key_prefix": name, "postgres_schema": name, "poll_interval": 0.2, "redis_timeout": 1.0}
saver = TieredSaver.from_conn_string(redis_url, postgres_url, **settings)
chain = Steps(saver, "red")
for _ in sys.stdin:
    chain.put()
    print(chain.ids[-1], flush=True)
"""


ROW_OF_RED = "SELECT 1 FROM tiered_threads WHERE thread_id = 'red' FOR UPDATE"


@contextlib.contextmanager
def holding_up(place: Place, lock: str) -> Iterator[None]:
    """Keep a flush waiting in the middle of its transaction, from when it has come there on."""
    with place.stack.postgres.connect(autocommit=False) as connection:
        connection.execute(f"SET search_path TO {place.name}")
        connection.execute(lock)
        yield


def wait_until_held_up(place: Place) -> None:
    waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    wait_until(lambda: place.rows(waiting), message="the flush waits")


@pytest.mark.parametrize("how", ["stopped", "cut off"])
def test_a_process_that_stood_still_in_a_flush(how: str, stack: Stack, place: Place, proxy: Proxy) -> None:
    """I6: what it commits after the others have opened a generation without it ends that generation."""
    saver = place.open(through(stack.redis.url, proxy, stack.redis.port))
    red = Steps(saver, "red")
    with Proxy(stack.redis.port) as link, Proxy(stack.postgres.port) as cold_link:
        urls = (
            through(stack.redis.url, link, stack.redis.port),
            through(stack.postgres.url, cold_link, stack.postgres.port),
        )
        command = [sys.executable, "-c", WRITING, *urls, place.name]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdin is not None
            assert other.stdout is not None
            try:
                print(file=other.stdin, flush=True)
                before = other.stdout.readline().strip()
                saver.wait_durable(address("red", before))
                with holding_up(place, ROW_OF_RED):
                    print(file=other.stdin, flush=True)
                    wait_until_held_up(place)
                    if how == "stopped":
                        other.send_signal(signal.SIGSTOP)
                    cold_link.deaf()
                    proxy.refuse()
                    proxy.cut()
                    assert red.latest() == before, "it counts as dead, and what it holds does not count"
                    stack.redis.flushall()
                    proxy.heal()
                    wait_until(lambda: saver.stats().hot_trusted)
                    assert red.latest() == before
                    hits = saver.stats().hot_hits
                    assert red.latest() == before
                    assert saver.stats().hot_hits > hits
                # It looks at Redis a little later than its flush ends, with nothing left that it had to flush first.
                link.delay(0.05)
                cold_link.heal()
                other.send_signal(signal.SIGCONT)
                after = other.stdout.readline().strip()
                assert after != before
                wait_until(lambda: red.latest() == after, 5, "the others see it")
            finally:
                other.kill()


def test_opening_a_generation_does_not_wait_for_a_flush(stack: Stack, place: Place) -> None:
    """I6, I8: one that stands still in its transaction holds nobody up, and hears what has been opened meanwhile."""
    saver = place.open()
    chain = Steps(saver, "red")
    chain.put(), saver.flush()
    number = place.rows("SELECT number FROM tiered_generation")[0]["number"]
    row = place.rows("SELECT * FROM checkpoints")[0]
    record = CheckpointRecord("", row["checkpoint_id"], "", b"{}", b"{}", 0, ())
    batch = [writer.ThreadRecords("red", 0, [writer.Journaled(1, number, record, b"")])]
    saver.close()
    options = {"autocommit": True, "row_factory": dict_row, "options": f"-csearch_path={place.name}"}
    with (
        stack.postgres.connect(**options) as flushing,
        stack.postgres.connect(**options) as opening,
        ThreadPoolExecutor(1) as thread,
    ):
        with holding_up(place, ROW_OF_RED):
            written = thread.submit(writer.write, flushing, batch, statement_timeout=10.0)
            wait_until_held_up(place)
            began = time.monotonic()
            generations.start(opening, number)
            opened = generations.open_generation(opening, number + 1, 0.0)
            assert time.monotonic() - began < 1.0
            assert opened == Generation(number + 1, opened=True)
            assert not written.done()
        assert written.result(10).generation == opened


@pytest.fixture
def stopped_flush(stack: Stack, place: Place) -> Iterator[None]:
    """A process that is stopped in the middle of a flush of the thread `red`, and whose step does not count."""
    command = [sys.executable, "-c", WRITING, stack.redis.url, stack.postgres.url, place.name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        try:
            with holding_up(place, ROW_OF_RED):
                print(file=other.stdin, flush=True)
                wait_until_held_up(place)
                other.send_signal(signal.SIGSTOP)
            yield
        finally:
            other.kill()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "MOST_IDLE", 1.0)


def test_a_thread_is_not_held_up_by_a_stopped_flush(
    stack: Stack, place: Place, proxy: Proxy, request: pytest.FixtureRequest
) -> None:
    """I8: PostgreSQL ends the transaction of a process that stands still, so that the others can write its threads."""
    saver = place.open(through(stack.redis.url, proxy, stack.redis.port))
    chain = Steps(saver, "red")
    chain.put(), saver.flush()
    request.getfixturevalue("stopped_flush")
    proxy.refuse()
    proxy.cut()
    began = time.monotonic()
    chain.put()
    assert time.monotonic() - began < pool.MOST_IDLE + 3.0


@pytest.mark.usefixtures("quick")
def test_an_opening_that_stands_still_ends(stack: Stack, place: Place, proxy: Proxy) -> None:
    """I8: a process that is stopped while it opens a generation does not keep the others from writing past Redis."""
    saver = place.open(through(stack.redis.url, proxy, stack.redis.port), postgres_statement_timeout=5.0)
    chain = Steps(saver, "red")
    chain.put(), saver.flush()
    number = place.rows("SELECT number FROM tiered_generation")[0]["number"]
    proxy.refuse()
    proxy.cut()
    chain.put()
    stopped, resumed = threading.Event(), threading.Event()

    def stand_still() -> None:
        stopped.set()
        assert resumed.wait(20)

    def work() -> None:
        options = {"autocommit": True, "row_factory": dict_row, "options": f"-csearch_path={place.name}"}
        with stack.postgres.connect(**options) as connection:
            generations.open_generation(connection, number + 1, 0.0, stand_still)

    with ThreadPoolExecutor(1) as thread:
        opening = thread.submit(work)
        try:
            assert stopped.wait(10)
            began = time.monotonic()
            chain.put()
            assert 0.5 < time.monotonic() - began < 4.0
        finally:
            resumed.set()
        with pytest.raises(psycopg.Error):
            opening.result(10)
    proxy.heal()
    wait_until(lambda: saver.stats().hot_trusted, 10)
    place.assert_whole(chain)


@pytest.mark.usefixtures("quick")
def test_a_write_past_redis_that_stood_still_is_repeated(
    stack: Stack, place: Place, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I7: a process that was stopped in a transaction, which PostgreSQL ended, goes on when it runs again."""
    saver = place.open(through(stack.redis.url, proxy, stack.redis.port))
    chain = Steps(saver, "red")
    chain.put()
    proxy.refuse()
    proxy.cut()
    chain.put()
    check, checks = direct.check, []

    def stand_still(connection: Any, number: int) -> None:
        check(connection, number)
        checks.append(number)
        if len(checks) == 1:
            time.sleep(1.5 * pool.MOST_IDLE)

    monkeypatch.setattr(direct, "check", stand_still)
    saver.put(*(arguments := chain.next()))
    chain.ids.append(arguments[1]["id"])
    assert len(checks) == 2
    proxy.heal()
    place.assert_whole(chain)


# --- the end of an outage --------------------------------------------------------------------------------------------

HELD = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND granted"


def test_a_process_that_stands_still_while_it_opens_a_generation(stack: Stack, place: Place) -> None:
    """I8: it keeps the others waiting for a moment only, and does not open it afterwards."""
    place.open().setup()
    place.savers[0].close()
    number = place.rows("SELECT number FROM tiered_generation")[0]["number"]
    options = {"autocommit": True, "row_factory": dict_row, "options": f"-csearch_path={place.name}"}
    going_on = threading.Event()
    entered = threading.Event()

    def stand_still() -> None:
        entered.set()
        going_on.wait(10)

    with (
        stack.postgres.connect(**options) as stopped,
        stack.postgres.connect(**options) as other,
        ThreadPoolExecutor(1) as thread,
    ):
        generations.start(other, number)
        opening = thread.submit(generations.open_generation, stopped, number + 1, 0.0, stand_still, patience=0.3)
        assert entered.wait(10)
        began = time.monotonic()
        current = generations.open_generation(other, number + 1, 0.0)
        assert time.monotonic() - began < 2.0
        assert current == Generation(number + 1, opened=True)
        generations.start(other, number + 1)
        going_on.set()
        with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout):
            opening.result(10)
        assert generations.read(other) == Generation(number + 2, opened=False)


def test_a_saver_that_is_closed_while_it_opens_a_generation(
    place: Place, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I8: it does not end in the middle of it, with everybody else waiting for what it holds."""
    saver = place.open(through(place.stack.redis.url, proxy, place.stack.redis.port))
    chain = Steps(saver, "red")
    chain.put(), saver.flush()
    proxy.refuse()
    proxy.cut()
    chain.put()
    entered = threading.Event()
    enter = tier.enter

    def slowly(*arguments: Any) -> None:
        entered.set()
        time.sleep(0.3)
        enter(*arguments)

    monkeypatch.setattr(tier, "enter", slowly)
    proxy.heal()
    assert entered.wait(10)
    assert place.rows(HELD)
    saver.close()
    assert not place.rows(HELD)
