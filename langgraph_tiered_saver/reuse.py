"""Serializing a list of messages that grew without serializing again the messages that did not change.

LangGraph hands the whole `messages` list to the checkpointer at every step. Most of serializing it is pydantic's
`model_dump` and nested packing, a few microseconds for each message; packing a message's fields as they are, with
nothing in between, takes a seventh of that. A msgpack array is its header and its elements' bytes, and a message's
bytes as `JsonPlusSerializer` writes them are a head that names the class, the packed fields, and a fixed tail. So:
pack the fields, compare them with the middle of the bytes that were written for this message last time, and if
they are the same, use those bytes again.

Why the check misses no edit
    - It looks at contents, never at identities, so it does not matter who edited what, where, or how deep.
    - It packs strictly: `None`, `bool`, `int`, `float`, `str`, `list` and `dict` with `str` keys, exactly these types
      and no subclass; everything else is refused, and a refused message is serialized as ever. Of these types every
      two different values have different bytes (`1`, `True` and `1.0`; `0.0` and `-0.0`; NaNs by their bits; the order
      of a dict; a list and a tuple, which is refused), as unpacking, which gives the value back, shows.
    - Only the message classes of langchain_core itself are taken, without extra fields, after making sure that no
      code of a class takes part in dumping it: what is dumped is then a function of the class and the fields.
    - The bytes that are used again were made by the serializer itself and are kept only if the packed fields are
      literally in them. A library that writes messages in another way makes this module useless, not wrong.
    - Bytes, which have the same form packed as a `bytearray` or a `memoryview`, are not kept. (`ormsgpack.Fragment`,
      bytes that claim to be packed already, can pass for the value that they hold: the serializer writes the same
      for both.)
"""

from __future__ import annotations

import sys
from threading import Lock
from typing import Any

import ormsgpack
from langchain_core import messages
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from pydantic import BaseModel

from langgraph_tiered_saver.errors import ConfigurationError

# Below this, the one or two messages that a step adds, each of which costs twice, eat up what the others save.
SHORTEST_LIST = 8
# What an entry costs besides its bytes' and its key's: two objects and a place in a dict that grows, rounded up.
_ENTRY_BYTES = 280
# One message must not push out all the others.
_LARGEST_SHARE = 8

# With no `default`, whatever is not exactly of a basic type is an error.
_STRICT = (
    ormsgpack.OPT_PASSTHROUGH_DATACLASS
    | ormsgpack.OPT_PASSTHROUGH_DATETIME
    | ormsgpack.OPT_PASSTHROUGH_ENUM
    | ormsgpack.OPT_PASSTHROUGH_SUBCLASS
    | ormsgpack.OPT_PASSTHROUGH_TUPLE
    | ormsgpack.OPT_PASSTHROUGH_UUID
)
# The first bytes of msgpack's binary and extension forms. They occur in text and numbers, too.
_BINARY_TAGS = bytes([*range(0xC4, 0xCA), *range(0xD4, 0xD9)])
_TAIL = ormsgpack.packb("model_validate_json")
_DUMPS_TYPED = JsonPlusSerializer.dumps_typed

# The class, the bytes of the element, and where in them its fields begin.
_Entry = tuple[type, bytes, int]
_Missed = tuple[Any, str | int, bytes]


def _dumped_by_content(kind: type[BaseModel]) -> bool:
    """Whether dumping is all pydantic's: no serializers, computed or private fields or methods of the class's own."""
    return (
        kind.model_dump is BaseModel.model_dump
        and kind.__getattribute__ is object.__getattribute__
        and kind.__getattr__ is BaseModel.__getattr__  # type: ignore[attr-defined]
        and not kind.__private_attributes__
        and isinstance(kind.__pydantic_core_schema__, dict)
        and not _has_serializers(kind.__pydantic_core_schema__)
    )


def _has_serializers(schema: object) -> bool:
    if isinstance(schema, dict):
        return bool(
            schema.get("serialization") or schema.get("computed_fields") or any(map(_has_serializers, schema.values()))
        )
    return isinstance(schema, (list, tuple)) and any(map(_has_serializers, schema))


# How the inside of a message's extension begins: an array of four, the module, the class.
_HEADS: dict[type, bytes] = {
    kind: b"\x94" + ormsgpack.packb(kind.__module__) + ormsgpack.packb(kind.__name__)
    for kind in (
        messages.AIMessage,
        messages.AIMessageChunk,
        messages.ChatMessage,
        messages.FunctionMessage,
        messages.HumanMessage,
        messages.RemoveMessage,
        messages.SystemMessage,
        messages.ToolMessage,
    )
    if _dumped_by_content(kind)
}


class ElementReuse:
    """Bytes of messages already serialized, to be used again for as long as a message has the same contents.

    Safe to use from any number of threads; conversations share it, and the entries of messages that they share.
    A message is found by its id, or by its identity if it has none: a message that was loaded again is found, too.
    Nobody's objects are kept alive: an entry is bytes.

    Args:
        max_bytes: How much memory the entries may take, in bytes. The least recently used half goes when it is
            full. What is in use, a message's serialized size and 400 bytes each, should fit into half of it: with less,
            messages are serialized again and again, at twice the price.

    Raises:
        ConfigurationError: `max_bytes` is not positive.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes <= 0:
            raise ConfigurationError(f"max_bytes must be positive, not {max_bytes}; nothing was written.")
        self.max_bytes = max_bytes
        # Two generations approximate an LRU in which a hit costs one look-up and takes no lock.
        self._young: dict[str | int, _Entry] = {}
        self._old: dict[str | int, _Entry] = {}
        self._young_bytes = 0
        self._old_bytes = 0
        self._lock = Lock()

    @property
    def held_bytes(self) -> int:
        """What the entries take, in bytes; at most `max_bytes`."""
        return self._young_bytes + self._old_bytes

    def dumps(self, serde: SerializerProtocol, value: object) -> tuple[str, bytes] | None:
        """Serialize a list as `serde.dumps_typed(value)` does, to the same bytes.

        Costs about a quarter of serializing for each message that did not change, twice as much as serializing for
        each one that is new or edited, and a quarter more than serializing for each one that is refused.

        Returns:
            The type and the bytes; None where there is nothing to gain, and the serializer must be asked: a serializer
            that is not exactly LangGraph's `JsonPlusSerializer`, anything but a list of some length that starts with a
            message of langchain_core's own, and an element that the serializer pickles or cannot take. Raises nothing.
        """
        if type(value) is not list or len(value) < SHORTEST_LIST or not _is_known(serde):
            return None
        elements: list[Any] = value.copy()
        if not elements or type(elements[0]) not in _HEADS:
            return None
        parts = [_array_header(len(elements))]
        missed: list[_Missed] = []
        refused: list[Any] = []
        find, pack, heads = self._young.get, ormsgpack.packb, _HEADS
        for element in elements:
            kind = type(element)
            fields = None
            if kind in heads:
                try:
                    if not element.__pydantic_extra__:
                        content = element.__dict__
                        fields = pack(content, None, _STRICT)
                        key = content.get("id")
                except (ormsgpack.MsgpackEncodeError, AttributeError):
                    fields = None
            if fields is None:
                if missed and not self._serialize(serde, missed, parts):
                    return None
                refused.append(element)
                continue
            if refused and not _serialize(serde, refused, parts):
                return None
            if type(key) is not str:
                key = id(element)
            entry = find(key) or self._promote(key)
            # Packed fields delimit themselves: what starts with them has the same ones, whole.
            if entry is None or entry[0] is not kind or not entry[1].startswith(fields, entry[2]):
                missed.append((element, key, fields))
                continue
            if missed and not self._serialize(serde, missed, parts):
                return None
            parts.append(entry[1])
        if missed and not self._serialize(serde, missed, parts):
            return None
        if refused and not _serialize(serde, refused, parts):
            return None
        return "msgpack", b"".join(parts)

    def _serialize(self, serde: SerializerProtocol, missed: list[_Missed], parts: list[bytes]) -> bool:
        """Have neighbours serialized, all at once, and keep the bytes of each; False if that failed."""
        if not _serialize(serde, [element for element, _, _ in missed], parts):
            return False
        data, start = parts[-1], 0
        kept: list[tuple[str | int, _Entry]] = []
        for element, key, fields in missed:
            kind = type(element)
            if kind not in _HEADS:
                break
            head = _head(kind, len(fields))
            end = start + len(head) + len(fields) + len(_TAIL)
            packed = data[start:end]
            if packed != head + fields + _TAIL:
                # Dumping is more than packing the fields, or another thread edited the message meanwhile.
                break
            if not _holds_binary(fields):
                kept.append((key, (kind, packed, len(head))))
            start = end
        missed.clear()
        with self._lock:
            for key, entry in kept:
                self._keep(key, entry)
        return True

    def _promote(self, key: str | int) -> _Entry | None:
        """Find an entry in the old generation, and move it to the young one."""
        if key not in self._old:
            # Another thread may have moved it since the caller looked.
            return self._young.get(key)
        with self._lock:
            entry = self._old.pop(key, None)
            if entry is None:
                return self._young.get(key)
            self._old_bytes -= _size(key, entry)
            self._keep(key, entry)
            return entry

    def _keep(self, key: str | int, entry: _Entry) -> None:
        """Add an entry to the young generation, or replace it; the lock is held."""
        size = _size(key, entry)
        if size * _LARGEST_SHARE > self.max_bytes:
            return
        if (stale := self._young.get(key)) is not None:
            self._young_bytes -= _size(key, stale)
        if (self._young_bytes + size) * 2 > self.max_bytes:
            self._young.pop(key, None)
            self._old, self._old_bytes = self._young, self._young_bytes
            self._young, self._young_bytes = {}, 0
        self._young[key] = entry
        self._young_bytes += size


def _is_known(serde: SerializerProtocol) -> bool:
    return type(serde) is JsonPlusSerializer and getattr(serde.dumps_typed, "__func__", None) is _DUMPS_TYPED


def _serialize(serde: SerializerProtocol, elements: list[Any], parts: list[bytes]) -> bool:
    """Have elements serialized, as deep in a list as they are; False if that fails or gives anything but msgpack."""
    try:
        type_, data = serde.dumps_typed(elements)
    except Exception:  # noqa: BLE001 the caller asks the serializer, and gets its error for the whole list
        return False
    if type_ != "msgpack":
        return False
    parts.append(data[len(_array_header(len(elements))) :])
    elements.clear()
    return True


def _head(kind: type, length: int) -> bytes:
    """What precedes a message's packed fields of some length."""
    names = _HEADS[kind]
    length += len(names) + len(_TAIL)
    if length < 1 << 8:
        return b"\xc7%c\x05%b" % (length, names)
    if length < 1 << 16:
        return b"\xc8%b\x05%b" % (length.to_bytes(2, "big"), names)
    return b"\xc9%b\x05%b" % (length.to_bytes(4, "big"), names)


def _array_header(length: int) -> bytes:
    if length < 16:
        return bytes([0x90 | length])
    if length < 1 << 16:
        return b"\xdc" + length.to_bytes(2, "big")
    return b"\xdd" + length.to_bytes(4, "big")


def _size(key: str | int, entry: _Entry) -> int:
    return sys.getsizeof(key) + len(entry[1]) + _ENTRY_BYTES


def _holds_binary(fields: bytes) -> bool:
    """Whether bytes or an extension are among packed fields."""
    for tag in _BINARY_TAGS:
        if tag in fields:
            break
    else:
        return False
    try:
        return _is_binary(ormsgpack.unpackb(fields))
    except ormsgpack.MsgpackDecodeError:  # an extension
        return True


def _is_binary(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_is_binary, value.values()))
    if isinstance(value, list):
        return any(map(_is_binary, value))
    return not (value is None or isinstance(value, (str, int, float)))
