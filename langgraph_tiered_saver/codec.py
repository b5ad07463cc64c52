"""LangGraph's objects to records, and hot state back to LangGraph's objects.

Where a value goes follows `PostgresSaver`: `None`, `str`, `int`, `float` and `bool` are inlined in the
checkpoint's JSON, everything else is a blob. What PostgreSQL's JSON cannot hold faithfully, long strings (which
would be stored again at every step) and, under a serializer that encrypts, every value go to blobs too; the same
reader merges them.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any
from weakref import WeakKeyDictionary

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    get_serializable_checkpoint_metadata,
    writes_sort_key,
)
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.serde.types import _DeltaSnapshot

from langgraph_tiered_saver.errors import InvalidInputError, SerializationError
from langgraph_tiered_saver.records import (
    CheckpointRecord,
    TypedValue,
    WritesRecord,
    pack_value,
    unpack_value,
)

# From this checkpoint format on, pending sends are an ordinary channel; the library's reader migrates older ones.
FORMAT_WITH_SENDS = 4
# Longer strings go to blobs: inlined, they would travel and be stored again with every checkpoint.
LONGEST_INLINE_STRING = 1024
# Beyond 2**53 a float prints with an exponent, and PostgreSQL's numeric hands it back as an integer.
_LARGEST_INLINE_FLOAT = 1e16
# Python refuses to print or read integers of more than 4,300 digits by default.
_INLINE_INTEGER_BITS = 13_000

# `ensure_ascii=False` makes lone surrogates an encoding error instead of an escape that PostgreSQL refuses.
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))

# A third of an 8 KB page less its header, less what alignment and the columns' own headers may take.
_INDEX_ENTRY_BYTES = 2600

_NUL_ESCAPE = b"\\u0000"


@dataclass(frozen=True)
class ThreadPosition:
    """The part of a `RunnableConfig` that addresses a checkpoint; `checkpoint_id` may be `""`."""

    thread_id: str
    checkpoint_ns: str
    checkpoint_id: str

    def config(self) -> RunnableConfig:
        """Give the position in LangGraph's form."""
        return {
            "configurable": {
                "thread_id": self.thread_id,
                "checkpoint_ns": self.checkpoint_ns,
                "checkpoint_id": self.checkpoint_id,
            }
        }


@dataclass
class EncodedCheckpoint:
    """A `put` that is ready to be sent.

    Attributes:
        position: Where it goes; `checkpoint_id` is the new checkpoint's.
        parent_id: The parent's id, or `""`.
        checkpoint: JSON text.
        metadata: JSON text.
        blobs: The changed channels' blobs: `(channel, version, value)`.
        unchanged: The other blob-stored channels: `(channel, version)`, their values not serialized.
        removed: Changed channels that have no blob now.
        blob_count: How many blobs a complete checkpoint has.
        has_delta_channels: The graph has a `DeltaChannel`, whose value is not in every checkpoint.
        is_old_format: The parent's writes may hold pending sends that belong to this checkpoint.
    """

    position: ThreadPosition
    parent_id: str
    checkpoint: bytes
    metadata: bytes
    blobs: list[tuple[str, str, bytes]]
    unchanged: list[tuple[str, str]]
    removed: list[str]
    blob_count: int
    has_delta_channels: bool
    is_old_format: bool
    _serde: SerializerProtocol
    _values: Mapping[str, Any] = field(repr=False)

    @property
    def complete(self) -> bool:
        """Whether `blobs` holds every channel of the checkpoint."""
        return not self.unchanged

    def record(self) -> CheckpointRecord:
        """Make the record of what is carried."""
        position = self.position
        return CheckpointRecord(
            position.checkpoint_ns,
            position.checkpoint_id,
            self.parent_id,
            self.checkpoint,
            self.metadata,
            self.blobs,
        )

    def carry_every_channel(self) -> None:
        """Serialize the unchanged channels too.

        Raises:
            SerializationError: the serializer cannot take one of them.
        """
        self.blobs = self.blobs + [
            (channel, version, pack_value(_dump(self._serde, channel, self._values[channel])))
            for channel, version in self.unchanged
        ]
        self.unchanged = []


def position_of(config: RunnableConfig | None, *, what: str) -> ThreadPosition:
    """Read and check the position in a config.

    Args:
        config: LangGraph's config; `thread_id` may also be an `int` or a `UUID`.
        what: The calling method's name, for the message.

    Raises:
        InvalidInputError: there is no usable `thread_id`, or a part cannot be stored as text.
    """
    configurable = (config or {}).get("configurable") or {}
    thread_id = configurable.get("thread_id")
    if thread_id is None or thread_id == "":
        raise InvalidInputError(
            f"{what} needs a thread_id. Pass config={{'configurable': {{'thread_id': '...'}}}}; nothing was done."
        )
    return ThreadPosition(
        text_of(thread_id, "thread_id"),
        text_of(configurable.get("checkpoint_ns") or "", "checkpoint_ns"),
        text_of(configurable.get("checkpoint_id") or "", "checkpoint_id"),
    )


def check_filter(filter: Mapping[str, Any] | None) -> None:
    """Check that a metadata filter is something PostgreSQL's JSON can contain.

    Raises:
        InvalidInputError: it is not.
    """
    if filter and not (isinstance(filter, Mapping) and _is_json(filter)):
        raise InvalidInputError(
            "filter must be a dict of JSON values without NUL, NaN or lone surrogates: it is matched against the "
            "checkpoints' metadata, which is JSON."
        )


def text_of(value: object, what: str) -> str:
    """Check that a name can be stored as text in both tiers.

    Raises:
        InvalidInputError: it holds a NUL or a lone surrogate.
    """
    text = value if type(value) is str else str(value)
    if "\0" in text or not _encodable(text):
        raise InvalidInputError(
            f"{what} {text!r:.80} holds a NUL or a lone surrogate, which PostgreSQL cannot store. "
            "Use another name; nothing was written."
        )
    return text


def _check_readable(name: str, what: str) -> str:
    """Refuse a name that PostgresSaver's reader, which casts it to `bytea`, takes for another one or cannot read.

    Raises:
        InvalidInputError: it holds a backslash.
    """
    if "\\" in name:
        raise InvalidInputError(
            f"The {what} {name!r:.80} holds a backslash, which PostgresSaver's reader takes for an escape. "
            "Use another name; nothing was written."
        )
    return name


def _check_index_entry(*names: str) -> None:
    """Refuse names that together do not fit an entry of the tables' indexes (2,704 bytes), whatever they compress to.

    Raises:
        InvalidInputError: they do not fit.
    """
    if sum(map(len, names)) * 4 > _INDEX_ENTRY_BYTES and sum(len(n.encode()) for n in names) > _INDEX_ENTRY_BYTES:
        raise InvalidInputError(
            f"The names {' + '.join(f'{name!r:.40}' for name in names)} take more than {_INDEX_ENTRY_BYTES} bytes "
            "together, which is what PostgreSQL can index. Use shorter ones (thread_id, checkpoint_ns, channel, ...); "
            "nothing was written."
        )


def encode_checkpoint(
    serde: SerializerProtocol,
    config: RunnableConfig,
    checkpoint: Checkpoint,
    metadata: CheckpointMetadata,
    new_versions: ChannelVersions,
) -> EncodedCheckpoint:
    """Encode the arguments of `put`; serializes the changed channels only.

    Raises:
        InvalidInputError: no thread_id, or a name that cannot be stored.
        SerializationError: a value or the metadata cannot be serialized.
    """
    parent = position_of(config, what="put")
    if missing := [key for key in ("id", "v", "channel_values", "channel_versions") if key not in checkpoint]:
        raise InvalidInputError(
            f"put needs a checkpoint, but this one has no {', '.join(missing)}; nothing was written."
        )
    checkpoint_id = text_of(checkpoint["id"], "checkpoint id")
    if not checkpoint_id:
        raise InvalidInputError("put needs a checkpoint with an id; nothing was written.")
    _check_index_entry(parent.thread_id, parent.checkpoint_ns, checkpoint_id)
    inline = not _encrypts(serde)
    values: Mapping[str, Any] = checkpoint["channel_values"]
    versions = checkpoint["channel_versions"]
    inlined: dict[str, Any] = {}
    blobs: list[tuple[str, str, bytes]] = []
    unchanged: list[tuple[str, str]] = []
    blob_count = 0
    stored = set()
    for channel, value in values.items():
        if isinstance(value, _DeltaSnapshot):
            # The marker that the library's reader and prune recognise a snapshot by.
            inlined[channel] = True
        elif inline and _inlinable(value):
            inlined[channel] = value
            continue
        if channel in new_versions:
            version = version_text(new_versions[channel])
            _check_index_entry(parent.thread_id, parent.checkpoint_ns, _check_readable(channel, "channel"), version)
            try:
                typed = _dump(serde, channel, value)
            except SerializationError:
                if not (inline and isinstance(value, (str, int, float)) and _is_json(value)):
                    raise
                inlined[channel] = value
                continue
            blobs.append((channel, version, pack_value(typed)))
            stored.add(channel)
            blob_count += channel in versions and version_text(versions[channel]) == version
        elif channel in versions:
            unchanged.append((channel, version_text(versions[channel])))
            blob_count += 1
        elif inline and isinstance(value, (str, int, float)) and _is_json(value):
            inlined[channel] = value
    removed = [channel for channel in new_versions if channel not in stored]
    return EncodedCheckpoint(
        ThreadPosition(parent.thread_id, parent.checkpoint_ns, checkpoint_id),
        parent.checkpoint_id,
        _checkpoint_json(checkpoint, inlined),
        _metadata_json(config, metadata),
        blobs,
        unchanged,
        removed,
        blob_count,
        "counters_since_delta_snapshot" in metadata,
        checkpoint["v"] < FORMAT_WITH_SENDS,
        serde,
        values,
    )


def encode_writes(
    serde: SerializerProtocol,
    config: RunnableConfig,
    writes: Sequence[tuple[str, Any]],
    task_id: str,
    task_path: str,
) -> tuple[ThreadPosition, WritesRecord]:
    """Encode the arguments of `put_writes`.

    Raises:
        InvalidInputError: no thread_id or checkpoint_id, or a name that cannot be stored.
        SerializationError: a value cannot be serialized.
    """
    position = position_of(config, what="put_writes")
    if not position.checkpoint_id:
        raise InvalidInputError("put_writes needs the checkpoint_id that the writes belong to; nothing was written.")
    task_id = _check_readable(text_of(task_id, "task_id"), "task_id")
    _check_index_entry(position.thread_id, position.checkpoint_ns, position.checkpoint_id, task_id)
    return position, WritesRecord(
        position.checkpoint_ns,
        position.checkpoint_id,
        task_id,
        text_of(task_path, "task_path"),
        all(channel in WRITES_IDX_MAP for channel, _ in writes),
        [
            (
                WRITES_IDX_MAP.get(channel, index),
                _check_readable(text_of(channel, "channel"), "channel"),
                pack_value(_dump(serde, channel, value)),
            )
            for index, (channel, value) in enumerate(writes)
        ],
    )


def decode_hot(
    serde: SerializerProtocol, position: ThreadPosition, fields: Mapping[bytes, bytes]
) -> CheckpointTuple | None:
    """Make a tuple of a hot hash's fields.

    Returns:
        None if the hash does not hold a complete checkpoint, so that the cold tier must be asked.
    """
    checkpoint_id = fields.get(b"id")
    if checkpoint_id is None or fields.get(b"u", b"") >= checkpoint_id:
        return None
    try:
        checkpoint, metadata = json.loads(fields[b"c"]), json.loads(fields[b"m"])
        blob_count, parent_id = int(fields[b"k"]), fields[b"p"].decode()
    except (KeyError, ValueError):
        # Somebody else touched the hash; the cold tier has the checkpoint whole.
        return None
    values = checkpoint.get("channel_values") or {}
    found = 0
    for channel, version in checkpoint["channel_versions"].items():
        key = channel.encode()
        if fields.get(b"v:" + key) == version_text(version).encode():
            values[channel] = serde.loads_typed(unpack_value(fields[b"b:" + key]))
            found += 1
    # More than were counted is right too: a delta channel's last snapshot, which PostgresSaver's reader shows as well.
    if found < blob_count:
        return None
    checkpoint["channel_values"] = values
    at = ThreadPosition(position.thread_id, position.checkpoint_ns, checkpoint_id.decode())
    return CheckpointTuple(
        at.config(),
        checkpoint,
        metadata,
        ThreadPosition(at.thread_id, at.checkpoint_ns, parent_id).config() if parent_id else None,
        _pending_writes(serde, checkpoint_id, fields),
    )


def version_text(version: str | float) -> str:
    """Give a channel version as PostgreSQL's `jsonb ->> key` does, which is what the blobs are joined by."""
    if type(version) is str:
        return version
    if isinstance(version, float):
        return format(Decimal(repr(version)), "f")
    return str(version)


def _pending_writes(
    serde: SerializerProtocol, checkpoint_id: bytes, fields: Mapping[bytes, bytes]
) -> list[tuple[str, str, Any]]:
    prefix = b"w:%b\0" % checkpoint_id
    found = []
    for name, packed in fields.items():
        if name.startswith(prefix):
            task_id, index = name[len(prefix) :].decode().split("\0")
            path, channel, type_, data = packed.split(b"\0", 3)
            found.append((writes_sort_key(path.decode(), task_id, int(index)), channel.decode(), type_.decode(), data))
    found.sort(key=lambda write: write[0])
    return [(key[1], channel, serde.loads_typed((type_, data))) for key, channel, type_, data in found]


def _inlinable(value: object) -> bool:
    """Whether PostgreSQL's JSON holds the value so that reading it back gives an equal one of the same type."""
    kind = type(value)
    if value is None or kind is bool:
        return True
    if kind is str:
        text: str = value  # type: ignore[assignment]
        return len(text) <= LONGEST_INLINE_STRING and "\0" not in text and _encodable(text)
    if kind is int:
        return value.bit_length() <= _INLINE_INTEGER_BITS  # type: ignore[attr-defined,no-any-return]
    if kind is float:
        number: float = value  # type: ignore[assignment]
        if number == 0.0:
            return math.copysign(1.0, number) > 0
        return -_LARGEST_INLINE_FLOAT < number < _LARGEST_INLINE_FLOAT
    return False


def _encodable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_json(value: object) -> bool:
    try:
        return _NUL_ESCAPE not in _JSON.encode(value).encode()
    except (TypeError, ValueError):
        return False


def _dump(serde: SerializerProtocol, channel: str, value: Any) -> TypedValue:
    """Serialize one value, as JSON where the serializer has no faithful form for a primitive.

    LangGraph's own serializer replaces lone surrogates, and refuses integers beyond 64 bits and subclasses of
    `float`; its reader takes JSON text as well, which holds them all.
    """
    if type(value) is str and not _encodable(value) and (typed := _dump_json(serde, value)):
        return typed
    try:
        return serde.dumps_typed(value)
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


_encrypting: WeakKeyDictionary[SerializerProtocol, bool] = WeakKeyDictionary()


def _encrypts(serde: SerializerProtocol) -> bool:
    """Whether the serializer hides a value's text, found out by serializing a random one.

    Asking for `EncryptedSerializer` would miss every other serializer that encrypts.
    """
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


def _checkpoint_json(checkpoint: Checkpoint, inlined: dict[str, Any]) -> bytes:
    document = {**checkpoint, "channel_values": inlined}
    try:
        text = _JSON.encode(document).encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            "A channel or node name holds a lone surrogate, which PostgreSQL cannot store; nothing was written."
        ) from error
    except (TypeError, ValueError) as error:
        raise SerializationError(
            f"The checkpoint's own fields cannot be written as JSON ({error}); nothing was written."
        ) from error
    if _NUL_ESCAPE in text and _holds_nul(document):
        raise InvalidInputError(
            "A channel or node name holds a NUL, which PostgreSQL cannot store; nothing was written."
        )
    return text


def _metadata_json(config: RunnableConfig, metadata: CheckpointMetadata) -> bytes:
    document = get_serializable_checkpoint_metadata(config, metadata)
    try:
        text = _JSON.encode(document).encode()
        if _NUL_ESCAPE not in text or not _holds_nul(document):
            return text
    except (UnicodeEncodeError, ValueError):
        pass
    except TypeError as error:
        raise SerializationError(
            f"The checkpoint's metadata cannot be written as JSON ({error}); nothing was written. "
            "Put such values into the state, or into metadata as text."
        ) from error
    try:
        return _JSON.encode(_storable(document)).encode()
    except (TypeError, ValueError) as error:
        raise SerializationError(
            f"The checkpoint's metadata cannot be written as JSON ({error}); nothing was written."
        ) from error


def _holds_nul(value: object) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, Mapping):
        return any(_holds_nul(key) or _holds_nul(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return any(map(_holds_nul, value))
    return False


def _storable(value: object) -> object:
    """Bend metadata to what PostgreSQL's JSON can hold.

    NUL is dropped, as LangGraph itself does with top-level text; lone surrogates become U+FFFD; NaN and the
    infinities become their names. Channel values never come here.
    """
    if isinstance(value, str):
        return value.replace("\0", "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {_storable(key): _storable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_storable(item) for item in value]
    return value
