"""Values that records carry as deltas: made whole, or kept as deltas, before their rows are written.

A delta needs the value of an earlier version, which is found, in this order, in the same batch, in the flusher's memory
of what it wrote last, and in PostgreSQL, whole or as a chain of deltas down to a whole value.

Invariants: a delta that is stored was applied once, so its digest holds; its base is stored; a version is stored whole
or as a delta, never both; a chain is no longer than `MOST_DEPTH` and weighs no more than twice the value that it makes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from psycopg import Cursor
from psycopg.rows import DictRow

from langgraph_tiered_saver import deltas
from langgraph_tiered_saver.config import Storage
from langgraph_tiered_saver.deltas import BrokenDeltaError
from langgraph_tiered_saver.recent import ChannelKey, RecentValues, StoredValue
from langgraph_tiered_saver.records import FRESH, Blob, CheckpointRecord, Record, TypedValue, unpack_value

# A whole value at least every so many versions, because each delta of a chain costs a descent of an index, about 5 µs.
# Of a conversation of 400 steps of 1 KB the whole values take 1.0 MB with 64, 0.5 MB with 256 and 0.05 MB with 512,
# beside 0.7 MB of deltas; reading the end of a chain takes about 1.2, 1.4 and 1.4 times as long as reading the value
# whole.
MOST_DEPTH = 512
# A chain of appended elements weighs what it makes, and 32 bytes for each delta, which bound a chain of small ones; one
# that replaces elements would be read in vain for the most part.
MOST_WEIGHT = 2
# No chain is that long, unless somebody changed rows by hand and made it go round in circles.
CHAIN_LIMIT = 4096

# The versions from the wanted ones down to whole values. Each step is one descent of an index: a join would be planned
# from a guess of how long chains are.
READ_CHAINS = """
WITH RECURSIVE chain (number, step, thread_id, checkpoint_ns, channel, version) AS (
    SELECT number, 0, thread_id, checkpoint_ns, channel, version
    FROM unnest(%b::text[], %b::text[], %b::text[], %b::text[]) WITH ORDINALITY
        AS wanted (thread_id, checkpoint_ns, channel, version, number)
    UNION ALL
    SELECT c.number, c.step + 1, c.thread_id, c.checkpoint_ns, c.channel, next.base
    FROM chain c CROSS JOIN LATERAL (
        SELECT d.base FROM tiered_deltas d
        WHERE d.thread_id = c.thread_id AND d.checkpoint_ns = c.checkpoint_ns AND d.channel = c.channel
        AND d.version = c.version LIMIT 1
    ) AS next WHERE c.step < %b
)
SELECT c.number, stored.is_delta, stored.type, stored.data
FROM chain c CROSS JOIN LATERAL (
    SELECT true AS is_delta, d.type, d.delta AS data FROM tiered_deltas d
    WHERE d.thread_id = c.thread_id AND d.checkpoint_ns = c.checkpoint_ns AND d.channel = c.channel
    AND d.version = c.version
    UNION ALL
    SELECT false, b.type, b.blob FROM checkpoint_blobs b
    WHERE b.thread_id = c.thread_id AND b.checkpoint_ns = c.checkpoint_ns AND b.channel = c.channel
    AND b.version = c.version AND b.blob IS NOT NULL
    LIMIT 1
) AS stored
ORDER BY c.number, c.step DESC"""

# Depth 0: whole.
READ_PLACES = """
SELECT number, stored.depth, stored.chain_bytes
FROM unnest(%b::text[], %b::text[], %b::text[], %b::text[]) WITH ORDINALITY
    AS wanted (thread_id, checkpoint_ns, channel, version, number)
CROSS JOIN LATERAL (
    SELECT d.depth, d.chain_bytes FROM tiered_deltas d
    WHERE d.thread_id = wanted.thread_id AND d.checkpoint_ns = wanted.checkpoint_ns AND d.channel = wanted.channel
    AND d.version = wanted.version
    UNION ALL
    SELECT 0, 0 FROM checkpoint_blobs b
    WHERE b.thread_id = wanted.thread_id AND b.checkpoint_ns = wanted.checkpoint_ns AND b.channel = wanted.channel
    AND b.version = wanted.version AND b.blob IS NOT NULL
    LIMIT 1
) AS stored"""


class BlobKey(NamedTuple):
    """Names a version of a channel, as the primary keys of the tables do."""

    thread_id: str
    checkpoint_ns: str
    channel: str
    version: str

    @property
    def of_channel(self) -> ChannelKey:
        """The channel."""
        return ChannelKey(self.thread_id, self.checkpoint_ns, self.channel)


class Place(NamedTuple):
    """How a version is stored.

    Attributes:
        depth: How many deltas lie between it and a whole value; 0 if it is whole.
        chain_bytes: Their bytes.
    """

    depth: int
    chain_bytes: int


WHOLE = Place(0, 0)


class DeltaRow(NamedTuple):
    """A row of `tiered_deltas`, without its key.

    Attributes:
        base: The version that the delta is made to.
        type: The serializer's name of the format.
        delta: The delta.
        depth: As in `Place`.
        chain_bytes: As in `Place`.
        size: Bytes of the whole value.
    """

    base: str
    type: str
    delta: bytes
    depth: int
    chain_bytes: int
    size: int


@dataclass
class Placed:
    """What the values of a batch come to.

    Attributes:
        blobs: Whole values.
        deltas: Deltas.
        lost: Versions that cannot be made, because the version that they are made from is nowhere.
        recent: The last value of each channel that later deltas may be made to, to be remembered after the commit.
    """

    blobs: dict[BlobKey, TypedValue] = field(default_factory=dict)
    deltas: dict[BlobKey, DeltaRow] = field(default_factory=dict)
    lost: list[BlobKey] = field(default_factory=list)
    recent: dict[ChannelKey, StoredValue] = field(default_factory=dict)


def next_place(base: Place, delta: bytes, size: int) -> Place | None:
    """Tell where in its chain a delta comes to lie; None if the value should be stored whole.

    Args:
        base: Where the base is.
        delta: The delta.
        size: Bytes of the whole value.
    """
    place = Place(base.depth + 1, base.chain_bytes + len(delta))
    return place if place.depth <= MOST_DEPTH and place.chain_bytes <= MOST_WEIGHT * size else None


class Weigher:
    """Tells how many bytes records of one thread bring to a transaction, for PostgreSQL or this process to take.

    With compact storage only the value that a channel has last is held whole, and one in `MOST_DEPTH` is written so.
    """

    def __init__(self, storage: Storage) -> None:
        self._compact = storage == "compact"
        self._channels: set[tuple[str, str]] = set()

    def weigh(self, record: Record, payload: bytes) -> int:
        """Weigh one more record."""
        size = len(payload)
        if isinstance(record, CheckpointRecord):
            for blob in record.blobs:
                if blob.is_delta:
                    size += self._more(record.checkpoint_ns, blob)
        return size

    def _more(self, checkpoint_ns: str, blob: Blob) -> int:
        delta = unpack_value(blob.value)[1]
        try:
            whole = deltas.whole_size(delta)
        except BrokenDeltaError:
            return 0
        channel = (checkpoint_ns, blob.channel)
        if self._compact and channel in self._channels:
            return whole // MOST_DEPTH
        self._channels.add(channel)
        return max(0, whole - len(delta))


def place(
    cursor: Cursor[DictRow], blobs: Mapping[BlobKey, Blob], *, storage: Storage, recent: RecentValues | None
) -> Placed:
    """Work out the rows of some values, within a transaction that holds their threads' rows in `tiered_threads`.

    Args:
        cursor: The transaction's.
        blobs: The values, each thread's in the order of its journal.
        storage: Whether deltas are stored, or what they make.
        recent: The values that were written last; None looks at PostgreSQL only.

    Raises:
        BrokenDeltaError: a delta cannot be applied to its base.

    Cost: nothing without deltas; else a round trip for bases that are not in memory, and one with compact storage.
    """
    if any(blob.is_delta for blob in blobs.values()):
        return _Placing(cursor, blobs, storage, recent).run()
    placed = Placed()
    for key, blob in blobs.items():
        placed.blobs[key] = typed = unpack_value(blob.value)
        if blob.base == FRESH:
            placed.recent[key.of_channel] = StoredValue(key.version, *typed)
    return placed


class _Placing:
    """Makes the values of one batch, in order."""

    def __init__(
        self, cursor: Cursor[DictRow], blobs: Mapping[BlobKey, Blob], storage: Storage, recent: RecentValues | None
    ) -> None:
        self._cursor = cursor
        self._blobs = blobs
        self._compact = storage == "compact"
        self._recent = recent
        self._placed = Placed()
        self._places: dict[BlobKey, Place] = {}
        self._found: dict[BlobKey, TypedValue] = {}
        self._made: dict[BlobKey, TypedValue] = {}
        bases = [key._replace(version=blob.base) for key, blob in blobs.items() if blob.is_delta]
        # How many deltas still need a value.
        self._needed = Counter(bases)

    def run(self) -> Placed:
        bases = list(self._needed)
        if self._compact:
            deltas_ = [key for key, blob in self._blobs.items() if blob.is_delta]
            self._places = read_places(self._cursor, {*bases, *deltas_})
        # What the batch stores whole without being sure that nothing else is stored under that version gives way to
        # what PostgreSQL has.
        outside = [key for key in bases if not self._is_sure(key) and self._remembered(key) is None]
        self._found = read_values(self._cursor, outside)
        for key, blob in self._blobs.items():
            if blob.is_delta:
                self._make(key, blob)
            else:
                typed = unpack_value(blob.value)
                self._places.setdefault(key, WHOLE)
                self._placed.blobs[key] = typed
                if blob.base == FRESH:
                    self._keep(key, typed)
                elif key in self._needed:
                    self._found.setdefault(key, typed)
        return self._placed

    def _is_sure(self, key: BlobKey) -> bool:
        blob = self._blobs.get(key)
        return blob is not None and blob.base != ""

    def _remembered(self, key: BlobKey) -> TypedValue | None:
        stored = self._recent.get(key.of_channel) if self._recent is not None else None
        return (stored.type, stored.data) if stored is not None and stored.version == key.version else None

    def _make(self, key: BlobKey, blob: Blob) -> None:
        base_key = key._replace(version=blob.base)
        type_, delta = unpack_value(blob.value)
        try:
            value = self._apply(base_key, type_, delta)
        finally:
            self._release(base_key)
        if value is None:
            # The base may have been removed since this was written for the first time.
            if (stored := read_values(self._cursor, [key]).get(key)) is None:
                self._placed.lost.append(key)
            elif self._needed[key]:
                self._found[key] = stored
            return
        self._keep(key, (type_, value))
        if not self._compact:
            self._placed.blobs[key] = (type_, value)
            return
        if key in self._places:
            return
        base = self._places.get(base_key)
        at = next_place(base, delta, len(value)) if base is not None else None
        if at is None:
            self._placed.blobs[key] = (type_, value)
        else:
            self._placed.deltas[key] = DeltaRow(blob.base, type_, delta, *at, len(value))
        self._places[key] = at or WHOLE

    def _apply(self, base_key: BlobKey, type_: str, delta: bytes) -> bytes | None:
        """Make a value; None if its base is nowhere."""
        base = self._made.get(base_key)
        if base is None and base_key not in self._found:
            base = self._remembered(base_key)
            if base is not None:
                try:
                    return _applied(base, type_, delta)
                except BrokenDeltaError:
                    # Of a thread that was deleted and made anew, perhaps: what PostgreSQL has counts.
                    self._found |= read_values(self._cursor, [base_key])
                    base = None
        if base is None:
            base = self._found.get(base_key)
        return None if base is None else _applied(base, type_, delta)

    def _keep(self, key: BlobKey, typed: TypedValue) -> None:
        self._placed.recent[key.of_channel] = StoredValue(key.version, *typed)
        if self._needed[key]:
            self._made[key] = typed

    def _release(self, base_key: BlobKey) -> None:
        self._needed[base_key] -= 1
        if not self._needed[base_key]:
            self._made.pop(base_key, None)
            self._found.pop(base_key, None)


def _applied(base: TypedValue, type_: str, delta: bytes) -> bytes:
    if base[0] != type_:
        raise BrokenDeltaError("the delta was made from a value of another type")
    return deltas.apply(base[1], delta)


def _columns(keys: Iterable[BlobKey]) -> list[list[Any]]:
    return [list(column) for column in zip(*keys, strict=True)]


def read_places(cursor: Cursor[DictRow], keys: Iterable[BlobKey]) -> dict[BlobKey, Place]:
    """Find out how versions are stored; those that are not are left out."""
    wanted = sorted(keys)
    if not wanted:
        return {}
    rows = cursor.execute(READ_PLACES.encode(), _columns(wanted)).fetchall()
    return {wanted[row["number"] - 1]: Place(row["depth"], row["chain_bytes"]) for row in rows}


def read_values(cursor: Cursor[DictRow], keys: Sequence[BlobKey]) -> dict[BlobKey, TypedValue]:
    """Read versions whole, however they are stored, in one statement; those that are not are left out.

    Raises:
        BrokenDeltaError: a chain does not make the value that its last delta names.
    """
    if not keys:
        return {}
    chains: dict[BlobKey, list[DictRow]] = {}
    with cursor.connection.cursor(binary=True) as reading:
        for row in reading.execute(READ_CHAINS.encode(), [*_columns(keys), CHAIN_LIMIT]):
            chains.setdefault(keys[row["number"] - 1], []).append(row)
    found = {}
    for key, (first, *rest) in chains.items():
        if first["is_delta"]:
            continue  # the chain does not reach a whole value
        types = {row["type"] for row in (first, *rest)}
        if len(types) > 1:
            raise BrokenDeltaError("the delta was made from a value of another type")
        found[key] = (first["type"], deltas.fold(first["data"], (row["data"] for row in rest)))
    return found


# --- every delta of a thread -----------------------------------------------------------------------------------------

_PAGE_DELTAS = 50  # read at once

READ_DELTAS = """
SELECT checkpoint_ns, channel, version, base, type, delta, size FROM tiered_deltas
WHERE thread_id = %b AND (checkpoint_ns, channel, version) > (%b, %b, %b)
ORDER BY checkpoint_ns, channel, version LIMIT %b"""


class StoredDelta(NamedTuple):
    """A version that is stored as a delta.

    Attributes:
        key: The version.
        base: The version that it is made from.
        size: Bytes of the whole value, as the row says.
        delta_size: Bytes of the delta.
        value: What it makes; None if it cannot be made.
        reason: Why not.
    """

    key: BlobKey
    base: str
    size: int
    delta_size: int
    value: TypedValue | None
    reason: str


def walk(cursor: Cursor[DictRow], thread_id: str, after: tuple[str, ...] = ("", "", "")) -> Iterator[StoredDelta]:
    """Make every value of a thread that is stored as a delta, channel by channel in the order of the versions.

    Args:
        cursor: A cursor of the cold tier.
        thread_id: The thread.
        after: Namespace, channel and version to go on after.

    Cost: versions that follow each other are made one from another; one value and a page of deltas are in memory.
    """
    at = after
    made: dict[BlobKey, TypedValue] = {}
    while True:
        with cursor.connection.cursor(binary=True) as reading:
            rows = reading.execute(READ_DELTAS.encode(), (thread_id, *at, _PAGE_DELTAS)).fetchall()
        for row in rows:
            at = (row["checkpoint_ns"], row["channel"], row["version"])
            key = BlobKey(thread_id, *at)
            base_key = key._replace(version=row["base"])
            value, reason = None, ""
            try:
                base = made.get(base_key) or read_values(cursor, [base_key]).get(base_key)
                if base is None:
                    reason = f"the version {row['base']} that it is made from is missing"
                else:
                    value = (row["type"], _applied(base, row["type"], row["delta"]))
            except BrokenDeltaError as error:
                reason = str(error)
            made = {} if value is None else {key: value}
            yield StoredDelta(key, row["base"], row["size"], len(row["delta"]), value, reason)
        if len(rows) < _PAGE_DELTAS:
            return
