"""Values, names, versions and sizes that break others, through both tiers and PostgresSaver's eyes."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import math
import uuid
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import redis
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from pydantic import BaseModel

from langgraph_tiered_saver import InvalidInputError, SerializationError, TieredSaver

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from langchain_core.runnables import RunnableConfig
    from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple

SERDE = JsonPlusSerializer()


class Color(str, enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Degrees(float):
    """A float that LangGraph's serializer refuses."""


class Name(str):
    """Text of a class of its own."""


@dataclass
class Point:
    x: int
    label: str = "p"


class Model(BaseModel):
    name: str
    tags: list[str] = []


# What a serializer that is faithful gives back: an equal value of the same type.
EXACT: dict[str, Any] = {
    "nul": "a\0b",
    "only a nul": "\0",
    "lone surrogate": "a\ud800b",
    "reversed surrogates": "\udfff\ud800",
    "escaped nul": "a\\u0000b",
    "escaped surrogate": "\\ud800",
    "emoji": "🎈 ß 日本 \u2028",
    "quotes": "\"'\\{}%s$1`;--",
    "empty text": "",
    "nan": math.nan,
    "inf": math.inf,
    "minus inf": -math.inf,
    "minus zero": -0.0,
    "zero": 0.0,
    "one as float": 1.0,
    "1e15": 1e15,
    "1e16": 1e16,
    "1e22": 1e22,
    "1e308": 1e308,
    "5e-324": 5e-324,
    "0.1": 0.1,
    "third": 1 / 3,
    "2**53 + 1": 2**53 + 1,
    "2**63": 2**63,
    "2**64": 2**64,
    "-2**64": -(2**64),
    "2000 digits": 10**2000 + 7,
    "-2000 digits": -(10**2000) - 7,
    "true": True,
    "false": False,
    "none": None,
    "empty list": [],
    "empty dict": {},
    "empty bytes": b"",
    "str enum": Color.RED,
    "int enum": Level.HIGH,
    "bytes": b"\x00\xff\x80text",
    "bytearray": bytearray(b"\x00\xff"),
    "dataclass": Point(1),
    "pydantic": Model(name="m", tags=["a"]),
    "human message": HumanMessage("hi \0 there", id="1"),
    "tool calls": AIMessage("", tool_calls=[{"name": "f", "args": {"a": [1, {"b": None}]}, "id": "c"}], id="2"),
    "tool message": ToolMessage("42", tool_call_id="c", artifact={"raw": b"\x00"}, id="3"),
    "datetime": datetime.datetime(2024, 2, 29, 12, 0, 1, 5, tzinfo=datetime.timezone.utc),
    "date": datetime.date(1, 1, 1),
    "timedelta": datetime.timedelta(days=-1, microseconds=3),
    "uuid": uuid.UUID(int=7),
    "decimal": decimal.Decimal("1.500"),
    "set": {1, 2, 3},
    "frozenset": frozenset({"a"}),
    "deque": deque([1, "a"]),
    "int keys": {1: "a", 2: {3: "b"}},
    "nested nul": {"a\0": ["\0", {"b": "\0"}]},
    "nested floats": [math.inf, -0.0, 5e-324, 1e308],
    "text of 1023": "x" * 1023,
    "text of 1024": "x" * 1024,
    "text of 1025": "x" * 1025,
    "text of 1024 beyond latin": "日" * 1024,
    "text of 100k": "é" * 100_000,
}

# What the serializer itself gives back in another form; we must give the same one.
AS_THE_SERIALIZER: dict[str, Any] = {
    "tuple": (1, "a", (2,)),
    "nested tuple": {"t": [(1, 2)]},
    "nested surrogates": ["\ud800", {"k": "\udfff"}],
    "text subclass": Name("n"),
}


def identical(one: Any, other: Any) -> bool:
    """Whether two values are equal, of the same type at every level, and -0.0 not 0.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return (math.isnan(one) and math.isnan(other)) or (
            one == other and math.copysign(1, one) == math.copysign(1, other)
        )
    if isinstance(one, dict):
        return list(one) == list(other) and all(identical(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple, deque)):
        return len(one) == len(other) and all(map(identical, one, other))
    if dataclasses.is_dataclass(one):
        return identical(vars(one), vars(other))
    return bool(one == other)


def put(
    saver: BaseCheckpointSaver[str],
    values: Mapping[str, Any],
    *,
    at: RunnableConfig | None = None,
    thread_id: Any = "thread",
    ns: str = "",
    version: Any = None,
    **metadata: Any,
) -> RunnableConfig:
    """Put a checkpoint whose channels are all new."""
    versions = dict.fromkeys(values, saver.get_next_version(None, None) if version is None else version)
    checkpoint = empty_checkpoint() | {
        "v": 4,
        "id": str(uuid6()),
        "channel_values": dict(values),
        "channel_versions": versions,
    }
    config: RunnableConfig = at or {"configurable": {"thread_id": thread_id, "checkpoint_ns": ns}}
    described: Any = {"source": "loop", "step": 0, "parents": {}, **metadata}
    return saver.put(config, checkpoint, described, dict(versions))


def latest(config: RunnableConfig) -> RunnableConfig:
    configurable = config["configurable"]
    return {"configurable": {name: configurable[name] for name in ("thread_id", "checkpoint_ns")}}


@dataclass
class Tiers:
    """Reads one checkpoint in every way there is."""

    saver: TieredSaver
    redis_url: str
    postgres_url: str
    key_prefix: str

    def evict(self) -> None:
        with redis.Redis.from_url(self.redis_url) as client:
            names = list(client.scan_iter(f"{{{self.key_prefix}:*}}:hot:*", 1000))
            assert names, "nothing is hot"
            client.delete(*names)

    def read(self, config: RunnableConfig) -> dict[str, CheckpointTuple]:
        """Read the latest: hot, cold with its flush, warmed, listed, and by a plain PostgresSaver."""
        at = latest(config)
        found = {"hot": self.saver.get_tuple(at)}
        self.saver.flush()
        found["flushed"] = self.saver.get_tuple(at)
        self.evict()
        found["cold"] = self.saver.get_tuple(at)
        misses = self.saver.stats().hot_misses
        found["warmed"] = self.saver.get_tuple(at)
        assert self.saver.stats().hot_misses == misses, "it was not warmed"
        found["listed"] = next(self.saver.list(at))
        with PostgresSaver.from_conn_string(self.postgres_url) as reference:
            found["by PostgresSaver"] = reference.get_tuple(at)
        for way, one in found.items():
            assert one is not None, way
        return found  # type: ignore[return-value]


@pytest.fixture
def tiers(make_saver: Callable[..., TieredSaver], redis_url: str, postgres_url: str, key_prefix: str) -> Tiers:
    return Tiers(make_saver(), redis_url, postgres_url, key_prefix)


def check(tiers: Tiers, config: RunnableConfig, values: Mapping[str, Any], writes: Mapping[str, Any]) -> None:
    for way, found in tiers.read(config).items():
        stored = found.checkpoint["channel_values"]
        assert set(stored) == set(values), way
        assert [name for name in values if not identical(stored[name], values[name])] == [], way
        pending = {channel: value for _, channel, value in found.pending_writes or []}
        assert set(pending) == set(writes), way
        assert [name for name in writes if not identical(pending[name], writes[name])] == [], way


# --- values ----------------------------------------------------------------------------------------------------------


def test_every_value_comes_back_as_it_was(tiers: Tiers) -> None:
    """Channel values and pending writes keep value and type, hot, cold, warmed, listed and under PostgresSaver."""
    config = put(tiers.saver, EXACT)
    tiers.saver.put_writes(config, list(EXACT.items()), "task")

    check(tiers, config, EXACT, EXACT)


def test_a_value_that_changes_only_its_type_is_stored_anew(tiers: Tiers) -> None:
    """True, 1 and 1.0 (or NaN, twice) in one channel are told apart from checkpoint to checkpoint."""
    config = None
    for value in (
        True,
        1,
        1.0,
        Level.HIGH,
        "red",
        Color.RED,
        math.nan,
        math.nan,
        -0.0,
        0.0,
        None,
        "",
        b"",
        [],
        "x" * 2000,
    ):
        config = put(tiers.saver, {"value": value}, at=config, version=tiers.saver.get_next_version(None, None))
        check(tiers, config, {"value": value}, {})


def test_values_the_serializer_changes_are_changed_alike(tiers: Tiers) -> None:
    """Where LangGraph's serializer has no exact form (tuples, nested surrogates), every reader gives its form."""
    expected = {name: SERDE.loads_typed(SERDE.dumps_typed(value)) for name, value in AS_THE_SERIALIZER.items()}
    config = put(tiers.saver, AS_THE_SERIALIZER)
    tiers.saver.put_writes(config, list(AS_THE_SERIALIZER.items()), "task")

    check(tiers, config, expected, expected)


def test_a_float_subclass_is_kept_as_its_number(tiers: Tiers) -> None:
    """LangGraph's serializer refuses it and PostgresSaver inlines it; every reader gives the float."""
    config = put(tiers.saver, {"value": Degrees(36.6)})
    tiers.saver.put_writes(config, [("value", Degrees(math.inf))], "task")

    check(tiers, config, {"value": 36.6}, {"value": math.inf})


@pytest.mark.parametrize(
    "value",
    [object(), lambda: None, {"deep": [2**70]}, range(3)],
    ids=["object", "function", "nested huge int", "range"],
)
def test_what_no_form_holds_is_refused_before_anything_is_written(tiers: Tiers, value: Any) -> None:
    """I7: SerializationError names the channel, and neither checkpoint nor any of the call's writes is there."""
    config = put(tiers.saver, {"fine": [1]})

    with pytest.raises(SerializationError, match="'odd'"):
        put(tiers.saver, {"fine": [2], "odd": value}, at=config)
    with pytest.raises(SerializationError, match="'odd'"):
        tiers.saver.put_writes(config, [("fine", 1), ("odd", value)], "task")

    check(tiers, config, {"fine": [1]}, {})


LARGE: dict[str, Callable[[], Any]] = {
    "bytes": lambda: bytes(range(256)) * (50 * 2**20 // 256),
    "list of strings": lambda: [f"{number:010d}" + "x" * 990 for number in range(50 * 1024)],
}


def test_fifty_megabytes_pass(tiers: Tiers) -> None:
    """Values far beyond every batch limit are stored and read whole, as a channel's value and as a pending write."""
    channel, write = LARGE["bytes"](), LARGE["list of strings"]()
    config = put(tiers.saver, {"large": channel})
    tiers.saver.put_writes(config, [("large", write)], "task")

    def same(found: CheckpointTuple | None) -> bool:
        # Not in an assert: pytest would explain the difference of two such values for minutes.
        return found is not None and (found.checkpoint["channel_values"], found.pending_writes) == (
            {"large": channel},
            [("task", "large", write)],
        )

    hot = same(tiers.saver.get_tuple(latest(config)))
    tiers.saver.flush()
    tiers.evict()
    cold = same(tiers.saver.get_tuple(latest(config)))
    warmed = same(tiers.saver.get_tuple(latest(config)))
    with PostgresSaver.from_conn_string(tiers.postgres_url) as reference:
        by_postgres_saver = same(reference.get_tuple(latest(config)))

    assert (hot, cold, warmed, by_postgres_saver) == (True, True, True, True)
    assert tiers.saver.stats().hot_hits == 2


def test_a_thousand_channels(tiers: Tiers) -> None:
    """One checkpoint of 1000 channels, blobs and inlined ones mixed, then one that changes 600 and drops 300."""
    values: dict[str, Any] = {f"channel {n}": [n] if n % 2 else n for n in range(1000)}
    first = put(tiers.saver, values)
    check(tiers, first, values, {})

    changed = {name: ["new"] for name in list(values)[:600]}
    kept = {name: value for name, value in {**values, **changed}.items() if name not in list(values)[700:]}
    found = tiers.saver.get_tuple(latest(first))
    assert found is not None
    versions = dict(found.checkpoint["channel_versions"])
    new = {
        name: tiers.saver.get_next_version(versions[name], None) for name in [*list(values)[:600], *list(values)[700:]]
    }
    checkpoint = {
        **found.checkpoint,
        "id": str(uuid6()),
        "channel_values": kept,
        "channel_versions": {**versions, **new},
    }
    second = tiers.saver.put(first, checkpoint, {"source": "loop", "step": 1, "parents": {}}, new)

    check(tiers, second, kept, {})


def test_five_thousand_writes_in_one_call(tiers: Tiers) -> None:
    """All writes of a call are kept, in the order of the call."""
    writes = [("log", [number]) for number in range(5000)]
    config = put(tiers.saver, {"log": []})

    tiers.saver.put_writes(config, writes, "task")

    for way, found in tiers.read(config).items():
        assert [(channel, value) for _, channel, value in found.pending_writes or []] == writes, way


def test_three_hundred_namespaces(tiers: Tiers) -> None:
    """Each namespace has its own latest; a delete removes them all from both tiers."""
    names = ["", *(f"child:{number}|grand:{uuid.UUID(int=number)}" for number in range(299))]
    for step in (0, 1):
        for number, ns in enumerate(names):
            put(tiers.saver, {"n": [number, step]}, ns=ns)

    def values() -> list[Any]:
        found = [tiers.saver.get_tuple({"configurable": {"thread_id": "thread", "checkpoint_ns": ns}}) for ns in names]
        return [one.checkpoint["channel_values"]["n"] if one else None for one in found]

    expected = [[number, 1] for number in range(300)]
    assert values() == expected
    tiers.saver.flush()
    tiers.evict()
    assert values() == expected
    assert len(list(tiers.saver.list({"configurable": {"thread_id": "thread"}}))) == 600
    tiers.saver.delete_thread("thread")
    assert values() == [None] * 300


# --- names -----------------------------------------------------------------------------------------------------------

NAMES = [
    "a:b",
    "{tag}",
    "}{",
    "a/b|c",
    " spaces at both ends ",
    "'quo\"tes`",
    "🎈日本",
    "%s %% %(x)s",
    "line\nbreak\ttab\r",
    "; DROP TABLE checkpoints; --",
    "$1 {0} *?[a-z]",
    "../..",
    "x" * 2000,
    "é" * 600,
]


def test_any_text_can_name_a_thread_a_namespace_or_a_channel(tiers: Tiers) -> None:
    """Names are data in both tiers: whatever they hold, each addresses its own values, and only those."""
    for name in NAMES:
        ns = name if len(name) < 400 else "ns"
        channel = name if len(name) < 400 else "channel"
        config = put(tiers.saver, {channel: [name], "inline": name[:100]}, thread_id=name, ns=ns)
        tiers.saver.put_writes(config, [(channel, name)], name[:100], name)
        assert config["configurable"]["thread_id"] == name

        check(tiers, config, {channel: [name], "inline": name[:100]}, {channel: name})
    assert {summary.thread_id for summary in tiers.saver.thread_ids(limit=None)} == set(NAMES)


@pytest.mark.parametrize("name", ["back\\slash", "\\\\", "\\101", "\\x41"], ids=repr)
@pytest.mark.parametrize("where", ["channel", "written channel", "task"])
def test_a_backslash_in_a_name_never_makes_a_checkpoint_unreadable(tiers: Tiers, name: str, where: str) -> None:
    """I7: PostgresSaver's reader casts these names to bytea, so they are refused, or read back as they are."""
    put(tiers.saver, {"fine": [1]}, thread_id="other")
    config = put(tiers.saver, {"v": [1]})
    values, writes = {"v": [1]}, {}
    tasks: set[str] = set()
    try:
        if where == "channel":
            config = put(tiers.saver, {name: [1]}, at=config)
            values = {name: [1]}
        elif where == "written channel":
            tiers.saver.put_writes(config, [(name, 2)], "task")
            writes, tasks = {name: 2}, {"task"}
        else:
            tiers.saver.put_writes(config, [("v", 2)], name)
            writes, tasks = {"v": 2}, {name}
    except InvalidInputError:
        values, writes = {"v": [1]}, {}

    check(tiers, config, values, writes)
    for way, found in tiers.read(config).items():
        assert {task for task, _, _ in found.pending_writes or []} == tasks, way
    assert {found.config["configurable"]["thread_id"] for found in tiers.saver.list(None)} == {"thread", "other"}


PAIRS = [
    (("a:b", "c"), ("a", "b:c")),
    (("a", ":b"), ("a:", "b")),
    (("1:a", ""), ("1", "a:")),
    (("t", "hot:1:1:t"), ("t:hot:1:1:t", "")),
    (("x}", "y"), ("x", "}y")),
]


@pytest.mark.parametrize("pair", PAIRS, ids=repr)
def test_names_that_join_to_the_same_text_stay_apart(
    tiers: Tiers, pair: tuple[tuple[str, str], tuple[str, str]]
) -> None:
    """Two (thread, namespace) pairs never share a key, nor does deleting one thread touch the other."""
    configs = [put(tiers.saver, {"v": [number]}, thread_id=t, ns=ns) for number, (t, ns) in enumerate(pair)]

    for number, config in enumerate(configs):
        check(tiers, config, {"v": [number]}, {})
    tiers.saver.delete_thread(pair[0][0])
    if pair[0][0] != pair[1][0]:
        assert tiers.saver.get_tuple(latest(configs[0])) is None
        check(tiers, configs[1], {"v": [1]}, {})


@pytest.mark.parametrize("thread_id", [7, uuid.UUID(int=7)], ids=["int", "UUID"])
def test_thread_ids_that_are_not_text_are_their_text(tiers: Tiers, thread_id: Any) -> None:
    """An int or UUID names the same thread as its text, in every call."""
    config = put(tiers.saver, {"v": [1]}, thread_id=thread_id)
    tiers.saver.put_writes({"configurable": {**config["configurable"], "thread_id": thread_id}}, [("v", 2)], "task")

    assert config["configurable"]["thread_id"] == str(thread_id)
    check(tiers, config, {"v": [1]}, {"v": 2})
    assert len(list(tiers.saver.list({"configurable": {"thread_id": thread_id}}))) == 1
    tiers.saver.delete_thread(thread_id)
    assert tiers.saver.get_tuple(latest(config)) is None


@pytest.mark.parametrize("bad", ["nul\0", "surrogate\ud800"], ids=["nul", "surrogate"])
def test_names_postgresql_cannot_hold_are_refused(tiers: Tiers, bad: str) -> None:
    """I7: a NUL or a lone surrogate in any name is an InvalidInputError, and nothing is written."""
    config = put(tiers.saver, {"v": [1]})

    for attempt in (
        lambda: put(tiers.saver, {"v": 1}, thread_id=bad),
        lambda: put(tiers.saver, {"v": 1}, ns=bad),
        lambda: put(tiers.saver, {bad: 1}),
        lambda: put(tiers.saver, {bad: [1]}),
        lambda: tiers.saver.put_writes(config, [("v", 1), (bad, 2)], "task"),
        lambda: tiers.saver.put_writes(config, [("v", 1)], bad),
        lambda: tiers.saver.put_writes(config, [("v", 1)], "task", bad),
        lambda: tiers.saver.get_tuple({"configurable": {"thread_id": bad}}),
        lambda: tiers.saver.delete_thread(bad),
    ):
        with pytest.raises(InvalidInputError):
            attempt()

    check(tiers, config, {"v": [1]}, {})


# --- metadata and versions -------------------------------------------------------------------------------------------


def test_metadata_reads_the_same_in_both_tiers(tiers: Tiers) -> None:
    """What PostgreSQL's JSON cannot hold is bent before it is stored anywhere, so that hot and cold agree."""
    odd = {
        "text": "plain",
        "emoji": "🎈",
        "nested nul": {"a": ["x\0y", {"b\0": 1}]},
        "nested surrogate": ["a\ud800b"],
        "nan": [math.nan, {"inf": math.inf, "-inf": -math.inf}],
        "deep": {"a": {"b": [1, 2.5, None, True, {"c": "d"}]}},
        "large": "x" * 100_000,
        "huge": 10**30,
    }

    config = put(tiers.saver, {"v": [1]}, **odd)

    found = tiers.read(config)
    for way, one in found.items():
        metadata: Any = one.metadata
        assert metadata == found["by PostgresSaver"].metadata, way
        assert metadata["nested nul"] == {"a": ["xy", {"b": 1}]}
        assert metadata["nested surrogate"] == ["a\ufffdb"]
        assert metadata["nan"] == ["NaN", {"inf": "Infinity", "-inf": "-Infinity"}]
        assert {name: metadata[name] for name in ("text", "emoji", "deep", "large", "huge")} == {
            name: odd[name] for name in ("text", "emoji", "deep", "large", "huge")
        }
    assert len(list(tiers.saver.list(None, filter={"deep": {"a": {"b": [1, 2.5, None, True, {"c": "d"}]}}}))) == 1
    assert list(tiers.saver.list(None, filter={"deep": {"a": 1}})) == []


def test_top_level_nul_and_surrogates_in_metadata(tiers: Tiers) -> None:
    """Top-level text in metadata loses its NUL, as LangGraph's own savers do, and keeps the rest."""
    config = put(tiers.saver, {"v": [1]}, nul="a\0b", surrogate="a\ud800b")

    for way, found in tiers.read(config).items():
        metadata: Any = found.metadata
        assert metadata["nul"] == "ab", way
        assert metadata["surrogate"] == "a\ufffdb", way


VERSIONS = [1, 2**63, 1.5, 1e16, 1e22, 1e-7, 3.0, "1", "00000000000000000000000000000001.0.5", "v:{}/ ü"]


@pytest.mark.parametrize("version", VERSIONS, ids=repr)
def test_channels_are_found_by_versions_of_any_kind(tiers: Tiers, version: Any) -> None:
    """I2: a blob is found by its version whatever type the graph's saver counts with; an equal version comes back."""
    config = put(tiers.saver, {"blob": [1], "inline": 1}, version=version)

    for way, found in tiers.read(config).items():
        assert found.checkpoint["channel_values"] == {"blob": [1], "inline": 1}, way
        assert found.checkpoint["channel_versions"] == {"blob": version, "inline": version}, way
