"""What Redis says about threads, and how it differs from what PostgreSQL says."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer

from langgraph_tiered_saver.cold import reader
from langgraph_tiered_saver.hot import tier
from langgraph_tiered_saver.hot.cluster import is_cluster
from langgraph_tiered_saver.names import ThreadPosition, version_text
from langgraph_tiered_saver.records import TypedValue, decode, unpack_value
from langgraph_tiered_saver.runtime import Runtime

_COMMANDS = 500  # commands in one round trip
_RECORDS = 16  # records read at once
_FEW = 5  # of many differences, so many are told


@dataclass
class HotLook:
    """What Redis has of a thread.

    Attributes:
        generation: The shard's; 0 if there is none.
        length: How many records are in the journal.
        last: The last one's sequence number; 0 if there is none.
        tail: What the shard takes for the last one's; 0 if nothing.
        dirty: Since when the thread is among the dirty ones, as its shard says; None if it is not.
        namespaces: The namespaces that are said to be hot.
        sequences: Sequence numbers of the records, as far as they were read.
        faults: What is wrong with the records themselves.
    """

    generation: int
    length: int
    last: int
    tail: int
    dirty: int | None
    namespaces: set[str]
    sequences: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def exists(self) -> bool:
        """Whether there is anything."""
        return bool(self.length or self.namespaces)

    def trusted(self, runtime: Runtime, thread_id: str, namespaces: Sequence[str]) -> dict[str, str]:
        """Give the hot checkpoint of each namespace that readers would take for the latest."""
        keys = runtime.calls.keyspace.thread(thread_id)
        commands = [("HMGET", keys.hot(ns), "g", "id", "u") for ns in namespaces]
        found = {}
        for ns, (generation, checkpoint_id, uncertain) in zip(namespaces, _ask(runtime, commands), strict=True):
            if checkpoint_id and generation == b"%d" % self.generation and (uncertain or b"") < checkpoint_id:
                found[ns] = checkpoint_id.decode()
        return found


def look_at_hot(runtime: Runtime, names: Sequence[str]) -> dict[str, HotLook]:
    """Look at the journals of some threads, and at what their shards know of them.

    Raises:
        HotTierUnavailableError, HotTierRejectedError: Redis does not answer.
    """
    commands: list[tuple[Any, ...]] = []
    for name in names:
        keys = runtime.calls.keyspace.thread(name)
        commands += [
            ("HMGET", keys.shard, "g", b"t:" + name.encode()),
            ("ZSCORE", keys.dirty, name.encode()),
            ("XLEN", keys.journal),
            ("XREVRANGE", keys.journal, "+", "-", "COUNT", 1),
            ("SMEMBERS", keys.namespaces),
        ]
    replies = iter(_ask(runtime, commands))
    looks = {}
    for name in names:
        (generation, tail), score, length, newest, namespaces = (next(replies) for _ in range(5))
        last = int(newest[0][0].split(b"-")[0]) if newest else 0
        looks[name] = HotLook(
            int(generation or 0),
            length,
            last,
            int(tail or 0),
            None if score is None else int(float(score)),
            {ns.decode() for ns in namespaces},
        )
        if length:
            _read_journal(runtime, name, looks[name])
    return looks


def _read_journal(runtime: Runtime, name: str, look: HotLook) -> None:
    """Read every record, some at a time, and forget it."""
    key = runtime.calls.keyspace.thread(name).journal
    start, previous = b"-", 0
    while True:
        (entries,) = _ask(runtime, [("XRANGE", key, start, "+", "COUNT", _RECORDS)])
        for entry_id, fields in entries:
            start = b"(" + entry_id
            number, _, part = entry_id.partition(b"-")
            sequence = int(number)
            look.sequences.append(sequence)
            if part != b"0" or sequence <= previous or set(fields) != {b"r"}:
                look.faults.append(f"its record {entry_id.decode()} was not made by this library")
                continue
            previous = sequence
            try:
                decode(fields[b"r"])
            except (ValueError, UnicodeDecodeError) as error:
                look.faults.append(f"its record {sequence} cannot be read: {error}")
        if len(entries) < _RECORDS:
            return


def hot_threads(runtime: Runtime) -> Iterator[list[str]]:
    """List the threads that Redis knows of, some at a time and some of them more than once."""
    keyspace = runtime.calls.keyspace
    for shard in range(keyspace.shards):
        yield _scan(runtime, "ZSCAN", keyspace.dirty(shard))
        yield [name[2:] for name in _scan(runtime, "HSCAN", keyspace.shard(shard), "MATCH", "t:*")]
    if is_cluster(runtime.client):
        return
    cursor = b"0"
    while True:
        ((cursor, keys),) = _ask(runtime, [("SCAN", cursor, "MATCH", f"{{{keyspace.prefix}:*}}:*", "COUNT", 1000)])
        yield [name for key in keys if (name := _thread_of(key)) is not None]
        if int(cursor) == 0:
            return


def _scan(runtime: Runtime, command: str, key: bytes, *match: str) -> list[str]:
    names: list[str] = []
    cursor = b"0"
    while True:
        ((cursor, found),) = _ask(runtime, [(command, key, cursor, *match, "COUNT", 1000)])
        # redis-py makes a dict of HSCAN's reply, and pairs of ZSCAN's.
        names += [name.decode() for name, *_ in (found if command == "ZSCAN" else ((key,) for key in found))]
        if int(cursor) == 0:
            return names


def _thread_of(key: bytes) -> str | None:
    """Read the thread's name out of a key's."""
    _, _, rest = key.partition(b"}:")
    kind, _, name = rest.partition(b":")
    if kind in (b"journal", b"namespaces"):
        return name.decode()
    if kind == b"hot":
        length, _, name = name.partition(b":")
        return name[: int(length)].decode() if length.isdigit() else None
    return None


def _ask(runtime: Runtime, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Run commands that read, many in one round trip."""
    replies: list[Any] = []
    try:
        for start in range(0, len(commands), _COMMANDS):
            part = commands[start : start + _COMMANDS]
            if len(part) == 1:
                replies.append(runtime.client.execute_command(*part[0]))
                continue
            pipeline = runtime.client.pipeline(transaction=False)
            for command in part:
                pipeline.execute_command(*command)
            replies += pipeline.execute()
    except tier.REDIS_ERRORS as error:
        raise tier.translate(error) from error
    return replies


# --- one checkpoint in both tiers ------------------------------------------------------------------------------------


def differences(runtime: Runtime, serde: SerializerProtocol, position: ThreadPosition) -> list[str]:
    """Compare the hot checkpoint of a namespace with PostgreSQL's latest.

    Args:
        runtime: The open tiers.
        serde: Loads values whose bytes differ.
        position: The thread and namespace.

    Returns:
        What differs; nothing if it was written to meanwhile, so that the two are not to be compared.
    """
    keys = runtime.calls.keyspace.thread(position.thread_id)
    commands = [("HGETALL", keys.hot(position.checkpoint_ns)), ("XLEN", keys.journal)]
    before = _ask(runtime, commands)
    found = runtime.cold(partial(reader.read_checkpoint, serde=serde, position=position))
    after = _ask(runtime, commands)
    hot = {name: value for name, value in before[0].items() if name not in (b"l", b"e")}
    if hot != {name: value for name, value in after[0].items() if name not in (b"l", b"e")} or before[1] or after[1]:
        return []
    if found is None or hot.get(b"id", b"").decode() != found.found.config["configurable"]["checkpoint_id"]:
        return []
    try:
        left = _hot_parts(hot)
    except (KeyError, ValueError) as error:
        return [f"the hot hash cannot be read ({type(error).__name__}: {error})"]
    right = _cold_parts(found)
    wrong = [
        f"{what} is {'only hot' if what not in right else 'only cold' if what not in left else 'another'}"
        for what in sorted(left.keys() | right.keys())
        if what not in left or what not in right or not _same(serde, left[what], right[what])
    ]
    return wrong if len(wrong) <= _FEW else [*wrong[:_FEW], f"{len(wrong) - _FEW} more"]


def _hot_parts(fields: Mapping[bytes, bytes]) -> dict[str, Any]:
    checkpoint = json.loads(fields[b"c"])
    parts = _document_parts(checkpoint, json.loads(fields[b"m"]), fields[b"p"].decode())
    parts |= {f"channel {name!r}": value for name, value in (checkpoint.get("channel_values") or {}).items()}
    for channel, version in checkpoint["channel_versions"].items():
        key = channel.encode()
        if fields.get(b"v:" + key) == version_text(version).encode():
            parts[f"channel {channel!r}"] = reader.RawValue(unpack_value(fields[b"b:" + key]))
    prefix = b"w:%b\0" % fields[b"id"]
    for name, packed in fields.items():
        if name.startswith(prefix):
            task_id, index = name[len(prefix) :].decode().split("\0")
            path, channel_name, value = packed.split(b"\0", 2)
            where = f"write {index} of task {task_id}"
            parts[where] = reader.RawValue(unpack_value(value))
            parts[f"{where}'s place"] = [path.decode(), channel_name.decode()]
    return parts


def _cold_parts(found: reader.ColdCheckpoint) -> dict[str, Any]:
    parent = found.found.parent_config
    checkpoint = cast("dict[str, Any]", found.found.checkpoint)
    parts = _document_parts(checkpoint, found.found.metadata, parent["configurable"]["checkpoint_id"] if parent else "")
    parts |= {f"channel {name!r}": value for name, value in checkpoint["channel_values"].items()}
    for record in found.writes:
        for index, channel, value in record.writes:
            where = f"write {index} of task {record.task_id}"
            parts[where] = reader.RawValue(unpack_value(value))
            parts[f"{where}'s place"] = [record.task_path, channel]
    return parts


def _document_parts(checkpoint: Mapping[str, Any], metadata: Any, parent: str) -> dict[str, Any]:
    parts = {f"the checkpoint's {key!r}": value for key, value in checkpoint.items() if key != "channel_values"}
    return {**parts, "the metadata": metadata, "the parent": parent}


def _same(serde: SerializerProtocol, left: Any, right: Any) -> bool:
    if isinstance(left, reader.RawValue) and isinstance(right, reader.RawValue):
        return left == right or _same_value(serde, left.typed, right.typed)
    if isinstance(left, float) or isinstance(right, float):
        # PostgreSQL's numbers are decimal: a large float comes back as an integer.
        try:
            return math.isclose(left, right, rel_tol=1e-15) or float(left) == float(right)
        except (TypeError, OverflowError):
            return False
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(serde, left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(_same(serde, a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def _same_value(serde: SerializerProtocol, left: TypedValue, right: TypedValue) -> bool:
    """Compare two values whose bytes differ: a cipher never gives the same twice, and a set has no order."""
    try:
        cold = serde.loads_typed(right)
    except Exception:  # noqa: BLE001 - a serializer may raise anything; what it cannot read, it cannot compare
        return True
    try:
        hot = serde.loads_typed(left)
    except Exception:  # noqa: BLE001
        return False
    try:
        if hot == cold:
            return True
    except Exception:  # noqa: BLE001, S110 - an object that refuses comparison, such as an array
        pass
    plain = serde.serde if isinstance(serde, EncryptedSerializer) else serde
    try:
        return bool(plain.dumps_typed(hot) == plain.dumps_typed(cold))
    except Exception:  # noqa: BLE001
        return False
