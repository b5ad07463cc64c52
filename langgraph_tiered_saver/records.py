"""The wire form of journal records.

A record is one acknowledged operation. It is encoded once, as a flat run of byte strings with their lengths in
front ("frames"), and these bytes are what the scripts receive, the journal stores and the flusher works on. Lua
reads them with `struct`; MessagePack was the first choice, but the `cmsgpack` of Redis knows no byte strings.

Values keep the serializer's output: `type`, a NUL, and the bytes; or, instead of the bytes, a delta to an earlier
version's (`deltas`). Order per thread makes that sound: whoever has a record has its base.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

CHECKPOINT = b"c"
WRITES = b"w"
MAINTENANCE = b"m"

_LENGTH = struct.Struct(">I")

TypedValue = tuple[str, bytes]

# In place of a base's version: the value is whole, and deltas may be made to it, because these bytes are the only ones
# that were ever stored under its version.
FRESH = "*"


class Blob(NamedTuple):
    """The value of a channel that a checkpoint carries.

    Attributes:
        channel: The channel.
        version: The channel's version.
        value: As `pack_value` makes it; with a base, a delta stands for the bytes.
        base: The version that the delta is made to; `""` or `FRESH` if the value is whole.
    """

    channel: str
    version: str
    value: bytes
    base: str = ""

    @property
    def is_delta(self) -> bool:
        """Whether the value is a delta."""
        return self.base not in ("", FRESH)


class CheckpointRecord(NamedTuple):
    """One `put`: a checkpoint and the blobs of the channels it carries.

    Attributes:
        checkpoint_ns: Namespace; `""` is the root graph.
        checkpoint_id: Its id; ids sort by time.
        parent_id: The parent checkpoint's id, or `""`.
        checkpoint: The checkpoint as JSON text, blob-stored channel values left out.
        metadata: The metadata as JSON text.
        blob_count: How many blobs the checkpoint references, carried or not.
        blobs: The values it carries.
    """

    checkpoint_ns: str
    checkpoint_id: str
    parent_id: str
    checkpoint: bytes
    metadata: bytes
    blob_count: int
    blobs: Sequence[Blob]


class WritesRecord(NamedTuple):
    """One `put_writes` call.

    Attributes:
        checkpoint_ns: Namespace of the checkpoint the writes belong to.
        checkpoint_id: Id of that checkpoint, which may not have arrived yet.
        task_id: The task that wrote.
        task_path: Where the task stands in its superstep; part of the sort key.
        upsert: All channels are special ones (`WRITES_IDX_MAP`), so a later record replaces an earlier one.
        writes: `(index, channel, value)`; value as `pack_value` makes it.
    """

    checkpoint_ns: str
    checkpoint_id: str
    task_id: str
    task_path: str
    upsert: bool
    writes: Sequence[tuple[int, str, bytes]]


@dataclass(frozen=True)
class MaintenanceRecord:
    """An operation that removes or copies rows of a thread, executed in the thread's journal order.

    Attributes:
        operation: `"delete_thread"`, `"delete_runs"`, `"prune"` or `"copy"`.
        arguments: What the operation needs beside the thread (run ids, source thread, ...).
    """

    operation: str
    arguments: dict[str, Any]


Record = CheckpointRecord | WritesRecord | MaintenanceRecord


def pack_value(typed: TypedValue) -> bytes:
    """Join a serializer's `(type, bytes)` into one byte string."""
    return b"%b\0%b" % (typed[0].encode(), typed[1])


def unpack_value(value: bytes) -> TypedValue:
    """Split what `pack_value` joined."""
    type_, _, data = value.partition(b"\0")
    return type_.decode(), data


def frame(parts: Iterable[bytes]) -> bytes:
    """Join byte strings so that `unframe`, here and in Lua, can tell them apart."""
    pack = _LENGTH.pack
    return b"".join([piece for part in parts for piece in (pack(len(part)), part)])


def unframe(payload: bytes) -> list[bytes]:
    """Split what `frame` joined.

    Raises:
        ValueError: the bytes are not whole frames.
    """
    parts: list[bytes] = []
    at, end = 0, len(payload)
    while at < end:
        if at + 4 > end:
            raise ValueError("the bytes end within a frame's length")
        start = at + 4
        at = start + _LENGTH.unpack_from(payload, at)[0]
        if at > end:
            raise ValueError("the bytes end within a frame")
        parts.append(payload[start:at])
    return parts


def encode(record: Record, generation: int) -> bytes:
    """Encode a record for the journal.

    Args:
        record: The operation.
        generation: The generation in which it is acknowledged.
    """
    if isinstance(record, CheckpointRecord):
        parts = [CHECKPOINT, b"%d" % generation, record.checkpoint_ns.encode(), record.checkpoint_id.encode(),
                 record.parent_id.encode(), record.checkpoint, record.metadata, b"%d" % record.blob_count]  # fmt: skip
        for channel, version, value, base in record.blobs:
            parts += (channel.encode(), version.encode(), base.encode(), value)
    elif isinstance(record, WritesRecord):
        parts = [WRITES, b"%d" % generation, record.checkpoint_ns.encode(), record.checkpoint_id.encode(),
                 record.task_id.encode(), record.task_path.encode(), b"1" if record.upsert else b"0"]  # fmt: skip
        for index, channel, value in record.writes:
            parts += (b"%d" % index, channel.encode(), value)
    else:
        parts = [MAINTENANCE, b"%d" % generation, record.operation.encode(), json.dumps(record.arguments).encode()]
    return frame(parts)


def decode(payload: bytes) -> tuple[int, Record]:
    """Decode what `encode` made.

    Returns:
        The generation and the record.

    Raises:
        ValueError: the bytes are not a record of this version.
    """
    parts = unframe(payload)
    kind = parts[0] if parts else b""
    if kind == CHECKPOINT and len(parts) >= 8 and len(parts) % 4 == 0:
        ns, checkpoint_id, parent_id = (part.decode() for part in parts[2:5])
        blobs = [
            Blob(parts[i].decode(), parts[i + 1].decode(), parts[i + 3], parts[i + 2].decode())
            for i in range(8, len(parts), 4)
        ]
        return int(parts[1]), CheckpointRecord(ns, checkpoint_id, parent_id, parts[5], parts[6], int(parts[7]), blobs)
    if kind == WRITES and len(parts) >= 7 and len(parts) % 3 == 1:
        ns, checkpoint_id, task_id, task_path = (part.decode() for part in parts[2:6])
        writes = [(int(parts[i]), parts[i + 1].decode(), parts[i + 2]) for i in range(7, len(parts), 3)]
        return int(parts[1]), WritesRecord(ns, checkpoint_id, task_id, task_path, parts[6] == b"1", writes)
    if kind == MAINTENANCE and len(parts) == 4:
        arguments = json.loads(parts[3])
        if isinstance(arguments, dict):
            return int(parts[1]), MaintenanceRecord(parts[2].decode(), arguments)
    raise ValueError(f"not a journal record this version knows (kind {kind!r:.20}, {len(parts)} parts)")
