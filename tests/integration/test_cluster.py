"""Savers on a Redis Cluster of three real masters: everyday life, slots that move under load, a master that dies."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
import signal
import threading
import time
import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psycopg
import pytest
import redis
import redis.asyncio as aioredis
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command, interrupt
from psycopg_pool import ConnectionPool
from redis.crc import key_slot

from langgraph_tiered_saver import ConfigurationError, TieredConfig, TieredSaver
from langgraph_tiered_saver.hot import clients, scripts, slots
from langgraph_tiered_saver.hot.keys import Keyspace
from langgraph_tiered_saver.hot.tier import HotCall, run_many
from tests.conformance.test_conformance import assert_full, run_suite
from tests.fault.workers import Acked, Chain, address, assert_durable
from tests.integration.valkeys import PASSWORD, Cluster, directory_of_servers, url
from tests.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Self

SHARDS = 8


class RefusedError(redis.RedisError):
    """What the test's guard says."""


class Guard:
    """Notes whose connections were made, and refuses them if it is told to."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.refusal: BaseException | None = None

    def connected(self, run_id: str) -> None:
        """Note it."""
        self.seen.append(run_id)
        if self.refusal is not None:
            raise self.refusal


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three masters; they come up in about two seconds."""
    with directory_of_servers() as directory:
        cluster = Cluster(directory, node_timeout=5000)
        try:
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture
def cluster_url(cluster: Cluster) -> str:
    """A URL that names two of the masters."""
    return url("redis+cluster", [node.port for node in cluster.nodes[:2]])


@pytest.fixture(params=["from URLs", "of the user's clients"])
def saver(
    request: pytest.FixtureRequest, cluster: Cluster, cluster_url: str, postgres_url: str, key_prefix: str
) -> Iterator[TieredSaver]:
    """A saver on the Cluster."""
    config = TieredConfig(key_prefix=key_prefix, shard_count=SHARDS)
    if request.param == "from URLs":
        with TieredSaver.from_conn_string(
            cluster_url, postgres_url, key_prefix=key_prefix, shard_count=SHARDS
        ) as saver:
            yield saver
    else:
        port = cluster.nodes[0].port
        with (
            redis.RedisCluster(host="127.0.0.1", port=port, password=PASSWORD) as given,
            ConnectionPool(postgres_url, min_size=2, open=True) as pool,
            TieredSaver(given, pool, config=config) as saver,
        ):
            yield saver


def left_over(cluster: Cluster, key_prefix: str) -> list[bytes]:
    """The journals and dirty sets on all masters."""
    return [
        key
        for node in cluster.masters
        for kind in ("journal:*", "dirty")
        for key in node.client.scan_iter(f"{{{key_prefix}:*}}:{kind}", 1000)
    ]


def slot_of_shard(key_prefix: str, shard: int) -> int:
    """The slot of all keys of a shard."""
    return key_slot(Keyspace(key_prefix, SHARDS).tag(shard))


def names_in(key_prefix: str, shard: int, count: int) -> list[str]:
    """Names of threads in a shard."""
    keyspace = Keyspace(key_prefix, SHARDS)
    names = (f"thread-{number}" for number in itertools.count())
    return list(itertools.islice((name for name in names if keyspace.shard_of(name) == shard), count))


# --- clients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", ["from a URL", "by the user"])
def test_the_guard_looks_at_every_master(cluster: Cluster, cluster_url: str, made: str) -> None:
    """Each new connection to each master is shown to the guard, whose refusal comes out unchanged; no user's is."""
    guard, config, run_ids = Guard(), TieredConfig(), {node.run_id() for node in cluster.masters}
    nodes = cluster.masters[0].port
    with redis.RedisCluster(port=nodes, host="127.0.0.1", password=PASSWORD) as given:
        if made == "by the user":
            client, make_async = clients.guarded(given, config, guard), clients.derive_async(given, config, guard)
        else:
            client, make_async = clients.from_url(cluster_url, config, guard)

        assert clients.instances(client) == run_ids
        assert sorted(guard.seen) == sorted(run_ids)

        async def main() -> None:
            awaited = make_async()
            for maker in (lambda: awaited, clients.aguarded(user, config, guard)):
                each = maker()
                guard.seen.clear()
                await asyncio.gather(*(each.get(f"key-{number}") for number in range(40)))
                assert set(guard.seen) == run_ids
                await each.reconnect()
                guard.refusal = RefusedError()
                with pytest.raises(RefusedError):
                    await each.get("key")
                guard.refusal = None
                assert await each.get("key") is None
                await each.aclose()

        user = aioredis.RedisCluster(host="127.0.0.1", port=nodes, password=PASSWORD)
        asyncio.run(main())
        clients.reconnect(client)
        for guard.refusal in (RefusedError(), RefusedError(), KeyboardInterrupt()):
            with pytest.raises(type(guard.refusal)):
                client.get("key")
        guard.refusal, seen = None, len(guard.seen)
        assert client.get("key") is None
        assert given.get("key") is None
        assert len(guard.seen) == seen + 1
        client.close()


@pytest.mark.parametrize("made", ["from a URL", "by the user"])
def test_the_guard_looks_at_a_single_server(redis_url: str, made: str) -> None:
    """The same on one server; and one that may not say who it is has an empty name, which the guard may accept."""
    guard, config, name = Guard(), TieredConfig(), "tiered-silent"
    with redis.Redis.from_url(redis_url) as given:
        if made == "by the user":
            client, make_async = clients.guarded(given, config, guard), clients.derive_async(given, config, guard)
        else:
            client, make_async = clients.from_url(redis_url, config, guard)
        run_id = given.info("server")["run_id"]
        assert clients.instances(client) == {run_id}

        async def main() -> None:
            for each in (make_async(), clients.aguarded(aioredis.Redis.from_url(redis_url), config, guard)()):
                guard.seen.clear()
                guard.refusal = RefusedError()
                with pytest.raises(RefusedError):
                    await each.get("key")
                guard.refusal = None
                assert await each.get("key") is None
                assert guard.seen == [run_id, run_id]
                await each.aclose()

        asyncio.run(main())
        guard.seen.clear()
        clients.reconnect(client)
        for guard.refusal in (RefusedError(), KeyboardInterrupt()):
            with pytest.raises(type(guard.refusal)):
                client.get("key")
        guard.refusal = None
        assert client.get("key") is None
        assert guard.seen == [run_id] * 3
        client.close()
        given.acl_setuser(
            name, enabled=True, passwords=["+secret"], commands=["+@all", "-info"], keys=["*"], reset=True
        )
        try:
            parts = urlsplit(redis_url)
            client, _ = clients.from_url(f"redis://{name}:secret@{parts.hostname}:{parts.port}", config, guard)
            assert client.get("key") is None
            assert guard.seen[3:] == [""]
            client.close()
        finally:
            given.acl_deluser(name)


def test_a_master_that_stands_still(cluster: Cluster, cluster_url: str) -> None:
    """I8: a command to it takes the time-out once, however often a broken connection is tried again; others none."""
    client, make_async = clients.from_url(cluster_url, TieredConfig(redis_timeout=0.5, redis_retries=3))
    names = [f"still-{number}" for number in range(60)]
    pipeline = client.pipeline()
    for name in names:
        pipeline.get(name)
    pipeline.execute()
    victim = cluster.masters[0]
    own = [name for name in names if cluster.owner(key_slot(name.encode())) is victim]
    victim.kill(signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(redis.TimeoutError):
            client.get(own[0])
        assert 0.4 < time.monotonic() - began < 0.9
        for name in set(names) - set(own):
            client.get(name)
        for name in names:
            pipeline.get(name)
        replies = pipeline.execute(raise_on_error=False)
        assert [isinstance(reply, redis.TimeoutError) for reply in replies] == [name in own for name in names]
        assert time.monotonic() - began < 2.0

        async def main() -> None:
            awaited = make_async()
            with pytest.raises(redis.TimeoutError):
                await awaited.get(own[0])
            await awaited.aclose()

        asyncio.run(main())
    finally:
        victim.kill(signal.SIGCONT)
    assert client.get(own[0]) is None
    client.close()


def test_scripts_of_all_shards_in_one_round_trip_for_each_master(cluster: Cluster, cluster_url: str) -> None:
    """Replies come in the order of the calls, whichever master answered and whether it knew the script or not."""
    client, _ = clients.from_url(cluster_url, TieredConfig())
    text = "return {KEYS[1], ARGV[1], redis.call('INCR', KEYS[1])}"
    script = scripts.Script("many", text, hashlib.sha1(text.encode()).hexdigest())
    calls = [HotCall(script, (f"many-{number % 50}".encode(),), (number,)) for number in range(200)]

    replies = run_many(client, calls)

    assert [(reply[0].decode(), int(reply[1])) for reply in replies] == [(f"many-{n % 50}", n) for n in range(200)]
    assert sorted(reply[2] for reply in replies) == sorted([1, 2, 3, 4] * 50)
    assert len({key_slot(call.keys[0]) for call in calls}) > 40
    pipeline = client.pipeline().set("one", 1).execute_command("WAIT", 0, 10).hgetall("none").incr("one")
    assert pipeline.execute() == [True, 0, {}, 2]
    client.close()


def test_a_server_that_is_no_cluster(redis_url: str, postgres_url: str, key_prefix: str) -> None:
    """I7: a redis+cluster:// URL of a single server is refused with what to use instead, by every way in."""
    wrong = redis_url.replace("redis://", "redis+cluster://").removesuffix("/0")
    saver = TieredSaver.from_conn_string(wrong, postgres_url, key_prefix=key_prefix)

    with pytest.raises(ConfigurationError, match=r"is not part of a Cluster.*redis://"):
        saver.get_tuple(address("red"))
    with pytest.raises(ConfigurationError, match="is not part of a Cluster"):
        asyncio.run(saver.aget_tuple(address("red")))


def test_event_loops_come_and_go(cluster_url: str) -> None:
    """Forty first calls at once in each of several loops, also at the same time; nothing is left open, or complains."""
    _, make_async = clients.from_url(cluster_url, TieredConfig(redis_pool_size=3))
    complaints: list[Any] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        loops = clients.LoopClients(make_async)
        client = await loops.open()
        assert await asyncio.gather(*(client.get(f"nothing-{number}") for number in range(40))) == [None] * 40
        loops.reconnect()
        await client.get("nothing")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        threads = [threading.Thread(target=lambda: asyncio.run(main())) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        asyncio.run(main())
        gc.collect()

    assert complaints == []
    assert [str(warning.message) for warning in caught if issubclass(warning.category, ResourceWarning)] == []


# --- savers ----------------------------------------------------------------------------------------------------------


def make_graph(saver: TieredSaver) -> Any:
    """A graph that asks a human, and goes on with the answer."""

    def ask(state: MessagesState) -> dict[str, Any]:
        return {"messages": [("ai", f"heard {interrupt('well?')}")]}

    def end(state: MessagesState) -> dict[str, Any]:
        return {"messages": [("ai", f"{len(state['messages'])} messages")]}

    builder = StateGraph(MessagesState).add_node("ask", ask).add_node("end", end)
    return builder.add_edge(START, "ask").add_edge("ask", "end").add_edge("end", END).compile(checkpointer=saver)


def test_the_life_of_graphs(cluster: Cluster, saver: TieredSaver, postgres_url: str, key_prefix: str) -> None:
    """Threads on every shard, begun with one kind of call and resumed with the other, end in PostgreSQL whole."""
    graph = make_graph(saver)
    configs: list[Any] = [address(f"thread-{number}") for number in range(24)]
    for config in configs[::2]:
        graph.invoke({"messages": [("human", "hello")]}, config)

    async def main() -> None:
        await asyncio.gather(*(graph.ainvoke({"messages": [("human", "hello")]}, config) for config in configs[1::2]))
        await asyncio.gather(*(graph.ainvoke(Command(resume="yes"), config) for config in configs[::2]))

    asyncio.run(main())
    for config in configs[1::2]:
        graph.invoke(Command(resume="yes"), config)

    for config in configs:
        texts = [message.content for message in graph.get_state(config).values["messages"]]
        assert texts == ["hello", "heard yes", "2 messages"]
    histories = {config["configurable"]["thread_id"]: [at.config for at in saver.list(config)] for config in configs}
    assert {len(history) for history in histories.values()} == {4}
    asyncio.run(saver.adelete_thread("thread-0"))
    assert saver.get_tuple(configs[0]) is None
    saver.flush()
    wait_until(lambda: not left_over(cluster, key_prefix), message="journals and dirty sets are gone on every master")
    with psycopg.connect(postgres_url) as connection:
        rows = connection.execute("SELECT thread_id, count(*) FROM checkpoints GROUP BY 1").fetchall()
    assert dict(rows) == {name: 4 for name in histories if name != "thread-0"}


def test_conformance_is_full_on_a_cluster(cluster_url: str, postgres_url: str, key_prefix: str) -> None:
    """The official suite passes on a Cluster as it does on one server."""
    number = itertools.count()

    def make() -> TieredSaver:
        own = f"own-{next(number)}"
        settings = {"key_prefix": f"{key_prefix}-{own}", "postgres_schema": own}
        return TieredSaver.from_conn_string(cluster_url, postgres_url, **settings)

    assert_full(*run_suite(make))


@pytest.fixture
def redirections(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the answers that sent a command elsewhere, or put it off."""
    seen: Counter[str] = Counter()
    find = slots._refusal

    def count(result: Any) -> Exception | None:
        refusal = find(result)
        if refusal is not None:
            seen[type(refusal).__name__] += 1
        return refusal

    monkeypatch.setattr(slots, "_refusal", count)
    return seen


class Load:
    """Writes to a slot and to another one, with synchronous and asynchronous calls, until it is left.

    Attributes:
        acked: What was acknowledged.
    """

    def __init__(self, saver: TieredSaver, key_prefix: str) -> None:
        inside, outside = names_in(key_prefix, 0, 5), names_in(key_prefix, 1, 3)
        self.saver = saver
        self.acked: list[Acked] = []
        self._problems: list[BaseException] = []
        self._ended = threading.Event()
        work: list[Callable[[], Any]] = [lambda name=name: self._write(name) for name in (*inside[:2], outside[0])]
        work.append(lambda: asyncio.run(self._awrite([*inside[2:], *outside[1:]])))
        self._threads = [threading.Thread(target=self._guarded, args=(each,)) for each in work]

    def __enter__(self) -> Self:
        self.saver.setup()
        for thread in self._threads:
            thread.start()
        self.wait_for_calls()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        if self._problems:
            raise self._problems[0]

    def wait_for_calls(self) -> None:
        """Wait until some more calls have returned."""
        wanted = len(self.acked) + 4
        wait_until(lambda: self._problems or len(self.acked) >= wanted, message="calls return")

    def _guarded(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except BaseException as error:
            self._problems.append(error)

    def _write(self, name: str) -> None:
        chain, brief = Chain(self.saver, name), itertools.count()
        while not self._ended.is_set():
            self.acked.extend((chain.put(), chain.write()))
            found = self.saver.get_tuple(address(name))
            assert found is not None
            assert found.checkpoint["id"] == chain.checkpoint_id
            # Keys of a new thread are on neither server.
            gone = Chain(self.saver, f"{name}-{next(brief)}")
            gone.put()
            self.saver.delete_thread(gone.thread_id)
            assert self.saver.get_tuple(address(gone.thread_id)) is None

    async def _awrite(self, names: list[str]) -> None:
        async def grow(name: str) -> None:
            chain = Chain(self.saver, name)
            while not self._ended.is_set():
                self.acked.extend((await chain.aput(), await chain.awrite()))
                found = await self.saver.aget_tuple(address(name))
                assert found is not None
                assert found.checkpoint["id"] == chain.checkpoint_id

        await asyncio.gather(*(grow(name) for name in names))


@pytest.mark.parametrize("how", ["key by key", "at once"])
def test_a_slot_moves_under_load(
    cluster: Cluster, cluster_url: str, postgres_url: str, key_prefix: str, redirections: Counter[str], how: str
) -> None:
    """I1, I3, I6, I9: no call fails, every read sees the latest, and nothing is lost, while a slot goes to and fro."""
    saver = TieredSaver.from_conn_string(
        cluster_url, postgres_url, key_prefix=key_prefix, shard_count=SHARDS, redis_timeout=20.0, sweep_interval=0
    )
    slot = slot_of_shard(key_prefix, 0)

    def is_enough() -> bool:
        wanted = {"MovedError"} | ({"AskError", "TryAgainError"} if how == "key by key" else set())
        return wanted <= {name for name, count in redirections.items() if count >= 3}

    deadline = time.monotonic() + 30
    with Load(saver, key_prefix) as load:
        while not is_enough() and time.monotonic() < deadline:
            target = next(node for node in cluster.masters if node is not cluster.owner(slot))
            if how == "key by key":
                cluster.move(slot, target, load.wait_for_calls)
            else:
                cluster.move_at_once(slot, target)
            load.wait_for_calls()

    assert is_enough(), redirections
    saver.flush()
    wait_until(lambda: not left_over(cluster, key_prefix), message="journals and dirty sets are gone on every master")
    assert saver.stats().generation == 1
    saver.close()
    assert_durable(postgres_url, load.acked)


def test_a_slot_that_moves_for_longer_than_the_time_out(
    cluster: Cluster, cluster_url: str, postgres_url: str, key_prefix: str
) -> None:
    """I1, I6, I9: calls go past Redis meanwhile; none fails or reads something old, and nothing is lost."""
    saver = TieredSaver.from_conn_string(
        cluster_url, postgres_url, key_prefix=key_prefix, shard_count=SHARDS, redis_timeout=0.3, poll_interval=0.2
    )
    slot = slot_of_shard(key_prefix, 0)
    target = next(node for node in cluster.masters if node is not cluster.owner(slot))

    def went_past() -> int:
        return saver.stats().direct_writes

    with Load(saver, key_prefix) as load:
        cluster.move(slot, target, lambda: wait_until(went_past, 30.0, "calls go past Redis"))
        wait_until(lambda: saver.stats().hot_trusted, 30.0, "Redis is trusted again")
        load.wait_for_calls()

    saver.flush()
    saver.close()
    assert_durable(postgres_url, load.acked)


def test_a_master_dies_and_its_replica_is_promoted(postgres_url: str, key_prefix: str) -> None:
    """I1, I6, I9: calls go on meanwhile and after, nothing acknowledged is lost, and no read goes backwards."""
    with directory_of_servers() as directory:
        cluster = Cluster(directory, replicas=1)
        try:
            guard, config = Guard(), TieredConfig(redis_timeout=1.0)
            victim, heir = cluster.masters[0], cluster.replicas[0]
            # The only server that the URL names is the one that dies.
            place = url("redis+cluster", [victim.port])
            client, make_async = clients.from_url(place, config, guard)
            keys = [f"key-{number}" for number in range(60)]
            assert all(client.set(key, key) for key in keys)
            assert set(guard.seen) == {node.run_id() for node in cluster.masters}
            mark = next(key for key in keys if cluster.owner(key_slot(key.encode())) is victim)
            assert victim.client.set(mark, mark)
            assert victim.client.wait(1, 5000) == 1
            saver = TieredSaver.from_conn_string(
                place, postgres_url, key_prefix=key_prefix, redis_timeout=1.0, poll_interval=0.2
            )
            chains = [Chain(saver, f"thread-{number}") for number in range(12)]
            acked = [chain.put() for chain in chains]

            victim.kill()

            def is_served() -> bool:
                for chain in chains:
                    acked.extend((chain.put(), chain.write()))
                    found = saver.get_tuple(address(chain.thread_id))
                    assert found is not None
                    assert found.checkpoint["id"] == chain.checkpoint_id
                try:
                    return all(client.get(key) == key.encode() for key in keys)
                except (redis.RedisError, OSError):
                    return False

            wait_until(is_served, 20.0, "the replica was promoted")
            assert heir.run_id() in guard.seen
            assert clients.instances(client) == {node.run_id() for node in (*cluster.masters[1:], heir)}

            async def main() -> None:
                awaited = make_async()
                assert await asyncio.gather(*(awaited.get(key) for key in keys)) == [key.encode() for key in keys]
                await awaited.aclose()

            asyncio.run(main())
            wait_until(lambda: is_served() and saver.stats().hot_trusted, 20.0, "Redis is trusted again")
            saver.close()
            client.close()
            assert_durable(postgres_url, acked)
        finally:
            cluster.stop()
