"""Bytes of list elements used again: always those that the serializer would write."""

from __future__ import annotations

import array
import copy
import enum
import math
import struct
import sys
import threading
import tracemalloc
import warnings
from collections import OrderedDict
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import ormsgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from pydantic import BaseModel, computed_field, model_serializer

from langgraph_tiered_saver import ConfigurationError, reuse
from langgraph_tiered_saver.reuse import SHORTEST_LIST, ElementReuse

if TYPE_CHECKING:
    from collections.abc import Callable

RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
SERDE = JsonPlusSerializer()
PLENTY = 1 << 24
# Pydantic warns of a value that does not fit its field, and writes it all the same.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")


class Text(str):
    __slots__ = ()


class Number(int):
    pass


class Fraction(float):
    pass


class Color(str, enum.Enum):
    RED = "red"


class Inner(BaseModel):
    x: int = 1


def nan(payload: int) -> float:
    return struct.unpack("<d", struct.pack("<Q", 0x7FF8_0000_0000_0000 | payload))[0]


# Values that compare equal, or are packed alike, are what a check would take for each other.
LEAVES = st.one_of(
    st.sampled_from([None, True, False, 0, 1, -1, 0.0, -0.0, 1.0, math.inf, math.nan, nan(1), nan(2), "", "a", "1"]),
    st.sampled_from([2**53, 2**63, 2**64 - 1, -(2**63), "\0", "é", "ż", "ש", "\ud800", "😀", "x" * 300]),
    st.text(max_size=20),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.builds(Text, st.sampled_from(["a", "1"])),
    st.builds(Number, st.just(1)),
    st.just(Color.RED),
    st.sampled_from([b"", b"a", b"\xc3"]),
    st.builds(bytearray, st.just(b"a")),
    st.builds(memoryview, st.just(b"a")),
    st.builds(lambda: ormsgpack.Fragment(ormsgpack.packb(1))),
    st.builds(lambda: ormsgpack.Ext(5, b"a")),
    st.builds(Inner),
    st.builds(datetime.now, st.just(timezone.utc)),
    st.builds(lambda: {1, 2}),
    st.builds(lambda: frozenset([1])),
)
KEYS = st.one_of(
    st.sampled_from(["a", "b", "type", "text", "id", "name"]), st.just(1), st.just(Text("a")), st.just(True)
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3),
        st.lists(inner, max_size=2).map(tuple),
        st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2).map(OrderedDict),
    ),
    max_leaves=6,
)
PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.floats(allow_nan=False), st.text(max_size=10)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=5,
)
OBJECTS = st.dictionaries(st.sampled_from(["a", "b", "c"]), PLAIN, max_size=3)
CONTENTS = st.one_of(
    st.text(max_size=30),
    st.lists(
        st.one_of(st.text(max_size=5), st.builds(lambda text: {"type": "text", "text": text}, st.text())), max_size=3
    ),
)
IDS = st.one_of(st.none(), st.sampled_from(["1", "2", "3"]), st.uuids().map(str))
COMMON = {"content": CONTENTS, "id": IDS, "additional_kwargs": OBJECTS, "response_metadata": OBJECTS}
CALLS = st.lists(
    st.builds(lambda args, id: {"name": "tool", "args": args, "id": id}, OBJECTS, st.sampled_from(["c1", "c2"])),
    max_size=2,
)
USAGE = st.builds(
    lambda read, written: {
        "input_tokens": read,
        "output_tokens": written,
        "total_tokens": read + written,
        "input_token_details": {"cache_read": read},
    },
    st.integers(0, 9),
    st.integers(0, 9),
)
MESSAGES = st.one_of(
    st.builds(HumanMessage, **COMMON, name=st.sampled_from([None, "me"])),
    st.builds(HumanMessage, **COMMON, note=PLAIN),  # an extra field
    st.builds(AIMessage, **COMMON, tool_calls=CALLS, usage_metadata=st.none() | USAGE),
    st.builds(AIMessageChunk, **COMMON),
    st.builds(SystemMessage, **COMMON),
    st.builds(ChatMessage, **COMMON, role=st.just("critic")),
    st.builds(FunctionMessage, **COMMON, name=st.just("f")),
    st.builds(
        ToolMessage, **COMMON, tool_call_id=st.just("c1"), artifact=TREES, status=st.sampled_from(["success", "error"])
    ),
    st.sampled_from(["1", "2"]).map(lambda id: RemoveMessage(id=id)),
)
OTHERS = st.one_of(TREES, st.builds(Inner))


def outcome(dump: Callable[[], Any]) -> Any:
    """The result, or the error's class and text."""
    try:
        return dump()
    except Exception as error:
        return type(error), str(error)


def assert_same(reused: ElementReuse, elements: list[Any], serde: JsonPlusSerializer = SERDE) -> None:
    found = reused.dumps(serde, elements)
    assert found is None or found == serde.dumps_typed(elements)


def places(value: Any, found: list[Any]) -> list[Any]:
    """Every dict and list inside a value, itself included."""
    if isinstance(value, (dict, list)):
        found.append(value)
        for inner in list(value.values()) if isinstance(value, dict) else value:
            places(inner, found)
    return found


def edit(draw: Callable[[st.SearchStrategy[Any]], Any], elements: list[Any]) -> None:
    """Change something, at any depth, in place."""
    action = draw(st.sampled_from(["set", "remove", "append", "drop", "move", "copy", "class", "reload", "note"]))
    index = draw(st.integers(0, len(elements) - 1)) if elements else 0
    if action == "append" or not elements:
        elements.append(draw(st.one_of(MESSAGES, MESSAGES, OTHERS)))
        return
    element = elements[index]
    if action == "drop":
        del elements[index]
    elif action == "move":
        elements.insert(draw(st.integers(0, len(elements) - 1)), elements.pop(index))
    elif action == "copy":
        elements.append(element)
    elif action == "reload":
        elements[index] = SERDE.loads_typed(SERDE.dumps_typed(element))
    elif action == "note" and isinstance(element, BaseMessage):
        element.note = draw(TREES)  # type: ignore[attr-defined]
    elif action == "class" and type(element) in reuse._HEADS:
        element.__class__ = draw(st.sampled_from([HumanMessage, SystemMessage, AIMessage, Loud]))
    else:
        found = places(element.__dict__ if isinstance(element, BaseModel) else element, [])
        if isinstance(element, BaseModel) and element.__pydantic_extra__:
            found += places(element.__pydantic_extra__, [])
        if not found:
            return
        place = draw(st.sampled_from(found))
        if action == "remove" and place:
            del place[draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))]
        elif isinstance(place, dict):
            place[draw(st.sampled_from([*place, "a"]))] = draw(TREES)
        elif place and draw(st.booleans()):
            place[draw(st.integers(0, len(place) - 1))] = draw(TREES)
        else:
            place.append(draw(TREES))


class Loud(HumanMessage):
    """A subclass that writes what no look at its fields can tell."""

    @model_serializer(mode="wrap")
    def serialize(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {**handler(self), "set": sorted(self.__pydantic_fields_set__)}


@RELAXED
@given(st.data())
def test_whatever_is_edited_the_bytes_are_the_serializers(data: st.DataObject) -> None:
    """The reused bytes are those of the serializer after any edits, at any depth, and in any order of calls."""
    reused = ElementReuse(data.draw(st.sampled_from([PLENTY, 20_000, 2_000])))
    elements = data.draw(st.lists(MESSAGES, min_size=SHORTEST_LIST, max_size=SHORTEST_LIST + 12))
    serde = data.draw(st.sampled_from([SERDE, JsonPlusSerializer(pickle_fallback=True)]))
    for _ in range(data.draw(st.integers(1, 6))):
        assert_same(reused, elements, serde)
        for _ in range(data.draw(st.integers(0, 4))):
            try:
                edit(data.draw, elements)
            except (ValueError, TypeError, KeyError, ormsgpack.MsgpackEncodeError):
                continue
    assert_same(reused, elements, serde)
    assert reused.held_bytes <= reused.max_bytes


@RELAXED
@given(st.data())
def test_values_that_look_alike_are_told_apart(data: st.DataObject) -> None:
    """Replacing one value by another, however alike, gives the serializer's bytes."""
    elements: list[Any] = [HumanMessage("x", id=str(number)) for number in range(SHORTEST_LIST)]
    reused = ElementReuse(PLENTY)
    message = ToolMessage("x", tool_call_id="c", id="tool")
    elements.append(message)
    field = data.draw(st.sampled_from(["content", "artifact", "additional_kwargs", "name", "status", "id", "unknown"]))
    for value in data.draw(st.lists(TREES, min_size=2, max_size=6)):
        message.__dict__[field] = value
        assert_same(reused, elements)


@RELAXED
@given(st.one_of(MESSAGES, OTHERS))
def test_an_element_has_the_same_bytes_alone_and_in_a_list(element: Any) -> None:
    """A msgpack array is its header and its elements' bytes, as the serializer writes them."""
    alone = outcome(lambda: SERDE.dumps_typed([element])[1][1:])
    if isinstance(alone, bytes):
        assert SERDE.dumps_typed(["before", element, element])[1] == b"\x93" + ormsgpack.packb("before") + alone * 2


ALIKE: list[tuple[Any, Any]] = [
    (1, True),
    (0, False),
    (1, 1.0),
    (0.0, -0.0),
    (nan(1), nan(2)),
    ("a", Text("a")),
    (1, Number(1)),
    (1.0, Fraction(1.0)),
    ("red", Color.RED),
    ([1], (1,)),
    ({"a": 1}, OrderedDict(a=1)),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    ({"1": 1}, {1: 1}),
    ({"a": 1}, {Text("a"): 1}),
    ({1: "x"}, {True: "x"}),
    ([], {}),
    (None, False),
    (b"a", bytearray(b"a")),
    (b"a", memoryview(b"a")),
    (b"a", array.array("B", b"a")),
    (b"a", "a"),
    ({1, 2}, frozenset([1, 2])),
    ("\ud83d\ude00", "😀"),
    ("\ud800", "?"),
    ({"x": 1}, Inner()),
    (1, ormsgpack.Fragment(b"\x01")),
    ({"a": 1}, ormsgpack.Fragment(ormsgpack.packb({"a": 1}))),
    ("x", ormsgpack.Fragment(ormsgpack.packb("x"))),
]


@pytest.mark.parametrize("field", ["content", "artifact", "additional_kwargs", "name", "unknown"])
@pytest.mark.parametrize("nested", [lambda x: x, lambda x: [x], lambda x: {"k": [x]}], ids=["bare", "list", "deep"])
@pytest.mark.parametrize(
    "pair", ALIKE, ids=[f"{number}-{type(a).__name__}-{type(b).__name__}" for number, (a, b) in enumerate(ALIKE)]
)
def test_pairs_that_a_check_could_confuse(pair: tuple[Any, Any], nested: Callable[[Any], Any], field: str) -> None:
    """Two values that compare equal or are packed alike never stand for each other."""
    for first, second in (pair, pair[::-1]):
        message = ToolMessage("x", tool_call_id="c", id="tool")
        elements: list[Any] = [message, *(HumanMessage("x", id=str(number)) for number in range(SHORTEST_LIST))]
        reused = ElementReuse(PLENTY)
        for value in (first, second, first):
            message.__dict__[field] = nested(value)
            assert_same(reused, elements)
            assert_same(reused, elements)


def conversation(length: int) -> list[Any]:
    kinds: list[Callable[[str], BaseMessage]] = [
        lambda id: HumanMessage("hello", id=id),
        lambda id: AIMessage("", id=id, tool_calls=[{"name": "t", "args": {"a": [1]}, "id": "c"}]),
        lambda id: ToolMessage("found", tool_call_id="c", id=id, artifact={"rows": [1, 2.5, None]}),
        lambda id: SystemMessage([{"type": "text", "text": "żółw"}], id=id),
    ]
    return [kinds[number % 4](f"id-{number}") for number in range(length)]


class Counting(ElementReuse):
    """Counts the messages that had to be serialized."""

    serialized = 0

    def _serialize(self, serde: Any, missed: list[Any], parts: list[bytes]) -> bool:
        self.serialized += len(missed)
        return super()._serialize(serde, missed, parts)


@pytest.mark.parametrize("length", [SHORTEST_LIST, 15, 16, 17, 65_535, 65_536])
def test_every_array_header(length: int) -> None:
    """Each of msgpack's three array headers is written where the serializer writes it."""
    elements = conversation(20)[:length] * (length // min(length, 20) + 1)
    elements = elements[:length]
    reused = ElementReuse(PLENTY)
    for _ in range(2):
        assert reused.dumps(SERDE, elements) == SERDE.dumps_typed(elements)


@pytest.mark.parametrize("size", [1, 100, 200, 250, 65_000, 65_300, 65_500, 66_000])
def test_every_extension_header(size: int) -> None:
    """Messages of any size are kept and used again."""
    elements: list[Any] = [HumanMessage("x" * size, id=str(number)) for number in range(SHORTEST_LIST)]
    reused = Counting(PLENTY)
    for _ in range(2):
        assert reused.dumps(SERDE, elements) == SERDE.dumps_typed(elements)
    assert reused.serialized == len(elements)


def test_a_step_serializes_only_what_it_added() -> None:
    """An unchanged message is not serialized again, not even after it was loaded anew or moved."""
    elements = conversation(40)
    reused = Counting(PLENTY)
    reused.dumps(SERDE, elements)
    elements = [*SERDE.loads_typed(SERDE.dumps_typed(elements))[:1:-1], AIMessage("new", id="new")]
    elements[7].content = "edited"
    reused.serialized = 0
    assert reused.dumps(SERDE, elements) == SERDE.dumps_typed(elements)
    assert reused.serialized == 2


def test_messages_without_an_id_are_found_and_ids_used_again_are_no_danger() -> None:
    """A message without an id is found by its identity, which alone never makes it count as unchanged."""
    reused = Counting(PLENTY)
    elements: list[Any] = [HumanMessage(str(number)) for number in range(SHORTEST_LIST)]
    for _ in range(3):
        assert reused.dumps(SERDE, elements) == SERDE.dumps_typed(elements)
    assert reused.serialized == len(elements)
    for number in range(200):
        elements[3] = None  # so that the next message may be made in the same place
        elements[3] = HumanMessage(f"another {number % 7}")
        assert reused.dumps(SERDE, elements) == SERDE.dumps_typed(elements)


def test_conversations_share_entries_and_may_use_the_same_ids() -> None:
    """The same id in two conversations costs time, not correctness."""
    reused = Counting(PLENTY)
    first: list[Any] = [HumanMessage("first", id=str(number)) for number in range(20)]
    second: list[Any] = [HumanMessage("second", id=str(number)) for number in range(20)]
    for elements in (first, second, first, second):
        assert reused.dumps(SERDE, elements) == SERDE.dumps_typed(elements)
    reused.serialized = 0
    assert reused.dumps(SERDE, copy.deepcopy(second)) == SERDE.dumps_typed(second)
    assert reused.serialized == 0


class Other(JsonPlusSerializer):
    pass


class Cipher:
    def encrypt(self, plaintext: bytes) -> tuple[str, bytes]:
        return "none", plaintext

    def decrypt(self, ciphername: str, ciphertext: bytes) -> bytes:
        return ciphertext


def test_what_is_left_to_the_serializer() -> None:
    """None where nothing is gained, or where another serializer may write other bytes."""
    reused = ElementReuse(PLENTY)
    elements = conversation(20)
    patched = JsonPlusSerializer()
    patched.dumps_typed = lambda obj: ("json", b"[]")  # type: ignore[method-assign]
    for serde in (Other(), EncryptedSerializer(Cipher(), SERDE), patched):
        assert reused.dumps(serde, elements) is None
    for value in (None, b"", tuple(elements), {"a": elements}, elements[: SHORTEST_LIST - 1], [1] * 20, elements[0]):
        assert reused.dumps(SERDE, value) is None
    assert reused.held_bytes == 0


@pytest.mark.parametrize("pickle_fallback", [False, True])
def test_an_element_that_the_serializer_would_pickle_or_refuse(pickle_fallback: bool) -> None:
    """One element makes the whole list a pickle or an error, which are the serializer's to make."""
    reused = ElementReuse(PLENTY)
    assert reused.dumps(JsonPlusSerializer(pickle_fallback=pickle_fallback), [*conversation(20), object()]) is None
    assert reused.dumps(SERDE, [object(), *conversation(20)]) is None


def test_an_extra_field_that_comes_and_goes() -> None:
    """A field that the class does not declare is seen, although it is kept apart from the others."""
    elements = conversation(20)
    reused = ElementReuse(PLENTY)
    for note in (None, 1, True, 1, None):
        if note is None:
            elements[2].__pydantic_extra__.clear()
        else:
            elements[2].note = note
        assert reused.dumps(SERDE, elements) == SERDE.dumps_typed(elements)


def test_refused_messages_stand_between_the_others() -> None:
    """Extra fields, foreign types, subclasses and other elements are serialized afresh each time."""
    elements: list[Any] = conversation(20)
    elements[3] = HumanMessage("x", id="extra", note=1)
    elements[5].response_metadata["at"] = datetime(2026, 1, 1, tzinfo=timezone.utc)
    elements[6].artifact = b"bytes"
    elements[9] = Loud("x", id="loud")
    elements[10:12] = [None, b"bytes", {"a": 1}, [elements[0]], 5, Inner()]
    reused = Counting(PLENTY)
    for note in range(3):
        elements[3].note = note
        elements[9].__pydantic_fields_set__.add(f"field {note}")
        assert reused.dumps(SERDE, elements) == SERDE.dumps_typed(elements)


def test_classes_whose_own_code_takes_part_in_dumping_are_recognised() -> None:
    """No class with a serializer of its own is taken; all of langchain_core's messages are."""

    class Computed(HumanMessage):
        @computed_field  # type: ignore[prop-decorator]
        @property
        def length(self) -> int:
            return 1

    class Dumping(HumanMessage):
        def model_dump(self, **_: Any) -> dict[str, Any]:
            return {}

    class Private(HumanMessage):
        _hidden: int = 1

    assert not any(map(reuse._dumped_by_content, (Loud, Computed, Dumping, Private)))
    assert len(reuse._HEADS) == 8


def test_memory_is_bounded_and_accounted_for() -> None:
    """I8: entries take no more than max_bytes, and no more than is said."""
    reused = ElementReuse(400_000)
    reused.dumps(SERDE, conversation(20))
    tracemalloc.start()
    try:
        for number in range(100):
            reused.dumps(SERDE, [AIMessage("x" * number, id=f"{number}-{other:036}") for other in range(30)])
            assert reused.held_bytes <= 400_000
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert reused.held_bytes > 150_000
    assert taken < 1.1 * reused.held_bytes


def test_what_is_used_stays_and_what_is_large_is_not_kept() -> None:
    """A conversation in use survives others coming and going; one message never pushes out all the others."""
    reused = Counting(200_000)
    elements = conversation(20)
    large: list[Any] = [HumanMessage("x" * 150_000, id="large"), *conversation(10)]
    for number in range(50):
        reused.dumps(SERDE, [HumanMessage("x" * 500, id=f"{number}-{other}") for other in range(20)])
        assert reused.dumps(SERDE, large) == SERDE.dumps_typed(large)
        reused.serialized = 0
        assert reused.dumps(SERDE, elements) == SERDE.dumps_typed(elements)
        assert number == 0 or reused.serialized == 0
    with pytest.raises(ConfigurationError):
        ElementReuse(0)


def test_threads_share_it() -> None:
    """Any number of threads, editing messages of their own, get the serializer's bytes."""
    reused = ElementReuse(60_000)
    shared = conversation(30)
    failures: list[str] = []

    def work(name: int) -> None:
        own: list[Any] = [HumanMessage("x", id=f"{name % 2}-{number}") for number in range(10)]
        for number in range(150):
            own[number % 10].content = f"{name} {number}"
            elements = shared + own
            if reused.dumps(SERDE, elements) != SERDE.dumps_typed(elements):
                failures.append(f"{name} {number}")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    assert 0 < reused.held_bytes <= 60_000
    entries = [*reused._young.items(), *reused._old.items()]
    assert reused.held_bytes == sum(reuse._size(key, entry) for key, entry in entries)


def test_an_edit_between_looking_and_serializing_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are kept only for the fields that they hold, whoever edits the message meanwhile."""
    reused = ElementReuse(PLENTY)
    elements = conversation(20)
    content = elements[4].content
    keep = reuse._serialize

    def edited_meanwhile(*arguments: Any) -> bool:
        elements[4].content = "edited by another thread"
        try:
            return keep(*arguments)
        finally:
            elements[4].content = content

    with monkeypatch.context() as patch:
        patch.setattr(reuse, "_serialize", edited_meanwhile)
        reused.dumps(SERDE, elements)
    assert reused.dumps(SERDE, elements) == SERDE.dumps_typed(elements)


def test_no_warning_of_its_own() -> None:
    """Making and using it warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        elements = conversation(20)
        assert ElementReuse(PLENTY).dumps(SERDE, elements) == SERDE.dumps_typed(elements)
