"""LangGraph's objects to records, and hot state back to LangGraph's objects.

Where a value goes follows `PostgresSaver`: `None`, `str`, `int`, `float` and `bool` are inlined in the
checkpoint's JSON, everything else is a blob. What PostgreSQL's JSON cannot hold faithfully, long strings (which
would be stored again at every step) and, under a serializer that encrypts, every value go to blobs too; the same
reader merges them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
from langgraph.checkpoint.serde.types import _DeltaSnapshot

from langgraph_tiered_saver import deltas
from langgraph_tiered_saver.errors import InvalidInputError, SerializationError
from langgraph_tiered_saver.history import DeltaStep, StepKind, delta_steps, hot_value
from langgraph_tiered_saver.names import (
    ThreadPosition,
    check_index_entry,
    check_readable,
    position_of,
    text_of,
    version_text,
)
from langgraph_tiered_saver.recent import ChannelKey, RecentValues, StoredValue
from langgraph_tiered_saver.records import (
    FRESH,
    Blob,
    CheckpointRecord,
    TypedValue,
    WritesRecord,
    pack_value,
)
from langgraph_tiered_saver.reuse import ElementReuse
from langgraph_tiered_saver.values import NUL_ESCAPE, dump, encrypts, holds_nul, inlinable, is_json, storable, to_json

# Shorter values cost less to send than to compare.
LEAST_DELTA_BASE = 4096
# Versions that are made once, with a random part: bytes that were stored under one are the only ones that ever are.
_MADE_ONCE = re.compile(r"\d{32}\.0\.\d{8,}")

# From this checkpoint format on, pending sends are an ordinary channel; the library's reader migrates older ones.
FORMAT_WITH_SENDS = 4


@dataclass
class EncodedCheckpoint:
    """A `put` that is ready to be sent.

    Attributes:
        position: Where it goes; `checkpoint_id` is the new checkpoint's.
        parent_id: The parent's id, or `""`.
        checkpoint: JSON text.
        metadata: JSON text.
        blobs: The changed channels' blobs.
        unchanged: The other blob-stored channels: `(channel, version)`, their values not serialized.
        removed: Changed channels that have no blob now.
        blob_count: How many blobs a complete checkpoint has.
        stored: What may be the base of deltas, once it is acknowledged.
        has_delta_channels: The graph has a `DeltaChannel`, whose value is not in every checkpoint.
        delta_channels: What is stored of these here, for the history they are rebuilt from.
        has_no_channels: Nothing is stored here; LangGraph begins with such a checkpoint if it has only writes to keep.
        is_old_format: The parent's writes may hold pending sends that belong to this checkpoint.
    """

    position: ThreadPosition
    parent_id: str
    checkpoint: bytes
    metadata: bytes
    blobs: list[Blob]
    unchanged: list[tuple[str, str]]
    removed: list[str]
    blob_count: int
    stored: dict[str, StoredValue]
    has_delta_channels: bool
    delta_channels: list[DeltaStep]
    has_no_channels: bool
    is_old_format: bool
    _serde: SerializerProtocol
    _values: Mapping[str, Any] = field(repr=False)

    def record(self) -> CheckpointRecord:
        """Make the record of what is carried."""
        position = self.position
        return CheckpointRecord(
            position.checkpoint_ns,
            position.checkpoint_id,
            self.parent_id,
            self.checkpoint,
            self.metadata,
            self.blob_count,
            self.blobs,
        )

    def carry_every_channel(self) -> None:
        """Serialize the unchanged channels too, and carry whole values instead of deltas.

        Raises:
            SerializationError: the serializer cannot take one of them.
        """
        # What is serialized again may be other bytes than those stored before, so it is no base for deltas.
        self.blobs = [self._whole(blob) for blob in self.blobs] + [
            Blob(channel, version, pack_value(dump(self._serde, channel, self._values[channel])))
            for channel, version in self.unchanged
        ]
        self.unchanged = []

    def _whole(self, blob: Blob) -> Blob:
        if not blob.is_delta:
            return blob
        stored = self.stored[blob.channel]
        return Blob(blob.channel, blob.version, pack_value((stored.type, stored.data)), FRESH)

    def remember(self, recent: RecentValues) -> None:
        """Keep the values that the next step's deltas are made to; to be called when this one is acknowledged."""
        for channel, value in self.stored.items():
            recent.put(ChannelKey(self.position.thread_id, self.position.checkpoint_ns, channel), value)
        for step in self.delta_channels:
            # The hot tier makes no deltas to a value that is not the latest version.
            if step.kind is StepKind.MOVED:
                recent.drop(ChannelKey(self.position.thread_id, self.position.checkpoint_ns, step.channel))


def encode_checkpoint(
    serde: SerializerProtocol,
    config: RunnableConfig,
    checkpoint: Checkpoint,
    metadata: CheckpointMetadata,
    new_versions: ChannelVersions,
    recent: RecentValues | None = None,
    reuse: ElementReuse | None = None,
) -> EncodedCheckpoint:
    """Encode the arguments of `put`; serializes the changed channels only.

    Args:
        serde: The serializer.
        config: Addresses the parent.
        checkpoint: The checkpoint.
        metadata: Its metadata.
        new_versions: The changed channels.
        recent: The values stored last, which deltas are made to; None for whole values.
        reuse: Knows the bytes of messages that were serialized before.

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
    check_index_entry(parent.thread_id, parent.checkpoint_ns, checkpoint_id)
    inline = not encrypts(serde)
    values: Mapping[str, Any] = checkpoint["channel_values"]
    versions = checkpoint["channel_versions"]
    inlined: dict[str, Any] = {}
    blobs: list[Blob] = []
    unchanged: list[tuple[str, str]] = []
    blob_count = 0
    with_value = set()
    stored: dict[str, StoredValue] = {}
    counters: object = metadata.get("counters_since_delta_snapshot")
    delta_names: set[Any] = set(counters) if isinstance(counters, Mapping) else set()
    for channel, value in values.items():
        if isinstance(value, _DeltaSnapshot):
            # The marker that the library's reader and prune recognise a snapshot by.
            inlined[channel] = True
            delta_names.add(channel)
        elif inline and inlinable(value):
            inlined[channel] = value
            continue
        if channel in new_versions:
            version = version_text(new_versions[channel])
            check_index_entry(parent.thread_id, parent.checkpoint_ns, check_readable(channel, "channel"), version)
            try:
                typed = dump(serde, channel, value, reuse)
            except SerializationError:
                if not (inline and isinstance(value, (str, int, float)) and is_json(value)):
                    raise
                inlined[channel] = value
                continue
            if inline and recent is not None and may_be_base(version, typed[1]):
                last = recent.get(ChannelKey(parent.thread_id, parent.checkpoint_ns, channel))
                stored[channel] = StoredValue(version, *typed)
                blobs.append(_delta_or_whole(channel, version, typed, last))
            else:
                blobs.append(Blob(channel, version, pack_value(typed)))
            with_value.add(channel)
            blob_count += channel in versions and version_text(versions[channel]) == version
        elif channel in versions:
            unchanged.append((channel, version_text(versions[channel])))
            blob_count += 1
        elif inline and isinstance(value, (str, int, float)) and is_json(value):
            inlined[channel] = value
    removed = [channel for channel in new_versions if channel not in with_value]
    with_value.update(channel for channel, _ in unchanged)
    return EncodedCheckpoint(
        ThreadPosition(parent.thread_id, parent.checkpoint_ns, checkpoint_id),
        parent.checkpoint_id,
        _checkpoint_json(checkpoint, inlined),
        _metadata_json(config, metadata),
        blobs,
        unchanged,
        removed,
        blob_count,
        stored,
        "counters_since_delta_snapshot" in metadata,
        delta_steps(delta_names, values, with_value, versions, new_versions) if delta_names else [],
        not versions and not values,
        checkpoint["v"] < FORMAT_WITH_SENDS,
        serde,
        values,
    )


def last_size(config: RunnableConfig, new_versions: ChannelVersions, recent: RecentValues) -> int:
    """Give the bytes that some channels' last values took, as far as they are known."""
    at = config.get("configurable") or {}
    keys = (ChannelKey(at.get("thread_id", ""), at.get("checkpoint_ns", ""), channel) for channel in new_versions)
    return sum(len(last.data) for key in keys if (last := recent.get(key)) is not None)


def may_be_base(version: str, data: bytes) -> bool:
    """Tell whether deltas may be made to a value: it is long enough, and stored once only under its version."""
    return len(data) >= LEAST_DELTA_BASE and _MADE_ONCE.fullmatch(version) is not None


def _delta_or_whole(channel: str, version: str, typed: TypedValue, last: StoredValue | None) -> Blob:
    """Describe a value by what it adds to the last one, if that is known and spares enough."""
    if last is not None and last.type == typed[0] and last.version != version:
        delta = deltas.diff(last.data, typed[1])
        if delta is not None:
            return Blob(channel, version, pack_value((typed[0], delta)), last.version)
    return Blob(channel, version, pack_value(typed), FRESH)


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
    task_id = check_readable(text_of(task_id, "task_id"), "task_id")
    check_index_entry(position.thread_id, position.checkpoint_ns, position.checkpoint_id, task_id)
    return position, WritesRecord(
        position.checkpoint_ns,
        position.checkpoint_id,
        task_id,
        text_of(task_path, "task_path"),
        all(channel in WRITES_IDX_MAP for channel, _ in writes),
        [
            (
                WRITES_IDX_MAP.get(channel, index),
                check_readable(text_of(channel, "channel"), "channel"),
                pack_value(dump(serde, channel, value)),
            )
            for index, (channel, value) in enumerate(writes)
        ],
    )


def decode_hot(
    serde: SerializerProtocol,
    position: ThreadPosition,
    fields: Mapping[bytes, bytes],
    generation: int,
    recent: RecentValues | None = None,
) -> CheckpointTuple | None:
    """Make a tuple of a hot hash's fields.

    Args:
        serde: The serializer.
        position: Thread and namespace.
        fields: The hash.
        generation: The generation it must be of.
        recent: Takes the values that the next step's deltas can be made to.

    Returns:
        None if the hash does not hold a complete checkpoint of this generation, so that the cold tier must be asked.
    """
    checkpoint_id = fields.get(b"id")
    if checkpoint_id is None or fields.get(b"u", b"") >= checkpoint_id or fields.get(b"g") != b"%d" % generation:
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
        text = version_text(version)
        if fields.get(b"v:" + key) == text.encode():
            try:
                typed = hot_value(fields, key)
            except (LookupError, ValueError):
                return None
            if recent is not None and b"d:" + key in fields:
                last = ChannelKey(position.thread_id, position.checkpoint_ns, channel)
                recent.put(last, StoredValue(text, *typed))
            values[channel] = serde.loads_typed(typed)
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


def _checkpoint_json(checkpoint: Checkpoint, inlined: dict[str, Any]) -> bytes:
    document = {**checkpoint, "channel_values": inlined}
    try:
        text = to_json(document)
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            "A channel or node name holds a lone surrogate, which PostgreSQL cannot store; nothing was written."
        ) from error
    except (TypeError, ValueError) as error:
        raise SerializationError(
            f"The checkpoint's own fields cannot be written as JSON ({error}); nothing was written."
        ) from error
    if NUL_ESCAPE in text and holds_nul(document):
        raise InvalidInputError(
            "A channel or node name holds a NUL, which PostgreSQL cannot store; nothing was written."
        )
    return text


def _metadata_json(config: RunnableConfig, metadata: CheckpointMetadata) -> bytes:
    document = get_serializable_checkpoint_metadata(config, metadata)
    try:
        text = to_json(document)
        if NUL_ESCAPE not in text or not holds_nul(document):
            return text
    except (UnicodeEncodeError, ValueError):
        pass
    except TypeError as error:
        raise SerializationError(
            f"The checkpoint's metadata cannot be written as JSON ({error}); nothing was written. "
            "Put such values into the state, or into metadata as text."
        ) from error
    try:
        return to_json(storable(document))
    except (TypeError, ValueError) as error:
        raise SerializationError(
            f"The checkpoint's metadata cannot be written as JSON ({error}); nothing was written."
        ) from error
