"""Retention: which checkpoints of a thread go, and how they are removed a bounded number at a time."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from langgraph.checkpoint.serde.types import TASKS
from psycopg import Cursor
from psycopg.rows import DictRow

from langgraph_tiered_saver.cold.pool import Connection

# With 4 blobs and 2 writes each, so many are removed in about 20 ms here, which is how long a flush of another thread
# of the shard may wait. A tenth of it takes 4 ms; but what is done before the lock takes as long as the thread is long.
MOST_REMOVED = 500

DELETE_CHECKPOINTS = "DELETE FROM checkpoints WHERE thread_id = %s AND checkpoint_ns = %s AND checkpoint_id = ANY(%s)"

DELETE_WRITES = """
DELETE FROM checkpoint_writes WHERE thread_id = %s AND checkpoint_ns = %s AND checkpoint_id = ANY(%s)"""

# What some checkpoints use and no other checkpoint of the namespace does.
FIND_GARBAGE = """
SELECT v.key AS channel, v.value AS version
FROM checkpoints c CROSS JOIN LATERAL jsonb_each_text(c.checkpoint -> 'channel_versions') AS v
WHERE c.thread_id = %(thread)s AND c.checkpoint_ns = %(ns)s AND c.checkpoint_id = ANY(%(ids)s)
EXCEPT
SELECT v.key, v.value
FROM checkpoints c CROSS JOIN LATERAL jsonb_each_text(c.checkpoint -> 'channel_versions') AS v
WHERE c.thread_id = %(thread)s AND c.checkpoint_ns = %(ns)s AND c.checkpoint_id <> ALL(%(ids)s)"""

HAS_DELTAS = "SELECT EXISTS (SELECT FROM tiered_deltas WHERE thread_id = %s AND checkpoint_ns = %s) AS found"

# The same among deltas: a version stays that another one which stays is made from, and goes with the last of them. A
# chain weighs no more than twice what it makes, so this is at most so much; no delta is ever made anew.
FIND_GARBAGE_OF_CHAINS = """
WITH RECURSIVE doomed (channel, version) AS (
    SELECT v.key, v.value
    FROM checkpoints c CROSS JOIN LATERAL jsonb_each_text(c.checkpoint -> 'channel_versions') AS v
    WHERE c.thread_id = %(thread)s AND c.checkpoint_ns = %(ns)s AND c.checkpoint_id = ANY(%(ids)s)
    UNION
    SELECT d.channel, d.base FROM doomed JOIN tiered_deltas d
    ON d.thread_id = %(thread)s AND d.checkpoint_ns = %(ns)s AND d.channel = doomed.channel
        AND d.version = doomed.version
), kept (channel, version) AS (
    SELECT v.key, v.value
    FROM checkpoints c CROSS JOIN LATERAL jsonb_each_text(c.checkpoint -> 'channel_versions') AS v
    WHERE c.thread_id = %(thread)s AND c.checkpoint_ns = %(ns)s AND c.checkpoint_id <> ALL(%(ids)s)
    UNION
    SELECT d.channel, d.base FROM kept JOIN tiered_deltas d
    ON d.thread_id = %(thread)s AND d.checkpoint_ns = %(ns)s AND d.channel = kept.channel AND d.version = kept.version
)
SELECT channel, version FROM doomed EXCEPT SELECT channel, version FROM kept"""

DELETE_GARBAGE_OF_CHAINS = """
DELETE FROM tiered_deltas AS d USING unnest(%s::text[], %s::text[]) AS garbage (channel, version)
WHERE d.thread_id = %s AND d.checkpoint_ns = %s AND d.channel = garbage.channel AND d.version = garbage.version"""

DELETE_GARBAGE = """
DELETE FROM checkpoint_blobs AS b USING unnest(%s::text[], %s::text[]) AS garbage (channel, version)
WHERE b.thread_id = %s AND b.checkpoint_ns = %s AND b.channel = garbage.channel AND b.version = garbage.version"""

CUT_PARENTS = """
UPDATE checkpoints SET parent_checkpoint_id = NULL
WHERE thread_id = %s AND checkpoint_ns = %s AND checkpoint_id = ANY(%s)"""

READ_STATE = """
SELECT count(*) AS count, coalesce(max(tiered_seq), 0) AS last,
    coalesce((SELECT conversions FROM tiered_threads WHERE thread_id = %(thread)s), 0) AS conversions
FROM checkpoints WHERE thread_id = %(thread)s"""

# The checkpoint itself is looked into for its time only: it may be large, and lie out of line.
READ_CHECKPOINTS = """
SELECT checkpoint_ns, checkpoint_id, parent_checkpoint_id, tiered_seq, metadata -> 'parents' ->> '' AS root,
    metadata ? 'delta_writes_versioned' AS all_delta,
    ARRAY(SELECT jsonb_object_keys(
        CASE jsonb_typeof(metadata -> 'counters_since_delta_snapshot') WHEN 'object'
            THEN metadata -> 'counters_since_delta_snapshot' ELSE '{}' END)) AS delta_channels,
    CASE WHEN %(timed)s THEN checkpoint ->> 'ts' END AS ts
FROM checkpoints WHERE thread_id = %(thread)s ORDER BY checkpoint_ns, checkpoint_id DESC"""

READ_LAST_WRITE = "SELECT max(tiered_seq) AS last FROM checkpoint_writes WHERE thread_id = %s"

# Before format 4, the pending sends of a checkpoint are writes of its parent.
FIND_PARENTS_WITH_SENDS = """
SELECT DISTINCT c.parent_checkpoint_id AS parent FROM checkpoints c
WHERE c.thread_id = %(thread)s AND c.checkpoint_ns = %(ns)s AND c.checkpoint_id = ANY(%(ids)s)
AND coalesce((c.checkpoint ->> 'v')::int, 0) < 4
AND EXISTS (
    SELECT 1 FROM checkpoint_writes w
    WHERE w.thread_id = c.thread_id AND w.checkpoint_ns = c.checkpoint_ns
    AND w.checkpoint_id = c.parent_checkpoint_id AND w.channel = %(sends)s)"""

READ_CHANNELS = """
SELECT checkpoint_id, ARRAY(SELECT jsonb_object_keys(checkpoint -> 'channel_versions')) AS channels
FROM checkpoints WHERE thread_id = %s AND checkpoint_ns = %s AND checkpoint_id = ANY(%s)"""

# Checkpoints that store a value of a channel: inlined, or as a blob of the version they name. The walk that rebuilds a
# delta channel goes past an inlined null, so that is none.
HAVE_VALUE = """
SELECT c.checkpoint_id FROM checkpoints c
WHERE c.thread_id = %s AND c.checkpoint_ns = %s AND (
    coalesce(c.checkpoint -> 'channel_values' -> %s, 'null'::jsonb) <> 'null'::jsonb
    OR EXISTS (
        SELECT 1 FROM checkpoint_blobs b
        WHERE b.thread_id = c.thread_id AND b.checkpoint_ns = c.checkpoint_ns AND b.channel = %s
        AND b.version = c.checkpoint -> 'channel_versions' ->> %s AND b.type <> 'empty')
    OR EXISTS (
        SELECT 1 FROM tiered_deltas d
        WHERE d.thread_id = c.thread_id AND d.checkpoint_ns = c.checkpoint_ns AND d.channel = %s
        AND d.version = c.checkpoint -> 'channel_versions' ->> %s))"""

_UUID_EPOCH = 0x01B21DD213814000  # 100 ns intervals from the calendar reform of 1582 to 1970 (RFC 9562)

_Cursor = Cursor[DictRow]


@dataclass(frozen=True)
class Rules:
    """What may stay; a checkpoint goes if one rule removes it. The latest of each namespace breaks none but the last.

    Attributes:
        keep_last: How many of the newest checkpoints of each namespace stay; None: all.
        before: Checkpoints made before this time go, in seconds since 1970; None: none.
        idle_before: A thread goes whole if its newest checkpoint was made, and everything else of it written, before
            this time; None: never.
    """

    keep_last: int | None = None
    before: float | None = None
    idle_before: float | None = None

    @classmethod
    def from_now(
        cls, keep_last: int | None = None, max_age: float | None = None, delete_idle: float | None = None
    ) -> Rules:
        """Make rules of ages, in seconds, which count from now."""
        now = time.time()
        return cls(
            keep_last, None if max_age is None else now - max_age, None if delete_idle is None else now - delete_idle
        )

    def arguments(self) -> dict[str, Any]:
        """Give the arguments of the record that applies them."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Rules:
        """Read what `arguments` gave.

        Raises:
            ValueError: this version does not know a rule; ignoring it might remove too much.
        """
        kinds: dict[str, tuple[type, ...]] = {"keep_last": (int,), "before": (int, float), "idle_before": (int, float)}
        for name, value in arguments.items():
            if name not in kinds or type(value) not in kinds[name] or (name == "keep_last" and value < 1):
                raise ValueError(f"not a retention rule this version knows: {name}={value!r:.40}")
        return cls(**arguments)


@dataclass(frozen=True)
class Plan:
    """What rules remove of a thread.

    Attributes:
        doomed: `(namespace, checkpoint id)`, oldest first; a subgraph call's come before the root checkpoint that it
            started from. Of a thread that goes whole: all but the latest and what they are rebuilt from.
        whole: The thread goes whole.
        parents: Every checkpoint's parent, by namespace.
    """

    doomed: Sequence[tuple[str, str]]
    whole: bool
    parents: Mapping[str, Mapping[str, str | None]]

    @property
    def count(self) -> int:
        """How many checkpoints go."""
        return sum(map(len, self.parents.values())) if self.whole else len(self.doomed)


@dataclass(frozen=True)
class Removal:
    """Rows that go in one transaction.

    Attributes:
        state: What the thread looked like: how many checkpoints, their last sequence number, and how often values were
            stored in another way.
        whole: Everything of the thread goes.
        ids: Checkpoints, by namespace.
        garbage: Blobs that only they use, by namespace: `(channel, version)`.
        cut: Checkpoints that lose their parent, by namespace.
    """

    state: tuple[int, int, int]
    whole: bool
    ids: Mapping[str, Sequence[str]]
    garbage: Mapping[str, Sequence[tuple[str, str]]]
    cut: Mapping[str, Sequence[str]]


def make_plan(cursor: _Cursor, thread_id: str, rules: Rules, up_to: int | None = None) -> Plan:
    """Find out what rules remove of a thread.

    Beside what the rules keep, its ancestors stay that a `DeltaChannel` is rebuilt from, and those that hold its
    pending sends. A namespace of a subgraph call goes with the root checkpoint that the call started from.

    Args:
        cursor: A cursor of the cold tier.
        thread_id: The thread.
        rules: The rules.
        up_to: Rows of later sequence numbers stay.
    """
    parameters = {"thread": thread_id, "timed": rules.before is not None or rules.idle_before is not None}
    namespaces: dict[str, list[DictRow]] = {}
    for row in cursor.execute(READ_CHECKPOINTS, parameters).fetchall():
        namespaces.setdefault(row["checkpoint_ns"], []).append(row)
    last = math.inf if up_to is None else up_to
    whole = rules.idle_before is not None and _is_idle(cursor, thread_id, namespaces, rules.idle_before, last)
    if whole:
        rules = Rules(keep_last=1)
    kept = {ns: _kept(cursor, thread_id, ns, rows, rules, last) for ns, rows in namespaces.items()}
    roots = {row["checkpoint_id"] for row in namespaces.get("", ())}
    doomed: list[tuple[tuple[str, bool, str, str], tuple[str, str]]] = []
    for ns, rows in namespaces.items():
        # A call's namespace has its task id after a ":", unlike one of a subgraph whose state outlives its calls. Its
        # root checkpoint may not be saved yet: runs save in the background.
        root = rows[0]["root"] or "" if ":" in ns else ""
        late = any((row["tiered_seq"] or 0) > last for row in rows)
        with_root = root in roots and root not in kept[""] and not late
        for row in rows:
            name = row["checkpoint_id"]
            if with_root:
                doomed.append(((root, False, ns, name), (ns, name)))
            elif name not in kept[ns]:
                doomed.append(((name, True, ns, name), (ns, name)))
    return Plan(
        [place for _, place in sorted(doomed)],
        whole,
        {ns: {row["checkpoint_id"]: row["parent_checkpoint_id"] for row in rows} for ns, rows in namespaces.items()},
    )


def read_plan(thread_id: str, rules: Rules, connection: Connection) -> Plan:
    """Find out what rules would remove of a thread now, as far as PostgreSQL has it."""
    with connection.cursor() as cursor:
        return make_plan(cursor, thread_id, rules)


def prepare(cursor: _Cursor, thread_id: str, rules: Rules, up_to: int, most: int | None) -> Removal:
    """Find out which rows go first; costs as much as the thread is long, which is why no lock is needed for it.

    Args:
        cursor: A cursor of the cold tier.
        thread_id: The thread.
        rules: The rules.
        up_to: Rows of later sequence numbers stay.
        most: At most so many checkpoints go, the oldest first; None: all. A thread that goes whole is brought down to
            its latest state first, because a run that resumes it meanwhile must find that complete.
    """
    state = _read_state(cursor, thread_id)
    plan = make_plan(cursor, thread_id, rules, up_to)
    if plan.whole and (most is None or len(plan.doomed) <= most):
        return Removal(state, True, {}, {}, {})
    ids: dict[str, list[str]] = {}
    for ns, name in plan.doomed[:most]:
        ids.setdefault(ns, []).append(name)
    cut: dict[str, list[str]] = {}
    for ns, parents in plan.parents.items():
        left = parents.keys() - set(ids.get(ns, ()))
        if orphans := sorted(name for name in left if parents[name] is not None and parents[name] not in left):
            cut[ns] = orphans
    return Removal(state, False, ids, {ns: _garbage(cursor, thread_id, ns, names) for ns, names in ids.items()}, cut)


def still_holds(cursor: _Cursor, thread_id: str, removal: Removal) -> bool:
    """Whether no checkpoint was added, changed or removed, and no value converted, since a removal was prepared."""
    return _read_state(cursor, thread_id) == removal.state


def remove(cursor: _Cursor, thread_id: str, removal: Removal) -> None:
    """Remove rows of a thread that does not go whole, within a transaction that holds its shard's lock."""
    for ns, ids in removal.ids.items():
        _delete(cursor, thread_id, ns, ids, removal.garbage[ns])
    for ns, ids in removal.cut.items():
        cursor.execute(CUT_PARENTS, (thread_id, ns, ids), prepare=False)


def delete_checkpoints(cursor: _Cursor, thread_id: str, ns: str, ids: Sequence[str]) -> None:
    """Delete checkpoints of a namespace, their writes, and the blobs that only they used."""
    _delete(cursor, thread_id, ns, ids, _garbage(cursor, thread_id, ns, ids))


def _read_state(cursor: _Cursor, thread_id: str) -> tuple[int, int, int]:
    row = cursor.execute(READ_STATE, {"thread": thread_id}).fetchone()
    assert row is not None  # noqa: S101 - an aggregate always gives a row
    return int(row["count"]), int(row["last"]), int(row["conversions"])


# A statement that was prepared does not know its array, and is planned as if that were short.


def _garbage(cursor: _Cursor, thread_id: str, ns: str, ids: Sequence[str]) -> list[tuple[str, str]]:
    found = cursor.execute(HAS_DELTAS, (thread_id, ns)).fetchone()
    statement = FIND_GARBAGE_OF_CHAINS if found and found["found"] else FIND_GARBAGE
    rows = cursor.execute(statement, {"thread": thread_id, "ns": ns, "ids": ids}, prepare=False).fetchall()
    return [(row["channel"], row["version"]) for row in rows]


def _delete(cursor: _Cursor, thread_id: str, ns: str, ids: Sequence[str], garbage: Sequence[tuple[str, str]]) -> None:
    cursor.execute(DELETE_WRITES, (thread_id, ns, ids), prepare=False)
    cursor.execute(DELETE_CHECKPOINTS, (thread_id, ns, ids), prepare=False)
    channels, versions = [channel for channel, _ in garbage], [version for _, version in garbage]
    cursor.execute(DELETE_GARBAGE_OF_CHAINS, (channels, versions, thread_id, ns), prepare=False)
    cursor.execute(DELETE_GARBAGE, (channels, versions, thread_id, ns), prepare=False)


def made_at(row: Mapping[str, Any]) -> float | None:
    """Tell when a checkpoint was made, in seconds since 1970: by its `ts`, or by its id if that is a UUIDv6.

    Args:
        row: With `ts` and `checkpoint_id`.
    """
    try:
        # Python 3.10 does not read the "Z" that other languages write.
        made = datetime.fromisoformat((row["ts"] or "").replace("Z", "+00:00"))
        return (made if made.tzinfo else made.replace(tzinfo=timezone.utc)).timestamp()
    except ValueError:
        pass
    try:
        number = uuid.UUID(row["checkpoint_id"])
    except ValueError:
        return None
    if number.version != 6:
        return None
    # Python reads the fields of a UUID in the order of version 1.
    intervals = (number.time_low << 28) | (number.time_mid << 12) | (number.time_hi_version & 0x0FFF)
    return (intervals - _UUID_EPOCH) / 1e7


def _is_idle(
    cursor: _Cursor, thread_id: str, namespaces: Mapping[str, Sequence[DictRow]], before: float, up_to: float
) -> bool:
    rows = [row for namespace in namespaces.values() for row in namespace]
    if not rows or any((made_at(row) or math.inf) >= before for row in rows):
        return False
    # A run that was resumed has written before its next checkpoint is made.
    written = cursor.execute(READ_LAST_WRITE, (thread_id,)).fetchone()
    sequences = [row["tiered_seq"] or 0 for row in [*rows, {"tiered_seq": written and written["last"]}]]
    return max(sequences) < before * 1e6 and max(sequences) <= up_to


def _kept(cursor: _Cursor, thread_id: str, ns: str, rows: Sequence[DictRow], rules: Rules, last: float) -> set[str]:
    """Give the checkpoints of a namespace that the rules keep, and the ancestors that these need."""
    heads = {
        row["checkpoint_id"]
        for number, row in enumerate(rows)
        if number == 0
        or (row["tiered_seq"] or 0) > last
        or (
            (rules.keep_last is None or number < rules.keep_last)
            and (rules.before is None or (made_at(row) or math.inf) >= rules.before)
        )
    }
    if len(heads) == len(rows):
        return heads
    parents = {row["checkpoint_id"]: row["parent_checkpoint_id"] for row in rows}
    return (
        heads
        | _holding_sends(cursor, thread_id, ns, heads, parents)
        | _holding_deltas(cursor, thread_id, ns, heads, parents, rows)
    )


def _holding_sends(
    cursor: _Cursor, thread_id: str, ns: str, heads: set[str], parents: Mapping[str, str | None]
) -> set[str]:
    ids = [head for head in heads if parents[head] not in heads]
    values = {"thread": thread_id, "ns": ns, "ids": ids, "sends": TASKS}
    rows = cursor.execute(FIND_PARENTS_WITH_SENDS, values, prepare=False).fetchall()
    return {row["parent"] for row in rows if row["parent"] in parents}


def _holding_deltas(
    cursor: _Cursor,
    thread_id: str,
    ns: str,
    heads: set[str],
    parents: Mapping[str, str | None],
    rows: Sequence[DictRow],
) -> set[str]:
    """Give the ancestors up to each delta channel's last stored value."""
    every = any(row["all_delta"] for row in rows)
    delta = {channel for row in rows for channel in row["delta_channels"]}
    if not (every or delta):
        return set()
    # A channel that has no version was never written, so nothing is rebuilt for it.
    starts: dict[str, list[str]] = {}
    for row in cursor.execute(READ_CHANNELS, (thread_id, ns, list(heads)), prepare=False).fetchall():
        for channel in row["channels"]:
            if every or channel in delta:
                starts.setdefault(channel, []).append(row["checkpoint_id"])
    found: set[str] = set()
    for channel, ids in starts.items():
        values = (thread_id, ns, *[channel] * 5)
        valued = {row["checkpoint_id"] for row in cursor.execute(HAVE_VALUE, values).fetchall()}
        walked: set[str] = set()
        for start in ids:
            at: str | None = start
            while at is not None and at in parents and at not in walked:
                walked.add(at)
                at = None if at in valued else parents[at]
        found |= walked
    return found
