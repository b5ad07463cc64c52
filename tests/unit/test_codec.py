"""LangGraph's objects to records, and hot state back to LangGraph's objects."""

from __future__ import annotations

import enum
import json
import math
import re
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from langgraph.checkpoint.base import ERROR, INTERRUPT, RESUME, SCHEDULED, writes_sort_key
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.serde.types import _DeltaSnapshot

from langgraph_tiered_saver import InvalidInputError, SerializationError, TieredSaver, codec, names
from langgraph_tiered_saver.records import CheckpointRecord, unpack_value
from langgraph_tiered_saver.values import LONGEST_INLINE_STRING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from langchain_core.runnables import RunnableConfig

# On a busy machine neither a slow example nor slow generation is a failure.
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
SERDE = JsonPlusSerializer()
CONFIG: RunnableConfig = {"configurable": {"thread_id": "t", "checkpoint_ns": "ns", "checkpoint_id": "0-parent"}}
HERE = names.ThreadPosition("t", "ns", "")
LONG = "x" * (LONGEST_INLINE_STRING + 1)


class Rot13:
    """A cipher that hides text well enough for a test."""

    def encrypt(self, plaintext: bytes) -> tuple[str, bytes]:
        return "rot", bytes(byte ^ 0x5A for byte in plaintext)

    def decrypt(self, ciphername: str, ciphertext: bytes) -> bytes:
        assert ciphername == "rot"
        return bytes(byte ^ 0x5A for byte in ciphertext)


class HomeMade:
    """A serializer that encrypts and is no EncryptedSerializer."""

    def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
        type_, data = SERDE.dumps_typed(obj)
        return type_, Rot13().encrypt(data)[1]

    def loads_typed(self, data: tuple[str, bytes]) -> Any:
        return SERDE.loads_typed((data[0], Rot13().decrypt("rot", data[1])))


class Colour(str, enum.Enum):
    """A value that equals its text and is more than that."""

    RED = "red"


class Celsius(float):
    """A subclass that the serializer does not know."""


def checkpoint_of(values: Mapping[str, Any], versions: Mapping[str, Any] | None = None, **more: Any) -> Any:
    return {
        "v": 4,
        "id": "1-child",
        "ts": "2026-01-01T00:00:00+00:00",
        "channel_values": dict(values),
        "channel_versions": dict.fromkeys(values, "1") if versions is None else dict(versions),
        "versions_seen": {},
        **more,
    }


def encode(values: Mapping[str, Any], new: Mapping[str, Any] | None = None, *, serde: Any = SERDE, **more: Any) -> Any:
    checkpoint = checkpoint_of(values, **more)
    new_versions = checkpoint["channel_versions"] if new is None else dict(new)
    return codec.encode_checkpoint(serde, CONFIG, checkpoint, {"source": "loop", "step": 1}, new_versions)


def hot_fields(encoded: codec.EncodedCheckpoint) -> dict[bytes, bytes]:
    """Give what `put.lua` keeps of a complete checkpoint where nothing was hot."""
    record = encoded.record()
    fields = {
        b"g": b"1",
        b"id": record.checkpoint_id.encode(),
        b"p": record.parent_id.encode(),
        b"c": record.checkpoint,
        b"m": record.metadata,
        b"k": b"%d" % encoded.blob_count,
    }
    for channel, version, value, _ in record.blobs:
        fields[b"v:" + channel.encode()] = version.encode()
        fields[b"b:" + channel.encode()] = value
    return fields


def exact(value: Any) -> Any:
    """Compare types and NaN too."""
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return (type(value).__name__, [exact(item) for item in value])
    return (type(value), repr(value))


# PostgresSaver's reader takes a backslash in these names for an escape, so that they are refused.
channels = st.text(st.characters(codec="utf-8", exclude_characters="\0\\"), min_size=1, max_size=8)
# Python prints integers of up to 4,300 digits.
numbers = st.one_of(st.integers(), st.integers(-(2**14000), 2**14000), st.floats())
texts = st.one_of(
    st.text(st.characters(), max_size=20),
    st.text("\\u0nx\0\ud800\udfffé", max_size=12),
    st.integers(1000, 1050).map("é".__mul__),
    # A high surrogate and a low one after it are how JSON writes one character, so that they are not two lone ones.
).filter(lambda text: not re.search("[\ud800-\udbff][\udc00-\udfff]", text))
plain = st.one_of(st.none(), st.booleans(), numbers, texts)
# What LangGraph's own serializer holds inside containers.
storable = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**63), st.floats(), st.text(st.characters(codec="utf-8")),
    st.binary(), st.uuids(), st.datetimes().map(lambda time: time.replace(fold=0)),
    st.decimals(allow_nan=False),
)  # fmt: skip
nested = st.recursive(
    storable, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text("abc"), inner, max_size=3))
)
states = st.dictionaries(channels, st.one_of(plain, nested), max_size=6)


# --- values ----------------------------------------------------------------------------------------------------------


@settings(RELAXED, max_examples=300)
@given(states)
@example({"a": "\\u0000", "b": "\0", "c": "\ud800", "d": math.nan, "e": -0.0, "f": 2**64, "g": 1e16, "h": LONG})
def test_hot_values_come_back_with_their_types(values: dict[str, Any]) -> None:
    """I9: what a hot read gives is what was put, value for value and type for type."""
    found = codec.decode_hot(SERDE, HERE, hot_fields(encode(values)), 1)

    assert found is not None
    assert exact(found.checkpoint["channel_values"]) == exact(values)
    assert found.config["configurable"] == {"thread_id": "t", "checkpoint_ns": "ns", "checkpoint_id": "1-child"}
    assert found.parent_config == CONFIG


@RELAXED
@given(states)
def test_what_is_inlined_is_text_that_postgresql_takes(values: dict[str, Any]) -> None:
    """I1: nothing in a record's JSON is refused by PostgreSQL for good: no NUL, lone surrogate, NaN or infinity."""
    record = encode(values).record()

    def check(constant: str) -> None:
        raise AssertionError(constant)

    inlined = json.loads(record.checkpoint.decode(), parse_constant=check)["channel_values"]
    for channel, value in inlined.items():
        assert value is None or type(value) in (bool, int, float, str)
        if isinstance(value, str):
            assert "\0" not in value
            assert len(value) <= LONGEST_INLINE_STRING
        assert exact(value) == exact(values[channel])
    assert {channel for channel, *_ in record.blobs} == set(values) - set(inlined)


@pytest.mark.parametrize(
    ("value", "inlined"),
    [
        (None, True),
        (True, True),
        (0, True),
        (-(2**70), True),
        (10**4000, False),
        (0.0, True),
        (-0.0, False),
        (1.5, True),
        (9.9e15, True),
        (1e16, False),
        (math.nan, False),
        (math.inf, False),
        ("", True),
        ("text ü 🎈", True),
        ("\\u0000", True),
        ("a\0b", False),
        ("\ud800", False),
        ("x" * LONGEST_INLINE_STRING, True),
        (LONG, False),
        (b"", False),
        ([], False),
        (Colour.RED, False),
        (Celsius(1.5), False),
    ],
    ids=lambda value: f"{type(value).__name__}-{value!r:.20}" if not (type(value) is int and value > 2**80) else "huge",
)
def test_the_inlining_rule(value: Any, inlined: bool) -> None:
    """As in PostgresSaver, except for what PostgreSQL's JSON would change, refuse or store again at every step."""
    encoded = encode({"channel": value})

    assert ("channel" in json.loads(encoded.checkpoint)["channel_values"]) == inlined
    assert [channel for channel, *_ in encoded.blobs] == ([] if inlined else ["channel"])
    assert encoded.blob_count == (0 if inlined else 1)


@pytest.mark.parametrize("serde", [EncryptedSerializer(Rot13()), HomeMade()], ids=["official", "home-made"])
@RELAXED
@given(value=st.one_of(st.text(min_size=6, max_size=40), st.integers(-(2**63), 2**64 - 1), st.none(), st.booleans()))
def test_no_channel_value_is_in_plaintext_under_a_serializer_that_encrypts(serde: Any, value: Any) -> None:
    """A serializer that encrypts gets every value, primitives too; none is inlined."""
    encoded = encode({"channel": value}, serde=serde)

    record = encoded.record()
    assert json.loads(record.checkpoint)["channel_values"] == {}
    assert [channel for channel, *_ in record.blobs] == ["channel"]
    found = codec.decode_hot(serde, HERE, hot_fields(encoded), 1)
    assert found is not None
    assert exact(found.checkpoint["channel_values"]["channel"]) == exact(value)


def test_an_integer_that_python_does_not_print_is_refused() -> None:
    """I7: neither JSON nor the serializer takes an integer of more than 4,300 digits; that is a typed error."""
    with pytest.raises(SerializationError, match="'channel'"):
        encode({"channel": 10**5000})


@pytest.mark.parametrize("value", [object(), lambda: None, (value for value in ())], ids=["object", "lambda", "iter"])
def test_a_value_the_serializer_cannot_take_is_refused_with_its_channel(value: Any) -> None:
    """I7: a typed error that names the channel, before anything is written."""

    class Strict(JsonPlusSerializer):
        def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
            if obj is value:
                raise TypeError("not serializable")
            return super().dumps_typed(obj)

    with pytest.raises(SerializationError, match="'odd'"):
        encode({"fine": [1], "odd": value}, serde=Strict())
    with pytest.raises(SerializationError, match="'odd'"):
        codec.encode_writes(Strict(), CONFIG, [("fine", 1), ("odd", value)], "task", "")


def test_an_unchanged_channel_is_not_serialized() -> None:
    """A `put` costs what changed; the rest is named by its version."""

    class Counting(JsonPlusSerializer):
        dumped: list[Any] = []  # noqa: RUF012

        def dumps_typed(self, obj: Any) -> tuple[str, bytes]:
            self.dumped.append(obj)
            return super().dumps_typed(obj)

    serde = Counting()
    versions = {"big": "1", "small": "2", "count": "2"}

    encoded = encode({"big": ["big"], "small": ["small"], "count": 7}, {"small": "2", "count": "2"}, serde=serde,
                     versions=versions)  # fmt: skip

    assert ["big"] not in serde.dumped
    assert (encoded.unchanged, encoded.blob_count) == ([("big", "1")], 2)
    assert [channel for channel, *_ in encoded.record().blobs] == ["small"]
    encoded.carry_every_channel()
    assert (encoded.unchanged, encoded.blob_count) == ([], 2)
    found = codec.decode_hot(serde, HERE, hot_fields(encoded), 1)
    assert found is not None
    assert found.checkpoint["channel_values"] == {"big": ["big"], "small": ["small"], "count": 7}


def test_a_channel_that_lost_its_value_is_removed() -> None:
    """I9: an ephemeral channel has a new version and no value; its last blob must not stay hot."""
    encoded = encode({"kept": [1], "inline": 3}, {"ephemeral": "2", "inline": "2"},
                     versions={"kept": "1", "ephemeral": "2", "inline": "2"})  # fmt: skip

    assert sorted(encoded.removed) == ["ephemeral", "inline"]


def test_a_delta_snapshot_leaves_the_marker_that_postgres_saver_leaves() -> None:
    """PostgresSaver's reader and prune know a snapshot by `true` in the JSON and a blob behind it."""
    encoded = encode({"log": _DeltaSnapshot(["a"])})

    assert json.loads(encoded.checkpoint)["channel_values"] == {"log": True}
    assert [(channel, version) for channel, version, *_ in encoded.blobs] == [("log", "1")]
    found = codec.decode_hot(SERDE, HERE, hot_fields(encoded), 1)
    assert found is not None
    assert found.checkpoint["channel_values"] == {"log": _DeltaSnapshot(["a"])}


# --- hot state -------------------------------------------------------------------------------------------------------


@RELAXED
@given(states, st.data())
def test_a_hash_that_misses_anything_is_a_miss(values: dict[str, Any], data: st.DataObject) -> None:
    """I2, I9: a hot hash without one of its fields, or with another version, is never half an answer."""
    fields = hot_fields(encode(values))
    essential = sorted(name for name in fields if name != b"id" and not name.startswith(b"b:"))
    name = data.draw(st.sampled_from(essential))
    changed = dict(fields)
    if name.startswith(b"v:") and data.draw(st.booleans()):
        changed[name] = b"another version"
    else:
        del changed[name]

    assert codec.decode_hot(SERDE, HERE, changed, 1) is None
    assert codec.decode_hot(SERDE, HERE, fields, 1) is not None


@pytest.mark.parametrize("fields", [{}, {b"l": b"token"}, {b"u": b"1-child"}])
def test_a_hash_without_a_checkpoint_is_a_miss(fields: dict[bytes, bytes]) -> None:
    """I7: an empty hash, a lease or early writes alone say nothing about what there is."""
    assert codec.decode_hot(SERDE, HERE, fields, 1) is None


@pytest.mark.parametrize(("uncertain", "trusted"), [(b"0-parent", True), (b"1-child", False), (b"2-later", False)])
def test_uncertain_hot_state_is_a_miss(uncertain: bytes, trusted: bool) -> None:
    """I9: up to the checkpoint that is noted as uncertain, the cold tier is asked."""
    fields = {**hot_fields(encode({"a": [1]})), b"u": uncertain}

    assert (codec.decode_hot(SERDE, HERE, fields, 1) is not None) == trusted


task_names = st.text(st.characters(codec="utf-8", exclude_characters="\0\\"), min_size=1, max_size=4)
calls = st.tuples(
    task_names,
    task_names | st.just(""),
    st.lists(st.tuples(st.sampled_from(["a", "b", ERROR, RESUME]), nested), min_size=1, max_size=3),
)


@RELAXED
@given(st.lists(calls, max_size=4, unique_by=lambda call: call[0]), st.randoms())
def test_pending_writes_come_in_langgraph_s_order(given_calls: list[Any], random: Any) -> None:
    """I9: by path, task and index, whatever the order of arrival and of the hash's fields."""
    fields = hot_fields(encode({}))
    expected = {}
    for task_id, path, written in given_calls:
        target: RunnableConfig = {"configurable": {"thread_id": "t", "checkpoint_ns": "ns", "checkpoint_id": "1-child"}}
        _, record = codec.encode_writes(SERDE, target, written, task_id, path)
        for (index, channel, value), (_, original) in zip(record.writes, written, strict=True):
            name = b"w:1-child\0%b\0%d" % (task_id.encode(), index)
            fields[name] = b"\0".join([path.encode(), channel.encode(), value])
            expected[writes_sort_key(path, task_id, index)] = (task_id, channel, original)
    fields[b"w:1-child-of-another\0task\x000"] = b"path\0a\0null\0"
    shuffled = list(fields.items())
    random.shuffle(shuffled)

    found = codec.decode_hot(SERDE, HERE, dict(shuffled), 1)

    assert found is not None
    assert exact(found.pending_writes) == exact([write for _, write in sorted(expected.items())])


# --- writes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "upsert", "indexes"),
    [
        (["a", "b", "a"], False, [0, 1, 2]),
        ([ERROR], True, [-1]),
        ([INTERRUPT, RESUME], True, [-3, -4]),
        ([SCHEDULED, "a"], False, [-2, 1]),
        (["a", INTERRUPT, "b"], False, [0, -3, 2]),
        ([], True, []),
    ],
)
def test_special_writes_have_places_of_their_own(written: list[str], upsert: bool, indexes: list[int]) -> None:
    """As `WRITES_IDX_MAP` says: only a call of nothing but special writes replaces earlier ones."""
    position, record = codec.encode_writes(SERDE, CONFIG, [(name, 1) for name in written], "task", "path")

    assert position == names.ThreadPosition("t", "ns", "0-parent")
    assert (record.upsert, [index for index, _, _ in record.writes]) == (upsert, indexes)
    assert [SERDE.loads_typed(unpack_value(value)) for _, _, value in record.writes] == [1] * len(written)


# --- versions, names, metadata ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "text"),
    [
        ("00000000000000000000000000000001.0.5", "00000000000000000000000000000001.0.5"),
        ("", ""),
        (1, "1"),
        (2**70, "1180591620717411303424"),
        (1.0, "1.0"),
        (0.1, "0.1"),
        (1e16, "10000000000000000"),
        (1.5e20, "150000000000000000000"),
        (1e-7, "0.0000001"),
        (-2.5, "-2.5"),
    ],
)
def test_versions_are_written_as_postgresql_s_jsonb_writes_them(version: Any, text: str) -> None:
    """I2: a blob is joined by this text; recorded from `SELECT to_jsonb(...) ->> 0` on PostgreSQL 18."""
    assert names.version_text(version) == text


@RELAXED
@given(st.one_of(st.none(), st.integers(0, 10**6), st.text("0123456789", min_size=1, max_size=32)))
def test_our_versions_continue_those_of_postgres_saver(current: Any) -> None:
    """The next version is greater than the current one, and has PostgresSaver's form."""
    ours, theirs = (
        TieredSaver.get_next_version(None, current, None),  # type: ignore[arg-type]
        PostgresSaver.get_next_version(None, current, None),  # type: ignore[arg-type]
    )

    assert ours.split(".")[0] == theirs.split(".")[0]
    assert len(ours.split(".", 1)[1]) >= 16
    following = TieredSaver.get_next_version(None, ours, None)  # type: ignore[arg-type]
    assert following > ours


@pytest.mark.parametrize("thread_id", ["t", 7, uuid.UUID(int=7), "ü {x}:/ 🎈", "0"])
def test_a_thread_id_may_be_what_langgraph_takes(thread_id: Any) -> None:
    """A thread id is kept as text, whatever was passed."""
    position = names.position_of({"configurable": {"thread_id": thread_id}}, what="put")

    assert position == names.ThreadPosition(str(thread_id), "", "")


@pytest.mark.parametrize(
    "configurable",
    [
        None,
        {},
        {"thread_id": None},
        {"thread_id": ""},
        {"thread_id": "a\0"},
        {"thread_id": "\ud800"},
        {"thread_id": "t", "checkpoint_ns": "\0"},
        {"thread_id": "t", "checkpoint_id": "\udfff"},
    ],
    ids=repr,
)
def test_a_position_that_cannot_be_stored_is_refused(configurable: Any) -> None:
    """I7: no thread_id, or a name that PostgreSQL cannot store, is a typed error before anything is written."""
    config: Any = {"configurable": configurable} if configurable is not None else None
    for call in (
        lambda: names.position_of(config, what="put"),
        lambda: codec.encode_checkpoint(SERDE, config, checkpoint_of({}), {}, {}),
        lambda: codec.encode_writes(SERDE, config, [("a", 1)], "task", ""),
    ):
        with pytest.raises(InvalidInputError):
            call()


@pytest.mark.parametrize("name", ["a\\b", "\\"], ids=["within", "alone"])
def test_names_with_a_backslash_are_refused(name: str) -> None:
    """I7: PostgresSaver's reader casts these names to bytes, where a backslash is an escape or an error."""
    bad: list[Any] = [
        lambda: encode({name: [1]}),
        lambda: codec.encode_writes(SERDE, CONFIG, [(name, 1)], "task", ""),
        lambda: codec.encode_writes(SERDE, CONFIG, [("a", 1)], name, ""),
    ]
    for call in bad:
        with pytest.raises(InvalidInputError):
            call()


@pytest.mark.parametrize("name", ["nul\0", "\ud800"], ids=["nul", "surrogate"])
def test_names_that_cannot_be_stored_are_refused(name: str) -> None:
    """I7: in channels, tasks, paths and node names too, so that no record is refused for good later."""
    bad: list[Any] = [
        lambda: encode({name: [1]}),
        lambda: encode({name: 1}),
        lambda: encode({"a": 1}, versions_seen={name: {"a": "1"}}),
        lambda: encode({"a": 1}, id=name),
        lambda: codec.encode_writes(SERDE, CONFIG, [(name, 1)], "task", ""),
        lambda: codec.encode_writes(SERDE, CONFIG, [("a", 1)], name, ""),
        lambda: codec.encode_writes(SERDE, CONFIG, [("a", 1)], "task", name),
    ]
    for call in bad:
        with pytest.raises(InvalidInputError):
            call()


def test_writes_without_a_checkpoint_id_are_refused() -> None:
    """I7: writes belong to a checkpoint; without its id nobody could find them."""
    with pytest.raises(InvalidInputError, match="checkpoint_id"):
        codec.encode_writes(SERDE, {"configurable": {"thread_id": "t"}}, [("a", 1)], "task", "")


@RELAXED
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6),
        st.recursive(plain, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2)),
        max_size=4,
    )
)
def test_any_json_metadata_becomes_text_that_postgresql_takes(metadata: dict[str, Any]) -> None:
    """I1: metadata is bent where PostgreSQL's JSON cannot hold it, so that the record is never refused for good."""
    encoded = codec.encode_checkpoint(SERDE, CONFIG, checkpoint_of({}), metadata, {})  # type: ignore[arg-type]

    def check(constant: str) -> None:
        raise AssertionError(constant)

    def texts_in(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [text for item in value.items() for part in item for text in texts_in(part)]
        if isinstance(value, list):
            return [text for part in value for text in texts_in(part)]
        return [value] if isinstance(value, str) else []

    assert not any("\0" in text for text in texts_in(json.loads(encoded.metadata.decode(), parse_constant=check)))


def test_metadata_that_is_no_json_is_refused() -> None:
    """I7: a typed error that says what to do, before anything is written."""
    with pytest.raises(SerializationError, match="metadata"):
        codec.encode_checkpoint(SERDE, CONFIG, checkpoint_of({}), {"step": object()}, {})  # type: ignore[typeddict-item]


def test_metadata_takes_what_postgres_saver_takes_from_the_config() -> None:
    """I1: the run id and the caller's own entries are added; LangGraph's bookkeeping and `writes` are not."""
    config: Any = {
        "configurable": {"thread_id": "t", "checkpoint_ns": "", "model": "m", "__pregel_x": "no", "langgraph_step": 1},
        "metadata": {"run_id": "r", "odd": object(), "nul": "a\0b"},
    }

    encoded = codec.encode_checkpoint(SERDE, config, checkpoint_of({}), {"step": 1, "writes": {"a": 1}}, {})  # type: ignore[typeddict-unknown-key]

    assert json.loads(encoded.metadata) == {"step": 1, "run_id": "r", "nul": "ab", "model": "m"}


def test_the_record_carries_what_the_flusher_needs() -> None:
    """I1: namespace, id, parent, checkpoint and metadata as JSON, and the changed channels' blobs."""
    record = encode({"a": [1], "b": 2}).record()

    assert isinstance(record, CheckpointRecord)
    assert (record.checkpoint_ns, record.checkpoint_id, record.parent_id) == ("ns", "1-child", "0-parent")
    assert json.loads(record.checkpoint) == {**checkpoint_of({"a": [1], "b": 2}), "channel_values": {"b": 2}}
    assert json.loads(record.metadata) == {"source": "loop", "step": 1}
    ((channel, version, value, _),) = record.blobs
    assert (channel, version, SERDE.loads_typed(unpack_value(value))) == ("a", "1", [1])
