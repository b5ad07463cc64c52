"""Run leases in PostgreSQL, which is the authority on who holds one; by its own clock, and no other.

A lease that has ended is gone, even if nobody took it: somebody without a lease may have written meanwhile.
"""

from __future__ import annotations

from langgraph_tiered_saver.cold import direct
from langgraph_tiered_saver.cold.pool import Connection, set_timeouts
from langgraph_tiered_saver.cold.schema import GENERATION_LOCK, LOCK_CLASS

ACQUIRE = """
INSERT INTO tiered_threads AS t (thread_id, run_lease, run_lease_ends)
VALUES (%s, %s, clock_timestamp() + make_interval(secs => %s))
ON CONFLICT (thread_id) DO UPDATE SET run_lease = EXCLUDED.run_lease, run_lease_ends = EXCLUDED.run_lease_ends
WHERE t.run_lease IS NULL OR t.run_lease = EXCLUDED.run_lease OR t.run_lease_ends <= clock_timestamp()
RETURNING true AS held"""

RENEW = """
UPDATE tiered_threads SET run_lease_ends = clock_timestamp() + make_interval(secs => %(ttl)s)
WHERE thread_id = %(thread)s AND run_lease = %(token)s AND run_lease_ends > clock_timestamp()
RETURNING true AS held"""

RELEASE = """
UPDATE tiered_threads SET run_lease = NULL, run_lease_ends = NULL WHERE thread_id = %s AND run_lease = %s"""

# The condition on the lease is what the index is on.
UNEXPIRED = """
SELECT thread_id, run_lease, (extract(epoch FROM run_lease_ends - clock_timestamp()) * 1000000)::bigint AS left
FROM tiered_threads WHERE run_lease IS NOT NULL AND run_lease_ends > clock_timestamp()"""


def acquire(
    connection: Connection,
    thread_id: str,
    token: str,
    ttl: float,
    *,
    statement_timeout: float,
    closed: int | None = None,
) -> bool:
    """Take a thread's lease if it is free, has ended, or is the caller's already.

    Args:
        connection: In autocommit mode.
        thread_id: The thread.
        token: Names the holder.
        ttl: Seconds from now until it ends.
        statement_timeout: Seconds for each statement.
        closed: The generation that must be closed, if PostgreSQL alone decides. Whoever opens it then tells Redis of
            this lease.

    Returns:
        Whether the caller holds it now.

    Raises:
        GenerationMovedError: the generation is not closed any more; nothing was changed.
    """
    with connection.transaction(), connection.cursor() as cursor:
        set_timeouts(connection, statement_timeout)
        if closed is not None:
            cursor.execute("SELECT pg_advisory_xact_lock_shared(%s, %s)", (LOCK_CLASS, GENERATION_LOCK))
            direct.check(connection, closed)
        return cursor.execute(ACQUIRE, (thread_id, token, ttl)).fetchone() is not None


def renew(connection: Connection, thread_id: str, token: str, ttl: float, *, statement_timeout: float) -> bool:
    """Put off a lease's end, if it is the caller's and has not ended; tell whether it was.

    Args:
        connection: In autocommit mode.
        thread_id: The thread.
        token: Names the holder.
        ttl: Seconds from now until it ends.
        statement_timeout: Seconds for each statement.
    """
    with connection.transaction(), connection.cursor() as cursor:
        set_timeouts(connection, statement_timeout)
        values = {"thread": thread_id, "token": token, "ttl": ttl}
        return cursor.execute(RENEW, values).fetchone() is not None


def release(connection: Connection, thread_id: str, token: str, *, statement_timeout: float) -> bool:
    """Give a lease up, if it is the caller's; tell whether it was."""
    with connection.transaction(), connection.cursor() as cursor:
        set_timeouts(connection, statement_timeout)
        return cursor.execute(RELEASE, (thread_id, token)).rowcount > 0


def unexpired(connection: Connection) -> list[tuple[str, str, int]]:
    """List the leases that are held: thread, token, and the microseconds that are left."""
    return [(row["thread_id"], row["run_lease"], row["left"]) for row in connection.execute(UNEXPIRED)]
