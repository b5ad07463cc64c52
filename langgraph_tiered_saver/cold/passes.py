"""Passes of the retention policy over all threads: whose turn it is, and which threads may have something to go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from langgraph_tiered_saver.cold.pool import Connection
from langgraph_tiered_saver.cold.retention import Rules, made_at

PAGE = 100  # threads looked at together
TURN_SECONDS = 60.0  # a process that died in its turn delays the others by so much

# One process at a time, and one finished pass in every interval. Two that overlap, because one was stalled, do no harm.
TAKE_TURN = """
INSERT INTO tiered_retention AS t (one, holder, held_until)
VALUES (true, %(holder)s, clock_timestamp() + make_interval(secs => %(seconds)s))
ON CONFLICT (one) DO UPDATE SET holder = EXCLUDED.holder, held_until = EXCLUDED.held_until
WHERE t.held_until < clock_timestamp() AND t.finished_at <= clock_timestamp() - make_interval(secs => %(interval)s)
RETURNING came_to"""

KEEP_TURN = """
UPDATE tiered_retention
SET held_until = clock_timestamp() + make_interval(secs => %(seconds)s), came_to = %(came_to)s
WHERE holder = %(holder)s RETURNING one"""

END_TURN = """
UPDATE tiered_retention SET holder = NULL, held_until = to_timestamp(0),
    came_to = CASE WHEN %(finished)s THEN '' ELSE came_to END,
    finished_at = CASE WHEN %(finished)s THEN clock_timestamp() ELSE finished_at END
WHERE holder = %(holder)s"""

# Each thread costs one descent of the index, however many checkpoints it has.
NEXT_THREADS = """
WITH RECURSIVE names AS (
    (SELECT thread_id, 1 AS number FROM checkpoints WHERE thread_id > %(after)s ORDER BY thread_id LIMIT 1)
    UNION ALL
    SELECT following.thread_id, names.number + 1 FROM names CROSS JOIN LATERAL (
        SELECT thread_id FROM checkpoints WHERE thread_id > names.thread_id ORDER BY thread_id LIMIT 1
    ) AS following WHERE names.number < %(limit)s
)
SELECT names.thread_id, coalesce(t.quarantined, false) AS quarantined
FROM names LEFT JOIN tiered_threads t USING (thread_id) ORDER BY thread_id"""

# Counted on the index alone; only the oldest and the newest checkpoint are looked into.
SUMMARIES = """
SELECT g.thread_id, g.checkpoint_ns, g.checkpoints, oldest.checkpoint_id AS oldest, oldest.ts AS oldest_ts,
    newest.checkpoint_id AS newest, newest.ts AS newest_ts
FROM (
    SELECT thread_id, checkpoint_ns, count(*) AS checkpoints, min(checkpoint_id) AS oldest,
        max(checkpoint_id) AS newest
    FROM checkpoints WHERE thread_id = ANY(%s) GROUP BY thread_id, checkpoint_ns
) AS g
CROSS JOIN LATERAL (
    SELECT checkpoint_id, checkpoint ->> 'ts' AS ts FROM checkpoints
    WHERE thread_id = g.thread_id AND checkpoint_ns = g.checkpoint_ns AND checkpoint_id = g.oldest LIMIT 1
) AS oldest
CROSS JOIN LATERAL (
    SELECT checkpoint_id, checkpoint ->> 'ts' AS ts FROM checkpoints
    WHERE thread_id = g.thread_id AND checkpoint_ns = g.checkpoint_ns AND checkpoint_id = g.newest LIMIT 1
) AS newest"""


@dataclass(frozen=True)
class ThreadPage:
    """Some threads, in the order of their names.

    Attributes:
        threads: How many they are; 0 at the end.
        last: The last one's name.
        candidates: Those among them that rules may remove something of. Threads under quarantine are none.
    """

    threads: int
    last: str
    candidates: Sequence[str]


def take_turn(connection: Connection, holder: str, interval: float) -> str | None:
    """Try to become the one process that makes a pass.

    Args:
        connection: A connection to the cold tier.
        holder: Names the process.
        interval: Seconds that must have gone by since a pass was finished.

    Returns:
        The thread that an unfinished pass came to, or `""`; None if it is not this process's turn.
    """
    row = connection.execute(TAKE_TURN, {"holder": holder, "seconds": TURN_SECONDS, "interval": interval}).fetchone()
    return None if row is None else str(row["came_to"])


def keep_turn(connection: Connection, holder: str, came_to: str) -> bool:
    """Note where the pass has come to, and go on holding the turn.

    Returns:
        False if another process has taken it over.
    """
    values = {"holder": holder, "seconds": TURN_SECONDS, "came_to": came_to}
    return connection.execute(KEEP_TURN, values).fetchone() is not None


def end_turn(connection: Connection, holder: str, *, finished: bool) -> None:
    """Give the turn back; a pass that is not finished is gone on with by the next one who takes it."""
    connection.execute(END_TURN, {"holder": holder, "finished": finished})


def next_threads(connection: Connection, after: str, rules: Rules) -> ThreadPage:
    """Look at the next threads.

    Args:
        connection: A connection to the cold tier.
        after: The last thread of the previous page, or `""`.
        rules: What may make a thread a candidate.
    """
    names = connection.execute(NEXT_THREADS, {"after": after, "limit": PAGE}).fetchall()
    if not names:
        return ThreadPage(0, after, ())
    usable = [row["thread_id"] for row in names if not row["quarantined"]]
    candidates: dict[str, None] = {}
    busy = set()
    for row in connection.execute(SUMMARIES, (usable,), prepare=False):
        count, name = row["checkpoints"], row["thread_id"]
        newest = made_at({"ts": row["newest_ts"], "checkpoint_id": row["newest"]}) or math.inf
        oldest = made_at({"ts": row["oldest_ts"], "checkpoint_id": row["oldest"]}) or math.inf
        if rules.idle_before is None or newest >= rules.idle_before:
            busy.add(name)
        too_many = rules.keep_last is not None and count > rules.keep_last
        # A subgraph call's only checkpoint may go, with the root checkpoint that it started from.
        too_old = rules.before is not None and oldest < rules.before and (count > 1 or ":" in row["checkpoint_ns"])
        if too_many or too_old:
            candidates[name] = None
    idle = [name for name in usable if name not in busy]
    return ThreadPage(len(names), names[-1]["thread_id"], sorted({*candidates, *idle}))
