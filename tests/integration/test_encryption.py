"""Under a serializer that encrypts, no value of a state is readable in either tier; allowlists keep their meaning."""

from __future__ import annotations

import json
import operator
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import psycopg
import pytest
import redis
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.graph import START, StateGraph
from langgraph.types import Command, Send, interrupt
from psycopg import sql

from langgraph_tiered_saver import SerializationError, TieredSaver
from tests.integration.graphs import append_all
from tests.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from langchain_core.runnables import RunnableConfig

ROOT = Path(__file__).parents[2]
KEY = b"0123456789abcdef0123456789abcdef"
SHORT = "canary-short-77"
NUMBER = 918273645546372819
FRACTION = 27182.8182845
CONFIG: RunnableConfig = {"configurable": {"thread_id": "secret"}}

# --- serializers -----------------------------------------------------------------------------------------------------


def mask(data: bytes) -> bytes:
    """Encrypt or decrypt; good enough to make a search for the plaintext fail."""
    return bytes(byte ^ KEY[index % len(KEY)] ^ 0xA5 for index, byte in enumerate(data))


class WholeSerializer:
    """A serializer of somebody's own that knows nothing of LangGraph's classes."""

    def __init__(self) -> None:
        self.inner = JsonPlusSerializer()

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        kind, data = self.inner.dumps_typed(obj)
        return "masked", mask(kind.encode() + b":" + data)

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        assert data[0] == "masked", f"{data[0]} was not written by this serializer"
        kind, _, plaintext = mask(data[1]).partition(b":")
        return self.inner.loads_typed((kind.decode(), plaintext))


class DerivedSerializer(JsonPlusSerializer):
    """A subclass of LangGraph's serializer that encrypts what that one gives."""

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        kind, data = super().dumps_typed(obj)
        return f"{kind}~masked", mask(data)

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        kind, _, cipher = data[0].partition("~")
        assert cipher == "masked", f"{data[0]} was not written by this serializer"
        return super().loads_typed((kind, mask(data[1])))


class UnhashableSerializer(WholeSerializer):
    """One that can be neither hashed nor referred to weakly."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other


SERIALIZERS: dict[str, Callable[[], Any]] = {
    "aes": lambda: EncryptedSerializer.from_pycryptodome_aes(key=KEY),
    "custom": WholeSerializer,
    "subclass": DerivedSerializer,
    "unhashable": UnhashableSerializer,
}

# --- a graph whose state is secret -----------------------------------------------------------------------------------


class Secret(TypedDict, total=False):
    text: str
    number: int
    fraction: float
    flag: bool
    nothing: None
    messages: Annotated[list[Any], operator.add]
    log: Annotated[list[str], DeltaChannel(append_all, snapshot_frequency=2)]
    odd: str
    answers: Annotated[list[Any], operator.add]


def secret_graph(saver: Any, fail: list[str]) -> Any:
    """A graph with values in channels, Send arguments, interrupts, resume values, a delta channel and an error."""

    def work(given: dict[str, str]) -> Any:
        return {"answers": [f"canary-result of {given['arg']}"], "log": [f"canary-delta {given['arg']}"]}

    def ask(state: Secret) -> Any:
        return {"answers": [interrupt({"ask": "canary-interrupt"})], "log": ["canary-delta-second"]}

    def broken(state: Secret) -> Any:
        if fail:
            raise RuntimeError("canary-task-error")
        return {"nothing": None, "odd": "canary-odd\0\0"}

    builder = StateGraph(Secret)
    builder.add_node("work", work)
    builder.add_node("ask", ask)
    builder.add_node("broken", broken)
    builder.add_conditional_edges(START, lambda state: [Send("work", {"arg": f"canary-send-{n}"}) for n in range(2)])
    builder.add_edge("work", "ask")
    builder.add_edge("ask", "broken")
    return builder.compile(checkpointer=saver)


SECRETS: Secret = {
    "text": SHORT,
    "number": NUMBER,
    "fraction": FRACTION,
    "flag": True,
    "nothing": None,
    "messages": [
        HumanMessage("canary-human", id="canary-id"),
        AIMessage("", tool_calls=[{"name": "canary-tool", "args": {"deep": ["canary-argument"]}, "id": "1"}], id="2"),
    ],
    "log": ["canary-delta-first"],
    "answers": [],
}


def run_to_the_error(saver: Any) -> Any:
    """Run the graph until its last node raises, and give the graph."""
    fail = ["yes"]
    graph = secret_graph(saver, fail)
    graph.invoke(SECRETS, CONFIG)
    with pytest.raises(RuntimeError, match="canary-task-error"):
        graph.invoke(Command(resume={"reply": "canary-resume"}), CONFIG)
    fail.clear()
    return graph


def traces(data: bytes) -> list[bytes]:
    """Find what must not be readable: the canaries, in any of the forms that JSON or MessagePack would give them."""
    needles = [b"canary", str(NUMBER).encode(), NUMBER.to_bytes(8, "big"), str(FRACTION).encode()]
    return [data[max(0, data.find(needle) - 40) : data.find(needle) + 60] for needle in needles if needle in data]


def dump_redis(redis_url: str, prefix: str) -> dict[bytes, bytes]:
    """Read every key below a prefix, whatever its type."""
    found = {}
    with redis.Redis.from_url(redis_url) as client:
        readers: dict[bytes, Callable[[bytes], Any]] = {
            b"hash": client.hgetall,
            b"stream": client.xrange,
            b"zset": lambda key: client.zrange(key, 0, -1, withscores=True),
            b"set": client.smembers,
            b"string": client.get,
            b"list": lambda key: client.lrange(key, 0, -1),
        }
        for key in client.scan_iter(f"{{{prefix}*", 1000):
            kind = client.type(key)
            if kind != b"none":  # a journal that was flushed since it was named
                found[key] = b" ".join(flat(readers[kind](key)))
    return found


def flat(value: Any) -> list[bytes]:
    if isinstance(value, dict):
        return [part for pair in value.items() for one in pair for part in flat(one)]
    if isinstance(value, (list, tuple, set)):
        return [part for one in value for part in flat(one)]
    return [value if isinstance(value, bytes) else str(value).encode()]


def dump_postgres(url: str) -> dict[str, bytes]:
    """Read every column of every table, bytes as they are."""
    found = {}
    with psycopg.connect(url) as connection:
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        for (table,) in tables:
            rows = connection.execute(sql.SQL("SELECT * FROM {}").format(sql.Identifier(table))).fetchall()
            found[table] = b" ".join(
                bytes(v) if isinstance(v, (bytes, memoryview)) else json.dumps(v, default=str).encode()
                for row in rows
                for v in row
            )
    return found


@contextmanager
def blocked_flusher(postgres_url: str) -> Iterator[None]:
    with psycopg.connect(postgres_url) as connection:
        # Reads pass, as a new thread's first one must; inserts wait.
        connection.execute("LOCK TABLE checkpoint_blobs IN EXCLUSIVE MODE")
        yield
        connection.rollback()


@pytest.mark.parametrize("kind", SERIALIZERS)
def test_no_value_of_the_state_is_readable_in_either_tier(
    make_saver: Callable[..., TieredSaver], redis_url: str, postgres_url: str, key_prefix: str, kind: str
) -> None:
    """No channel value, write, interrupt, Send argument or error is plaintext in Redis or PostgreSQL, at any time."""
    saver = make_saver(serde=SERIALIZERS[kind]())
    saver.setup()

    with blocked_flusher(postgres_url):
        secret_graph(saver, []).invoke(SECRETS, CONFIG)
        before = dump_redis(redis_url, key_prefix)
    saver.delete_thread("secret")
    graph = run_to_the_error(saver)
    failed = dump_redis(redis_url, key_prefix)
    saver.flush()
    stored = dump_postgres(postgres_url)
    graph.invoke(None, CONFIG)
    saver.flush()

    assert any(b":journal:" in key for key in before)
    assert any(b":hot:" in key for key in failed)
    assert len(stored["checkpoints"]) > 100
    assert len(stored["checkpoint_writes"]) > 100
    for dump in (before, failed, stored, dump_redis(redis_url, key_prefix), dump_postgres(postgres_url)):
        for name, content in dump.items():
            assert traces(content) == [], name


def test_the_search_would_find_plaintext(
    make_saver: Callable[..., TieredSaver], redis_url: str, postgres_url: str, key_prefix: str
) -> None:
    """The search that the test above relies on finds every table and the hot tier to be readable without a cipher."""
    saver = make_saver()
    run_to_the_error(saver)
    saver.flush()

    cold, hot = dump_postgres(postgres_url), dump_redis(redis_url, key_prefix)

    for table in ("checkpoints", "checkpoint_blobs", "checkpoint_writes"):
        assert traces(cold[table])
    assert traces(b"".join(hot.values()))


@pytest.mark.parametrize("kind", SERIALIZERS)
def test_encrypted_threads_read_as_they_would_in_memory(
    make_saver: Callable[..., TieredSaver], redis_url: str, postgres_url: str, key_prefix: str, kind: str
) -> None:
    """I9: what is encrypted comes back, hot, cold and by PostgresSaver with the same serializer."""
    serde = SERIALIZERS[kind]()
    saver = make_saver(serde=serde)
    graph = run_to_the_error(saver)
    model = run_to_the_error(InMemorySaver(serde=SERIALIZERS[kind]()))

    failed = graph.get_state(CONFIG)
    assert [task.error for task in failed.tasks] == [task.error for task in model.get_state(CONFIG).tasks]
    result = graph.invoke(None, CONFIG)
    expected = model.invoke(None, CONFIG)
    hot = [graph.get_state(CONFIG)]
    history = list(graph.get_state_history(CONFIG))
    saver.flush()
    with redis.Redis.from_url(redis_url) as client:
        assert client.delete(*client.scan_iter(f"{{{key_prefix}*}}:hot:*")) > 0
    cold = [graph.get_state(CONFIG), graph.get_state(CONFIG)]

    assert result == expected
    assert result["odd"] == "canary-odd\0\0"
    assert [state.values for state in history] == [state.values for state in model.get_state_history(CONFIG)]
    assert [state.values for state in hot + cold] == [model.get_state(CONFIG).values] * 3
    with PostgresSaver.from_conn_string(postgres_url) as reference:
        reference.serde = serde
        assert list(secret_graph(reference, []).get_state_history(CONFIG)) == history


def test_another_key_is_an_error_and_not_an_empty_thread(
    make_saver: Callable[..., TieredSaver], redis_url: str, key_prefix: str
) -> None:
    """I7: who cannot decrypt a thread is told so, hot and cold; nothing is overwritten by the attempt."""
    saver = make_saver(serde=EncryptedSerializer.from_pycryptodome_aes(key=KEY))
    run_to_the_error(saver)
    saver.flush()
    expected = saver.get_tuple(CONFIG)
    other = make_saver(serde=EncryptedSerializer.from_pycryptodome_aes(key=KEY[::-1]))

    with pytest.raises(ValueError, match="MAC check failed"):
        other.get_tuple(CONFIG)
    with redis.Redis.from_url(redis_url) as client:
        assert client.delete(*client.scan_iter(f"{{{key_prefix}*}}:hot:*")) > 0
    with pytest.raises(ValueError, match="MAC check failed"):
        other.get_tuple(CONFIG)
    with pytest.raises(ValueError, match="MAC check failed"):
        list(other.list(CONFIG))

    assert saver.get_tuple(CONFIG) == expected


class Degrees(float):
    """A float that LangGraph's serializer refuses."""


REFUSED = {
    "huge integer": 918273 * 10**40,
    "negative huge integer": -918273 * 10**40,
    "float subclass": Degrees(27182.8182845),
}


def put_value(saver: Any, value: Any, channel: str = "value") -> RunnableConfig:
    version = saver.get_next_version(None, None)
    checkpoint = empty_checkpoint() | {
        "v": 4,
        "id": str(uuid6()),
        "channel_values": {channel: value},
        "channel_versions": {channel: version},
    }
    found: RunnableConfig = saver.put(
        {"configurable": {"thread_id": "secret", "checkpoint_ns": ""}},
        checkpoint,
        {"source": "loop", "step": 0, "parents": {}},
        {channel: version},
    )
    return found


@pytest.mark.parametrize("kind", ["custom", "subclass", "unhashable"])
@pytest.mark.parametrize("value", REFUSED.values(), ids=REFUSED)
def test_what_an_encrypting_serializer_cannot_take_is_refused_and_not_leaked(
    make_saver: Callable[..., TieredSaver], redis_url: str, postgres_url: str, key_prefix: str, kind: str, value: Any
) -> None:
    """I7: JSON never stands in for a serializer whose form is its own; the error is typed and nothing is written."""
    saver = make_saver(serde=SERIALIZERS[kind]())
    at = put_value(saver, "fine")

    with pytest.raises(SerializationError):
        put_value(saver, value)
    with pytest.raises(SerializationError):
        saver.put_writes(at, [("fine", 1), ("value", value)], "task")

    saver.flush()
    found = saver.get_tuple(CONFIG)
    assert found is not None
    assert (found.checkpoint["channel_values"], found.pending_writes) == ({"value": "fine"}, [])
    everything = b"".join([*dump_redis(redis_url, key_prefix).values(), *dump_postgres(postgres_url).values()])
    assert b"918273" not in everything
    assert b"27182" not in everything


@pytest.mark.parametrize("kind", SERIALIZERS)
def test_lone_surrogates_are_not_leaked_past_a_cipher(
    make_saver: Callable[..., TieredSaver], redis_url: str, postgres_url: str, key_prefix: str, kind: str
) -> None:
    """Text that has no UTF-8 form is encrypted like any other, and reads as that serializer alone would give it."""
    serde = SERIALIZERS[kind]()
    saver = make_saver(serde=serde)
    text = "canary-surrogate \ud800 end"

    at = put_value(saver, text)
    saver.put_writes(at, [("value", text)], "task")
    saver.flush()

    # Exact where the cipher is known to wrap LangGraph's own serializer, whose reader takes JSON as well.
    expected = text if kind == "aes" else serde.loads_typed(serde.dumps_typed(text))
    found = saver.get_tuple(CONFIG)
    assert found is not None
    assert found.checkpoint["channel_values"] == {"value": expected}
    assert found.pending_writes == [("task", "value", expected)]
    for dump in (dump_redis(redis_url, key_prefix), dump_postgres(postgres_url)):
        for name, content in dump.items():
            assert traces(content) == [], name


def test_plaintext_written_before_a_cipher_is_still_read(make_saver: Callable[..., TieredSaver]) -> None:
    """A deployment that turns encryption on keeps its threads: EncryptedSerializer reads what has no cipher's name."""
    plain = make_saver()
    put_value(plain, ["plain"])
    plain.flush()
    saver = make_saver(serde=EncryptedSerializer.from_pycryptodome_aes(key=KEY))

    found = saver.get_tuple(CONFIG)

    assert found is not None
    assert found.checkpoint["channel_values"] == {"value": ["plain"]}


# --- allowlists ------------------------------------------------------------------------------------------------------


@dataclass
class Point:
    x: int
    y: int


STRICT = """
import json, sys
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph_tiered_saver import TieredSaver
from tests.integration.test_encryption import CONFIG, Point
options = json.loads(sys.argv[1])
with TieredSaver.from_conn_string(options["redis_url"], options["postgres_url"], key_prefix=options["prefix"]) as saver:
    strict = [saver.get_tuple(CONFIG).checkpoint["channel_values"]["value"] for _ in range(2)]
    clone = saver.with_allowlist([(Point.__module__, Point.__name__)])
    wide = [clone.get_tuple(CONFIG).checkpoint["channel_values"]["value"] for _ in range(2)]
    cold = next(clone.list(CONFIG)).checkpoint["channel_values"]["value"]
    shared = clone.stats() == saver.stats()
print(json.dumps({
    "strict": [type(found).__name__ for found in strict],
    "wide": [[type(found).__name__, found.x] for found in [*wide, cold]],
    "shared": shared,
}))
"""


@pytest.mark.parametrize("evicted", [False, True], ids=["hot", "cold"])
def test_a_strict_process_gets_only_what_its_allowlist_names(
    make_saver: Callable[..., TieredSaver], redis_url: str, postgres_url: str, key_prefix: str, evicted: bool
) -> None:
    """LANGGRAPH_STRICT_MSGPACK and with_allowlist decide what is built; a narrow reader's warming keeps the rest."""
    saver = make_saver()
    put_value(saver, Point(1, 2))
    saver.flush()
    if evicted:
        with redis.Redis.from_url(redis_url) as client:
            assert client.delete(*client.scan_iter(f"{{{key_prefix}*}}:hot:*")) == 1
    options = {"redis_url": redis_url, "postgres_url": postgres_url, "prefix": key_prefix}

    process = subprocess.run(
        [sys.executable, "-c", STRICT, json.dumps(options)],
        env={**os.environ, "LANGGRAPH_STRICT_MSGPACK": "true"},
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        check=False,
    )

    assert process.returncode == 0, process.stderr.decode()
    found = json.loads(process.stdout)
    assert found == {"strict": ["dict", "dict"], "wide": [["Point", 1]] * 3, "shared": True}
    warmed = saver.get_tuple(CONFIG)
    assert warmed is not None
    assert warmed.checkpoint["channel_values"] == {"value": Point(1, 2)}


@pytest.mark.parametrize("put_again", [False, True])
def test_a_narrow_clone_does_not_spoil_the_hot_tier_for_a_wide_one(
    make_saver: Callable[..., TieredSaver], redis_url: str, key_prefix: str, put_again: bool
) -> None:
    """What a narrow reader could not build stays whole in the hot tier, pending writes too, and in either order."""
    narrow = make_saver(serde=JsonPlusSerializer(allowed_msgpack_modules=None))
    wide = narrow.with_allowlist([(Point.__module__, Point.__name__)])
    at = put_value(wide, {"deep": [Point(3, 4)]})
    wide.put_writes(at, [("value", Point(5, 6))], "task")
    wide.flush()
    with redis.Redis.from_url(redis_url) as client:
        assert client.delete(*client.scan_iter(f"{{{key_prefix}*}}:hot:*")) == 1
    hits = wide.stats().hot_hits

    first = narrow.get_tuple(CONFIG)  # warms
    if put_again:
        narrow.put_writes(at, [("other", 1)], "another task")
    second = wide.get_tuple(CONFIG)

    assert first is not None
    assert "Point" not in repr(first.checkpoint["channel_values"])
    assert second is not None
    assert second.checkpoint["channel_values"] == {"value": {"deep": [Point(3, 4)]}}
    assert ("task", "value", Point(5, 6)) in (second.pending_writes or [])
    wait_until(lambda: wide.stats().hot_hits == hits + 1, 1, "a hit")
