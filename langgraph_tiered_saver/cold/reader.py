"""Reading from PostgreSQL, with `PostgresSaver`'s own public methods on a borrowed connection."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import CheckpointTuple, DeltaChannelHistory
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.base import SerializerProtocol
from psycopg.rows import DictRow

from langgraph_tiered_saver.codec import FORMAT_WITH_SENDS, may_be_base
from langgraph_tiered_saver.cold import storage
from langgraph_tiered_saver.cold.pool import Connection
from langgraph_tiered_saver.cold.storage import ChainSerializer
from langgraph_tiered_saver.errors import ThreadQuarantinedError
from langgraph_tiered_saver.names import ThreadPosition, version_text
from langgraph_tiered_saver.records import FRESH, Blob, CheckpointRecord, TypedValue, WritesRecord, encode, pack_value

READ_WRITES = """
SELECT task_id, task_path, idx, channel, type, blob FROM checkpoint_writes
WHERE thread_id = %s AND checkpoint_ns = %s AND checkpoint_id = %s ORDER BY task_id, idx"""


READ_LATER_WRITES = """
SELECT max(checkpoint_id) AS id, (SELECT quarantined FROM tiered_threads WHERE thread_id = %s) AS quarantined,
    (SELECT value FROM tiered_state WHERE name = 'storage') AS storage,
    (SELECT value FROM tiered_state WHERE name = 'views') AS views
FROM checkpoint_writes WHERE thread_id = %s AND checkpoint_ns = %s AND checkpoint_id > %s"""

READ_QUARANTINED = "SELECT 1 AS one FROM tiered_threads WHERE thread_id = %s AND quarantined"

READ_THREAD = """
SELECT EXISTS (SELECT FROM tiered_threads WHERE thread_id = %s AND quarantined) AS quarantined,
    (SELECT value FROM tiered_state WHERE name = 'storage') AS storage,
    (SELECT value FROM tiered_state WHERE name = 'views') AS views"""

EXISTS = """
SELECT 1 AS one FROM checkpoints WHERE thread_id = %s AND checkpoint_ns = %s AND (checkpoint_id = %s OR %s = '')
LIMIT 1"""


class RawValue(NamedTuple):
    """A stored value that was not deserialized."""

    typed: TypedValue


class _RawSerializer:
    """Makes the library's reader hand out stored bytes, so that one read serves the caller and the hot tier."""

    def __init__(self, serde: SerializerProtocol) -> None:
        self._serde = serde

    def loads_typed(self, data: TypedValue) -> RawValue:
        return RawValue(storage.whole(data))

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

    def warming(self, generation: int) -> tuple[bytes, str, list[bytes]] | None:
        """Give what makes it hot in a generation: the encoded record, `later_writes`, and its encoded writes.

        Returns:
            None for a checkpoint of an older format, which stays cold until the graph writes the next one.
        """
        checkpoint = self.found.checkpoint
        if checkpoint["v"] < FORMAT_WITH_SENDS:
            return None
        values: Mapping[str, Any] = checkpoint["channel_values"]
        versions = checkpoint["channel_versions"]
        blobs = [
            _warm_blob(channel, version_text(versions[channel]), value.typed)
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
            len(blobs),
            blobs,
        )
        writes = [encode(writes, generation) for writes in self.writes]
        return encode(record, generation), self.later_writes, writes


def _warm_blob(channel: str, version: str, typed: TypedValue) -> Blob:
    return Blob(channel, version, pack_value(typed), FRESH if may_be_base(version, typed[1]) else "")


def read_checkpoint(
    connection: Connection, serde: SerializerProtocol, position: ThreadPosition
) -> ColdCheckpoint | None:
    """Read one checkpoint: the one addressed, or the latest if `checkpoint_id` is empty.

    Raises:
        ThreadQuarantinedError: later records of the thread wait in quarantine, so that nobody can tell.
        DamagedValueError: a value cannot be rebuilt from its deltas.
    """
    config: RunnableConfig = position.config()
    library = _RawSerializer(serde)
    found: CheckpointTuple | None = None
    later: DictRow | None = None

    def work(connection: Connection) -> CheckpointTuple | None:
        nonlocal found
        found = PostgresSaver(connection, serde=library).get_tuple(config)
        return found

    def look(connection: Connection) -> DictRow | None:
        nonlocal later
        if found is None:
            return _look(connection, thread_id=position.thread_id)
        checkpoint_id = found.config["configurable"]["checkpoint_id"]
        at = (position.thread_id, position.thread_id, position.checkpoint_ns, checkpoint_id)
        later = connection.execute(READ_LATER_WRITES, at).fetchone()
        return later

    found = storage.read(connection, work, look)
    if found is None:
        return None
    if later and later["quarantined"]:
        raise _quarantined(position.thread_id)
    checkpoint_id = found.config["configurable"]["checkpoint_id"]
    writes: dict[tuple[str, str], list[tuple[int, str, bytes]]] = {}
    if found.pending_writes:
        at = (position.thread_id, position.checkpoint_ns, checkpoint_id)
        with connection.cursor(binary=True) as cursor:
            for row in cursor.execute(READ_WRITES, at):
                value = pack_value((row["type"], row["blob"]))
                task = writes.setdefault((row["task_id"], row["task_path"]), [])
                task.append((row["idx"], row["channel"], value))
    records = [
        WritesRecord(position.checkpoint_ns, checkpoint_id, task_id, task_path, False, task_writes)
        for (task_id, task_path), task_writes in writes.items()
    ]
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
    """List checkpoints exactly as `PostgresSaver.list` does.

    Raises:
        ThreadQuarantinedError: records of the one thread that is named wait in quarantine.
    """
    library = ChainSerializer(serde)
    return storage.read(
        connection,
        lambda c: list(PostgresSaver(c, serde=library).list(config, filter=filter, before=before, limit=limit)),
        partial(_look, thread_id=config["configurable"]["thread_id"] if config is not None else ""),
    )


def read_delta_history(
    connection: Connection, serde: SerializerProtocol, config: RunnableConfig, channels: Sequence[str]
) -> Mapping[str, DeltaChannelHistory]:
    """Collect delta channels' writes exactly as `PostgresSaver.get_delta_channel_history` does.

    Raises:
        ThreadQuarantinedError: records of the thread wait in quarantine.
    """
    library = ChainSerializer(serde)
    return storage.read(
        connection,
        lambda c: PostgresSaver(c, serde=library).get_delta_channel_history(config=config, channels=channels),
        partial(_look, thread_id=config["configurable"]["thread_id"]),
    )


def _look(connection: Connection, *, thread_id: str) -> DictRow | None:
    """Look at a thread and at the storage, after a read."""
    row = connection.execute(READ_THREAD, (thread_id,)).fetchone()
    if row and row["quarantined"]:
        raise _quarantined(thread_id)
    return row


def exists(connection: Connection, position: ThreadPosition) -> bool:
    """Tell whether PostgreSQL has a checkpoint (any one of the namespace if `checkpoint_id` is empty).

    Raises:
        ThreadQuarantinedError: records of the thread wait in quarantine.
    """
    refuse_quarantined(connection, position.thread_id)
    at = (position.thread_id, position.checkpoint_ns, position.checkpoint_id, position.checkpoint_id)
    return connection.execute(EXISTS, at).fetchone() is not None


def refuse_quarantined(connection: Connection, thread_id: str) -> None:
    """Raise if records of a thread wait in quarantine, so that what PostgreSQL shows of it is not all.

    Raises:
        ThreadQuarantinedError: they do.
    """
    if connection.execute(READ_QUARANTINED, (thread_id,)).fetchone() is not None:
        raise _quarantined(thread_id)


def _quarantined(thread_id: str) -> ThreadQuarantinedError:
    return ThreadQuarantinedError(
        f"Thread {thread_id!r:.80} is quarantined: PostgreSQL refused a record of it, so it cannot be read from there. "
        "Its records are kept; see `langgraph-tiered quarantine`.",
        thread_id=thread_id,
    )
