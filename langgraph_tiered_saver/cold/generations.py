"""The hot tier's generations, of which PostgreSQL is the arbiter.

A generation is open while hot state may be trusted. When Redis is away, or back with less than it had, whoever notices
starts the next one, closed: from then on every live process (a member) must flush what it acknowledged before and
report, and only then is anything read from PostgreSQL or written straight to it. Once Redis answers again and nobody
goes past it any more, somebody opens the generation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from psycopg.rows import DictRow

from langgraph_tiered_saver.cold.pool import Connection
from langgraph_tiered_saver.cold.schema import GENERATION_LOCK, LOCK_CLASS

LONGEST_OPENING = 2.0  # seconds

READ = "SELECT number, opened FROM tiered_generation"

START = """
UPDATE tiered_generation SET number = number + 1, opened = false, started_at = clock_timestamp()
WHERE number = %s AND opened"""

OPEN = """
UPDATE tiered_generation SET opened = true
WHERE number = %s AND NOT opened AND unreachable_at < clock_timestamp() - make_interval(secs => %s)"""

MARK_UNREACHABLE = "UPDATE tiered_generation SET unreachable_at = clock_timestamp()"

REPORT = """
INSERT INTO tiered_members (member, generation, seen_at)
SELECT %s, coalesce(%s, number), clock_timestamp() FROM tiered_generation
ON CONFLICT (member) DO UPDATE SET generation = EXCLUDED.generation, seen_at = EXCLUDED.seen_at"""

FORGET = "DELETE FROM tiered_members WHERE member = %s OR seen_at < clock_timestamp() - interval '1 day'"

# A member that has shown itself lately is waited for as long as it does; any other one for so long as a live one would
# need to hear of the new generation.
LAGGARDS = """
SELECT count(*) AS count FROM tiered_members AS m, tiered_generation AS g
WHERE m.generation < %(number)s AND (
    m.seen_at > clock_timestamp() - make_interval(secs => %(patience)s)
    OR (m.seen_at > g.started_at - make_interval(secs => %(horizon)s)
        AND clock_timestamp() < g.started_at + make_interval(secs => %(patience)s)))"""


@dataclass(frozen=True)
class Generation:
    """The current generation: its number, and whether hot state may be trusted."""

    number: int
    opened: bool


def read(connection: Connection) -> Generation:
    """Read the current generation."""
    return of_row(connection.execute(READ).fetchone())


def of_row(row: DictRow | None) -> Generation:
    """Give the generation that was read."""
    # Without a row nothing hot can be trusted, and nothing can be written past it; setup() mends it.
    return Generation(row["number"], row["opened"]) if row else Generation(0, opened=False)


def start(connection: Connection, number: int) -> Generation:
    """Start the generation after an open one, unless somebody has done so; give the current one."""
    connection.execute(START, (number,))
    return read(connection)


def report(connection: Connection, member: str, number: int | None) -> Generation:
    """Tell that a process trusts no hot state older than a generation, nor holds records of one; or that it lives.

    Args:
        connection: A connection to the cold tier.
        member: The process.
        number: The generation; None for the current one, of a process that begins.

    Returns:
        The current generation.
    """
    connection.execute(REPORT, (member, number))
    return read(connection)


def forget(connection: Connection, member: str) -> None:
    """Remove a process that ends, and those that ended without a word long ago."""
    connection.execute(FORGET, (member,))


def laggards(connection: Connection, number: int, patience: float, horizon: float) -> int:
    """Count the processes that may still hold records of older generations.

    Args:
        connection: A connection to the cold tier.
        number: The generation.
        patience: Seconds after which a silent process counts as dead.
        horizon: Seconds of silence before the generation began after which it is not waited for at all.
    """
    row = connection.execute(LAGGARDS, {"number": number, "patience": patience, "horizon": horizon}).fetchone()
    return int(row["count"]) if row else 0


def mark_unreachable(connection: Connection) -> None:
    """Note that a process goes past a Redis that it cannot reach, which puts off the opening."""
    connection.execute(MARK_UNREACHABLE)


def open_generation(
    connection: Connection,
    number: int,
    quiet: float,
    before: Callable[[], None] = lambda: None,
    *,
    patience: float = LONGEST_OPENING,
) -> Generation:
    """Open a generation once Redis is prepared for it.

    Args:
        connection: A connection to the cold tier.
        number: The generation.
        quiet: Seconds for which nobody may have gone past a Redis that it could not reach.
        before: Called when nobody can go past Redis any more, and nobody trusts it yet; an error keeps it closed.
        patience: Seconds for which `before` may do nothing in PostgreSQL, while everybody waits. Then PostgreSQL ends
            this session, and nothing was opened.

    Returns:
        The current generation, which may be still closed, or another one.
    """
    with connection.transaction():
        # A process that is stopped, or ends, in the middle of this would keep the lock until its connection is gone.
        limit = str(int(patience * 1000))
        connection.execute("SELECT set_config('idle_in_transaction_session_timeout', %s, true)", (limit,))
        # Whoever is writing past Redis just now finishes first.
        connection.execute("SELECT pg_advisory_xact_lock(%s, %s)", (LOCK_CLASS, GENERATION_LOCK))
        if connection.execute(OPEN, (number, quiet)).rowcount:
            before()
    return read(connection)
