"""What delta channels are rebuilt from, as the hot tier keeps it.

A `DeltaChannel` leaves its value in few checkpoints; in between, it is rebuilt from the writes on ancestors. The hot
tier keeps the last value that an ancestor of the hot checkpoint stores, and the writes on ancestors since then; see
`hot/scripts/_history.lua`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

from langgraph.checkpoint.base import ChannelVersions, DeltaChannelHistory, writes_sort_key
from langgraph.checkpoint.serde.base import SerializerProtocol

from langgraph_tiered_saver import deltas
from langgraph_tiered_saver.names import ThreadPosition, version_text
from langgraph_tiered_saver.records import TypedValue, frame, pack_value, unframe, unpack_value
from langgraph_tiered_saver.values import encodable

# A version with a random part (which may be a short one, or have an exponent): no other branch has it.
_WITH_RANDOM_PART = re.compile(r"\d{32}\.[\d.e-]{16,}")

# Bounds of what is made hot again, the scripts' own.
_MOST_BYTES, _MOST_WRITES, _FIELD_BYTES = 4 * 2**20, 4096, 16384

_Write = tuple[str, TypedValue]  # task id, value


class RawValue(NamedTuple):
    """A stored value that was not deserialized."""

    typed: TypedValue


class RawSerializer:
    """Makes the library's reader hand out stored bytes, so that one read serves the caller and the hot tier."""

    def loads_typed(self, data: TypedValue) -> RawValue:
        """Give the bytes."""
        return RawValue(data)

    def dumps_typed(self, obj: Any) -> TypedValue:
        """Refuse; no reader of a history serializes."""
        raise NotImplementedError


class HistoryWarming(NamedTuple):
    """What makes a history hot that was read from the cold tier.

    Attributes:
        position: The hot checkpoint.
        sequence: Its last record's sequence number; empty if it was warmed itself.
        channels: For each channel, what the script takes.
    """

    position: ThreadPosition
    sequence: bytes
    channels: list[bytes]


class StepKind(Enum):
    """What a checkpoint stores of a delta channel, as the scripts know it."""

    VALUE = b"v"  # a value
    MOVED = b"n"  # none, of a version that is new
    UNMOVED = b"u"  # nothing new; its version may be one that an ancestor stored a value of


class DeltaStep(NamedTuple):
    """One delta channel of one checkpoint.

    Attributes:
        channel: The channel.
        kind: What the checkpoint stores of it.
        version: Its version there; "" if it has none.
    """

    channel: str
    kind: StepKind
    version: str


def delta_steps(
    names: Iterable[Any],
    values: Mapping[str, Any],
    with_blob: Collection[str],
    versions: ChannelVersions,
    new_versions: ChannelVersions,
) -> list[DeltaStep]:
    """Tell what a checkpoint stores of delta channels; one of which that is not certain is left out."""
    steps = []
    for name in names:
        if type(name) is not str or "\0" in name or not encodable(name):
            continue
        version = version_text(versions[name]) if name in versions else ""
        moved = name in new_versions
        if moved and version_text(new_versions[name]) != version:
            continue
        if name in with_blob:
            steps.append(DeltaStep(name, StepKind.VALUE, version))
        elif values.get(name) is not None:
            # A plain value inlined in JSON, or one without a version: no graph stores a delta channel like that.
            continue
        elif not moved:
            steps.append(DeltaStep(name, StepKind.UNMOVED, version))
        elif _WITH_RANDOM_PART.fullmatch(version):
            # Under another version, some other branch may have stored a value.
            steps.append(DeltaStep(name, StepKind.MOVED, version))
    return steps


def decode(
    serde: SerializerProtocol,
    position: ThreadPosition,
    fields: Mapping[bytes, bytes],
    generation: int,
    channels: Sequence[str],
) -> dict[str, DeltaChannelHistory] | None:
    """Make what delta channels are rebuilt from of a hot hash's fields.

    Args:
        serde: The serializer.
        position: The checkpoint; the latest if it names none.
        fields: The hash.
        generation: The generation it must be of.
        channels: The channels.

    Returns:
        None if the hash does not hold all of it, so that the cold tier must be asked.
    """
    checkpoint_id = fields.get(b"id")
    if checkpoint_id is None or (position.checkpoint_id and position.checkpoint_id.encode() != checkpoint_id):
        return None
    if fields.get(b"u", b"") >= checkpoint_id or fields.get(b"g") != b"%d" % generation:
        return None
    seeds: dict[str, TypedValue] = {}
    writes: dict[str, list[_Write]] = {}
    try:
        known = unframe(fields[b"h"])
        if known[0] != checkpoint_id:
            return None
        steps = {known[i]: known[i + 1 : i + 5] for i in range(2, len(known), 5)}
        for channel in channels:
            key = channel.encode()
            kind, _, has_seed, numbers = steps[key]
            # A channel that is asked for twice gets its writes twice, of PostgresSaver.
            if kind != b"H" or channel in writes:
                return None
            count, _, size, _ = map(int, numbers.split())
            parts = [fields[b"h:%b\0%d" % (key, i)] for i in range(1, count + 1)]
            if sum(map(len, parts)) != size:
                return None
            writes[channel] = [write for part in parts for group in unframe(part) for write in _in_order(group)]
            if has_seed == b"1":
                seeds[channel] = hot_value(fields, key)
    except (LookupError, ValueError):
        # Not there; or somebody else touched the hash.
        return None
    found: dict[str, DeltaChannelHistory] = {}
    for channel, ones in writes.items():
        found[channel] = {"writes": [(task_id, channel, serde.loads_typed(value)) for task_id, value in ones]}
        if channel in seeds:
            found[channel]["seed"] = serde.loads_typed(seeds[channel])
    return found


def _in_order(group: bytes) -> list[_Write]:
    """Give one checkpoint's writes to a channel, in the order in which they were applied."""
    parts = unframe(group)
    writes = []
    for place, packed in zip(parts[::2], parts[1::2], strict=True):
        task_id, index = place.decode().split("\0")
        path, _, value = packed.split(b"\0", 2)
        writes.append((writes_sort_key(path.decode(), task_id, int(index)), value))
    writes.sort(key=lambda write: write[0])
    return [(key[1], unpack_value(value)) for key, value in writes]


def warming(
    position: ThreadPosition, fields: Mapping[bytes, bytes], generation: int, raw: Mapping[str, DeltaChannelHistory]
) -> HistoryWarming | None:
    """Give what makes a history hot that was read with a `RawSerializer`.

    Args:
        position: The checkpoint that it was read for.
        fields: The hot hash, as it was before.
        generation: The generation.
        raw: What was read.

    Returns:
        None if the checkpoint is not hot, or nothing is to be kept.
    """
    checkpoint_id = fields.get(b"id")
    if checkpoint_id != position.checkpoint_id.encode() or fields.get(b"g") != b"%d" % generation:
        return None
    if fields.get(b"u", b"") >= checkpoint_id:
        return None
    try:
        checkpoint = json.loads(fields[b"c"])
        values, versions = checkpoint.get("channel_values") or {}, checkpoint["channel_versions"]
    except (LookupError, ValueError):
        return None
    channels = []
    for channel, history in raw.items():
        version = version_text(versions[channel]) if channel in versions else ""
        seed = history.get("seed")
        # An inlined value is none that any graph stores of a delta channel; nor are these versions made by us.
        if values.get(channel) is not None or not (seed is None or isinstance(seed, RawValue)):
            continue
        if version and not _WITH_RANDOM_PART.fullmatch(version):
            continue
        parts = _parts(channel, history["writes"])
        if parts is None:
            continue
        numbers = b"%d %d %d %d" % (
            len(parts),
            len(parts[-1]) if parts else 0,
            sum(map(len, parts)),
            len(history["writes"]),
        )
        has_seed, value = (b"1", pack_value(seed.typed)) if seed is not None else (b"", b"")
        channels.append(frame([channel.encode(), version.encode(), has_seed, value, numbers, *parts]))
    return HistoryWarming(position, fields.get(b"q", b""), channels) if channels else None


def _parts(channel: str, writes: Sequence[tuple[str, str, Any]]) -> list[bytes] | None:
    """Divide writes among fields, a group for each since their order is known; None if they are too many."""
    parts: list[bytes] = []
    if len(writes) > _MOST_WRITES:
        return None
    total = 0
    for task_id, _, value in writes:
        group = frame(
            [frame([b"%b\0" % task_id.encode() + b"0", b"\0%b\0%b" % (channel.encode(), pack_value(value.typed))])]
        )
        total += len(group)
        if total > _MOST_BYTES:
            return None
        if parts and len(parts[-1]) + len(group) <= _FIELD_BYTES:
            parts[-1] += group
        else:
            parts.append(group)
    return parts


def load(serde: SerializerProtocol, raw: Mapping[str, DeltaChannelHistory]) -> dict[str, DeltaChannelHistory]:
    """Deserialize what was read with a `RawSerializer`."""
    found: dict[str, DeltaChannelHistory] = {}
    for channel, history in raw.items():
        found[channel] = {
            "writes": [(task_id, name, serde.loads_typed(value.typed)) for task_id, name, value in history["writes"]]
        }
        if "seed" in history:
            seed = history["seed"]
            found[channel]["seed"] = serde.loads_typed(seed.typed) if isinstance(seed, RawValue) else seed
    return found


def hot_value(fields: Mapping[bytes, bytes], channel: bytes) -> TypedValue:
    """Put a channel's value in a hot hash and its deltas together.

    Raises:
        LookupError, ValueError: the hash does not hold it.
    """
    type_, base = unpack_value(fields[b"b:" + channel])
    count = int(fields.get(b"d:" + channel, b"0").partition(b" ")[0])
    if count:
        added = [unpack_value(fields[b"s:%b\0%d" % (channel, i)])[1] for i in range(1, count + 1)]
        return type_, deltas.fold(base, added)
    return type_, base
