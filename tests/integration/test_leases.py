"""Run leases: of two runs on one thread only one writes, whatever becomes of the other one, and of either tier."""

from __future__ import annotations

import asyncio
import json
import logging
import operator
import signal
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TypedDict

import psycopg
import pytest
import redis
from langgraph.graph import END, START, StateGraph

from langgraph_tiered_saver import InvalidInputError, TieredSaver
from langgraph_tiered_saver.errors import StaleWriterError
from langgraph_tiered_saver.hot.keys import Keyspace
from tests.fault.stack import Stack
from tests.fault.workers import ROOT, Chain, address, read_rows, values_of
from tests.support import wait_until

LONG = 60.0  # seconds: no renewal is due while a test runs


class Place:
    """Two savers that stand for two processes, and what their tiers hold."""

    def __init__(self, redis_url: str, postgres_url: str, key_prefix: str, **settings: Any) -> None:
        self.redis_url, self.postgres_url, self.key_prefix = redis_url, postgres_url, key_prefix
        self.settings = {"key_prefix": key_prefix, "poll_interval": 0.05, **settings}
        self.savers: list[TieredSaver] = []
        self.one, self.two = self.saver(), self.saver()

    def saver(self) -> TieredSaver:
        self.savers.append(TieredSaver.from_conn_string(self.redis_url, self.postgres_url, **self.settings))
        return self.savers[-1]

    def close(self) -> None:
        for saver in self.savers:
            saver.close()

    def known(self, thread_id: str) -> tuple[Any, Any]:
        """Give what Redis and PostgreSQL know of a thread's lease: token and end in seconds, or None."""
        with redis.Redis.from_url(self.redis_url) as client:
            field = client.hget(self.keys(thread_id).shard, f"f:{thread_id}")
        with psycopg.connect(self.postgres_url) as connection:
            row = connection.execute(
                "SELECT run_lease, extract(epoch FROM run_lease_ends)::float FROM tiered_threads WHERE thread_id = %s",
                (thread_id,),
            ).fetchone()
        token, _, ends = (field or b"").decode().partition(" ")
        return (token, int(ends) / 1e6) if token else None, row if row and row[0] else None

    def keys(self, thread_id: str) -> Any:
        return Keyspace(self.key_prefix, 64).thread(thread_id)

    def forget(self, thread_id: str) -> None:
        """Make Redis forget a thread's lease."""
        with redis.Redis.from_url(self.redis_url) as client:
            assert client.hdel(self.keys(thread_id).shard, f"f:{thread_id}") == 1

    def stored(self, thread_id: str) -> Any:
        """Give everything that both tiers hold of a thread."""
        keys = self.keys(thread_id)
        with redis.Redis.from_url(self.redis_url) as client:
            hot = client.hgetall(keys.hot(""))
            journal = client.xrange(keys.journal)
            clock = client.hget(keys.shard, "clock")
        return hot, journal, clock, read_rows(self.postgres_url)

    @contextmanager
    def untouched(self, thread_id: str) -> Iterator[None]:
        """Check that nothing of a thread changes in either tier."""
        for saver in self.savers:
            saver.flush()
        before = self.stored(thread_id)
        yield
        for saver in self.savers:
            saver.flush()
        assert self.stored(thread_id) == before

    def both_trust(self) -> bool:
        return all(saver.stats().hot_trusted for saver in self.savers)


@pytest.fixture
def place(redis_url: str, postgres_url: str, key_prefix: str) -> Iterator[Place]:
    """On the session's servers."""
    place = Place(redis_url, postgres_url, key_prefix)
    yield place
    place.close()


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with Stack() as stack:
        yield stack


@pytest.fixture
def outage(stack: Stack) -> Iterator[Place]:
    """On servers that the test may kill; the next test finds them running."""
    place = Place(stack.redis.url, stack.postgres.url, "leases", redis_timeout=1.0)
    place.one.setup()
    place.two.setup()
    yield place
    stack.redis.start()
    stack.postgres.start()
    place.close()


def refused(*calls: Callable[[], object]) -> None:
    for call in calls:
        with pytest.raises(StaleWriterError):
            call()


def followers(saver: TieredSaver, chain: Chain) -> Chain:
    """Give a chain of another saver, which goes on where this one is."""
    other = Chain(saver, chain.thread_id)
    other.config, other.step, other.versions = chain.config, chain.step, dict(chain.versions)
    return other


# --- one writes, the others do not -----------------------------------------------------------------------------------


def test_only_the_holder_writes_and_the_next_one_follows(place: Place) -> None:
    """While a lease is held nobody else writes, deletes or takes it; reads go on; then it is free in both tiers."""
    chain = Chain(place.one, "t")
    with place.one.lease("t", ttl=LONG) as lease:
        chain.put()
        assert (lease.held, lease.lost_reason, lease.thread_id) == (True, None, "t")
        assert [found and found[0] for found in place.known("t")] == [lease.token, lease.token]
        other = followers(place.two, chain)
        with place.untouched("t"):
            refused(
                other.put,
                other.write,
                lambda: place.two.delete_thread("t"),
                lambda: place.two.prune(["t"]),
                lambda: place.two.copy_thread("other", "t"),
                lambda: asyncio.run(other.aput()),
                place.two.lease("t").__enter__,
                lambda: asyncio.run(place.two.lease("t").__aenter__()),
            )
        assert place.two.get_tuple(address("t")).checkpoint["channel_values"] == values_of("t", 0)  # type: ignore[union-attr]
        Chain(place.two, "another").put()
        chain.put()
        place.one.prune(["t"])
        chain.write()

    assert not lease.held
    assert place.known("t") == (None, None)
    other = followers(place.two, chain)
    other.put()
    with place.two.lease("t"):
        refused(chain.put)
        other.put()
        place.two.delete_thread("t")
    assert place.one.get_tuple(address("t")) is None
    with lease:  # again
        assert lease.held


def test_waiting_for_a_lease_takes_it_when_it_is_free(place: Place) -> None:
    """With `wait`, the second run begins when the first has ended, and finds what that wrote."""
    chain = Chain(place.one, "t")
    entered = threading.Event()
    found: list[Any] = []

    def second() -> None:
        entered.set()
        with place.two.lease("t", wait=20):
            found.append(place.two.get_tuple(address("t")))

    with place.one.lease("t"):
        thread = threading.Thread(target=second)
        thread.start()
        entered.wait(10)
        with pytest.raises(StaleWriterError, match=r"within 0\.1 s"):
            place.two.lease("t", wait=0.1).__enter__()
        chain.put()
        assert not found
    thread.join(30)
    assert found[0].checkpoint["id"] == chain.checkpoint_id


def test_leases_of_one_process_do_not_nest_and_arguments_are_checked(place: Place) -> None:
    """Two runs of one process take turns like those of two; a mistake is told at once and takes nothing."""
    lease = place.one.lease("t")
    with lease:
        with pytest.raises(StaleWriterError, match=r"This process holds the lease .* do not nest"):
            place.one.lease("t").__enter__()
        with pytest.raises(InvalidInputError, match="in use"):
            lease.__enter__()
        assert lease.held
        with place.one.lease("u") as another:
            assert another.held
    mistakes: list[dict[str, Any]] = [
        {"thread_id": None}, {"thread_id": ""}, {"thread_id": "\0"}, {"thread_id": "n" * 3000}, {"ttl": 0},
        {"ttl": True}, {"ttl": 1e6}, {"ttl": "1"}, {"wait": -1}, {"wait": float("inf")}, {"wait": None},
    ]  # fmt: skip
    for mistake in mistakes:
        with pytest.raises(InvalidInputError):
            place.one.lease(**{"thread_id": "t", **mistake})


def test_without_a_lease_nothing_is_asked_and_nothing_runs(place: Place) -> None:
    """Off unless asked for: a write is one call of Redis, as ever, and no thread of leases exists."""

    def threads() -> int:
        return sum(thread.name == "langgraph-tiered-leases" for thread in threading.enumerate())

    place.settings |= {"flush_linger": 3600.0, "sweep_interval": 0}
    saver, before = place.saver(), threads()
    chain = Chain(saver, "t")
    chain.put()
    with redis.Redis.from_url(place.redis_url) as client:
        calls = client.info("commandstats")["cmdstat_evalsha"]["calls"]
        for _ in range(10):
            chain.put()
            chain.write()
        assert client.info("commandstats")["cmdstat_evalsha"]["calls"] == calls + 20
    assert threads() == before


def test_a_lease_is_renewed_for_as_long_as_it_is_held(place: Place) -> None:
    """Over several lengths of a lease the holder stays the holder, in both tiers, though it writes nothing."""
    with place.one.lease("t", ttl=1.0) as lease:
        first = place.known("t")

        def outlived() -> bool:
            assert lease.held
            refused(place.two.lease("t").__enter__)
            return all(now[1] > then[1] + 2 for now, then in zip(place.known("t"), first, strict=True))

        wait_until(outlived, 20, "two renewals", interval=0.1)
        Chain(place.one, "t").put()


def test_closing_a_saver_gives_its_leases_up(place: Place) -> None:
    """Nobody waits for a lease that its process has given up by closing."""
    with place.one.lease("t", ttl=LONG) as lease:
        place.one.close()
        assert not lease.held
        with place.two.lease("t"):
            Chain(place.two, "t").put()


# --- graphs ----------------------------------------------------------------------------------------------------------


class Count(TypedDict):
    numbers: Annotated[list[int], operator.add]


def counting(saver: TieredSaver) -> Any:
    """A graph that appends how many numbers there are, in two steps."""
    builder = StateGraph(Count)
    for name in ("first", "second"):
        builder.add_node(name, lambda state: {"numbers": [len(state["numbers"])]})
    builder.add_edge(START, "first")
    builder.add_edge("first", "second")
    builder.add_edge("second", END)
    return builder.compile(checkpointer=saver)


def test_runs_that_take_turns_leave_one_history(place: Place) -> None:
    """Eight runs at once, of two processes, sync and async: none is lost, and no checkpoint has two children."""
    config = address("t")

    def run(saver: TieredSaver) -> None:
        with saver.lease("t", wait=60):
            counting(saver).invoke({"numbers": []}, config)

    async def arun(saver: TieredSaver) -> None:
        async with saver.lease("t", wait=60):
            await counting(saver).ainvoke({"numbers": []}, config)

    async def main() -> None:
        savers = (place.one, place.two)
        runs = [asyncio.to_thread(run, saver) for saver in savers for _ in range(2)]
        await asyncio.gather(*runs, *(arun(saver) for saver in savers for _ in range(2)))

    asyncio.run(main())

    assert counting(place.one).get_state(config).values == {"numbers": list(range(16))}
    parents = Counter(str(at.parent_config) for at in place.two.list(config))
    assert set(parents.values()) == {1}


def test_a_graph_whose_lease_is_lost_stops_with_an_error(place: Place) -> None:
    """A run that lost its lease fails loudly at its next step; what the other one wrote is what the thread holds."""

    def interfere(state: Count) -> Count:
        place.forget("t")  # as if it had ended there
        with psycopg.connect(place.postgres_url, autocommit=True) as connection:
            connection.execute("UPDATE tiered_threads SET run_lease_ends = clock_timestamp() WHERE thread_id = 't'")
        with place.two.lease("t"):
            counting(place.two).update_state(address("t"), {"numbers": [100]})
        return {"numbers": [1]}

    builder = StateGraph(Count)
    builder.add_node("interfere", interfere)
    builder.add_edge(START, "interfere")
    with place.one.lease("t", ttl=LONG) as lease, pytest.raises(StaleWriterError):
        builder.compile(checkpointer=place.one).invoke({"numbers": [0]}, address("t"))
    assert lease.lost_reason is not None
    assert counting(place.two).get_state(address("t")).values == {"numbers": [0, 100]}


def test_an_asynchronous_caller_that_goes_away_leaves_no_lease_behind(place: Place) -> None:
    """Cancelled while it waits, or in the very moment in which it gets the lease, a task takes nothing with it."""

    async def take(wait: float = 0.0) -> None:
        async with place.two.lease("t", ttl=LONG, wait=wait):
            await asyncio.sleep(LONG)

    async def main() -> None:
        place.two.setup()
        with place.one.lease("t", ttl=LONG):
            waiting = asyncio.create_task(take(LONG))
            await asyncio.sleep(0.1)
            waiting.cancel()
            await asyncio.wait([waiting])
        for steps in range(12):
            taking = asyncio.create_task(take())
            for _ in range(steps):
                await asyncio.sleep(0.0005)
            taking.cancel()
            await asyncio.wait([taking])
            async with place.one.lease("t", ttl=LONG, wait=10):
                pass

    asyncio.run(main())
    wait_until(lambda: place.known("t") == (None, None), message="both tiers know no holder")


# --- processes that stand still, and children ------------------------------------------------------------------------

HOLDER = """
import json, sys
from langgraph_tiered_saver import TieredSaver
from langgraph_tiered_saver.errors import StaleWriterError
from tests.fault.workers import Chain, report

saver = TieredSaver.from_conn_string(*sys.argv[1:3], key_prefix=sys.argv[3], poll_interval=0.2)
chain = Chain(saver, "t")
with saver.lease("t", ttl=1.0) as lease:
    chain.put()
    chain.write()
    report(chain.config, chain.versions)
    sys.stdin.readline()
    came = []
    for call in (chain.put, chain.write, lambda: saver.delete_thread("t")):
        try:
            call()
            came.append("written")
        except StaleWriterError:
            came.append("refused")
    report(came, lease.held)
sys.stdin.readline()
saver.close()
"""

FORKING = """
import os, sys
from langgraph_tiered_saver import TieredSaver
from langgraph_tiered_saver.errors import StaleWriterError
from tests.fault.workers import Chain, report

saver = TieredSaver.from_conn_string(*sys.argv[1:3], key_prefix=sys.argv[3])
chain = Chain(saver, "t")
with saver.lease("t") as lease:
    chain.put()
    pid = os.fork()
    if pid == 0:
        try:
            chain.put()
        except StaleWriterError:
            report("refused", lease.held)
    else:
        os.waitpid(pid, 0)
        chain.put()
        report("written", lease.held)
        sys.stdin.readline()
saver.close()
"""


@contextmanager
def process(code: str, place: Place) -> Iterator[subprocess.Popen[str]]:
    arguments = (place.redis_url, place.postgres_url, place.key_prefix)
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def line(running: subprocess.Popen[str], tell: bool = False) -> Any:
    assert running.stdin is not None
    assert running.stdout is not None
    if tell:
        running.stdin.write("\n")
        running.stdin.flush()
    return json.loads(running.stdout.readline())


@pytest.mark.parametrize("takes", [True, False], ids=["taken", "not taken"])
def test_a_holder_that_stood_still_for_too_long_writes_nothing_any_more(place: Place, takes: bool) -> None:
    """I6: whether another run took the lease meanwhile or somebody wrote without one, the history does not fork."""
    place.two.setup()
    with process(HOLDER, place) as holder:
        chain = Chain(place.two, "t")
        chain.config, chain.versions = line(holder)
        chain.step = 0
        refused(chain.put)
        chain.step = 0
        holder.send_signal(signal.SIGSTOP)

        def write() -> bool:
            chain.step = 0
            try:
                chain.put()
            except StaleWriterError:
                return False
            return True

        if takes:
            with place.two.lease("t", ttl=LONG, wait=20):
                assert write()
                holder.send_signal(signal.SIGCONT)
                with place.untouched("t"):
                    assert line(holder, tell=True) == [["refused"] * 3, False]
        else:
            wait_until(write, 20, "the lease ends")
            holder.send_signal(signal.SIGCONT)
            with place.untouched("t"):
                assert line(holder, tell=True) == [["refused"] * 3, False]
        assert holder.stdin is not None
        holder.stdin.close()
        assert holder.wait(20) == 0
        place.two.flush()
        with place.two.lease("t"):
            chain.put()
    assert [at.metadata["step"] for at in place.two.list(address("t"))] == [2, 1, 0]


def test_a_forked_child_holds_no_lease_of_its_parents(place: Place) -> None:
    """The child's writes are refused, and its way out of the block leaves the lease with the parent."""
    with process(FORKING, place) as parent:
        assert line(parent) == ["refused", False]
        assert line(parent) == ["written", True]
        refused(Chain(place.two, "t").put)


# --- tiers that are away ---------------------------------------------------------------------------------------------


def test_the_fence_stands_while_redis_is_away_and_when_it_is_back_empty(outage: Place, stack: Stack) -> None:
    """Past Redis, PostgreSQL refuses; an empty Redis knows every lease before it is trusted, whoever opens it."""
    name = uuid.uuid4().hex
    chain, late = Chain(outage.one, name), Chain(outage.two, f"{name} late")
    with outage.one.lease(name, ttl=LONG) as lease:
        chain.put()
        stack.redis.kill()
        refused(followers(outage.two, chain).put, outage.two.lease(name).__enter__)
        chain.put()
        with outage.two.lease(late.thread_id, ttl=LONG):  # which PostgreSQL alone has given
            late.put()
            refused(Chain(outage.one, late.thread_id).put)
            stack.redis.restart_wiped()
            for saver, theirs in ((outage.two, chain), (outage.one, late)):
                wait_until(lambda saver=saver: saver.stats().hot_trusted, 20, "Redis is trusted")
                refused(followers(saver, theirs).put, saver.lease(theirs.thread_id).__enter__)
            for theirs in (chain, late):
                (hot, _), (cold, _) = outage.known(theirs.thread_id)
                assert hot == cold
                theirs.put()
    assert not lease.held
    followers(outage.two, chain).put()
    assert outage.known(name) == (None, None)


def test_a_lease_that_ended_while_redis_was_away_is_not_restored(outage: Place, stack: Stack) -> None:
    """A Redis that comes back with what it had must not take a lease for held that PostgreSQL has given to nobody."""
    name = uuid.uuid4().hex
    chain = Chain(outage.one, name)
    with outage.one.lease(name, ttl=LONG):
        chain.put()
        stack.redis.sync_from_now()
        stack.redis.kill()
        chain.put()
    stack.redis.start()
    wait_until(outage.both_trust, 20, "Redis is trusted")
    assert outage.known(name) == (None, None)
    followers(outage.two, chain).put()


def test_redis_alone_gives_leases_while_postgresql_is_away(outage: Place, stack: Stack) -> None:
    """With PostgreSQL away there is still one holder; when it is back, it knows who that is."""
    name = uuid.uuid4().hex
    chain = Chain(outage.one, name)
    stack.postgres.kill()
    with outage.one.lease(name, ttl=3.0) as lease:
        chain.put()
        refused(followers(outage.two, chain).put, outage.two.lease(name).__enter__)
        stack.postgres.start()
        wait_until(lambda: (outage.known(name)[1] or [""])[0] == lease.token, 20, "PostgreSQL knows the holder")
        refused(outage.two.lease(name).__enter__)
        chain.put()
        assert lease.held
    assert outage.known(name) == (None, None)


def test_a_lease_that_redis_forgot_is_restored_once_in_a_generation(
    outage: Place, stack: Stack, caplog: pytest.LogCaptureFixture
) -> None:
    """The holder's next write restores it after a change of generation; a second time it can only have ended."""
    name = uuid.uuid4().hex
    chain = Chain(outage.one, name)
    with outage.one.lease(name, ttl=LONG) as lease:
        chain.put()
        stack.redis.flushall()
        chain.put()
        wait_until(outage.both_trust, 20, "Redis is trusted")
        outage.forget(name)
        chain.put()
        assert outage.known(name)[0][0] == lease.token
        assert lease.held

        outage.forget(name)
        with caplog.at_level(logging.WARNING), outage.untouched(name):
            refused(chain.put, chain.write, chain.put)

        assert not lease.held
        assert "ended" in str(lease.lost_reason)
        assert sum("is lost" in record.message for record in caplog.records) == 1
    assert outage.known(name) == (None, None)


def test_neither_tier_there_a_lease_cannot_be_renewed_and_is_lost(outage: Place, stack: Stack) -> None:
    """A lease that nobody could renew until it ended is lost, though both tiers come back as they were."""
    name = uuid.uuid4().hex
    chain = Chain(outage.one, name)
    with outage.one.lease(name, ttl=1.0) as lease:
        chain.put()
        stack.postgres.kill()
        stack.redis.pause()
        wait_until(lambda: lease.lost_reason, 30, "the lease is lost")
        stack.redis.go_on()
        stack.postgres.start()
        wait_until(outage.both_trust, 20, "Redis is trusted")
        refused(chain.put)
        assert not lease.held
    followers(outage.two, chain).put()
