"""What the hot tier costs, what it keeps and for how long, and that it never answers with less than there is."""

from __future__ import annotations

import asyncio
import json
import threading
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
import redis.asyncio
from langgraph.checkpoint.base import WRITES_IDX_MAP, empty_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.postgres import PostgresSaver
from psycopg_pool import ConnectionPool

from langgraph_tiered_saver import InvalidInputError, TieredConfig, TieredSaver
from langgraph_tiered_saver.cold import reader
from langgraph_tiered_saver.errors import ThreadQuarantinedError
from langgraph_tiered_saver.hot.keys import Keyspace
from langgraph_tiered_saver.hot.lanes import AsyncLaneClient, LaneClient
from tests.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from langchain_core.runnables import RunnableConfig
    from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple

NEVER = 600.0  # seconds of linger: nothing is flushed before somebody waits for it
DAY = 24 * 3600.0


class Line:
    """A line of checkpoints of one thread and namespace, each sending only the channels that changed."""

    def __init__(self, saver: BaseCheckpointSaver[str], thread_id: str, ns: str = "") -> None:
        self.saver = saver
        self.config: RunnableConfig = {"configurable": {"thread_id": thread_id, "checkpoint_ns": ns}}
        self.at: RunnableConfig = self.config
        self.values: dict[str, Any] = {}
        self.versions: dict[str, str] = {}

    @property
    def id(self) -> str:
        return str(self.at["configurable"]["checkpoint_id"])

    def put(self, id: str | None = None, *, lost: Sequence[str] = (), run_id: str | None = None, **changes: Any) -> str:
        """Put the next checkpoint: some channels change, others lose their value."""
        self.values = {**{k: v for k, v in self.values.items() if k not in lost}, **changes}
        changed = {c: self.saver.get_next_version(self.versions.get(c), None) for c in [*changes, *lost]}
        self.versions = {**self.versions, **changed}
        checkpoint = empty_checkpoint() | {
            "v": 4,  # what graphs write; a checkpoint of an older format is never made hot by a read
            "id": id or str(uuid6()),
            "channel_values": dict(self.values),
            "channel_versions": dict(self.versions),
        }
        metadata: Any = {"source": "loop", "step": 0, "parents": {}, **({"run_id": run_id} if run_id else {})}
        self.at = self.saver.put(self.at, checkpoint, metadata, changed)
        return self.id

    def write(self, task: str, *writes: tuple[str, Any], id: str | None = None) -> None:
        """Put what a task wrote on the latest checkpoint, or on the one named."""
        configurable = {**self.config["configurable"], "checkpoint_id": id or self.id}
        self.saver.put_writes({"configurable": configurable}, list(writes), task)

    def get(self) -> CheckpointTuple:
        found = self.saver.get_tuple(self.config)
        assert found is not None
        return found


def pending(found: CheckpointTuple | None) -> set[tuple[str, str, Any]]:
    assert found is not None
    return set(found.pending_writes or [])


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


def keys_of(client: redis.Redis, prefix: str, kind: str = "") -> list[bytes]:
    """Name the keys of a prefix, of one kind or all."""
    return sorted(key for key in client.scan_iter(f"{{{prefix}*", 1000) if f"}}:{kind}".encode() in key)


def evict_hot(client: redis.Redis, prefix: str) -> int:
    """Remove the hot hashes, as a TTL or an eviction would; the journal stays."""
    names = keys_of(client, prefix, "hot:")
    return int(client.delete(*names)) if names else 0


@contextmanager
def locked_tables(postgres_url: str) -> Iterator[None]:
    """Hold all tables, so that nothing can be read from or written to PostgreSQL."""
    with psycopg.connect(postgres_url) as connection:
        for table in ("tiered_threads", "checkpoint_blobs", "checkpoints", "checkpoint_writes"):  # as a flush does
            connection.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        yield
        connection.rollback()


# --- what it costs ---------------------------------------------------------------------------------------------------


@dataclass
class Traffic:
    """What one process's clients sent: per round trip its commands and their size. The flusher's does not count."""

    sent: list[tuple[str, int]] = field(default_factory=list)

    def note(self, *commands: Sequence[Any]) -> None:
        if not threading.current_thread().name.startswith("langgraph-tiered"):
            parts = [part for command in commands for part in command]
            size = sum(len(part) if isinstance(part, (bytes, str)) else len(str(part)) for part in parts)
            self.sent.append(("+".join(str(command[0]) for command in commands), size))

    def take(self) -> list[str]:
        """Give the names of the commands since the last time."""
        names, self.sent = [name for name, _ in self.sent], []
        return names

    def take_bytes(self) -> int:
        size, self.sent = sum(size for _, size in self.sent), []
        return size


@pytest.fixture
def counted(
    redis_url: str, postgres_url: str, key_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[TieredSaver, Callable[[], TieredSaver], Traffic]]:
    """A saver on connections that count what they send, after its set-up."""
    traffic = Traffic()

    class Counting(redis.Connection):
        def send_command(self, *args: Any, **kwargs: Any) -> None:
            traffic.note(args)
            super().send_command(*args, **kwargs)

    class AsyncCounting(redis.asyncio.Connection):
        async def send_command(self, *args: Any, **kwargs: Any) -> None:
            traffic.note(args)
            await super().send_command(*args, **kwargs)

    exchange, aexchange = LaneClient.exchange, AsyncLaneClient.exchange

    def counting(self: LaneClient, commands: Sequence[Any]) -> list[Any]:
        traffic.note(*commands)
        return exchange(self, commands)

    async def acounting(self: AsyncLaneClient, commands: Sequence[Any]) -> list[Any]:
        traffic.note(*commands)
        return await aexchange(self, commands)

    monkeypatch.setattr(LaneClient, "exchange", counting)
    monkeypatch.setattr(AsyncLaneClient, "exchange", acounting)

    def client() -> redis.Redis:
        return redis.Redis(connection_pool=redis.ConnectionPool.from_url(redis_url, connection_class=Counting))

    def async_client() -> Any:
        pool = redis.asyncio.ConnectionPool.from_url(redis_url, connection_class=AsyncCounting)
        return redis.asyncio.Redis(connection_pool=pool)

    with ConnectionPool(postgres_url, min_size=2) as pool:
        saver = TieredSaver(
            client(), pool, config=TieredConfig(key_prefix=key_prefix, flush_linger=NEVER), async_redis=async_client()
        )
        saver.setup()
        Line(saver, "warm-up").put(a=[1])
        traffic.take()
        yield saver, client, traffic
        saver.close()


def test_a_hot_read_and_a_write_cost_one_round_trip_each(
    counted: tuple[TieredSaver, Any, Traffic], postgres_url: str
) -> None:
    """A put, a put_writes and a get_tuple (by thread or by the latest's id) are one round trip to Redis each."""
    saver, _, traffic = counted
    line = Line(saver, "thread")
    line.put(log=[1], step=1)
    line.write("task", ("log", [2]), ("step", 2))
    line.get()
    saver.get_tuple(line.at)
    traffic.take()

    costs = {}
    line.put(step=2)
    costs["put"] = traffic.take()
    line.write("task", ("log", [2]), ("step", 2))
    costs["put_writes"] = traffic.take()
    line.get()
    costs["get"] = traffic.take()
    saver.get_tuple(line.at)
    costs["get by id"] = traffic.take()

    assert costs == {"put": ["EVALSHA"], "put_writes": ["EVALSHA"], "get": ["HGETALL+HGET"], "get by id": ["EVALSHA"]}


def test_async_calls_cost_one_round_trip_each(counted: tuple[TieredSaver, Any, Traffic]) -> None:
    """aput, aput_writes and aget_tuple are one round trip each, too."""
    saver, _, traffic = counted
    line = Line(saver, "thread")
    line.put(log=[1], step=1)
    line.write("task", ("log", [2]))

    async def go() -> list[list[str]]:
        await saver.aget_tuple(line.config)
        traffic.take()
        checkpoint = empty_checkpoint() | {"id": str(uuid6())}
        at = await saver.aput(line.at, checkpoint, {"source": "loop", "step": 1, "parents": {}}, {})
        costs = [traffic.take()]
        await saver.aput_writes(at, [("log", 1)], "task")
        costs.append(traffic.take())
        await saver.aget_tuple(line.config)
        return [*costs, traffic.take()]

    assert asyncio.run(go()) == [["EVALSHA"], ["EVALSHA"], ["HGETALL+HGET"]]


def test_a_new_thread_costs_one_round_trip(counted: tuple[TieredSaver, Any, Traffic]) -> None:
    """The first checkpoint of a thread carries everything already, so it is not sent twice."""
    saver, _, traffic = counted

    Line(saver, "new").put(log=[1], step=1)

    assert traffic.take() == ["EVALSHA"]


def test_unchanged_channels_are_not_sent(
    counted: tuple[TieredSaver, Any, Traffic], client: redis.Redis, key_prefix: str
) -> None:
    """A put sends what changed; the whole state only if the parent is not hot, in a second round trip (I2)."""
    saver, _, traffic = counted
    line = Line(saver, "thread")
    line.put(large=[b"x" * 1_000_000], text="y" * 100_000, small=[0])
    assert traffic.take_bytes() > 1_100_000

    line.put(small=[1])
    assert traffic.take_bytes() < 3_000
    line.put(step=1)
    assert traffic.take_bytes() < 3_000

    assert evict_hot(client, key_prefix) > 0
    line.put(small=[2])
    names = [name for name, _ in traffic.sent]
    assert names == ["EVALSHA", "EVALSHA"]
    assert traffic.take_bytes() > 1_100_000
    assert line.get().checkpoint["channel_values"] == line.values


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_postgresql_is_not_touched_on_the_callers_path(
    make_saver: Callable[..., TieredSaver], postgres_url: str, asynchronous: bool
) -> None:
    """Writes and hot reads return while every table is locked, and are in PostgreSQL once it is not (I1)."""
    saver = make_saver()
    saver.setup()
    line = Line(saver, "thread")
    line.put(log=[0])

    async def hot_read() -> CheckpointTuple | None:
        return await saver.aget_tuple(line.config)

    with locked_tables(postgres_url):
        for step in range(1, 20):
            line.put(log=[step], step=step)
            line.write("task", ("log", [step]))
            found = asyncio.run(hot_read()) if asynchronous else saver.get_tuple(line.config)
            assert found is not None
            assert found.checkpoint["channel_values"] == {"log": [step], "step": step}
            assert found.pending_writes == [("task", "log", [step])]
        assert saver.stats().backlog_records >= 38

    saver.flush()
    assert saver.stats().backlog_records == 0
    assert saver.stats().cold_reads == 0
    with PostgresSaver.from_conn_string(postgres_url) as reference:
        assert reference.get_tuple(line.config) == line.get()


# --- how long it keeps -----------------------------------------------------------------------------------------------


def test_only_hot_state_has_a_ttl(make_saver: Callable[..., TieredSaver], client: redis.Redis, key_prefix: str) -> None:
    """I1: what is not flushed never expires; hot hashes and the set that names them do, together."""
    saver = make_saver(hot_ttl=DAY, flush_linger=NEVER)
    for ns in ("", "child"):
        line = Line(saver, "thread", ns)
        line.put(log=[1])
        line.write("task", ("log", 2))

    ttl = {key.rsplit(b"}:", 1)[1].split(b":")[0]: client.pttl(key) for key in keys_of(client, key_prefix)}

    assert {kind for kind, left in ttl.items() if left > 0} - {b"sweep", b"probe", b"filling"} == {
        b"hot",
        b"namespaces",
    }
    assert {b"journal", b"dirty", b"shard", b"meta"} <= {kind for kind, left in ttl.items() if left == -1}
    for kind in (b"hot", b"namespaces"):
        assert DAY * 1000 - 60_000 < ttl[kind] <= DAY * 1000


def test_without_a_ttl_nothing_expires(
    make_saver: Callable[..., TieredSaver], client: redis.Redis, key_prefix: str
) -> None:
    """`hot_ttl=None` means never."""
    saver = make_saver(hot_ttl=None)
    line = Line(saver, "thread")
    line.put(log=[1])
    saver.flush()
    evict_hot(client, key_prefix)
    line.get()

    hot = keys_of(client, key_prefix, "hot:")
    assert len(hot) == 1
    assert client.pttl(hot[0]) == -1


def test_the_set_of_namespaces_outlives_every_hash_it_names(
    make_saver: Callable[..., TieredSaver], client: redis.Redis, key_prefix: str
) -> None:
    """I5: a delete finds hashes by the set, so writing, warming and leasing never leave a hash that outlives it."""
    saver = make_saver(hot_ttl=DAY)
    line = Line(saver, "thread")
    line.put(log=[1])
    saver.flush()
    names = keys_of(client, key_prefix, "namespaces:")[0]
    evict_hot(client, key_prefix)
    client.delete(names)

    assert saver.get_tuple({"configurable": {"thread_id": "thread", "checkpoint_ns": "nothing here"}}) is None
    leased = client.pttl(names)
    line.get()
    warmed = client.pttl(names)
    client.pexpire(names, 1000)
    # Renewed ten times in a lifetime, so not yet: pretend that the last time was long ago.
    client.hset(keys_of(client, key_prefix, "hot:")[0], "e", "1")
    line.put(log=[2])

    assert 0 < leased < DAY * 1000
    for left in (warmed, client.pttl(names)):
        assert DAY * 1000 - 60_000 < left <= DAY * 1000
    assert client.pttl(names) >= max(client.pttl(key) for key in keys_of(client, key_prefix, "hot:"))


def test_where_redis_may_evict_what_has_a_ttl_the_set_of_namespaces_has_none(
    make_saver: Callable[..., TieredSaver], client: redis.Redis, key_prefix: str
) -> None:
    """I5: under a volatile-* policy the set that a delete needs cannot be evicted, not after warming either."""
    before = client.config_get("maxmemory-policy")["maxmemory-policy"]
    client.config_set("maxmemory-policy", "volatile-lru")
    try:
        saver = make_saver(hot_ttl=DAY)
        saver.setup()
    finally:
        client.config_set("maxmemory-policy", before)
    line = Line(saver, "thread")
    # The set is first made by a lease, with a TTL for the case that there is nothing to warm.
    assert saver.get_tuple(line.config) is None
    names = keys_of(client, key_prefix, "namespaces:")[0]
    assert client.pttl(names) > 0

    line.put(log=[1])
    written = client.pttl(names)
    saver.flush()
    evict_hot(client, key_prefix)
    client.delete(names)
    line.get()

    assert written == -1
    assert client.pttl(names) == -1
    assert client.pttl(keys_of(client, key_prefix, "hot:")[0]) > 0


def test_after_expiry_postgresql_answers_with_everything(
    make_saver: Callable[..., TieredSaver], client: redis.Redis, key_prefix: str
) -> None:
    """I9: a thread whose hot state expired, flushed or not, is read complete, pending writes included."""
    saver = make_saver(hot_ttl=1, flush_linger=NEVER)
    line = Line(saver, "thread")
    line.put(log=[1], text="inline", none=None)
    line.write("b", ("log", [2]), ("text", "b"))
    line.write("a", ("log", [3]))
    line.write("a", ("asking", "asked"))
    expected = line.get()

    wait_until(lambda: not keys_of(client, key_prefix, "hot:"), 10, "expiry")
    assert keys_of(client, key_prefix, "journal:")
    unflushed = line.get()
    wait_until(lambda: not keys_of(client, key_prefix, "hot:"), 10, "expiry")
    cold = line.get()
    before = saver.stats()
    warmed = line.get()

    assert unflushed == cold == warmed == expected
    assert saver.stats().hot_hits == before.hot_hits + 1


def test_a_channel_that_lost_its_value_leaves_the_hash(
    make_saver: Callable[..., TieredSaver], client: redis.Redis, key_prefix: str
) -> None:
    """I8: an ephemeral channel's blob does not stay in Redis once no checkpoint shows it."""
    saver = make_saver()
    line = Line(saver, "thread")
    line.put(__start__={"canary": "x" * 100}, log=[1])
    line.put(lost=["__start__"], log=[1, 2])

    fields = client.hgetall(keys_of(client, key_prefix, "hot:")[0])

    assert not [name for name, value in fields.items() if b"__start__" in name or b"canary" in value]
    assert line.get().checkpoint["channel_values"] == {"log": [1, 2]}


def test_writes_of_older_checkpoints_leave_the_hash(
    make_saver: Callable[..., TieredSaver], client: redis.Redis, key_prefix: str
) -> None:
    """I8: a hot hash does not grow with the thread's history."""
    saver = make_saver()
    line = Line(saver, "thread")
    sizes = []
    for step in range(30):
        line.put(log=[step])
        for number in range(5):
            line.write(f"task-{number}", ("log", [step, number]))
        sizes.append(client.hlen(keys_of(client, key_prefix, "hot:")[0]))

    assert max(sizes[2:]) == min(sizes[2:])
    assert len(pending_list := line.get().pending_writes or []) == 5, pending_list


# --- early writes and warming ----------------------------------------------------------------------------------------


def later_id() -> str:
    return str(uuid6())


@pytest.mark.parametrize("flushed", [False, True], ids=["unflushed", "flushed"])
@pytest.mark.parametrize("evicted", ["before the write", "after the write", "never"])
def test_writes_that_come_before_their_checkpoint_survive_warming(
    make_saver: Callable[..., TieredSaver], client: redis.Redis, key_prefix: str, flushed: bool, evicted: str
) -> None:
    """I9: an acknowledged write of a checkpoint to come is shown with it, whatever was warmed in between."""
    saver = make_saver(flush_linger=NEVER)
    line = Line(saver, "thread")
    line.put(log=[1])
    coming = later_id()
    saver.flush()
    if evicted == "before the write":
        assert evict_hot(client, key_prefix) == 1

    line.write("task", ("log", "early"), id=coming)
    if evicted == "after the write":
        assert evict_hot(client, key_prefix) == 1
    if flushed:
        saver.flush()
    assert pending(line.get()) == set()  # warms the checkpoint that is there, if it is not hot
    line.put(id=coming, log=[2])

    assert pending(line.get()) == {("task", "log", "early")}
    evict_hot(client, key_prefix)
    assert pending(line.get()) == {("task", "log", "early")}


def test_writes_that_come_before_a_threads_first_checkpoint_survive_an_eviction(
    make_saver: Callable[..., TieredSaver], client: redis.Redis, key_prefix: str
) -> None:
    """I9: that a checkpoint is its thread's first does not mean that no write came before it."""
    saver = make_saver()
    line = Line(saver, "thread")
    coming = later_id()
    line.write("task", ("log", "early"), id=coming)
    saver.flush()
    assert evict_hot(client, key_prefix) == 1

    line.put(id=coming, log=[1])

    assert pending(line.get()) == {("task", "log", "early")}


def test_writes_that_come_before_their_checkpoint_survive_a_prune(make_saver: Callable[..., TieredSaver]) -> None:
    """I9: pruning drops the hot state; the next checkpoint still has the write that came before it."""
    saver = make_saver()
    line = Line(saver, "thread")
    line.put(log=[1])
    line.put(log=[2])
    coming = later_id()
    line.write("task", ("log", "early"), id=coming)
    saver.prune(["thread"], strategy="keep_latest")
    assert pending(line.get()) == set()

    line.put(id=coming, log=[3])
    hot = pending(line.get())
    saver.flush()
    cold = pending(next(saver.list(line.config)))

    assert hot == cold


def test_writes_before_and_after_an_eviction_are_all_shown(
    make_saver: Callable[..., TieredSaver], client: redis.Redis, key_prefix: str
) -> None:
    """I9: writes that the hot tier lost and writes that it holds are shown together, special ones as last put."""
    saver = make_saver(flush_linger=NEVER)
    line = Line(saver, "thread")
    line.put(log=[1])
    line.write("one", ("log", "before"))
    line.write("two", ("__resume__", "first"))
    evict_hot(client, key_prefix)

    line.write("two", ("__resume__", "second"))
    line.write("three", ("log", "after"))

    everything = {("one", "log", "before"), ("two", "__resume__", "second"), ("three", "log", "after")}
    assert "__resume__" in WRITES_IDX_MAP
    assert pending(line.get()) == everything
    assert pending(line.get()) == everything  # warmed


@contextmanager
def between_lease_and_warm(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> Iterator[list[Any]]:
    """Do something once, after the next cold read was made and before it is made hot."""
    genuine = reader.read_checkpoint
    done: list[Any] = []

    def read(*arguments: Any) -> Any:
        found = genuine(*arguments)
        if not done:
            done.append(None)
            done[0] = act()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(reader, "read_checkpoint", read)
        yield done
    assert done, "nobody read the cold tier"


RACES: dict[str, Callable[[Line], Any]] = {
    "put": lambda line: line.put(log=["newer"]),
    "write": lambda line: line.write("task", ("log", "newer")),
    "early write": lambda line: line.write("task", ("log", "early"), id=later_id()),
    "put on an older branch": lambda line: Line.put(line, id="1ef00000-0000-6000-8000-000000000000", log=["older"]),
}


@pytest.mark.parametrize("race", RACES)
def test_warming_never_covers_what_arrived_meanwhile(
    make_saver: Callable[..., TieredSaver],
    client: redis.Redis,
    key_prefix: str,
    postgres_url: str,
    monkeypatch: pytest.MonkeyPatch,
    race: str,
) -> None:
    """I6: what another process stored between a reader's lease and its warming is what the next reader gets."""
    reading, writing = make_saver(), make_saver()
    line = Line(writing, "thread")
    line.put(log=["first"])
    writing.flush()
    evict_hot(client, key_prefix)

    with between_lease_and_warm(monkeypatch, lambda: RACES[race](line)):
        assert reading.get_tuple(line.config) is not None

    found = [reading.get_tuple(line.config) for _ in range(2)]
    writing.flush()
    with PostgresSaver.from_conn_string(postgres_url) as reference:
        assert found == [reference.get_tuple(line.config)] * 2


@pytest.mark.parametrize("removal", ["delete_thread", "prune"])
def test_a_delete_between_lease_and_warming_stays(
    make_saver: Callable[..., TieredSaver],
    client: redis.Redis,
    key_prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    removal: str,
) -> None:
    """I5: a reader that read the rows before they were deleted does not make the thread hot again."""
    reading, deleting = make_saver(), make_saver()
    line = Line(deleting, "thread", "child")
    line.put(log=["deleted"])
    deleting.flush()
    evict_hot(client, key_prefix)
    # As after the expiry of everything hot: only the lease can put the namespace into the set.
    client.delete(*keys_of(client, key_prefix, "namespaces:"))
    remove = {
        "delete_thread": lambda: deleting.delete_thread("thread"),
        "prune": lambda: deleting.prune(["thread"], strategy="delete"),
    }

    with between_lease_and_warm(monkeypatch, remove[removal]):
        reading.get_tuple(line.config)

    assert reading.get_tuple(line.config) is None
    assert deleting.get_tuple(line.config) is None
    assert not [key for key in keys_of(client, key_prefix, "hot:") if client.hexists(key, "id")]


def test_a_slow_reader_does_not_undo_a_faster_one(
    make_saver: Callable[..., TieredSaver], client: redis.Redis, key_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I6: of two readers that miss at once the later lease wins; the thread reads the same afterwards."""
    slow, fast = make_saver(), make_saver()
    line = Line(fast, "thread")
    line.put(log=["first"])
    fast.flush()
    evict_hot(client, key_prefix)

    def overtake() -> None:
        fast.get_tuple(line.config)
        line.put(log=["second"])

    with between_lease_and_warm(monkeypatch, overtake):
        slow.get_tuple(line.config)

    found = slow.get_tuple(line.config)
    assert found is not None
    assert found.checkpoint["channel_values"] == {"log": ["second"]}


@pytest.mark.timeout(60)
def test_readers_and_evictions_beside_a_writer_never_see_the_past(
    make_saver: Callable[..., TieredSaver], client: redis.Redis, key_prefix: str
) -> None:
    """I6, I9: while hot state is dropped and warmed again and again, a read gives what was acknowledged before it."""
    writing, reading = make_saver(flush_linger=0.0), make_saver(flush_linger=0.0)
    line = Line(writing, "thread")
    line.put(step=[0], constant=["always there"])
    acknowledged, failures, stop = [0], [], threading.Event()

    def read() -> None:
        while not stop.is_set():
            known = acknowledged[0]
            found = reading.get_tuple(line.config)
            values = found.checkpoint["channel_values"] if found else {}
            if values.get("constant") != ["always there"] or values["step"][0] < known:
                failures.append((known, values))

    def evict() -> None:
        with redis.Redis(connection_pool=client.connection_pool) as other:
            while not stop.is_set():
                evict_hot(other, key_prefix)

    threads = [threading.Thread(target=work) for work in (read, read, evict)]
    for thread in threads:
        thread.start()
    try:
        for step in range(1, 150):
            line.put(step=[step])
            acknowledged[0] = step
            line.write("task", ("step", step))
            assert ("task", "step", step) in pending(line.get())
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)

    assert failures == []
    assert reading.stats().hot_misses > 0


# --- names and run ids that PostgreSQL could refuse ------------------------------------------------------------------


def test_names_too_long_to_be_indexed_are_refused_before_anything_is_written(
    make_saver: Callable[..., TieredSaver], client: redis.Redis, key_prefix: str
) -> None:
    """I7: a checkpoint or write that no flush could store raises InvalidInputError and leaves no trace."""
    saver = make_saver(flush_linger=NEVER)
    saver.setup()
    long = "n" * 1500
    fine = Line(saver, "t")
    at = fine.put(a=1)
    keys = keys_of(client, key_prefix)
    journal = client.xlen(keys_of(client, key_prefix, "journal:")[0])

    with pytest.raises(InvalidInputError, match="2600 bytes"):
        Line(saver, long, long).put(a=1)
    with pytest.raises(InvalidInputError, match="2600 bytes"):
        Line(saver, "é" * 1300).put(a=1)
    with pytest.raises(InvalidInputError, match="2600 bytes"):
        Line(saver, "t", "").put(**{"c" * 2600: [1]})
    with pytest.raises(InvalidInputError, match="2600 bytes"):
        fine.write("k" * 2600, ("a", 1), id=at)
    with pytest.raises(InvalidInputError, match="2600 bytes"):
        Line(saver, "t", "s" * 2600).write("task", ("a", 1), id=at)

    assert keys_of(client, key_prefix) == keys
    assert client.xlen(keys_of(client, key_prefix, "journal:")[0]) == journal
    saver.flush()


def random_text(length: int) -> str:
    """Text that PostgreSQL cannot compress below an index entry's size."""
    return "".join(uuid.uuid4().hex for _ in range(length // 32 + 1))[:length]


def test_names_just_short_enough_are_stored(make_saver: Callable[..., TieredSaver], postgres_url: str) -> None:
    """What put accepts, PostgreSQL accepts: incompressible names up to the bound."""
    saver = make_saver()
    line = Line(saver, random_text(1200), random_text(1000))
    line.put(**{random_text(280): [1]})
    line.write(random_text(300), ("a", 1))

    saver.flush()

    with PostgresSaver.from_conn_string(postgres_url) as reference:
        assert reference.get_tuple(line.config) == line.get()


def test_a_record_beyond_postgresqls_limits_stops_its_own_thread_only(
    make_saver: Callable[..., TieredSaver], postgres_url: str
) -> None:
    """I7: a refusal of class 54 (program limit exceeded) quarantines the thread; all others are flushed."""
    saver = make_saver(flush_linger=NEVER)
    saver.setup()
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        # What this server refuses with 54000; here by an index that a user may have added.
        connection.execute("CREATE INDEX ON checkpoints ((metadata ->> 'title'))")
    poison, fine = Line(saver, "poison"), Line(saver, "fine")
    fine.put(log=[1])
    at = saver.put(
        poison.config,
        empty_checkpoint() | {"id": later_id()},
        {"source": "loop", "step": 0, "parents": {}, "title": random_text(9000)},  # type: ignore[typeddict-unknown-key]
        {},
    )
    fine.put(log=[2])

    with pytest.raises(ThreadQuarantinedError) as caught:
        saver.flush()

    assert caught.value.thread_id == "poison"
    assert list(saver.stats().quarantined_threads) == ["poison"]
    with PostgresSaver.from_conn_string(postgres_url) as reference:
        wait_until(lambda: reference.get_tuple(fine.config) == fine.get(), message="the other thread's flush")
        assert reference.get_tuple(poison.config) is None
    hot = saver.get_tuple(poison.config)
    assert hot is not None
    assert hot.config == at


def test_long_run_ids_are_stored_and_deleted_for(make_saver: Callable[..., TieredSaver], postgres_url: str) -> None:
    """Our index takes run ids of any length, from PostgresSaver too, and delete_for_runs finds them by it."""
    saver = make_saver()
    saver.setup()
    ours, theirs = random_text(5000), random_text(5000)
    line = Line(saver, "ours")
    line.put(log=[1], run_id="kept")
    line.put(log=[2], run_id=ours)
    saver.flush()
    with PostgresSaver.from_conn_string(postgres_url) as reference:
        other = Line(reference, "theirs")
        other.put(log=[1], run_id=theirs)
        assert [t.metadata["run_id"] for t in reference.list(other.config)] == [theirs]

    saver.delete_for_runs([ours, theirs])

    assert [found.metadata["run_id"] for found in saver.list(line.config)] == ["kept"]
    assert line.get().checkpoint["channel_values"] == {"log": [1]}
    assert saver.get_tuple(other.config) is None


# --- listing threads -------------------------------------------------------------------------------------------------


def test_thread_ids_come_newest_first_in_pages_of_any_size(make_saver: Callable[..., TieredSaver]) -> None:
    """Paging by any limit gives each thread once, the one with the newest checkpoint first, flushed or not (I9)."""
    saver = make_saver(flush_linger=NEVER)
    lines = [Line(saver, name) for name in ("b", "a", "c {:/}", "d", "e")]
    for line in lines:
        line.put(log=[0])
    lines[1].put(log=[1])
    child = Line(saver, "d", "child")
    child.put(log=["a namespace's checkpoint is not the thread's"])
    only_child = Line(saver, "only in a namespace", "child")
    only_child.put(log=[1])
    expected = ["only in a namespace", "a", "e", "d", "c {:/}", "b"]

    everything = saver.thread_ids(limit=None)

    assert [summary.thread_id for summary in everything] == expected
    latest = {line.config["configurable"]["thread_id"]: line.id for line in [*lines, only_child]}
    assert {summary.thread_id: summary.checkpoint_id for summary in everything} == latest
    for limit in (1, 2, 3, 6, 7):
        found: list[Any] = []
        while page := saver.thread_ids(limit=limit, before=found[-1] if found else None):
            assert len(page) <= limit
            found += page
        assert found == list(everything)
    assert asyncio.run(saver.athread_ids(limit=2)) == list(everything[:2])


def test_threads_with_one_checkpoint_id_are_paged_apart(make_saver: Callable[..., TieredSaver]) -> None:
    """A copied thread has its source's checkpoint ids; no page skips or repeats either."""
    saver = make_saver()
    Line(saver, "source").put(log=[1])
    saver.copy_thread("source", "copy")
    saver.copy_thread("source", "another copy")

    found: list[Any] = []
    while page := saver.thread_ids(limit=1, before=found[-1] if found else None):
        found += page

    assert [summary.thread_id for summary in found] == ["source", "copy", "another copy"]
    assert len({summary.checkpoint_id for summary in found}) == 1


def test_thread_ids_tell_time_and_watermark(
    make_saver: Callable[..., TieredSaver], postgres_url: str, client: redis.Redis, key_prefix: str
) -> None:
    """A summary's watermark is the sequence number of the thread's last record; 0 if only PostgresSaver wrote it."""
    saver = make_saver(flush_linger=NEVER)
    line = Line(saver, "ours")
    line.put(log=[1])
    line.write("task", ("log", 2))
    shard = Keyspace(key_prefix, saver.config.shard_count).thread("ours").shard
    last = int(client.hget(shard, "t:ours") or 0)  # type: ignore[arg-type]
    with PostgresSaver.from_conn_string(postgres_url) as reference:
        Line(reference, "theirs").put(log=[1])

    found = {summary.thread_id: summary for summary in saver.thread_ids()}

    assert last > 0
    assert found["ours"].watermark == last
    assert found["ours"].time is not None
    assert found["ours"].time.isoformat() == line.get().checkpoint["ts"]
    assert found["ours"].durable_until is not None
    assert abs((found["ours"].durable_until - found["ours"].time).total_seconds()) < 60
    assert (found["theirs"].watermark, found["theirs"].durable_until) == (0, None)
    assert found["theirs"].time is not None


def test_a_deleted_thread_is_not_listed(make_saver: Callable[..., TieredSaver]) -> None:
    """I5: a tombstone is not a thread."""
    saver = make_saver()
    Line(saver, "deleted").put(log=[1])
    Line(saver, "kept").put(log=[1])
    saver.delete_thread("deleted")

    assert [summary.thread_id for summary in saver.thread_ids()] == ["kept"]


def test_nothing_hot_holds_a_value_that_json_would_change(
    make_saver: Callable[..., TieredSaver], client: redis.Redis, key_prefix: str
) -> None:
    """The checkpoint's JSON in the hash is what PostgreSQL will hold: values it would bend lie in blobs beside it."""
    saver = make_saver()
    Line(saver, "thread").put(nul="a\0b", nan=float("nan"), zero=-0.0, large=1e300, text="inline", number=7)

    fields = client.hgetall(keys_of(client, key_prefix, "hot:")[0])

    assert json.loads(fields[b"c"])["channel_values"] == {"text": "inline", "number": 7}
    assert {name for name in fields if name.startswith(b"b:")} == {b"b:nul", b"b:nan", b"b:zero", b"b:large"}
