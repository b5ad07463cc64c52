"""Values: which of them PostgreSQL's JSON can hold, and how the others are serialized."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import orjson
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from langgraph_tiered_saver.errors import SerializationError
from langgraph_tiered_saver.records import TypedValue
from langgraph_tiered_saver.reuse import ElementReuse

# Longer strings go to blobs: inlined, they would travel and be stored again with every checkpoint.
LONGEST_INLINE_STRING = 1024
# Beyond 2**53 a float prints with an exponent, and PostgreSQL's numeric hands it back as an integer.
_LARGEST_INLINE_FLOAT = 1e16
# Python refuses to print or read integers of more than 4,300 digits by default.
_INLINE_INTEGER_BITS = 13_000

# `ensure_ascii=False` makes lone surrogates an encoding error instead of an escape that PostgreSQL refuses.
JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))

# What it would write in a way of its own is left to the encoder above.
_FAST_JSON = orjson.OPT_PASSTHROUGH_SUBCLASS | orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME

NUL_ESCAPE = b"\\u0000"

_encrypting: WeakKeyDictionary[SerializerProtocol, bool] = WeakKeyDictionary()


def to_json(document: object) -> bytes:
    """Encode a JSON document for PostgreSQL.

    Raises:
        TypeError: it holds something else than JSON has.
        ValueError: it holds NaN or an infinity; or, as UnicodeEncodeError, a lone surrogate.
    """
    try:
        text = orjson.dumps(document, option=_FAST_JSON)
    except TypeError:  # also integers beyond 64 bits, and keys that are no text
        return JSON.encode(document).encode()
    # It writes null for NaN.
    return text if b"null" not in text else JSON.encode(document).encode()


def inlinable(value: object) -> bool:
    """Whether PostgreSQL's JSON holds the value so that reading it back gives an equal one of the same type."""
    kind = type(value)
    if value is None or kind is bool:
        return True
    if kind is str:
        text: str = value  # type: ignore[assignment]
        return len(text) <= LONGEST_INLINE_STRING and "\0" not in text and encodable(text)
    if kind is int:
        return value.bit_length() <= _INLINE_INTEGER_BITS  # type: ignore[attr-defined,no-any-return]
    if kind is float:
        number: float = value  # type: ignore[assignment]
        if number == 0.0:
            return math.copysign(1.0, number) > 0
        return -_LARGEST_INLINE_FLOAT < number < _LARGEST_INLINE_FLOAT
    return False


def encodable(text: str) -> bool:
    """Whether a text has no lone surrogates."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_json(value: object) -> bool:
    """Whether PostgreSQL takes a value as JSON."""
    try:
        return NUL_ESCAPE not in to_json(value)
    except (TypeError, ValueError):
        return False


def dump(serde: SerializerProtocol, channel: str, value: Any, reuse: ElementReuse | None = None) -> TypedValue:
    """Serialize one value, as JSON where the serializer has no faithful form for a primitive.

    LangGraph's own serializer replaces lone surrogates, and refuses integers beyond 64 bits and subclasses of
    `float`; its reader takes JSON text as well, which holds them all.

    Args:
        serde: The serializer.
        channel: The channel's name, for the message.
        value: The value.
        reuse: Knows the bytes of messages that were serialized before.
    """
    if type(value) is str and not encodable(value) and (typed := _dump_json(serde, value)):
        return typed
    try:
        return (reuse is not None and reuse.dumps(serde, value)) or serde.dumps_typed(value)
    except Exception as error:
        if isinstance(value, (str, int, float)) and (typed := _dump_json(serde, value)):
            return typed
        raise SerializationError(
            f"The serializer cannot take the value of channel {channel!r}, a {type(value).__name__} "
            f"({type(error).__name__}: {error}). Nothing was written. Store a type it knows, or pass serde=..."
        ) from error


def _dump_json(serde: SerializerProtocol, value: object) -> TypedValue | None:
    try:
        text = json.dumps(value).encode()
    except (TypeError, ValueError):
        return None
    # A subclass may encrypt, or read JSON in a way of its own.
    if type(serde) is JsonPlusSerializer:
        return "json", text
    if type(serde) is EncryptedSerializer and type(serde.serde) is JsonPlusSerializer:
        cipher_name, encrypted = serde.cipher.encrypt(text)
        return f"json+{cipher_name}", encrypted
    return None


def encrypts(serde: SerializerProtocol) -> bool:
    """Whether the serializer hides a value's text, found out by serializing a random one.

    Asking for `EncryptedSerializer` would miss every other serializer that encrypts.
    """
    if type(serde) is JsonPlusSerializer:
        return False
    if isinstance(serde, EncryptedSerializer):
        return True
    try:
        known = _encrypting.get(serde)
        if known is None:
            known = _encrypting[serde] = _hides_text(serde)
    except TypeError:  # a serializer that is not hashable or takes no weak references
        known = _hides_text(serde)
    return known


def _hides_text(serde: SerializerProtocol) -> bool:
    probe = secrets.token_hex(16)
    return probe.encode() not in serde.dumps_typed(probe)[1]


def holds_nul(value: object) -> bool:
    """Whether a NUL is anywhere in a JSON document."""
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, Mapping):
        return any(holds_nul(key) or holds_nul(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return any(map(holds_nul, value))
    return False


def storable(value: object) -> object:
    """Bend metadata to what PostgreSQL's JSON can hold.

    NUL is dropped, as LangGraph itself does with top-level text; lone surrogates become U+FFFD; NaN and the
    infinities become their names. Channel values never come here.
    """
    if isinstance(value, str):
        return value.replace("\0", "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {storable(key): storable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [storable(item) for item in value]
    return value
