"""Reading from PostgreSQL, with `PostgresSaver`'s own public methods on a borrowed connection."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import CheckpointTuple, DeltaChannelHistory
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.base import SerializerProtocol

from langgraph_tiered_saver.codec import FORMAT_WITH_SENDS
from langgraph_tiered_saver.cold.pool import Connection
from langgraph_tiered_saver.names import ThreadPosition, version_text
from langgraph_tiered_saver.records import CheckpointRecord, TypedValue, WritesRecord, encode, pack_value

READ_WRITES = """
SELECT task_id, task_path, idx, channel, type, blob FROM checkpoint_writes
WHERE thread_id = %s AND checkpoint_ns = %s AND checkpoint_id = %s ORDER BY task_id, idx"""


READ_LATER_WRITES = """
SELECT max(checkpoint_id) AS id FROM checkpoint_writes
WHERE thread_id = %s AND checkpoint_ns = %s AND checkpoint_id > %s"""


class RawValue(NamedTuple):
    """A stored value that was not deserialized."""

    typed: TypedValue


class _RawSerializer:
    """Makes the library's reader hand out stored bytes, so that one read serves the caller and the hot tier."""

    def __init__(self, serde: SerializerProtocol) -> None:
        self._serde = serde

    def loads_typed(self, data: TypedValue) -> RawValue:
        return RawValue(data)

    def dumps_typed(self, obj: Any) -> TypedValue:
        # Only the migration of pending sends serializes: a list of what `loads_typed` gave.
        values = [self._serde.loads_typed(item.typed) if isinstance(item, RawValue) else item for item in obj]
        return self._serde.dumps_typed(values)


@dataclass(frozen=True)
class ColdCheckpoint:
    """A checkpoint as it was stored.

    Attributes:
        found: The tuple, its values still `RawValue`s.
        writes: Its pending writes, one record for each task.
        later_writes: The last later checkpoint of the namespace that has writes, though it has not come itself; or "".
    """

    found: CheckpointTuple
    writes: Sequence[WritesRecord]
    later_writes: str

    def load(self, serde: SerializerProtocol) -> CheckpointTuple:
        """Deserialize the values."""
        checkpoint = self.found.checkpoint
        values = {
            channel: serde.loads_typed(value.typed) if isinstance(value, RawValue) else value
            for channel, value in checkpoint["channel_values"].items()
        }
        writes = [
            (task_id, channel, serde.loads_typed(value.typed))
            for task_id, channel, value in self.found.pending_writes or []
        ]
        return self.found._replace(checkpoint={**checkpoint, "channel_values": values}, pending_writes=writes)

    def warming(self) -> tuple[bytes, int, str, list[bytes]] | None:
        """Give what makes it hot: the encoded record, its number of blobs, `later_writes`, and its encoded writes.

        Returns:
            None for a checkpoint of an older format, which stays cold until the graph writes the next one.
        """
        checkpoint = self.found.checkpoint
        if checkpoint["v"] < FORMAT_WITH_SENDS:
            return None
        values: Mapping[str, Any] = checkpoint["channel_values"]
        versions = checkpoint["channel_versions"]
        blobs = [
            (channel, version_text(versions[channel]), pack_value(value.typed))
            for channel, value in values.items()
            if isinstance(value, RawValue)
        ]
        inlined = {channel: value for channel, value in values.items() if not isinstance(value, RawValue)}
        position = self.found.config["configurable"]
        parent = self.found.parent_config["configurable"]["checkpoint_id"] if self.found.parent_config else ""
        record = CheckpointRecord(
            position["checkpoint_ns"],
            position["checkpoint_id"],
            parent,
            json.dumps({**checkpoint, "channel_values": inlined}).encode(),
            json.dumps(self.found.metadata).encode(),
            blobs,
        )
        return encode(record), len(blobs), self.later_writes, [encode(writes) for writes in self.writes]


def read_checkpoint(
    connection: Connection, serde: SerializerProtocol, position: ThreadPosition
) -> ColdCheckpoint | None:
    """Read one checkpoint: the one addressed, or the latest if `checkpoint_id` is empty."""
    config: RunnableConfig = position.config()
    found = PostgresSaver(connection, serde=_RawSerializer(serde)).get_tuple(config)
    if found is None:
        return None
    writes: dict[tuple[str, str], list[tuple[int, str, bytes]]] = {}
    checkpoint_id = found.config["configurable"]["checkpoint_id"]
    at = (position.thread_id, position.checkpoint_ns, checkpoint_id)
    if found.pending_writes:
        with connection.cursor(binary=True) as cursor:
            for row in cursor.execute(READ_WRITES, at):
                value = pack_value((row["type"], row["blob"]))
                task = writes.setdefault((row["task_id"], row["task_path"]), [])
                task.append((row["idx"], row["channel"], value))
    records = [
        WritesRecord(position.checkpoint_ns, checkpoint_id, task_id, task_path, False, task_writes)
        for (task_id, task_path), task_writes in writes.items()
    ]
    later = connection.execute(READ_LATER_WRITES, at).fetchone()
    return ColdCheckpoint(found, records, (later and later["id"]) or "")


def read_list(
    connection: Connection,
    serde: SerializerProtocol,
    config: RunnableConfig | None,
    *,
    filter: dict[str, Any] | None,
    before: RunnableConfig | None,
    limit: int | None,
) -> list[CheckpointTuple]:
    """List checkpoints exactly as `PostgresSaver.list` does."""
    return list(PostgresSaver(connection, serde=serde).list(config, filter=filter, before=before, limit=limit))


def read_delta_history(
    connection: Connection, serde: SerializerProtocol, config: RunnableConfig, channels: Sequence[str]
) -> Mapping[str, DeltaChannelHistory]:
    """Collect delta channels' writes exactly as `PostgresSaver.get_delta_channel_history` does."""
    return PostgresSaver(connection, serde=serde).get_delta_channel_history(config=config, channels=channels)
